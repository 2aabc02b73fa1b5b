"""The objective of stage two: every term, its weight, and the metrics of the distillation.

| term | of | divided by |
|---|---|---|
| rpn_objectness, rpn_box | torchvision's proposal network | anchors sampled |
| classification | cross-entropy of regions against class names and background, or Seesaw loss | regions sampled |
| box | L1 of box deltas, positives only | regions sampled |
| mask | binary cross-entropy of mask cells, positives only | cells of positives |
| distillation | distance of region embeddings to the cached embeddings | weight of the regions |

The objective is the sum of terms times `loss_weights`. To add a distillation metric, write one function of unit
vectors, list it in `METRICS` and name it in `ezsd.choices.Metric`, which makes it a value of the setting loss.metric.
Plain torch computes it, unless the fused operator does (`ezsd.kernels.distance.FUSED`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ezsd.boxes import apply_deltas, deltas_between
from ezsd.choices import Metric
from ezsd.kernels.distance import Distance, cosine_distance, l1_distance, mean_distance
from ezsd.transfer import to_device

DELTA_SCALE = (10.0, 10.0, 5.0, 5.0)
"""Box deltas are multiplied by these, so that they have a spread of about one."""

MITIGATION, COMPENSATION = 0.8, 2.0
"""Exponents p and q of Seesaw loss, as its authors have them for LVIS."""

LEAST_PROBABILITY = 0.01
"""Seesaw loss takes the probability of a region's own class for at least this: compensation stays finite."""

REFERENCE_COSINE = 0.7
"""Between student and teacher, where the metrics of the distillation pull equally hard."""


@dataclass(frozen=True, slots=True)
class DistillationMetric:
    """A distance between unit vectors, and how hard it pulls."""

    distance: Distance
    """Distance per row of student and teacher embeddings."""
    squared_gradient: Callable[[float, int], float]
    """Expected squared norm of its gradient with respect to the student, less the part along the student, which unit
    length takes away; of the cosine between the two and the dimension D."""


METRICS: Mapping[Metric, DistillationMetric] = {
    "cosine": DistillationMetric(cosine_distance, lambda cosine, _: 1 - cosine**2),
    "l1": DistillationMetric(l1_distance, lambda cosine, dim: dim * (1 - (1 - cosine) / math.pi)),
}
"""Metrics of the distillation by the name that loss.metric takes."""


class LossWeights(Protocol):
    """Weights of the terms as the configuration holds them; 1 for each is the method."""

    @property
    def rpn(self) -> float:
        """Weight of both terms of the proposal network."""

    @property
    def rpn_box(self) -> float:
        """Further weight of the proposal network's box regression."""

    @property
    def classification(self) -> float:
        """Weight of the cross-entropy."""

    @property
    def box(self) -> float:
        """Weight of the box regression."""

    @property
    def mask(self) -> float:
        """Weight of the masks."""

    @property
    def distillation(self) -> float:
        """Weight of the distillation in units of L1's, see `distillation_scale`."""

    @property
    def metric(self) -> Metric:
        """Metric of the distillation."""


def loss_weights(weights: LossWeights, embed_dim: int) -> dict[str, float]:
    """Factor of each term in the objective, for embeddings of width `embed_dim`."""
    return {
        "rpn_objectness": weights.rpn,
        "rpn_box": weights.rpn * weights.rpn_box,
        "classification": weights.classification,
        "box": weights.box,
        "mask": weights.mask,
        "distillation": weights.distillation * distillation_scale(weights.metric, embed_dim),
    }


def weighted_sum(terms: Mapping[str, Tensor], factors: Mapping[str, float]) -> Tensor:
    """The objective: the sum of the terms that are there, each times its factor; a scalar float32."""
    return torch.stack([factors[name] * term.float() for name, term in terms.items()]).sum()


def distillation_scale(metric: Metric, embed_dim: int) -> float:
    """Multiplier of a distance that makes equal weights of the distillation mean equal gradients.

    At cosine c in D dimensions the gradient with respect to the unit embedding, less its part along the embedding
    (which unit length takes away), has the expected norm

        L1            sqrt(D (1 - (1 - c) / pi))
        1 - cosine    sqrt(1 - c^2)

    L1 keeps its scale: the authors' weight of 1 belongs to it. Another metric is multiplied by the ratio of L1's norm
    to its own at c = `REFERENCE_COSINE`; 1 - cosine by about 1.33 sqrt(D): 15.1 at D = 128, 30.1 at D = 512. Elsewhere
    they differ: L1's norm hardly changes with c, that of the cosine falls to zero as c rises to 1.

    Args:
        metric: of the distance.
        embed_dim: D.
    """
    of_l1, of_metric = (METRICS[m].squared_gradient(REFERENCE_COSINE, embed_dim) for m in ("l1", metric))
    return math.sqrt(of_l1 / of_metric)


