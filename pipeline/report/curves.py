"""Training curves as inline SVG in the page's own colours."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ezsd.pipeline.report.run_data import RunData

RUN_COLOURS = 6
"""Colours that the page has for runs; more runs use them again."""
_CURVE_POINTS = 80
_INK_STAND_IN, _RULE_STAND_IN = "#010203", "#010204"
_DASHES = ("-", "--", ":", "-.")


def training_curves(runs: Sequence[RunData]) -> dict[str, Markup]:
    """Small charts of the loss and its parts by their names, all runs in each; empty without metrics."""
    parts = dict.fromkeys(key for run in runs for line in run.metrics for key in line)
    losses = [part for part in parts if part not in ("step", "seconds", "learning_rate")]
    return {part.replace("_", " "): _curve(part, runs, number) for number, part in enumerate(losses)}


def _curve(part: str, runs: Sequence[RunData], number: int) -> Markup:
    """Draw a small chart, coloured by the page's own style so that it follows light and dark."""
    # The salt makes the same ids on every run; text stays text in the page's own font.
    with matplotlib.rc_context({"svg.hashsalt": "ezsd", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(3.5, 1.9), layout="constrained")
        axes = figure.add_subplot()
        highest = 0.0
        for i, run in enumerate(runs):
            steps, values = _averaged(run.metrics, part)
            axes.plot(steps, values, _DASHES[i % len(_DASHES)], color=_run_stand_in(i % RUN_COLOURS), linewidth=1.4)
            # The first spans are often far above all others and would flatten them.
            highest = max([highest, *values[len(values) // 20 :].tolist()])
        axes.set_ylim(0, 1.08 * highest or 1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_RULE_STAND_IN)
        axes.tick_params(color=_RULE_STAND_IN, labelcolor=_INK_STAND_IN, length=3)
        axes.grid(axis="y", color=_RULE_STAND_IN, linewidth=0.5)
        document = io.StringIO()
        figure.savefig(document, format="svg", transparent=True, metadata={"Date": None})
    return _inline_svg(document.getvalue(), f"curve-{number}", f"{part.replace('_', ' ')} over training steps")


def _run_stand_in(number: int) -> str:
    """Colour that Matplotlib draws a run in, replaced by the page's style afterwards."""
    return f"#0102{10 + number:02d}"


def _averaged(metrics: Sequence[Mapping[str, float]], part: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and values, means over equal spans, at most `_CURVE_POINTS` of each."""
    points = np.array([(line["step"], line[part]) for line in metrics if part in line], np.float64).reshape(-1, 2)
    spans = np.array_split(points, min(len(points), _CURVE_POINTS)) if len(points) else []
    means = np.array([span.mean(0) for span in spans]).reshape(-1, 2)
    return means[:, 0], means[:, 1]


def _inline_svg(document: str, prefix: str, label: str) -> Markup:
    """The svg element of a document, without addresses, with ids of its own and the page's colours."""
    svg = document[document.index("<svg") :].strip()
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    opening = re.match(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', svg)
    assert opening is not None
    svg = f'<svg {opening[1]} role="img" aria-label="{escape(label)}">{svg[opening.end() :]}'
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    colours = {_run_stand_in(i): f"var(--run-{i})" for i in range(RUN_COLOURS)}
    colours |= {_INK_STAND_IN: "currentColor", _RULE_STAND_IN: "var(--rule)"}
    for colour, variable in colours.items():
        svg = svg.replace(colour, variable)
    return Markup(svg)
