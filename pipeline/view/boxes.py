"""Boxes of a part of a dataset as flat tables, the errors of detections among them, and the images that show some."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ezsd.data.annotations import Annotations
from ezsd.metrics import Results, Truth
from ezsd.metrics.error_kinds import HAVING, KINDS, ErrorKind, TrueBoxes, error_kinds
from ezsd.metrics.evaluation import is_verified
from ezsd.metrics.matching import is_not_exhaustive
from ezsd.metrics.results import corners

Kind: TypeAlias = Literal[ErrorKind, "missed"]
"""Kinds that images are looked for by: of a detection, or an object that is missed."""
ALL_KINDS: tuple[Kind, ...] = (*KINDS, "missed")
"""All of them."""
NOT_JUDGED = -1
"""Number in place of a kind's: nobody has looked for the class of a detection in its image."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Objects:
    """Annotated objects, M in all, sorted by image."""

    image: NDArray[np.int64]
    """Position of the image in its part, (M,), ascending."""
    box: NDArray[np.float64]
    """xyxy in pixels, (M, 4)."""
    class_index: NDArray[np.int64]
    """(M,)."""
    crowd: NDArray[np.bool_]
    """True for crowd regions, (M,)."""
    ignored: NDArray[np.bool_]
    """True for crowd regions, and what else counts neither as found nor as missed, (M,)."""

    def rows(self, position: int) -> slice:
        """Rows of an image."""
        return _rows(self.image, position)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Found:
    """Detections of a run, N in all, sorted by image and best first."""

    image: NDArray[np.int64]
    """Position of the image in its part, (N,), ascending."""
    box: NDArray[np.float64]
    """xyxy in pixels, (N, 4)."""
    class_index: NDArray[np.int64]
    """(N,)."""
    score: NDArray[np.float64]
    """Confidence in [0, 1], (N,)."""
    judged: NDArray[np.bool_]
    """False for classes that nobody has looked for in the image, of a federated file, (N,)."""
    not_exhaustive: NDArray[np.bool_]
    """True for classes whose objects do not all have a box in the image, of a federated file, (N,)."""

    def rows(self, position: int) -> slice:
        """Rows of an image."""
        return _rows(self.image, position)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Errors:
    """Kinds of N detections and scores at which M objects are found.

    The kind of a detection depends on surer ones alone: no threshold changes it.
    """

    kind: NDArray[np.int64]
    """Position in `KINDS`, or `NOT_JUDGED`, (N,)."""
    matched: NDArray[np.int64]
    """Position among its image's objects of the object that the kind is about, -1 for none, (N,)."""
    found_at: NDArray[np.float64]
    """Highest score of a detection that has the object, right or not, (M,): below it the object is not missed. -1 where
    there is none; inf for what is ignored."""


def objects_of_annotations(annotations: Annotations) -> Objects:
    """Base objects of training images."""
    return Objects(
        image=annotations.image_index.astype(np.int64),
        box=annotations.box.astype(np.float64),
        class_index=annotations.class_index.astype(np.int64),
        crowd=np.array(annotations.crowd),
        ignored=np.array(annotations.crowd),
    )


def objects_of_truth(truth: Truth) -> Objects:
    """All objects that an evaluation counts."""
    image = np.searchsorted(truth.image_ids, truth.image_id)
    order = np.argsort(image, kind="stable")
    return Objects(
        image=image[order],
        box=corners(truth.xywh[order]),
        class_index=truth.class_index[order],
        crowd=truth.crowd[order],
        ignored=(truth.crowd | truth.ignore)[order],
    )


def found_of_results(results: Results, truth: Truth) -> Found:
    """Detections of the classes of the split."""
    image = np.searchsorted(truth.image_ids, results.image_id)
    order = np.lexsort((-results.score, image))
    order = order[results.class_index[order] >= 0]
    return Found(
        image=image[order],
        box=corners(results.xywh[order]),
        class_index=results.class_index[order],
        score=results.score[order],
        judged=is_verified(truth, results, order),
        not_exhaustive=is_not_exhaustive(truth, results, order),
    )


