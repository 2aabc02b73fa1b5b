"""Evaluations as documents and tables, and `ezsd eval --detections`: anybody's results. Loads no torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from itertools import repeat
from pathlib import Path
from typing import Any, Literal, cast

from ezsd.data.catalogue import read_catalogue
from ezsd.data.segmentations import MissingOutline, json_run_lengths
from ezsd.metrics import Limit, Results, Truth, evaluate_at, limits_of, read_results, read_truth, with_masks
from pipeline.arguments import ArgumentError, chosen_split
from pipeline.files import sha256

log = logging.getLogger("ezsd")

Classes = Literal["all", "base", "novel"]
"""Which names a detector looked for at once."""
SPACES: dict[Classes, str] = {"all": "generalised", "base": "base_only", "novel": "novel_only"}
"""What an evaluation of such detections is called."""
SHAPES = {"bbox": "boxes", "segm": "masks"}
"""What overlaps are measured of."""
COLUMNS = ("AP", "AP50", "AP75", "AR")
"""Figures of a group or a class."""
GROUPS = ("base", "novel", "all", "rare", "common", "frequent")
"""Groups of classes, of which a file may have the first three alone."""


def evaluate_results(
    detections: Path,
    annotations: Path,
    *,
    base: str | None,
    novel: str | None,
    split_file: Path | None,
    classes: Classes | None,
    max_detections: int | None,
) -> dict[str, object]:
    """Evaluate a results file in COCO's format against an annotation file.

    Masks are evaluated too where both files have them; a warning says so where the results alone do.

    Args:
        detections: the results.
        annotations: a COCO- or LVIS-format file.
        base: see `pipeline.arguments.chosen_split`, as `novel` and `split_file`.
        novel: see there.
        split_file: see there.
        classes: the names that the detector looked for; None for all. Detections of others are refused.
        max_detections: the limit of the headline; None for the usual one of the file's rules.

    Raises:
        ValueError: (of many kinds) one of the files or choices is not in order.
    """
    for path, option in ((detections, "--detections"), (annotations, "--annotations")):
        if not path.is_file():
            raise ArgumentError(f"{option} {path}: no such file")
    catalogue = read_catalogue(annotations)
    split = chosen_split(
        list(catalogue.ids),
        dict(catalogue.frequency),
        where=annotations,
        base=base,
        novel=novel,
        split_file=split_file,
    )
    truth = read_truth(annotations, split, catalogue)
    results = read_results(detections, images=truth.sizes(), categories=truth.category_positions())
    if results.masks is not None:
        try:
            truth = with_masks(truth)
        except MissingOutline:
            log.warning(
                "%s has masks, but not every object of %s has a segmentation: boxes alone are evaluated",
                detections,
                annotations,
            )
    space: Classes = classes or "all"
    _refuse_others(detections, results, truth, space)
    return document(truth, {space: results}, max_detections)


def looked_for(classes: Classes, names: int, base_count: int) -> slice:
    """The names looked for, as a slice of all names of a split."""
    return {"all": slice(0, names), "base": slice(0, base_count), "novel": slice(base_count, names)}[classes]


def _refuse_others(path: Path, results: Results, truth: Truth, classes: Classes) -> None:
    """Detections of other names show that these were not looked for alone."""
    if classes == "all":
        return
    split = truth.split
    members = looked_for(classes, len(split.names), len(split.base))
    strange = results.class_index[(results.class_index < members.start) | (results.class_index >= members.stop)]
    if len(strange):
        name = split.names[strange[0]] if strange[0] >= 0 else "a class outside the split"
        raise ArgumentError(
            f"--classes {classes}: {path} has detections of {name!r}, so more than the {classes} names was looked for; "
            f"leave --classes out, or give results of a search for the {classes} names alone"
        )


def document(truth: Truth, found: Mapping[Classes, Results], max_detections: int | None) -> dict[str, object]:
    """Everything that is said of detections: what eval.json holds, the same bytes for the same detections.

    "at" has the figures of boxes, "masks_at" those of masks, where the truth and the detections have them.

    Raises:
        ArgumentError: results are not reported at this limit.
    """
    limits = limits_of(truth)
    headline_limit = limits[0] if max_detections is None else Limit(max_detections)
    if headline_limit not in limits:
        rules = "LVIS" if truth.federated else "COCO"
        offered = ", ".join(limit.label for limit in limits if not limit.per_class)
        raise ArgumentError(f"--max-detections {max_detections}: by {rules}'s rules results are reported at {offered}")
    result: dict[str, object] = {
        "annotations": {"file": truth.path.name, "sha256": sha256(truth.path)},
        "limit": headline_limit.label,
    }
    for classes, results in found.items():
        names = truth.split.names[looked_for(classes, len(truth.split.names), len(truth.split.base))]
        result[SPACES[classes]] = {
            "detections": len(results.score),
            "most_per_image": results.fullest(),
            "at": evaluate_at(truth, results, names=names, limits=limits),
        }
        if truth.masks is not None and results.masks is not None:
            table = cast("dict[str, object]", result[SPACES[classes]])
            table["masks_at"] = evaluate_at(truth, results, names=names, limits=limits, shape="segm")
    return result


def at_limit(result: Mapping[str, object], space: str) -> dict[str, Any]:
    """The evaluation of one label space at the document's own limit."""
    table = cast("dict[str, Any]", result[space])
    found: dict[str, Any] = table["at"][result["limit"]]
    return found


