"""Images as a browser gets them."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ezsd.pipeline.inference.visualize import jpeg_bytes

LONG_SIDE = 2048
"""Longest side of an image on the page, pixels: larger ones are scaled down."""
THUMBNAIL_SIDE = 96
_LOSSLESS_SIDE = 512
"""Long side up to which an image is sent without loss, pixels: its pixels can be told apart on a screen."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An encoded image."""

    data: bytes
    kind: str
    """Media type."""


def encoded(pixels: NDArray[np.uint8]) -> Picture:
    """An image (H, W, 3) RGB for the page."""
    picture = Image.fromarray(pixels)
    if max(picture.size) <= _LOSSLESS_SIDE:
        data = io.BytesIO()
        picture.save(data, "PNG")
        return Picture(data.getvalue(), "image/png")
    picture.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.LANCZOS)
    return Picture(jpeg_bytes(picture, quality=88), "image/jpeg")


def thumbnail(pixels: NDArray[np.uint8]) -> Picture:
    """A small picture of an image (H, W, 3) RGB."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return Picture(jpeg_bytes(picture, quality=75), "image/jpeg")
