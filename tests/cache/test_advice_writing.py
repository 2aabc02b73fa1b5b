"""Advice to who writes or sends a store is tested: each row meets a message, does what it says, and must get on.

`test_store_advice.py` holds advice about stores that are read; `tests/advice.toml` lists all advice.
"""

import errno
import os
import secrets
import shutil
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import storekit

import ezsd.cache.files
from ezsd.cache import Block, Store, StoreError, commit_shard, repair, write_block
from ezsd.cache.format.commit_mark import TRANSFER
from ezsd.cache.journal.entries import Entry, read_note, write_entry
from ezsd.cache.journal.plan import read_block, read_plan
from ezsd.cache.tools.transfer import push
from tests.advicekit import Advice, each_of, follow


class Scene:
    """A store whose blocks are all journaled, a finished one, and free places."""

    def __init__(self, finished: Path, spoilt: Path, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.finished, self.spoilt, self.patch = finished, spoilt, patch
        self.url = f"memory://{secrets.token_hex(4)}"
        self.path, self.other = folder / "building", folder / "other"
        self.begin(self.path)
        self.begin(self.other, widths=[65, *storekit.WIDTHS[1:]])

    def begin(self, path: Path, **changes: object) -> None:
        with storekit.open_writer(path, **changes) as writer:
            storekit.write_per_store(writer)
            self.block = writer.blocks[0]

    def journal(self) -> None:
        with storekit.open_writer(self.path) as writer:
            for block in writer.pending():
                storekit.write_one(self.path, block)

    def tasks(self, path: Path) -> list:
        """The shards that are to be made of a store, once its blocks are there."""
        with storekit.open_writer(path) as writer:
            return writer.commit_tasks()

    def commit(self, path: Path) -> None:
        for task in self.tasks(path):
            commit_shard(path, task)

    def foreign_task(self) -> None:
        self.journal()
        task = self.tasks(self.path)[0]
        commit_shard(self.path, replace(task, plan="0" * 64))

    def no_block(self) -> None:
        write_block(self.path, Block(0, 0, 1), storekit.block_rows(Block(0, 0, 1)))

    def pending_block(self) -> None:
        with storekit.open_writer(self.path) as writer:
            storekit.write_one(self.path, writer.pending()[0])

    def rows(self, dtype: str) -> None:
        rows = storekit.block_rows(self.block)
        rows["regions"].fields["embedding"] = rows["regions"].fields["embedding"].astype(dtype)
        write_block(self.path, self.block, rows)

    def describe(self, when: object) -> None:
        path = self.path.with_name(f"{type(when).__name__}")
        with storekit.open_writer(path) as writer:
            writer.write_per_store("teacher", {"values": np.zeros(3, "f4")}, {"when": when})

    def begun_copy(self) -> None:
        """Another store of which a copy was begun at `url`."""
        other = storekit.build(self.path.with_name("sent"), block_images=3, embedding="int8")
        files, root = fsspec.url_to_fs(self.url)
        files.pipe_file(f"{root}/{TRANSFER}", (other / "COMMIT.json").read_bytes())

    def remove_copy(self) -> None:
        files, root = fsspec.url_to_fs(self.url)
        files.rm(root, recursive=True)

    def lose_a_block(self) -> None:
        """A data file goes once the shards are planned, and before they are made."""
        self.journal()
        task = self.tasks(self.path)[-1]
        for file in self.path.glob("journal/block-*/data.raw"):
            file.write_bytes(b"short")
        commit_shard(self.path, task)

    def alien_block(self) -> None:
        """A block that says it is this build's, and has no rows."""
        self.journal()
        folder = self.path / "journal/block-000000"
        attributes = {**Entry.read(folder).attributes, "counts": {}}
        shutil.rmtree(folder)
        write_entry(self.path, folder.name, {}, attributes, point="block")

    def leave_note(self) -> None:
        """As a build does for its workers when it starts."""
        with storekit.open_writer(self.path) as writer:
            self.note = writer.write_note(b"for the workers")

    def lose_note(self) -> None:
        self.leave_note()
        (self.path / "journal/notes" / self.note).unlink()

    def lose_an_entry(self) -> None:
        """The folder of a block goes once the shards are planned."""
        self.journal()
        task = self.tasks(self.path)[-1]
        for folder in self.path.glob("journal/block-*"):
            shutil.rmtree(folder)
        commit_shard(self.path, task)

    def spoil_note(self) -> None:
        self.leave_note()
        storekit.flip(self.path / "journal/notes" / self.note, 3)

    def refused_by_the_system(self) -> None:
        """A file that the system does not let be read."""
        plain = ezsd.cache.files.open_to_read

        def refuse(file: Path) -> object:
            if str(file).endswith("regions/embedding/c/0/0"):
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
            return plain(file)

        self.patch.setattr("ezsd.cache.files.open_to_read", refuse)


def whole(scene: Scene) -> None:
    assert storekit.contents(storekit.build(scene.path)) == storekit.contents(scene.finished)


TABLE = [
    Advice(
        situation="attributes that are not JSON",
        meet=lambda scene: scene.describe(np.int64(3)),
        message="a int64 is not JSON; convert it to a plain number, text or list$",
        works=lambda scene: [scene.describe(one) for one in (int(np.int64(3)), "3", [3])],
    ),
    Advice(
        situation="rows of another precision",
        meet=lambda scene: scene.rows("f4"),
        message="expected float16, found float32; convert it first$",
        works=lambda scene: (scene.rows("f2"), whole(scene)),
    ),
    Advice(
        situation="a block of one's own cut",
        meet=Scene.no_block,
        message=r"is not a block of this store; take blocks from StoreWriter.pending\(\)$",
        works=lambda scene: (scene.pending_block(), whole(scene)),
    ),
    Advice(
        situation="a shard of another build",
        meet=Scene.foreign_task,
        message=r"the task belongs to another build; take tasks from StoreWriter.commit_tasks\(\)$",
        works=lambda scene: (scene.commit(scene.path), whole(scene)),
    ),
    Advice(
        situation="a block where no store is being built",
        meet=lambda scene: storekit.write_one(scene.path.with_name("new"), scene.block),
        message="no store is being built here; start one with StoreWriter.open$",
        cure=lambda scene, _: scene.begin(scene.path.with_name("new")),
    ),
    Advice(
        situation="data of a block that was cut when its shard is made",
        meet=Scene.lose_a_block,
        message=r"data.raw is missing or not \d+ bytes long; run the build again; block \d was set aside",
        works=whole,
    ),
    Advice(
        situation="a damaged note for the workers",
        prepare=Scene.spoil_note,
        meet=lambda scene: read_note(scene.path, scene.note),
        message=": is damaged; run the build again$",
        works=lambda scene: (scene.leave_note(), read_note(scene.path, scene.note), whole(scene)),
    ),
    Advice(
        situation="a lost note for the workers",
        prepare=Scene.lose_note,
        meet=lambda scene: read_note(scene.path, scene.note),
        message=": is missing; run the build again$",
        works=lambda scene: (scene.leave_note(), read_note(scene.path, scene.note), whole(scene)),
    ),
    Advice(
        situation="a block whose folder is lost when its shard is made",
        meet=Scene.lose_an_entry,
        message=r"block-\d+: no finished journal entry here; run the build again",
        works=whole,
    ),
    Advice(
        situation="a block without rows",
        prepare=Scene.alien_block,
        meet=lambda scene: read_block(read_plan(scene.path), 0),
        message="block-000000: does not hold the rows of a block; remove this folder and run the build again$",
        cure=lambda scene, _: shutil.rmtree(scene.path / "journal/block-000000"),
        works=whole,
    ),
    Advice(
        situation="a copy of another store that was begun: another URL",
        prepare=Scene.begun_copy,
        meet=lambda scene: push(scene.finished, scene.url),
        message="another store is being copied there; choose another URL, or",
        works=lambda scene: (push(scene.finished, f"{scene.url}b"), Store(f"{scene.url}b")),
    ),
    Advice(
        situation="a copy of another store that was begun: remove it",
        prepare=Scene.begun_copy,
        meet=lambda scene: push(scene.finished, scene.url),
        message="or remove what is there$",
        cure=lambda scene, _: scene.remove_copy(),
        works=lambda scene: (push(scene.finished, scene.url), Store(scene.url)),
    ),
    Advice(
        situation="a file that cannot be read when a store is repaired",
        prepare=Scene.refused_by_the_system,
        meet=lambda scene: repair(scene.spoilt, storekit.Images()),
        message="Input/output error.*then run `ezsd cache repair` again$",
        cure=lambda scene, _: scene.patch.undo(),
        works=lambda scene: (repair(scene.spoilt, storekit.Images()), Store(scene.spoilt)),
    ),
]


@each_of(TABLE)
def test_who_does_what_a_writer_is_told_gets_on(row, finished, copy, memory, monkeypatch):
    follow(row, Scene(finished, copy, memory, monkeypatch), (StoreError,))


def test_a_url_that_names_its_place_is_taken(finished, tmp_path):
    with pytest.raises(StoreError, match="file:///: names no place of a store; write the whole URL"):
        push(finished, "file:///")
    assert push(finished, (tmp_path / "copy").as_uri())
    assert Store(tmp_path / "copy").digest == Store(finished).digest
