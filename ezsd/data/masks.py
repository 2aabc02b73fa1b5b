"""Object outlines of COCO- and LVIS-format files: checked, packed small, and drawn when they are asked for.

An outline is either rings of a polygon or run lengths. pycocotools draws both, but trusts what it is given: whatever
comes from a file is checked here first. Only annotations that are asked for are looked at, so no outline of a novel
object can reach training.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from pycocotools import mask

from ezsd.data.coco_json import Fault
from ezsd.data.stream import open_json
from ezsd.errors import AnnotationError

Rings: TypeAlias = list[npt.NDArray[np.float64]]
"""Corner points of a polygon's rings, pixels, each (P, 2) with P >= 3."""
Outline: TypeAlias = Rings | bytes
"""Rings, or run lengths of an image-sized mask as COCO compresses them."""

REACH = 2**20
"""Largest distance of a point from the image's corner, pixels; drawing takes memory for every pixel of an edge."""
_CURE = (
    "Mend the file's segmentations, or go without masks: model.masks=false for a run, results without segmentations "
    "for `ezsd eval --detections`."
)
_EXPECTED = "polygons (lists of at least 3 points) or run lengths of the image's size"


class MissingOutline(AnnotationError):
    """An object has no segmentation, while masks are asked for."""


def read_outlines(
    path: Path, wanted: Mapping[int, tuple[int, int]], categories: Collection[int], *, required: bool = True
) -> Iterator[tuple[int, Outline]]:
    """Read the outlines of some annotations, one by one; the file is never held as a whole.

    Of other annotations only id and category are looked at.

    Args:
        path: a COCO-format file that `read_raw` has found in order.
        wanted: height and width of its image for each annotation id asked for.
        categories: category ids asked for; another one's annotation may share an id with a wanted one.
        required: False to leave out annotations without an outline.

    Yields:
        Annotation id and outline, in the file's order.

    Raises:
        MissingOutline: an annotation asked for has none, and it is required.
        AnnotationError: it has one that is not in order.
    """
    for position, entry in _annotations(path):
        number = entry.get("id")
        if type(number) is not int or number not in wanted or entry.get("category_id") not in categories:
            continue
        outline = entry.get("segmentation")
        if not required and outline in (None, []):
            continue
        try:
            yield number, parse_outline(outline, *wanted[number])
        except ValueError as error:
            found = _fault(position, error).error(path)
            raise (MissingOutline(str(found)) if outline in (None, []) else found) from error


def outline_faults(path: Path, size: npt.NDArray[np.int32]) -> Iterator[Fault | None]:
    """Check the outlines of the annotations asked for: a fault or None for each, in the file's order.

    Args:
        path: a COCO-format file that `read_table` can read.
        size: height and width of the image of each entry of its list `annotations`, (A, 2); zeros where the outline is
            not asked for.
    """
    for position, entry in _annotations(path):
        height, width = size[position].tolist()
        if height and width:
            try:
                parse_outline(entry.get("segmentation"), height, width)
            except ValueError as error:
                yield _fault(position, error)
            else:
                yield None


def early_outline(value: object) -> object:
    """Reduce a segmentation to the part that is needed until the size of its image is known; see `late_outline`."""
    if not isinstance(value, list) or not value:
        return value
    try:
        return _Rings([_ring(one) for one in value])
    except ValueError as error:
        return error


def late_outline(path: Path, position: int, kept: object, height: int, width: int) -> Outline:
    """The outline of the annotation at a position of a file.

    Args:
        path: the file.
        position: in its list `annotations`.
        kept: of its segmentation, see `early_outline`.
        height: of its image, as `width`.
        width: see there.

    Raises:
        MissingOutline: it has none.
        AnnotationError: it has one that is not in order.
    """
    try:
        if isinstance(kept, ValueError):
            raise kept
        return kept if isinstance(kept, _Rings) else parse_outline(kept, height, width)
    except ValueError as error:
        found = _fault(position, error).error(path)
        raise (MissingOutline(str(found)) if kept in (None, []) else found) from error


