"""Damage is found and named, and never read as data."""

import random
import re
import shutil

import numpy as np
import pytest
import storekit
from storekit import flip, recommit

from ezsd.cache import Store, StoreError, StoreIncomplete, info, list_stores, verify, write_block
from ezsd.cache.format.commit_mark import read_mark

REASON = "its bytes are not those that were committed (sha256 differs)"
SHARD = "regions/embedding/c/0/0"


def test_an_intact_store_has_no_problems(finished):
    assert verify(finished) == []


@pytest.mark.parametrize("length", [0, 1, -1, 0.5])
def test_a_truncated_shard_is_found_by_the_quick_check_and_not_opened(copy, length):
    size = (copy / SHARD).stat().st_size
    with (copy / SHARD).open("r+b") as file:
        file.truncate(int(size * length) if isinstance(length, float) else length % size)
    assert SHARD in info(copy).problems[0]
    assert verify(copy)[0].name == SHARD
    with pytest.raises(StoreError, match=f"{SHARD}: is .* bytes long, expected {size}"):
        Store(copy)


def test_a_missing_shard_is_found_by_the_quick_check_and_not_opened(copy):
    (copy / SHARD).unlink()
    assert info(copy).problems == (f"{copy / SHARD}: is missing",)
    assert len(verify(copy)) == 1
    for door in (Store, storekit.open_writer):
        with pytest.raises(StoreError, match="is missing.*the store is damaged"):
            door(copy)


def test_a_flipped_bit_in_any_file_is_found_and_the_file_named(copy):
    chance = random.Random(5)
    for name in read_mark(copy).files:
        bit = chance.randrange(8 * (copy / name).stat().st_size)
        flip(copy / name, bit)
        assert [(found.name, found.reason) for found in verify(copy, deep=True)] == [(name, REASON)]
        flip(copy / name, bit)
    assert verify(copy) == []


def test_a_flipped_bit_in_the_commit_mark_is_found(copy):
    chance = random.Random(6)
    for _ in range(100):
        bit = chance.randrange(8 * (copy / "COMMIT.json").stat().st_size)
        flip(copy / "COMMIT.json", bit)
        for door in (Store, info, verify):
            with pytest.raises(StoreError, match="COMMIT.json|store format"):
                door(copy)
        flip(copy / "COMMIT.json", bit)


@pytest.mark.parametrize(
    ("name", "key"), [("zarr.json", b'"rows"'), ("zarr.json", b'"ezsd_store"'), ("manifest.json", b'"images_sha256"')]
)
def test_a_flipped_bit_in_a_key_that_describes_the_store_is_one_clear_line(copy, name, key):
    file = copy / name
    flip(file, 8 * (file.read_bytes().index(key) + 2) + 1)
    with pytest.raises(StoreError, match=f"{name}: {re.escape(REASON)}; the store is damaged: `repair"):
        info(copy)
    assert name in str(list_stores(copy.parent)[copy])


@pytest.mark.parametrize("key", [b'"shape"', b'"data_type"', b'"codecs"', b'"zarr_format"', b'"node_type"'])
def test_a_flipped_bit_in_a_key_of_an_array_is_one_clear_line_for_a_reader(copy, key):
    file = copy / "regions/embedding/zarr.json"
    flip(file, 8 * (file.read_bytes().index(key) + 2) + 1)
    with pytest.raises(StoreError, match=f"regions/embedding/zarr.json: {re.escape(REASON)}; the store is damaged"):
        Store(copy)


def test_swapped_shards_and_foreign_files_are_found(copy):
    other = copy / "regions/embedding/c/1/0"
    if (copy / SHARD).stat().st_size == other.stat().st_size:
        shutil.move(copy / SHARD, copy / "aside")
        shutil.move(other, copy / SHARD)
        shutil.move(copy / "aside", other)
    (copy / "regions/notes.txt").write_text("mine")
    assert [found.name for found in verify(copy, deep=True)] == [SHARD, "regions/embedding/c/1/0", "regions/notes.txt"]


