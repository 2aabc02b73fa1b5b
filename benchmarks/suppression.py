"""How long does NMS of a whole grid take? `python benchmarks/suppression.py`.

Of the method's 12,750 anchors of a 640 x 480 image stage one keeps the first `proposals.max_proposals` that NMS keeps:
`nms` of all of them against `first_kept`, in turns, on one thread. Scores are of two kinds: "noise", and "hills", which
rise smoothly to a few places as a teacher's do, so that NMS drops most of the best anchors. First a gate: both keep the
same anchors in the same order, or there are no figures. One row for each kind goes to results/suppression.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator

import driver
import torch
from torch import Tensor
from torchvision.ops import nms

from ezsd.boxes import iou
from ezsd.pipeline.config.schema import load_preset
from ezsd.proposals.select import faithful_anchors, first_kept

WIDTH, HEIGHT = 640, 480
HILLS = 8
KINDS = ("noise", "hills")


def scores(anchors: Tensor, kind: str, seed: int) -> Tensor:
    """Scores (A,) of one image."""
    random = torch.Generator().manual_seed(seed)
    noise = torch.rand(len(anchors), generator=random)
    if kind == "noise":
        return noise
    tops = anchors[torch.randint(0, len(anchors), (HILLS,), generator=random)]
    return iou(anchors, tops).amax(1) + noise / 10


def rows(arguments: argparse.Namespace) -> Iterator[driver.Row]:
    """Gate, then CPU time of both ways by kind of scores."""
    torch.set_num_threads(1)
    settings = load_preset("paper").proposals
    most, threshold = settings.max_proposals, settings.nms_iou
    anchors = faithful_anchors(WIDTH, HEIGHT)
    for kind in KINDS:
        images = [scores(anchors, kind, seed) for seed in range(arguments.rounds)]
        if any(
            not torch.equal(first_kept(anchors, one, iou=threshold, most=most), nms(anchors, one, threshold)[:most])
            for one in images
        ):
            raise SystemExit(f"{kind}: the two keep other anchors; no figures")

        def of_all(turn: int, images: list[Tensor] = images) -> float:
            return driver.timed(lambda: nms(anchors, images[turn], threshold)[:most])[1].cpu

        def of_best(turn: int, images: list[Tensor] = images) -> float:
            return driver.timed(lambda: first_kept(anchors, images[turn], iou=threshold, most=most))[1].cpu

        found = driver.in_turns({"all": of_all, "best": of_best}, range(arguments.rounds))
        milliseconds = {way: 1e3 * statistics.median(spent) for way, spent in found.items()}
        yield {
            "scores": kind,
            "anchors": len(anchors),
            "most": most,
            "iou": threshold,
            "rounds": arguments.rounds,
            "cpu_ms": {way: round(value, 2) for way, value in milliseconds.items()},
            "best_over_all": round(milliseconds["best"] / milliseconds["all"], 4),
            "note": arguments.note,
        }


if __name__ == "__main__":
    driver.run("suppression", rows, __doc__, driver.option("--rounds", default=9, help="images of each kind"), "--note")
