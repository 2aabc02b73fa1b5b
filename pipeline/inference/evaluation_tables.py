"""Evaluation documents and tables, and evaluation of any results file: `ezsd eval --detections`. Loads no torch."""

from __future__ import annotations

import contextlib
import json
import logging
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, Literal, cast

from ezsd.cache import file_digest
from ezsd.data.masks import MissingOutline, json_run_lengths
from ezsd.errors import inflected, quantity
from ezsd.metrics import (
    Limit,
    Results,
    Truth,
    evaluate_at,
    limits_of,
    read_results,
    read_truth_table,
    truth_of,
    with_masks,
)
from ezsd.pipeline.data.split import chosen_split, no_ground_truth
from ezsd.pipeline.errors import ArgumentError

log = logging.getLogger("ezsd")

Classes = Literal["all", "base", "novel"]
"""Names that a detector searched at once."""
Space = Literal["generalised", "base_asked", "novel_asked", "base_alone", "novel_alone"]
SPACES: dict[Space, Classes] = {
    "generalised": "all",
    "base_asked": "base",
    "novel_asked": "novel",
    "base_alone": "base",
    "novel_alone": "novel",
}
"""Names searched in each label space; "asked" while other names of a run competed unreported, "alone" without."""
_FORMER = {"base_alone": "base_only", "novel_alone": "novel_only"}
"""Label spaces by their names in earlier versions."""
SHAPES = {"bbox": "boxes", "segm": "masks"}
"""Titles of the shapes that overlap is measured of."""
COLUMNS = {
    "AP": "AP",
    "AP50": "AP50",
    "AP75": "AP75",
    "AP_small": "APs",
    "AP_medium": "APm",
    "AP_large": "APl",
    "AR": "AR",
    "AR_small": "ARs",
    "AR_medium": "ARm",
    "AR_large": "ARl",
}
"""Figures of a group or a class, with their titles in a table."""
GROUPS = ("base", "novel", "all", "rare", "common", "frequent")
"""Groups of classes; a file that is not federated has the first three."""


_MASK_KEY = b"segmentation"
_PIECE = 2**22
"""Bytes of results that are looked through at a time."""


def evaluate_results(
    detections: Path,
    annotations: Path,
    *,
    base: Sequence[str] | None,
    novel: Sequence[str] | None,
    split_file: Path | None,
    classes: Classes | None,
    max_detections: int | None,
) -> dict[str, object]:
    """Evaluate a results file in COCO's format against an annotation file.

    Masks are evaluated too where both files have them; a warning says so where the results alone do.

    Args:
        detections: the results.
        annotations: a COCO- or LVIS-format file.
        base: names of base classes, see `ezsd.pipeline.data.split.chosen_split`.
        novel: names of novel classes, likewise.
        split_file: a file with both, likewise.
        classes: the names that the detector searched; None for all. Detections of others are refused.
        max_detections: the limit of the headline; None for the usual one of the file's rules.

    Raises:
        ValueError: (of many kinds) one of the files or choices is not in order.
    """
    for name, path in (("detections", detections), ("annotations", annotations)):
        if not path.is_file():
            raise ArgumentError(f"`{name}={path}`: no such file")
    table = read_truth_table(annotations, masks=may_have_masks(detections))
    catalogue = table.catalogue()
    split = chosen_split(
        list(catalogue.ids),
        dict(catalogue.frequency),
        where=annotations,
        base=base,
        novel=novel,
        split_file=split_file,
    )
    absent = [name for name in split.novel if name not in catalogue.ids]
    if absent:
        log.warning("%s: %s", annotations, no_ground_truth(absent, catalogue.ids))
    truth = truth_of(table, split)
    results = read_results(detections, images=truth.sizes(), categories=truth.category_positions(), named=truth.named())
    if results.masks is not None:
        try:
            truth = with_masks(truth, table)
        except MissingOutline:
            log.warning(
                "%s has masks, but not every object of %s has a segmentation: boxes alone are evaluated",
                detections,
                annotations,
            )
    asked: Classes = classes or "all"
    _refuse_others(detections, results, truth, asked)
    _warn_of_unsearched(detections, results, truth, asked)
    # What else competed is not in the file.
    return document(truth, {space_of(asked, alone=False): results}, max_detections)


