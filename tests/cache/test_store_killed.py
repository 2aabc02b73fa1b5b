"""A build killed anywhere goes on to the bytes of an unbroken one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import storekit

from ezsd.cache import Store, StoreError, StoreIncomplete, verify, write_block
from ezsd.cache.files import FAILPOINTS

ROOT = Path(__file__).resolve().parents[2]
LATER = ["block.after_rename:3", "shard.half_written:4", "shard.after_rename:5", "metadata.before_rename:30"]


@pytest.fixture
def path(memory):
    return memory / "store"


def build_until_killed(path, failpoint):
    environment = {**os.environ, "EZSD_FAILPOINT": failpoint, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, storekit.__file__, str(path)]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, f"{failpoint} was not reached: {done.stderr.decode()}"


@pytest.mark.parametrize("failpoint", [*FAILPOINTS, *LATER])
def test_killed_build_resumes_to_identical_bytes(finished, path, failpoint):
    build_until_killed(path, failpoint)
    committed = (path / "COMMIT.json").exists()
    assert committed == failpoint.startswith(("commit.after", "journal"))
    if committed:
        assert verify(path) == []
        assert Store(path).regions[3].box.shape == Store(finished).regions[3].box.shape
    elif failpoint not in ("plan.half_written", "plan.before_rename"):
        assert verify(path) == []
        with pytest.raises(StoreIncomplete, match="blocks (is|are) done"):
            Store(path)
    storekit.build(path)
    assert storekit.contents(path) == storekit.contents(finished)


def test_finished_blocks_and_shards_are_not_computed_again(path):
    build_until_killed(path, "block.after_rename:3")
    with storekit.open_writer(path) as writer:
        assert [block.index for block in writer.pending()] == [3, 4, 5]
        assert writer.has_per_store("teacher")
        values, attributes = writer.read_per_store("teacher")
        assert values["values"].tolist() == storekit.PER_STORE["teacher"][0]["values"].tolist()
        assert attributes == storekit.PER_STORE["teacher"][1]
    build_until_killed(path, "record.after_rename:2")
    with storekit.open_writer(path) as writer:
        assert writer.pending() == []
        left = writer.commit_tasks()
    build_until_killed(path, "commit.before_rename")
    with storekit.open_writer(path) as writer:
        assert writer.commit_tasks() == []
        assert len(left) > 5


def test_what_a_killed_worker_left_is_swept_when_the_build_goes_on(path):
    build_until_killed(path, "block.half_written:2")
    scratch = path / "journal/tmp"
    assert list(scratch.iterdir())
    with storekit.open_writer(path):
        assert list(scratch.iterdir()) == []


def test_a_complete_store_has_nothing_left_to_do(finished, copy):
    with storekit.open_writer(copy) as writer:
        assert writer.complete
        assert writer.pending() == writer.commit_tasks() == []
        assert writer.has_per_store("text")
        assert writer.read_per_store("text")[1]["names"] == storekit.NAMES
        writer.finish()
        with pytest.raises(StoreError, match="is complete; cannot write teacher"):
            writer.write_per_store("teacher", *storekit.PER_STORE["teacher"])
        with pytest.raises(StoreError, match="no store is being built here"):
            write_block(copy, writer.blocks[0], storekit.block_rows(writer.blocks[0]))
    assert storekit.contents(copy) == storekit.contents(finished)


def test_finishing_early_says_what_is_missing(path):
    with storekit.open_writer(path) as writer:
        with pytest.raises(StoreIncomplete, match="0 of 6 blocks are done; write the rest first"):
            writer.commit_tasks()
        for block in writer.pending():
            storekit.write_one(path, block)
        assert writer.commit_tasks()
        with pytest.raises(StoreIncomplete, match=r"0 of \d+ shards are written"):
            writer.finish()


def test_a_store_without_teacher_is_not_finished(path):
    with storekit.open_writer(path) as writer:
        for block in writer.pending():
            storekit.write_one(path, block)
        for task in writer.commit_tasks():
            storekit.commit_shard(path, task)
        with pytest.raises(StoreIncomplete, match="teacher was not written yet; use write_per_store first"):
            writer.finish()
        storekit.write_per_store(writer)
        writer.finish()


def test_all_that_the_commit_mark_lists_is_on_the_disk_before_it(path, monkeypatch):
    flushed, seen, fsync = set(), [], os.fsync

    def watched_fsync(handle):
        flushed.add(os.fstat(handle).st_ino)
        fsync(handle)

    def watched_failpoint(name):
        if name == "commit.before_rename":
            places = [place for place in path.rglob("*") if not place.is_relative_to(path / "journal")]
            seen.extend(place for place in places if place.stat().st_ino not in flushed)
            seen.append(None)

    monkeypatch.setattr("ezsd.cache.files.os.fsync", watched_fsync)
    monkeypatch.setattr("ezsd.cache.files.failpoint", watched_failpoint)
    storekit.build(path)
    assert seen == [path / ".lock", None]
