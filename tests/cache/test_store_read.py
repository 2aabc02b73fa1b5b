"""Reading: straight from the shards, through zarr, one image or many, in every kind of process: the same rows."""

import errno
import gc
import json
import mmap
import multiprocessing
import os
import pickle
import re
import shutil
import weakref

import numpy as np
import pytest
import storekit
import zarr
from readkit import digest, load
from storekit import flip, recommit

import ezsd.cache.storage.direct
from ezsd.cache import Store, StoreError, StoreKeyError
from ezsd.cache.storage.arrays import ZarrArray, all_finite
from ezsd.cache.storage.direct import MappedArray, direct_spec, open_mapped

FIRST = next(image for image in storekit.IDS if image not in storekit.EMPTY)
SHARD = "regions/embedding/c/0/0"


@pytest.fixture(scope="session")
def int8(tmp_path_factory):
    """A complete store that keeps its embeddings as int8."""
    return storekit.build(tmp_path_factory.mktemp("int8") / "store", embedding="int8")


def rewrite(store, name, **changes):
    """Write an array anew through zarr with another layout, and commit the store as it is then."""
    values = zarr.open_array(store / name, mode="r")[:]
    shutil.rmtree(store / name)
    settings = {"chunks": (100, *values.shape[1:]), "shards": (300, *values.shape[1:]), "fill_value": 0}
    zarr.create_array(store / name, data=values, **{**settings, **changes})
    recommit(store)


def mapped(folder):
    """An array of ours, all of whose shards must be."""
    return open_mapped(folder, lambda: pytest.fail("read through zarr"))


def array_of(store, name):
    return store._here.array(name)


def same_record(found, expected):
    for name in expected.__slots__:
        a, b = getattr(found, name), getattr(expected, name)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# Straight from the shards


def test_our_own_arrays_are_read_without_zarr(finished):
    store = Store(finished, verify="quick")
    for product, fields in storekit.FIELDS.items():
        for field in fields:
            array = array_of(store, f"{product}/{field}")
            assert isinstance(array, MappedArray)
            plain = zarr.open_array(finished / product / field, mode="r")
            np.testing.assert_array_equal(array.read(0, array.shape[0]), plain[:])


def test_rows_across_a_shard_boundary_are_put_together(finished):
    array = mapped(finished / "regions/embedding")
    expected = zarr.open_array(finished / "regions/embedding", mode="r")[:]
    assert len(expected) > 2 * 256
    for start, stop in [(255, 257), (0, len(expected)), (256, 512), (200, 520), (7, 7), (len(expected), len(expected))]:
        np.testing.assert_array_equal(array.read(start, stop), expected[start:stop])


@pytest.mark.parametrize(
    "change",
    [
        {"compressors": zarr.codecs.ZstdCodec()},
        {"compressors": None, "shards": None},
        {"compressors": None, "fill_value": 0},
        {"compressors": None, "serializer": zarr.codecs.BytesCodec(endian="big")},
    ],
)
def test_any_other_layout_is_read_through_zarr_with_the_same_result(finished, copy, change):
    rewrite(copy, "regions/embedding", **change)
    store, expected = Store(copy, verify="quick"), Store(finished)
    assert isinstance(array_of(store, "regions/embedding"), ZarrArray)
    assert isinstance(array_of(store, "regions/box"), MappedArray)
    for image_id in storekit.IDS:
        same_record(store.regions[image_id], expected.regions[image_id])
    same_record(store.regions.batch(storekit.IDS).rows, expected.regions.batch(storekit.IDS).rows)


@pytest.mark.parametrize(
    ("chunks", "shards", "part"), [((2**27, 1), None, "chunks"), ((1, 1), (2**25, 1), "index of a shard")]
)
def test_an_array_that_asks_for_more_memory_than_any_of_ours_is_refused(tmp_path, chunks, shards, part):
    array = zarr.create_array(tmp_path / "a", shape=(2**30, 1), dtype="f4", chunks=chunks, shards=shards)
    with pytest.raises(StoreError, match=rf"^here: {part}: expected at most 268,435,456 bytes, found 536,870,912 "):
        ZarrArray(array, "here")
    smaller = zarr.create_array(tmp_path / "b", shape=(2**30, 1), dtype="f4", chunks=(2**10, 1))
    assert ZarrArray(smaller, "here").read(5, 7).tolist() == [[0], [0]]


