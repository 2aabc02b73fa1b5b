"""The one crop function of all stages: what a teacher sees of a box."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Surround = Literal["black", "context"]
"""What lies beside a box that is not square: nothing, or what the image shows there."""


def crop_boxes(image: Tensor, boxes: Tensor, *, size: int, ratio: float, surround: Surround) -> Tensor:
    """Cut boxes out of one image as square crops of a teacher's input size.

    Each box is enlarged about its centre, rounded outwards, clamped to the image, put in the middle of a black square
    as wide as its longer side, and resampled with an antialiased bicubic filter. With `surround="context"` the box
    first grows to a square, so that a box well inside the image has no black beside it.

    Args:
        image: (3, H, W) uint8 RGB.
        boxes: (R, 4) xyxy in the image's pixels; see `ezsd.boxes`.
        size: side of the crops, pixels.
        ratio: enlargement, 1.0 for the bare box.
        surround: "black" is the method's.

    Returns:
        (R, 3, size, size) uint8 on the image's device, channels last in memory.
    """
    # The channels-last view is what makes uint8 resampling quick on CPU.
    pixels = image[None].contiguous(memory_format=torch.channels_last)
    shape = (len(boxes), 3, size, size)
    # In the layout that resampling writes: turning each crop around took a third of its time.
    out = torch.empty(shape, dtype=torch.uint8, device=image.device, memory_format=torch.channels_last)
    height, width = image.shape[1:]
    for row, window in enumerate(_windows(boxes, ratio=ratio, surround=surround, width=width, height=height)):
        out[row] = _resample(pixels, window, size)
    return out


def distinct_crops(
    boxes: Tensor, *, ratio: float, surround: Surround, width: int, height: int
) -> tuple[Tensor, Tensor]:
    """Which boxes have a crop of their own; the others' crops are the same pixels.

    A crop is decided by its whole-pixel window, and boxes clamped to the image or grown to squares share some.

    Args:
        boxes: (R, 4) as for `crop_boxes`, and so are `ratio` and `surround`.
        ratio: see there.
        surround: see there.
        width: of the image, pixels.
        height: likewise.

    Returns:
        Ascending positions (U,) of the first box of every crop, and for each box (R,) the position of its crop among
        those; int64.
    """
    windows = _windows(boxes, ratio=ratio, surround=surround, width=width, height=height)
    crops: dict[tuple[int, int, int, int], int] = {}
    number = [crops.setdefault(window, len(crops)) for window in windows]
    place = dict(zip(reversed(number), reversed(range(len(number))), strict=True))
    first = [place[crop] for crop in range(len(crops))]
    return torch.tensor(first, dtype=torch.int64), torch.tensor(number, dtype=torch.int64)


def _windows(
    boxes: Tensor, *, ratio: float, surround: Surround, width: int, height: int
) -> list[tuple[int, int, int, int]]:
    boxes = _square(boxes) if surround == "context" else boxes
    return crop_windows(boxes, ratio=ratio, width=width, height=height)


def _square(boxes: Tensor) -> Tensor:
    """The smallest squares with the same centres."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]).amax(1, keepdim=True) / 2
    return torch.cat([centre - half, centre + half], 1)


def crop_windows(boxes: Tensor, *, ratio: float, width: int, height: int) -> list[tuple[int, int, int, int]]:
    """Whole-pixel windows (x0, y0, x1, y1), half-open, never empty, of enlarged and clamped boxes."""
    centre = (boxes[:, :2].double() + boxes[:, 2:].double()) / 2
    half = (boxes[:, 2:].double() - boxes[:, :2].double()) * ratio / 2
    windows = []
    for x0, y0, x1, y1 in torch.cat([centre - half, centre + half], 1).tolist():
        left, top = min(max(math.floor(x0), 0), width - 1), min(max(math.floor(y0), 0), height - 1)
        right, bottom = min(max(math.ceil(x1), left + 1), width), min(max(math.ceil(y1), top + 1), height)
        windows.append((left, top, right, bottom))
    return windows


def _resample(pixels: Tensor, window: tuple[int, int, int, int], size: int) -> Tensor:
    left, top, right, bottom = window
    crop = pixels[:, :, top:bottom, left:right]
    wide, high = right - left, bottom - top
    if wide != high:
        side = max(wide, high)
        x, y = (side - wide) // 2, (side - high) // 2
        crop = F.pad(crop, (x, side - wide - x, y, side - high - y))
    if crop.shape[-1] == size:
        return crop[0]
    if pixels.device.type == "cpu":
        return F.interpolate(crop, (size, size), mode="bicubic", antialias=True)[0]
    # Only the CPU resamples bytes; bicubic overshoot has to be cut off by hand elsewhere.
    smooth = F.interpolate(crop.float(), (size, size), mode="bicubic", antialias=True)[0]
    return smooth.round().clamp(0, 255).to(torch.uint8)
