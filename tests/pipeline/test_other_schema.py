"""Commands on a store of another schema: those that need regions refuse it, and what they advise can be done."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from ezsd.cache import (
    Field,
    Manifest,
    Origin,
    PerImage,
    RaggedRows,
    Schema,
    Store,
    StoreError,
    StoreWriter,
    commit_shard,
    images_digest,
    info,
    repair,
    verify,
    write_block,
)
from ezsd.pipeline.audit.audit import AuditRequest, audit
from ezsd.pipeline.extraction.commit import commit_cache
from ezsd.pipeline.scheduling.pool import Schedule
from tests.advicekit import Advice, each_of, follow

SCHEMA = Schema([PerImage("tokens", [Field("x", "int16")])])
MANIFEST = Manifest({"tokens": Origin(1, {})}, images_digest([1], [8], [8]), schema=SCHEMA)


def begin(path):
    return StoreWriter.open(path, MANIFEST, image_ids=[1], widths=[8], heights=[8], block_images=1)


ROWS = {"tokens": RaggedRows(np.array([1], "i4"), {"x": np.ones(1, "i2")})}


def go_on(path):
    with begin(path) as writer:
        for block in writer.pending():
            write_block(path, block, ROWS)
        for task in writer.commit_tasks():
            commit_shard(path, task)
        writer.finish()


class Again:
    """The rows of the store, computed again."""

    manifest = MANIFEST
    images = tuple(np.array([value]) for value in (1, 8, 8))

    def rows(self, blocks, stored):
        return (ROWS for _ in blocks)


@pytest.fixture
def unfinished(tmp_path):
    path = tmp_path / "store"
    with begin(path) as writer:
        write_block(path, writer.blocks[0], ROWS)
    return path


@pytest.fixture
def complete(unfinished):
    go_on(unfinished)
    return unfinished


def contents(path):
    return {file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


SAID = "holds tokens, expected a store of regions"


@pytest.mark.parametrize("state", ["unfinished", "complete"])
def test_commit_refuses_it_before_any_work(state, request):
    path = request.getfixturevalue(state)
    before = contents(path)
    with pytest.raises(StoreError, match=SAID):
        commit_cache(path, Schedule(scheduler="sync"))
    assert contents(path) == before


def test_audit_refuses_it(complete):
    with pytest.raises(StoreError, match=SAID):
        audit(AuditRequest(target=str(complete), data_root=Path()))


def spoil(path, name):
    file = path / name
    file.write_bytes(file.read_bytes()[::-1])


WRITER = "the program that wrote the store"
TABLE = [
    Advice(
        situation="an unfinished store",
        prepare=lambda path: shutil.rmtree(path) or begin(path).close(),
        meet=Store,
        message=rf"0 of 1 blocks are done; run {WRITER} again to go on$",
        cure=lambda path, _: go_on(path),
    ),
    Advice(
        situation="a repair of an unfinished store",
        prepare=lambda path: shutil.rmtree(path) or begin(path).close(),
        meet=repair,
        message=rf"; run {WRITER} again$",
        cure=lambda path, _: go_on(path),
    ),
    Advice(
        situation="damaged rows",
        prepare=lambda path: spoil(path, "tokens/x/c/0"),
        meet=lambda path: Store(path).product("tokens")[1],
        message=rf"`ezsd cache verify --deep` lists all damage, {WRITER} mends it$",
        cure=lambda path, _: (verify(path, deep=True), repair(path, Again())),
    ),
    Advice(
        situation="a store that was marked incomplete",
        prepare=lambda path: (spoil(path, "tokens/x/c/0"), repair(path)),
        meet=Store,
        message=rf"was marked incomplete; {WRITER} computes again what is lost$",
        cure=lambda path, _: repair(path, Again()),
    ),
    Advice(
        situation="a lost commit mark, which the command makes again",
        prepare=lambda path: (path / "COMMIT.json").unlink(),
        meet=Store,
        message=r"where all else is whole, `ezsd cache repair \S+` makes one again$",
        cure=lambda path, _: repair(path),
    ),
    Advice(
        situation="damaged metadata, which the command makes again",
        prepare=lambda path: spoil(path, "zarr.json"),
        meet=info,
        message=r"the store is damaged: `ezsd cache repair \S+` mends it$",
        cure=lambda path, _: repair(path),
    ),
]


@each_of(TABLE)
def test_no_command_is_advised_that_cannot_do_it(row, complete):
    follow(row, complete)
