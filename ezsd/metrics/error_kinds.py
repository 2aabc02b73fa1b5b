"""Kinds of errors of detections, and missed objects, one image at a time.

The kinds and their thresholds are those of TIDE (Bolya et al., "TIDE: A General Toolbox for Identifying Object
Detection Errors", arXiv 2008.08115), with plainer names; a detection that fits several has the first in its toolbox's
order:

| kind | TIDE | the detection |
|---|---|---|
| right | | is a true positive of AP50 |
| ignored | | counts neither way: see below |
| misplaced | Loc | overlaps an object of its class, but by less than the threshold |
| confused | Cls | lies on an object of another class |
| doubled | Dupe | lies on an object of its class that a surer detection has |
| background | Bkg | overlaps no object |
| confused and misplaced | Both | overlaps an object of another class, by less than the threshold |

An ignored detection lies on a crowd region or an ignored object of its class; or it is not right, and of a class whose
objects do not all have a box in the image. A missed object is one that no detection has, not even a misplaced or a
confused one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
from pycocotools import mask

ErrorKind: TypeAlias = Literal[
    "right", "ignored", "misplaced", "confused", "doubled", "background", "confused and misplaced"
]
"""Kind of a detection, see the module."""
KINDS: tuple[ErrorKind, ...] = get_args(ErrorKind)
"""All kinds."""
HAVING: tuple[ErrorKind, ...] = ("right", "misplaced", "confused")
"""Kinds of a detection that has its object: the object is not missed."""


class FoundBoxes(NamedTuple):
    """Detections of one image, N in all; a plain tuple of the three arrays serves too."""

    xywh: npt.NDArray[np.floating]
    """Left, top, width, height in pixels, (N, 4), as an evaluation has them."""
    class_index: npt.NDArray[np.integer]
    """Number of the class in any numbering that is also the objects', (N,)."""
    score: npt.NDArray[np.floating]
    """Higher is surer, (N,); of equal scores the first counts as surer."""


class TrueBoxes(NamedTuple):
    """Objects of one image, M in all; a plain tuple of the arrays serves too."""

    xywh: npt.NDArray[np.floating]
    """Left, top, width, height in pixels, (M, 4), as an evaluation has them."""
    class_index: npt.NDArray[np.integer]
    """(M,)."""
    crowd: npt.NDArray[np.bool_]
    """True for a region that any number of detections may lie on unpunished and that is never missed, (M,)."""
    ignore: npt.NDArray[np.bool_] | None = None
    """True for an object that one detection may have unpunished and that is never missed, as in LVIS, (M,); crowd
    regions may be among them. None for none."""


@dataclass(frozen=True, slots=True, eq=False)
class ErrorKinds:
    """Kinds of N detections, in the order given, and which of M objects are missed."""

    kind: npt.NDArray[np.str_]
    """An `ErrorKind` for each detection, (N,)."""
    matched: npt.NDArray[np.int64]
    """Position of the object that the kind is about, (N,); -1 where it is about none."""
    missed: npt.NDArray[np.bool_]
    """(M,); never true for a crowd region or an ignored object."""


