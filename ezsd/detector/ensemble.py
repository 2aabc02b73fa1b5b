"""Geometric ensemble of a detector's scores with its teacher's (ViLD, arXiv 2104.13921; F-VLM, arXiv 2209.15639)."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ezsd.detector.model import Detections


def geometric_ensemble(found: Detections, probability: Tensor, weight: Tensor) -> Detections:
    """Score detections by p(detector)^(1 - w) p(teacher)^w, best first.

    Args:
        found: detections of one image, (N,).
        probability: the teacher's, of each detection's class, (N,) in [0, 1].
        weight: w of each detection, (N,) in [0, 1].
    """
    scores = found.scores ** (1 - weight) * probability**weight
    return dataclasses.replace(found, scores=scores).take(scores.argsort(descending=True, stable=True))