def judge(objects: Objects, found: Found) -> Errors:
    """Name the error of each detection of all images, see `ezsd.metrics.error_kinds`."""
    errors = Errors(
        kind=np.full(len(found.image), NOT_JUDGED),
        matched=np.full(len(found.image), -1),
        found_at=np.where(objects.ignored, np.inf, -1.0),
    )
    for position in np.unique(found.image).tolist():
        rows, true_rows, of_image = found.rows(position), objects.rows(position), judge_image(objects, found, position)
        errors.kind[rows], errors.matched[rows] = of_image.kind, of_image.matched
        errors.found_at[true_rows] = of_image.found_at
    return errors


def judge_image(objects: Objects, found: Found, position: int) -> Errors:
    """Errors of the detections of one image alone."""
    rows, true_rows = found.rows(position), objects.rows(position)
    judged = np.flatnonzero(found.judged[rows])
    score = found.score[rows][judged]
    of_image = error_kinds(
        (found.box[rows][judged], found.class_index[rows][judged], score),
        TrueBoxes(
            objects.box[true_rows],
            objects.class_index[true_rows],
            objects.crowd[true_rows],
            objects.ignored[true_rows],
        ),
        not_exhaustive=found.not_exhaustive[rows][judged],
    )
    kind, matched = np.full(rows.stop - rows.start, NOT_JUDGED), np.full(rows.stop - rows.start, -1)
    kind[judged], matched[judged] = [KINDS.index(one) for one in of_image.kind.tolist()], of_image.matched
    found_at = np.where(objects.ignored[true_rows], np.inf, -1.0)
    has = np.isin(of_image.kind, HAVING)
    np.maximum.at(found_at, of_image.matched[has], score[has])
    return Errors(kind=kind, matched=matched, found_at=found_at)


def images_with(
    class_index: int | None,
    kind: Kind | None,
    *,
    objects: Objects,
    found: Found | None,
    errors: Errors | None,
    threshold: float,
) -> NDArray[np.int64]:
    """Positions of images, ascending, that show a class or an error of a kind, or an error of a kind of a class.

    An error is of a class if the detection or its object is.

    Args:
        class_index: the class; None for any.
        kind: the kind; None for any object or detection.
        objects: what is there.
        found: what was found; None where nothing was detected.
        errors: kinds of these, where a kind is asked for; else None.
        threshold: detections below this score are left out.
    """
    assert kind is None or errors is not None
    shown = []
    if kind is None or kind == "missed":
        of_objects = np.ones(len(objects.image), np.bool_) if errors is None else errors.found_at < threshold
        if class_index is not None:
            of_objects &= objects.class_index == class_index
        shown.append(objects.image[of_objects])
    if found is not None and kind != "missed":
        of_found = found.score >= threshold
        if kind is not None and errors is not None:
            of_found &= errors.kind == KINDS.index(kind)
        if class_index is not None:
            of_found &= (found.class_index == class_index) | (_class_matched(objects, found, errors) == class_index)
        shown.append(found.image[of_found])
    return np.unique(np.concatenate(shown))


def _class_matched(objects: Objects, found: Found, errors: Errors | None) -> NDArray[np.int64]:
    """Class of the object that each detection's kind is about, -1 for none, (N,)."""
    if errors is None or not len(objects.image):
        return np.full(len(found.image), -1)
    row = np.searchsorted(objects.image, found.image) + errors.matched
    has = errors.matched >= 0
    return np.where(has, objects.class_index[np.where(has, row, 0)], -1)


def _rows(image: NDArray[np.int64], position: int) -> slice:
    start, stop = np.searchsorted(image, [position, position + 1])
    return slice(int(start), int(stop))


def as_rows(box: NDArray[np.floating], *columns: Sequence[object]) -> list[list[object]]:
    """Boxes (n, 4) with further columns (n,), as JSON has them: hundredths of a pixel."""
    corners = np.asarray(box, np.float64).round(2).tolist()
    return [[*one, *rest] for one, *rest in zip(corners, *columns, strict=True)]
