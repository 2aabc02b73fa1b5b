"""Image files, and one line for each way in which they cannot be read. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, UnidentifiedImageError


class ImageError(ValueError):
    """A file is missing, damaged or no image."""


@contextmanager
def opened_image(path: Path) -> Iterator[Image.Image]:
    """An image file, of which nothing but its start is read before somebody asks for more.

    Raises:
        ImageError: it is missing or no image, or damage shows within the context.
    """
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise ImageError(f"{path}: no such image") from None
    except UnidentifiedImageError as error:
        raise ImageError(f"{path}: is no image") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow says SyntaxError of a broken table of EXIF, ValueError of a broken head of a PNG.
        raise ImageError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
