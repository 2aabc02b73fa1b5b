"""The specification: every operator in plain torch, float32 inside (float64 for float64 maps).

Nothing here is tuned. Per axis, bin i of a box averages S bilinear samples, which makes its value a weighted sum of
the map's rows with weights a_i(y), and likewise c_j(x) along the columns:

    pooled[i, j, :] = sum_y sum_x a_i(y) c_j(x) F[y, x, :]                            (docs/kernel.md, eq. 2)

The Triton kernels compute the same sum; torchvision.ops.roi_align(aligned=True) is equal to it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ezsd.choices import Metric
from ezsd.kernels.distance import FUSED, mean_distance, unit
from ezsd.kernels.pooling import BoundPooling, Pooling, check_boxes, check_head, check_targets


def roi_align(features: Tensor | Sequence[Tensor], boxes: Tensor, image_index: Tensor, pooling: Pooling) -> Tensor:
    """Pool boxes into (R, C, P, P); arguments as in `ezsd.kernels.roi_align`."""
    bound = pooling.bind(features)
    check_boxes(bound, boxes, image_index)
    return pool(bound, boxes, image_index).permute(0, 3, 1, 2).to(bound.maps[0].dtype)


def roi_embed(
    features: Tensor | Sequence[Tensor],
    boxes: Tensor,
    image_index: Tensor,
    pooling: Pooling,
    projection: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Embed boxes as unit vectors (R, D); arguments as in `ezsd.kernels.roi_embed`."""
    bound = pooling.bind(features)
    check_boxes(bound, boxes, image_index)
    return unit(embed(bound, boxes, image_index, projection, bias))


def roi_align_cosine(
    features: Tensor | Sequence[Tensor],
    boxes: Tensor,
    image_index: Tensor,
    pooling: Pooling,
    projection: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    target: Tensor,
    weight: Tensor,
    metric: Metric = "cosine",
) -> Tensor:
    """Compare boxes with their targets; arguments as in `ezsd.kernels.roi_align_cosine`."""
    bound = pooling.bind(features)
    check_boxes(bound, boxes, image_index)
    embedding = embed(bound, boxes, image_index, projection, bias)
    check_targets(target, weight, metric, regions=embedding.shape[0], dim=embedding.shape[1])
    return mean_distance(embedding, target, weight, FUSED[metric])


def roi_embed_cosine(
    features: Tensor | Sequence[Tensor],
    boxes: Tensor,
    image_index: Tensor,
    pooling: Pooling,
    projection: Tensor,
    bias: Tensor | None = None,
    *,
    target: Tensor,
    weight: Tensor,
    metric: Metric = "cosine",
) -> tuple[Tensor, Tensor, Tensor]:
    """Embed boxes and compare the last of them; arguments and results as in `ezsd.kernels.roi_embed_cosine`."""
    named = boxes.shape[0] - target.shape[0]
    head = projection, bias
    return (
        roi_embed(features, boxes[:named], image_index[:named], pooling, *head),
        roi_align(features, boxes, image_index, pooling),
        roi_align_cosine(
            features, boxes[named:], image_index[named:], pooling, *head, target=target, weight=weight, metric=metric
        ),
    )


def pool(pooling: BoundPooling, boxes: Tensor, image_index: Tensor) -> Tensor:
    """Equation 2 for every box on the level it belongs to: (R, P, P, C)."""
    level_of = pooling.level_of(boxes)
    pooled = boxes.new_zeros(())
    for level, feature in enumerate(pooling.maps):
        dtype = torch.float64 if feature.dtype == torch.float64 else torch.float32
        x1, y1, x2, y2 = (boxes.to(dtype) * (pooling.scale / 2**level) - 0.5).unbind(1)
        rows = axis_weights(y1, y2, size=feature.shape[2], bins=pooling.bins, samples=pooling.samples)
        columns = axis_weights(x1, x2, size=feature.shape[3], bins=pooling.bins, samples=pooling.samples)
        mine = (level_of == level)[:, None, None]
        product: Tensor = torch.einsum("riy,rcyx,rjx->rijc", rows * mine, feature.to(dtype)[image_index], columns)
        pooled = pooled.to(dtype) + product
    return pooled


def axis_weights(start: Tensor, stop: Tensor, *, size: int, bins: int, samples: int) -> Tensor:
    """Weights of the cells of one axis in each bin: (R, bins, size).

    Args:
        start: first edge of each box along the axis, (R,), in cells minus 0.5 (cell k has its centre at k).
        stop: last edge, (R,), same unit.
        size: cells along the axis.
        bins: P.
        samples: S, sampling points per bin.

    A sample beyond [-1, size] counts as 0; one in the margin is moved to the border cell.
    """
    step = torch.arange(bins * samples, dtype=start.dtype, device=start.device)
    sample = start[:, None] + (step + 0.5) / (bins * samples) * (stop - start)[:, None]  # (R, P*S)
    inside = (sample >= -1) & (sample <= size)
    cell = torch.arange(size, dtype=start.dtype, device=start.device)
    tap = (1 - (sample.clamp(0, size - 1)[:, :, None] - cell).abs()).clamp(min=0)  # (R, P*S, size)
    return (tap * inside[:, :, None]).view(-1, bins, samples, size).mean(2)


def embed(
    pooling: BoundPooling, boxes: Tensor, image_index: Tensor, projection: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Pool, then project: (R, D), not normalised."""
    check_head(pooling, projection, bias)
    return project(pool(pooling, boxes, image_index), projection, bias)


def project(pooled: Tensor, projection: Tensor | None, bias: Tensor | None) -> Tensor:
    """Apply a projection (D, P*P*C) to pooled boxes (R, P, P, C) in their dtype; None is the identity."""
    pooled = pooled.flatten(1)
    if projection is None:
        return pooled
    return functional.linear(pooled, projection.to(pooled.dtype), None if bias is None else bias.to(pooled.dtype))
