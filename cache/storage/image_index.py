"""Image ids of a store and their places in its order, in little memory however many there are."""

from bisect import bisect_left

import numpy as np
from numpy.typing import NDArray

_TABLE_BYTES = 16 * 2**20
"""A table of ids may be this large at least."""
_PIECE = 2**20


class ImageIndex:
    """Place of each image id.

    Ids that lie close together, as those of most datasets do, are looked up in a table of all numbers between the first
    and the last, of 4 bytes each; where that took more than 8 bytes an image, and more than 16 MiB, in a sorted copy.
    """

    def __init__(self, ids: NDArray[np.int64]) -> None:
        """Ids in the store's order, (n,); not kept."""
        self._low = int(ids.min()) if len(ids) else 0
        span = int(ids.max()) - self._low + 1 if len(ids) else 0
        self._table: memoryview | None = None
        if 4 * span <= max(8 * len(ids), _TABLE_BYTES):
            self._span = span
            self._table = _table(ids, self._low, span).data
        else:
            order = np.argsort(ids).astype(np.uint32 if len(ids) < 2**32 else np.int64)
            self._order, self._sorted = order.data, ids[order].data

    def place(self, image_id: int) -> int:
        """The place of an image; -1 for none of these ids."""
        if self._table is not None:
            at = image_id - self._low
            return self._table[at] - 1 if 0 <= at < self._span else -1
        at = bisect_left(self._sorted, image_id)
        return self._order[at] if at < len(self._sorted) and self._sorted[at] == image_id else -1


def _table(ids: NDArray[np.int64], low: int, span: int) -> NDArray[np.uint32]:
    """One more than the place of each number from `low` on, or 0, (span,)."""
    table = np.zeros(span, np.uint32)
    # In pieces: all ids at once would be copied twice over.
    for start in range(0, len(ids), _PIECE):
        piece = ids[start : start + _PIECE]
        table[piece - low] = np.arange(start + 1, start + 1 + len(piece), dtype=np.uint32)
    return table
