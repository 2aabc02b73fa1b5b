"""Curves over the steps of a training: loss and its parts, learning rate, and AP50 of the validations in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from numpy.typing import NDArray

from ezsd.pipeline.report.run_data import RunData
from ezsd.pipeline.report.svg import RULE, drawn, run_colour

_CURVE_POINTS = 80
_DASHES = ("-", "--", ":", "-.")
_SIZE = (3.5, 2.1)


def training_curves(runs: Sequence[RunData]) -> dict[str, Markup]:
    """Small charts of the loss, its parts and the learning rate by their names, all runs in each.

    Empty without metrics.
    """
    parts = dict.fromkeys(key for run in runs for line in run.metrics for key in line)
    kept = [part for part in parts if part not in ("step", "seconds")]
    # The learning rate last.
    kept.sort(key=lambda part: part == "learning_rate")
    return {
        part.replace("_", " "): drawn(
            partial(_draw, [_averaged(run.metrics, part) for run in runs]),
            size=_SIZE,
            prefix=f"curve-{number}",
            label=f"{part.replace('_', ' ')} over training steps",
        )
        for number, part in enumerate(kept)
    }


def validation_curves(runs: Sequence[RunData]) -> dict[str, Markup]:
    """Small charts of AP50 in percent on the validation slice, base, novel and all classes, all runs in each.

    Empty where no run has validated while it was trained.
    """
    if not any(run.validation for run in runs):
        return {}
    return {
        f"AP50 of {group} classes, %": drawn(
            partial(_draw, [_scores(run.validation, group) for run in runs], most=100.0, marker="."),
            size=_SIZE,
            prefix=f"validation-{group}",
            label=f"AP50 of {group} classes in percent over training steps",
        )
        for group in ("base", "novel", "all")
    }


def _draw(
    lines: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]],
    axes: Axes,
    *,
    most: float | None = None,
    marker: str = "",
) -> None:
    """Draw a line for each run, up to `most`, or else up to the highest value after the first spans."""
    highest = 0.0
    for i, (steps, values) in enumerate(lines):
        axes.plot(steps, values, _DASHES[i % len(_DASHES)], color=run_colour(i), linewidth=1.4, marker=marker)
        # The first spans are often far above all others and would flatten them.
        highest = max([highest, *values[len(values) // 20 :].tolist()])
    axes.set_ylim(0, most or 1.08 * highest or 1)
    axes.set_xlabel("training step")
    axes.grid(axis="y", color=RULE, linewidth=0.5)


def _averaged(metrics: Sequence[Mapping[str, float]], part: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and values, means over equal spans, at most `_CURVE_POINTS` of each."""
    points = np.array([(line["step"], line[part]) for line in metrics if part in line], np.float64).reshape(-1, 2)
    spans = np.array_split(points, min(len(points), _CURVE_POINTS)) if len(points) else []
    means = np.array([span.mean(0) for span in spans]).reshape(-1, 2)
    return means[:, 0], means[:, 1]


def _scores(
    validation: Sequence[Mapping[str, float | None]], group: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps of the validations that have a figure of a group, and the figures in percent."""
    known = [(line["step"], 100 * score) for line in validation if (score := line.get(group)) is not None]
    points = np.array(known, np.float64).reshape(-1, 2)
    return points[:, 0], points[:, 1]
