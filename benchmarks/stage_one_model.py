"""How near to its encoder would stage one come on a GPU? `python benchmarks/stage_one_model.py`.

A model, not a measurement on a GPU. What the CPU does for an image of 640 x 480 is measured here, on one thread: the
windows of its crops, the rounds of the search, NMS and filters; threads read ahead. What a GPU does is stated in
`RATES`. The two are put together by `ezsd.pipeline.extraction.in_flight`, the code that extraction itself goes by: work
on an image goes on until it waits for the GPU, which does what it was given in order. One row for each mode goes to
results/stage_one_model.jsonl, with one image in flight and with more. Left out: windows are computed once more when a
batch is cropped, the pass of the ground truth's crops, the upload of the image, and the writing of the rows.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import driver
import torch

from ezsd.boxes import clip, iou
from ezsd.crops import distinct_crops
from ezsd.pipeline.config.schema import ProposalConfig, load_preset
from ezsd.pipeline.extraction.anchors import image_anchors, look_at_anchors
from ezsd.pipeline.extraction.in_flight import Work, in_flight
from ezsd.proposals.select import Looks, choose_regions

WIDTH, HEIGHT, CLASSES = 640, 480, 65
RATES = {
    "encoder_crops_per_s": 45_000,
    "crop_kernel_share_of_encoder": 0.03,
    "host_us_per_launch": 6,
    "launches_per_batch": 180,
    "copies_gb_per_s": 20,
}
"""Stated, not measured: of an H200 and ViT-B/32 in bf16. The second is a guess: no GPU has run the kernel."""
BATCH, DIMENSION, IMAGES = 256, 512, 50


@dataclass(slots=True)
class Clock:
    """Times in milliseconds at which host and GPU are free."""

    host: float = 0.0
    gpu: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What an image takes: measured milliseconds of one CPU thread, and the crops of each round."""

    rounds: tuple[int, ...]
    windows: float
    search: float
    choose: float


def measured(call: Callable[[], object], rounds: int) -> float:
    """Median CPU time of a call, milliseconds."""
    return 1e3 * statistics.median(driver.timed(call)[1].cpu for _ in range(rounds))


def measure(config: ProposalConfig, rounds: int) -> Parts:
    """The parts of an image in one mode; scores rise smoothly to a few places, as a teacher's do."""
    anchors = clip(image_anchors(config, WIDTH, HEIGHT), WIDTH, HEIGHT)
    random = torch.Generator().manual_seed(0)
    tops = anchors[torch.randint(0, len(anchors), (8,), generator=random)]
    looked: list[int] = []

    def encode(boxes: torch.Tensor) -> torch.Tensor:
        looked.append(len(boxes))
        return iou(boxes, tops)

    def look() -> torch.Tensor:
        looked.clear()
        return look_at_anchors(config, WIDTH, HEIGHT, encode, lambda overlap: overlap.amax(1))[0]

    boxes = look()
    each = tuple(looked)
    scores = iou(boxes, tops).amax(1)
    looks = Looks(scores, torch.ones(len(boxes)), scores, torch.full((len(boxes),), CLASSES - 1))
    crop = {"ratio": config.crop_ratio, "width": WIDTH, "height": HEIGHT}
    return Parts(
        rounds=each,
        windows=measured(lambda: distinct_crops(boxes, surround=config.padding, **crop), rounds),
        search=measured(look, rounds),
        choose=measured(
            lambda: choose_regions(
                boxes,
                looks,
                tops[:3],
                base_count=48,
                nms_iou=config.nms_iou,
                keep_proposals=config.max_proposals,
                base_iou=config.base_iou,
                drop_base_guesses=config.drop_base_guesses,
                keep_regions=config.max_regions,
            ),
            rounds,
        ),
    )


def image(clock: Clock, parts: Parts) -> Work[None]:
    """Work on one image: each round takes the host, then the GPU, which the host waits for at last."""
    crops = sum(parts.rounds)
    for count in parts.rounds:
        batches = -(-count // BATCH)
        launch = batches * RATES["launches_per_batch"] * RATES["host_us_per_launch"] / 1e3
        clock.host += (parts.windows + parts.search) * count / crops + launch
        compute = encoder(count) * (1 + RATES["crop_kernel_share_of_encoder"])
        copy = count * DIMENSION * 2 / RATES["copies_gb_per_s"] / 1e6
        # The first batch is under way when the last one is launched.
        clock.gpu = max(clock.gpu, clock.host - launch * (1 - 1 / batches)) + compute + copy
        done = clock.gpu
        yield
        clock.host = max(clock.host, done)
    clock.host += parts.choose


def encoder(crops: int) -> float:
    """Milliseconds of the bare encoder."""
    return 1e3 * crops / RATES["encoder_crops_per_s"]


def ratio(parts: Parts, most: int) -> float:
    """Speed as a share of the bare encoder's, with so many images in flight."""
    clock = Clock()
    for _ in in_flight((image(clock, parts) for _ in range(IMAGES)), most=most):
        pass
    return IMAGES * encoder(sum(parts.rounds)) / max(clock.host, clock.gpu)


def rows(arguments: argparse.Namespace) -> Iterator[driver.Row]:
    """One row for each mode."""
    torch.set_num_threads(1)
    for name, overrides in {"coarse-to-fine": ["proposals.search=coarse-to-fine"], "exhaustive": []}.items():
        preset = "coco" if overrides else "paper"
        parts = measure(load_preset(preset, overrides).proposals, arguments.rounds)
        spent = {key: round(getattr(parts, key), 2) for key in ("windows", "search", "choose")}
        yield {
            "mode": name,
            "modelled": True,
            "rates": RATES,
            "crops": parts.rounds,
            "cpu_ms": spent,
            "encoder_ms": round(encoder(sum(parts.rounds)), 1),
            "over_encoder": {f"{most} in flight": round(ratio(parts, most), 3) for most in (1, 2, 3)},
            "note": arguments.note,
        }


if __name__ == "__main__":
    driver.run("stage_one_model", rows, __doc__, driver.option("--rounds", default=7), "--note")
