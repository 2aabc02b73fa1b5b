"""Damage is traced to rows and images, and mended bit for bit or not at all."""

import json
import os
import random
import re
import shutil

import numpy as np
import pytest
import storekit
from storekit import Images, flip

from ezsd.cache import (
    Store,
    StoreError,
    StoreIncomplete,
    StoreMismatch,
    collect,
    compare,
    info,
    list_stores,
    repair,
    verify,
)
from ezsd.cache.format.commit_mark import CommitMark, read_mark
from ezsd.cache.format.quantise import dequantise, quantise
from ezsd.cache.tools.verify import LocalFiles, Locator
from ezsd.pipeline.console.store_messages import repair_lines
from ezsd.pipeline.extraction.repair import repair_store


@pytest.fixture(params=["float16", "int8"])
def store(request, memory):
    return storekit.build(memory / "store", embedding=request.param)


def image_of_row(product, row):
    """Id of the image that a row of a product belongs to."""
    for image in zip(storekit.IDS, storekit.WIDTHS, storekit.HEIGHTS, strict=True):
        count = len(storekit.image_rows(*image)[product]["box"])
        if row < count:
            return image[0]
        row -= count
    raise AssertionError(row)


@pytest.mark.parametrize(
    ("embedding", "flips"),
    [("float16", 100), ("int8", 100), pytest.param("float16", 1000, marks=pytest.mark.slow)],
)
def test_flipped_bits_are_found_with_file_rows_and_images(memory, embedding, flips):
    store = storekit.build(memory / "store", embedding=embedding)
    chance = random.Random(1)
    files = [file for file in sorted(store.rglob("*")) if file.is_file()]
    sizes = [file.stat().st_size for file in files]
    for _ in range(flips):
        file = chance.choices(files, sizes)[0]
        bit = chance.randrange(8 * file.stat().st_size)
        flip(file, bit)
        name = file.relative_to(store).as_posix()
        if name == "COMMIT.json":
            with pytest.raises(StoreError, match=re.escape(str(file))):
                verify(store, deep=True)
        else:
            (found,) = verify(store, deep=True)
            assert found.name == name
            if "/c/" in name:
                assert_located(store, found, bit // 8)
        flip(file, bit)
    assert verify(store, deep=True) == []


def assert_located(store, found, byte):
    array, _, place = found.name.partition("/c/")
    if array.startswith("checksums/"):
        return
    import zarr

    opened = zarr.open_array(store / array, mode="r")
    row_bytes = opened.dtype.itemsize * int(np.prod(opened.shape[1:], dtype=int))
    row = int(place.partition("/")[0]) * opened.shards[0] + byte // row_bytes
    if row < min(opened.shape[0], (int(place.partition("/")[0]) + 1) * opened.shards[0]):
        assert any(start <= row < stop for start, stop in found.rows)
        product = array.partition("/")[0]
        if product in storekit.FIELDS and not array.endswith("offset"):
            assert image_of_row(product, row) in found.images
    assert found.rows


def test_every_single_file_is_mended_from_the_store_or_the_images(store):
    before = storekit.contents(store)
    embedding = info(store).embedding
    for name in read_mark(store).files:
        flip(store / name, 13)
        report = repair(store, Images(embedding=embedding))
        assert (report.repaired, report.left) == ((name,), ()), name
    assert storekit.contents(store) == before
    assert verify(store, deep=True) == []


def test_only_the_images_whose_rows_were_lost_are_computed(copy):
    last = max(int(shard.name) for shard in (copy / "regions/embedding/c").iterdir())
    (copy / f"regions/embedding/c/{last}/0").unlink()
    (damage,) = verify(copy)
    source = Images()
    repair(copy, source)
    asked = [storekit.IDS[place] for start, stop in source.asked for place in range(start, stop)]
    assert set(damage.images) <= set(asked)
    assert len(asked) < len(storekit.IDS)


@pytest.fixture(scope="module")
def chunked(tmp_path_factory):
    """A store with several chunks of embeddings in a shard; tests must not change it."""
    return storekit.build(tmp_path_factory.mktemp("chunked") / "store", shard_bytes=2**20, block_images=4)


@pytest.fixture
def damaged(chunked, memory):
    """A copy of it that a test may damage."""
    return shutil.copytree(chunked, memory / "damaged")


def computed(source):
    """Ids of the images that were computed, as often as they were."""
    return [storekit.IDS[place] for start, stop in source.asked for place in range(start, stop)]


def test_one_flipped_bit_costs_the_images_of_its_chunk(chunked, damaged):
    flip(damaged / "regions/embedding/c/0/0", 8 * 300 * storekit.DIM)
    (damage,) = verify(damaged, deep=True)
    source = Images()
    report = repair(damaged, source)
    assert computed(source) == list(damage.images)
    assert 0 < report.images == len(damage.images) < len(storekit.IDS) - len(storekit.EMPTY)
    assert storekit.contents(damaged) == storekit.contents(chunked)


def test_an_image_is_computed_once_for_all_damaged_files(chunked, damaged):
    for name in ("regions/embedding/c/0/0", "regions/score/c/0", "proposals/box/c/0/0", "proposals/offset/c/0"):
        flip(damaged / name, 77)
    source = Images()
    assert not repair(damaged, source).left
    assert len(computed(source)) == len(set(computed(source)))
    assert storekit.contents(damaged) == storekit.contents(chunked)


def test_what_annotations_say_needs_no_teacher(chunked, damaged):
    names = ("offset/c/0", "box/c/0/0", "class_index/c/0", "annotation_id/c/0")
    for name in names:
        flip(damaged / "ground_truth" / name, 77)
    source = Images()
    report = repair(damaged, source)
    assert set(report.repaired) == {f"ground_truth/{name}" for name in names}
    assert (report.images, source.asked) == (0, [])
    assert storekit.contents(damaged) == storekit.contents(chunked)


def test_a_damaged_chunk_index_costs_no_image_and_needs_none(chunked, damaged):
    for name in ("regions/embedding/c/0/0", "proposals/score/c/0"):
        flip(damaged / name, 8 * (damaged / name).stat().st_size - 1)
    with (damaged / "regions/box/c/0/0").open("ab") as file:
        file.write(b"more")
    assert not repair(damaged).left
    assert storekit.contents(damaged) == storekit.contents(chunked)


def test_the_good_half_of_a_file_that_was_cut_is_kept(chunked, damaged):
    os.truncate(damaged / "regions/embedding/c/0/0", 2 * storekit.DIM * 600)
    source = Images()
    assert not repair(damaged, source).left
    ids = storekit.IDS
    assert ids[0] not in computed(source)
    assert ids[-1] in computed(source)
    assert storekit.contents(damaged) == storekit.contents(chunked)


def test_a_damaged_checksum_beside_damaged_rows_costs_its_own_chunk(chunked, damaged):
    flip(damaged / "regions/embedding/c/0/0", 77)
    flip(damaged / "checksums/regions/embedding/c/0", 8 * 4 * 2)
    source = Images()
    assert not repair(damaged, source).left
    assert len(computed(source)) < len(storekit.IDS) - len(storekit.EMPTY)
    assert storekit.contents(damaged) == storekit.contents(chunked)


@pytest.mark.parametrize("seed", range(4))
def test_any_damage_to_many_files_is_mended_to_the_same_bytes(store, memory, seed):
    chance = random.Random(seed)
    damaged = shutil.copytree(store, memory / "damaged")
    shards = [name for name in read_mark(store).files if "/c/" in name]
    for name in chance.sample(sorted(shards), 12):
        file, way = damaged / name, chance.choice(["flip", "flip", "cut", "zero", "gone"])
        if way == "gone":
            file.unlink()
        elif way == "cut":
            os.truncate(file, chance.randrange(file.stat().st_size))
        elif way == "zero":
            file.write_bytes(bytes(file.stat().st_size))
        else:
            for _ in range(3):
                flip(file, chance.randrange(8 * file.stat().st_size))
    source = Images(embedding=info(store).embedding)
    assert not repair(damaged, source).left
    assert len(computed(source)) == len(set(computed(source)))
    assert storekit.contents(damaged) == storekit.contents(store)


def test_a_repair_goes_on_where_it_was_stopped(chunked, damaged):
    class Stopped(Images):
        def rows(self, blocks, stored):
            for place, rows in enumerate(super().rows(blocks, stored)):
                if place:
                    raise KeyboardInterrupt
                yield rows

    flip(damaged / "regions/embedding/c/0/0", 8 * 300 * storekit.DIM)
    flip(damaged / "ground_truth/box/c/0/0", 8)
    flip(damaged / "proposals/box/c/0/0", 8)
    with pytest.raises(KeyboardInterrupt):
        repair(damaged, Stopped())
    assert not (damaged / "journal").exists()
    assert "ground_truth/box/c/0/0" not in {found.name for found in verify(damaged, deep=True)}
    assert not repair(damaged, Images()).left
    assert storekit.contents(damaged) == storekit.contents(chunked)


@pytest.mark.parametrize("way", ["gone", "cut", "empty", "flipped", "version"])
def test_a_lost_commit_mark_is_made_again_from_the_rest(store, way):
    before, mark = storekit.contents(store), store / "COMMIT.json"
    data = mark.read_bytes()
    mark.unlink()
    if way != "gone":
        changed = {
            "cut": data[:100],
            "empty": b"",
            "version": data.replace(b'"format_version":2', b'"format_version":6'),
        }
        mark.write_bytes(changed.get(way, data[:2000] + b"0" + data[2001:]))
    for door in (Store, info, verify):
        with pytest.raises(StoreError, match=re.escape(f"where all else is whole, `repair({store})` makes")):
            door(store)
    assert repair(store).repaired == ("COMMIT.json",)
    assert storekit.contents(store) == before
    assert verify(store, deep=True) == []


def test_the_mark_of_a_store_set_aside_is_made_again_too(copy):
    before = storekit.contents(copy)
    (copy / "COMMIT.json").unlink()
    (copy / "INCOMPLETE.json").write_bytes(b"{")
    assert repair(copy).repaired == ("COMMIT.json",)
    assert storekit.contents(copy) == before


# A mark is made of names and digests, whatever the embeddings are.
@pytest.mark.parametrize("store", ["float16", pytest.param("int8", marks=pytest.mark.slow)], indirect=True)
def test_no_mark_is_made_for_a_store_with_any_other_damage(store):
    names = sorted(read_mark(store).files)
    (store / "COMMIT.json").unlink()
    chance = random.Random(2)
    for name in names:
        file = store / name
        data = file.read_bytes()
        for way in ("flip", "cut", "more", "gone"):
            if way == "flip":
                flip(file, chance.randrange(8 * len(data)))
            elif way == "gone":
                file.unlink()
            else:
                file.write_bytes(data[:-1] if way == "cut" else data + b"0")
            with pytest.raises(StoreError, match="COMMIT.json|manifest.json|zarr.json"):
                repair(store, None if way == "flip" else Images(embedding="float16"))
            assert not (store / "COMMIT.json").exists()
            file.write_bytes(data)
    assert repair(store).repaired == ("COMMIT.json",)


def test_a_new_mark_is_told_by_its_digest(copy):
    digest = Store(copy).digest
    (copy / "COMMIT.json").unlink()
    report = repair(copy)
    assert report.remade == digest == Store(copy).digest
    assert any(digest in line and "ezsd cache diff" in line for line in repair_lines(copy, report))
    assert repair(copy).remade is None


def test_a_new_mark_needs_neither_images_nor_teacher(copy, tmp_path):
    (copy / "COMMIT.json").unlink()
    assert repair_store(copy, tmp_path / "none", weights=None, device="cpu").repaired == ("COMMIT.json",)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("text", [], "does not describe 'text' as of node_type 'group'"),
        ("images/id", {"shape": [1e999]}, "does not describe the arrays of a store"),
        ("regions/score", {"node_type": "group"}, "does not describe 'regions/score' as of node_type 'array'"),
        ("checksums/text", {"node_type": "array"}, "does not describe 'checksums/text' as of node_type 'group'"),
    ],
)
def test_no_mark_is_made_where_a_node_is_not_what_its_name_says(copy, name, value, words):
    root = json.loads((copy / "zarr.json").read_text())
    nodes = root["consolidated_metadata"]["metadata"]
    nodes[name] = {**nodes[name], **value} if isinstance(value, dict) else value
    (copy / "COMMIT.json").unlink()
    # Further digits than a float has are infinity, which JSON does not forbid to write.
    (copy / "zarr.json").write_text(json.dumps(root, sort_keys=True).replace("Infinity", "1e999"))
    with pytest.raises(StoreError, match=re.escape(words)):
        repair(copy)


