"""Small charts of each class: precision over recall, and right and wrong detections by score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ezsd.metrics.score_curves import ScoreCurve, ThresholdScores

MOST_CHARTS = 80
"""Most classes with charts: a page of a thousand classes stays one that opens."""
LEAST_SCORE = 0.05
"""Least score in a histogram; a detector has hundreds of detections below it in each image."""
WIDTH, HEIGHT = 100, 60
"""Size of a chart's area, in its own units."""
_BINS = 19
_POINTS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """Detections with scores in a bin, in the units of the chart."""

    x: float
    right: float
    """Height of the right ones; 0 for none."""
    wrong: float
    """Height of the wrong ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassChart:
    """Charts of a class."""

    name: str
    novel: bool
    ap50: float | None
    objects: int
    line: str
    """Points of precision over recall, as SVG's polyline has them."""
    best: ThresholdScores | None
    """Threshold of the highest F1."""
    bars: Sequence[Bar]
    most: int
    """Detections of the highest bar."""
    width: float
    """Width of a bar."""

    @property
    def marked(self) -> tuple[float, float] | None:
        """Place of the threshold on the line."""
        if self.best is None:
            return None
        return round(WIDTH * (self.best.recall or 0), 1), round(HEIGHT * (1 - (self.best.precision or 0)), 1)

    @property
    def threshold_x(self) -> float | None:
        """Place of the threshold among the bars; None where it is left of them."""
        if self.best is None or self.best.threshold < LEAST_SCORE:
            return None
        return _place(self.best.threshold)

    @property
    def middle(self) -> float:
        """Place of the score 0.5 among the bars."""
        return _place(0.5)


def class_charts(
    curves: Mapping[str, ScoreCurve], ap50: Mapping[str, float | None], base_count: int
) -> list[ClassChart]:
    """Charts of the classes that have objects, novel ones first, then lowest AP50 first; at most `MOST_CHARTS`."""
    position = {name: index for index, name in enumerate(curves)}
    shown = [name for name, curve in curves.items() if curve.objects]
    shown.sort(key=lambda name: (position[name] < base_count, ap50.get(name) or 0.0, position[name]))
    return [
        _chart(name, curves[name], ap50.get(name), novel=position[name] >= base_count) for name in shown[:MOST_CHARTS]
    ]


def _chart(name: str, curve: ScoreCurve, ap50: float | None, *, novel: bool) -> ClassChart:
    edges = np.linspace(LEAST_SCORE, 1, _BINS + 1)
    # Scores are probabilities; one above 1 by rounding belongs to the last bin.
    score = np.minimum(curve.score, 1.0)
    right, wrong = (np.histogram(score[marks], edges)[0] for marks in (curve.right, ~curve.right))
    most = int(max(right.max(), wrong.max()))
    width = WIDTH / _BINS
    bars = [
        Bar(x=round(i * width, 1), right=_height(int(right[i]), most), wrong=_height(int(wrong[i]), most))
        for i in range(_BINS)
        if right[i] or wrong[i]
    ]
    return ClassChart(
        name=name,
        novel=novel,
        ap50=ap50,
        objects=curve.objects,
        line=_line(curve.recall[curve.right], curve.precision[curve.right]),
        best=curve.best(),
        bars=bars,
        most=most,
        width=round(width, 1),
    )


def _place(score: float) -> float:
    """Place of a score among the bars."""
    return round(WIDTH * (score - LEAST_SCORE) / (1 - LEAST_SCORE), 1)


def _line(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> str:
    """Points of a line at right detections, where precision is highest, at most `_POINTS`."""
    if not len(recall):
        return ""
    kept = np.unique(np.linspace(0, len(recall) - 1, _POINTS).round().astype(int))
    return " ".join(f"{WIDTH * recall[i]:.1f},{HEIGHT * (1 - precision[i]):.1f}" for i in kept)


def _height(count: int, most: int) -> float:
    """Height of a bar on a logarithmic scale, on which one detection can be seen beside a thousand."""
    return round(HEIGHT * math.log1p(count) / math.log1p(most), 1) if count else 0.0
