"""What a build would do and need, without doing any of it."""

from __future__ import annotations

import itertools
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from cache import Forecast, forecast
from ezsd.boxes import clip
from ezsd.data.annotations import Annotations
from ezsd.teacher import Teacher
from pipeline.anchors import encoded_at_most, image_anchors
from pipeline.config import Config
from pipeline.datasets import read_dataset_image
from pipeline.encode import CropEncoder, single_thread
from pipeline.extract import load_config_teacher
from pipeline.request import BuildRequest, read_annotations

log = logging.getLogger("ezsd")

_LOOKED_AT = 32
"""Images whose sizes stand for all, and which are encoded for a probe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildForecast:
    """What a build would do, without doing any of it."""

    images: int
    blocks: int
    at_most: Forecast
    """With as many proposals and regions in each image as are kept at most."""
    free: int
    """Bytes free where the store would lie."""
    passes: int
    """Crops that the teacher would be shown, at most, by the sizes of some images."""
    probe: Probe
    processes: int | None
    """Processes that would extract; None on a cluster, which was not asked."""

    @property
    def seconds(self) -> float:
        """Of extraction, were each process as fast as the probe."""
        return self.passes / self.probe.rate / (self.processes or 1)


@dataclass(frozen=True, slots=True)
class Probe:
    """How fast one process of this machine reads, crops and encodes."""

    crops: int
    seconds: float

    @property
    def rate(self) -> float:
        """Crops a second."""
        return self.crops / self.seconds


def forecast_build(request: BuildRequest, *, probe_seconds: float = 10.0) -> BuildForecast:
    """How large the store would become, how much the disk must hold meanwhile, and how long extraction would take.

    Args:
        request: what would be built.
        probe_seconds: time for which crops of the dataset are encoded to see how fast that is.

    Raises:
        ValueError: see `build_cache`; an image that is looked at cannot be read.
    """
    request.dataset.require()
    annotations = read_annotations(request)
    teacher = load_config_teacher(request.config, request.device)
    images, size = len(annotations.images), request.config.build.block_images
    blocks, processes = -(-images // size), request.schedule.processes
    return BuildForecast(
        passes=_passes(request.config, annotations),
        probe=_probe(request, annotations, teacher, probe_seconds),
        processes=processes and min(processes, blocks),
        images=images,
        blocks=blocks,
        at_most=_at_most(request, annotations, teacher.embed_dim),
        free=_free(request.out),
    )


def _some(annotations: Annotations) -> list[int]:
    """Places of some images, far apart."""
    count = len(annotations.images)
    return sorted({place * count // _LOOKED_AT for place in range(_LOOKED_AT)})


def _passes(config: Config, annotations: Annotations) -> int:
    """Crops of all images: for anchors by the sizes of some of them, and one for each base box."""
    if config.proposals.boxes:
        return len(annotations.images) * config.proposals.keep + len(annotations.box)
    some = [annotations.images[place] for place in _some(annotations)]
    seen = sum(encoded_at_most(config.proposals, image.width, image.height) for image in some)
    return round(seen / len(some) * len(annotations.images)) + len(annotations.box)


def _probe(request: BuildRequest, annotations: Annotations, teacher: Teacher, seconds: float) -> Probe:
    """Encode anchors of some images, over and over, until the time is up."""
    encoder = CropEncoder(teacher, request.config)
    folder = request.dataset.root / request.dataset.train_images
    crops, began = 0, None
    with single_thread():
        for place in itertools.cycle(_some(annotations)):
            record = annotations.images[place]
            pixels = read_dataset_image(folder, record).to(getattr(teacher, "device", "cpu"))
            anchors = clip(image_anchors(request.config.proposals, record.width, record.height), *pixels.shape[:0:-1])
            for boxes in anchors.split(encoder.batch):
                if began is None:
                    # The first call makes ready what later ones find.
                    encoder.encode(pixels, boxes)
                    began = time.perf_counter()
                crops += encoder.encode(pixels, boxes)[1]
                if time.perf_counter() - began >= seconds:
                    return Probe(crops, time.perf_counter() - began)
    raise AssertionError("a cycle ends")


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