def unlisted(store, name):
    """Take a file out of the commit mark."""
    mark = read_mark(store)
    files = {file: digest for file, digest in mark.files.items() if file != name}
    (store / "COMMIT.json").write_bytes(
        CommitMark(mark.manifest_digest, mark.embed_dim, mark.embedding, files).to_bytes()
    )


def test_rows_whose_offsets_the_mark_does_not_list_are_left(copy):
    unlisted(copy, "regions/offset/c/0")
    flip(copy / "regions/score/c/0", 9)
    assert [damage.name for damage in repair(copy, Images()).left] == ["regions/score/c/0"]


def test_no_checksums_are_read_that_the_mark_does_not_list(copy, tmp_path):
    name = "checksums/regions/score/c/0"
    unlisted(copy, name)
    (copy / name).rename(tmp_path / "outside")
    (copy / name).symlink_to(tmp_path / "outside")
    flip(copy / "regions/score/c/0", 9)
    locate = Locator(LocalFiles(copy), read_mark(copy))
    assert locate.doubtful("checksums/regions/score") is None
    assert locate.doubtful("checksums/regions/box") is not None
    assert repair(copy, Images()).left == ()


def test_a_manifest_of_another_store_is_not_compared(copy, finished):
    (copy / "manifest.json").write_text(storekit.manifest(teacher={"seed": 4}).to_json())
    with pytest.raises(StoreError, match=r"manifest.json: is not the manifest this store was committed with"):
        compare(copy, finished)