@pytest.mark.parametrize("kept", [0, 2**30])
def test_rows_read_through_zarr_by_slices_are_those_read_at_once(finished, monkeypatch, kept):
    monkeypatch.setattr("ezsd.cache.storage.arrays._KEPT_BYTES", kept)
    array = ZarrArray(zarr.open_array(finished / "regions/embedding", mode="r"), "here")
    expected = array_of(Store(finished), "regions/embedding")
    for start, stop in [(0, 3), (250, 300), (5, 5)]:
        np.testing.assert_array_equal(array.read(start, stop), expected.read(start, stop))


def test_chunks_out_of_file_order_are_read_through_zarr(finished, copy):
    # Another writer may place chunks as it likes: here the two of a shard in the other order.
    rewrite(copy, "regions/embedding", chunks=(256, storekit.DIM), shards=(512, storekit.DIM), compressors=None)
    metadata = json.loads((copy / "regions/embedding/zarr.json").read_text())
    metadata["fill_value"] = "NaN"
    (copy / "regions/embedding/zarr.json").write_text(json.dumps(metadata))
    expected = mapped(copy / "regions/embedding").read(0, 512).copy()
    data = bytearray((copy / SHARD).read_bytes())
    size = 256 * storekit.DIM * 2
    data[: 2 * size] = data[size : 2 * size] + data[:size]
    index = np.array([size, size, 0, size], "<u8").tobytes()
    import google_crc32c

    data[2 * size :] = index + google_crc32c.value(index).to_bytes(4, "little")
    (copy / SHARD).write_bytes(data)
    recommit(copy)
    with pytest.raises(pytest.fail.Exception, match="read through zarr"):
        mapped(copy / "regions/embedding").read(0, 512)
    array = array_of(Store(copy, verify="quick"), "regions/embedding")
    assert isinstance(array, MappedArray)
    for start, stop in [(0, 512), (250, 260), (3, 3)]:
        np.testing.assert_array_equal(array.read(start, stop), expected[start:stop])
    array.read_ahead([(0, 512)])
    same_record(Store(copy).regions.batch(storekit.IDS).rows, Store(finished).regions.batch(storekit.IDS).rows)


@pytest.mark.parametrize("key", ["shape", "data_type", "codecs", "zarr_format", "node_type"])
def test_metadata_that_zarr_cannot_read_are_one_line(copy, key):
    file = copy / "regions/embedding/zarr.json"
    file.write_text(file.read_text().replace(f'"{key}"', f'"x{key[1:]}"'))
    recommit(copy)
    with pytest.raises(StoreError, match="regions/embedding: zarr cannot read this array .*the store is damaged"):
        Store(copy).regions[FIRST]


def test_a_damaged_chunk_index_is_refused_and_not_read_around(copy):
    file = copy / SHARD
    data = bytearray(file.read_bytes())
    data[-10] ^= 1
    file.write_bytes(data)
    with pytest.raises(StoreError, match=f"{SHARD}: the chunk index does not match its checksum"):
        Store(copy).regions[FIRST]


@pytest.mark.parametrize("length", [0, 3])
def test_a_shard_too_short_for_an_index_is_refused(copy, length):
    with (copy / SHARD).open("r+b") as file:
        file.truncate(length)
    with pytest.raises(StoreError, match=f"{SHARD}: is {length} bytes long, too short for a shard"):
        mapped(copy / "regions/embedding").read(0, 1)


@pytest.mark.parametrize("metadata", [{}, {"codecs": []}, {"codecs": [{"name": "bytes"}]}, {"codecs": None}])
def test_metadata_of_other_kinds_have_no_direct_layout(metadata):
    assert direct_spec(metadata, "a") is None


