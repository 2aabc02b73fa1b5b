"""The operators as torch knows them: what autograd, torch.compile and torch.export see.

Each public operator is one opaque node with a shape function and a gradient, whichever backend computes it. Opaque
(`custom_op`) rather than traced (`triton_op`), because one definition serves both backends and the launches leave a
compiler nothing to merge. Triton is imported when a kernel first runs, so this module loads without it.

torch.compile keeps on disk what it made of an operator's name: one with another signature or gradient needs another
name, but for an argument with a default at its end.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ezsd.kernels import eager
from ezsd.kernels.backend import current_device
from ezsd.kernels.distance import FUSED, mean_distance, unit, weighted_mean
from ezsd.kernels.pooling import BoundPooling
from ezsd.kernels.reference import project

# torch gives the context of a registered operator no type and hands its inputs over as one tuple, hence `Any`.
# ruff: noqa: ANN401

Head = tuple[Tensor | None, Tensor | None]
"""Projection and bias."""


def roi_align(pooling: BoundPooling, boxes: Tensor, image_index: Tensor, *, backend: str) -> Tensor:
    """Pooled boxes (R, P, P, C) in the maps' dtype."""
    pooled: Tensor = _align(list(pooling.maps), boxes.detach(), image_index, *pooling.grid, backend)
    return pooled


def roi_embed(pooling: BoundPooling, boxes: Tensor, image_index: Tensor, head: Head, *, backend: str) -> Tensor:
    """Unit embeddings (R, D) in float32, or float64 for float64 maps."""
    constants = (boxes.detach(), image_index, None, None)
    unit_rows: Tensor = _embed(list(pooling.maps), *constants, *head, "cosine", *pooling.grid, backend)[0]
    return unit_rows


