"""Competing classes: classes of a run that take part in the softmax although they were not requested.

A softmax over the requested classes only would assign every object to one of them. The classes that the detector was
trained on therefore take part at test time, and their detections are dropped. A synonym of a requested class must not
take part: it would take away the detections of that class.
"""

import torch
from torch import Tensor
from torch.nn import functional

NEAR = 0.62
"""Smallest cosine to a requested class, with the mean of the run's text embeddings subtracted, that makes a synonym.

All text embeddings of one teacher are similar (CLIP's have a cosine of 0.8), so only the difference from their mean
tells classes apart. Measured on text embeddings only, see docs/method.md: two classes of COCO have at most 0.61, 18 of
19 pairs of synonyms at least 0.63.
"""


def competition(asked: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Mark the run's classes that compete with the requested ones, and those excluded as synonyms.

    A class of the run that is requested is neither. Only a requested class from outside the run excludes synonyms: two
    classes of the run have competed in training.

    Args:
        asked: unit text embeddings of the requested classes, (C, D).
        own: unit text embeddings of the run's classes, (K, D). Both on the CPU.

    Returns:
        competing and excluded, (K,) bool each.
    """
    itself, mean = among(own, asked), own.mean(0)
    others = functional.normalize(asked[~among(asked, own)] - mean, dim=1)
    near = (functional.normalize(own - mean, dim=1) @ others.T >= NEAR).any(1)
    return ~itself & ~near, ~itself & near


def among(rows: Tensor, table: Tensor) -> Tensor:
    """Mark rows (R, D) that occur in a table (K, D) bit for bit: (R,) bool. Both on the CPU."""
    known = {row.numpy().tobytes() for row in table}
    return torch.tensor([row.numpy().tobytes() in known for row in rows], dtype=torch.bool)