class _Rings(list[npt.NDArray[np.float64]]):
    """Rings that were parsed, unlike what JSON has."""


def _fault(position: int, error: ValueError) -> Fault:
    return Fault(
        section="annotations",
        position=position,
        key="segmentation",
        expected=_EXPECTED,
        found=str(error),
        cure=_CURE,
        kind=re.sub(r"\d+", "0", str(error)),
    )


def parse_outline(value: object, height: int, width: int) -> Outline:
    """An outline as JSON has it. ValueError, saying what was found, when it is none for an image of this size."""
    if isinstance(value, dict):
        return parse_run_lengths(value, height, width)
    if not isinstance(value, list) or not value:
        raise ValueError("nothing" if value in (None, []) else reprlib.repr(value))
    return [_ring(one) for one in value]


def parse_run_lengths(value: Mapping[str, object], height: int, width: int) -> bytes:
    """Run lengths of a mask of this size, as COCO compresses them. ValueError, saying what was found, otherwise."""
    size, counts = value.get("size"), value.get("counts")
    if size != [height, width]:
        raise ValueError(f"size {reprlib.repr(size)} in an image of {height} x {width} (height, width)")
    if isinstance(counts, list):
        if not all(type(count) is int and 0 <= count <= height * width for count in counts):
            raise ValueError(f"counts {reprlib.repr(counts)}")
        runs = np.array(counts, dtype=np.int64)
    elif isinstance(counts, str) and counts.isascii():
        runs = decompress(counts.encode())
    else:
        raise ValueError(f"counts {reprlib.repr(counts)}")
    if (runs < 0).any() or int(runs.sum()) != height * width:
        raise ValueError(f"runs over {int(runs.sum())} pixels in an image of {height} x {width}")
    compressed: bytes = mask.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)["counts"]
    return compressed


def decompress(counts: bytes) -> npt.NDArray[np.int64]:
    """Run lengths out of COCO's compressed form. ValueError when it is none.

    Five bits a character, the lowest first, bit 6 set where more follow; from the fourth run on the difference to the
    last but one is kept.
    """
    digits = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((digits & 32) == 0)
    if len(digits) and ((digits < 0).any() or (digits > 63).any() or ends[-1:].tolist() != [len(digits) - 1]):
        raise ValueError(f"counts {reprlib.repr(counts.decode('latin-1'))}")
    starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)[: len(ends)]
    place = np.arange(len(digits)) - np.repeat(starts, ends - starts + 1)
    if (place > 6).any():
        raise ValueError(f"counts {reprlib.repr(counts.decode('latin-1'))}")
    runs = np.add.reduceat((digits & 31) << (5 * place), starts) if len(digits) else np.zeros(0, dtype=np.int64)
    negative = (digits[ends] & 16) != 0
    runs -= np.where(negative, np.int64(1) << (5 * (place[ends] + 1)), 0)
    for first in (1, 2):
        runs[first::2] = np.cumsum(runs[first::2])
    return runs


def to_run_lengths(outline: Outline, height: int, width: int) -> bytes:
    """The outline as run lengths of an image-sized mask, as pycocotools draws it."""
    if isinstance(outline, bytes):
        return outline
    drawn: bytes = mask.merge(mask.frPyObjects([ring.ravel().tolist() for ring in outline], height, width))["counts"]
    return drawn


def overlaps(
    found: Sequence[bytes], true: Sequence[bytes], crowd: npt.NDArray[np.bool_], size: tuple[int, int]
) -> npt.NDArray[np.float64]:
    """IoU of masks of one image of height and width `size`, (D, G); over the found mask alone where G is a crowd."""
    pairs = [[{"size": list(size), "counts": one} for one in masks] for masks in (found, true)]
    values: npt.NDArray[np.float64] = mask.iou(*pairs, crowd.astype(np.uint8))
    return values


def to_box(counts: bytes, height: int, width: int) -> list[float]:
    """Left, top, width and height of the pixels of a mask."""
    box: list[float] = mask.toBbox({"size": [height, width], "counts": counts}).tolist()
    return box