def headline(result: Mapping[str, object]) -> dict[str, float | None]:
    """AP50 of base, novel and all names (generalised), and of novel names alone; None for what was not evaluated."""
    scores: dict[str, float | None] = dict.fromkeys(("base", "novel", "all", "novel_only"))
    if "generalised" in result:
        general = at_limit(result, "generalised")
        scores |= {group: general[group]["AP50"] for group in ("base", "novel", "all")}
    if "novel_only" in result:
        scores["novel_only"] = at_limit(result, "novel_only")["novel"]["AP50"]
    return scores


def coco_results(found: Results, truth: Truth) -> str:
    """Detections as a results file in COCO's format, one a line, best first within an image, with the class's name."""
    category, sizes = truth.category_ids(), truth.sizes()
    columns = zip(
        found.image_id.tolist(),
        found.class_index.tolist(),
        found.xywh.tolist(),
        found.score.tolist(),
        found.masks or repeat(None, len(found.score)),
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
    """The figures in percent, by label space and limit."""
    blocks: list[str] = []
    for space in SPACES.values():
        if space in result:
            table = cast("dict[str, Any]", result[space])
            labels = sorted(table["at"], key=lambda label: label != result["limit"])
            for figures in ("at", "masks_at"):
                found = table.get(figures, {})
                blocks += [_block(space, found[label], table["most_per_image"]) for label in labels if found]
            if per_class:
                blocks.append(_class_block(space, table["at"][result["limit"]]))
    return "\n\n".join(blocks)


def _block(space: str, found: Mapping[str, Any], fullest: int) -> str:
    title = (
        f"{space.replace('_', ' ')}: {found['rules'].upper()} rules, {SHAPES[found['iou_type']]}, "
        f"{found['images']} images, at most "
        f"{found['max_detections']} detections per {found['counted_per']} (the fullest image has {fullest})"
    )
    present = [group for group in GROUPS if group in found]
    head = f"{'':<10}" + "".join(f"{column:>7}" for column in (*COLUMNS, "classes", "boxes"))
    rows = [
        f"{group:<10}" + _cells(found[group]) + f"{found[group]['classes']:>8}{found[group]['boxes']:>8}"
        for group in present
    ]
    return "\n".join([title, head, *rows])


def _class_block(space: str, found: Mapping[str, Any]) -> str:
    width = max(len(name) for name in found["names"])
    head = f"{'class':<{width}}" + "".join(f"{column:>7}" for column in (*COLUMNS, "boxes"))
    rows = [
        f"{name:<{width}}{_cells(found['per_class'][name])}{found['per_class'][name]['boxes']:>7}"
        for name in found["names"]
    ]
    title = f"{space.replace('_', ' ')}, class by class, at most {found['max_detections']} detections per image"
    return "\n".join([title, head, *rows])


def _cells(scores: Mapping[str, float | None]) -> str:
    return "".join(f"{percent(scores[column]):>7}" for column in COLUMNS)


def percent(value: float | None) -> str:
    """A share in percent with one digit; "-" for none."""
    return "-" if value is None else f"{100 * value:.1f}"