def roi_embed_cosine(
    pooling: BoundPooling,
    boxes: Tensor,
    image_index: Tensor,
    target: Tensor,
    weight: Tensor,
    head: Head,
    *,
    metric: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit embeddings of boxes without a target, pooled features (R, P, P, C) of all, the weighted mean distance."""
    constants = (boxes.detach(), image_index, target.detach(), weight.detach())
    unit_rows, loss, _, pooled = _embed(list(pooling.maps), *constants, *head, metric, *pooling.grid, backend)
    return unit_rows, pooled, loss


def roi_align_cosine(
    pooling: BoundPooling,
    boxes: Tensor,
    image_index: Tensor,
    target: Tensor,
    weight: Tensor,
    head: Head,
    *,
    metric: str,
    backend: str,
) -> Tensor:
    """The weighted mean distance, a scalar in float32, or float64 for float64 maps."""
    constants = (boxes.detach(), image_index, target.detach(), weight.detach())
    loss: Tensor = _cosine(list(pooling.maps), *constants, *head, metric, *pooling.grid, backend)[0]
    return loss


@torch.library.custom_op("ezsd::roi_align", mutates_args=())
def _align(
    maps: Sequence[Tensor],
    boxes: Tensor,
    image_index: Tensor,
    scale: float,
    threshold: float,
    bins: int,
    samples: int,
    backend: str,
) -> Tensor:
    pooling = BoundPooling(maps=tuple(maps), scale=scale, threshold=threshold, bins=bins, samples=samples)
    return _pool(pooling, boxes, image_index, backend).to(maps[0].dtype)


@torch.library.custom_op("ezsd::roi_embed_cosine", mutates_args=())
def _embed(
    maps: Sequence[Tensor],
    boxes: Tensor,
    image_index: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    projection: Tensor | None,
    bias: Tensor | None,
    metric: str,
    scale: float,
    threshold: float,
    bins: int,
    samples: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit embeddings of the boxes before those with a target, the loss of these, and what `_pool_and_project` gave.

    The last boxes have the targets (N, D); without targets the loss is 0.
    """
    pooling = BoundPooling(maps=tuple(maps), scale=scale, threshold=threshold, bins=bins, samples=samples)
    embedding, pooled = _pool_and_project(pooling, boxes, image_index, (projection, bias), backend)
    named = _without_target(boxes, target)
    unit_rows = unit(embedding[:named])
    if target is None or weight is None:
        return unit_rows, unit_rows.new_zeros(()), embedding, pooled
    return unit_rows, _mean_distance(embedding[named:], target, weight, metric, backend), embedding, pooled


@torch.library.custom_op("ezsd::roi_align_cosine", mutates_args=())
def _cosine(
    maps: Sequence[Tensor],
    boxes: Tensor,
    image_index: Tensor,
    target: Tensor,
    weight: Tensor,
    projection: Tensor | None,
    bias: Tensor | None,
    metric: str,
    scale: float,
    threshold: float,
    bins: int,
    samples: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and for the gradient the raw embeddings and `_pool_and_project`'s bins."""
    pooling = BoundPooling(maps=tuple(maps), scale=scale, threshold=threshold, bins=bins, samples=samples)
    embedding, pooled = _pool_and_project(pooling, boxes, image_index, (projection, bias), backend)
    return _mean_distance(embedding, target, weight, metric, backend), embedding, pooled


def _mean_distance(embedding: Tensor, target: Tensor, weight: Tensor, metric: str, backend: str) -> Tensor:
    if backend == "triton":
        from ezsd.kernels import triton_distance

        with current_device(embedding):
            distance = triton_distance.distance_forward(embedding, target.contiguous(), metric)
        return weighted_mean(distance, weight)
    return mean_distance(embedding, target, weight, FUSED[metric])


def _without_target(boxes: Tensor, target: Tensor | None) -> int:
    return boxes.shape[0] - (0 if target is None else target.shape[0])


@torch.library.custom_op("ezsd::region_distances_backward", mutates_args=())
def _distances_backward(
    loss_grad: Tensor, embedding: Tensor, target: Tensor, weight: Tensor, metric: str, backend: str
) -> Tensor:
    """Gradient of the raw embeddings (R, D) in their dtype."""
    weight = weight.to(loss_grad.dtype)
    total = weight.sum()
    distance_grad = loss_grad * weight / torch.where(total == 0, 1, total)
    if backend == "triton":
        from ezsd.kernels import triton_distance

        with current_device(embedding):
            return triton_distance.distance_backward(distance_grad, embedding, target.contiguous(), metric)
    return eager.distances_backward(distance_grad, embedding, target, metric)


@torch.library.custom_op("ezsd::regions_backward", mutates_args=())
def _regions_backward(
    embedding_grad: Tensor,
    pooled: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    projection: Tensor | None,
    scale: float,
    threshold: float,
    bins: int,
    samples: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    wanted: Sequence[bool],
    backend: str,
    pooled_grad: Tensor | None = None,
) -> list[Tensor]:
    """Gradients of the raw embeddings handed on, as far as wanted: of the maps, the projection, the bias.

    Args:
        embedding_grad: (R, D); without a projection (R, P * P * C).
        pooled: as `_pool_and_project` gave it.
        boxes: as in the forward, as are the arguments not named here.
        image_index: as in the forward.
        projection: as in the forward.
        scale: see `BoundPooling`.
        threshold: see `BoundPooling`.
        bins: see `BoundPooling`.
        samples: see `BoundPooling`.
        shape: of the maps: B, C, then H and W of every level.
        dtype: of the maps.
        wanted: three flags: maps, projection, bias.
        backend: "eager" or "triton".
        pooled_grad: what else pulls at the pooled features, (R, P, P, C).
    """
    gradients = []
    with torch.autocast(embedding_grad.device.type, enabled=False):
        if wanted[0]:
            pull = embedding_grad
            if projection is not None:
                pull = embedding_grad @ projection.to(embedding_grad.dtype)
            if pooled_grad is not None:
                pull = pull + pooled_grad.flatten(1)
            gradients += _empty_maps(embedding_grad, shape, dtype, backend)
            pooling = BoundPooling(maps=tuple(gradients), scale=scale, threshold=threshold, bins=bins, samples=samples)
            _pool_backward(pooling, pull.view(-1, bins, bins, shape[1]), boxes, image_index, backend)
        if projection is not None and wanted[1]:
            gradients.append((embedding_grad.T @ pooled.flatten(1)).to(projection.dtype))
        if projection is not None and wanted[2]:
            gradients.append(embedding_grad.sum(0, dtype=_wide(embedding_grad.dtype)).to(projection.dtype))
    return gradients


@_align.register_fake
def _(maps: Sequence[Tensor], boxes: Tensor, *rest: Any) -> Tensor:
    bins = rest[3]
    return maps[0].new_empty(boxes.shape[0], bins, bins, maps[0].shape[1])


@_embed.register_fake
def _(maps: Sequence[Tensor], boxes: Tensor, image_index: Tensor, target: Tensor | None, *rest: Any) -> Any:
    embedding, pooled = _empty_embedding(maps, boxes, rest[1], bins=rest[6], backend=rest[8])
    dtype, named = _wide(embedding.dtype), _without_target(boxes, target)
    unit_rows = embedding.new_empty((named, embedding.shape[1]), dtype=dtype)
    return unit_rows, embedding.new_empty((), dtype=dtype), embedding, pooled


@_cosine.register_fake
def _(maps: Sequence[Tensor], boxes: Tensor, *rest: Any) -> Any:
    embedding, pooled = _empty_embedding(maps, boxes, rest[3], bins=rest[8], backend=rest[10])
    return embedding.new_empty((), dtype=_wide(embedding.dtype)), embedding, pooled


@_distances_backward.register_fake
def _(loss_grad: Tensor, embedding: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(embedding)


@_regions_backward.register_fake
def _(embedding_grad: Tensor, *rest: Any) -> list[Tensor]:
    projection, shape, dtype, wanted, backend = rest[3], *rest[8:12]
    gradients = _empty_maps(embedding_grad, shape, dtype, backend) if wanted[0] else []
    if projection is not None and wanted[1]:
        gradients.append(torch.empty_like(projection, memory_format=torch.contiguous_format))
    if projection is not None and wanted[2]:
        gradients.append(projection.new_empty(projection.shape[0]))
    return gradients


def _align_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    maps, boxes, image_index, *ctx.grid, ctx.backend = inputs
    ctx.shape, ctx.dtype = _shape(maps), maps[0].dtype
    ctx.save_for_backward(boxes, image_index)


def _align_gradient(ctx: Any, pooled_grad: Tensor) -> tuple[Any, ...]:
    boxes, image_index = ctx.saved_tensors
    # The gradient of a plain sum is one number, expanded; kernels read memory.
    flat = pooled_grad.flatten(1).contiguous()
    rest = (None, *ctx.grid, ctx.shape, ctx.dtype, [True, False, False], ctx.backend)
    maps = _regions_backward(flat, flat.new_empty(0), boxes, image_index, *rest)
    return maps, None, None, *[None] * 5


def _embed_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    maps, boxes, image_index, target, weight, projection, _, ctx.metric, *ctx.grid, ctx.backend = inputs
    ctx.shape, ctx.dtype = _shape(maps), maps[0].dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(boxes, image_index, target, weight, projection, *output[2:])


def _embed_gradient(
    ctx: Any, unit_grad: Tensor | None, loss_grad: Tensor | None, _: None, pooled_grad: Tensor | None
) -> tuple[Any, ...]:
    boxes, image_index, target, weight, projection, embedding, pooled = ctx.saved_tensors
    named = _without_target(boxes, target)
    parts = [embedding.new_zeros(()).expand_as(embedding[:named]), embedding.new_zeros(()).expand_as(embedding[named:])]
    if unit_grad is not None:
        parts[0] = eager.unit_backward(unit_grad, embedding[:named])
    if loss_grad is not None and target is not None:
        parts[1] = _distances_backward(loss_grad, embedding[named:], target, weight, ctx.metric, ctx.backend)
    nothing = unit_grad is None and loss_grad is None and pooled_grad is None
    embedding_grad = None if nothing else torch.cat(parts)
    maps, projection_grad, bias_grad = _hand_on(
        ctx, embedding_grad, pooled, boxes, image_index, projection, first=5, pooled_grad=pooled_grad
    )
    return maps, None, None, None, None, projection_grad, bias_grad, *[None] * 6


def _cosine_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    maps, boxes, image_index, target, weight, projection, _, ctx.metric, *ctx.grid, ctx.backend = inputs
    ctx.shape, ctx.dtype = _shape(maps), maps[0].dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(boxes, image_index, target, weight, projection, *output[1:])


def _cosine_gradient(ctx: Any, loss_grad: Tensor | None, *_: None) -> tuple[Any, ...]:
    boxes, image_index, target, weight, projection, embedding, pooled = ctx.saved_tensors
    embedding_grad = None
    if loss_grad is not None:
        embedding_grad = _distances_backward(loss_grad, embedding, target, weight, ctx.metric, ctx.backend)
    maps, projection_grad, bias_grad = _hand_on(ctx, embedding_grad, pooled, boxes, image_index, projection, first=5)
    return maps, None, None, None, None, projection_grad, bias_grad, *[None] * 6


def _hand_on(
    ctx: Any,
    embedding_grad: Tensor | None,
    pooled: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    projection: Tensor | None,
    *,
    first: int,
    pooled_grad: Tensor | None = None,
) -> tuple[Any, Any, Any]:
    """Gradients of maps, projection and bias; `first` is the projection's place among the operator's inputs."""
    levels = (len(ctx.shape) - 2) // 2
    if embedding_grad is None:
        return [None] * levels, None, None
    wanted = [any(ctx.needs_input_grad[0]), ctx.needs_input_grad[first], ctx.needs_input_grad[first + 1]]
    rest = (projection, *ctx.grid, ctx.shape, ctx.dtype, wanted, ctx.backend)
    found = _regions_backward(embedding_grad.contiguous(), pooled, boxes, image_index, *rest, pooled_grad)
    maps = [found.pop(0) for _ in range(levels)] if wanted[0] else [None] * levels
    projection_grad = found.pop(0) if wanted[1] else None
    return maps, projection_grad, found.pop(0) if wanted[2] else None


_align.register_autograd(_align_gradient, setup_context=_align_context)
_embed.register_autograd(_embed_gradient, setup_context=_embed_context)
_cosine.register_autograd(_cosine_gradient, setup_context=_cosine_context)


def _pool(pooling: BoundPooling, boxes: Tensor, image_index: Tensor, backend: str) -> Tensor:
    """(R, P, P, C), contiguous; in the maps' dtype from Triton, in float32 or better from eager."""
    if backend == "eager":
        return eager.pool(pooling, boxes, image_index)
    from ezsd.kernels import triton_pool

    with current_device(boxes):
        return triton_pool.pool_forward(pooling, boxes, image_index)


def _pool_backward(
    pooling: BoundPooling, pooled_grad: Tensor, boxes: Tensor, image_index: Tensor, backend: str
) -> None:
    """Overwrite the maps of `pooling` with the gradient."""
    if backend == "eager":
        eager.pool_backward(pooling, pooled_grad, boxes, image_index)
        return
    from ezsd.kernels import triton_pool

    with current_device(boxes):
        triton_pool.pool_backward(pooling, pooled_grad, boxes, image_index)


def _pool_and_project(
    pooling: BoundPooling, boxes: Tensor, image_index: Tensor, head: Head, backend: str
) -> tuple[Tensor, Tensor]:
    """Raw embeddings (R, D) and the pooled bins; without a projection they are one, and an empty tensor is returned."""
    pooled = _pool(pooling, boxes, image_index, backend)
    with torch.autocast(pooled.device.type, enabled=False):
        embedding = project(pooled, *head)
    return embedding, pooled.new_empty(0) if head[0] is None else pooled


def _empty_embedding(
    maps: Sequence[Tensor], boxes: Tensor, projection: Tensor | None, *, bins: int, backend: str
) -> tuple[Tensor, Tensor]:
    """Allocate the results of `_pool_and_project`."""
    regions, channels, dtype = boxes.shape[0], maps[0].shape[1], maps[0].dtype
    dtype = dtype if backend == "triton" else _wide(dtype)
    if projection is None:
        return maps[0].new_empty(regions, channels, dtype=dtype), maps[0].new_empty(0, dtype=dtype)
    pooled = maps[0].new_empty(regions, bins, bins, channels, dtype=dtype)
    return pooled.new_empty(regions, projection.shape[0]), pooled


def _empty_maps(like: Tensor, shape: Sequence[int], dtype: torch.dtype, backend: str) -> list[Tensor]:
    """Maps on the device of `like`, not filled: channels-last for Triton, plain for eager."""
    form = torch.channels_last if backend == "triton" else torch.contiguous_format
    return [
        torch.empty((*shape[:2], *shape[at : at + 2]), dtype=dtype, device=like.device, memory_format=form)
        for at in range(2, len(shape), 2)
    ]


def _shape(maps: Sequence[Tensor]) -> list[int]:
    """B, C, then H and W of every level."""
    return [*maps[0].shape[:2], *(size for feature in maps for size in feature.shape[2:])]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