def may_have_masks(path: Path) -> bool:
    """Return whether the key of segmentations occurs in a file of results or annotations, before it is parsed."""
    before = b""
    # What is wrong with the file is told where it is read.
    with contextlib.suppress(OSError), path.open("rb") as file:
        while piece := file.read(_PIECE):
            if _MASK_KEY in before + piece:
                return True
            before = piece[-len(_MASK_KEY) :]
    return False


def space_of(classes: Classes, *, alone: bool) -> Space:
    """Label space of a search for these names."""
    return next(space for space, names in SPACES.items() if names == classes and space.endswith("alone") == alone)


def class_slice(classes: Classes, names: int, base_count: int) -> slice:
    """Slice of these classes among all classes of a split."""
    return {"all": slice(0, names), "base": slice(0, base_count), "novel": slice(base_count, names)}[classes]


def _refuse_others(path: Path, results: Results, truth: Truth, classes: Classes) -> None:
    """Refuse detections of other names: more was searched than said."""
    if classes == "all":
        return
    split = truth.split
    members = class_slice(classes, len(split.names), len(split.base))
    others = results.class_index[(results.class_index < members.start) | (results.class_index >= members.stop)]
    if len(others):
        name = split.names[others[0]] if others[0] >= 0 else "a class outside the split"
        raise ArgumentError(
            f"`classes={classes}`: {path} has detections of {name!r}, so more than the {classes} names was looked for; "
            f"leave `classes` out, or give the detections of the {classes} names"
        )


def _warn_of_unsearched(path: Path, results: Results, truth: Truth, classes: Classes) -> None:
    """Warn of classes that the results say were not searched; their objects count as missed."""
    split = truth.split
    members = class_slice(classes, len(split.names), len(split.base))
    unsearched = [] if results.searched is None else sorted(set(range(members.start, members.stop)) - results.searched)
    if unsearched:
        log.warning(
            "%s: %d of the %d names %s not looked for, such as %r; their objects count as missed",
            path,
            len(unsearched),
            members.stop - members.start,
            inflected(len(unsearched), "was", "were"),
            split.names[unsearched[0]],
        )


def document(truth: Truth, found: Mapping[Space, Results], max_detections: int | None) -> dict[str, object]:
    """Evaluate results in all label spaces: the contents of eval.json, the same bytes for the same results.

    "at" has the figures of boxes, "masks_at" those of masks, where the truth and the detections have them.

    Raises:
        ArgumentError: results are not reported at this limit.
    """
    limits = limits_of(truth)
    headline_limit = limits[0] if max_detections is None else Limit(max_detections)
    if headline_limit not in limits:
        rules = "LVIS" if truth.federated else "COCO"
        offered = ", ".join(limit.label for limit in limits if not limit.per_class)
        raise ArgumentError(f"`max_detections={max_detections}`: by {rules}'s rules results are reported at {offered}")
    result: dict[str, object] = {
        "annotations": {"file": truth.path.name, "sha256": file_digest(truth.path).sha256},
        "limit": headline_limit.label,
    }
    for space, results in found.items():
        names = truth.split.names[class_slice(SPACES[space], len(truth.split.names), len(truth.split.base))]
        result[space] = table = {
            "detections": len(results.score),
            "most_per_image": results.most_per_image(),
            "at": evaluate_at(truth, results, names=names, limits=limits),
        }
        if truth.masks is not None and results.masks is not None:
            table["masks_at"] = evaluate_at(truth, results, names=names, limits=limits, shape="segm")
    return result


def evaluated(result: Mapping[str, object]) -> dict[Space, dict[str, Any]]:
    """Label spaces of a document and their figures, from earlier versions as well."""
    stored = {space: result.get(space, result.get(_FORMER.get(space, ""))) for space in SPACES}
    return {space: cast("dict[str, Any]", table) for space, table in stored.items() if table is not None}


def at_limit(result: Mapping[str, object], space: Space) -> dict[str, Any]:
    """Evaluation of one label space at the document's own limit."""
    found: dict[str, Any] = evaluated(result)[space]["at"][result["limit"]]
    return found


def headline(result: Mapping[str, object]) -> dict[str, float | None]:
    """AP50 of base, novel and all classes (generalised) and of other label spaces, as far as they were evaluated."""
    scores: dict[str, float | None] = {}
    for space in evaluated(result):
        found = at_limit(result, space)
        if space == "generalised":
            scores |= {group: found[group]["AP50"] for group in ("base", "novel", "all")}
        else:
            scores[space] = found[SPACES[space]]["AP50"]
    return scores