def test_no_mark_is_made_for_a_build_or_a_copy_that_is_not_finished(copy, tmp_path):
    (copy / "COMMIT.json").rename(copy / "TRANSFER.json")
    with pytest.raises(StoreIncomplete, match="not all files were copied here"):
        repair(copy)
    with pytest.raises(StoreError, match="is not a store"):
        repair(tmp_path)


def test_without_images_metadata_and_checksums_alone_are_mended_and_the_store_is_marked(copy):
    for name in ("zarr.json", "checksums/regions/box/c/0", "regions/box/c/0/0"):
        flip(copy / name, 13)
    report = repair(copy)
    assert set(report.repaired) == {"zarr.json"}
    assert {found.name for found in report.left} == {"regions/box/c/0/0", "checksums/regions/box/c/0"}
    for door in (Store, storekit.open_writer):
        with pytest.raises(StoreIncomplete, match="was marked incomplete; `repair.*, source\\)`"):
            door(copy)
    assert not info(copy).complete
    assert repair(copy, Images()).left == ()
    assert info(copy).complete
    assert verify(copy, deep=True) == []


def test_rows_that_come_out_otherwise_are_not_put_into_the_store(copy):
    (copy / "regions/box/c/0/0").unlink()
    report = repair(copy, Images(most=20))
    assert [found.name for found in report.left] == ["regions/box/c/0/0"]
    assert not (copy / "regions/box/c/0/0").exists()
    with pytest.raises(StoreIncomplete):
        Store(copy)


