"""Unit vectors as int8 and one float32 scale per row: half the bytes of float16."""

import numpy as np
from numpy.typing import NDArray

_LEVELS = 127
_ROWS = 4096
"""Rows handled at once: the float32 copies of a whole block would be its size four times over."""


def quantise(embedding: NDArray[np.float16]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round unit rows (N, D) to int8 (N, D) and scales (N,), so that `int8 * scale` has unit length again.

    The largest number of a row becomes 127 or -127. The scale is one over the length of the whole numbers, not the
    step of the rounding: it changes no direction and leaves a length of 1 within the precision of float32. A row
    that went through this once comes out the same when it goes through again, also by way of float16.
    """
    codes = np.empty(embedding.shape, np.int8)
    scale = np.empty(len(embedding), np.float32)
    for start in range(0, len(embedding), _ROWS):
        rows = embedding[start : start + _ROWS].astype(np.float32)
        step = np.abs(rows).max(axis=1, keepdims=True) / np.float32(_LEVELS)
        part = np.rint(rows / step).astype(np.int8)
        codes[start : start + _ROWS] = part
        # Whole numbers in float64: the sum is exact in whatever order it is taken.
        squares = np.square(part.astype(np.float64)).sum(axis=1)
        scale[start : start + _ROWS] = 1 / np.sqrt(squares)
    return codes, scale


def dequantise(codes: NDArray[np.int8], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Unit rows (N, D) float32 of what `quantise` made."""
    return codes.astype(np.float32) * scale[:, None]
