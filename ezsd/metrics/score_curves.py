"""Precision and recall of each class over the score, at IoU 0.5: the figures that a threshold is chosen by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ezsd.metrics.evaluation import is_verified
from ezsd.metrics.ground_truth import Truth
from ezsd.metrics.limits import Limit
from ezsd.metrics.matching import match
from ezsd.metrics.results import Results


class ThresholdScores(NamedTuple):
    """Figures of the detections of a class with at least some score."""

    threshold: float
    """Least score of a detection that counts."""
    precision: float | None
    """Fraction of these detections that are right; None without one."""
    recall: float | None
    """Fraction of the objects that they find; None without an object."""

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 0 where either is none."""
        precision, recall = self.precision or 0.0, self.recall or 0.0
        return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoreCurve:
    """Detections of one class that are right or wrong, the surest first, N in all."""

    score: npt.NDArray[np.float64]
    """Descending, (N,)."""
    right: npt.NDArray[np.bool_]
    """True for a detection that is a true positive of AP50, (N,)."""
    objects: int
    """Objects of the class that can be found or missed."""

    @property
    def precision(self) -> npt.NDArray[np.float64]:
        """Fraction of the first detections that are right, up to and with each, (N,)."""
        return np.asarray(np.cumsum(self.right) / np.arange(1, len(self.right) + 1), np.float64)

    @property
    def recall(self) -> npt.NDArray[np.float64]:
        """Fraction of the objects that the first detections find, up to and with each, (N,); 0 without an object."""
        return np.asarray(np.cumsum(self.right) / max(self.objects, 1), np.float64)

    def at(self, threshold: float) -> ThresholdScores:
        """Precision and recall of the detections with at least this score."""
        kept = self.right[self.score >= threshold]
        return ThresholdScores(
            threshold,
            float(kept.mean()) if len(kept) else None,
            float(kept.sum() / self.objects) if self.objects else None,
        )

    def best(self) -> ThresholdScores | None:
        """Figures at the threshold of the highest F1, of equal ones the highest, in steps of 0.01.

        None where no detection that a threshold can keep is right.
        """
        thresholds = np.arange(99, 0, -1) / 100
        kept = np.searchsorted(-self.score, -thresholds, side="right")
        found = np.concatenate([[0], np.cumsum(self.right)])[kept]
        best = int((found / np.maximum(kept + self.objects, 1)).argmax())
        return self.at(float(thresholds[best])) if found[best] else None


def score_curves(truth: Truth, results: Results, *, limit: Limit) -> dict[str, ScoreCurve]:
    """Sort the detections of each class of the split by score and mark those that are right.

    Detections that count neither way, such as those on crowd regions, are left out, by the rules of `evaluate`.

    Args:
        truth: the objects.
        results: the detections, of images of the truth and of classes of its split.
        limit: which detections count.

    Returns:
        A curve by class name, in the order of the split; also of classes without objects or detections.
    """
    rows = np.flatnonzero(limit.mask(results) & (results.class_index >= 0))
    rows = rows[is_verified(truth, results, rows)]
    matches = match(truth, results, rows)["all"]
    counted = ~matches.ignored[0]
    row, right = matches.row[counted], matches.matched[0, counted]
    objects = np.bincount(truth.class_index[~truth.ignore], minlength=len(truth.split.names))
    found = {}
    for index, name in enumerate(truth.split.names):
        of_class = np.flatnonzero(results.class_index[row] == index)
        order = of_class[np.argsort(-results.score[row[of_class]], kind="stable")]
        found[name] = ScoreCurve(score=results.score[row[order]], right=right[order], objects=int(objects[index]))
    return found
