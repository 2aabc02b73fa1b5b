"""Balanced sampling of positive and negative regions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ezsd.boxes import iou, overlaps_any


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledRegions:
    """Regions of one image that the box head learns from."""

    boxes: Tensor
    """(R, 4)."""
    labels: Tensor
    """(R,) int64; background is the number of classes."""
    targets: Tensor
    """The ground-truth box of each, (R, 4); zeros for background."""
    objects: Tensor
    """Position of each region's object in the ground truth, (R,) int64; -1 for background."""


def draw_balanced(positive: Tensor, negative: Tensor, *, count: int, share: float) -> tuple[Tensor, Tensor]:
    """Draw from torch's global state, without replacement: positives first, then negatives for what they leave.

    Args:
        positive: positions, (P,) int64.
        negative: positions, (N,) int64.
        count: most in all.
        share: largest fraction of `count` that are positives.

    Returns:
        The drawn positions of both.
    """
    positive = positive[torch.randperm(len(positive))[: int(count * share)].to(positive.device)]
    return positive, negative[torch.randperm(len(negative))[: count - len(positive)].to(negative.device)]


@torch.no_grad()
def sample_regions(
    proposals: Tensor, boxes: Tensor, labels: Tensor, *, background: int, count: int, share: float, unknown: Tensor
) -> SampledRegions:
    """Choose regions at random: IoU >= 0.5 with a ground-truth box is that object, the rest is background.

    What overlaps an `unknown` box at IoU 0.5 or more, and no ground truth, is neither: it is not chosen.

    Args:
        proposals: (P, 4); the ground truth is added to them.
        boxes: base ground truth, (N, 4).
        labels: (N,) int64.
        background: label of regions without an object.
        count: most regions in all.
        share: largest fraction on objects.
        unknown: boxes that may hold an object without a label, (U, 4).
    """
    likely = overlaps_any(proposals, unknown, iou_floor=0.5)
    if not len(boxes):
        free = torch.nonzero(~likely)[:, 0]
        chosen = proposals[draw_balanced(free[:0], free, count=count, share=share)[1]]
        label = torch.full((len(chosen),), background, device=proposals.device)
        none = torch.full_like(label, -1)
        return SampledRegions(boxes=chosen, labels=label, targets=torch.zeros_like(chosen), objects=none)
    candidates = torch.cat([proposals, boxes])
    overlap, nearest = iou(candidates, boxes).max(1)
    nothing = overlap < 0.5
    nothing[: len(proposals)] &= ~likely
    positive, negative = draw_balanced(
        torch.nonzero(overlap >= 0.5)[:, 0], torch.nonzero(nothing)[:, 0], count=count, share=share
    )
    rows = torch.cat([positive, negative])
    label = labels[nearest[rows]].clone()
    label[len(positive) :] = background
    target = boxes[nearest[rows]].clone()
    target[len(positive) :] = 0
    objects = nearest[rows]
    objects[len(positive) :] = -1
    return SampledRegions(boxes=candidates[rows], labels=label, targets=target, objects=objects)
