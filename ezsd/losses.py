"""The objective of stage two: classification, box regression, distillation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ezsd.choices import Metric

DELTA_SCALE = (10.0, 10.0, 5.0, 5.0)
"""Box deltas are multiplied by these, so that they have a spread of about one."""

REFERENCE_COSINE = 0.7
"""Between student and teacher, where the metrics of the distillation pull equally hard."""


def distillation_scale(metric: Metric, embed_dim: int) -> float:
    """Multiplier of a distance that makes equal weights of the distillation mean equal gradients.

    At cosine c in D dimensions the gradient with respect to the unit embedding, less its part along the embedding
    (which unit length takes away), has the expected norm

        L1            sqrt(D (1 - (1 - c) / pi))
        1 - cosine    sqrt(1 - c^2)

    L1 keeps its scale: the authors' weight of 1 belongs to it. 1 - cosine is multiplied by the ratio of the two at
    c = `REFERENCE_COSINE`, about 1.33 sqrt(D): 15.1 at D = 128, 30.1 at D = 512. Elsewhere they differ: L1's norm
    hardly changes with c, that of the cosine falls to zero as c rises to 1.

    Args:
        metric: of the distance.
        embed_dim: D.
    """
    if metric == "l1":
        return 1.0
    c = REFERENCE_COSINE
    return math.sqrt(embed_dim * (1 - (1 - c) / math.pi) / (1 - c**2))


def encode_boxes(reference: Tensor, target: Tensor) -> Tensor:
    """Deltas (R, 4) that move reference boxes onto targets; both (R, 4) xyxy with positive sides."""
    size, wanted = reference[:, 2:] - reference[:, :2], target[:, 2:] - target[:, :2]
    centre, aim = reference[:, :2] + size / 2, target[:, :2] + wanted / 2
    deltas = torch.cat([(aim - centre) / size, (wanted / size).log()], 1)
    return deltas * deltas.new_tensor(DELTA_SCALE)


def decode_boxes(reference: Tensor, deltas: Tensor) -> Tensor:
    """The inverse of `encode_boxes`; growth is limited to 1000 / 16 per step, as torchvision limits it."""
    deltas = deltas.float() / deltas.new_tensor(DELTA_SCALE, dtype=torch.float32)
    size = reference[:, 2:] - reference[:, :2]
    centre = reference[:, :2] + size / 2 + deltas[:, :2] * size
    half = size * deltas[:, 2:].clamp(max=4.135166556742356).exp() / 2
    return torch.cat([centre - half, centre + half], 1)


def classification_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Mean cross-entropy against names and background. Zero when R is 0.

    Novel names compete where their logits are given: a base object is known to be none of them.

    Args:
        logits: of base names, then of any novel names, then of background, (R, C + 1).
        label: a base name or the background's number C, (R,) int64.
    """
    return F.cross_entropy(logits.float(), label, reduction="sum") / max(len(label), 1)


def box_loss(deltas: Tensor, target: Tensor, *, sampled: int) -> Tensor:
    """L1 over the positives' deltas (P, 4), summed over coordinates and divided by the number of sampled regions."""
    return F.l1_loss(deltas.float(), target, reduction="sum") / max(sampled, 1)


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
    count = torch.bincount(image_index, minlength=images)
    return confidence * (count / total.clamp(min=1e-12))[image_index]
