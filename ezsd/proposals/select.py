"""CLIP proposals: anchors scored by the teacher's confidence and filtered against base boxes.

Every number is from the paper (EZSD, arXiv 2303.12145): score log C - H over the class names, class-agnostic NMS at IoU
0.7, and only regions that overlap no base box. Only base boxes are used; this module never gets a novel box.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import nms

from ezsd.boxes import overlaps_any
from ezsd.choices import Score

_SPARE = 64
"""Boxes beyond those wanted, that NMS is applied to at first."""


def faithful_anchors(
    width: int,
    height: int,
    *,
    sizes: Sequence[float] = (32, 64, 128, 256, 512),
    ratios: Sequence[float] = (0.5, 1.0, 2.0),
    stride: int = 32,
    short_side: int = 800,
    long_side: int = 1333,
) -> Tensor:
    """The method's grid: anchors of five sizes and three ratios at every 32 px of the resized image.

    The grid is that of the image resized to fit `long_side` x `short_side` (ratio kept) and padded to a multiple of the
    stride; centres are at multiples of the stride from 0. A 640 x 480 image has 12,750 anchors.

    Args:
        width: of the original image, pixels.
        height: likewise.
        sizes: square roots of the anchors' areas, resized-image pixels.
        ratios: height over width.
        stride: between centres, resized-image pixels.
        short_side: limit of the resized image's shorter side, pixels.
        long_side: limit of its longer side, pixels.

    Returns:
        (A, 4) xyxy, float32, original-image pixels, clamped to the image; some may be thin.
    """
    scale, rows, columns = faithful_cells(width, height, stride=stride, short_side=short_side, long_side=long_side)
    shapes = _shapes(sizes, ratios)
    y, x = torch.meshgrid(torch.arange(rows) * stride, torch.arange(columns) * stride, indexing="ij")
    centres = torch.stack([x, y], -1).reshape(-1, 1, 2).double()
    boxes = torch.cat([centres - shapes / 2, centres + shapes / 2], -1).reshape(-1, 4) / scale
    limit = torch.tensor([width, height, width, height], dtype=torch.float64)
    return torch.minimum(boxes.clamp(min=0), limit).float()


def faithful_cells(
    width: int, height: int, *, stride: int, short_side: int = 800, long_side: int = 1333
) -> tuple[float, int, int]:
    """Scale factor of the resized image and its number of rows and columns of cells; see `faithful_anchors`."""
    scale = min(long_side / max(width, height), short_side / min(width, height))
    return scale, math.ceil(round(height * scale) / stride), math.ceil(round(width * scale) / stride)


def sliding_anchors(
    width: int, height: int, *, sizes: Sequence[float], ratios: Sequence[float], stride: float
) -> Tensor:
    """Sliding windows inside the image, with a spacing that grows with their size.

    Args:
        width: of the image, pixels.
        height: likewise.
        sizes: square roots of the windows' areas, image pixels.
        ratios: height over width.
        stride: distance between neighbours, as a fraction of the window's own side (0.35 = 65 % overlap).

    Returns:
        (A, 4) xyxy, float32, image pixels. A window larger than the image is cut to it.
    """
    windows = []
    for w, h in _shapes(sizes, ratios).reshape(-1, 2).tolist():
        wide, high = min(w, width), min(h, height)
        x = torch.linspace(0, width - wide, 1 + round((width - wide) / (stride * wide)), dtype=torch.float64)
        y = torch.linspace(0, height - high, 1 + round((height - high) / (stride * high)), dtype=torch.float64)
        corner = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2)
        windows.append(torch.cat([corner, corner + torch.tensor([wide, high])], 1))
    return torch.cat(windows).float()


def _shapes(sizes: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """Width and height of every size and ratio h / w, (1, len(sizes) * len(ratios), 2); ratios keep the area."""
    return torch.tensor([[[s / math.sqrt(r), s * math.sqrt(r)] for s in sizes for r in ratios]], dtype=torch.float64)


def name_probabilities(embedding: Tensor, text: Tensor, *, logit_scale: float) -> Tensor:
    """Class probabilities (R, C), float32: softmax over cosines of embeddings (R, D) to text embeddings (C, D)."""
    return (logit_scale * embedding.float() @ text.float().T).softmax(1)


def guesses(embedding: Tensor, text: Tensor, background: Tensor | None, *, logit_scale: float) -> tuple[Tensor, Tensor]:
    """Class probabilities (R, C), and object probabilities (R,) by unit rows of background prompts, (B, D) or None.

    The softmax is over classes and background prompts together. An object's probability is that of all classes, a
    background's that of all background prompts; without a background prompt an object is certain.
    """
    names = name_probabilities(embedding, text, logit_scale=logit_scale)
    if background is None:
        return names, torch.ones(len(embedding), device=embedding.device)
    table = torch.cat([text, background])
    nothing = name_probabilities(embedding, table, logit_scale=logit_scale)[:, len(text) :].sum(1)
    # A sum of several can come out above 1 by rounding.
    return names, (1 - nothing).clamp(min=0)


def entropy_score(probability: Tensor) -> Tensor:
    """Certainty log C - H(p) per row (R,), in nats: 0 for a uniform guess, log C for certainty."""
    surprise = torch.xlogy(probability, probability).sum(1)
    return math.log(probability.shape[1]) + surprise


def anchor_scores(names: Tensor, foreground: Tensor, *, base_count: int, score: Score) -> Tensor:
    """Scores (R,) from class probabilities (R, C) and object probabilities (R,); see `select_regions`."""
    value = entropy_score(names) if score == "entropy" else names[:, base_count:].sum(1)
    return value * foreground


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Proposals and regions selected from the anchors of one image."""

    proposal: Tensor
    """Anchor positions of the proposals after NMS, best first, (P,) int64."""
    proposal_score: Tensor
    """Scores of the proposals, (P,) float32."""
    region: Tensor
    """Anchor positions of the regions to distil, best first, (K,) int64."""
    region_score: Tensor
    """Scores of the regions, (K,) float32."""
    confidence: Tensor
    """Largest class probability of each region, times its object probability, (K,) float32."""
    class_index: Tensor
    """Predicted class of each region, (K,) int64, a position among base, then novel class names."""


