"""The operators the detector calls; `backend` decides who computes them, `reference` what they mean.

Conventions of all:

- boxes are xyxy in pixels of the batched network input (after resizing), float;
- cell k of a map has its centre at k + 0.5 cells (RoIAlign with aligned=True), bins are averaged over
  sampling_ratio x sampling_ratio bilinear samples, a sample more than one cell outside the map counts as 0;
- with a list of maps, a box of area A is pooled from level floor(canonical_level + log2(sqrt(A) / canonical_size)),
  clamped to the levels that exist; the level of the first map is -log2(spatial_scale[0]);
- gradients flow to features, projection and bias; boxes, targets and weights are constants;
- under autocast, maps, projection and bias are cast as for a matrix product, boxes, targets and weights are not;
  unit lengths, distances and means are float32 or better everywhere.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ezsd.choices import Metric
from ezsd.kernels import registered
from ezsd.kernels.backend import resolve_backend
from ezsd.kernels.pooling import BoundPooling, Pooling, check_boxes, check_head, check_targets

_Operand = TypeVar("_Operand", Tensor, Tensor | None)


def roi_align(features: Tensor | Sequence[Tensor], boxes: Tensor, image_index: Tensor, pooling: Pooling) -> Tensor:
    """Average each of P x P bins of every box from the map of its size.

    Args:
        features: pyramid levels (B, C, H, W), finest first, that share B and C, as many as `pooling` has; a single
            map may come without a list. Channels-last maps are read by the Triton backend without a copy.
        boxes: (R, 4) xyxy, input pixels; may be partly or wholly outside the image.
        image_index: the image of each box, (R,) int64 in [0, B).
        pooling: grid, levels and backend.

    Returns:
        (R, C, P, P) in the maps' dtype; its memory is channels-last.

    Raises:
        ValueError: a shape, dtype or range is not as described.
        BackendError: backend="triton" where Triton cannot run.

    Source: He et al., Mask R-CNN (arXiv 1703.06870), section 3; the level rule is eq. 1 of FPN (arXiv 1612.03144).
    """
    bound, backend = _bind(features, boxes, image_index, pooling)
    return registered.roi_align(bound, boxes, image_index, backend=backend).permute(0, 3, 1, 2)


def roi_embed(
    features: Tensor | Sequence[Tensor],
    boxes: Tensor,
    image_index: Tensor,
    pooling: Pooling,
    projection: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Pool every box, project it linearly and scale it to unit length.

    Args:
        features: as in `roi_align`; so are boxes, image_index and pooling.
        boxes: (R, 4) xyxy, input pixels.
        image_index: the image of each box, (R,) int64 in [0, B).
        pooling: grid, levels and backend.
        projection: (D, P*P*C), bins row by row, channels innermost; None, for P = 1 only, is the identity (D = C).
        bias: (D,) or None.

    Returns:
        (R, D) float32 (float64 for float64 maps), rows of unit length. A row that was zero stays zero and has no
        gradient.

    Raises:
        ValueError: a shape, dtype or range is not as described.
        BackendError: backend="triton" where Triton cannot run.
    """
    bound, backend = _bind(features, boxes, image_index, pooling)
    check_head(bound, projection, bias)
    head = _as_cast(projection), _as_cast(bias)
    return registered.roi_embed(bound, boxes, image_index, head, backend=backend)


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
    """Weighted mean distance of the boxes' embeddings to their targets: the distillation loss as one operator.

    Args:
        features: as in `roi_align`; so are boxes, image_index and pooling.
        boxes: (R, 4) xyxy, input pixels.
        image_index: the image of each box, (R,) int64 in [0, B).
        pooling: grid, levels and backend.
        projection: as in `roi_embed`.
        bias: (D,) or None.
        target: (R, D), any float dtype, any length; normalised here. Float16 is read without a converted copy
            by the Triton backend.
        weight: (R,) float, >= 0; 0 marks a row that does not count.
        metric: see `ezsd.kernels.distance`.

    Returns:
        sum(weight * distance) / sum(weight), a scalar float32 (float64 for float64 maps). A row whose embedding or
        target is zero has distance 0 and no gradient, and its weight counts. Zero with zero gradients when R = 0 or
        the weights sum to 0.

    Raises:
        ValueError: a shape, dtype, metric or range is not as described.
        BackendError: backend="triton" where Triton cannot run.

    Source: distillation of region embeddings, EZAD (arXiv 2303.12145), section 3.3; the L1 distance is the paper's.
    """
    bound, backend = _bind(features, boxes, image_index, pooling)
    check_head(bound, projection, bias)
    dim = bound.channels if projection is None else projection.shape[0]
    check_targets(target, weight, metric, regions=boxes.shape[0], dim=dim)
    head = _as_cast(projection), _as_cast(bias)
    return registered.roi_align_cosine(bound, boxes, image_index, target, weight, head, metric=metric, backend=backend)


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
    """Embed boxes and compare the last of them with targets: `roi_embed` and `roi_align_cosine` of one pooling.

    A training step classifies and regresses some boxes and distils others; together they read each map once, and the
    gradient writes each map once.

    Args:
        features: as in `roi_align`; so are boxes, image_index and pooling.
        boxes: (R, 4) xyxy, input pixels; the last N have the targets.
        image_index: the image of each box, (R,) int64 in [0, B).
        pooling: grid, levels and backend.
        projection: (D, P*P*C), as in `roi_embed`.
        bias: (D,) or None.
        target: (N, D) of the last N boxes, as in `roi_align_cosine`.
        weight: (N,) float, >= 0.
        metric: see `ezsd.kernels.distance`.

    Returns:
        Unit embeddings (R - N, D) of the first boxes as by `roi_embed`, pooled features (R, C, P, P) of all boxes in
        the maps' dtype or a wider one, and the loss of the last as by `roi_align_cosine`. All three have gradients.

    Raises:
        ValueError: a shape, dtype, metric or range is not as described.
        BackendError: backend="triton" where Triton cannot run.
    """
    bound, backend = _bind(features, boxes, image_index, pooling)
    check_head(bound, projection, bias)
    if target.shape[0] > boxes.shape[0]:
        raise ValueError(
            f"target: {target.shape[0]} rows for the last of {boxes.shape[0]} boxes, expected at most as many"
        )
    check_targets(target, weight, metric, regions=target.shape[0], dim=projection.shape[0])
    head = _as_cast(projection), _as_cast(bias)
    embedding, pooled, loss = registered.roi_embed_cosine(
        bound, boxes, image_index, target, weight, head, metric=metric, backend=backend
    )
    return embedding, pooled.permute(0, 3, 1, 2), loss


def _bind(
    features: Tensor | Sequence[Tensor], boxes: Tensor, image_index: Tensor, pooling: Pooling
) -> tuple[BoundPooling, str]:
    """The checked maps, as autocast has them, with their grid; and the backend that computes."""
    maps = [features] if isinstance(features, Tensor) else features
    bound = pooling.bind([_as_cast(feature) for feature in maps])
    check_boxes(bound, boxes, image_index)
    return bound, resolve_backend(pooling.backend, bound.maps, bins=bound.bins)


def _as_cast(operand: _Operand) -> _Operand:
    """Cast an operand as autocast casts those of a matrix product; unchanged outside autocast and in float64."""
    if operand is None or operand.dtype == torch.float64 or not torch.is_autocast_enabled(operand.device.type):
        return operand
    return operand.to(torch.get_autocast_dtype(operand.device.type))
