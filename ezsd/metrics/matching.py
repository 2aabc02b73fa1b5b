"""COCO's greedy matching of detections with ground truth, at all IoU thresholds at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from pycocotools import mask

from ezsd.data.masks import overlaps
from ezsd.metrics.ground_truth import Truth
from ezsd.metrics.results import Results

Shape: TypeAlias = Literal["bbox", "segm"]
"""Shapes that overlap is measured of: boxes or masks."""
THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""Least IoU of a match, T of them."""
Size: TypeAlias = Literal["all", "small", "medium", "large"]
AREAS: Mapping[Size, tuple[float, float]] = {
    "all": (0.0, 1e10),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}
"""Least and most area of an object by size class, pixels, both included, as COCO and LVIS have them."""


@dataclass(frozen=True, slots=True, eq=False)
class Matches:
    """Outcome of matching M detections, sorted by class, image and score."""

    row: npt.NDArray[np.int64]
    """Position in the results given, (M,)."""
    matched: npt.NDArray[np.bool_]
    """True for a detection that found a ground-truth box, (T, M)."""
    ignored: npt.NDArray[np.bool_]
    """True for a detection that counts neither as a true nor as a false positive, (T, M)."""


def match(truth: Truth, results: Results, rows: npt.NDArray[np.int64], shape: Shape = "bbox") -> dict[Size, Matches]:
    """Match detections with the ground-truth boxes of their image and class, the surest first.

    A detection takes the free box which it overlaps most, and a box that is to be ignored only if no other is left.
    Leaving out the least sure detections of an image changes nothing for others, so limits apply afterwards. For a size
    class, boxes of other sizes are to be ignored, and so are detections of other sizes that find nothing.

    Args:
        truth: the boxes.
        results: the detections.
        rows: positions in `results` to match, (M,), of classes in the split.
        shape: what must overlap; for "segm" both must have masks.

    Returns:
        The matches by size class of the ground truth.
    """
    row = rows[np.lexsort((-results.score[rows], results.image_id[rows], results.class_index[rows]))]
    key = _keys(truth, results.image_id[row], results.class_index[row])
    true_key = _keys(truth, truth.image_id, truth.class_index)
    true_order = np.argsort(true_key, kind="stable")
    crowd, true_area = truth.crowd[true_order], truth.area[true_order]
    ignore = {
        size: truth.ignore[true_order] | (true_area < least) | (true_area > most)
        for size, (least, most) in AREAS.items()
    }
    pairs, starts = np.unique(true_key[true_order], return_index=True)
    stops = np.append(starts[1:], len(true_key))
    firsts, lasts = np.searchsorted(key, pairs), np.searchsorted(key, pairs, side="right")
    matched = {size: np.zeros((len(THRESHOLDS), len(row)), dtype=np.bool_) for size in AREAS}
    ignored = {size: np.zeros_like(matched[size]) for size in AREAS}
    for pair in np.flatnonzero(lasts > firsts):
        found, true = slice(firsts[pair], lasts[pair]), slice(starts[pair], stops[pair])
        overlap = _overlap(truth, results, row[found], true_order[true], shape)  # (D, G)
        # Few objects are told apart by size in few ways.
        by_ignorable: dict[bytes, tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]] = {}
        for size in AREAS:
            ignorable = ignore[size][true]
            if ignorable.tobytes() not in by_ignorable:
                by_ignorable[ignorable.tobytes()] = _greedy(overlap, ignorable, crowd[true])
            matched[size][:, found], ignored[size][:, found] = by_ignorable[ignorable.tobytes()]
    unverified, area = is_not_exhaustive(truth, results, row), _areas(truth, results, row, shape)
    for size, (least, most) in AREAS.items():
        ignored[size] |= ~matched[size] & (unverified | (area < least) | (area > most))
    return {size: Matches(row, matched[size], ignored[size]) for size in AREAS}


