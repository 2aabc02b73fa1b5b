"""Table of detections, and its reading from results files in COCO's format."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ezsd.data.masks import parse_outline, to_box, to_run_lengths
from ezsd.data.stream import is_finite
from ezsd.errors import ResultsError
from ezsd.metrics.named import DocumentError, Named, renumbered

_CURE = "A results file is a list of objects with image_id, category_id, bbox and score."


def corners(xywh: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Boxes as left, top, right, bottom, (N, 4), from left, top, width, height."""
    return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Results:
    """Detections of any number of images as one flat table, N in all, in the form of COCO's result files.

    Equal scores keep this order everywhere.

    Raises:
        ValueError: shapes disagree, a number is not finite, or a side is negative.
    """

    image_id: npt.NDArray[np.int64]
    """The dataset's own number of the image, (N,)."""
    xywh: npt.NDArray[np.float64]
    """Left, top, width, height in pixels, (N, 4); one without area is allowed and matches nothing."""
    score: npt.NDArray[np.float64]
    """Confidence, larger is surer, (N,)."""
    class_index: npt.NDArray[np.int64]
    """Position in `Split.names`, (N,); -1 for a class outside the split, which takes part in a limit alone."""
    masks: tuple[bytes, ...] | None = None
    """Run lengths of an image-sized mask each, N of them; None without masks."""
    searched: frozenset[int] | None = None
    """Positions in `Split.names` of the classes that were searched; None where the results do not say."""

    def __post_init__(self) -> None:
        count = len(self.image_id)
        expected = {"image_id": (count,), "xywh": (count, 4), "score": (count,), "class_index": (count,)}
        for name, shape in expected.items():
            found = np.shape(getattr(self, name))
            if found != shape:
                raise ValueError(f"results: {name} must have shape {shape}, got {found}")
        if self.masks is not None and len(self.masks) != count:
            raise ValueError(f"results: {count} need as many masks, got {len(self.masks)}")
        if not (np.isfinite(self.xywh).all() and np.isfinite(self.score).all()):
            raise ValueError("results: boxes and scores must be finite")
        if (self.xywh[:, 2:] < 0).any():
            raise ValueError("results: width and height of a box must not be negative")

    def most_per_image(self) -> int:
        """Number of detections of the image that has most."""
        return int(np.unique(self.image_id, return_counts=True)[1].max(initial=0))


def read_results(
    path: Path,
    *,
    images: Mapping[int, tuple[int, int]],
    categories: Mapping[int, int] | None,
    named: Named | None = None,
) -> Results:
    """Read results in COCO's format: a JSON list of image_id, category_id, bbox and score.

    Where every object also has a `segmentation`, or has one instead of its `bbox`, these are the masks.

    A whole document, as `ezsd detect --json` prints, has such objects as its `annotations`. Its ids are its own then:
    its images are found by file name, its classes by name, see `ezsd.metrics.named`.

    Args:
        path: the file; other keys of its objects are ignored.
        images: height and width of each image that the annotation file has, by id.
        categories: for each category id of the annotation file its position in `Split.names`, -1 outside the split.
            None for boxes of no class: category ids are then ignored, and all indices are -1.
        named: file names and class names of the annotation file; without it a document is refused.

    Returns:
        All detections of the file, in its order.

    Raises:
        ResultsError: the file cannot be read, is neither a JSON list of objects nor such a document, lacks a key, names
            an unknown image or category, or holds a score or box that is not finite, a box without four numbers or with
            a negative side, or a segmentation that is none.
    """
    image_id, xywh, score, class_index = [], [], [], []
    masks: list[bytes] = []
    at, entries, searched = _entries(path, images, categories, named)
    for position, entry in enumerate(entries):
        place = f"{at}[{position}]"
        if not isinstance(entry, dict):
            raise _error(path, place, "an object", reprlib.repr(entry))
        image, category = entry.get("image_id"), entry.get("category_id")
        if type(image) is not int or image not in images:
            raise _entry_error(path, place, entry, "image_id", "the id of an image of the annotation file")
        index = -1 if categories is None else categories.get(category) if type(category) is int else None
        if index is None:
            raise _entry_error(path, place, entry, "category_id", "the id of a category of the annotation file")
        if not is_finite(entry.get("score")):
            raise _entry_error(path, place, entry, "score", "a finite number")
        box = entry.get("bbox")
        # Some tools leave an empty one in results of boxes.
        if entry.get("segmentation") not in (None, []):
            masks.append(_mask(path, place, entry, images[image]))
            box = to_box(masks[-1], *images[image]) if box is None else box
        if not (isinstance(box, list) and len(box) == 4 and all(map(is_finite, box)) and min(box[2:]) >= 0):
            expected = "four finite numbers: left, top, width, height, the last two not negative"
            raise _entry_error(path, place, entry, "bbox", expected)
        image_id.append(image)
        xywh.append(box)
        score.append(entry["score"])
        class_index.append(index)
    return Results(
        image_id=np.array(image_id, dtype=np.int64),
        xywh=np.array(xywh, dtype=np.float64).reshape(-1, 4),
        score=np.array(score, dtype=np.float64),
        class_index=np.array(class_index, dtype=np.int64),
        # Of boxes and masks mixed, boxes are what all have.
        masks=tuple(masks) if masks and len(masks) == len(score) else None,
        searched=searched,
    )


def _mask(path: Path, place: str, entry: Mapping[str, object], size: tuple[int, int]) -> bytes:
    try:
        return to_run_lengths(parse_outline(entry["segmentation"], *size), *size)
    except ValueError as error:
        expected = "polygons or run lengths of the image's size"
        raise _error(path, f"{place}.segmentation", expected, str(error)) from error


def _entries(
    path: Path,
    images: Mapping[int, tuple[int, int]],
    categories: Mapping[int, int] | None,
    named: Named | None,
) -> tuple[str, Sequence[object], frozenset[int] | None]:
    """Place of the results in the file; the results, with ids of the annotation file; `Results.searched`."""
    try:
        document = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise _error(path, "the file", "a readable file", error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:
        raise _error(path, "the file", "JSON in UTF-8", f"something else ({error})") from error
    if isinstance(document, list):
        return "", document, None
    if not isinstance(document, dict) or named is None:
        raise _error(path, "$", "a list", reprlib.repr(document))
    try:
        entries, found = renumbered(document, named, images, classes=categories is not None)
    except DocumentError as error:
        raise ResultsError(f"{path}: {error}") from error
    return "annotations", entries, None if categories is None else frozenset(categories[number] for number in found)


def _entry_error(path: Path, place: str, entry: Mapping[str, object], key: str, expected: str) -> ResultsError:
    found = reprlib.repr(entry[key]) if key in entry else "nothing"
    return _error(path, f"{place}.{key}", expected, found)


def _error(path: Path, where: str, expected: str, found: str) -> ResultsError:
    return ResultsError(f"{path}: {where}: expected {expected}, found {found}. {_CURE}")
