"""Evaluate detections against an annotation file: COCO's rules, or LVIS's for a federated file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
import numpy.typing as npt

from ezsd.data.catalogue import FREQUENCIES
from ezsd.metrics.average_precision import ClassScores, Curves, GroupScores, class_scores, group_scores
from ezsd.metrics.ground_truth import Truth, read_truth
from ezsd.metrics.limits import Limit
from ezsd.metrics.matching import AREAS, Matches, Shape, Size, is_listed, match
from ezsd.metrics.results import Results
from ezsd.vocabulary import Split, resolve

COCO_LIMITS = (Limit(100), Limit(300), Limit(100, per_class=True))
"""100 detections per image, as most results are reported; 300, as this method's authors count; pycocotools' own."""
LVIS_LIMITS = (Limit(300),)
"""300 detections per image, the only limit of the official lvis package."""


class Evaluation(TypedDict):
    """Figures of one evaluation; made of texts, numbers, lists and None, so it goes into JSON."""

    rules: str
    """"coco" or "lvis"."""
    iou_type: str
    """Shapes that overlap was measured of: "bbox" or "segm"."""
    max_detections: int
    """Most detections that counted, in all figures."""
    counted_per: str
    """Scope of `max_detections`: "image", or "image and class"."""
    images: int
    """Images of the file, all evaluated."""
    names: list[str]
    """Evaluated classes, in the order of the split."""
    base: GroupScores
    novel: GroupScores
    all: GroupScores
    rare: NotRequired[GroupScores]
    """Figures of LVIS's rare classes, by the frequency that the file states; `common` and `frequent` likewise."""
    common: NotRequired[GroupScores]
    frequent: NotRequired[GroupScores]
    per_class: dict[str, ClassScores]
    """Figures of all classes of the split."""


def evaluate(
    annotations_path: Path,
    results: Results,
    split: Split,
    *,
    names: Sequence[str] | None = None,
    limit: Limit | None = None,
) -> Evaluation:
    """Score detections against all images of an annotation file.

    Ground truth is the file's own boxes, unclipped; crowd boxes are neither found nor missed. By LVIS's rules, for a
    federated file, a detection of a class that was not looked for in its image does not count, and one that finds
    nothing is not wrong where the class's boxes are not exhaustive.

    Args:
        annotations_path: a COCO- or LVIS-format file that knows all names of the split.
        results: detections in images of that file; may be empty, which gives 0 and not None.
        split: the class table the results index, and the groups.
        names: evaluate these classes only and ignore detections of others; None for all. See the package for what
            that does and does not mean.
        limit: which detections count; None for the first of `limits_of`.

    Returns:
        The figures of base, novel and all, and of every class.

    Raises:
        AnnotationError: the file is not in order, or has no image.
        VocabularyError: `names` has one that is not in the split.
        ValueError: detections of an unknown image or class index.
    """
    truth = read_truth(annotations_path, split)
    chosen = limit or limits_of(truth)[0]
    return evaluate_at(truth, results, names=names, limits=[chosen])[chosen.label]


def limits_of(truth: Truth) -> tuple[Limit, ...]:
    """Limits at which results on a file are reported, the usual one first."""
    return LVIS_LIMITS if truth.federated else COCO_LIMITS


def evaluate_at(
    truth: Truth,
    results: Results,
    *,
    names: Sequence[str] | None = None,
    limits: Sequence[Limit],
    shape: Shape = "bbox",
) -> dict[str, Evaluation]:
    """Evaluate at several limits against a file already read; boxes are matched once. See `evaluate`.

    With `shape` "segm" masks must overlap instead of boxes; the truth and the detections must have them.

    Returns:
        An evaluation by each limit's label.
    """
    _check_references(results, truth)
    chosen = np.array(sorted(resolve(truth.split.names if names is None else names, truth.split.names)), dtype=np.int64)
    counting = {limit: limit.mask(results) for limit in limits}
    asked = np.isin(results.class_index, chosen) & np.logical_or.reduce(list(counting.values()))
    rows = np.flatnonzero(asked)
    rows = rows[is_verified(truth, results, rows)]
    matches = match(truth, results, rows, shape)
    return {
        limit.label: _summary(truth, chosen, _curves(truth, results, matches, chosen, kept), limit, shape)
        for limit, kept in counting.items()
    }