def test_rows_handed_out_can_be_changed_and_the_files_cannot(finished):
    store = Store(finished)
    record = store.regions[FIRST]
    before = record.embedding.copy()
    record.embedding[:] = 0
    np.testing.assert_array_equal(store.regions[FIRST].embedding, before)
    assert not array_of(store, "regions/embedding").read(0, 3).flags.writeable


def test_an_image_is_the_same_the_first_time_and_later_and_its_memory_is_ones_own(finished):
    store = Store(finished)
    first = [store.regions[image] for image in storekit.IDS]
    again = [store.regions[image] for image in storekit.IDS]
    for one, other in zip(first, again, strict=True):
        for name in storekit.FIELDS["regions"]:
            a, b = getattr(one, name), getattr(other, name)
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
            assert b.flags.writeable
            assert b.flags.owndata
    for image, rows in zip(storekit.IDS, again, strict=True):
        column, counts = store.regions.column("embedding", [image])
        np.testing.assert_array_equal(column, rows.embedding)
        assert counts.tolist() == [len(rows.embedding)]
        assert column.flags.owndata


# Batches


@pytest.mark.parametrize("product", storekit.FIELDS)
@pytest.mark.parametrize("kind", ["finished", "int8"])
def test_a_batch_is_the_images_one_after_another(request, product, kind):
    source = getattr(Store(request.getfixturevalue(kind)), product)
    ids = [42, 5, 42, *reversed(storekit.IDS)]
    batch = source.batch(ids)
    singles = [source[image] for image in ids]
    assert batch.counts.tolist() == [len(single.box) for single in singles]
    assert batch.counts.dtype == np.int64
    for name in storekit.FIELDS[product]:
        expected = np.concatenate([getattr(single, name) for single in singles])
        assert getattr(batch.rows, name).dtype == expected.dtype
        np.testing.assert_array_equal(getattr(batch.rows, name), expected)
        rows, counts = source.column(name, ids)
        np.testing.assert_array_equal(rows, expected)
        np.testing.assert_array_equal(counts, batch.counts)


def test_a_batch_of_no_images_and_of_empty_ones_has_no_rows(finished):
    regions = Store(finished).regions
    for ids in ([], sorted(storekit.EMPTY)):
        batch = regions.batch(ids)
        assert batch.counts.tolist() == [0] * len(ids)
        assert batch.rows.embedding.shape == (0, storekit.DIM)


def test_a_batch_with_an_absent_image_names_it(finished):
    with pytest.raises(StoreKeyError, match="has no image with id 999; it holds 11 images"):
        Store(finished).regions.batch([3, 999])
    with pytest.raises(StoreKeyError, match=f"id {2**70}"):
        Store(finished).regions[2**70]
    with pytest.raises(StoreError, match="regions has no field 'size'; it has box, score"):
        Store(finished).regions.column("size", [3])


def test_the_disk_is_asked_once_for_all_rows_before_the_first_is_read(finished, monkeypatch):
    asked = []
    monkeypatch.setattr(MappedArray, "read_ahead", lambda self, spans: asked.append((self.shape, list(spans))))
    reads = []
    plain = MappedArray.read
    monkeypatch.setattr(MappedArray, "read", lambda self, *at: (reads.append(len(asked)), plain(self, *at))[1])
    store = Store(finished, verify="quick")
    store._here.column("regions/offset")
    store.image_ids  # noqa: B018
    reads.clear()
    store.regions.batch([70, 3, 11])
    assert len(asked) == len(storekit.FIELDS["regions"])
    assert all(len(spans) == 3 for _, spans in asked)
    assert set(reads) == {len(asked)}


