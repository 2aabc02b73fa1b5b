"""Digests of the stores a run was trained on: stores.json in its folder, an entry for each store and its first step.

Equal settings make equal manifests and not always equal bytes: another machine's teacher rounds differently, and anyone
who changes a store by hand can compute its digests again. So run.json, which tells runs apart by their settings, is not
enough.
"""

from __future__ import annotations

import logging
from typing import Any

from ezsd.cache import Store
from ezsd.pipeline.errors import DamagedFile, RunError
from ezsd.pipeline.files import read_objects, write_json
from ezsd.pipeline.runs.run import Run

log = logging.getLogger("ezsd")


def read_stores(run: Run) -> list[dict[str, Any]]:
    """Entries of `step`, the number of steps done before, and `sha256` (see `Store.digest`); none for an older run.

    Raises:
        DamagedFile: the file holds something else.
    """
    path = run.folder / "stores.json"
    entries = read_objects(path) if path.exists() else []
    for entry in entries:
        if not isinstance(entry.get("step"), int) or not isinstance(entry.get("sha256"), str):
            raise DamagedFile(f"{path}: is damaged, expected step and sha256 in each entry, found {entry}")
    return entries


def require_same_bytes(run: Run, store: Store, *, accept: bool) -> None:
    """Refuse to go on with other bytes than the run was trained on so far, unless that is accepted.

    A warning would be lost in the log of a job, and the run would be of two stores without anybody's decision.

    Raises:
        RunError: they are others; says how to accept them.
    """
    known = read_stores(run) if run.has_checkpoint else []
    if not accept and known and known[-1]["sha256"] != store.digest:
        raise RunError(
            f"`run={run.folder}`: was trained on other bytes than {store} holds now, made from equal settings "
            f"(digest {known[-1]['sha256'][:12]} there, {store.digest[:12]} here): give the `cache` that it was "
            "trained on, choose another `run` folder, or accept the change with `accept_store`; both are then recorded"
        )


def record_store(run: Run, store: Store, step: int) -> None:
    """Note which store the run is trained on from a step on; what is trained anew is forgotten."""
    known = read_stores(run)
    if step and not known:
        log.warning(
            "`run=%s`: was begun by a version that did not record which bytes it is trained on; from step %d on they "
            "are those of %s",
            run.folder,
            step,
            store,
        )
    entries = [entry for entry in known if entry["step"] < step]
    if not entries or entries[-1]["sha256"] != store.digest:
        entries.append({"step": step, "sha256": store.digest})
    if entries != known:
        write_json(run.folder / "stores.json", entries)
