"""Label files: small files of others, one for each image."""

from __future__ import annotations

from pathlib import Path

from ezsd.data.records import unfit

MOST_BYTES = 2**24
"""Size of the largest label file that is read."""
BOX_DIGITS = 4
"""Decimals of a pixel to which boxes are rounded: label files are less exact."""
FILE_CURE = "Correct or remove the file."
"""Advice for a file that cannot be read as a whole."""


def read_label_file(path: Path) -> bytes:
    """All bytes of a label file.

    Raises:
        AnnotationError: it cannot be read, or is larger than `MOST_BYTES`.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError as error:
        cure = "Add it, or take its name out of the list of the images."
        raise unfit(path, "the file", "a label file", "none of this name", cure) from error
    except OSError as error:
        raise unfit(path, "the file", "a readable file", error.strerror or str(error), FILE_CURE) from error
    if len(data) > MOST_BYTES:
        raise unfit(path, "the file", f"at most {MOST_BYTES:,} bytes", "more", FILE_CURE)
    return data
