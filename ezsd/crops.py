"""Square crops of boxes for the teacher; all stages use these functions.

On a CPU, torch resamples bytes, windows of one size together. On a GPU all windows of an image are resampled at once,
see `ezsd.kernels.crops`; the two differ by rounding.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ezsd.choices import Surround
from ezsd.kernels.crops import resample_windows

_AT_ONCE = 16
"""Most windows of one size that are resampled together; for large windows, the memory of so many crops."""


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
        surround: padding of a box that is not square, "black" (as in the paper) or "context".

    Returns:
        (R, 3, size, size) uint8 on the image's device; on a CPU channels last in memory.
    """
    if image.device.type != "cpu":
        return normalised_crops(
            image,
            boxes,
            size=size,
            ratio=ratio,
            surround=surround,
            gain=torch.ones(3, device=image.device),
            shift=torch.zeros(3, device=image.device),
            dtype=torch.uint8,
        )
    shape = (len(boxes), 3, size, size)
    # Channels last is what makes uint8 resampling quick on CPU; turning each crop around took a third of its time.
    pixels = image[None].contiguous(memory_format=torch.channels_last)[0]
    out = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
    table = _windows(boxes.cpu(), ratio=ratio, surround=surround, width=image.shape[2], height=image.shape[1])
    windows = [(left, top, right, bottom) for left, top, right, bottom in table.tolist()]
    for rows in _alike(windows, size=size):
        squares = _squares(pixels, [windows[row] for row in rows])
        for row, crop in zip(rows, _resample(squares, size), strict=True):
            out[row] = crop
    return out


def normalised_crops(
    image: Tensor,
    boxes: Tensor,
    *,
    size: int,
    ratio: float,
    surround: Surround,
    gain: Tensor,
    shift: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Crops of an image as `crop_boxes` makes them on a GPU, times `gain` plus `shift`, with no bytes in between.

    Args:
        image: see `crop_boxes`, on any device.
        boxes: likewise, on any device.
        size: likewise.
        ratio: likewise.
        surround: likewise.
        gain: factor of each channel, (3,) float32, on the image's device.
        shift: likewise, what is added.
        dtype: of the crops.

    Returns:
        (R, 3, size, size) on the image's device.
    """
    table = _windows(boxes.cpu(), ratio=ratio, surround=surround, width=image.shape[2], height=image.shape[1])
    return resample_windows(image, table, gain, shift, size=size, dtype=dtype)


def with_least_side(boxes: Tensor, least: float) -> Tensor:
    """Widen the sides of boxes (R, 4) that are shorter than `least` pixels to it, about their centres."""
    missing = (least - (boxes[:, 2:] - boxes[:, :2])).clamp(min=0) / 2
    return torch.cat([boxes[:, :2] - missing, boxes[:, 2:] + missing], 1)


def distinct_crops(
    boxes: Tensor, *, ratio: float, surround: Surround, width: int, height: int
) -> tuple[Tensor, Tensor]:
    """Find boxes whose crops are different; all other boxes have the same crop pixels as one of these.

    The whole-pixel window determines a crop, and boxes clamped to the image or grown to squares can share a window.

    Args:
        boxes: xyxy, (R, 4), in the image's pixels.
        ratio: enlargement, as in `crop_boxes`.
        surround: padding, as in `crop_boxes`.
        width: width of the image, pixels.
        height: height of the image, pixels.

    Returns:
        Ascending positions (U,) of the first box of every crop, and for each box (R,) the position of its crop among
        those; int64.
    """
    table = _windows(boxes, ratio=ratio, surround=surround, width=width, height=height).numpy()
    _, place, number = np.unique(table, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(place)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return torch.from_numpy(place[order]), torch.from_numpy(rank[number.reshape(-1)])


def _windows(boxes: Tensor, *, ratio: float, surround: Surround, width: int, height: int) -> Tensor:
    """Whole-pixel windows (x0, y0, x1, y1), half-open, never empty, of enlarged and clamped boxes: (R, 4) int64."""
    boxes = _square(boxes) if surround == "context" else boxes
    centre = (boxes[:, :2].double() + boxes[:, 2:].double()) / 2
    half = (boxes[:, 2:].double() - boxes[:, :2].double()) * ratio / 2
    limit = torch.tensor([width, height])
    low = torch.minimum((centre - half).floor().clamp(min=0), limit - 1)
    high = torch.minimum(torch.maximum((centre + half).ceil(), low + 1), limit)
    return torch.cat([low, high], 1).long()


def _square(boxes: Tensor) -> Tensor:
    """The smallest squares with the same centres."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]).amax(1, keepdim=True) / 2
    return torch.cat([centre - half, centre + half], 1)


def _alike(windows: list[tuple[int, int, int, int]], *, size: int) -> list[list[int]]:
    """Group the windows with equal longer sides; each group is resampled at once."""
    by_side: dict[int, list[int]] = {}
    for row, (left, top, right, bottom) in enumerate(windows):
        by_side.setdefault(max(right - left, bottom - top), []).append(row)
    groups = []
    for side, rows in by_side.items():
        count = max(1, _AT_ONCE * size**2 // max(side, size) ** 2)
        groups += [rows[start : start + count] for start in range(0, len(rows), count)]
    return groups


def _squares(image: Tensor, windows: list[tuple[int, int, int, int]]) -> Tensor:
    """Centre windows with equal longer sides in black squares, (N, 3, side, side), channels last in memory."""
    left, top, right, bottom = windows[0]
    side = max(right - left, bottom - top)
    shape = (len(windows), side, side, 3)
    squares = torch.zeros(shape, dtype=torch.uint8).permute(0, 3, 1, 2)
    for square, (left, top, right, bottom) in zip(squares, windows, strict=True):
        wide, high = right - left, bottom - top
        x, y = (side - wide) // 2, (side - high) // 2
        square[:, y : y + high, x : x + wide] = image[:, top:bottom, left:right]
    return squares


def _resample(squares: Tensor, size: int) -> Tensor:
    if squares.shape[-1] == size:
        return squares
    return F.interpolate(squares, (size, size), mode="bicubic", antialias=True)
