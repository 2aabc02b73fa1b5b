"""The operators the detector calls; `backend` decides who computes them, `reference` what they mean.

Conventions of all three:

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

from ezsd.choices import Backend, Metric
from ezsd.kernels import registered
from ezsd.kernels.backend import resolve_backend
from ezsd.kernels.pooling import check_boxes, check_head, check_targets, make_pooling

_Operand = TypeVar("_Operand", Tensor, Tensor | None)


def roi_align(
    features: Tensor | Sequence[Tensor],
    boxes: Tensor,
    image_index: Tensor,
    *,
    spatial_scale: float | Sequence[float],
    output_size: int = 7,
    sampling_ratio: int = 2,
    canonical_size: float = 224,
    canonical_level: int = 4,
    backend: Backend = "auto",
) -> Tensor:
    """Average each of P x P bins of every box from the map of its size.

    Args:
        features: one map (B, C, H, W), or a list of pyramid levels, finest first, that share B and C. Channels-last
            maps are read by the Triton backend without a copy.
        boxes: (R, 4) xyxy, input pixels; may lie partly or wholly outside the image.
        image_index: the image of each box, (R,) int64 in [0, B).
        spatial_scale: map cells per input pixel; for a list of maps a list of powers of two, each half of the last.
        output_size: P >= 1.
        sampling_ratio: S >= 1 sampling points per bin side.
        canonical_size: side in pixels of the square box that belongs to canonical_level.
        canonical_level: pyramid level (2 means a scale of 1/4) of a box of canonical_size.
        backend: see `ezsd.kernels.resolve_backend`.

    Returns:
        (R, C, P, P) in the maps' dtype; its memory is channels-last.

    Raises:
        ValueError: a shape, dtype, scale or range is not as described.
        BackendError: backend="triton" where Triton cannot run.

    Source: He et al., Mask R-CNN (arXiv 1703.06870), section 3; the level rule is eq. 1 of FPN (arXiv 1612.03144).
    """
    pooling = make_pooling(
        _maps_as_cast(features),
        spatial_scale,
        output_size=output_size,
        sampling_ratio=sampling_ratio,
        canonical_size=canonical_size,
        canonical_level=canonical_level,
    )
    check_boxes(pooling, boxes, image_index)
    chosen = resolve_backend(backend, pooling.maps)
    return registered.roi_align(pooling, boxes, image_index, backend=chosen).permute(0, 3, 1, 2)


def roi_embed(
    features: Tensor | Sequence[Tensor],
    boxes: Tensor,
    image_index: Tensor,
    *,
    spatial_scale: float | Sequence[float],
    output_size: int = 7,
    sampling_ratio: int = 2,
    projection: Tensor | None = None,
    bias: Tensor | None = None,
    canonical_size: float = 224,
    canonical_level: int = 4,
    backend: Backend = "auto",
) -> Tensor:
    """Pool every box, project it linearly and scale it to unit length.

    Args:
        features: as in `roi_align`; so are the other arguments not named here.
        boxes: (R, 4) xyxy, input pixels.
        image_index: the image of each box, (R,) int64 in [0, B).
        spatial_scale: map cells per input pixel, a list for a list of maps.
        output_size: P >= 1.
        sampling_ratio: S >= 1.
        projection: (D, P*P*C), bins row by row, channels innermost; None, for P = 1 only, is the identity (D = C).
        bias: (D,) or None.
        canonical_size: side in pixels of the square box that belongs to canonical_level.
        canonical_level: pyramid level of a box of canonical_size.
        backend: see `ezsd.kernels.resolve_backend`.

    Returns:
        (R, D) float32 (float64 for float64 maps), rows of unit length. A row that was zero stays zero and has no
        gradient.

    Raises:
        ValueError: a shape, dtype, scale or range is not as described.
        BackendError: backend="triton" where Triton cannot run.
    """
    pooling = make_pooling(
        _maps_as_cast(features),
        spatial_scale,
        output_size=output_size,
        sampling_ratio=sampling_ratio,
        canonical_size=canonical_size,
        canonical_level=canonical_level,
    )
    check_boxes(pooling, boxes, image_index)
    check_head(pooling, projection, bias)
    chosen = resolve_backend(backend, pooling.maps)
    head = _as_cast(projection), _as_cast(bias)
    return registered.roi_embed(pooling, boxes, image_index, head, backend=chosen)


def roi_align_cosine(
    features: Tensor | Sequence[Tensor],
    boxes: Tensor,
    image_index: Tensor,
    target: Tensor,
    weight: Tensor,
    *,
    spatial_scale: float | Sequence[float],
    output_size: int = 7,
    sampling_ratio: int = 2,
    projection: Tensor | None = None,
    bias: Tensor | None = None,
    metric: Metric = "cosine",
    canonical_size: float = 224,
    canonical_level: int = 4,
    backend: Backend = "auto",
) -> Tensor:
    """Distil cached embeddings: the weighted mean distance of the boxes' embeddings to their targets.

    Args:
        features: as in `roi_align`; so are the other arguments not named here.
        boxes: (R, 4) xyxy, input pixels.
        image_index: the image of each box, (R,) int64 in [0, B).
        target: (R, D), any float dtype, any length; normalised here. Float16 is read without a converted copy
            by the Triton backend.
        weight: (R,) float, >= 0; 0 marks a row that does not count.
        spatial_scale: map cells per input pixel, a list for a list of maps.
        output_size: P >= 1.
        sampling_ratio: S >= 1.
        projection: (D, P*P*C), bins row by row, channels innermost; None, for P = 1 only, is the identity (D = C).
        bias: (D,) or None.
        metric: "cosine" is 1 - cosine; "l1" is the sum over D of |difference of the unit vectors|.
        canonical_size: side in pixels of the square box that belongs to canonical_level.
        canonical_level: pyramid level of a box of canonical_size.
        backend: see `ezsd.kernels.resolve_backend`.

    Returns:
        sum(weight * distance) / sum(weight), a scalar float32 (float64 for float64 maps). A row whose embedding or
        target is zero has distance 0 and no gradient, and its weight counts. Zero with zero gradients when R = 0 or
        the weights sum to 0.

    Raises:
        ValueError: a shape, dtype, scale or range is not as described.
        BackendError: backend="triton" where Triton cannot run.

    Source: distillation of region embeddings, EZAD (arXiv 2303.12145), section 3.3; the L1 distance is the paper's.
    """
    pooling = make_pooling(
        _maps_as_cast(features),
        spatial_scale,
        output_size=output_size,
        sampling_ratio=sampling_ratio,
        canonical_size=canonical_size,
        canonical_level=canonical_level,
    )
    check_boxes(pooling, boxes, image_index)
    check_head(pooling, projection, bias)
    dim = pooling.channels if projection is None else projection.shape[0]
    check_targets(target, weight, metric, regions=boxes.shape[0], dim=dim)
    chosen = resolve_backend(backend, pooling.maps)
    head = _as_cast(projection), _as_cast(bias)
    return registered.roi_align_cosine(pooling, boxes, image_index, target, weight, head, metric=metric, backend=chosen)


def _maps_as_cast(features: Tensor | Sequence[Tensor]) -> Tensor | Sequence[Tensor]:
    return _as_cast(features) if isinstance(features, Tensor) else [_as_cast(feature) for feature in features]


def _as_cast(operand: _Operand) -> _Operand:
    """What autocast makes of an operand of a matrix product: its own dtype inside, nothing outside or in float64."""
    if operand is None or operand.dtype == torch.float64 or not torch.is_autocast_enabled(operand.device.type):
        return operand
    return operand.to(torch.get_autocast_dtype(operand.device.type))
