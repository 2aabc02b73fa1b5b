"""Pascal VOC: the twenty classes, two splits of them, and its annotation files, one XML for each image."""

from __future__ import annotations

import math
import re
import reprlib
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ezsd.data.label_file import BOX_DIGITS, FILE_CURE, read_label_file
from ezsd.data.records import unfit
from ezsd.errors import VocabularyError
from ezsd.vocabulary import Split, canonical, require_characters

Corners = Literal["inclusive", "edges"]
"""Meaning of xmin, ymin, xmax and ymax.

"inclusive": the first and last column and row of pixels within the box, counted from 1, as VOC defines them.
"edges": distances from the image's left and top edge in pixels, as many labelling tools write them.
"""

VOC_CLASSES: Mapping[str, str] = {
    "aeroplane": "airplane",
    "bicycle": "bicycle",
    "bird": "bird",
    "boat": "boat",
    "bottle": "bottle",
    "bus": "bus",
    "car": "car",
    "cat": "cat",
    "chair": "chair",
    "cow": "cow",
    "diningtable": "dining table",
    "dog": "dog",
    "horse": "horse",
    "motorbike": "motorcycle",
    "person": "person",
    "pottedplant": "potted plant",
    "sheep": "sheep",
    "sofa": "couch",
    "train": "train",
    "tvmonitor": "tv",
}
"""Name that COCO has for each of VOC's classes, in VOC's order: prompts are made of words, as "tvmonitor" is none."""


def _split(*novel: str) -> Split:
    return Split(base=tuple(name for name in VOC_CLASSES.values() if name not in novel), novel=novel)


VOC_SPLITS: Mapping[str, Split] = {
    "voc-16-4": _split("car", "dog", "couch", "train"),
    "voc-15-5": _split("bird", "bus", "cow", "motorcycle", "couch"),
}
"""Splits by name of dataset: zero-shot detection's own (Demirel et al., 2018), and split 1 of few-shot detection."""

_MOST_PIXELS = 2**24
"""Size of the largest image side."""
_OBJECT_CURE = "Correct or remove the object."
_DECLARED = re.compile(rb"""\s*<\?xml[^>]*?encoding\s*=\s*["']([\w.-]+)["']""")


@dataclass(frozen=True, slots=True, kw_only=True)
class VocObject:
    """An object of an annotation file."""

    name: str
    corners: tuple[float, float, float, float]
    """xmin, ymin, xmax, ymax as the file has them; their meaning is that of `Corners`."""
    difficult: bool

    def xywh(self, corners: Corners) -> tuple[float, float, float, float]:
        """Left, top, width and height in pixels; width and height may be 0 or less."""
        x1, y1, x2, y2 = self.corners
        first = 1 if corners == "inclusive" else 0
        left, top, width, height = (
            round(value, BOX_DIGITS) for value in (x1 - first, y1 - first, x2 - x1 + first, y2 - y1 + first)
        )
        return left, top, width, height


@dataclass(frozen=True, slots=True, kw_only=True)
class VocImage:
    """Contents of an annotation file."""

    file_name: str
    """Text of `filename`, not trusted; "" where there is none."""
    size: tuple[int, int] | None
    """Width and height, pixels; None where the file says nothing, or 0."""
    objects: tuple[VocObject, ...]


def read_voc(path: Path) -> VocImage:
    """Read an annotation file.

    Parts of objects, such as a person's head, are left out.

    Raises:
        AnnotationError: the file cannot be read, is no XML, has a document type declaration, or a value in it is not
            what it must be.
    """
    root = _parse(path)
    if root.tag != "annotation":
        raise unfit(path, "the file", "an element <annotation>", f"<{root.tag}>", FILE_CURE)
    return VocImage(
        file_name=(root.findtext("filename") or "").strip(),
        size=_size(path, root),
        objects=tuple(_object(path, number, one) for number, one in enumerate(root.findall("object"), start=1)),
    )


def _parse(path: Path) -> ET.Element:
    text = _read(path)
    # Without a declaration of entities none can be expanded, whatever the parser would do with them.
    if "<!DOCTYPE" in text:
        raise unfit(path, "the file", "XML without a document type", "a <!DOCTYPE ...>", "Remove that declaration.")
    try:
        return ET.fromstring(text)
    except (ET.ParseError, ValueError) as error:
        raise unfit(path, "the file", "XML", f"something else ({error})", FILE_CURE) from error


def _read(path: Path) -> str:
    data = read_label_file(path)
    declared = _DECLARED.match(data)
    encoding = declared[1].decode("ascii") if declared else "utf-8"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except (LookupError, UnicodeError) as error:
        raise unfit(path, "the file", f"text in {encoding}", f"something else ({error})", FILE_CURE) from error


def _size(path: Path, root: ET.Element) -> tuple[int, int] | None:
    sides = [_side(path, root, key) for key in ("width", "height")]
    return (sides[0], sides[1]) if all(sides) else None


def _side(path: Path, root: ET.Element, key: str) -> int:
    """A side of the image, pixels; 0 where the file does not know it."""
    text = (root.findtext(f"size/{key}") or "0").strip()
    if not re.fullmatch(r"\d{1,9}", text):
        raise unfit(path, f"size/{key}", "a number of pixels", reprlib.repr(text), "Correct it, or write 0.")
    return int(text)


def _object(path: Path, number: int, one: ET.Element) -> VocObject:
    where = f"object[{number}]"
    name = canonical((one.findtext("name") or "").strip())
    try:
        require_characters(name)
    except VocabularyError as error:
        raise unfit(path, f"{where}/name", "the name of a class", reprlib.repr(name), _OBJECT_CURE) from error
    if not name:
        raise unfit(path, f"{where}/name", "the name of a class", "nothing", _OBJECT_CURE)
    difficult = (one.findtext("difficult") or "0").strip()
    if difficult not in ("0", "1"):
        raise unfit(path, f"{where}/difficult", "0 or 1", reprlib.repr(difficult), _OBJECT_CURE)
    x1, y1, x2, y2 = (_number(path, where, one, key) for key in ("xmin", "ymin", "xmax", "ymax"))
    return VocObject(name=name, corners=(x1, y1, x2, y2), difficult=difficult == "1")


def _number(path: Path, where: str, one: ET.Element, key: str) -> float:
    text = one.findtext(f"bndbox/{key}")
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    # A comparison that a NaN fails.
    if not abs(value) <= _MOST_PIXELS:
        found = "nothing" if text is None else reprlib.repr(text.strip())
        raise unfit(path, f"{where}/bndbox/{key}", "a number of pixels", found, _OBJECT_CURE)
    return value