def test_a_manifest_of_another_store_is_not_believed(copy):
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace("0.7", "0.6"))
    with pytest.raises(StoreError, match=f"manifest.json: {re.escape(REASON)}"):
        Store(copy)
    recommit(copy)
    with pytest.raises(StoreError, match="is not the manifest this store was committed with"):
        Store(copy).manifest  # noqa: B018


def test_a_value_that_is_not_finite_is_never_handed_out(copy):
    with (copy / SHARD).open("r+b") as file:
        file.write(np.full(storekit.DIM, np.nan, "f2").tobytes())
    store = Store(copy, verify="quick")
    first = next(image for image in storekit.IDS if image not in storekit.EMPTY)
    with pytest.raises(StoreError, match=f"regions/embedding of image {first}: holds a value that is not finite"):
        store.regions[first]
    assert len(store.regions[12].box) > 0


@pytest.fixture
def journaled(memory):
    """A build with all blocks journaled and nothing committed."""
    path = memory / "store"
    with storekit.open_writer(path) as writer:
        storekit.journal_all(writer)
    return path


def test_a_damaged_journal_is_found_by_verify(journaled):
    assert verify(journaled) == []
    flip(journaled / "journal/block-000001/data.raw", 999)
    flip(journaled / "journal/block-000002/entry.json", 999)
    assert [found.name for found in verify(journaled, deep=True)] == [
        "journal/block-000001",
        "journal/block-000002/entry.json",
    ]


@pytest.mark.parametrize("file", ["data.raw", "entry.json"])
def test_a_block_cut_short_is_done_again_and_the_store_is_the_same(finished, journaled, file):
    damaged = journaled / "journal/block-000000" / file
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with storekit.open_writer(journaled) as writer:
        assert [block.index for block in writer.pending()] == [0]
    storekit.build(journaled)
    assert storekit.contents(journaled) == storekit.contents(finished)


def test_a_block_with_a_flipped_bit_is_set_aside_at_the_commit_and_done_again(finished, journaled):
    flip(journaled / "journal/block-000000/data.raw", 8 * 64 * 3)
    with pytest.raises(StoreError, match="does not match its checksum.*block 0 was set aside, run the build again"):
        storekit.build(journaled)
    with storekit.open_writer(journaled) as writer:
        assert [block.index for block in writer.pending()] == [0]
    storekit.build(journaled)
    assert storekit.contents(journaled) == storekit.contents(finished)


def test_shards_made_from_a_block_that_was_done_again_differently_are_written_again(memory, journaled):
    with storekit.open_writer(journaled) as writer:
        tasks = writer.commit_tasks()
        for task in tasks:
            storekit.commit_shard(journaled, task)
        shutil.rmtree(journaled / "journal/block-000000")
        block = writer.blocks[0]
        write_block(journaled, block, storekit.block_rows(block, most=2))
        stale = next(task for task in tasks if task.array.name == "regions/embedding")
        (journaled / stale.file).unlink()
        with pytest.raises(StoreError, match="written anew after the tasks were made"):
            storekit.commit_shard(journaled, stale)
        # Other rows shift all that follow: the blocks that gave their space back are needed once more.
        assert [again.index for again in writer.pending()] == [1, 2, 4, 5]
        with pytest.raises(StoreIncomplete, match="a shard was lost; write 4 pending blocks again first"):
            writer.commit_tasks()
    changed = storekit.build(journaled)

    def rows(block):
        return storekit.block_rows(block, most=2 if block.index == 0 else 150)

    assert storekit.contents(changed) == storekit.contents(storekit.build(memory / "fresh", rows=rows))
    assert verify(changed) == []


def test_a_block_of_another_build_is_not_taken_over(journaled, memory):
    other = memory / "other"
    with storekit.open_writer(other, widths=[65, *storekit.WIDTHS[1:]]) as writer:
        shutil.copytree(journaled / "journal/block-000000", other / "journal/block-000000")
        assert [block.index for block in writer.pending()] == [0, 1, 2, 3, 4, 5]
        storekit.write_one(other, writer.blocks[0])
        assert [block.index for block in writer.pending()] == [1, 2, 3, 4, 5]
