"""The box convention of the whole project, and the geometry that follows from it.

A box is four float32 numbers x1, y1, x2, y2 in pixels of the original image, with
0 <= x1 < x2 <= W and 0 <= y1 < y2 <= H: corners, not centres; continuous coordinates, so the
width is x2 - x1 without the "+ 1" of whole-pixel conventions; the origin is the upper left
corner of the upper left pixel. Only code that rescales images (the dataset, the detector) sees
boxes in other pixels, and says so.

All functions take boxes in the last dimension, (..., 4), leave their input alone, and accept
zero boxes.
"""

import math

import torch
from torch import Tensor

_LARGEST_GROWTH = math.log(1000 / 16)


def clip(boxes: Tensor, width: float, height: float) -> Tensor:
    """Move every corner to the nearest point of the image.

    Args:
        boxes: xyxy, (..., 4).
        width: extent of the image in the pixels of `boxes`.
        height: the same, downwards.

    Returns:
        Boxes inside [0, width] x [0, height]. One that was outside has no area left: dropping
        it is the caller's decision.
    """
    x = boxes[..., 0::2].clamp(0, width)
    y = boxes[..., 1::2].clamp(0, height)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1)


def area(boxes: Tensor) -> Tensor:
    """Area in square pixels, (...); zero for a box whose corners are swapped."""
    extent = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0)
    return extent[..., 0] * extent[..., 1]


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every box of `a` with every box of `b`.

    Args:
        a: xyxy, (..., A, 4), any float dtype; computed in float32 at least.
        b: xyxy, (..., B, 4), in the same pixels; leading dimensions are broadcast.

    Returns:
        (..., A, B), values in [0, 1]. Boxes without area overlap nothing: 0, never NaN.
    """
    # Areas of photographs overflow float16 (65 504 is only 256 x 256) and coarsen in bfloat16.
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to(dtype), b.to(dtype)
    upper_left = torch.maximum(a[..., :, None, :2], b[..., None, :, :2])  # (..., A, B, 2)
    lower_right = torch.minimum(a[..., :, None, 2:], b[..., None, :, 2:])  # (..., A, B, 2)
    sides = (lower_right - upper_left).clamp(min=0)
    shared = sides[..., 0] * sides[..., 1]
    union = area(a)[..., :, None] + area(b)[..., None, :] - shared
    return torch.where(shared > 0, shared / union, torch.zeros_like(shared))


def deltas_between(reference: Tensor, target: Tensor) -> Tensor:
    """Deltas (..., 4) that move reference boxes onto targets: centre by the reference's sides, logarithm of growth.

    Args:
        reference: xyxy, (..., 4), with positive sides.
        target: xyxy, (..., 4), with positive sides.

    Source: Girshick et al., R-CNN (arXiv 1311.2524), appendix C.
    """
    size, wanted = reference[..., 2:] - reference[..., :2], target[..., 2:] - target[..., :2]
    centre, aim = reference[..., :2] + size / 2, target[..., :2] + wanted / 2
    return torch.cat([(aim - centre) / size, (wanted / size).log()], -1)


def apply_deltas(reference: Tensor, deltas: Tensor) -> Tensor:
    """The inverse of `deltas_between`; growth is limited to 1000 / 16, as torchvision limits it, to the same bits."""
    size = reference[..., 2:] - reference[..., :2]
    centre = reference[..., :2] + size / 2 + deltas[..., :2] * size
    half = size * deltas[..., 2:].clamp(max=_LARGEST_GROWTH).exp() / 2
    return torch.cat([centre - half, centre + half], -1)


def overlaps_any(boxes: Tensor, others: Tensor, *, iou_floor: float) -> Tensor:
    """Mark boxes whose IoU with at least one of `others` is `iou_floor` or more.

    Args:
        boxes: xyxy, (A, 4).
        others: xyxy, (B, 4), in the same pixels; B may be 0.
        iou_floor: in (0, 1].

    Returns:
        (A,) bool.
    """
    return (iou(boxes, others) >= iou_floor).any(1)


def flip_horizontal(boxes: Tensor, width: float) -> Tensor:
    """Mirror boxes left to right, as the image of that width is mirrored.

    Args:
        boxes: xyxy, (..., 4).
        width: extent of the image in the pixels of `boxes`.

    Returns:
        xyxy, (..., 4); the left edge of the result is the mirrored right edge.
    """
    x1, y1, x2, y2 = boxes.unbind(dim=-1)
    return torch.stack([width - x2, y1, width - x1, y2], dim=-1)


def scale(boxes: Tensor, sx: float, sy: float) -> Tensor:
    """Scale boxes along with an image whose width is resized by `sx` and height by `sy`.

    Args:
        boxes: xyxy, (..., 4).
        sx: new width / old width, > 0.
        sy: new height / old height, > 0.

    Returns:
        xyxy in the new pixels, (..., 4).

    Raises:
        ValueError: a factor is not positive.
    """
    if not (sx > 0 and sy > 0):
        raise ValueError(f"scale factors must be > 0, got {sx} and {sy}")
    return boxes * boxes.new_tensor([sx, sy, sx, sy])
