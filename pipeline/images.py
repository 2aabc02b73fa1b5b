"""Image files, and one line for each way in which they cannot be read. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, UnidentifiedImageError

if TYPE_CHECKING:
    from pipeline.config import BuildConfig

_NAMED = 3
"""Most images that one error names."""


class ImageError(ValueError):
    """A file is missing, damaged, no image, or not the one that the annotations describe."""


def require_few_bad(bad: Mapping[int, ImageError], config: BuildConfig, images: int) -> None:
    """Stop a build when more images cannot be read than it may leave out.

    Args:
        bad: what is wrong with them, by id.
        config: says how many may be left out.
        images: of the whole dataset.

    Raises:
        ImageError: names the first ones; the only one's own error where none may be left out.
    """
    most = int(config.max_bad_images * images)
    if len(bad) <= most:
        return
    named = [bad[image] for image in sorted(bad)[:_NAMED]]
    if most == 0 and len(bad) == 1:
        raise named[0]
    raise ImageError(
        f"{len(bad)} images cannot be read, more than the {most} that build.max_bad_images={config.max_bad_images:g} "
        f"allows: {'; '.join(map(str, named))}{'; ...' if len(bad) > _NAMED else ''}; mend them or raise the limit, and "
        "run the same command again"
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
