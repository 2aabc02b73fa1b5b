"""Matplotlib's figures as inline SVG in the page's own colours."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

RUN_COLOURS = 6
"""Colours that the page has for runs; more runs use them again."""
INK, RULE, BASE, NOVEL = "#010203", "#010204", "#010205", "#010206"
"""Colours to draw in, which the page's style replaces: of text, of lines, of base and of novel classes."""


def run_colour(number: int) -> str:
    """Colour to draw a run in, by its number among the runs."""
    return f"#0102{10 + number % RUN_COLOURS:02d}"


_VARIABLES = {run_colour(i): f"var(--run-{i})" for i in range(RUN_COLOURS)} | {
    INK: "currentColor",
    RULE: "var(--rule)",
    BASE: "var(--base-line)",
    NOVEL: "var(--novel-line)",
}


def drawn(draw: Callable[[Axes], None], *, size: tuple[float, float], prefix: str, label: str) -> Markup:
    """Draw a chart, coloured by the page's own style so that it follows light and dark.

    No text of a user may go into it: fonts lack letters, and matplotlib reads some texts as formulas.

    Args:
        draw: draws into the axes.
        size: width and height, inches.
        prefix: what ids inside begin with, unique on the page.
        label: the chart in words.
    """
    # The salt makes the same ids on every run; text stays text in the page's own font.
    with matplotlib.rc_context({"svg.hashsalt": "ezsd", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=size)
        width, height = size
        # Fixed margins, in inches: a layout engine draws everything twice to find them.
        axes = figure.add_axes((0.62 / width, 0.42 / height, 1 - 0.78 / width, 1 - 0.52 / height))
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(RULE)
        axes.tick_params(color=RULE, labelcolor=INK, length=3)
        for axis in (axes.xaxis, axes.yaxis):
            axis.label.set_color(INK)
        document = io.StringIO()
        figure.savefig(document, format="svg", transparent=True, metadata={"Date": None})
    return _inline(document.getvalue(), prefix, label)


def _inline(document: str, prefix: str, label: str) -> Markup:
    """The svg element of a document, without addresses, with ids of its own and the page's colours."""
    svg = document[document.index("<svg") :].strip()
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    opening = re.match(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', svg)
    assert opening is not None
    svg = f'<svg {opening[1]} role="img" aria-label="{escape(label)}">{svg[opening.end() :]}'
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return Markup(svg)
