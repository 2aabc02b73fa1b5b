"""Windows of an image resampled to squares, all at once: antialiased, bicubic, one axis after the other.

The arithmetic is Pillow's: columns first, rounded to whole grey levels and cut to their range, then rows. A window lies
in the middle of a black square as wide as its longer side. Weights are those of the cubic with a = -1/2, stretched
where the square is larger than the crop.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ezsd.kernels.backend import current_device, device_obstacle
from ezsd.transfer import to_device

_ELEMENTS = 2**26
"""Most numbers that the eager code holds between its two passes, with the weights of the first."""


def resample_windows(
    image: Tensor,
    windows: Tensor,
    gain: Tensor,
    shift: Tensor,
    *,
    size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Crops of windows: grey levels in 0 to 255, rounded, times `gain` plus `shift`.

    On a GPU it is one kernel of Triton's, or matrix products where Triton cannot run.

    Args:
        image: (3, H, W) uint8.
        windows: half-open (x0, y0, x1, y1) within the image, none empty, (R, 4) integers on the CPU.
        gain: factor of each channel, (3,) float32, on the image's device.
        shift: likewise, what is added.
        size: side S of the crops, pixels.
        dtype: of the result.

    Returns:
        (R, 3, S, S) on the image's device.
    """
    if not len(windows):
        return torch.empty(0, 3, size, size, dtype=dtype, device=image.device)
    table = windows.int()
    if device_obstacle(image.device) is None:
        from ezsd.kernels import triton_crops

        with current_device(image):
            return triton_crops.crop(image.contiguous(), to_device(table, image.device), gain, shift, size, dtype)
    return eager(image, table, gain, shift, size, dtype)


def eager(image: Tensor, windows: Tensor, gain: Tensor, shift: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Crop windows by two matrix products, in float32; see `resample_windows`.

    Args:
        image: (3, H, W) uint8 on any device.
        windows: (R, 4) int32 on the CPU, see `resample_windows`.
        gain: see `resample_windows`.
        shift: likewise.
        size: likewise.
        dtype: likewise.
    """
    _, height, width = image.shape
    # What comes out of the first pass, and its weights.
    at_once = max(1, _ELEMENTS // (size * (3 * height + width)))
    pixels = image.float()
    out = torch.empty(len(windows), 3, size, size, dtype=dtype, device=image.device)
    for begin in range(0, len(windows), at_once):
        some = windows[begin : begin + at_once]
        table, widest = to_device(some, image.device), int((some[:, 2:] - some[:, :2]).max())
        across = _filters(table, axis=0, extent=width, size=size, widest=widest)
        down = _filters(table, axis=1, extent=height, size=size, widest=widest)
        rows = _levels(torch.einsum("chw,rxw->rhcx", pixels, across))
        levels = _levels(torch.einsum("ryh,rhcx->rcyx", down, rows))
        out[begin : begin + at_once] = levels * gain[:, None, None] + shift[:, None, None]
    return out


def _levels(values: Tensor) -> Tensor:
    return values.add_(0.5).floor_().clamp_(0, 255)


def _filters(windows: Tensor, *, axis: int, extent: int, size: int, widest: int) -> Tensor:
    """Weights (R, S, extent) of the pixels along one axis of the image; black pixels of the square have none."""
    low, high = windows[:, axis], windows[:, axis + 2]
    side = (windows[:, 2:] - windows[:, :2]).amax(1)
    origin = low - torch.div(side - (high - low), 2, rounding_mode="floor")
    scale = (side.float() / size)[:, None]
    wide = scale.clamp(min=1)
    # In the square's own pixels, where numbers are small.
    centre = (torch.arange(size, device=windows.device) + 0.5) * scale
    inside = torch.arange(extent, device=windows.device)
    weight = _cubic((inside - origin[:, None] + 0.5)[:, None] / wide[:, None] - (centre / wide)[:, :, None])
    weight *= ((inside >= low[:, None]) & (inside < high[:, None]))[:, None]
    taps = torch.arange(2 * math.ceil(2 * max(1, widest / size)) + 2, device=windows.device)
    pixel = (centre - 2 * wide).floor()[:, :, None] + taps
    every = _cubic((pixel + 0.5) / wide[:, None] - (centre / wide)[:, :, None])
    total = (every * ((pixel >= 0) & (pixel < side[:, None, None]))).sum(2)
    return weight / total[:, :, None]


def _cubic(distance: Tensor) -> Tensor:
    """Keys' cubic with a = -1/2; zero from a distance of 2 on."""
    x = distance.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