def test_a_hint_reaches_the_kernel_for_long_ranges_and_changes_nothing(finished, monkeypatch):
    monkeypatch.setattr("ezsd.cache.storage.direct._HINTED", 0)
    array = mapped(finished / "regions/embedding")
    hints, plain = [], ezsd.cache.storage.direct.will_need

    def spy(data, *arguments):
        hints.append(arguments)
        plain(data, *arguments)

    monkeypatch.setattr("ezsd.cache.storage.direct.will_need", spy)
    array.read(0, 300)
    monkeypatch.setattr(MappedArray, "_in_memory", lambda *_: True)
    array.read_ahead([(0, 10), (250, 260)])
    assert hints == []
    monkeypatch.setattr(MappedArray, "_in_memory", lambda *_: False)
    array.read_ahead([(0, 10), (250, 260), (9, 9)])
    # Whole pages: rows 250 to 256 begin in the fourth page of the first shard, 256 to 260 begin the second.
    assert [(start, length) for start, length in hints] == [(0, 640), (3 * 4096, 4096), (0, 256)]


def test_few_ranges_are_asked_about_while_all_was_in_memory_and_all_again_once_one_is_not(finished, monkeypatch):
    for name, number in (("_HINTED", 0), ("_TRUSTED", 4), ("_SAMPLED", 3)):
        monkeypatch.setattr(f"ezsd.cache.storage.direct.{name}", number)
    array, asked, there, hints = mapped(finished / "regions/embedding"), [], [True], []
    monkeypatch.setattr(MappedArray, "_in_memory", lambda *at: (asked.append(at[2]), there[0])[1])
    monkeypatch.setattr("ezsd.cache.storage.direct.will_need", lambda _, *at: hints.append(at))
    array.read(0, 60)

    def questions(*spans):
        asked.clear()
        array.read_ahead(spans)
        return len(asked)

    assert [questions((0, 10)) for _ in range(10)] == [1, 1, 1, 1, 0, 0, 1, 0, 0, 1]
    assert questions((0, 10), (20, 30), (40, 50)) == 1
    assert hints == []
    there[0] = False
    assert questions((0, 10)) == 0
    # The range that stands for the others is not there.
    assert questions((0, 10), (20, 30)) == 2
    assert len(hints) == 2
    assert questions((0, 10)) == 1


def test_a_range_too_short_for_a_hint_does_not_stand_for_the_others(finished, monkeypatch):
    array, asked, there = mapped(finished / "regions/embedding"), [], [True]
    row_bytes = array._spec.row_bytes
    for name, number in (("_HINTED", mmap.PAGESIZE + 5 * row_bytes), ("_TRUSTED", 1), ("_SAMPLED", 1)):
        monkeypatch.setattr(f"ezsd.cache.storage.direct.{name}", number)
    monkeypatch.setattr(MappedArray, "_in_memory", lambda *at: (asked.append(at[2]), there[0])[1])
    array.read(0, 200)
    count = 2 * mmap.PAGESIZE // row_bytes
    array.read_ahead([(0, count)])
    there[0] = False
    asked.clear()
    array.read_ahead([(0, 1), (0, count), (1, count + 1)])
    assert len(asked) == 2


@pytest.mark.parametrize("missing", ["preadv", "RWF_NOWAIT"])
def test_a_system_that_cannot_say_what_is_in_memory_hints_at_every_range(finished, monkeypatch, missing):
    expected = Store(finished).regions.batch(storekit.IDS).rows
    monkeypatch.delattr(os, missing)
    monkeypatch.setattr("ezsd.cache.storage.direct._HINTED", 0)
    store = Store(finished, verify="quick")
    same_record(store.regions.batch(storekit.IDS).rows, expected)
    assert not array_of(store, "regions/embedding")._in_memory(0, 0)


