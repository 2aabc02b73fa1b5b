"""Outlines of objects as a browser draws them."""

from __future__ import annotations

import numpy as np
from contourpy import contour_generator
from numpy.typing import NDArray

from ezsd.data.masks import Outline, decode, to_box

OUTLINE_POINTS = 120
"""Most points of the outlines of a mask, about, unless another number is asked for."""
_RINGS = 8
"""Most outlines of a mask, the longest: one of scattered pixels has hundreds."""


def outlines(outline: Outline, height: int, width: int, *, points: int = OUTLINE_POINTS) -> list[str]:
    """Rings of an object, each as points of SVG's polygon in pixels of the image.

    A polygon has its own points. A mask's outlines follow its pixels; holes run the other way round, so that the rule
    "nonzero" leaves them empty.

    Args:
        outline: a polygon, or run lengths of a mask over the image.
        height: of the image.
        width: of the image.
        points: most points of a mask's outlines together, about.
    """
    if not isinstance(outline, bytes):
        return [_as_text(ring) for ring in outline]
    left, top, wide, high = (int(side) for side in to_box(outline, height, width))
    # A rim of nothing closes outlines at the image's border.
    pixels = np.pad(decode(outline, height, width)[top : top + high, left : left + wide], 1)
    if not pixels.any():
        return []
    lines = contour_generator(z=pixels.astype(np.float64)).lines(0.5)
    # Centres of pixels, shifted by the rim; the last point is the first.
    shift = np.array([left - 0.5, top - 0.5])
    rings = sorted((np.asarray(line)[:-1] + shift for line in lines), key=lambda ring: -len(ring))[:_RINGS]
    whole = sum(map(len, rings))
    found = []
    for ring in rings:
        most = max(4, points * len(ring) // whole)
        found.append(_as_text(ring[np.unique(np.linspace(0, len(ring) - 1, most).round().astype(int))]))
    return found


def _as_text(ring: NDArray[np.float64]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in ring.round(1).tolist())
