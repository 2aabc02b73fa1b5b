"""Distances between embeddings and targets that the fused operator offers, and the mean over regions.

Every distance is a function of unit vectors, so a metric is one function of two tensors (R, D) that returns (R,).
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]
"""Distance per row of unit vectors (R, D) and (R, D): (R,)."""


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine similarity of unit vectors, per row: (R,) in [0, 2]."""
    return 1 - (student * teacher).sum(1)


def l1_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """L1 distance of unit vectors, summed over D, per row: (R,)."""
    return (student - teacher).abs().sum(1)


FUSED: Mapping[str, Distance] = {"cosine": cosine_distance, "l1": l1_distance}
"""Specification of the metrics that the backends compute inside the operator."""


def unit(vector: Tensor) -> Tensor:
    """Scale rows to unit length in float32 or better; a zero row stays zero and gets no gradient."""
    vector = vector.to(torch.promote_types(vector.dtype, torch.float32))
    squared = vector.square().sum(1, keepdim=True)
    # The inner `where` keeps the root away from 0, whose derivative would turn the masked gradient into NaN.
    zero = squared == 0
    return vector * torch.where(zero, 0, torch.where(zero, 1, squared).rsqrt())


def mean_distance(embedding: Tensor, target: Tensor, weight: Tensor, distance: Distance) -> Tensor:
    """Weighted mean over regions of the distance between embeddings and targets, both scaled to unit length.

    Args:
        embedding: (R, D), any length.
        target: (R, D), any float dtype and length; a constant.
        weight: (R,), >= 0; a constant.
        distance: see `Distance`.

    Returns:
        sum(weight * distance) / sum(weight), a scalar. A row whose embedding or target is zero has distance 0 and no
        gradient, and its weight counts. Zero with zero gradient where the weights sum to 0.
    """
    student = unit(embedding)
    teacher = unit(target.detach().to(student.dtype))
    known = student.any(1) & teacher.any(1)
    return weighted_mean(torch.where(known, distance(student, teacher), 0), weight)


def weighted_mean(distance: Tensor, weight: Tensor) -> Tensor:
    """sum(weight * distance) / sum(weight), a scalar; 0 with zero gradient where sum(weight) is 0."""
    weight = weight.detach().to(distance.dtype)
    total = weight.sum()
    return (weight * distance).sum() / torch.where(total == 0, 1, total)