def error_kinds(
    detections: FoundBoxes | tuple[npt.NDArray[np.floating], npt.NDArray[np.integer], npt.NDArray[np.floating]],
    truth: TrueBoxes | tuple[npt.NDArray[np.floating], npt.NDArray[np.integer], npt.NDArray[np.bool_]],
    *,
    not_exhaustive: npt.NDArray[np.bool_] | None = None,
    iou: float = 0.5,
    background_iou: float = 0.1,
) -> ErrorKinds:
    """Name the error of each detection of an image, and find the objects that it misses.

    Overlaps are those of the evaluation to the last bit: a detection is right exactly where AP50 has a true positive.

    Leave out beforehand what is not judged: detections below a score, and of a federated file those of classes that
    nobody has looked for in the image.

    Args:
        detections: what was found, in any order.
        truth: what is there.
        not_exhaustive: True for a detection of a class whose objects do not all have a box in the image: unless it is
            right it is ignored, (N,); None for none.
        iou: least IoU with an object that has been found, in (0, 1].
        background_iou: least IoU with an object that is said to be overlapped, in (0, iou].

    Returns:
        The kinds, and the missed objects.

    Raises:
        ValueError: the thresholds are not in order.
    """
    if not 0 < background_iou <= iou <= 1:
        raise ValueError(f"expected 0 < background_iou <= iou <= 1, found {background_iou} and {iou}")
    xywh, label, score = detections
    true_xywh, true_label, crowd, ignore = TrueBoxes(*truth)
    crowd = np.asarray(crowd, np.bool_)
    ignorable = crowd if ignore is None else crowd | ignore
    forgiven = np.zeros(len(xywh), np.bool_) if not_exhaustive is None else not_exhaustive
    overlap = _overlap(xywh, true_xywh, crowd)  # (N, M)
    own = np.asarray(label)[:, None] == np.asarray(true_label)[None]
    free, found = np.ones(len(crowd), np.bool_), np.zeros(len(crowd), np.bool_)
    kind, matched = np.full(len(overlap), "background", dtype="<U22"), np.full(len(overlap), -1)
    unmatched = []
    for one in np.argsort(-np.asarray(score), kind="stable").tolist():
        # As in `match`: what is ignored is taken only where no object is left; a crowd region may be taken again.
        for name, ones in (("right", own[one] & free & ~ignorable), ("ignored", own[one] & free & ignorable)):
            best = _best(overlap[one], ones)
            if best >= 0 and overlap[one, best] >= iou:
                kind[one], matched[one], free[best] = name, best, crowd[best]
                break
        else:
            unmatched.append(one)
    for one in unmatched:
        if forgiven[one]:
            kind[one] = "ignored"
            continue
        kind[one], matched[one] = _error(
            overlap[one], own[one] & ~ignorable, ~own[one] & ~ignorable, iou, background_iou
        )
    found[matched[np.isin(kind, HAVING)]] = True
    return ErrorKinds(kind, matched, ~found & ~ignorable)


def _error(
    overlap: npt.NDArray[np.float64],
    own: npt.NDArray[np.bool_],
    other: npt.NDArray[np.bool_],
    iou: float,
    background_iou: float,
) -> tuple[ErrorKind, int]:
    """Kind of a detection that has no object to itself, and the object it is about, -1 for none.

    Args:
        overlap: IoU with the objects, (M,).
        own: objects of its class, (M,).
        other: objects of other classes, (M,).
        iou: see `error_kinds`.
        background_iou: see `error_kinds`.
    """
    mine, theirs = _best(overlap, own), _best(overlap, other)
    with_mine = overlap[mine] if mine >= 0 else 0.0
    with_theirs = overlap[theirs] if theirs >= 0 else 0.0
    if background_iou <= with_mine < iou:
        return "misplaced", mine
    if with_theirs >= iou:
        return "confused", theirs
    if with_mine >= iou:
        return "doubled", mine
    if with_theirs >= background_iou:
        return "confused and misplaced", theirs
    return "background", -1


def _best(overlap: npt.NDArray[np.float64], among: npt.NDArray[np.bool_]) -> int:
    """Position of the largest overlap, of equal ones the last as in pycocotools; -1 for none among which to choose."""
    where = np.flatnonzero(among)
    return int(where[len(where) - 1 - overlap[where][::-1].argmax()]) if len(where) else -1


def _overlap(
    xywh: npt.NDArray[np.floating], true_xywh: npt.NDArray[np.floating], crowd: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """IoU of all pairs, (N, M); with a crowd region the part of the detection that is in it, as COCO has it."""
    if not len(xywh) or not len(true_xywh):
        return np.zeros((len(xywh), len(true_xywh)))
    both = [np.asarray(one, np.float64).reshape(-1, 4) for one in (xywh, true_xywh)]
    pairs: npt.NDArray[np.float64] = mask.iou(*both, crowd.astype(np.uint8))
    return pairs
