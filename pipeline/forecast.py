"""What a build would do and need, without doing any of it."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from cache import Forecast, forecast
from ezsd.data.annotations import Annotations
from pipeline.extract import load_config_teacher
from pipeline.request import BuildRequest, read_annotations

log = logging.getLogger("ezsd")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildForecast:
    """What a build would do, without doing any of it."""

    images: int
    blocks: int
    at_most: Forecast
    """With as many proposals and regions in each image as are kept at most."""
    free: int
    """Bytes free where the store would lie."""


def forecast_build(request: BuildRequest) -> BuildForecast:
    """How large the store would become, and how much the disk must hold meanwhile."""
    request.dataset.require()
    annotations = read_annotations(request)
    teacher = load_config_teacher(request.config, "cpu")
    images, size = len(annotations.images), request.config.build.block_images
    return BuildForecast(
        images=images,
        blocks=-(-images // size),
        at_most=_at_most(request, annotations, teacher.embed_dim),
        free=_free(request.out),
    )


def _at_most(request: BuildRequest, annotations: Annotations, embed_dim: int) -> Forecast:
    images, settings = len(annotations.images), request.config.proposals
    rows = {
        "proposals": images * settings.keep,
        "regions": images * min(settings.keep, settings.regions),
        "ground_truth": len(annotations.box),
    }
    return forecast(rows, images=images, embed_dim=embed_dim, embedding=request.config.build.embedding)


def _free(folder: Path) -> int:
    there = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    return shutil.disk_usage(there).free


def warn_of_room(request: BuildRequest, annotations: Annotations, embed_dim: int) -> None:
    """Say it when the disk could become too small."""
    most, free = _at_most(request, annotations, embed_dim), _free(request.out)
    if most.peak > free:
        log.warning("%s: the build may need up to %s bytes, %s are free", request.out, f"{most.peak:,}", f"{free:,}")
