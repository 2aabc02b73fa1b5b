"""Errors of the detections of many images: flat tables of objects and detections, and their kinds image by image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ezsd.metrics.error_kinds import HAVING, KINDS, TrueBoxes, error_kinds
from ezsd.metrics.evaluation import is_verified
from ezsd.metrics.ground_truth import Truth
from ezsd.metrics.matching import is_not_exhaustive
from ezsd.metrics.results import Results

NOT_JUDGED = -1
"""Number in place of a kind's: nobody has looked for the class of a detection in its image."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Boxes:
    """Boxes of many images, sorted by image, N in all."""

    image: npt.NDArray[np.int64]
    """Position of the image among all images, (N,), ascending."""
    row: npt.NDArray[np.int64]
    """Position in the table that they were taken from, (N,)."""
    xywh: npt.NDArray[np.float64]
    """Left, top, width, height in pixels, (N, 4)."""
    class_index: npt.NDArray[np.int64]
    """(N,)."""

    def rows(self, position: int) -> slice:
        """Rows of an image."""
        start, stop = np.searchsorted(self.image, [position, position + 1])
        return slice(int(start), int(stop))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Objects(Boxes):
    """Annotated objects, M in all."""

    crowd: npt.NDArray[np.bool_]
    """True for crowd regions, (M,)."""
    ignored: npt.NDArray[np.bool_]
    """True for crowd regions, and what else counts neither as found nor as missed, (M,)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Found(Boxes):
    """Detections of a run, N in all, the best of an image first."""

    score: npt.NDArray[np.float64]
    """Confidence in [0, 1], (N,)."""
    judged: npt.NDArray[np.bool_]
    """False for classes that nobody has looked for in the image, of a federated file, (N,)."""
    not_exhaustive: npt.NDArray[np.bool_]
    """True for classes whose objects do not all have a box in the image, of a federated file, (N,)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Errors:
    """Kinds of N detections and scores at which M objects are found.

    The kind of a detection depends on surer ones alone: no threshold changes it.
    """

    kind: npt.NDArray[np.int64]
    """Position in `KINDS`, or `NOT_JUDGED`, (N,)."""
    matched: npt.NDArray[np.int64]
    """Position among its image's objects of the object that the kind is about, -1 for none, (N,)."""
    found_at: npt.NDArray[np.float64]
    """Highest score of a detection that has the object, right or not, (M,): below it the object is not missed. -1 where
    there is none; inf for what is ignored."""


def objects_of_truth(truth: Truth) -> Objects:
    """All objects that an evaluation counts."""
    image = np.searchsorted(truth.image_ids, truth.image_id)
    order = np.argsort(image, kind="stable")
    return Objects(
        image=image[order],
        row=order,
        xywh=truth.xywh[order],
        class_index=truth.class_index[order],
        crowd=truth.crowd[order],
        ignored=(truth.crowd | truth.ignore)[order],
    )


def found_of_results(results: Results, truth: Truth, *, least: float = -np.inf) -> Found:
    """Detections of the classes of the split with at least some score."""
    rows = np.flatnonzero((results.class_index >= 0) & (results.score >= least))
    image = np.searchsorted(truth.image_ids, results.image_id[rows])
    order = np.lexsort((-results.score[rows], image))
    rows = rows[order]
    return Found(
        image=image[order],
        row=rows,
        xywh=results.xywh[rows],
        class_index=results.class_index[rows],
        score=results.score[rows],
        judged=is_verified(truth, results, rows),
        not_exhaustive=is_not_exhaustive(truth, results, rows),
    )


def judge(objects: Objects, found: Found, *, each: Callable[[int, int], None] | None = None) -> Errors:
    """Name the error of each detection of all images, see `ezsd.metrics.error_kinds`.

    Args:
        objects: what is there.
        found: what was found.
        each: called after each image that has a detection, with the number of such images done and of all.
    """
    errors = Errors(
        kind=np.full(len(found.image), NOT_JUDGED),
        matched=np.full(len(found.image), -1),
        found_at=_not_found(objects.ignored),
    )
    positions = np.unique(found.image).tolist()
    for done, position in enumerate(positions, start=1):
        rows, true_rows, of_image = found.rows(position), objects.rows(position), judge_image(objects, found, position)
        errors.kind[rows], errors.matched[rows] = of_image.kind, of_image.matched
        errors.found_at[true_rows] = of_image.found_at
        if each is not None:
            each(done, len(positions))
    return errors


def judge_image(objects: Objects, found: Found, position: int) -> Errors:
    """Errors of the detections of one image alone."""
    rows, true_rows = found.rows(position), objects.rows(position)
    judged = np.flatnonzero(found.judged[rows])
    score = found.score[rows][judged]
    of_image = error_kinds(
        (found.xywh[rows][judged], found.class_index[rows][judged], score),
        TrueBoxes(
            objects.xywh[true_rows],
            objects.class_index[true_rows],
            objects.crowd[true_rows],
            objects.ignored[true_rows],
        ),
        not_exhaustive=found.not_exhaustive[rows][judged],
    )
    kind, matched = np.full(rows.stop - rows.start, NOT_JUDGED), np.full(rows.stop - rows.start, -1)
    kind[judged], matched[judged] = [KINDS.index(one) for one in of_image.kind.tolist()], of_image.matched
    found_at = _not_found(objects.ignored[true_rows])
    has = np.isin(of_image.kind, HAVING)
    np.maximum.at(found_at, of_image.matched[has], score[has])
    return Errors(kind=kind, matched=matched, found_at=found_at)


def rows_matched(objects: Objects, found: Found, errors: Errors) -> npt.NDArray[np.int64]:
    """Position among all objects of the object that each detection's kind is about, -1 for none, (N,)."""
    first = np.searchsorted(objects.image, found.image)
    return np.where(errors.matched >= 0, first + errors.matched, -1)


def _not_found(ignored: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """`Errors.found_at` before a detection is looked at, (M,)."""
    return np.where(ignored, np.inf, -1.0)
