"""Request for a build, as the command line makes it, with the images and base boxes to build from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from ezsd.data.annotations import Annotations
from ezsd.pipeline.config.schema import Config
from ezsd.pipeline.data.annotation_cache import training_annotations
from ezsd.pipeline.data.datasets import Dataset
from ezsd.pipeline.errors import ConfigError
from ezsd.pipeline.scheduling.pool import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """Request for a build, as the command line makes it."""

    dataset: Dataset
    config: Config
    out: Path
    """The store's folder."""
    preset: str | None = None
    """Name of the preset that the configuration came from: `ezsd train` then starts from the same."""
    limit: int | None = None
    """Only the first images of the training split, by id."""
    device: str = "cpu"
    """Device of the teacher."""
    scheduler: str = "local"
    """Place where tasks run, see `Schedule`."""
    workers: int = 0
    """Worker processes of this machine; 0 takes one per GPU, or one per core on the CPU."""
    dashboard: bool = False
    """True if Dask's pages about the work are served."""
    wait_for_workers: float | None = None
    """Seconds to wait for a cluster's first worker, see `Schedule`."""
    reuse: Path | None = None
    """A complete store to take over what would come out the same."""

    @property
    def schedule(self) -> Schedule:
        """Scheduler, workers and device for the tasks of the build."""
        return Schedule(
            scheduler=self.scheduler,
            workers=self.workers,
            device=self.device,
            dashboard=self.dashboard,
            wait_for_workers=self.wait_for_workers,
        )


def read_annotations(request: BuildRequest) -> Annotations:
    """The images and base boxes that a build is of."""
    file = request.dataset.root / request.dataset.train_annotations
    annotations = take_first(training_annotations(file, request.dataset.split), request.limit)
    if not annotations.images:
        raise ConfigError(f"{file}: no images; there is nothing to build")
    return annotations


def take_first(annotations: Annotations, limit: int | None) -> Annotations:
    """The record of the first `limit` images."""
    if limit is None or limit >= len(annotations.images):
        return annotations
    if limit < 1:
        raise ConfigError(f"`limit` must be at least 1, got {limit}")
    rows = annotations.image_index < limit
    return dataclasses.replace(
        annotations,
        images=annotations.images[:limit],
        image_index=annotations.image_index[rows],
        box=annotations.box[rows],
        class_index=annotations.class_index[rows],
        annotation_id=annotations.annotation_id[rows],
        crowd=annotations.crowd[rows],
    )