def _check_references(results: Results, truth: Truth) -> None:
    """Refuse detections of images or classes that the truth does not have."""
    unknown = results.image_id[~np.isin(results.image_id, truth.image_ids)]
    if len(unknown):
        raise ValueError(f"detections of image {int(unknown[0])}, which the annotation file does not have")
    outside = (results.class_index < -1) | (results.class_index >= len(truth.split.names))
    if outside.any():
        index = int(results.class_index[outside][0])
        raise ValueError(f"detections with class index {index}; the split has 0 .. {len(truth.split.names) - 1}")


def is_verified(truth: Truth, results: Results, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """True for a detection whose class a federated file knows to be present or absent in its image, (M,).

    Any other file knows it of all classes.
    """
    if truth.catalogue.federated is None:
        return np.ones(len(rows), dtype=np.bool_)
    positive = set(zip(truth.image_id.tolist(), truth.class_index.tolist(), strict=True))
    pairs = zip(results.image_id[rows].tolist(), results.class_index[rows].tolist(), strict=True)
    is_positive = np.fromiter((pair in positive for pair in pairs), dtype=np.bool_, count=len(rows))
    return is_positive | is_listed(truth, results, rows, truth.catalogue.federated.negative)


def _curves(
    truth: Truth,
    results: Results,
    matches: Mapping[Size, Matches],
    chosen: npt.NDArray[np.int64],
    counting: npt.NDArray[np.bool_],
) -> dict[Size, Curves]:
    """Curves of the chosen classes by object size, from the detections that count."""
    return {size: _curves_of(truth, results, matches[size], chosen, counting, size) for size in AREAS}


def _curves_of(
    truth: Truth,
    results: Results,
    matches: Matches,
    chosen: npt.NDArray[np.int64],
    counting: npt.NDArray[np.bool_],
    size: Size,
) -> Curves:
    least, most = AREAS[size]
    counted = ~truth.ignore & (truth.area >= least) & (truth.area <= most)
    boxes = np.bincount(truth.class_index[counted], minlength=len(truth.split.names))[chosen]
    curves = Curves(boxes)
    class_index = results.class_index[matches.row]
    for k, index in enumerate(chosen):
        of_class = np.arange(*np.searchsorted(class_index, [index, index + 1]))
        of_class = of_class[counting[matches.row[of_class]]]
        row = matches.row[of_class]
        curves.add(k, results.score[row], Matches(row, matches.matched[:, of_class], matches.ignored[:, of_class]))
    return curves


def _summary(
    truth: Truth, chosen: npt.NDArray[np.int64], curves: Mapping[Size, Curves], limit: Limit, shape: Shape
) -> Evaluation:
    split = truth.split
    is_base = chosen < len(split.base)
    names = [split.names[index] for index in chosen]
    found = {name: class_scores(curves, np.arange(len(names)) == k) for k, name in enumerate(names)}
    not_evaluated = class_scores(curves, np.zeros_like(is_base))
    evaluation = Evaluation(
        rules="lvis" if truth.federated else "coco",
        iou_type=shape,
        max_detections=limit.count,
        counted_per=limit.counted,
        images=len(truth.image_ids),
        names=names,
        base=group_scores(curves, is_base),
        novel=group_scores(curves, ~is_base),
        all=group_scores(curves, np.ones_like(is_base)),
        per_class={name: found.get(name, not_evaluated) for name in split.names},
    )
    if truth.federated:
        frequency = np.array(truth.catalogue.frequencies_of(names))
        rare, common, frequent = (group_scores(curves, frequency == letter) for letter in FREQUENCIES)
        evaluation |= {"rare": rare, "common": common, "frequent": frequent}
    return evaluation