def select_regions(
    anchors: Tensor,
    embedding: Tensor,
    text: Tensor,
    base_boxes: Tensor,
    *,
    base_count: int,
    background: Tensor | None,
    logit_scale: float,
    score: Score,
    nms_iou: float,
    keep_proposals: int,
    base_iou: float,
    drop_base_guesses: bool,
    keep_regions: int,
    drop_background: bool = True,
) -> Selection:
    """Score an image's anchors, apply NMS, and keep the regions that may contain novel objects.

    Args:
        anchors: (A, 4) xyxy, original-image pixels.
        embedding: unit crop embeddings, (A, D).
        text: unit text embeddings of the base, then the novel classes, (C, D).
        base_boxes: BASE ground truth of the image, (N, 4).
        base_count: number of base classes in `text`.
        background: unit text embeddings of the background prompts, (B, D), or None; the class of empty crops.
        logit_scale: factor of the cosines before the softmax.
        score: "entropy" is log C - H over the classes (times the object probability, with background prompts); "novel"
            is the probability of all novel classes together.
        nms_iou: IoU threshold of NMS.
        keep_proposals: largest number of proposals kept after NMS.
        base_iou: regions with this IoU or more with a base box are dropped.
        drop_base_guesses: drop regions whose predicted class is a base class.
        keep_regions: largest number of regions kept.
        drop_background: drop regions with a background probability of one half or more.

    Source: EZSD, section on CLIP proposals.
    """
    looks = looks_of(embedding, text, background, base_count=base_count, logit_scale=logit_scale, score=score)
    return choose_regions(
        anchors,
        looks,
        base_boxes,
        base_count=base_count,
        nms_iou=nms_iou,
        keep_proposals=keep_proposals,
        base_iou=base_iou,
        drop_base_guesses=drop_base_guesses,
        keep_regions=keep_regions,
        drop_background=drop_background,
    )


