"""What a build does for itself grows with its blocks and shards, and no faster; and gives the same."""

import json
import os
import time
from collections import Counter

import pytest
import storekit

from ezsd.cache import (
    Field,
    PerImage,
    PerStore,
    Schema,
    StoreError,
    commit_numbered,
    commit_shard,
    forecast,
    read_plan,
)
from ezsd.cache.files import file_state, read_bytes
from ezsd.cache.format.packed import unpacked
from ezsd.cache.format.sealed_json import canonical_json, seal, unseal
from ezsd.cache.journal.commit import Committer, remove_journal
from ezsd.cache.journal.entries import Entry, set_aside
from ezsd.cache.journal.plan import block_done, read_block


@pytest.fixture
def entries_read(monkeypatch):
    """How often each journal entry was read, by its folder's name."""
    found, plain = Counter(), Entry.read
    monkeypatch.setattr(Entry, "read", lambda folder: (found.update([folder.name]), plain(folder))[1])
    return found


@pytest.fixture
def journaled(memory):
    """An open writer, all of whose blocks are written."""
    path = memory / "store"
    with storekit.open_writer(path) as writer:
        storekit.journal_all(writer)
        yield writer


def test_a_process_reads_a_plan_and_each_block_once_for_a_whole_build(memory, entries_read, finished):
    path = memory / "store"
    with storekit.open_writer(path) as writer:
        storekit.journal_all(writer)
        assert entries_read["plan"] == 1
        assert writer.pending() == []
        digest, numbers = writer.commit_numbers()
        for number in numbers:
            commit_numbered(path, digest, number)
        assert len(numbers) > len(writer.blocks)
        writer.finish()
    blocks = {name: times for name, times in entries_read.items() if name.startswith("block")}
    # Looked for before there is one, and looked at before it is written.
    assert len(blocks) == 6
    assert max(blocks.values()) <= 3
    assert entries_read["plan"] == 1
    assert storekit.contents(path) == storekit.contents(finished)


def test_a_block_that_was_written_anew_is_read_anew(journaled, entries_read):
    path, block = journaled.path, journaled.blocks[1]
    plan = read_plan(path)
    before = read_block(plan, 1)
    assert read_block(plan, 1) is before
    storekit.flip(before.folder / "entry.json", 99)
    with pytest.raises(StoreError, match="do not match the checksum|not valid JSON"):
        read_block(plan, 1)
    assert journaled.pending() == [block]
    storekit.write_one(path, block)
    assert read_block(plan, 1) is not before
    assert read_block(plan, 1).arrays == before.arrays
    assert entries_read[before.folder.name] > 1


def test_a_block_that_came_while_it_was_looked_for_is_not_kept_for_ever(journaled, monkeypatch):
    plan = read_plan(journaled.path)
    with monkeypatch.context() as patch:
        # What is seen just before another worker's rename.
        patch.setattr("ezsd.cache.journal.plan.file_state", lambda _: None)
        assert block_done(plan, 1)
    set_aside(journaled.path, "block-000001")
    assert not block_done(plan, 1)


def test_a_file_whose_time_was_set_back_has_another_state(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"1")
    before, times = file_state(file), file.stat()
    # Longer than a tick of the kernel's clock.
    time.sleep(0.05)
    file.write_bytes(b"2")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file_state(file) != before


def test_a_plan_that_was_made_anew_is_read_anew(memory):
    path = memory / "store"
    with storekit.open_writer(path):
        first = read_plan(path)
        assert read_plan(path) is first
    os.rename(path, memory / "elsewhere")
    with pytest.raises(StoreError, match="no store is being built here"):
        read_plan(path)
    with storekit.open_writer(path, block_images=3):
        assert [block.stop for block in read_plan(path).blocks] == [3, 6, 9, 11]
        assert not read_plan(path).image_ids.flags.writeable


def test_pieces_of_shards_are_those_that_a_walk_over_all_blocks_finds(journaled):
    plan = read_plan(journaled.path)
    committer = Committer(plan, [read_block(plan, block.index) for block in plan.blocks])
    seen = 0
    for task in committer.tasks:
        (start, stop), first, expected = task.array.shard_range(task.shard), 0, []
        for index, entry in enumerate(committer.entries):
            place = entry.arrays[task.array.name]
            low, high = max(start, first), min(stop, first + place["shape"][0])
            if low < high:
                expected.append((index, low - first, high - first, place["crc32"]))
            first += place["shape"][0]
        assert list(task.pieces) == expected
        seen += len(expected)
    # One block has no rows at all, and some lie in two shards.
    assert seen > len(committer.tasks)
    assert {piece.block for task in committer.tasks for piece in task.pieces} == {0, 1, 2, 4, 5}


