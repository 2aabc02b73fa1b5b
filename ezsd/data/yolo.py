"""YOLO's label files: one text file for each image, one line "class cx cy width height" for each box."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from pathlib import Path

from ezsd.data.label_file import BOX_DIGITS, FILE_CURE, read_label_file
from ezsd.data.records import unfit

_CURE = "Correct or remove the line."
# Tools round, and a box that ends at the image's edge may end behind it.
_ROUNDING = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class YoloBox:
    """A line of a label file."""

    line: int
    """Number of the line, from 1."""
    class_index: int
    """Position in the list of names."""
    centre: tuple[float, float]
    """Centre in x and y, as fractions of the image's width and height."""
    size: tuple[float, float]
    """Width and height, as fractions likewise."""

    def xywh(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Left, top, width and height in pixels of an image of this size."""
        (cx, cy), (w, h) = self.centre, self.size
        values = ((cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height)
        left, top, wide, high = (round(value, BOX_DIGITS) for value in values)
        return left, top, wide, high


def read_yolo(path: Path, classes: int) -> list[YoloBox]:
    """Read a label file; blank lines are skipped.

    Args:
        path: the file.
        classes: number of names.

    Raises:
        AnnotationError: the file cannot be read, or a line is not a class and four numbers from 0 to 1: outlines,
            rotated boxes and confidences are not read.
    """
    try:
        text = read_label_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise unfit(path, "the file", "text in UTF-8", f"something else ({error})", FILE_CURE) from error
    lines = enumerate(text.splitlines(), start=1)
    return [_box(path, number, line, classes) for number, line in lines if line.strip()]


def _box(path: Path, number: int, line: str, classes: int) -> YoloBox:
    words = line.split()
    if len(words) != 5:
        expected = "a box: class, centre x, centre y, width, height"
        raise unfit(path, f"line {number}", expected, f"{len(words)} values: {reprlib.repr(line)}", _CURE)
    try:
        kind, *values = map(float, words)
    except ValueError:
        raise unfit(path, f"line {number}", "five numbers", reprlib.repr(line), _CURE) from None
    if not (kind.is_integer() and 0 <= kind < classes):
        raise unfit(path, f"line {number}", f"a class from 0 to {classes - 1}", words[0], "Correct it or the names.")
    for value, word in zip(values, words[1:], strict=True):
        if not -_ROUNDING <= value <= 1 + _ROUNDING:
            expected = "fractions of the image's width and height, from 0 to 1"
            raise unfit(path, f"line {number}", expected, word, _CURE)
    cx, cy, w, h = values
    return YoloBox(line=number, class_index=int(kind), centre=(cx, cy), size=(w, h))
