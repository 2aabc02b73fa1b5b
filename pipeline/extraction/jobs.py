"""What worker processes need to know lies in the store's journal, so that only numbers travel to them."""

from __future__ import annotations

import base64
import dataclasses
import json
import platform
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ezsd.cache import Block, StoreWriter, read_note
from ezsd.cache.journal.plan import read_plan
from ezsd.pipeline.errors import ClusterError
from ezsd.pipeline.extraction.reuse import Reuse
from ezsd.pipeline.extraction.worker import ExtractJob, extract_block
from ezsd.pipeline.scheduling.dask_cluster import other_versions, versions

_BYTES = ("values", "text")


@dataclass(frozen=True, slots=True)
class JobNote:
    """Where a job lies."""

    store: str
    name: str


def leave_job(writer: StoreWriter, job: ExtractJob) -> JobNote:
    """Write a job into the journal of its store."""
    table = dataclasses.asdict(job)
    table |= {name: base64.b64encode(table[name]).decode() for name in _BYTES}
    note = {"job": table, "versions": versions()}
    return JobNote(job.store, writer.write_note(json.dumps(note, sort_keys=True).encode()))


def extract_numbered(note: JobNote, number: int) -> int:
    """Extract one block of a job's store, by its number; see `extract_block`."""
    job, blocks = _read(note)
    return extract_block(job, blocks[number])


@lru_cache(maxsize=1)
def _read(note: JobNote) -> tuple[ExtractJob, list[Block]]:
    store = Path(note.store)
    found = json.loads(read_note(store, note.name))
    # Workers may have come after those that were there were looked over.
    other = other_versions(found["versions"])
    if other is not None:
        raise ClusterError(f"{platform.node()}: a worker {other}")
    table = found["job"]
    table |= {name: base64.b64decode(table[name]) for name in _BYTES}
    if table["reuse"] is not None:
        table["reuse"] = Reuse(**(table["reuse"] | {"products": tuple(table["reuse"]["products"])}))
    return ExtractJob(**table), read_plan(store).blocks
