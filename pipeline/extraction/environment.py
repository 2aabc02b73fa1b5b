"""Record of who builds a store how, with what and where: `environment.json`, neither compared nor checked later."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from importlib.resources import as_file
from pathlib import Path

from ezsd.cache import JSON, Manifest, file_digest
from ezsd.pipeline.config.schema import Config, to_tables
from ezsd.pipeline.extraction.request import BuildRequest
from ezsd.pipeline.files import as_json
from ezsd.pipeline.progress import now
from ezsd.pipeline.runs.run import Run
from ezsd.pipeline.runs.training_boxes import read_boxes
from ezsd.teacher.open_clip import shipped_weights
from ezsd.teacher.requirements import TINY_SHAPES


def describe_build(request: BuildRequest, *, workers: int, shares: int | None) -> dict[str, JSON]:
    """The record at the beginning of a build.

    Args:
        request: what is built.
        workers: processes that extract.
        shares: jobs that the blocks are divided among, if they are.
    """
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "open_clip_torch", "zarr", "numpy", "ezsd")
    }
    return {
        "dataset": as_json(request.dataset.definition()),
        "data_root": str(request.dataset.root.absolute()),
        "preset": request.preset,
        "limit": request.limit,
        "device": request.device,
        "teacher": dataclasses.asdict(request.config.teacher),
        "weights_file_sha256": weights_file_digest(request.config),
        "config": as_json(to_tables(request.config)),
        # The boxes that products are made from have digests in the manifest; these are for `ezsd audit`.
        "annotations_sha256": file_digest(request.dataset.annotations("train")).sha256,
        "proposer_run": _taught_by(request.config),
        "reused_from": None if request.reuse is None else str(request.reuse.absolute()),
        "host": platform.node(),
        "python": platform.python_version(),
        "versions": dict(versions),
        "scheduler": request.schedule.kind,
        "workers": workers,
        "shares": shares,
        # Of the last call of the build; of shares, of the one that prepared the store, and of the commit.
        "started": now(),
        "finished": None,
        "seconds": {},
        # Of the images that were extracted by the last call of the build.
        "encoded": {},
    }


def _taught_by(config: Config) -> dict[str, JSON] | None:
    """Classes and boxes that the run whose proposal network proposes has learned from; None where no run's does.

    `proposals_from` says where that run's own proposals came from: "build", "file" or "run".
    """
    if not config.proposals.learned or config.proposer.run is None:
        return None
    run = Run.open(Path(config.proposer.run))
    spec = run.spec
    names, count = spec["names"], spec["base_count"]
    assert isinstance(names, list)
    assert isinstance(count, int)
    own = spec["store"]
    assert isinstance(own, dict)
    # An early run has none: then an audit says that it was not recorded.
    manifest, proposals_from = own.get("manifest"), None
    if isinstance(manifest, dict):
        products = Manifest.from_fields(manifest, str(run.folder)).products
        from_run = "proposer" in products and "run_sha256" in products["proposer"].inputs
        from_file = "boxes_sha256" in products["proposals"].inputs
        proposals_from = "file" if from_file else "run" if from_run else "build"
    return as_json(
        {
            "dataset": spec["dataset"],
            "base_names": names[:count],
            "novel_names": names[count:],
            "proposals_from": proposals_from,
            "boxes": read_boxes(run),
        }
    )


def weights_file_digest(config: Config) -> str | None:
    """Sha256 of the local file that the teacher's weights come from; None where they come from elsewhere."""
    file = Path(config.teacher.weights) if config.teacher.weights else None
    if file is None and config.teacher.name == TINY_SHAPES:
        with as_file(shipped_weights()) as shipped:
            return file_digest(shipped).sha256
    return file_digest(file).sha256 if file is not None and file.is_file() else None