def test_a_source_of_another_store_is_refused(copy):
    with pytest.raises(StoreMismatch, match="make another store than this one"):
        repair(copy, Images(teacher={"seed": 4}))


def test_an_unfinished_store_is_not_repaired(tmp_path):
    storekit.open_writer(tmp_path / "store").close()
    with pytest.raises(StoreError, match="was never finished"):
        repair(tmp_path / "store")


def test_an_intact_store_is_left_alone(copy):
    assert repair(copy) == repair(copy, Images())
    assert storekit.contents(copy) == storekit.contents(storekit.build(copy))


def test_leftovers_are_named_and_removed_and_nothing_else(copy, tmp_path):
    before = storekit.contents(copy)
    (copy / "journal").mkdir()
    (copy / "journal/part").write_bytes(b"123")
    (copy / "regions/notes.txt").write_text("mine")
    assert collect(copy).removed == {"journal/part": 3}
    assert collect(copy, strays=True).removed == {"regions/notes.txt": 4}
    assert storekit.contents(copy) == before
    assert (copy / "environment.json").exists()
    unfinished = tmp_path / "unfinished"
    storekit.open_writer(unfinished).close()
    (unfinished / "journal/tmp/block").mkdir()
    (unfinished / "journal/tmp/block/data.raw").write_bytes(b"1")
    assert collect(unfinished).removed == {"journal/tmp/block/data.raw": 1}
    with storekit.open_writer(unfinished) as writer, pytest.raises(StoreError, match="another process is building"):
        collect(writer.path)
    with pytest.raises(StoreError, match="is not a store"):
        collect(tmp_path)