class Looks(NamedTuple):
    """Scores and guesses of an image's anchors by the teacher, four numbers for each."""

    score: Tensor
    """(A,) float32."""
    foreground: Tensor
    """Object probability, (A,) float32."""
    confidence: Tensor
    """Largest class probability, (A,) float32."""
    class_index: Tensor
    """Class of that probability, (A,) int64."""


def looks_of(
    embedding: Tensor, text: Tensor, background: Tensor | None, *, base_count: int, logit_scale: float, score: Score
) -> Looks:
    """Score an image's anchors, on the device of their embeddings; arguments as in `select_regions`."""
    names, foreground = guesses(embedding, text, background, logit_scale=logit_scale)
    value = anchor_scores(names, foreground, base_count=base_count, score=score)
    return Looks(value, foreground, *names.max(1))


def choose_regions(
    anchors: Tensor,
    looks: Looks,
    base_boxes: Tensor,
    *,
    base_count: int,
    nms_iou: float,
    keep_proposals: int,
    base_iou: float,
    drop_base_guesses: bool,
    keep_regions: int,
    drop_background: bool = True,
) -> Selection:
    """Apply NMS to scored anchors and keep regions, all on the CPU; arguments as in `select_regions`."""
    kept = first_kept(anchors, looks.score, iou=nms_iou, most=keep_proposals)
    value, foreground, confidence, guess = (one[kept] for one in looks)
    clear = clear_of_base(anchors[kept], base_boxes, base_iou=base_iou)
    clear &= may_be_unseen(
        foreground,
        guess,
        base_count=base_count,
        drop_base_guesses=drop_base_guesses,
        drop_background=drop_background,
    )
    rows = torch.nonzero(clear)[:keep_regions, 0]
    return Selection(
        proposal=kept,
        proposal_score=value,
        region=kept[rows],
        region_score=value[rows],
        confidence=(confidence * foreground)[rows],
        class_index=guess[rows],
    )


def first_kept(boxes: Tensor, score: Tensor, *, iou: float, most: int) -> Tensor:
    """Positions (P,) of the best boxes that NMS keeps, best first: exactly `nms(boxes, score, iou)[:most]`.

    Whether NMS keeps a box is decided by better boxes alone, so it is applied to the best boxes only, and to more of
    them until it has kept enough. Its time grows with the square of their number.

    Args:
        boxes: (R, 4) xyxy.
        score: (R,); of equal scores the first is better.
        iou: IoU threshold of NMS.
        most: number of boxes wanted.
    """
    order = score.argsort(descending=True, stable=True)
    looked_at = most + _SPARE
    while True:
        best = order[:looked_at]
        kept = nms(boxes[best], score[best], iou)
        if len(kept) >= most or looked_at >= len(order):
            return best[kept[:most]]
        # Worse boxes are kept less often, for there are more that overlap them.
        expected = most * looked_at / max(len(kept), 1)
        looked_at = math.ceil(max(1.5 * looked_at, 1.1 * expected))


def clear_of_base(boxes: Tensor, base_boxes: Tensor, *, base_iou: float) -> Tensor:
    """Mark boxes (R, 4) whose IoU with every base box (N, 4) is below `base_iou`: (R,) bool."""
    return ~overlaps_any(boxes, base_boxes, iou_floor=base_iou)


def may_be_unseen(
    foreground: Tensor, guess: Tensor, *, base_count: int, drop_base_guesses: bool, drop_background: bool = True
) -> Tensor:
    """Mark regions that pass the requested filters: not background, predicted class not a base class; (R,) bool."""
    clear = foreground > 0.5 if drop_background else torch.ones_like(foreground, dtype=torch.bool)
    return clear & (guess >= base_count) if drop_base_guesses else clear
