"""What is written is what any Zarr reader finds."""

import json
import multiprocessing
import random

import numpy as np
import pytest
import storekit
import zarr

from ezsd.cache import (
    GroundTruthRows,
    ProposalRows,
    RegionRows,
    Store,
    StoreError,
    StoreIncomplete,
    commit_shard,
    info,
    verify,
    write_block,
)
from ezsd.cache.format.schema import array_spec
from ezsd.cache.format.zarr_bytes import array_metadata

RECORDS = {"proposals": ProposalRows, "regions": RegionRows, "ground_truth": GroundTruthRows}


def expected_rows(product, field):
    images = [storekit.image_rows(*size) for size in zip(storekit.IDS, storekit.WIDTHS, storekit.HEIGHTS, strict=True)]
    return np.concatenate([rows[product][field] for rows in images])


def test_a_plain_zarr_reader_finds_dense_arrays_and_nothing_to_know(finished):
    group = zarr.open_group(finished, mode="r")
    for product, fields in storekit.FIELDS.items():
        offset = group[f"{product}/offset"][:]
        for field in fields:
            stored, expected = group[f"{product}/{field}"], expected_rows(product, field)
            assert stored.dtype == expected.dtype
            np.testing.assert_array_equal(stored[:], expected)
            assert len(offset) == len(storekit.IDS) + 1
            assert offset[-1] == len(expected)
    assert group["images/id"][:].tolist() == storekit.IDS
    assert group["images/width"][:].tolist() == storekit.WIDTHS
    assert group["images/height"][:].tolist() == storekit.HEIGHTS
    np.testing.assert_array_equal(group["text/embedding"][:], storekit.PER_STORE["text"][0]["embedding"])
    np.testing.assert_array_equal(group["teacher/values"][:], storekit.PER_STORE["teacher"][0]["values"])
    assert group["text"].attrs["names"] == storekit.NAMES


def test_embeddings_span_several_shards_of_whole_chunks(finished):
    embedding = zarr.open_array(finished / "regions/embedding", mode="r")
    assert embedding.chunks == (256, storekit.DIM)
    assert embedding.shards == (256, storekit.DIM)
    assert len(list((finished / "regions/embedding/c").iterdir())) > 1


@pytest.mark.parametrize("consolidated", [None, False])
def test_members_are_listed_without_a_warning_unless_the_copy_of_metadata_is_refused(finished, consolidated):
    group = zarr.open_group(finished, mode="r", use_consolidated=consolidated)
    if consolidated is None:
        names = {name for name, _ in group.members(max_depth=None)}
        assert {"regions", "regions/embedding", "text/embedding", "images/id"} <= names
    assert group["regions"]["embedding"].shape[1] == storekit.DIM


def test_metadata_and_shards_are_those_zarr_itself_writes(tmp_path):
    rows = np.random.default_rng(0).standard_normal((700, 40)).astype("f2")
    spec = array_spec("a", "<f2", rows.shape, shard_bytes=512 * 80)
    array = zarr.create_array(
        tmp_path,
        name="a",
        shape=rows.shape,
        dtype="f2",
        chunks=(256, 40),
        shards=(512, 40),
        compressors=None,
        fill_value=np.nan,
        config={"write_empty_chunks": True},
    )
    array[:] = rows
    assert array_metadata(spec) == json.loads((tmp_path / "a/zarr.json").read_text())
    from ezsd.cache.format.zarr_bytes import shard_parts

    assert b"".join(shard_parts(spec, 0, [rows[:512].tobytes()])) == (tmp_path / "a/c/0/0").read_bytes()


def test_records_by_image_id_are_the_rows_written(finished):
    store = Store(finished)
    for image in zip(storekit.IDS, storekit.WIDTHS, storekit.HEIGHTS, strict=True):
        for product, columns in storekit.image_rows(*image).items():
            record = getattr(store, product)[image[0]]
            assert type(record) is RECORDS[product]
            for name, values in columns.items():
                np.testing.assert_array_equal(getattr(record, name), values)
                assert getattr(record, name).dtype == values.dtype


def test_the_store_tells_what_is_in_it(finished):
    store = Store(finished)
    assert store.embed_dim == storekit.DIM
    assert store.image_ids.tolist() == storekit.IDS
    assert store.sizes.tolist() == [list(size) for size in zip(storekit.WIDTHS, storekit.HEIGHTS, strict=True)]
    names, embedding = store.text
    assert names == tuple(storekit.NAMES)
    assert embedding.shape == (3, storekit.DIM)
    values, attributes = store.teacher
    assert attributes == storekit.PER_STORE["teacher"][1]
    assert values.dtype == np.float32
    assert list(store.regions) == storekit.IDS
    assert len(store.regions) == len(storekit.IDS)


