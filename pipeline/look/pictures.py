"""Images with boxes over them, for a page: the image as a JPEG, the boxes as numbers that the page draws."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ezsd.cache import RegionRows
from ezsd.pipeline.inference.visualize import jpeg_url

LONG_SIDE = 448
"""Longest side of an image on the page, pixels; smaller ones stay as they are."""
COLOURS = 8
"""Colours that the page has for guesses; the last is for all names beyond."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A box on an image of the page."""

    name: str
    x: float
    """Left edge, pixels of the image; likewise `y`, the upper one."""
    y: float
    width: float
    height: float
    confidence: float = 0.0
    """Confidence of the teacher, of a region."""
    tier: int = 0
    """First choice of "best boxes" that shows a region."""
    colour: int = 0
    """Number of a region's colour."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """An image of the page."""

    file_name: str
    address: str
    """The image itself, as a data URL."""
    width: int
    """Width of the image, pixels; boxes are in these."""
    height: int
    regions: Sequence[Box]
    """Best first."""
    base: Sequence[Box]
    novel: Sequence[Box]
    """Empty unless this is evaluation."""

    @property
    def base_names(self) -> str:
        """Names of the base objects, with their numbers."""
        return _counted(self.base)

    @property
    def novel_names(self) -> str:
        """Names of the novel objects, with their numbers."""
        return _counted(self.novel)


def tiers(top: int) -> list[int]:
    """Choices of how many of an image's best regions are shown, ascending, up to all that are drawn."""
    return [count for count in (1, 3, 5, 10, 20, 50) if count < top] + [top]


def thumbnail(pixels: Tensor) -> str:
    """A small JPEG of an image (3, H, W) uint8, as a data URL."""
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    picture.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.LANCZOS)
    return jpeg_url(picture, quality=72)


def truth_boxes(box: NDArray[np.float32], names: Sequence[str]) -> list[Box]:
    """Annotated boxes (N, 4) with their names (N,)."""
    return [_box(corners, name) for corners, name in zip(box.tolist(), names, strict=True)]


def region_boxes(rows: RegionRows, names: Sequence[str], colours: dict[str, int], top: int) -> list[Box]:
    """The best regions of an image, at most `top`, with the teacher's guesses as positions in `names`."""
    steps = tiers(top)
    return [
        _box(
            corners,
            names[guess],
            confidence=confidence,
            tier=next(tier for tier, count in enumerate(steps) if rank < count),
            colour=colours.get(names[guess], COLOURS - 1),
        )
        for rank, (corners, guess, confidence) in enumerate(
            zip(rows.box[:top].tolist(), rows.class_index[:top].tolist(), rows.confidence[:top].tolist(), strict=True)
        )
    ]


def guess_colours(regions: Sequence[RegionRows], names: Sequence[str], top: int) -> dict[str, int]:
    """Colours of the names that are guessed most often of the drawn regions, most first; others share one."""
    counts = Counter(guess for rows in regions for guess in rows.class_index[:top].tolist())
    # Equal counts in the order of the vocabulary, whichever image comes first.
    frequent = sorted(counts, key=lambda guess: (-counts[guess], guess))
    return {names[guess]: colour for colour, guess in enumerate(frequent[: COLOURS - 1])}


def _counted(boxes: Sequence[Box]) -> str:
    counts = Counter(one.name for one in boxes)
    return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in counts.items())


def _box(corners: Sequence[float], name: str, **other: Any) -> Box:  # noqa: ANN401 - fields of `Box`
    x1, y1, x2, y2 = corners
    return Box(name=name, x=round(x1, 1), y=round(y1, 1), width=round(x2 - x1, 1), height=round(y2 - y1, 1), **other)
