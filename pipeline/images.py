"""Image files, and one line for each way in which they cannot be read. Loads no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, UnidentifiedImageError

_NAMED = 3
"""Most images that one error names."""


class ImageError(ValueError):
    """A file is missing, damaged, no image, or not the one that the annotations describe."""


def portable_reason(error: ImageError, folder: Path) -> str:
    """What is wrong with an image below a folder, in words that hold wherever that lies or leads to."""
    return str(error).replace(f"{folder.resolve()}{os.sep}", "")


def most_bad_images(share: float, images: int) -> int:
    """How many images of a dataset a build may leave out, given `BuildConfig.max_bad_images`."""
    return int(share * images)


def require_few_bad(bad: Mapping[int, str], most: int) -> None:
    """Stop a build when more images cannot be read than it may leave out.

    Args:
        bad: by id, why.
        most: how many may be left out.

    Raises:
        ImageError: names the first ones.
    """
    if len(bad) > most:
        named = [bad[image] for image in sorted(bad)[:_NAMED]] + ["..."] * (len(bad) > _NAMED)
        raise ImageError(
            f"{len(bad)} images cannot be read, build.max_bad_images allows {most}: {'; '.join(named)}; mend them or "
            "raise the limit, and run the same command again"
        )


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
