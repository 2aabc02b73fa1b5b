"""The Triton backend as torch operators: what autograd and torch.compile see.

Each kernel pair is one opaque operator with a shape function and a registered backward. The kernels themselves are
imported when first run, so this module loads without Triton.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ezsd.kernels.geometry import Pooling
from ezsd.kernels.reference import Metric

# torch builds the context of a registered operator at run time and gives it no type, hence `Any` for `ctx`.


def pool(pooling: Pooling, boxes: Tensor, image_index: Tensor) -> Tensor:
    """Pool every box on its level, all levels in one launch: (R, P, P, C) in the maps' dtype.

    A map whose memory is not channels-last is copied once.
    """
    maps = [feature.contiguous(memory_format=torch.channels_last) for feature in pooling.maps]
    boxes = boxes.detach().float().contiguous()
    grid = (pooling.scale, pooling.threshold, pooling.bins, pooling.samples)
    pooled: Tensor = _pool(maps, boxes, image_index.contiguous(), *grid)
    return pooled


def distances(embedding: Tensor, target: Tensor, metric: Metric) -> Tensor:
    """The distance of each embedding to its target as in `reference.distances`: (R,) float32."""
    if metric not in ("cosine", "l1"):
        raise ValueError(f'metric must be "cosine" or "l1", got {metric!r}')
    distance: Tensor = _distances(embedding.contiguous(), target.detach().contiguous(), metric)
    return distance


@torch.library.custom_op("ezsd::roi_pool", mutates_args=())
def _pool(
    maps: Sequence[Tensor],
    boxes: Tensor,
    image_index: Tensor,
    scale: float,
    threshold: float,
    bins: int,
    samples: int,
) -> Tensor:
    from ezsd.kernels import triton_pool

    pooling = Pooling(maps=tuple(maps), scale=scale, threshold=threshold, bins=bins, samples=samples)
    # Triton launches on the current device, which need not be the tensors'; here and below.
    with torch.cuda.device(boxes.device if boxes.is_cuda else -1):
        return triton_pool.pool_forward(pooling, boxes, image_index)


@_pool.register_fake
def _(
    maps: Sequence[Tensor],
    boxes: Tensor,
    image_index: Tensor,
    scale: float,
    threshold: float,
    bins: int,
    samples: int,
) -> Tensor:
    return maps[0].new_empty(boxes.shape[0], bins, bins, maps[0].shape[1])


@torch.library.custom_op("ezsd::roi_pool_backward", mutates_args=())
def _pool_backward(
    gradient: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    scale: float,
    threshold: float,
    samples: int,
    images: int,
    sizes: Sequence[int],
) -> list[Tensor]:
    from ezsd.kernels import triton_pool

    maps = _empty_maps(gradient, images, sizes)
    pooling = Pooling(maps=tuple(maps), scale=scale, threshold=threshold, bins=gradient.shape[1], samples=samples)
    with torch.cuda.device(boxes.device if boxes.is_cuda else -1):
        triton_pool.pool_backward(pooling, gradient, boxes, image_index)
    return maps


@_pool_backward.register_fake
def _(
    gradient: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    scale: float,
    threshold: float,
    samples: int,
    images: int,
    sizes: Sequence[int],
) -> list[Tensor]:
    return _empty_maps(gradient, images, sizes)


def _empty_maps(gradient: Tensor, images: int, sizes: Sequence[int]) -> list[Tensor]:
    """Channels-last maps of the sizes (H, W, H, W, ...), one pair per level, not filled."""
    shapes = [(images, gradient.shape[3], sizes[at], sizes[at + 1]) for at in range(0, len(sizes), 2)]
    dtype, device = gradient.dtype, gradient.device
    return [torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last) for shape in shapes]


def _pool_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
    maps, boxes, image_index, ctx.scale, ctx.threshold, _, ctx.samples = inputs
    ctx.save_for_backward(boxes, image_index)
    ctx.images = maps[0].shape[0]
    ctx.sizes = [size for feature in maps for size in feature.shape[2:]]


def _pool_gradient(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # noqa: ANN401
    boxes, image_index = ctx.saved_tensors
    grid = (ctx.scale, ctx.threshold, ctx.samples, ctx.images, ctx.sizes)
    maps = _pool_backward(gradient.contiguous(), boxes, image_index, *grid)
    return maps, None, None, None, None, None, None


_pool.register_autograd(_pool_gradient, setup_context=_pool_context)


@torch.library.custom_op("ezsd::region_distances", mutates_args=())
def _distances(embedding: Tensor, target: Tensor, metric: str) -> Tensor:
    from ezsd.kernels import triton_distance

    with torch.cuda.device(embedding.device if embedding.is_cuda else -1):
        return triton_distance.distance_forward(embedding, target, metric)


@_distances.register_fake
def _(embedding: Tensor, target: Tensor, metric: str) -> Tensor:
    return embedding.new_empty(embedding.shape[0], dtype=torch.float32)


@torch.library.custom_op("ezsd::region_distances_backward", mutates_args=())
def _distances_backward(gradient: Tensor, embedding: Tensor, target: Tensor, metric: str) -> Tensor:
    from ezsd.kernels import triton_distance

    with torch.cuda.device(embedding.device if embedding.is_cuda else -1):
        return triton_distance.distance_backward(gradient, embedding, target, metric)


@_distances_backward.register_fake
def _(gradient: Tensor, embedding: Tensor, target: Tensor, metric: str) -> Tensor:
    return torch.empty_like(embedding)


def _distances_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
    embedding, target, ctx.metric = inputs
    ctx.save_for_backward(embedding, target)


def _distances_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
    embedding, target = ctx.saved_tensors
    return _distances_backward(gradient.contiguous(), embedding, target, ctx.metric), None, None


_distances.register_autograd(_distances_gradient, setup_context=_distances_context)