def test_images_without_rows_have_records_of_length_zero(finished):
    store = Store(finished)
    for image_id in storekit.EMPTY:
        record = store.regions[image_id]
        assert record.box.shape == (0, 4)
        assert record.embedding.shape == (0, storekit.DIM)


def test_a_store_whose_products_have_no_rows_is_legal(memory):
    path = storekit.build(memory / "store", rows=lambda block: storekit.block_rows(block, empty=set(storekit.IDS)))
    assert zarr.open_group(path, mode="r")["regions/embedding"][:].shape == (0, storekit.DIM)
    assert Store(path).ground_truth[3].annotation_id.shape == (0,)
    assert verify(path) == []


@pytest.mark.parametrize("image_id", [1, -5, 2**60])
def test_an_absent_image_is_an_error_with_its_id(finished, image_id):
    store = Store(finished)
    assert image_id not in store.regions
    assert store.regions.get(image_id) is None
    with pytest.raises(KeyError, match=f"^.*store: has no image with id {image_id}; it holds 11 images$"):
        store.regions[image_id]


def test_a_caller_that_changes_its_rows_changes_nobody_elses(finished):
    store = Store(finished)
    expected = store.regions[3].box.copy()
    store.regions[3].box[:] = 0
    np.testing.assert_array_equal(store.regions[3].box, expected)


def test_the_images_array_cannot_be_written_through(finished):
    with pytest.raises(ValueError, match="read-only"):
        Store(finished).image_ids[0] = 1


def test_moving_and_copying_the_folder_changes_nothing(finished, copy, tmp_path):
    moved = copy.rename(tmp_path / "elsewhere")
    assert storekit.contents(moved) == storekit.contents(finished)
    assert verify(moved) == []
    assert Store(moved).regions[3].box.shape == Store(finished).regions[3].box.shape
    for file in moved.rglob("*"):
        if file.is_file() and file.name != "environment.json":
            assert str(finished.parent).encode() not in file.read_bytes()


@pytest.mark.parametrize("arrange", [lambda work: work[::-1], lambda work: random.Random(1).sample(work, len(work))])
def test_the_order_of_blocks_and_shards_does_not_show(finished, memory, arrange):
    assert storekit.contents(storekit.build(memory / "store", arrange=arrange)) == storekit.contents(finished)


@pytest.mark.parametrize("block_images", [1, 5, 100])
def test_the_block_size_does_not_show(finished, memory, block_images):
    store = storekit.build(memory / "store", block_images=block_images)
    assert storekit.contents(store) == storekit.contents(finished)


def test_two_worker_processes_write_the_same_store(finished, tmp_path):
    path = tmp_path / "store"
    with storekit.open_writer(path) as writer, multiprocessing.get_context("spawn").Pool(2) as pool:
        storekit.write_per_store(writer)
        pool.starmap(storekit.write_one, [(path, block) for block in writer.pending()])
        pool.starmap(commit_shard, [(path, task) for task in writer.commit_tasks()])
        writer.finish()
    assert storekit.contents(path) == storekit.contents(finished)


def test_info_describes_a_complete_store(finished):
    found = info(finished)
    assert found.complete
    assert found.images == len(storekit.IDS)
    assert found.environment == {"host": str(finished)}
    assert found.embedding == "float16"
    assert {product.name: product.fingerprint for product in found.products} == storekit.manifest().fingerprints
    assert found.manifest == storekit.manifest()
    assert found.problems == ()
    assert found.bytes_ == sum(file.stat().st_size for file in finished.rglob("*") if file.is_file())
    rows = {product.name: product.rows for product in found.products if product.rows is not None}
    assert rows == {product: len(expected_rows(product, "box")) for product in storekit.FIELDS}


def test_info_describes_an_unfinished_store_and_reading_it_is_refused(tmp_path):
    path = tmp_path / "store"
    with storekit.open_writer(path) as writer:
        for block in writer.pending()[:2]:
            write_block(path, block, storekit.block_rows(block))
    found = info(path)
    assert (found.complete, found.blocks_done, found.blocks, found.images) == (False, 2, 6, 11)
    assert found.environment is None
    assert found.products[3].rows > 0
    with pytest.raises(StoreIncomplete, match="2 of 6 blocks are done; run the same `StoreWriter.open"):
        Store(path)


def test_a_folder_that_is_no_store_is_refused_by_every_door(tmp_path):
    for door in (Store, info, verify):
        with pytest.raises(StoreError, match="is not a store"):
            door(tmp_path)
        with pytest.raises(StoreError, match="is not a store"):
            door(tmp_path / "absent")
