"""Triton: RoIAlign as matrix products, all pyramid levels in one launch, forward and backward.

Equations: docs/kernel.md, 2 and 6. Maps are channels-last, addresses are int64, sums are float32. Nothing here waits
for the device.
"""

# A kernel's parameters are pointers, run-time scalars and tl.constexpr; Python's types cannot say which, and Triton
# ships none for its decorator.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ezsd.kernels.backend import MAX_LEVELS
from ezsd.kernels.pooling import BoundPooling


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Block sizes of a kernel, and the resources that its compiled form may use."""

    cells: int
    """Map cells per matrix product; in the backward the cells of a square tile."""
    block_c: int
    """Channels per program."""
    num_warps: int
    num_stages: int
    max_registers: int
    """Registers per thread; the hardware's end is 255."""
    max_shared: int
    """Bytes of shared memory per program."""
    max_stack: int = 0
    """Bytes of stack per thread; more than 0 means that registers went to memory."""


# The limits are what ptxas gave for sm_80 and sm_90 under Triton 3.6 and 3.8, and some room; a test compiles and
# compares. The block sizes are first guesses: nothing has been timed on a GPU.
_HALF_FORWARD = Launch(cells=64, block_c=128, num_warps=4, num_stages=2, max_registers=224, max_shared=56 * 1024)
# Triton 3.6 leaves 8 bytes of stack on sm_80, 3.8 none.
_HALF_BACKWARD = Launch(
    cells=64, block_c=128, num_warps=4, num_stages=2, max_registers=192, max_shared=56 * 1024, max_stack=8
)
FORWARD = {
    torch.bfloat16: _HALF_FORWARD,
    torch.float16: _HALF_FORWARD,
    torch.float32: Launch(cells=32, block_c=64, num_warps=4, num_stages=2, max_registers=248, max_shared=24 * 1024),
}
BACKWARD = {
    torch.bfloat16: _HALF_BACKWARD,
    torch.float16: _HALF_BACKWARD,
    # Exact float32 products run without tensor cores and unroll: with 4 warps ptxas spills kilobytes on sm_80.
    torch.float32: Launch(cells=64, block_c=32, num_warps=8, num_stages=2, max_registers=128, max_shared=32 * 1024),
}
SCAN = 128
"""Boxes whose extents a backward program compares with its tile at a time."""
KEYS = 256
"""Boxes per program of the sorting keys."""
KEYS_MAX_REGISTERS = 64
"""Registers per thread of the sorting keys."""

# H and W change from batch to batch; specialising on their divisibility would compile again and again.
VARYING = [
    "images",
    "regions",
    *(f"{name}{level}" for name in ("height", "width", "first") for level in range(MAX_LEVELS)),
]


@triton.jit
def _pick(level, v0, v1, v2, v3, v4, LEVELS: tl.constexpr):
    """Choose the argument of a level; an unused one is never looked at."""
    value = v0
    if LEVELS > 1:
        value = tl.where(level == 1, v1, value)
    if LEVELS > 2:
        value = tl.where(level == 2, v2, value)
    if LEVELS > 3:
        value = tl.where(level == 3, v3, value)
    if LEVELS > 4:
        value = tl.where(level == 4, v4, value)
    return value


@triton.jit
def _level_of(x1, y1, x2, y2, threshold, LEVELS: tl.constexpr):
    """Compare the area with the thresholds, as `BoundPooling.level_of` does."""
    area = (x2 - x1) * (y2 - y1)
    level = tl.full((), 0, tl.int32)
    for _ in tl.static_range(LEVELS - 1):
        level += (area >= threshold).to(tl.int32)
        threshold *= 4.0
    return level


@triton.jit
def _axis(start, stop, scale, BINS: tl.constexpr, SAMPLES: tl.constexpr):
    """First sample of a box along one axis in cells, and the step to the next."""
    first = start * scale - 0.5
    step = (stop * scale - 0.5 - first) / (BINS * SAMPLES)
    return first + 0.5 * step, step


