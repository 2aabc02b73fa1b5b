"""Limits on the detections that count, per image or per image and class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ezsd.metrics.results import Results


@dataclass(frozen=True, slots=True)
class Limit:
    """Number of an image's best detections that count; equal scores count in the order given.

    Raises:
        ValueError: `count` is below 1.
    """

    count: int
    per_class: bool = False
    """True for pycocotools' own `maxDets`, which counts each class of an image by itself; False for what papers and
    the official lvis package mean by detections per image. The same wherever no image has more than `count`."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"a limit must be at least 1 detection, got {self.count}")

    @property
    def label(self) -> str:
        """Key of the limit in a table of evaluations: "100", "300", "100 per class"."""
        return f"{self.count} per class" if self.per_class else str(self.count)

    @property
    def counted(self) -> str:
        """Scope of the number: "image", or "image and class"."""
        return "image and class" if self.per_class else "image"

    def mask(self, results: Results) -> npt.NDArray[np.bool_]:
        """True for each detection that counts, (N,)."""
        groups = (results.image_id, results.class_index) if self.per_class else (results.image_id,)
        kept: npt.NDArray[np.bool_] = ranks(results.score, *groups) < self.count
        return kept


def ranks(score: npt.NDArray[np.float64], *groups: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Rank of each detection among those of its group, best first from 0, (N,)."""
    order = np.lexsort((-score, *groups))
    position = np.arange(len(score))
    new = np.zeros(len(score), dtype=np.bool_)
    new[:1] = True
    for group in groups:
        new[1:] |= group[order][1:] != group[order][:-1]
    rank = np.empty(len(score), dtype=np.int64)
    rank[order] = position - np.maximum.accumulate(np.where(new, position, 0))
    return rank