def _areas(truth: Truth, results: Results, row: npt.NDArray[np.int64], shape: Shape) -> npt.NDArray[np.float64]:
    """Areas of detections' boxes or masks, pixels, (M,)."""
    if shape == "bbox":
        with np.errstate(over="ignore"):
            boxes: npt.NDArray[np.float64] = results.xywh[row, 2] * results.xywh[row, 3]
        return boxes
    assert results.masks is not None
    sizes = truth.image_size[np.searchsorted(truth.image_ids, results.image_id[row])].tolist()
    runs = [{"size": size, "counts": results.masks[i]} for i, size in zip(row, sizes, strict=True)]
    # One by one: pycocotools counts what it is given in 8 bits.
    return np.array([mask.area([one])[0] for one in runs], dtype=np.float64)


def _overlap(
    truth: Truth, results: Results, row: npt.NDArray[np.int64], true_row: npt.NDArray[np.int64], shape: Shape
) -> npt.NDArray[np.float64]:
    """IoU of detections with the objects of their image, in [0, 1], (D, G)."""
    crowd = truth.crowd[true_row]
    if shape == "bbox":
        boxes: npt.NDArray[np.float64] = mask.iou(results.xywh[row], truth.xywh[true_row], crowd.astype(np.uint8))
        return boxes
    assert results.masks is not None
    assert truth.masks is not None
    height, width = truth.image_size[np.searchsorted(truth.image_ids, results.image_id[row[0]])].tolist()
    found, true = [results.masks[i] for i in row], [truth.masks[i] for i in true_row]
    return overlaps(found, true, crowd, (height, width))


def _keys(truth: Truth, image_id: npt.NDArray[np.int64], class_index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Sort keys, one number per class and image, ascending in both."""
    keys: npt.NDArray[np.int64] = class_index * len(truth.image_ids) + np.searchsorted(truth.image_ids, image_id)
    return keys


def _greedy(
    overlap: npt.NDArray[np.float64], ignore: npt.NDArray[np.bool_], crowd: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Match the detections of one image and class: which are matched and which ignored, (T, D) each.

    Args:
        overlap: of detections, the surest first, with boxes, (D, G).
        ignore: (G,), boxes that are taken only when no other fits.
        crowd: (G,), boxes that any number of detections may take.
    """
    matched = np.zeros((len(THRESHOLDS), len(overlap)), dtype=np.bool_)
    ignored = np.zeros_like(matched)
    free = np.ones((len(THRESHOLDS), len(ignore)), dtype=np.bool_)
    for one in np.flatnonzero(overlap.max(axis=1) >= THRESHOLDS[0]):
        fits = free & (overlap[one] >= THRESHOLDS[:, None])  # (T, G)
        regular = fits & ~ignore
        fits = np.where(regular.any(axis=1, keepdims=True), regular, fits)
        # Of equal overlaps the last box is taken, as in pycocotools.
        best = len(ignore) - 1 - np.where(fits, overlap[one], -1.0)[:, ::-1].argmax(axis=1)
        taken = np.flatnonzero(fits.any(axis=1))
        matched[taken, one] = True
        ignored[taken, one] = ignore[best[taken]]
        free[taken, best[taken]] = crowd[best[taken]]
    return matched, ignored


def is_not_exhaustive(truth: Truth, results: Results, row: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """True for a detection whose class is not annotated exhaustively in its image, (M,)."""
    lists = truth.catalogue.federated
    if lists is None:
        return np.zeros(len(row), dtype=np.bool_)
    return is_listed(truth, results, row, lists.not_exhaustive)


def is_listed(
    truth: Truth, results: Results, row: npt.NDArray[np.int64], table: dict[int, frozenset[int]]
) -> npt.NDArray[np.bool_]:
    """True for a detection whose class is in a federated list of its image, (M,)."""
    category = truth.category_ids()
    pairs = zip(results.image_id[row].tolist(), results.class_index[row].tolist(), strict=True)
    return np.fromiter((category[index] in table[image] for image, index in pairs), dtype=np.bool_, count=len(row))
