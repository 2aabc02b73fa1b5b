"""Triton: windows of an image resampled to squares, normalised and rounded to a type, in one pass over memory.

The eager twin and what both compute: `ezsd.kernels.crops`.
"""

# A kernel's parameters are pointers, run-time scalars and tl.constexpr; Python's types cannot say which, and Triton
# ships none for its decorator.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 32
"""Side of the outputs of a program, pixels."""
CHUNK = 32
"""Rows and columns of the image that are multiplied at once."""
WARPS = 4
MAX_REGISTERS = 255
"""Registers per thread that a test allows: two programs on a multiprocessor."""
MAX_SHARED = 16 * 1024
"""Bytes of shared memory that a test allows."""


@triton.jit
def _weights(place, centre, inverse, side):
    """Weight of each place for each centre, in pixels of the square."""
    x = tl.abs((place + 0.5 - centre) * inverse)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    weight = tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    return tl.where((place >= 0) & (place < side), weight, 0.0)


@triton.jit
def _levels(value):
    return tl.minimum(tl.maximum(tl.floor(value + 0.5), 0.0), 255.0)


@triton.jit
def _halves(weight):
    """Two 16-bit numbers whose sum is a weight: grey levels are exact in 16 bits, and weights would not be."""
    high = weight.to(tl.float16)
    return high, (weight - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _across(pixels, inside, high, low, sums):
    """Sums of a chunk's pixels over its columns."""
    levels = tl.load(pixels, mask=inside, other=0).to(tl.float16)
    return tl.dot(levels, high, tl.dot(levels, low, sums))


@triton.jit
def _down(high, low, sums, share, out):
    """Sums of a chunk's rows, which are rounded to grey levels first."""
    levels = _levels(sums * share).to(tl.float16)
    return tl.dot(high, levels, tl.dot(low, levels, out))


@triton.jit
def crops_kernel(
    out, image, windows, gain, shift, height, width, size, tiles, TILE: tl.constexpr, CHUNK: tl.constexpr
) -> None:
    """Grid (tiles * tiles, R). One program owns a tile of a crop, all channels; reads the pixels below it."""
    row = tl.program_id(1).to(tl.int64)
    tile_y, tile_x = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    left, top = tl.load(windows + row * 4), tl.load(windows + row * 4 + 1)
    right, bottom = tl.load(windows + row * 4 + 2), tl.load(windows + row * 4 + 3)
    side = tl.maximum(right - left, bottom - top)
    # Image pixel of the square's first one.
    origin_x, origin_y = left - (side - (right - left)) // 2, top - (side - (bottom - top)) // 2
    scale = side.to(tl.float32) / size
    wide = tl.maximum(scale, 1.0)
    inverse = 1.0 / wide
    out_y, out_x = tile_y * TILE + tl.arange(0, TILE), tile_x * TILE + tl.arange(0, TILE)
    centre_y, centre_x = (out_y.to(tl.float32) + 0.5) * scale, (out_x.to(tl.float32) + 0.5) * scale
    reach = 2.0 * wide + 1.0
    first_y = tl.maximum((tile_y * TILE * scale - reach).to(tl.int32), 0)
    first_x = tl.maximum((tile_x * TILE * scale - reach).to(tl.int32), 0)
    last_y = tl.minimum(((tile_y + 1) * TILE * scale + reach).to(tl.int32) + 1, side)
    last_x = tl.minimum(((tile_x + 1) * TILE * scale + reach).to(tl.int32) + 1, side)
    # Triton makes a constant of 1, which has no method.
    plane = tl.cast(height, tl.int64) * width
    red = tl.zeros((TILE, TILE), tl.float32)
    green = tl.zeros((TILE, TILE), tl.float32)
    blue = tl.zeros((TILE, TILE), tl.float32)
    total_y = tl.zeros((TILE,), tl.float32)
    for begin_y in range(first_y, last_y, CHUNK):
        y = begin_y + tl.arange(0, CHUNK)
        down = _weights(y[None, :], centre_y[:, None], inverse, side)
        total_y += tl.sum(down, 1)
        down_high, down_low = _halves(down)
        red_row = tl.zeros((CHUNK, TILE), tl.float32)
        green_row = tl.zeros((CHUNK, TILE), tl.float32)
        blue_row = tl.zeros((CHUNK, TILE), tl.float32)
        total_x = tl.zeros((TILE,), tl.float32)
        image_y = origin_y + y
        in_rows = (image_y >= top) & (image_y < bottom)
        for begin_x in range(first_x, last_x, CHUNK):
            x = begin_x + tl.arange(0, CHUNK)
            across = _weights(x[:, None], centre_x[None, :], inverse, side)
            total_x += tl.sum(across, 0)
            high, low = _halves(across)
            image_x = origin_x + x
            inside = in_rows[:, None] & ((image_x >= left) & (image_x < right))[None, :]
            pixels = image + image_y.to(tl.int64)[:, None] * width + image_x[None, :]
            red_row = _across(pixels, inside, high, low, red_row)
            green_row = _across(pixels + plane, inside, high, low, green_row)
            blue_row = _across(pixels + 2 * plane, inside, high, low, blue_row)
        # A tile's last outputs may lie outside the crop, and have no weights.
        share_x = 1.0 / tl.where(total_x == 0, 1.0, total_x)[None, :]
        red = _down(down_high, down_low, red_row, share_x, red)
        green = _down(down_high, down_low, green_row, share_x, green)
        blue = _down(down_high, down_low, blue_row, share_x, blue)
    share_y = 1.0 / tl.where(total_y == 0, 1.0, total_y)[:, None]
    place = out + row * 3 * size * size + out_y[:, None] * size + out_x[None, :]
    kept = (out_y < size)[:, None] & (out_x < size)[None, :]
    kind = out.dtype.element_ty
    tl.store(place, (_levels(red * share_y) * tl.load(gain) + tl.load(shift)).to(kind), mask=kept)
    place += size * size
    tl.store(place, (_levels(green * share_y) * tl.load(gain + 1) + tl.load(shift + 1)).to(kind), mask=kept)
    place += size * size
    tl.store(place, (_levels(blue * share_y) * tl.load(gain + 2) + tl.load(shift + 2)).to(kind), mask=kept)


def crop(image: Tensor, windows: Tensor, gain: Tensor, shift: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Crops (R, 3, S, S) of windows (R, 4) int32 of a contiguous image (3, H, W) uint8; all on one GPU."""
    _, height, width = image.shape
    out = torch.empty(len(windows), 3, size, size, dtype=dtype, device=image.device)
    tiles = triton.cdiv(size, TILE)
    # A grid's second axis is at most 65,535 long.
    for begin in range(0, len(windows), 32_768):
        some = windows[begin : begin + 32_768]
        crops_kernel[(tiles * tiles, len(some))](
            out[begin:], image, some, gain, shift, height, width, size, tiles, TILE=TILE, CHUNK=CHUNK, num_warps=WARPS
        )
    return out
