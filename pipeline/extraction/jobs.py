"""Jobs of worker processes in the store's journal, so that only block numbers travel to workers."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ezsd.cache import Block, StoreWriter, read_note, read_per_store, read_plan
from ezsd.pipeline.config.schema import from_tables, to_tables
from ezsd.pipeline.data.datasets import from_definition
from ezsd.pipeline.extraction.proposer import proposer_weights
from ezsd.pipeline.extraction.reuse import Reuse
from ezsd.pipeline.extraction.worker import ExtractJob, extract_block
from ezsd.pipeline.files import parse_object
from ezsd.pipeline.scheduling.dask_cluster import require_fit, versions


@dataclass(frozen=True, slots=True)
class JobNote:
    """Store and name of a job in its journal."""

    store: str
    name: str
    plan_file: str
    """A file that whoever sees the store sees."""


def leave_job(writer: StoreWriter, job: ExtractJob) -> JobNote:
    """Write a job into the journal of its store, which has the re-normalised LayerNorms and the text rows already."""
    note = {
        "versions": versions(),
        "dataset": job.dataset.definition(),
        "root": str(job.dataset.root),
        "config": to_tables(job.config),
        "device": job.device,
        "made_from": job.made_from,
        "limit": job.limit,
        "reuse": None if job.reuse is None else dataclasses.asdict(job.reuse),
    }
    name = writer.write_note(json.dumps(note, sort_keys=True).encode())
    return JobNote(job.store, name, str(writer.plan_file))


def extract_numbered(note: JobNote, number: int) -> int:
    """Extract one block of a job's store, by its number; see `extract_block`."""
    job, blocks = _read(note)
    return extract_block(job, blocks[number])


@lru_cache(maxsize=1)
def _read(note: JobNote) -> tuple[ExtractJob, list[Block]]:
    require_fit(file=Path(note.plan_file))
    found = parse_object(read_note(Path(note.store), note.name), f"{note.store}: the job {note.name}")
    require_fit(found["versions"])
    plan, reuse = read_plan(Path(note.store)), found["reuse"]
    teacher, tuned = read_per_store(plan, "teacher")
    text, _ = read_per_store(plan, "text")
    network = read_per_store(plan, "proposer") if "proposer" in plan.manifest.products else None
    job = ExtractJob(
        store=note.store,
        dataset=from_definition(found["dataset"], Path(found["root"])),
        config=from_tables(found["config"], where="job"),
        device=found["device"],
        values=teacher["values"],
        parameters=tuned["parameters"],
        text=text["embedding"],
        made_from=found["made_from"],
        limit=found["limit"],
        reuse=None if reuse is None else Reuse(**{**reuse, "products": tuple(reuse["products"])}),
        proposer=None if network is None else proposer_weights(*network),
    )
    return job, plan.blocks