def headline_columns(scores: Iterable[Mapping[str, float | None]]) -> dict[str, str]:
    """Titles of columns by the keys of some `headline`s, in the order of a table."""
    evaluated_keys = {key for one in scores for key in one}
    return {key: title for key, title in _TITLES.items() if key in evaluated_keys}


_TITLES = {group: group for group in ("base", "novel", "all")} | {
    space: space.replace("_asked", " asked").replace("_alone", ", alone") for space in SPACES if space != "generalised"
}


def coco_results(results: Results, truth: Truth) -> str:
    """Write results in COCO's format, one a line, best first within an image, with the class's name."""
    category, sizes = truth.category_ids(), truth.sizes()
    columns = zip(
        results.image_id.tolist(),
        results.class_index.tolist(),
        results.xywh.tolist(),
        results.score.tolist(),
        results.masks or repeat(None, len(results.score)),
        strict=True,
    )
    lines = [
        json.dumps(
            {
                "image_id": image,
                "category_id": category[index],
                "name": truth.split.names[index],
                "bbox": xywh,
                "score": score,
                **({} if counts is None else {"segmentation": json_run_lengths(counts, sizes[image])}),
            }
        )
        for image, index, xywh, score, counts in columns
    ]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def evaluation_tables(result: Mapping[str, object], *, per_class: bool) -> str:
    """Tables of the figures in percent, by label space and limit; limits with the same figures share a table."""
    blocks: list[str] = []
    for space, table in evaluated(result).items():
        labels = sorted(table["at"], key=lambda label: label != result["limit"])
        for figures in ("at", "masks_at"):
            found = table.get(figures, {})
            if found:
                blocks += _blocks(space, [found[label] for label in labels], table["most_per_image"])
        if per_class:
            blocks.append(_class_block(space, table["at"][result["limit"]]))
    return "\n\n".join(blocks)


def _blocks(space: str, evaluations: Sequence[Mapping[str, Any]], most_per_image: int) -> list[str]:
    """Tables of one label space, one for each limit whose figures differ from those of the limits before."""
    alike: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for found in evaluations:
        rows = [
            [group, *_cells(found[group]), str(found[group]["classes"]), str(found[group]["boxes"])]
            for group in GROUPS
            if group in found
        ]
        alike.setdefault(tuple(aligned(["", *COLUMNS.values(), "classes", "boxes"], rows)), []).append(found)
    blocks = []
    for lines, (first, *others) in alike.items():
        title = (
            f"{space.replace('_', ' ')}: {first['rules'].upper()} rules, {SHAPES[first['iou_type']]}, "
            f"{quantity(first['images'], 'image')}, {_limit(first)} (up to {quantity(most_per_image, 'detection')} in "
            "one image)"
        )
        same = [f"the same figures: {' and '.join(map(_limit, others))}"] if others else []
        blocks.append("\n".join([title, *lines, *same]))
    return blocks


def _limit(found: Mapping[str, Any]) -> str:
    return f"at most {quantity(found['max_detections'], 'detection')} per {found['counted_per']}"


def _class_block(space: str, found: Mapping[str, Any]) -> str:
    rows = [
        [name, *_cells(found["per_class"][name]), str(found["per_class"][name]["boxes"])] for name in found["names"]
    ]
    most = quantity(found["max_detections"], "detection")
    title = f"{space.replace('_', ' ')}, class by class, at most {most} per image"
    return "\n".join([title, *aligned(["class", *COLUMNS.values(), "boxes"], rows)])


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right, each as wide as its widest cell.

    Widths are those of a terminal, where an East Asian letter takes two columns.
    """
    widths = [max(map(_width, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for first, *others in (head, *rows):
        cells = [first + " " * (widths[0] - _width(first))]
        cells += [" " * (width - _width(cell)) + cell for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def _width(text: str) -> int:
    """Width of a text in a terminal, in columns."""
    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )


def _cells(scores: Mapping[str, float | None]) -> list[str]:
    # Earlier versions had none by size.
    return [percent(scores.get(column)) for column in COLUMNS]


def percent(value: float | None) -> str:
    """A fraction in percent with one digit; "-" for none."""
    return "-" if value is None else f"{100 * value:.1f}"