def test_stores_are_compared_by_settings_products_and_content(finished, memory):
    other = storekit.build(
        memory / "other",
        manifest=storekit.manifest(regions={"keep": 20}),
        rows=lambda b: storekit.block_rows(b, most=20),
    )
    found = compare(finished, other)
    assert list(map(str, found.settings)) == ["regions.keep: store has 150, wanted 20"]
    assert found.same_fingerprint == ("teacher", "text", "proposals", "ground_truth")
    assert any(line.startswith("regions/embedding: shard 0") for line in found.content)
    assert compare(finished, finished).content == ()


def test_stores_of_a_folder_are_listed(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "whole")
    storekit.open_writer(tmp_path / "begun").close()
    shutil.copytree(finished, tmp_path / "hurt")
    flip(tmp_path / "hurt/COMMIT.json", 99)
    (tmp_path / "pictures").mkdir()
    found = list_stores(tmp_path)
    assert [path.name for path in found] == ["begun", "hurt", "whole"]
    assert isinstance(found[tmp_path / "hurt"], StoreError)
    assert found[tmp_path / "whole"].complete


@pytest.mark.parametrize("dim", [8, 63, 512, 1024])
def test_rounded_rows_have_unit_length_and_come_out_the_same_when_rounded_again(dim):
    rows = np.random.default_rng(dim).standard_normal((5000, dim)).astype("f4")
    rows[0] = 0
    rows[0, 3] = 1
    rows[1:100, 5] *= 50
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype("f2")
    codes, scale = quantise(rows)
    again = dequantise(codes, scale)
    assert codes.min() >= -127
    np.testing.assert_allclose(np.linalg.norm(again, axis=1), 1, atol=1e-6)
    exact = rows.astype("f4") / np.linalg.norm(rows.astype("f4"), axis=1, keepdims=True)
    assert ((exact * again).sum(1)).min() > 0.995
    for rounded in (again.astype("f2"), again.astype("f2").astype("f4").astype("f2")):
        once_more, same_scale = quantise(rounded)
        np.testing.assert_array_equal(once_more, codes)
        np.testing.assert_array_equal(same_scale, scale)