def test_whether_rows_are_in_memory_is_asked_of_the_system(copy):
    array = mapped(copy / "regions/embedding")
    array.read(0, 256).sum()
    try:
        os.preadv(array._shards[0].descriptor, [bytearray(1)], 0, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            assert not array._in_memory(0, 0)
            pytest.skip("this file system cannot tell")
    assert array._in_memory(0, 0)
    assert not array._in_memory(0, 2**40)


def test_a_store_that_is_no_longer_used_waits_for_no_garbage_collector(finished):
    store = Store(finished)
    for product in (store.regions, store.proposals, store.ground_truth):
        product.batch(storekit.IDS)
    gone = weakref.ref(store)
    gc.disable()
    try:
        del store, product
        assert gone() is None
    finally:
        gc.enable()


def test_arrays_that_are_no_longer_used_leave_no_file_open(finished):
    def opened():
        return len(os.listdir("/proc/self/fd"))

    gc.collect()
    before = opened()
    array = mapped(finished / "regions/embedding")
    assert opened() == before
    array.read(0, 1)
    assert opened() == before + 1
    array.read(0, array.shape[0])
    assert opened() == before + len(array._shards) > before + 2
    del array
    gc.collect()
    assert opened() == before


# int8


def test_int8_rows_come_as_unit_float16_close_to_what_was_written(finished, int8):
    exact, rounded = Store(finished), Store(int8)
    for image_id in storekit.IDS:
        for product in ("regions", "ground_truth"):
            a, b = getattr(exact, product)[image_id].embedding, getattr(rounded, product)[image_id].embedding
            assert b.dtype == np.float16
            lengths = np.linalg.norm(b.astype("f4"), axis=1)
            np.testing.assert_allclose(lengths, 1, atol=1e-3)
            cosine = (a.astype("f4") * b.astype("f4")).sum(axis=1)
            assert (cosine > 0.999).all()
    assert array_of(rounded, "regions/embedding").dtype == np.int8


def test_an_int8_scale_that_is_not_finite_is_refused(int8, tmp_path):
    store = shutil.copytree(int8, tmp_path / "copy")
    with (store / "regions/embedding_scale/c/0").open("r+b") as file:
        file.write(np.float32(np.nan).tobytes())
    with pytest.raises(StoreError, match=f"regions/embedding_scale of image {FIRST}: holds a value that is not finite"):
        Store(store, verify="quick").regions[FIRST]


# Values that are not finite


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("field", "dtype"), [("embedding", "f2"), ("score", "f4"), ("box", "f4")])
def test_a_row_that_is_not_finite_is_refused_with_image_and_field(copy, value, field, dtype):
    row_of = {"embedding": storekit.DIM * 2, "score": 4, "box": 16}[field]
    row = len(storekit.image_rows(70, 64, 48)["regions"]["box"])
    file = copy / "regions" / field / ("c/0" if field == "score" else "c/0/0")
    with file.open("r+b") as handle:
        handle.seek(row * row_of)
        handle.write(np.array(value, dtype).tobytes())
    store = Store(copy, verify="quick")
    assert len(store.regions[70].box) == row
    for _ in range(2):
        with pytest.raises(StoreError, match=f"regions/{field} of image 3: holds a value that is not finite"):
            store.regions[3]
        with pytest.raises(StoreError, match=f"regions/{field} of image 3: holds a value that is not finite"):
            store.regions.batch([70, 11, 3])
    assert len(store.regions[11].box)


def test_the_quick_look_at_float16_is_exact():
    bits = np.arange(2**16, dtype=np.uint16)
    for value in (bits, bits[::-1]):
        numbers = value.view(np.float16)
        for at in np.flatnonzero(~np.isfinite(numbers))[::37]:
            row = np.zeros(8, np.float16)
            row[at % 8] = numbers[at]
            assert not all_finite(row)
    assert all_finite(bits.view(np.float16)[np.isfinite(bits.view(np.float16))])
    assert all_finite(np.zeros((0, 4), np.float16))
    assert not all_finite(np.array([np.nan], np.float16))


# Full verification


def test_a_fully_verified_store_reads_the_same(finished):
    quick, full = Store(finished, verify="quick"), Store(finished)
    same_record(full.regions.batch(storekit.IDS).rows, quick.regions.batch(storekit.IDS).rows)
    same_record(full.proposals[3], quick.proposals[3])
    assert pickle.loads(pickle.dumps(full))._verify == "full"
    with pytest.raises(ValueError, match="verify must be 'quick' or 'full', got 'deep'"):
        Store(finished, verify="deep")


