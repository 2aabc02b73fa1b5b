"""Damage is traced to rows and images, and mended bit for bit or not at all."""

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
from ezsd.cache.format.commit_mark import read_mark
from ezsd.cache.format.quantise import dequantise, quantise


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


@pytest.mark.parametrize(("embedding", "flips"), [("float16", 1000), ("int8", 100)])
def test_a_thousand_flipped_bits_are_found_with_file_rows_and_images(memory, embedding, flips):
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


def test_without_images_metadata_and_checksums_alone_are_mended_and_the_store_is_marked(copy):
    for name in ("zarr.json", "checksums/regions/box/c/0", "regions/box/c/0/0"):
        flip(copy / name, 13)
    report = repair(copy)
    assert set(report.repaired) == {"zarr.json"}
    assert {found.name for found in report.left} == {"regions/box/c/0/0", "checksums/regions/box/c/0"}
    for door in (Store, storekit.open_writer):
        with pytest.raises(StoreIncomplete, match="was marked incomplete; `ezsd cache repair .* --data-root DIR`"):
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
