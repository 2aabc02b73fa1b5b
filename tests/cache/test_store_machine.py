"""Any order of building, killing, resuming, damaging, mending, reading and cleaning, against a model in memory."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import storekit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ezsd.cache import (
    RaggedRows,
    Store,
    StoreIncomplete,
    collect,
    commit_shard,
    info,
    repair,
    verify,
    write_block,
)
from ezsd.cache.format.commit_mark import read_mark

ROOT = Path(__file__).resolve().parents[2]
SHM = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class Killed(BaseException):
    """Stands for a process that ends where it is."""


class StoreMachine(RuleBasedStateMachine):
    """The model: which blocks are journaled, whether all is committed, and which file is damaged."""

    @initialize(embedding=st.sampled_from(["float16", "int8"]), proposer=st.booleans())
    def begin(self, embedding, proposer):
        self.folder = Path(tempfile.mkdtemp(dir=SHM))
        self.path = self.folder / "store"
        self.made = {"embedding": embedding} | ({"proposer": storekit.PROPOSER} if proposer else {})
        self.begun, self.blocks, self.complete = False, set(), False
        self.hurt, self.marked = None, False
        self.faults = 0

    def teardown(self):
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    def writer(self):
        return storekit.open_writer(self.path, manifest=storekit.manifest(**self.made))

    @precondition(lambda self: not self.complete)
    @rule(count=st.integers(0, 3), point=st.sampled_from([None, "block.half_written", "block.before_rename"]))
    def build_some_blocks(self, count, point):
        with self.writer() as writer:
            self.begun = True
            pending = writer.pending()
            assert {block.index for block in pending} == set(range(6)) - self.blocks
            for block in pending[:count]:
                with dying_at(point, self):
                    write_block(self.path, block, storekit.block_rows(block, most=12))
                if point is None:
                    self.blocks.add(block.index)

    @precondition(lambda self: not self.complete and len(self.blocks) == 6)
    @rule(
        shards=st.integers(0, 30),
        point=st.sampled_from([None, "shard.half_written", "record.before_rename", "commit.before_rename"]),
    )
    def commit(self, shards, point):
        with self.writer() as writer, dying_at(point, self):
            assert writer.pending() == []
            storekit.write_per_store(writer)
            tasks = writer.commit_tasks()
            for task in tasks[:shards]:
                commit_shard(self.path, task)
            if shards >= len(tasks):
                writer.finish()
                self.complete = True

    @precondition(lambda self: self.complete and self.hurt is None)
    @rule(data=st.data())
    def damage(self, data):
        name = data.draw(st.sampled_from(sorted(read_mark(self.path).files)))
        content = bytearray((self.path / name).read_bytes())
        kind = data.draw(st.sampled_from(["flip", "cut", "remove"]))
        if kind == "remove":
            (self.path / name).unlink()
        else:
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1
            (self.path / name).write_bytes(content if kind == "flip" else content[: len(content) // 2])
        self.hurt = name
        self.faults += 1

    @precondition(lambda self: self.complete and self.hurt is not None)
    @rule()
    def repair_from_images(self):
        report = repair(self.path, storekit.Images(most=12, **self.made))
        assert report.repaired == (self.hurt,)
        assert report.left == ()
        self.hurt, self.marked = None, False

    @precondition(lambda self: self.complete)
    @rule()
    def repair_alone(self):
        report = repair(self.path)
        assert set(report.repaired) | {damage.name for damage in report.left} == {self.hurt} - {None}
        if report.left:
            self.marked = True
        else:
            self.hurt, self.marked = None, False

    @precondition(lambda self: self.begun)
    @rule()
    def clean_up(self):
        stray = self.path / ("stray" if self.complete else "journal/tmp/stray")
        stray.parent.mkdir(exist_ok=True)
        stray.write_bytes(b"?")
        assert any(name.endswith("stray") for name in collect(self.path, strays=True).removed)

    @precondition(lambda self: self.begun)
    @rule(image=st.sampled_from(storekit.IDS))
    def read(self, image):
        if not self.complete or self.marked:
            with pytest.raises(StoreIncomplete):
                Store(self.path)
        elif self.hurt is None:
            place = storekit.IDS.index(image)
            size = storekit.WIDTHS[place], storekit.HEIGHTS[place]
            expected = storekit.image_rows(image, *size, most=12)["regions"]
            found = Store(self.path).regions[image]
            np.testing.assert_array_equal(found.box, expected["box"])
            np.testing.assert_allclose(found.embedding, expected["embedding"], atol=5e-3)

    @invariant()
    def damage_is_seen_and_nothing_else_is(self):
        if getattr(self, "begun", False):
            assert [damage.name for damage in verify(self.path, deep=True)] == ([self.hurt] if self.hurt else [])
            if self.hurt is None:
                assert info(self.path).complete == self.complete


class dying_at:  # noqa: N801
    """Inside, this process goes no further than a failpoint; outside it goes on as another one would.

    The machine counts it as a fault where it is reached.
    """

    def __init__(self, point, machine):
        self._point, self._machine = point, machine

    def __enter__(self):
        if self._point:
            self._patch = pytest.MonkeyPatch()
            for module in ("ezsd.cache.files", "ezsd.cache.journal.entries", "ezsd.cache.journal.commit"):
                self._patch.setattr(f"{module}.failpoint", self._reached)

    def _reached(self, name):
        if name == self._point:
            self._machine.faults += 1
            raise Killed

    def __exit__(self, kind, error, trace):
        if self._point:
            self._patch.undo()
        return kind is Killed


StoreMachine.TestCase.settings = settings(
    max_examples=15, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)
TestStoreMachine = StoreMachine.TestCase


@given(
    dim=st.sampled_from([8, 63, 512, 1024]),
    counts=st.lists(st.sampled_from([0, 0, 1, 3, 255, 257, 2000]), min_size=1, max_size=4),
    block_images=st.integers(1, 4),
    embedding=st.sampled_from(["float16", "int8"]),
)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_number_of_rows_and_any_width_comes_back_as_written(dim, counts, block_images, embedding):
    def rows(start, stop):
        here = np.array(counts[start:stop], "i4")
        n = int(here.sum())
        vectors = np.random.default_rng([dim, start]).standard_normal((n, dim)).astype("f4")
        vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype("f2")
        # Columns of nothing but zeros are data like any other.
        zero, guess = np.zeros(n, "f4"), np.zeros(n, "i4")
        box = np.tile(np.array([0, 0, 9, 9], "f4"), (n, 1))
        return {
            "proposals": RaggedRows(here, {"box": box, "score": zero}),
            "regions": RaggedRows(
                here, {"box": box, "score": zero, "confidence": zero, "class_index": guess, "embedding": vectors}
            ),
            "ground_truth": RaggedRows(
                here,
                {"box": box, "class_index": guess, "annotation_id": guess.astype("i8"), "embedding": vectors},
            ),
        }

    ids, size = list(range(len(counts))), [9] * len(counts)
    with tempfile.TemporaryDirectory(dir=SHM) as folder:
        path = Path(folder) / "store"
        with storekit.open_writer(
            path,
            embedding=embedding,
            image_ids=ids,
            widths=size,
            heights=size,
            embed_dim=dim,
            block_images=block_images,
            shard_bytes=2**19,
        ) as writer:
            writer.write_per_store("teacher", {"values": np.zeros(0, "f4")}, {})
            writer.write_per_store("text", {"embedding": np.eye(2, dim, dtype="f4")}, {"names": ["a", "b"]})
            for block in writer.pending():
                write_block(path, block, rows(block.start, block.stop))
            for task in writer.commit_tasks():
                commit_shard(path, task)
            writer.finish()
        assert verify(path, deep=True) == []
        store = Store(path)
        for block in writer.blocks:
            written = rows(block.start, block.stop)["regions"].fields["embedding"].astype("f4")
            found = np.concatenate([store.regions[image].embedding for image in ids[block.start : block.stop]])
            np.testing.assert_allclose(found.astype("f4"), written, atol=0 if embedding == "float16" else 5e-3)
            assert not any(store.regions[image].score.any() for image in ids)


def test_a_build_killed_at_any_moment_goes_on_to_the_same_bytes(finished):
    """Killed again and again, fifty times in all, at moments that reach from the first import into the commit."""
    chance = random.Random(3)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory(dir=SHM) as folder:
        unbroken = timed_build(Path(folder) / "unbroken", environment)
        kills = 0
        while kills < 50:
            path = Path(folder) / "store"
            command = [sys.executable, storekit.__file__, str(path)]
            with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as builder:
                wait_for_start(builder, path)
                time.sleep(chance.random() * unbroken)
                builder.send_signal(signal.SIGKILL)
            kills += 1
            if (path / "COMMIT.json").exists() or (path / "journal/plan").exists():
                assert verify(path) == []
            if (path / "COMMIT.json").exists() or kills == 50:
                storekit.build(path)
                assert storekit.contents(path) == storekit.contents(finished)
                shutil.rmtree(path)


def timed_build(path, environment):
    """Seconds from the first file to the end of an unbroken build."""
    with subprocess.Popen([sys.executable, storekit.__file__, str(path)], env=environment) as builder:
        wait_for_start(builder, path)
        began = time.monotonic()
        assert builder.wait(60) == 0
    return time.monotonic() - began


def wait_for_start(builder, path):
    while not path.exists() and builder.poll() is None:
        time.sleep(0.002)