@triton.jit
def _span(first, step, size, BINS: tl.constexpr, SAMPLES: tl.constexpr):
    """The cells that the samples of an axis read: the first one, and how many."""
    last = first + (BINS * SAMPLES - 1) * step
    end = (size - 1).to(tl.float32)
    low = tl.minimum(tl.maximum(tl.minimum(first, last), 0.0), end)
    high = tl.minimum(tl.maximum(tl.maximum(first, last), 0.0), end)
    begin = low.to(tl.int32)
    # One cell more than rounding down gives: the upper tap of the last sample, and a spare against rounding.
    return begin, tl.minimum(high.to(tl.int32) + 1, size - 1) - begin + 1


@triton.jit
def _lay_grid(boxes, box, scale, BINS: tl.constexpr, SAMPLES: tl.constexpr):
    """First sample and step of boxes[box], down the rows and along the columns."""
    top, down = _axis(tl.load(boxes + 4 * box + 1), tl.load(boxes + 4 * box + 3), scale, BINS, SAMPLES)
    left, right = _axis(tl.load(boxes + 4 * box), tl.load(boxes + 4 * box + 2), scale, BINS, SAMPLES)
    return top, down, left, right


@triton.jit
def _touches(boxes, box, scale, height, width, y, x, TILE, BINS, SAMPLES):
    """Test whether boxes[box] reads a cell of the tile whose first cell is (y, x)."""
    top, down, left, right = _lay_grid(boxes, box, scale, BINS, SAMPLES)
    y_begin, rows = _span(top, down, height, BINS, SAMPLES)
    x_begin, columns = _span(left, right, width, BINS, SAMPLES)
    return (y_begin < y + TILE) & (y_begin + rows > y) & (x_begin < x + TILE) & (x_begin + columns > x)


@triton.jit
def _weights(cell, first, step, size, BINS: tl.constexpr, SAMPLES: tl.constexpr, PADDED: tl.constexpr):
    """Weight of each cell in each bin of one axis, (PADDED, cells); rows past BINS are zero."""
    bin_ = tl.arange(0, PADDED)
    end = size.to(tl.float32)
    weight = tl.zeros((PADDED, cell.shape[0]), tl.float32)
    for sample in tl.static_range(SAMPLES):
        at = first + (bin_ * SAMPLES + sample).to(tl.float32) * step
        inside = (at >= -1.0) & (at <= end) & (bin_ < BINS)
        at = tl.minimum(tl.maximum(at, 0.0), end - 1.0)
        tap = tl.maximum(1.0 - tl.abs(at[:, None] - cell[None, :].to(tl.float32)), 0.0)
        weight += tl.where(inside[:, None], tap, 0.0)
    return weight * (1.0 / SAMPLES)


@triton.jit
def _bin_weights(y, x, top, down, left, right, height, width, BINS, SAMPLES, PADDED):
    """The matrix K of a box, (PADDED * PADDED, cells): K[(i, j), cell] = a_i(y) c_j(x)."""
    rows = _weights(y, top, down, height, BINS, SAMPLES, PADDED)
    columns = _weights(x, left, right, width, BINS, SAMPLES, PADDED)
    return tl.reshape(rows[:, None, :] * columns[None, :, :], (PADDED * PADDED, y.shape[0]))


