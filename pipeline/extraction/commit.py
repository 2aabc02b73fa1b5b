"""The last step of a build: from journaled blocks to shards and commit mark; also as a command, after shares."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from ezsd.cache import (
    Block,
    StoreError,
    StoreIncomplete,
    StoreWriter,
    commit_numbered,
    file_digest,
    info,
    is_committed,
    read_environment,
)
from ezsd.errors import inflected
from ezsd.pipeline.data.images import most_bad_images, require_few_bad
from ezsd.pipeline.progress import Progress, log_file, now, timed
from ezsd.pipeline.scheduling.dask_cluster import Needs, check_workers, require_fit, versions
from ezsd.pipeline.scheduling.pool import Pool, Schedule

log = logging.getLogger("ezsd")

_FEW_SHARDS = 64
"""A commit of so many is over before worker processes have started."""


def write_shards(writer: StoreWriter, pool: Pool) -> None:
    """Write what is left of the shards."""
    digest, left = writer.commit_numbers()
    task = partial(_write_shard, str(writer.path), digest, writer.plan_file, versions())
    with Progress("commit", len(left), unit="shard") as progress:
        pool.run(task, left, named=lambda number: f"shard {number}", progress=progress, few=_FEW_SHARDS)


def _write_shard(store: str, digest: str, plan_file: Path, wanted: Mapping[str, str], number: int) -> None:
    require_fit(wanted, file=plan_file)
    commit_numbered(store, digest, number)


def commit_cache(store: Path, schedule: Schedule) -> float | None:
    """Finish a store whose blocks are all there; returns the seconds it took, or None for a complete one.

    Raises:
        StoreIncomplete: blocks are missing; says which, and what makes them.
        ImageError: more images cannot be read than the build may leave out.
        StoreError: no store, or one of another schema, or another process is at work on it.
    """
    schema = info(store).manifest.schema
    if schema is not None:
        raise StoreError(f"{store}: holds {', '.join(schema.names)}, expected a store of regions")
    if is_committed(store):
        return None
    seconds: dict[str, float] = {}
    with Pool(schedule) as pool, StoreWriter.reopen(store) as writer:
        if writer.complete:
            return None
        require_workers(pool, writer, device=None, files=())
        environment = read_environment(store)
        missing = writer.pending()
        if missing:
            raise StoreIncomplete(f"{store}: {missing_line(missing, len(writer.blocks), environment.get('shares'))}")
        bad = writer.bad_images()
        if bad and "config" in environment:
            # A share that was killed may have had no time to count.
            allowed = environment["config"]["build"]["max_bad_images"]
            require_few_bad(bad, most_bad_images(allowed, writer.blocks[-1].stop))
        with log_file(writer.log_path), timed(seconds, "commit"):
            write_shards(writer, pool)
        spent = {**environment.get("seconds", {}), "commit": round(seconds["commit"], 2)}
        writer.write_environment({**environment, "seconds": spent, "finished": now()})
        writer.finish()
    return seconds["commit"]


def require_workers(pool: Pool, writer: StoreWriter, *, device: str | None, files: Sequence[Path]) -> None:
    """Check that the workers of a cluster can read the store and further files; see `check_workers`."""
    if pool.client is not None:
        found = {str(file): file_digest(file).sha256 for file in (writer.plan_file, *files)}
        check_workers(pool.client, Needs(files=found, device=device, code="ezsd.pipeline.extraction.jobs"))


def missing_line(missing: list[Block], total: int, shares: int | None) -> str:
    """Describe the missing blocks of a store and what makes them; `shares` as the build was cut, if it was."""
    listed = ", ".join(str(block.index) for block in missing[:10]) + (", ..." if len(missing) > 10 else "")
    text = f"{len(missing)} of {total} blocks {inflected(len(missing), 'is', 'are')} missing ({listed})"
    if shares is None:
        return f"{text}; run the same `ezsd cache build` command again"
    wanted = sorted({block.index % shares + 1 for block in missing})
    options = ", ".join(f"`blocks={number}/{shares}`" for number in wanted)
    return f"{text}; run the same `ezsd cache build` command again with {options}"