def distillation_loss(embedding: Tensor, target: Tensor, weight: Tensor, metric: Metric) -> Tensor:
    """Weighted mean distance of region embeddings to the cached embeddings, by plain torch.

    Args:
        embedding: student, (R, D), any length.
        target: teacher, (R, D), any float dtype and length.
        weight: (R,), see `region_weights`.
        metric: a name in `METRICS`.

    Returns:
        A scalar; see `ezsd.kernels.distance.mean_distance` for zero rows and zero weights.
    """
    return mean_distance(embedding, target, weight, METRICS[metric].distance)


def delta_scale(device: torch.device) -> Tensor:
    """`DELTA_SCALE` on a device, (4,) float32; the host does not wait for it."""
    return to_device(torch.tensor(DELTA_SCALE), device)


def encode_boxes(reference: Tensor, target: Tensor) -> Tensor:
    """Deltas (R, 4) that move reference boxes onto targets; both (R, 4) xyxy with positive sides."""
    return deltas_between(reference, target) * delta_scale(reference.device)


def decode_boxes(reference: Tensor, deltas: Tensor) -> Tensor:
    """The inverse of `encode_boxes`, with a limited growth, see `ezsd.boxes.apply_deltas`."""
    return apply_deltas(reference, deltas.float() / delta_scale(deltas.device))


def classification_loss(logits: Tensor, label: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of the regions that count against names and background. Zero where none does.

    Novel classes compete where their logits are given: a base object is known to be none of them.

    Args:
        logits: of base classes, then of any novel classes, then of background, (R, C + 1).
        label: a base class or the background's number C, (R,) int64.
        counted: marks the regions that count, (R,) bool; the others are padding. None where all do.
    """
    counted = torch.ones_like(label, dtype=torch.bool) if counted is None else counted
    every = F.cross_entropy(logits.float(), label, reduction="none")
    return (every * counted).sum() / counted.sum().clamp(min=1)


def seesaw_logits(logits: Tensor, label: Tensor, class_counts: Tensor) -> Tensor:
    """Logits whose cross-entropy is Seesaw loss: a class with few objects is not pushed down by those of many.

    For a region of base class i, the odds of another base class j are multiplied by

        min(1, N_j / N_i) ** MITIGATION * max(1, p_j / p_i) ** COMPENSATION

    with the numbers of objects N (at least 1) and the probabilities p of the softmax over the base classes, through
    which no gradient flows. Background and novel classes have no number of objects: their odds stay, and so do all
    odds of regions on background.

    Args:
        logits: of base classes, then of any novel classes, then of background, (R, C + 1).
        label: (R,) int64, see `classification_loss`.
        class_counts: objects of each base class that training has shown, (B,), B <= C.

    Returns:
        (R, C + 1) float32.

    Source: Wang et al., "Seesaw Loss for Long-Tailed Instance Segmentation", arXiv 2008.10032. Its authors classify
    among names alone, beside an objectness; here background is in the softmax.
    """
    logits, base = logits.float(), len(class_counts)
    own = label.clamp(max=base - 1)[:, None]
    amount = class_counts.clamp(min=1).float().log()
    probability = logits.detach()[:, :base].log_softmax(1)
    least = probability.gather(1, own).clamp(min=math.log(LEAST_PROBABILITY))
    factor = MITIGATION * (amount - amount[own]).clamp(max=0) + COMPENSATION * (probability - least).clamp(min=0)
    return logits + F.pad(factor * (label < base)[:, None], (0, logits.shape[1] - base))


def box_loss(deltas: Tensor, target: Tensor, positive: Tensor, *, sampled: Tensor) -> Tensor:
    """L1 over the positives' deltas, summed over coordinates and divided by the number of sampled regions.

    Args:
        deltas: (P, 4).
        target: (P, 4).
        positive: marks the positives, (P,) bool; the others are padding.
        sampled: number of regions, a scalar.
    """
    apart = torch.where(positive[:, None], deltas.float() - target, 0)
    return apart.abs().sum() / sampled.clamp(min=1)


def mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean binary cross-entropy of the cells of P masks (P, M, M); zero when P is 0."""
    total = F.binary_cross_entropy_with_logits(logits.float(), target, reduction="sum")
    return total / max(target.numel(), 1)


def region_weights(confidence: Tensor, image_index: Tensor, *, images: int) -> Tensor:
    """Weights whose mean is one within each image.

    Args:
        confidence: 1 for ground truth, the teacher's confidence for a proposal; (R,) in (0, 1].
        image_index: (R,) int64 in 0 .. images - 1.
        images: B.

    Returns:
        (R,) float32.
    """
    total = torch.zeros(images, device=confidence.device).index_add_(0, image_index, confidence)
    count = torch.zeros_like(total).index_add_(0, image_index, torch.ones_like(confidence))
    return confidence * (count / total.clamp(min=1e-12))[image_index]
