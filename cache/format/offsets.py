"""Images of rows, by the offsets of a per-image product."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_LISTED = 8
"""Most images named in one line."""


def image_places(offset: NDArray[np.int64], rows: Sequence[tuple[int, int]]) -> list[int]:
    """Positions of the images that own any of these rows, in order."""
    found: set[int] = set()
    for start, stop in rows:
        first = int(np.searchsorted(offset, start, side="right")) - 1
        last = int(np.searchsorted(offset, stop, side="left"))
        # Rows outside of all offsets, which only damaged or made-up ones leave, belong to no image.
        owners = range(max(first, 0), min(last, len(offset) - 1))
        found |= {place for place in owners if offset[place] < offset[place + 1]}
    return sorted(found)


def of_images(images: Sequence[int]) -> str:
    """The images of lost rows as the end of a sentence; empty without any."""
    if not images:
        return ""
    shown = ", ".join(map(str, images[:_LISTED]))
    return f", of the images {shown}" + (f" and {len(images) - _LISTED} more" if len(images) > _LISTED else "")
