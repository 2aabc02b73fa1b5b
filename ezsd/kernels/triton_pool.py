"""Triton: RoIAlign as matrix products, all pyramid levels in one launch, forward and backward.

Equations: docs/kernel.md, 2 and 6. Maps are channels-last, addresses are int64, sums are float32. Nothing here waits
for the device.
"""

# A kernel's parameters are pointers, run-time scalars and tl.constexpr; Python's types cannot say which, and Triton
# ships none for its decorator.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

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
    """Map cells per matrix product, in the backward those of a tile."""
    block_c: int
    """Channels per program."""
    num_warps: int
    num_stages: int
    max_registers: int
    """Registers per thread, told to the compiler: 128 let two programs of 8 warps run beside each other."""
    max_shared: int
    """Bytes of shared memory per program."""
    max_loop: int
    """Instructions of a warp per product."""


# The limits are what ptxas gave under Triton 3.8, at P = 7, for the worst of sm_80, 90, 100 and 120, and some room; a
# test compiles and compares. The block sizes are guesses by these counts: nothing has been timed on a GPU.
_HALF_FORWARD = Launch(
    cells=64, block_c=256, num_warps=8, num_stages=2, max_registers=128, max_shared=80 * 1024, max_loop=310
)
# Three stages: a box's number is read one product before its gradient is.
_HALF_BACKWARD = Launch(
    cells=64, block_c=256, num_warps=8, num_stages=3, max_registers=128, max_shared=81 * 1024, max_loop=300
)
FORWARD = {
    torch.bfloat16: _HALF_FORWARD,
    torch.float16: _HALF_FORWARD,
    torch.float32: Launch(
        cells=32, block_c=64, num_warps=4, num_stages=2, max_registers=248, max_shared=24 * 1024, max_loop=1340
    ),
}
BACKWARD = {
    torch.bfloat16: _HALF_BACKWARD,
    torch.float16: _HALF_BACKWARD,
    # Exact float32 products run without tensor cores and unroll: with 4 warps ptxas spilled kilobytes on sm_80.
    torch.float32: Launch(
        cells=64, block_c=32, num_warps=8, num_stages=2, max_registers=128, max_shared=32 * 1024, max_loop=910
    ),
}
MAX_STACK = 16
"""Bytes of stack per thread: on sm_80 the forward in 16 bits does not quite fit 128 registers."""
TILE = 8
"""Cells along a side of a tile, and the columns of cells that the forward reads at a time."""
MAP_BOXES = 1024
"""Boxes that are compared with a map at a time."""
LIST_BOXES = 32
"""Boxes that are compared with tiles at a time."""
LIST_TILES = 32
"""Tiles of a row that they are compared with."""
LIST_MAX_REGISTERS = 96
"""Registers per thread of the kernels that list boxes."""