def test_a_shard_that_was_recorded_before_is_known_by_its_sources(journaled):
    # The text is what earlier versions hashed: a build that was begun with one of them goes on.
    task = journaled.commit_tasks()[0]
    assert task.sources == storekit.sources(task)
    commit_shard(journaled.path, task)
    assert task.file not in {left.file for left in journaled.commit_tasks()}


def test_a_build_that_an_earlier_version_began_goes_on(journaled, finished):
    for task in journaled.commit_tasks()[:3]:
        commit_shard(journaled.path, task)
    before, changed = journaled.commit_tasks(), 0
    journaled.close()
    # They wrote lists of numbers.
    for file in journaled.path.glob("journal/*/*.json"):
        record = unseal(file.read_bytes(), str(file))
        if "counts" in record.get("attributes", {}):
            counts = record["attributes"]["counts"]
            record["attributes"]["counts"] = {name: unpacked(found).tolist() for name, found in counts.items()}
        elif "chunk_crc32" in record:
            record["chunk_crc32"] = unpacked(record["chunk_crc32"]).tolist()
        else:
            continue
        changed += file.write_bytes(seal(record)) > 0
    assert changed == 6 + 3
    with storekit.open_writer(journaled.path) as writer:
        assert writer.pending() == []
        assert writer.commit_tasks() == before
        for task in before:
            commit_shard(writer.path, task)
        writer.finish()
    assert storekit.contents(journaled.path) == storekit.contents(finished)


@pytest.mark.parametrize("record", [{}, {"a": 1}, {"z": [1]}, {"a": 1, "z": {"sha256": "0"}}, {"sha1": 1, "sha3": 2}])
def test_a_sealed_record_reads_back_and_no_other_text_does(record):
    sealed = seal(record)
    assert unseal(sealed, "here") == record
    spaced = json.dumps(json.loads(sealed)).encode() + b"\n"
    unsealed = sealed.replace(json.loads(sealed)["sha256"].encode(), b"0" * 64)
    for changed in (sealed[:-1], sealed + b"\n", spaced, unsealed, canonical_json(record).encode() + b"\n"):
        with pytest.raises(StoreError, match="here: its contents do not match the checksum it carries"):
            unseal(changed, "here")


def test_a_file_of_many_pieces_is_read_whole_and_a_longer_one_refused(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_bytes(os.urandom(2**17 + 5))
    assert read_bytes(file) == file.read_bytes()
    monkeypatch.setattr("ezsd.cache.files.MOST_UNSTATED", 2**17 + 5)
    assert read_bytes(file) == file.read_bytes()
    monkeypatch.setattr("ezsd.cache.files.MOST_UNSTATED", 2**17 + 4)
    with pytest.raises(StoreError, match="is longer than the 131,076 bytes it may have"):
        read_bytes(file)


def test_folders_of_blocks_are_removed_with_the_journal_and_links_are_not_followed(memory):
    journal, elsewhere = memory / "store/journal", memory / "elsewhere"
    for folder in (journal / "block-000000", journal / "block-000001/more", elsewhere):
        folder.mkdir(parents=True)
        (folder / "entry.json").write_text("{}")
    (journal / "block-000000/data.raw").write_text("rows")
    (journal / "block-000002").symlink_to(elsewhere)
    remove_journal(memory / "store")
    assert not journal.exists()
    assert (elsewhere / "entry.json").read_text() == "{}"


def test_a_forecast_counts_the_arrays_of_the_whole_store():
    rows = {"tokens": 100, "model/layers": 0, "model/mean": 0}
    schema = Schema(
        [
            PerStore("model", [Field("layers", "int32"), Field("mean", "float32", (512,))]),
            PerImage("tokens", [Field("token", "float16", (8,))]),
        ]
    )
    less = forecast(rows, images=11, schema=schema)
    # 4 MiB and 2 MiB in whole chunks; in the journal too, until the store is finished.
    more = forecast(rows | {"model/layers": 2**20, "model/mean": 2**10}, images=11, schema=schema)
    assert more.final - less.final == pytest.approx(6 * 2**20, rel=0.01)
    assert more.peak - less.peak == 2 * (more.final - less.final)


@pytest.mark.parametrize("rows", [{"tokens": 1}, {"tokens": 1, "model/layers": 1, "model": 1}, {}])
def test_a_forecast_without_the_rows_of_an_array_is_refused(rows):
    schema = Schema([PerStore("model", [Field("layers", "int32")]), PerImage("tokens", [Field("x", "int8")])])
    with pytest.raises(StoreError, match=r"^rows: expected a number for each of tokens, model/layers; found "):
        forecast(rows, images=1, schema=schema)