@triton.jit(do_not_specialize=VARYING)
def pool_forward_kernel(
    pooled, boxes, image_index, map0, map1, map2, map3, map4,
    height0, width0, height1, width1, height2, width2, height3, width3, height4, width4,
    images, scale, threshold,
    C: tl.constexpr, BINS: tl.constexpr, SAMPLES: tl.constexpr, PADDED: tl.constexpr, LEVELS: tl.constexpr,
    CELLS: tl.constexpr, BLOCK_C: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (R, C / BLOCK_C). One program owns one box and BLOCK_C channels.

    It reads the cells under the box and writes (P * P, BLOCK_C) once; sums in float32.
    """
    box = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    x1, y1 = tl.load(boxes + 4 * box), tl.load(boxes + 4 * box + 1)
    x2, y2 = tl.load(boxes + 4 * box + 2), tl.load(boxes + 4 * box + 3)
    image = tl.load(image_index + box)

    level = _level_of(x1, y1, x2, y2, threshold, LEVELS)
    height = _pick(level, height0, height1, height2, height3, height4, LEVELS)
    width = _pick(level, width0, width1, width2, width3, width4, LEVELS)
    scale = scale / (1 << level).to(tl.float32)
    top, down, left, right = _lay_grid(boxes, box, scale, BINS, SAMPLES)
    y_begin, rows = _span(top, down, height, BINS, SAMPLES)
    x_begin, columns = _span(left, right, width, BINS, SAMPLES)

    # NaN corners and an image that does not exist read nothing; their NaN reaches the loss.
    corners = x1 + y1 + x2 + y2
    exists = (image >= 0) & (image < images) & (corners == corners)
    cells = tl.where(exists, rows * columns, 0)
    total = tl.zeros((PADDED * PADDED, BLOCK_C), tl.float32) + tl.where(exists, 0.0, float("nan"))
    source = _pick(level, map0, map1, map2, map3, map4, LEVELS) + image * height * width * C
    for start in range(0, cells, CELLS):
        cell = start + tl.arange(0, CELLS)
        y, x = y_begin + cell // columns, x_begin + cell % columns
        weight = _bin_weights(y, x, top, down, left, right, height, width, BINS, SAMPLES, PADDED)
        address = (y.to(tl.int64) * width + x)[:, None] * C + channel[None, :]
        value = tl.load(source + address, mask=(cell < cells)[:, None] & (channel < C)[None, :], other=0.0)
        total = tl.dot(weight.to(value.dtype), value, total, input_precision="ieee")

    bin_ = tl.arange(0, PADDED * PADDED)
    row, column = bin_ // PADDED, bin_ % PADDED
    address = ((box * BINS + row) * BINS + column)[:, None] * C + channel[None, :]
    kept = ((row < BINS) & (column < BINS))[:, None] & (channel < C)[None, :]
    tl.store(pooled + address, total, mask=kept)


@triton.jit(do_not_specialize=VARYING)
def box_keys_kernel(
    keys, boxes, image_index, regions, images, threshold, LEVELS: tl.constexpr, BLOCK: tl.constexpr
) -> None:  # fmt: skip
    """Grid (R / BLOCK). One program writes the map (level * B + image) of BLOCK boxes; none is past the last map."""
    box = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mine = box < regions
    x1, y1 = tl.load(boxes + 4 * box, mask=mine), tl.load(boxes + 4 * box + 1, mask=mine)
    x2, y2 = tl.load(boxes + 4 * box + 2, mask=mine), tl.load(boxes + 4 * box + 3, mask=mine)
    image = tl.load(image_index + box, mask=mine)
    level = _level_of(x1, y1, x2, y2, threshold, LEVELS)
    exists = (image >= 0) & (image < images)
    tl.store(keys + box, tl.where(exists, level * images + image, LEVELS * images).to(tl.int32), mask=mine)


@triton.jit(do_not_specialize=VARYING)
def pool_backward_kernel(
    pooled_grad, boxes, order, begins, map0, map1, map2, map3, map4,
    height0, width0, height1, width1, height2, width2, height3, width3, height4, width4,
    first1, first2, first3, first4, images, scale,
    C: tl.constexpr, BINS: tl.constexpr, SAMPLES: tl.constexpr, PADDED: tl.constexpr, LEVELS: tl.constexpr,
    TILE: tl.constexpr, BLOCK_C: tl.constexpr, SCAN: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (tiles of all maps, C / BLOCK_C). One program owns TILE x TILE cells of one map and BLOCK_C channels.

    It reads the gradients of the boxes that touch the tile, in one fixed order, and writes every cell once.
    """
    tile = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    level = (tile >= first1).to(tl.int32) + (tile >= first2) + (tile >= first3) + (tile >= first4)
    height = _pick(level, height0, height1, height2, height3, height4, LEVELS)
    width = _pick(level, width0, width1, width2, width3, width4, LEVELS)
    scale = scale / (1 << level).to(tl.float32)
    tile -= _pick(level, 0, first1, first2, first3, first4, LEVELS)
    across = tl.cdiv(width, TILE)
    image = tile // (across * tl.cdiv(height, TILE))
    y_tile, x_tile = tile // across % tl.cdiv(height, TILE) * TILE, tile % across * TILE
    cell = tl.arange(0, TILE * TILE)
    y, x = y_tile + cell // TILE, x_tile + cell % TILE

    bin_ = tl.arange(0, PADDED * PADDED)
    row, column = bin_ // PADDED, bin_ % PADDED
    source = pooled_grad + (row * BINS + column)[:, None] * C + channel[None, :]
    kept = ((row < BINS) & (column < BINS))[:, None] & (channel < C)[None, :]
    total = tl.zeros((TILE * TILE, BLOCK_C), tl.float32)
    begin, end = tl.load(begins + level * images + image), tl.load(begins + level * images + image + 1)
    for start in range(begin, end, SCAN):
        place = start + tl.arange(0, SCAN)
        listed = place < end
        candidates = tl.load(order + place, mask=listed, other=0)
        hits = listed & _touches(boxes, candidates, scale, height, width, y_tile, x_tile, TILE, BINS, SAMPLES)
        done = start - 1
        for _ in range(tl.sum(hits.to(tl.int32))):
            done = tl.min(tl.where(hits & (place > done), place, end))
            box = tl.load(order + done)
            top, down, left, right = _lay_grid(boxes, box, scale, BINS, SAMPLES)
            weight = _bin_weights(y, x, top, down, left, right, height, width, BINS, SAMPLES, PADDED)
            gradient = tl.load(source + box * (BINS * BINS * C), mask=kept, other=0.0)
            total = tl.dot(tl.trans(weight).to(gradient.dtype), gradient, total, input_precision="ieee")

    target = _pick(level, map0, map1, map2, map3, map4, LEVELS) + image.to(tl.int64) * height * width * C
    address = (y.to(tl.int64) * width + x)[:, None] * C + channel[None, :]
    tl.store(target + address, total, mask=((y < height) & (x < width))[:, None] & (channel < C)[None, :])


def padded_bins(bins: int) -> int:
    """Bins per side as the kernels hold them: a power of two, at least 4 because tl.dot wants 16 rows."""
    return max(4, 1 << (bins - 1).bit_length())


def block_channels(launch: Launch, *, channels: int, rows: int) -> int:
    """Channels per program: fewer for narrow maps, and for products with many rows, to keep sums in registers."""
    wanted = min(launch.block_c, launch.block_c * 64 // rows)
    return max(16, min(wanted, 1 << (channels - 1).bit_length()))


def forward_settings(pooling: BoundPooling) -> dict[str, int]:
    """Compile-time arguments and options of the forward for these maps."""
    launch = FORWARD[pooling.maps[0].dtype]
    padded = padded_bins(pooling.bins)
    return _settings(pooling, launch) | {
        "CELLS": launch.cells,
        "BLOCK_C": block_channels(launch, channels=pooling.channels, rows=padded**2),
    }


def backward_settings(pooling: BoundPooling) -> dict[str, int]:
    """Compile-time arguments and options of the backward for these maps."""
    launch = BACKWARD[pooling.maps[0].dtype]
    return _settings(pooling, launch) | {
        "TILE": math.isqrt(launch.cells),
        "BLOCK_C": block_channels(launch, channels=pooling.channels, rows=launch.cells),
        "SCAN": SCAN,
    }


def _settings(pooling: BoundPooling, launch: Launch) -> dict[str, int]:
    return {
        "C": pooling.channels,
        "BINS": pooling.bins,
        "SAMPLES": pooling.samples,
        "PADDED": padded_bins(pooling.bins),
        "LEVELS": len(pooling.maps),
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        # Both directions must place a sample on the same cell: no product and sum may be contracted in one of them.
        "enable_fp_fusion": False,
    }


def pool_forward(pooling: BoundPooling, boxes: Tensor, image_index: Tensor) -> Tensor:
    """Pool every box on its level, all levels in one launch: (R, P, P, C) in the maps' dtype.

    A map that is not channels-last is copied once.
    """
    regions = boxes.shape[0]
    pooled = pooling.maps[0].new_empty(regions, pooling.bins, pooling.bins, pooling.channels)
    if regions == 0:
        return pooled
    maps = tuple(feature.contiguous(memory_format=torch.channels_last) for feature in pooling.maps)
    settings = forward_settings(pooling)
    pool_forward_kernel[(regions, triton.cdiv(pooling.channels, settings["BLOCK_C"]))](
        pooled,
        boxes.float().contiguous(),
        image_index.contiguous(),
        *_filled(maps),
        *_sizes(maps),
        pooling.images,
        pooling.scale,
        pooling.threshold,
        **settings,
    )
    return pooled


def pool_backward(pooling: BoundPooling, pooled_grad: Tensor, boxes: Tensor, image_index: Tensor) -> None:
    """Overwrite the channels-last maps of `pooling` with the gradient of `pool_forward`, each cell once.

    Args:
        pooling: the maps to fill; the rest as in the forward.
        pooled_grad: (R, P, P, C), contiguous, in the maps' dtype.
        boxes: as in the forward.
        image_index: as in the forward.
    """
    settings = backward_settings(pooling)
    side = settings["TILE"]
    tiles = [
        pooling.images * triton.cdiv(feature.shape[2], side) * triton.cdiv(feature.shape[3], side)
        for feature in pooling.maps
    ]
    firsts = [sum(tiles[:level]) for level in range(1, MAX_LEVELS)]
    boxes = boxes.float().contiguous()
    order, begins = boxes_by_map(pooling, boxes, image_index.contiguous())
    pool_backward_kernel[(sum(tiles), triton.cdiv(pooling.channels, settings["BLOCK_C"]))](
        pooled_grad,
        boxes,
        order,
        begins,
        *_filled(pooling.maps),
        *_sizes(pooling.maps),
        *firsts,
        pooling.images,
        pooling.scale,
        **settings,
    )


def boxes_by_map(pooling: BoundPooling, boxes: Tensor, image_index: Tensor) -> tuple[Tensor, Tensor]:
    """List the boxes of every map, in compressed rows.

    Returns:
        order (R,) int64 and begins (L * B + 1,) int64: the boxes of image b on level l are
        order[begins[l * B + b] : begins[l * B + b + 1]], in ascending order.
    """
    regions, count = boxes.shape[0], len(pooling.maps) * pooling.images
    keys = torch.empty(regions, dtype=torch.int32, device=boxes.device)
    if regions:
        box_keys_kernel[(triton.cdiv(regions, KEYS),)](
            keys,
            boxes,
            image_index,
            regions,
            pooling.images,
            pooling.threshold,
            LEVELS=len(pooling.maps),
            BLOCK=KEYS,
            enable_fp_fusion=False,
        )
    ordered, order = keys.sort(stable=True)
    return order, torch.searchsorted(ordered, torch.arange(count + 1, dtype=torch.int32, device=boxes.device))


def _filled(maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Pad the feature maps to the number of levels of the kernels; the first map fills the missing levels."""
    return maps + maps[:1] * (MAX_LEVELS - len(maps))


def _sizes(maps: tuple[Tensor, ...]) -> list[int]:
    return [size for feature in _filled(maps) for size in feature.shape[2:]]
