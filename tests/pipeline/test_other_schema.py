"""Commands that need regions, on a store of another schema: one line, and nothing is changed."""

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
    StoreError,
    StoreWriter,
    commit_shard,
    images_digest,
    write_block,
)
from ezsd.pipeline.audit.audit import AuditRequest, audit
from ezsd.pipeline.extraction.commit import commit_cache
from ezsd.pipeline.scheduling.pool import Schedule

SCHEMA = Schema([PerImage("tokens", [Field("x", "int16")])])
MANIFEST = Manifest({"tokens": Origin(1, {})}, images_digest([1], [8], [8]), schema=SCHEMA)


def begin(path):
    return StoreWriter.open(path, MANIFEST, image_ids=[1], widths=[8], heights=[8], block_images=1)


@pytest.fixture
def unfinished(tmp_path):
    path = tmp_path / "store"
    with begin(path) as writer:
        write_block(path, writer.blocks[0], {"tokens": RaggedRows(np.array([1], "i4"), {"x": np.ones(1, "i2")})})
    return path


@pytest.fixture
def complete(unfinished):
    with begin(unfinished) as writer:
        for task in writer.commit_tasks():
            commit_shard(unfinished, task)
        writer.finish()
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
