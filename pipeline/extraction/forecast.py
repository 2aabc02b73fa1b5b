"""Forecast of a build: what it would do and need, without doing any of it."""

from __future__ import annotations

import itertools
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ezsd.boxes import clip
from ezsd.cache import Forecast, forecast, region_schema
from ezsd.data.annotations import Annotations, ImageRecord
from ezsd.pipeline.config.schema import Config, ProposalConfig
from ezsd.pipeline.data.images import most_bad_images, require_few_bad
from ezsd.pipeline.extraction.anchors import encoded_at_most, image_anchors
from ezsd.pipeline.extraction.encoder import SHORT, CropEncoder, single_thread
from ezsd.pipeline.extraction.proposer import make_proposer, proposer_state
from ezsd.pipeline.extraction.request import BuildRequest, read_annotations
from ezsd.pipeline.extraction.run_proposer import with_run_network
from ezsd.pipeline.extraction.teacher import configured_teacher
from ezsd.teacher.open_clip import Teacher, device_of

log = logging.getLogger("ezsd")

_LOOKED_AT = 32
"""Images whose sizes stand for all, and which are encoded for a probe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildForecast:
    """Forecast of a build."""

    images: int
    missing: int
    """Images that are not there: so few that a build would leave them out."""
    blocks: int
    at_most: Forecast
    """Forecast with as many proposals and regions in each image as are kept at most."""
    free: int
    """Free bytes of the disk that the store would be on."""
    passes: int
    """Crops that the teacher would be shown, at most, by the sizes of some images."""
    probe: Probe
    processes: int | None
    """Processes that would extract; None on a cluster, which was not asked."""

    @property
    def seconds(self) -> float:
        """Seconds of extraction, if each process were as fast as the probe."""
        return self.passes / self.probe.rate / (self.processes or 1)


@dataclass(frozen=True, slots=True)
class Probe:
    """Speed at which one process of this machine reads, crops and encodes."""

    crops: int
    seconds: float

    @property
    def rate(self) -> float:
        """Crops a second."""
        return self.crops / self.seconds


def forecast_build(request: BuildRequest, *, probe_seconds: float = 10.0) -> BuildForecast:
    """Forecast the size of a store, the disk space needed while it is built, and the duration of extraction.

    Args:
        request: what would be built.
        probe_seconds: time for which crops of the dataset are encoded to see how fast that is.

    Raises:
        ImageError: more images are missing than a build may leave out, or one that is looked at cannot be read.
        ValueError: (of other kinds) see `build_cache`.
    """
    request.dataset.require()
    request = with_run_network(request)
    if request.config.proposals.learned:
        # Refuses a file of weights that a build would refuse.
        make_proposer(request.config.proposer, pretrained=request.config.proposer.run is None)
    annotations = read_annotations(request)
    images, size = len(annotations.images), request.config.build.block_images
    blocks, processes = -(-images // size), request.schedule.processes
    missing = _missing(request, annotations)
    require_few_bad(missing, most_bad_images(request.config.build.max_bad_images, images))
    there = [image for image in annotations.images if image.id not in missing]
    teacher = configured_teacher(request.config.teacher, request.device)
    return BuildForecast(
        passes=_passes(request.config, annotations),
        probe=_probe(request, _some(there), teacher, probe_seconds),
        processes=processes and min(processes, blocks),
        images=images,
        missing=len(missing),
        blocks=blocks,
        at_most=_at_most(request, annotations, teacher),
        free=_free(request.out),
    )


def _missing(request: BuildRequest, annotations: Annotations) -> dict[int, str]:
    """Images that are not there, by id, and what there is to say of them."""
    source, missing = request.dataset.images("train"), dict[int, str]()
    for image in annotations.images:
        path = source.find(image.file_name)
        if not path.is_file():
            missing[image.id] = f"{path}: no such image"
    return missing


def _some(images: Sequence[ImageRecord]) -> list[ImageRecord]:
    """A few images, far apart."""
    count = len(images)
    return [images[place] for place in sorted({part * count // _LOOKED_AT for part in range(_LOOKED_AT)})]


def _passes(config: Config, annotations: Annotations) -> int:
    """Crops of all images: for anchors by the sizes of some of them, voted boxes, and one for each base box."""
    settings = config.proposals
    if settings.has_objectness:
        return len(annotations.images) * config.max_proposals + len(annotations.box)
    some = _some(annotations.images)
    anchors = [encoded_at_most(settings, image.width, image.height) for image in some]
    voted = sum(min(seen, settings.max_proposals) for seen in anchors) if settings.refine == "vote" else 0
    return round((sum(anchors) + voted) / len(some) * len(annotations.images)) + len(annotations.box)


def _probe(request: BuildRequest, images: Sequence[ImageRecord], teacher: Teacher, seconds: float) -> Probe:
    """Encode anchors of images, over and over, as long as there is time for another batch."""
    encoder, source = CropEncoder(teacher, request.config), request.dataset.images("train")
    # A slow machine is not done with a whole batch in time: batches grow to a fifth of it at most.
    size, crops, began = SHORT, 0, None
    with single_thread():
        for image in itertools.cycle(images):
            pixels = source.read(image).to(device_of(teacher))
            boxes = _some_boxes(request.config.proposals, image)
            while len(boxes):
                if began is None:
                    # The first call makes ready what later ones find.
                    encoder.encode(pixels, boxes[:size])[0].cpu()
                    began = time.perf_counter()
                started = time.perf_counter()
                embedding, passes = encoder.encode(pixels, boxes[:size])
                # Done when they are here: the host waits for nothing before.
                embedding.cpu()
                crops += passes
                now = time.perf_counter()
                if now - began + now - started >= seconds:
                    return Probe(crops, now - began)
                boxes = boxes[size:]
                size = min(encoder.batch, max(SHORT, int(crops / (now - began) * seconds / 5)))
    raise AssertionError("a cycle ends")


def _some_boxes(config: ProposalConfig, image: ImageRecord) -> Tensor:
    """The anchors (R, 4) of an image; the whole of one that has none."""
    anchors = clip(image_anchors(config, image.width, image.height), image.width, image.height)
    return anchors if len(anchors) else torch.tensor([[0.0, 0.0, image.width, image.height]])


def _at_most(request: BuildRequest, annotations: Annotations, teacher: Teacher) -> Forecast:
    images, settings, proposals = len(annotations.images), request.config.proposals, request.config.max_proposals
    rows = {
        "proposals": images * proposals,
        "regions": images * min(proposals, settings.max_regions),
        "ground_truth": len(annotations.box),
        "teacher/values": sum(values.numel() for values in teacher.layer_norms().values()),
        "text/embedding": len(request.dataset.split.names),
        **proposer_rows(request.config),
    }
    products = {array.partition("/")[0] for array in rows}
    schema = region_schema(teacher.embed_dim, request.config.build.embedding, products)
    return forecast(rows, images=images, schema=schema)


def proposer_rows(config: Config) -> dict[str, int]:
    """Number of values of the learned proposer by the path of its array in the store; empty without one."""
    if not config.proposals.learned:
        return {}
    state = proposer_state(make_proposer(config.proposer, pretrained=False))
    return {"proposer/values": sum(values.numel() for values in state.values())}


def _free(folder: Path) -> int:
    there = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    return shutil.disk_usage(there).free


def warn_of_room(request: BuildRequest, annotations: Annotations, teacher: Teacher) -> None:
    """Say it when the disk could become too small."""
    most, free = _at_most(request, annotations, teacher), _free(request.out)
    if most.peak > free:
        log.warning("%s: the build may need up to %s bytes, %s are free", request.out, f"{most.peak:,}", f"{free:,}")
