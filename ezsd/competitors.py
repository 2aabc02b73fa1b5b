"""Which of a detector's own names compete, unseen, with the names that are asked for.

A softmax over the asked names alone has to call every object by one of them. So the names that the detector was trained
for take part at test time, and their detections are dropped. A name that says the same as an asked one must not take
part: it would take away that one's detections.
"""

import torch
from torch import Tensor
from torch.nn import functional

NEAR = 0.62
"""An own name with at least this cosine to an asked name, once the own names' mean row is taken off both, steps aside.

Rows of one teacher are alike whatever they name (CLIP's have a cosine of 0.8), so only what is left without their mean
tells names apart. Measured on text rows alone, see docs/method.md: two names of COCO have at most 0.61, 18 of 19 pairs
of synonyms at least 0.63.
"""


def competition(asked: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Which of a detector's own names compete with asked ones, and which step aside.

    An own name that is asked for is simply itself, and neither. Only an asked name that is no own one makes others step
    aside: two own names have competed in training.

    Args:
        asked: unit text rows of the names to look for, (C, D).
        own: unit text rows of the names that the detector was trained for, (K, D). Both on the CPU.

    Returns:
        competing and aside, (K,) bool each.
    """
    itself, mean = _among(own, asked), own.mean(0)
    others = functional.normalize(asked[~_among(asked, own)] - mean, dim=1)
    near = (functional.normalize(own - mean, dim=1) @ others.T >= NEAR).any(1)
    return ~itself & ~near, ~itself & near


def _among(rows: Tensor, table: Tensor) -> Tensor:
    """Whether each row stands in a table, to the last bit, (R,) bool."""
    known = {row.numpy().tobytes() for row in table}
    return torch.tensor([row.numpy().tobytes() in known for row in rows], dtype=torch.bool)
