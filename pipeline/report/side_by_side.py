"""Detections of two runs in the same images, side by side, where they differ most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ezsd.metrics.error_kinds import HAVING
from ezsd.pipeline.data.datasets import Dataset
from ezsd.pipeline.report.galleries import Figure, Panel, detection_marks, make_figure, object_mark
from ezsd.pipeline.report.outcomes import Judged

_POINTS = 40
"""Most points of the outlines of a mask, about: there are two panels of them, on a page of limited size."""
_NAMED = 4
"""Most classes that are named one after the other in a line."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Difference:
    """An image in which the detections of two runs differ."""

    position: int
    """Position of the image among those of the truth."""
    right_alone: tuple[NDArray[np.int64], NDArray[np.int64]]
    """Objects that one run is right on and the other is not, of each run; rows of the truth."""
    wrong: tuple[int, int]
    """Wrong detections of each run."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SideBySide:
    """Pictures of two runs."""

    differing: int
    """Images in which the runs differ."""
    images: int
    """All images."""
    figures: Sequence[Figure]


def differing_images(both: tuple[Judged, Judged], most: int) -> tuple[int, list[Difference]]:
    """The number of images in which two runs differ, and up to `most` of them.

    Those come first with the most objects that one of the runs alone is right on. Of images with as many, the one comes
    first where the numbers of wrong detections are further apart.
    """
    truth = both[0].truth
    right, wrong = [one.right_objects() for one in both], [one.wrong_by_image() for one in both]
    image = np.searchsorted(truth.image_ids, truth.image_id)
    alone = (right[0] & ~right[1], right[1] & ~right[0])
    objects = np.bincount(image[alone[0] | alone[1]], minlength=len(truth.image_ids))
    apart = np.abs(wrong[0] - wrong[1])
    order = np.lexsort((-apart, -objects))
    differing = order[(objects + apart)[order] > 0].tolist()
    return len(differing), [
        Difference(
            position=position,
            right_alone=(
                np.flatnonzero(alone[0] & (image == position)),
                np.flatnonzero(alone[1] & (image == position)),
            ),
            wrong=(int(wrong[0][position]), int(wrong[1][position])),
        )
        for position in differing[:most]
    ]


def side_by_side(both: tuple[Judged, Judged], labels: tuple[str, str], dataset: Dataset, count: int) -> SideBySide:
    """Detections of two runs in the `count` validation images in which they differ most.

    A panel has the detections of a run, and the objects that it misses and the other is right on.
    """
    differing, shown = differing_images(both, count)
    return SideBySide(
        differing=differing,
        images=len(both[0].truth.image_ids),
        figures=[_figure(both, labels, one, dataset) for one in shown],
    )


def _figure(both: tuple[Judged, Judged], labels: tuple[str, str], one: Difference, dataset: Dataset) -> Figure:
    record = both[0].truth.images[one.position]
    panels = []
    for run in (0, 1):
        found, mine, theirs = both[run], one.right_alone[run].tolist(), one.right_alone[1 - run].tolist()
        marks = detection_marks(found, record, dict.fromkeys(mine, "here alone"), points=_POINTS)
        marks += [
            object_mark(found, record, row, note="missed", alarm=True) for row in theirs if found.shown.missed[row]
        ]
        panels.append(Panel(title=labels[run], marks=marks, empty="no detection with that score"))
    return make_figure(dataset.images("val").read(record), record, _said(both, labels, one), panels)


def _said(both: tuple[Judged, Judged], labels: tuple[str, str], one: Difference) -> str:
    """The difference in words."""
    parts = []
    for run in (0, 1):
        if len(one.right_alone[run]):
            groups = _by_kind(both[1 - run], one.right_alone[run].tolist())
            listed = [f"{_listed(names)} ({kind} in {labels[1 - run]})" for kind, names in groups.items()]
            parts.append(f"right in {labels[run]} alone: {', '.join(listed)}")
    parts = parts or ["the same objects are right"]
    return "; ".join([*parts, f"wrong detections: {one.wrong[0]} in {labels[0]}, {one.wrong[1]} in {labels[1]}"])


def _by_kind(found: Judged, rows: Sequence[int]) -> dict[str, list[str]]:
    """Names of objects, given as rows of the truth, by what a run makes of them: missed, misplaced or confused."""
    outcomes = found.shown
    has = np.isin(outcomes.kind, HAVING)
    pairs = zip(outcomes.matched[has].tolist(), outcomes.kind[has].tolist(), strict=True)
    # Of an object the surest detection counts, and the surest of an image come first.
    kinds = dict(reversed(list(pairs)))
    groups: dict[str, list[str]] = {}
    for row in rows:
        name = found.truth.split.names[found.truth.class_index[row]]
        groups.setdefault(kinds.get(row, "missed"), []).append(name)
    return groups


def _listed(names: Sequence[str]) -> str:
    counts = Counter(names).most_common()
    words = [name if count == 1 else f"{count} {name}" for name, count in counts[:_NAMED]]
    more = sum(count for _, count in counts[_NAMED:])
    return ", ".join([*words, f"{more} more"] if more else words)
