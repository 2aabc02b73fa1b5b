"""Several builders of one store: who may do what beside whom, and work that outlives its builder."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import storekit

from ezsd.cache import (
    StoreBusy,
    StoreError,
    StoreIncomplete,
    collect,
    commit_numbered,
    compare,
    read_note,
)
from ezsd.cache.journal.entries import scratch_folder, write_entry
from ezsd.cache.journal.validation import check_block
from ezsd.cache.writer import StoreWriter

ROOT = Path(__file__).resolve().parents[2]
BUILDER = """
import sys
import storekit
with storekit.open_writer(sys.argv[1], shared=len(sys.argv) > 2) as writer:
    storekit.write_per_store(writer)
    writer.share()
    print("shares", flush=True)
    for line in sys.stdin:
        block = writer.blocks[int(line)]
        storekit.write_one(writer.path, block)
        print("written", flush=True)
"""


class Builder:
    """A builder in a process of its own, which writes the blocks that it is told to."""

    def __init__(self, path, *options):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
        command = [sys.executable, "-c", BUILDER, str(path), *options]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout.readline() == "shares\n"

    def write(self, block):
        self.process.stdin.write(f"{block}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "written\n"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.stdout.close()
        assert self.process.wait(30) == 0


def commit_by_number(writer):
    digest, numbers = writer.commit_numbers()
    for number in reversed(numbers):
        commit_numbered(writer.path, digest, number)
    writer.finish()
    return numbers


def test_builders_that_share_a_store_make_the_same_one(finished, tmp_path):
    store = tmp_path / "store"
    with Builder(store) as first, Builder(store, "shared") as second:
        for block in range(6):
            (first if block % 2 else second).write(block)
        with pytest.raises(StoreBusy, match="or a share of it"):
            storekit.open_writer(store)
        with pytest.raises(StoreBusy):
            StoreWriter.reopen(store)
        with pytest.raises(StoreBusy):
            collect(store)
    with StoreWriter.reopen(store) as writer:
        assert writer.pending() == []
        assert len(commit_by_number(writer)) > 6
    assert compare(store, finished).content == ()


def test_what_a_living_builder_prepares_is_not_cleared(tmp_path):
    with Builder(tmp_path):
        unfinished = scratch_folder(tmp_path) / "block-000000-1-ab"
        unfinished.mkdir()
        storekit.open_writer(tmp_path, shared=True).close()
        assert unfinished.is_dir()
    storekit.open_writer(tmp_path).close()
    assert list(scratch_folder(tmp_path).iterdir()) == []


def test_nobody_shares_a_store_that_is_not_prepared(tmp_path):
    with pytest.raises(StoreBusy, match="not prepared yet"):
        storekit.open_writer(tmp_path / "absent", shared=True)
    with storekit.open_writer(tmp_path / "store") as writer:
        writer.write_per_store("teacher", *storekit.PER_STORE["teacher"])
        with pytest.raises(StoreIncomplete, match="text was not written yet"):
            writer.share()
        assert not writer.shared


@pytest.mark.parametrize(
    ("number", "kind", "said"),
    [
        (errno.ENOLCK, StoreError, "cannot be locked .No locks available.: .* have them switched on"),
        (errno.EIO, OSError, "Input/output error"),
    ],
)
def test_locks_that_fail_are_named_also_when_a_store_is_shared_and_only_absent_ones_called_so(
    tmp_path, monkeypatch, number, kind, said
):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    with storekit.open_writer(tmp_path / "store") as writer:
        storekit.write_per_store(writer)
        monkeypatch.setattr(fcntl, "lockf", refuse)
        for call in (writer.share, lambda: storekit.open_writer(tmp_path / "other")):
            with pytest.raises(kind, match=said) as caught:
                call()
            assert "/.lock" in str(caught.value)
            assert ("switched on" in str(caught.value)) == (number == errno.ENOLCK)


def test_a_builder_that_shares_cannot_commit(tmp_path):
    with storekit.open_writer(tmp_path) as writer:
        storekit.write_per_store(writer)
        writer.share()
        for block in writer.pending():
            storekit.write_one(tmp_path, block)
        for step in (writer.commit_tasks, writer.finish):
            with pytest.raises(StoreError, match="cannot commit it"):
                step()


def test_a_killed_builder_gives_its_share_back(tmp_path):
    with Builder(tmp_path) as first:
        first.write(0)
        second = Builder(tmp_path, "shared")
        second.process.send_signal(signal.SIGKILL)
        second.process.communicate()
    with storekit.open_writer(tmp_path) as writer:
        assert [block.index for block in writer.pending()] == [1, 2, 3, 4, 5]


def test_work_that_outlives_its_builder_is_whole_or_gone(tmp_path, monkeypatch):
    """A worker prepares a block while another builder starts and clears what belongs to nobody."""
    with storekit.open_writer(tmp_path) as writer:
        pending = writer.pending()[0]
    real = write_entry

    def late(store, name, arrays, attributes, *, point):
        def cleared_meanwhile(source, target, **_):
            # Whoever clears moves things too.
            patch.undo()
            storekit.open_writer(tmp_path).close()
            source.rename(target)

        with monkeypatch.context() as patch:
            patch.setattr("ezsd.cache.journal.entries.rename", cleared_meanwhile)
            real(store, name, arrays, attributes, point=point)

    monkeypatch.setattr("ezsd.cache.journal.plan.write_entry", late)
    with pytest.raises(FileNotFoundError):
        storekit.write_one(tmp_path, pending)
    with storekit.open_writer(tmp_path) as writer:
        assert pending in writer.pending()


def test_a_block_that_another_worker_finished_meanwhile_is_left_where_it_is(tmp_path, monkeypatch):
    with storekit.open_writer(tmp_path) as writer:
        block = writer.blocks[0]
    data = tmp_path / "journal/block-000000/data.raw"
    real, others = check_block, []

    def slow(*given, **options):
        real(*given, **options)
        if not others:
            others.append("at work")
            storekit.write_one(tmp_path, block)
            others.append(data.stat().st_ino)

    monkeypatch.setattr("ezsd.cache.journal.plan.check_block", slow)
    storekit.write_one(tmp_path, block)
    assert data.stat().st_ino == others[1]


def test_a_number_without_the_note_of_its_rows_is_refused(tmp_path):
    with storekit.open_writer(tmp_path) as writer:
        storekit.write_per_store(writer)
        for block in writer.pending():
            storekit.write_one(tmp_path, block)
        digest, numbers = writer.commit_numbers()
        with pytest.raises(StoreError, match="is missing; run the build again"):
            commit_numbered(tmp_path, digest[::-1], numbers[0])
        commit_numbered(tmp_path, digest, numbers[0])
        assert writer.commit_numbers() == (digest, numbers[1:])


def test_a_note_is_read_as_it_was_left_or_not_at_all(tmp_path):
    with storekit.open_writer(tmp_path) as writer:
        name = writer.write_note(b"what workers need")
        assert writer.write_note(b"what workers need") == name
        assert read_note(tmp_path, name) == b"what workers need"
        file = next(tmp_path.rglob(name))
        file.write_bytes(b"something else")
        with pytest.raises(StoreError, match="is damaged"):
            read_note(tmp_path, name)
    with pytest.raises(StoreError, match="is missing; run the build again"):
        read_note(tmp_path, "0" * 64)