def json_run_lengths(counts: bytes, size: tuple[int, int]) -> dict[str, object]:
    """Run lengths of a mask of height and width `size` as COCO's files hold them."""
    return {"size": list(size), "counts": counts.decode("ascii")}


def encode(pixels: npt.NDArray[np.bool_]) -> bytes:
    """Run lengths of a mask (H, W)."""
    counts: bytes = mask.encode(np.asfortranarray(pixels, dtype=np.uint8))["counts"]
    return counts


def decode(counts: bytes, height: int, width: int) -> npt.NDArray[np.bool_]:
    """The mask (H, W) of run lengths."""
    runs = decompress(counts)
    inside = np.arange(len(runs)) % 2 == 1
    # Column by column.
    pixels: npt.NDArray[np.bool_] = np.repeat(inside, runs).reshape(width, height).T
    return pixels


def draw_in_frame(
    outline: Outline, height: int, width: int, side: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """An outline's own frame and what it looks like in there.

    Returns:
        The frame, xyxy in the image's pixels, (4,), and the mask (side, side) that fills it. It is drawn at this
        resolution, not resized to it, so that small objects lose nothing.
    """
    if isinstance(outline, bytes):
        return _resampled(decode(outline, height, width), side)
    points = np.concatenate(outline)
    low, high = points.min(0), np.maximum(points.max(0), points.min(0) + 1)
    rings = [((ring - low) / (high - low) * side).ravel().tolist() for ring in outline]
    drawn = decode(mask.merge(mask.frPyObjects(rings, side, side))["counts"], side, side)
    return np.concatenate([low, high]).astype(np.float32), drawn


def pack(outline: Outline) -> bytes:
    """An outline as few bytes: points as float32."""
    if isinstance(outline, bytes):
        return b"R" + outline
    lengths = np.array([len(outline), *map(len, outline)], dtype="<u4")
    return b"P" + lengths.tobytes() + np.concatenate(outline).astype("<f4").tobytes()


def unpack(packed: bytes) -> Outline:
    """The inverse of `pack`."""
    if packed[:1] == b"R":
        return packed[1:]
    count = int(np.frombuffer(packed, dtype="<u4", count=1, offset=1)[0])
    lengths = np.frombuffer(packed, dtype="<u4", count=count, offset=5)
    points = np.frombuffer(packed, dtype="<f4", offset=5 + 4 * count).reshape(-1, 2).astype(np.float64)
    return np.split(points, np.cumsum(lengths)[:-1])


def _annotations(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    """Position and values of each annotation that is an object."""
    with open_json(path) as reader:
        for section in reader.members():
            if reader.peek() != "[":
                reader.value()
                continue
            # Lists that nobody asked for are walked over too, not held.
            for position, entry in enumerate(reader.entries()):
                if section == "annotations" and isinstance(entry, dict):
                    yield position, entry


def _ring(value: object) -> npt.NDArray[np.float64]:
    if not isinstance(value, list) or len(value) < 6 or len(value) % 2:
        raise ValueError(f"a ring {reprlib.repr(value)}")
    if not all(_is_near(number) for number in value):
        raise ValueError(
            f"a ring {reprlib.repr(value)} with a point that is not a pair of numbers within {REACH} pixels"
        )
    return np.array(value, dtype=np.float64).reshape(-1, 2)


def _is_near(value: object) -> bool:
    if type(value) is int:
        return -REACH <= value <= REACH
    return type(value) is float and math.isfinite(value) and -REACH <= value <= REACH


def _resampled(pixels: npt.NDArray[np.bool_], side: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """The frame of a mask's pixels and the nearest of them for each cell; all of an empty mask."""
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    top, bottom = (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, pixels.shape[0])
    left, right = (int(columns[0]), int(columns[-1]) + 1) if len(columns) else (0, pixels.shape[1])
    at = (np.arange(side) + 0.5) / side
    y, x = (top + at * (bottom - top)).astype(np.int64), (left + at * (right - left)).astype(np.int64)
    return np.array([left, top, right, bottom], dtype=np.float32), pixels[y[:, None], x[None]]
