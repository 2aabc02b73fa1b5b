"""Average precision: precision over recall of each class from its matches, and means over classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from ezsd.metrics.matching import THRESHOLDS, Matches, Size

RECALLS = np.linspace(0.0, 1.0, 101)
"""Recall thresholds at which a precision curve is read, R of them."""
_AP50, _AP75 = 0, 5


class ClassScores(TypedDict):
    """Figures of one class; None if it has no ground truth or was not evaluated."""

    AP: float | None
    """Average precision in [0, 1], mean over IoU 0.50, 0.55 .. 0.95."""
    AP50: float | None
    """AP at IoU 0.50."""
    AP75: float | None
    """AP at IoU 0.75."""
    AR: float | None
    """Recall in [0, 1], mean over the ten IoU thresholds."""
    AP_small: float | None
    """AP of objects of up to 32 x 32 pixels, mean over classes that have some; see `ezsd.metrics.matching.AREAS`."""
    AP_medium: float | None
    """AP of objects from 32 x 32 to 96 x 96 pixels."""
    AP_large: float | None
    """AP of objects from 96 x 96 pixels on."""
    AR_small: float | None
    """AR of objects of up to 32 x 32 pixels."""
    AR_medium: float | None
    """AR of objects from 32 x 32 to 96 x 96 pixels."""
    AR_large: float | None
    """AR of objects from 96 x 96 pixels on."""
    boxes: int
    """Ground-truth boxes that can be found or missed."""


class GroupScores(ClassScores):
    """Means over the classes of a group which have ground truth; None if none has."""

    classes: int
    """Evaluated classes of the group which have ground truth."""


class Curves:
    """Precision (T thresholds, R recalls, K classes) and recall (T, K); -1 throughout a class without boxes."""

    def __init__(self, boxes: npt.NDArray[np.int64]) -> None:
        self.boxes = boxes
        self.precision = -np.ones((len(THRESHOLDS), len(RECALLS), len(boxes)))
        self.recall = -np.ones((len(THRESHOLDS), len(boxes)))

    def add(self, k: int, score: npt.NDArray[np.float64], matches: Matches) -> None:
        """Fill in class `k` from the scores and matches of its detections, both in the order of images."""
        boxes = int(self.boxes[k])
        if not boxes:
            return
        order = np.argsort(-score, kind="stable")
        matched, ignored = matches.matched[:, order], matches.ignored[:, order]
        true_positives = np.cumsum(matched & ~ignored, axis=1).astype(np.float64)
        false_positives = np.cumsum(~matched & ~ignored, axis=1).astype(np.float64)
        recall = true_positives / boxes
        precision = true_positives / (false_positives + true_positives + np.spacing(1))
        # The best precision at this recall or a higher one.
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        self.recall[:, k] = recall[:, -1] if len(score) else 0
        for t in range(len(THRESHOLDS)):
            at = np.searchsorted(recall[t], RECALLS, side="left")
            reached = at < len(score)
            self.precision[t, :, k] = 0
            self.precision[t, reached, k] = precision[t, at[reached]]

    def mean_precision(self, member: npt.NDArray[np.bool_]) -> float | None:
        """Mean precision over all thresholds, recalls and the classes in `member`, (K,); None without boxes."""
        return _mean(self.precision[:, :, member])

    def mean_recall(self, member: npt.NDArray[np.bool_]) -> float | None:
        """Mean recall over all thresholds and the classes in `member`, (K,); None without boxes."""
        return _mean(self.recall[:, member])


def class_scores(curves: Mapping[Size, Curves], member: npt.NDArray[np.bool_]) -> ClassScores:
    """Figures of the classes in `member`, (K,), from the curves of each object size."""
    every = curves["all"]
    return ClassScores(
        AP=every.mean_precision(member),
        AP50=_mean(every.precision[_AP50][:, member]),
        AP75=_mean(every.precision[_AP75][:, member]),
        AR=every.mean_recall(member),
        AP_small=curves["small"].mean_precision(member),
        AP_medium=curves["medium"].mean_precision(member),
        AP_large=curves["large"].mean_precision(member),
        AR_small=curves["small"].mean_recall(member),
        AR_medium=curves["medium"].mean_recall(member),
        AR_large=curves["large"].mean_recall(member),
        boxes=int(every.boxes[member].sum()),
    )


def group_scores(curves: Mapping[Size, Curves], member: npt.NDArray[np.bool_]) -> GroupScores:
    """Figures of the classes in `member`, (K,), and how many of them have ground truth."""
    return GroupScores(**class_scores(curves, member), classes=int((curves["all"].boxes[member] > 0).sum()))


def _mean(values: npt.NDArray[np.float64]) -> float | None:
    """Mean of the entries that are not -1; None if all are."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None
