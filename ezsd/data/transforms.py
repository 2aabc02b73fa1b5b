"""Sizes and crops at random: what large-scale jitter does to an image and to its boxes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ezsd.boxes import area, clip

SEEN_SHARE = 0.5
"""A cached region of which a crop leaves less is not distilled: its embedding is that of the whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """Random changes of an image, beside its flip and the choice of its regions."""

    short_side_min: int = 0
    """The short side's limit is drawn between this and the full one, pixels; 0 fixes it."""
    jitter: tuple[float, float] | None = None
    """Large-scale jitter: the image fits into a square of the long side times a factor between these two, of which
    a window of the long side is cut. None does neither."""


def draw_limits(rng: np.random.Generator, how: Augmentation, short_side: int, long_side: int) -> tuple[int, int]:
    """The limits that this time's image is resized to."""
    if how.jitter is not None:
        side = max(1, round(long_side * rng.uniform(*how.jitter)))
        return side, side
    if how.short_side_min:
        return int(rng.integers(how.short_side_min, short_side + 1)), long_side
    return short_side, long_side


def draw_window(rng: np.random.Generator, image: Tensor, side: int) -> tuple[int, int, int, int]:
    """A place for a window of at most side x side inside an image (3, H, W): x, y, width, height."""
    height, width = int(image.shape[1]), int(image.shape[2])
    wide, high = min(side, width), min(side, height)
    return int(rng.integers(width - wide + 1)), int(rng.integers(height - high + 1)), wide, high


def boxes_in_window(boxes: Tensor, window: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """Boxes (N, 4) in a window's own pixels, clipped to it, and the fraction of each that it shows, (N,)."""
    x, y, width, height = window
    moved = boxes - boxes.new_tensor([x, y, x, y])
    inside = clip(moved, width, height)
    return inside, torch.nan_to_num(area(inside) / area(moved))