# H and W change from batch to batch; specialising on their divisibility would compile again and again.
VARYING = [
    "images",
    "regions",
    "tiles",
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
def _sample(first, step, size, bin_, sample, BINS: tl.constexpr, SAMPLES: tl.constexpr):
    """Place of one sample of each bin, in cells; one that counts as zero is put where no cell reaches."""
    end = size.to(tl.float32)
    at = first + (bin_ * SAMPLES + sample).to(tl.float32) * step
    inside = (at >= -1.0) & (at <= end) & (bin_ < BINS)
    return tl.where(inside, tl.minimum(tl.maximum(at, 0.0), end - 1.0), -2.0)


@triton.jit
def _tap(at, cell):
    """Weight of a cell in the interpolation at a place."""
    return tl.maximum(1.0 - tl.abs(at - cell), 0.0)


@triton.jit
def _bin_weights(rows, columns, dtype):
    """The matrix K of a box times S^2, (bins, cells): the outer product of its axes' weights (bins, cells) each."""
    weight = (rows[:, None, :, None] * columns[None, :, None, :]).to(dtype)
    return tl.reshape(weight, (rows.shape[0] * columns.shape[0], rows.shape[1] * columns.shape[1]))


@triton.jit(do_not_specialize=VARYING)
def pool_forward_kernel(
    pooled, boxes, image_index, map0, map1, map2, map3, map4,
    height0, width0, height1, width1, height2, width2, height3, width3, height4, width4,
    images, scale, threshold,
    C: tl.constexpr, BINS: tl.constexpr, SAMPLES: tl.constexpr, PADDED: tl.constexpr, LEVELS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (R, C / BLOCK_C). One program owns one box and BLOCK_C channels.

    It reads the cells under the box, ROWS x COLUMNS at a time, and writes (P * P, BLOCK_C) once; sums in float32.
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
    top, down = _axis(y1, y2, scale, BINS, SAMPLES)
    left, right = _axis(x1, x2, scale, BINS, SAMPLES)
    y_begin, rows = _span(top, down, height, BINS, SAMPLES)
    x_begin, columns = _span(left, right, width, BINS, SAMPLES)

    # NaN corners and an image that does not exist read nothing; their NaN reaches the loss.
    corners = x1 + y1 + x2 + y2
    exists = (image >= 0) & (image < images) & (corners == corners)
    tiles = tl.where(exists, tl.cdiv(rows, ROWS) * tl.cdiv(columns, COLUMNS), 0)
    total = tl.zeros((PADDED * PADDED, BLOCK_C), tl.float32) + tl.where(exists, 0.0, float("nan"))
    source = _pick(level, map0, map1, map2, map3, map4, LEVELS) + image * height * width * C
    bin_, cell = tl.arange(0, PADDED)[:, None], tl.arange(0, ROWS * COLUMNS)
    y, x = y_begin, x_begin
    for _ in range(tiles):
        y_cell = (y + tl.arange(0, ROWS)).to(tl.float32)[None, :]
        x_cell = (x + tl.arange(0, COLUMNS)).to(tl.float32)[None, :]
        horizontal = _tap(_sample(left, right, width, bin_, 0, BINS, SAMPLES), x_cell)
        vertical = _tap(_sample(top, down, height, bin_, 0, BINS, SAMPLES), y_cell)
        for sample in tl.static_range(1, SAMPLES):
            horizontal += _tap(_sample(left, right, width, bin_, sample, BINS, SAMPLES), x_cell)
            vertical += _tap(_sample(top, down, height, bin_, sample, BINS, SAMPLES), y_cell)
        weight = _bin_weights(vertical, horizontal, pooled.dtype.element_ty)
        # Cells past the last one weigh nothing, and that one is read in their place.
        row = tl.minimum(y + cell // COLUMNS, y_begin + rows - 1)
        column = tl.minimum(x + cell % COLUMNS, x_begin + columns - 1)
        address = source + (row * width + column).to(tl.int64)[:, None] * C + channel[None, :]
        value = tl.load(address, mask=(channel < C)[None, :], other=0.0) if C % BLOCK_C else tl.load(address)
        total = tl.dot(weight, value, total, input_precision="ieee")
        x += COLUMNS
        y = tl.where(x < x_begin + columns, y, y + ROWS)
        x = tl.where(x < x_begin + columns, x, x_begin)

    bin_ = tl.arange(0, PADDED * PADDED)
    row, column = bin_ // PADDED, bin_ % PADDED
    address = ((box * BINS + row) * BINS + column)[:, None] * C + channel[None, :]
    kept = ((row < BINS) & (column < BINS))[:, None] & (channel < C)[None, :]
    tl.store(pooled + address, total * (1.0 / (SAMPLES * SAMPLES)), mask=kept)


@triton.jit
def _map_of(box, boxes, image_index, regions, images, threshold, LEVELS: tl.constexpr):
    """Number of each box's map, level * B + image; past the last map for an image that does not exist."""
    mine = box < regions
    x1, y1 = tl.load(boxes + 4 * box, mask=mine), tl.load(boxes + 4 * box + 1, mask=mine)
    x2, y2 = tl.load(boxes + 4 * box + 2, mask=mine), tl.load(boxes + 4 * box + 3, mask=mine)
    image = tl.load(image_index + box, mask=mine, other=-1)
    level = _level_of(x1, y1, x2, y2, threshold, LEVELS)
    return tl.where((image >= 0) & (image < images), level * images + image, LEVELS * images)


@triton.jit(do_not_specialize=VARYING)
def map_boxes_kernel(
    order, begins, boxes, image_index, regions, images, threshold, LEVELS: tl.constexpr, BLOCK: tl.constexpr
) -> None:  # fmt: skip
    """Grid (maps). One program lists the boxes of one map, in ascending order, BLOCK boxes of all at a time.

    It writes order[begins[map] : begins[map + 1]], and these two numbers.
    """
    map_ = tl.program_id(0)
    begin = 0
    for start in range(0, regions, BLOCK):
        box = start + tl.arange(0, BLOCK)
        begin += tl.sum((_map_of(box, boxes, image_index, regions, images, threshold, LEVELS) < map_).to(tl.int32))
    end = begin
    for start in range(0, regions, BLOCK):
        box = start + tl.arange(0, BLOCK)
        mine = (_map_of(box, boxes, image_index, regions, images, threshold, LEVELS) == map_).to(tl.int32)
        tl.store(order + end + tl.cumsum(mine) - 1, box, mask=mine != 0)
        end += tl.sum(mine)
    # The end of one map is the begin of the next, which writes the same number.
    tl.store(begins + map_, begin)
    tl.store(begins + map_ + 1, end)


@triton.jit
def _tile_span(first, step, size, BINS: tl.constexpr, SAMPLES: tl.constexpr, TILE: tl.constexpr):
    """The tiles that the samples of an axis read: the first and the last one."""
    begin, count = _span(first, step, size, BINS, SAMPLES)
    return begin // TILE, (begin + count - 1) // TILE


@triton.jit(do_not_specialize=VARYING)
def tile_boxes_kernel(
    listed, counts, samples, boxes, order, begins,
    height0, width0, height1, width1, height2, width2, height3, width3, height4, width4,
    images, tiles, scale,
    BINS: tl.constexpr, SAMPLES: tl.constexpr, PADDED: tl.constexpr, LEVELS: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (rows of tiles, maps, columns of tiles / COLUMNS). One program lists the boxes that touch COLUMNS tiles.

    Tile t of a map with n boxes has room for all of them, at begins[map] * tiles + t * n of `listed`; it takes
    counts[map * tiles + t] of it, in ascending order. The map's first program also writes where the boxes' samples are.
    """
    row, map_ = tl.program_id(0), tl.program_id(1)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    level = map_ // images
    height = _pick(level, height0, height1, height2, height3, height4, LEVELS)
    width = _pick(level, width0, width1, width2, width3, width4, LEVELS)
    scale = scale / (1 << level).to(tl.float32)
    begin, end = tl.load(begins + map_), tl.load(begins + map_ + 1)
    exists = (row * TILE < height) & (column * TILE < width)
    tile = row * tl.cdiv(width, TILE) + column
    room = listed + begin.to(tl.int64) * tiles + tile.to(tl.int64) * (end - begin)
    bin_ = tl.arange(0, PADDED)[None, :]
    count = tl.zeros((COLUMNS,), tl.int32)
    for start in range(begin, tl.where(row * TILE < height, end, begin), BLOCK):
        place = start + tl.arange(0, BLOCK)
        valid = place < end
        box = tl.load(order + place, mask=valid, other=0)
        corner = boxes + 4 * box.to(tl.int64)
        top, down = _axis(tl.load(corner + 1), tl.load(corner + 3), scale, BINS, SAMPLES)
        left, right = _axis(tl.load(corner), tl.load(corner + 2), scale, BINS, SAMPLES)
        if (row == 0) & (tl.program_id(2) == 0):
            target = samples + (2 * SAMPLES * PADDED) * box.to(tl.int64)[:, None] + bin_
            for sample in tl.static_range(SAMPLES):
                at = _sample(top[:, None], down[:, None], height, bin_, sample, BINS, SAMPLES)
                tl.store(target + sample * PADDED, at, mask=valid[:, None])
                at = _sample(left[:, None], right[:, None], width, bin_, sample, BINS, SAMPLES)
                tl.store(target + (SAMPLES + sample) * PADDED, at, mask=valid[:, None])
        y_first, y_last = _tile_span(top, down, height, BINS, SAMPLES, TILE)
        x_first, x_last = _tile_span(left, right, width, BINS, SAMPLES, TILE)
        on_row = valid & (y_first <= row) & (row <= y_last)
        hits = on_row[:, None] & (x_first[:, None] <= column[None, :]) & (column[None, :] <= x_last[:, None])
        rank = count[None, :] + tl.cumsum(hits.to(tl.int32), 0) - 1
        tl.store(room[None, :] + rank, tl.broadcast_to(box[:, None], (BLOCK, COLUMNS)), mask=hits & exists[None, :])
        count += tl.sum(hits.to(tl.int32), 0)
    tl.store(counts + map_ * tiles + tile, count, mask=exists)


@triton.jit(do_not_specialize=VARYING)
def pool_backward_kernel(
    pooled_grad, samples, listed, counts, begins, map0, map1, map2, map3, map4,
    height0, width0, height1, width1, height2, width2, height3, width3, height4, width4,
    first0, first1, first2, first3, images, tiles,
    C: tl.constexpr, BINS: tl.constexpr, SAMPLES: tl.constexpr, PADDED: tl.constexpr, LEVELS: tl.constexpr,
    TILE: tl.constexpr, BLOCK_C: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (tiles of all maps, C / BLOCK_C). One program owns TILE x TILE cells of one map and BLOCK_C channels.

    It reads the gradients of the boxes that touch the tile, in one fixed order, and writes every cell once.
    """
    tile = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    # Coarse levels come first: most boxes touch their tiles, and what starts last should be short.
    level = (tile < first0).to(tl.int32) + (tile < first1) + (tile < first2) + (tile < first3)
    tile -= _pick(level, first0, first1, first2, first3, 0, LEVELS)
    height = _pick(level, height0, height1, height2, height3, height4, LEVELS)
    width = _pick(level, width0, width1, width2, width3, width4, LEVELS)
    across = tl.cdiv(width, TILE)
    image = tile // (across * tl.cdiv(height, TILE))
    tile -= image * (across * tl.cdiv(height, TILE))
    y_tile, x_tile = tile // across * TILE, tile % across * TILE
    y_side, x_side = (y_tile + tl.arange(0, TILE)).to(tl.float32), (x_tile + tl.arange(0, TILE)).to(tl.float32)

    bin_ = tl.arange(0, PADDED * PADDED)
    row, column = bin_ // PADDED, bin_ % PADDED
    source = pooled_grad + (row * BINS + column)[:, None] * C + channel[None, :]
    kept = ((row < BINS) & (column < BINS))[:, None]
    if C % BLOCK_C:
        kept = kept & (channel < C)[None, :]
    bin_ = tl.arange(0, PADDED)
    total = tl.zeros((TILE * TILE, BLOCK_C), tl.float32)
    map_ = level * images + image
    begin, end = tl.load(begins + map_), tl.load(begins + map_ + 1)
    mine = listed + begin.to(tl.int64) * tiles + tile.to(tl.int64) * (end - begin)
    for place in range(tl.load(counts + map_ * tiles + tile)):
        box = tl.load(mine + place).to(tl.int64)
        down = samples + (2 * SAMPLES * PADDED) * box + bin_
        right = down + SAMPLES * PADDED
        vertical = _tap(tl.load(down)[:, None], y_side[None, :])
        horizontal = _tap(tl.load(right)[:, None], x_side[None, :])
        for sample in tl.static_range(1, SAMPLES):
            vertical += _tap(tl.load(down + sample * PADDED)[:, None], y_side[None, :])
            horizontal += _tap(tl.load(right + sample * PADDED)[:, None], x_side[None, :])
        gradient = tl.load(source + box * (BINS * BINS * C), mask=kept, other=0.0)
        weight = _bin_weights(vertical, horizontal, gradient.dtype)
        total = tl.dot(tl.trans(weight), gradient, total, input_precision="ieee")

    cell = tl.arange(0, TILE * TILE)
    y, x = y_tile + cell // TILE, x_tile + cell % TILE
    target = _pick(level, map0, map1, map2, map3, map4, LEVELS) + image.to(tl.int64) * height * width * C
    address = (y.to(tl.int64) * width + x)[:, None] * C + channel[None, :]
    kept = ((y < height) & (x < width))[:, None] & (channel < C)[None, :]
    tl.store(target + address, total * (1.0 / (SAMPLES * SAMPLES)), mask=kept)


def padded_bins(bins: int) -> int:
    """Bins per side as the kernels hold them: a power of two, at least 4 because tl.dot wants 16 rows."""
    return max(4, 1 << (bins - 1).bit_length())


def _ceil_div(value: int, by: int) -> int:
    # Triton's own takes longer than all other arithmetic of a call together.
    return -(-value // by)


def forward_settings(pooling: BoundPooling) -> dict[str, int]:
    """Compile-time arguments and options of the forward for these maps."""
    launch = FORWARD[pooling.maps[0].dtype]
    blocks = _blocks(launch, channels=pooling.channels, rows=padded_bins(pooling.bins) ** 2)
    return _settings(pooling) | blocks | {"ROWS": launch.cells // TILE, "COLUMNS": TILE}


def backward_settings(pooling: BoundPooling) -> dict[str, int]:
    """Compile-time arguments and options of the backward for these maps."""
    launch = BACKWARD[pooling.maps[0].dtype]
    blocks = _blocks(launch, channels=pooling.channels, rows=max(launch.cells, padded_bins(pooling.bins) ** 2))
    return _settings(pooling) | blocks | {"TILE": TILE}


def listing_settings(pooling: BoundPooling) -> dict[str, int]:
    """Compile-time arguments and options of the tiles' lists of boxes for these maps."""
    return _settings(pooling) | {"TILE": TILE, "BLOCK": LIST_BOXES, "COLUMNS": LIST_TILES}


def _blocks(launch: Launch, *, channels: int, rows: int) -> dict[str, int]:
    """Channels per program, fewer for products with many rows, to keep sums in registers; fewer warps for few sums."""
    block_c = max(16, min(launch.block_c, launch.block_c * 64 // rows, 1 << (channels - 1).bit_length()))
    warps = max(4, launch.num_warps * rows * block_c // (64 * launch.block_c))
    options = {"num_warps": warps, "num_stages": launch.num_stages}
    # More than 8 bins per side are too many addresses and weights for these registers.
    if rows <= 64:
        options["maxnreg"] = launch.max_registers
    return {"C": channels, "BLOCK_C": block_c} | options


def _settings(pooling: BoundPooling) -> dict[str, int]:
    return {
        "BINS": pooling.bins,
        "SAMPLES": pooling.samples,
        "PADDED": padded_bins(pooling.bins),
        "LEVELS": len(pooling.maps),
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
    pool_forward_kernel[(regions, _ceil_div(pooling.channels, settings["BLOCK_C"]))](
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
    tiles = [down * across for down, across in _tiles(pooling)]
    pool_backward_kernel[(pooling.images * sum(tiles), _ceil_div(pooling.channels, settings["BLOCK_C"]))](
        pooled_grad,
        *boxes_by_tile(pooling, boxes.float().contiguous(), image_index.contiguous()),
        *_filled(pooling.maps),
        *_sizes(pooling.maps),
        # Coarse levels come first.
        *(pooling.images * sum(tiles[level:]) for level in range(1, MAX_LEVELS)),
        pooling.images,
        max(tiles),
        **settings,
    )


def boxes_by_tile(pooling: BoundPooling, boxes: Tensor, image_index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """List the boxes that touch each tile of each map; see `tile_boxes_kernel`.

    Returns:
        samples (R, 2, S, padded P) float32: where each box's samples lie down the rows, then along the columns; the
        lists, int32, with room for every box in every tile of its map; how many boxes they hold, (maps, tiles) int32;
        and, (maps + 1,) int32, how many boxes the maps before each one have.
    """
    regions, maps, tiles = boxes.shape[0], len(pooling.maps) * pooling.images, _tiles(pooling)
    most = max(down * across for down, across in tiles)
    settings = listing_settings(pooling)
    order, begins = boxes.new_empty(regions, dtype=torch.int32), boxes.new_empty(maps + 1, dtype=torch.int32)
    map_boxes_kernel[(maps,)](
        order,
        begins,
        boxes,
        image_index,
        regions,
        pooling.images,
        pooling.threshold,
        LEVELS=len(pooling.maps),
        BLOCK=MAP_BOXES,
        enable_fp_fusion=False,
    )
    samples = boxes.new_empty(regions, 2, pooling.samples, settings["PADDED"])
    listed = boxes.new_empty(regions * most, dtype=torch.int32)
    counts = boxes.new_empty(maps, most, dtype=torch.int32)
    rows, columns = (max(sides) for sides in zip(*tiles, strict=True))
    tile_boxes_kernel[(rows, maps, _ceil_div(columns, LIST_TILES))](
        listed,
        counts,
        samples,
        boxes,
        order,
        begins,
        *_sizes(pooling.maps),
        pooling.images,
        most,
        pooling.scale,
        **settings,
    )
    return samples, listed, counts, begins


def _tiles(pooling: BoundPooling) -> list[tuple[int, int]]:
    """Rows and columns of tiles on every level."""
    shapes = [feature.shape for feature in pooling.maps]
    return [(_ceil_div(shape[2], TILE), _ceil_div(shape[3], TILE)) for shape in shapes]


def _filled(maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Pad the feature maps to the number of levels of the kernels; the first map fills the missing levels."""
    return maps + maps[:1] * (MAX_LEVELS - len(maps))


def _sizes(maps: tuple[Tensor, ...]) -> list[int]:
    return [size for feature in _filled(maps) for size in feature.shape[2:]]