@pytest.mark.parametrize("product", storekit.FIELDS)
def test_no_value_of_a_damaged_chunk_is_handed_out_when_fully_verified(copy, product):
    for field in storekit.FIELDS[product]:
        file = copy / product / field / ("c/0/0" if field in ("box", "embedding") else "c/0")
        # The last bit of the first number: nothing about it is implausible.
        flip(file, 0)
        store = Store(copy, verify="full")
        name = f"{product}/{field}"
        message = f"^{re.escape(str(file))}: rows 0 to [0-9]+ of {name} do not match .*, of the images 70, 3.*repair"
        with pytest.raises(StoreError, match=message):
            getattr(store, product)[FIRST]
        with pytest.raises(StoreError, match=message):
            getattr(store, product).batch([FIRST])
        flip(file, 0)


def test_a_chunk_that_is_intact_is_read_beside_a_damaged_one(copy):
    flip(copy / SHARD, 0)
    full = Store(copy, verify="full")
    assert len(full.regions[12].embedding)


SMALL = (
    "regions/zarr.json",
    "zarr.json",
    "checksums/regions/embedding/c/0",
    "images/id/c/0",
    "images/width/c/0",
    "regions/offset/c/0",
    "text/zarr.json",
    "text/embedding/c/0/0",
    "teacher/values/c/0",
)


@pytest.mark.parametrize("verify", ["quick", "full"])
@pytest.mark.parametrize("name", SMALL)
def test_damage_to_a_file_that_holds_no_rows_is_found_at_once(copy, name, verify):
    flip(copy / name, 0)
    with pytest.raises(StoreError, match=f"{name}: its bytes are not those that were committed.*`repair\\(\\)`"):
        Store(copy, verify=verify)


def test_checksums_hold_for_an_array_read_through_zarr_too(finished, copy):
    rewrite(copy, "regions/embedding", compressors=zarr.codecs.ZstdCodec())
    store = Store(copy, verify="full")
    same_record(store.regions[3], Store(finished).regions[3])
    values = zarr.open_array(copy / "regions/embedding", mode="r+")
    values[0, 0] = 0
    recommit(copy)
    with pytest.raises(StoreError, match="regions/embedding: rows 0 to 255 of regions/embedding do not match their"):
        Store(copy, verify="full").regions[FIRST]


# Processes


@pytest.mark.parametrize(
    ("workers", "method", "at_once"),
    [
        *((0, None, at_once) for at_once in (False, True)),
        *((2, "fork", at_once) for at_once in (False, True)),
        (2, "spawn", False),
        (2, "forkserver", True),
        pytest.param(2, "spawn", True, marks=pytest.mark.slow),
        pytest.param(2, "forkserver", False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_data_loader_reads_the_same_however_its_workers_start(finished, workers, method, at_once):
    store = Store(finished)
    expected = load(store, 0, None, False)
    assert store._here._arrays
    assert load(store, workers, method, at_once) == expected


def test_a_store_inside_a_pickled_dataset_carries_no_rows(finished):
    store = Store(finished)
    store.regions.batch(storekit.IDS)
    assert len(pickle.dumps(store)) < 1000
    products = pickle.dumps((store.regions, store.product("regions")))
    assert len(products) < 1000
    rows, by_name = (product[FIRST] for product in pickle.loads(products))
    same_record(rows, store.regions[FIRST])
    np.testing.assert_array_equal(by_name["box"], rows.box)


def test_two_threads_read_at_once(finished):
    from concurrent.futures import ThreadPoolExecutor

    store = Store(finished)
    expected = [digest(store.regions[image].embedding) for image in storekit.IDS] * 8
    fresh = Store(finished)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda image: digest(fresh.regions[image].embedding), storekit.IDS * 8)) == expected


def test_the_methods_of_starting_processes_are_those_there_are():
    assert set(multiprocessing.get_all_start_methods()) == {"fork", "spawn", "forkserver"}
