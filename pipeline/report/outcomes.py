"""Detections of a run beside the objects that they are judged by: kinds of errors, confusion, scores by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ezsd.cache import file_digest
from ezsd.errors import inflected, quantity
from ezsd.metrics import Results, Truth, limits_of, read_results, read_truth
from ezsd.metrics.error_kinds import KINDS
from ezsd.metrics.judging import found_of_results, judge, objects_of_truth, rows_matched
from ezsd.metrics.score_curves import ScoreCurve, score_curves
from ezsd.pipeline.data.datasets import Dataset
from ezsd.pipeline.errors import RunError
from ezsd.pipeline.inference.evaluation_tables import at_limit, evaluated
from ezsd.pipeline.report.run_data import RunData
from ezsd.pipeline.report.tables import DASH, Table
from ezsd.vocabulary import Split

SHOWN_SCORE = 0.3
"""Least score of a detection that is drawn and judged, in [0, 1]."""
OTHER_SCORES = (0.1, 0.5)
"""Further least scores that kinds of errors are counted at."""
MOST_CONFUSED = 10
"""Pairs of classes in the list of confusions, and most classes in the matrix."""
WRONG = tuple(kind for kind in KINDS if kind not in ("right", "ignored"))
"""Kinds that are errors."""
EXPLAINED = {
    "right": "a true positive of AP50, without its limit of detections: the class of a free object, IoU 0.5 or more",
    "misplaced": "the class of an object, IoU 0.1 to 0.5",
    "confused": "on an object of another class, IoU 0.5 or more",
    "doubled": "on an object of its class that a surer detection has",
    "background": "IoU below 0.1 with every object",
    "confused and misplaced": "near an object of another class, IoU 0.1 to 0.5",
    "ignored": "on a group, or of a class whose objects do not all have a box in the image: counted neither way",
    "missed objects": "no detection has them, not even a misplaced or a confused one",
}
"""Meaning of the rows of the table of kinds."""


@dataclass(frozen=True, slots=True, eq=False)
class Outcomes:
    """Kinds of the detections with at least some score, N of them, and which of the M objects are missed."""

    threshold: float
    row: NDArray[np.int64]
    """Position in the results, (N,), by image and then descending score."""
    kind: NDArray[np.str_]
    """(N,), see `ezsd.metrics.error_kinds`."""
    matched: NDArray[np.int64]
    """Position in the truth of the object that the kind is about, (N,); -1 for none."""
    missed: NDArray[np.bool_]
    """(M,), in the order of the truth."""


class _EveryKind(NamedTuple):
    """Kinds of all detections that are looked at, see `Outcomes`, and the scores at which objects are found."""

    row: NDArray[np.int64]
    kind: NDArray[np.str_]
    matched: NDArray[np.int64]
    found_at: NDArray[np.float64]
    """(M,), in the order of the truth, see `ezsd.metrics.judging.Errors`."""


class Confusion(NamedTuple):
    """Objects of some classes by the class that detections on them have."""

    names: Sequence[str]
    counts: NDArray[np.int64]
    """(C, C): objects' class by detections' class; right detections on the diagonal."""
    missed: NDArray[np.int64]
    """Missed objects of each class, (C,)."""
    background: NDArray[np.int64]
    """Detections of each class that lie on no object, (C,)."""
    pairs: Table
    """The most frequent pairs."""


@dataclass(frozen=True)
class Judged:
    """Detections of the main run, all classes detected at once, and the validation objects."""

    truth: Truth
    results: Results
    limit: str
    """Label of the limit of the headline."""
    base_count: int

    @cached_property
    def curves(self) -> dict[str, ScoreCurve]:
        """Curve of each class over its scores."""
        (limit,) = [one for one in limits_of(self.truth) if one.label == self.limit]
        return score_curves(self.truth, self.results, limit=limit)

    @cached_property
    def shown(self) -> Outcomes:
        """Outcomes of the detections that are drawn."""
        return self.outcomes(SHOWN_SCORE)

    def outcomes(self, threshold: float) -> Outcomes:
        """Kinds of all detections with at least this score, one of `SHOWN_SCORE` and `OTHER_SCORES`."""
        every = self._judged
        kept = self.results.score[every.row] >= threshold
        return Outcomes(
            threshold, every.row[kept], every.kind[kept], every.matched[kept], missed=every.found_at < threshold
        )

    @cached_property
    def _judged(self) -> _EveryKind:
        """Kinds of the detections at the lowest of the scores: that of a detection depends on surer ones alone."""
        objects = objects_of_truth(self.truth)
        found = found_of_results(self.results, self.truth, least=min(SHOWN_SCORE, *OTHER_SCORES))
        errors, found_at = judge(objects, found), np.empty(len(objects.row))
        found_at[objects.row] = errors.found_at
        matched = rows_matched(objects, found, errors)
        # Its last entry is what the position -1, no object, finds.
        true_row, kept = np.append(objects.row, -1), found.judged
        return _EveryKind(found.row[kept], np.array(KINDS)[errors.kind[kept]], true_row[matched[kept]], found_at)

    def right_objects(self) -> NDArray[np.bool_]:
        """True for an object that a drawn detection is right on, (M,), in the order of the truth."""
        right = np.zeros(len(self.truth.class_index), np.bool_)
        right[self.shown.matched[self.shown.kind == "right"]] = True
        return right

    def wrong_by_image(self) -> NDArray[np.int64]:
        """Number of drawn detections of each image that are wrong, in the order of the truth's images, (I,)."""
        return self._by_image(self.results.image_id[self.shown.row[np.isin(self.shown.kind, WRONG)]])

    def _by_image(self, image_id: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of times that each image of the truth occurs, (I,)."""
        ids = self.truth.image_ids
        return np.bincount(np.searchsorted(ids, image_id), minlength=len(ids)).astype(np.int64)

    def worst_images(self) -> list[tuple[int, int, int]]:
        """Images with a wrong detection or a missed object: id, wrong detections, missed objects; most errors first."""
        ids, wrong = self.truth.image_ids, self.wrong_by_image()
        missed = self._by_image(self.truth.image_id[self.shown.missed])
        order = np.argsort(-(wrong + missed), kind="stable")
        found = zip(ids[order].tolist(), wrong[order].tolist(), missed[order].tolist(), strict=True)
        return [(image, errors, gone) for image, errors, gone in found if errors + gone]


def judged(main: RunData, dataset: Dataset) -> Judged:
    """Read the detections of an evaluated run and the objects that they were judged by.

    Raises:
        RunError: the detections are gone or others, or the annotations have changed since the evaluation.
        EzsdError: (of several kinds) a file is not in order.
    """
    annotations = dataset.annotations("val")
    assert main.evaluation is not None
    _require_detections(main)
    if file_digest(annotations).sha256 != main.evaluation["annotations"]["sha256"]:
        raise RunError(f"{annotations}: has changed since the evaluation; {_again(main)}")
    names, count = main.spec["names"], main.spec["base_count"]
    truth = read_truth(annotations, Split(base=tuple(names[:count]), novel=tuple(names[count:])))
    return _judged_by(main, truth)


def judged_alike(other: RunData, main: Judged) -> Judged:
    """Read the detections of a compared run, which was evaluated on the same objects as the main one.

    Raises:
        RunError: it is not evaluated, its detections are gone or others, or it has other classes.
        EzsdError: (of several kinds) a file is not in order.
    """
    if other.evaluation is None:
        raise RunError(f"{other.run.folder}: not evaluated yet; `{other.command('eval')}` makes its detections")
    split = main.truth.split
    if (tuple(other.spec["names"]), other.spec["base_count"]) != (split.names, len(split.base)):
        raise RunError(f"{other.run.folder}: has other classes than the main run: no image shows the same objects")
    _require_detections(other)
    return _judged_by(other, main.truth)


def _require_detections(run: RunData) -> None:
    path = run.run.folder / "detections.json"
    if not path.is_file():
        raise RunError(f"{path}: missing; `{run.command('eval')}` makes it")


def _again(run: RunData) -> str:
    return f"run `{run.command('eval')}` again"


def _judged_by(run: RunData, truth: Truth) -> Judged:
    path = run.run.folder / "detections.json"
    assert run.evaluation is not None
    results = read_results(path, images=truth.sizes(), categories=truth.category_positions())
    counted = evaluated(run.evaluation)["generalised"]["detections"]
    if len(results.score) != counted:
        found = quantity(len(results.score), "detection")
        raise RunError(
            f"{path}: has {found}, and {counted} {inflected(counted, 'was', 'were')} evaluated; {_again(run)}"
        )
    return Judged(truth, results, str(run.evaluation["limit"]), run.spec["base_count"])


def kind_table(found: Judged) -> Table:
    """Detections by kind and missed objects, of base, novel and all classes, with shares in percent."""
    base_detection = found.results.class_index[found.shown.row] < found.base_count
    base_object = found.truth.class_index < found.base_count
    counted = ~(found.truth.crowd | found.truth.ignore)
    rows = []
    for kind in KINDS:
        marks = found.shown.kind == kind
        if kind != "ignored" or marks.any():
            rows.append([kind, *_by_group(marks, np.ones_like(marks), base_detection)])
    missed = _by_group(found.shown.missed, counted, base_object)
    rows.append(["missed objects", *missed])
    return Table(["number (%)", "base", "novel", "all"], rows, EXPLAINED)


def _by_group(marks: NDArray[np.bool_], among: NDArray[np.bool_], is_base: NDArray[np.bool_]) -> list[str]:
    """Marked ones of base, novel and all classes, as numbers and percent."""
    groups = (is_base, ~is_base, np.ones_like(is_base))
    return [_share(int((marks & one).sum()), int((among & one).sum())) for one in groups]


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({100 * part / whole:.1f})" if whole else DASH


def threshold_table(found: Judged) -> Table:
    """Kinds of errors of all classes at several least scores."""
    each = sorted([found.shown, *(found.outcomes(score) for score in OTHER_SCORES)], key=lambda one: one.threshold)
    rows = [[kind, *(f"{int((one.kind == kind).sum()):,}" for one in each)] for kind in KINDS if kind != "ignored"]
    rows.append(["missed objects", *(f"{int(one.missed.sum()):,}" for one in each)])
    return Table(["number, all classes", *(f"score {one.threshold} or more" for one in each)], rows)


def confusion(found: Judged) -> Confusion | None:
    """Most confused pairs of classes, and the matrix of the classes in them; None where no detection is confused."""
    names, outcomes = found.truth.split.names, found.shown
    label = found.results.class_index[outcomes.row]
    on_object = np.isin(outcomes.kind, ("right", "confused"))
    counts = np.zeros((len(names), len(names)), np.int64)
    np.add.at(counts, (found.truth.class_index[outcomes.matched[on_object]], label[on_object]), 1)
    mistaken = counts - np.diag(np.diag(counts))
    if not mistaken.any():
        return None
    objects = np.bincount(found.truth.class_index[~(found.truth.crowd | found.truth.ignore)], minlength=len(names))
    order = np.argsort(-mistaken, axis=None, kind="stable")
    pairs = [divmod(int(place), len(names)) for place in order if mistaken.flat[place]]
    shown: dict[int, None] = {}
    for pair in pairs:
        if len(shown.keys() | set(pair)) <= MOST_CONFUSED:
            shown |= dict.fromkeys(pair)
    chosen = sorted(shown)
    rows = [
        [names[true], names[said], f"{counts[true, said]:,}", f"{objects[true]:,}"]
        for true, said in pairs[:MOST_CONFUSED]
    ]
    missed = np.bincount(found.truth.class_index[outcomes.missed], minlength=len(names))
    background = np.bincount(label[outcomes.kind == "background"], minlength=len(names))
    return Confusion(
        names=[names[index] for index in chosen],
        counts=counts[np.ix_(chosen, chosen)],
        missed=missed[chosen],
        background=background[chosen],
        pairs=Table(["objects of", "detected as", "detections", "objects in all"], rows),
    )


def threshold_advice(curves: Mapping[str, ScoreCurve]) -> Table:
    """Precision and recall of each class with objects, at the threshold of its highest F1 and at the drawn one."""
    rows = []
    for name, curve in curves.items():
        if curve.objects:
            best, shown = curve.best(), curve.at(SHOWN_SCORE)
            at_best = [DASH] * 4 if best is None else [f"{best.threshold:.2f}", *_percents(best.precision, best.recall)]
            at_best = at_best if best is None else [*at_best, f"{100 * best.f1:.1f}"]
            rows.append([name, *at_best, *_percents(shown.precision, shown.recall), f"{curve.objects:,}"])
    head = ["threshold", "precision, %", "recall, %", "F1, %"]
    return Table(
        ["class", *head, f"precision at {SHOWN_SCORE}, %", f"recall at {SHOWN_SCORE}, %", "objects"],
        rows,
    )


def _percents(*values: float | None) -> list[str]:
    return [DASH if value is None else f"{100 * value:.1f}" for value in values]


def ap50(main: RunData) -> Mapping[str, float | None]:
    """AP50 of each evaluated class, in [0, 1]."""
    assert main.evaluation is not None
    return {name: one["AP50"] for name, one in at_limit(main.evaluation, "generalised")["per_class"].items()}
