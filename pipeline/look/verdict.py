"""Words and tables for what was measured, on the page and in the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ezsd.errors import inflected, quantity
from ezsd.pipeline.inference.evaluation_tables import aligned, percent
from ezsd.pipeline.look.recall import HEADLINE_IOU, HEADLINE_TOP, IOUS, TOP, headline
from ezsd.pipeline.report.tables import Table

FEW_OBJECTS = 30
"""Fewer objects than this tell nothing."""
KINDS = {
    "regions": "regions",
    "named_regions": "regions with the right name",
    "proposals": "proposals, before the filters",
    "random_boxes": "random boxes of the same sizes",
}
"""Kinds of boxes by the names that readers know."""
_SIZES = ("small", "medium", "large")


def verdict(measured: Mapping[str, Any], objects: str) -> list[str]:
    """Sentences about one measurement: against chance, and where objects are lost.

    Args:
        measured: see `ezsd.pipeline.look.recall.measure`.
        objects: what the objects are called, such as "held-out base objects".
    """
    count = measured["objects"].get("all", 0)
    if not count:
        return [f"No {objects} in the images looked at: nothing to measure."]
    kind = "regions" if "regions" in measured["recall"] else "proposals"
    best, chance = headline(measured, kind), headline(measured, "random_boxes")
    assert best is not None
    assert chance is not None
    said = [
        f"The best {HEADLINE_TOP} {kind} of an image find {percent(best)} % of {count} {objects} at IoU "
        f"{HEADLINE_IOU:g}; random boxes of the same sizes find {percent(chance)} %."
    ]
    said.append(_against_chance(best, chance, count, kind))
    return said + ([_losses(measured)] if kind == "regions" else [])


def _against_chance(best: float, chance: float, count: int, kind: str) -> str:
    if count < FEW_OBJECTS:
        return f"{quantity(count, 'object is', 'objects are')} too few to tell more; look at more images (--images)."
    # Of a difference of two shares, as if objects were independent: a rough guide, and the page says so.
    error = math.sqrt((best * (1 - best) + chance * (1 - chance)) / count)
    if chance - best > 2 * error:
        return f"That is fewer than random boxes find: these {kind} lie elsewhere than the objects."
    if best - chance <= 2 * error:
        return f"So many objects do not tell that from chance: nothing shows that these {kind} know where objects are."
    times = f", {best / chance:.1f} times as many" if chance else ""
    return f"That is more than chance{times}: these {kind} know something of where objects are."


def _losses(measured: Mapping[str, Any]) -> str:
    """Sentence about the objects that are left after each step."""
    shares = [headline(measured, *one) for one in (("proposals", "all"), ("regions", "all"), ("regions",))]
    named = headline(measured, "named_regions")
    proposed, kept, best, right = (percent(value) for value in (*shares, named))
    return (
        f"Where they are lost: {proposed} % have a proposal, {kept} % a region after the filters, {best} % one of the "
        f"best {HEADLINE_TOP} regions, {right} % one of these with the right name."
    )


def placed(measured: Mapping[str, Any]) -> str:
    """Sentence about the fraction of boxes that lie on an object; "" where nobody has filtered."""
    shares = measured["on_objects"]
    if shares.get("regions") is None:
        return ""
    hits, by_chance = percent(shares["regions"]), percent(shares["random_boxes"])
    return (
        f"Of the best {HEADLINE_TOP} regions of images with such an object {hits} % lie on one, of random boxes "
        f"{by_chance} % (IoU {HEADLINE_IOU:g}). The rest is parts, background, or an object of another name."
    )


def recall_table(measured: Mapping[str, Any]) -> Table:
    """Recall in percent by kind of boxes and IoU, by number of boxes."""
    head = ["recall in %", "IoU", *(f"best {top}" if top != "all" else "all" for top in TOP)]
    rows = [
        [title if least == IOUS[0] else "", f"{least:g}", *map(percent, found["all"][str(least)].values())]
        for kind, title in KINDS.items()
        if (found := measured["recall"].get(kind)) is not None
        for least in IOUS
    ]
    return Table(head, rows)


def size_table(measured: Mapping[str, Any]) -> Table:
    """Recall in percent at `HEADLINE_IOU`, by kind of boxes and by size of the objects."""
    best = str(HEADLINE_TOP)
    head = [f"recall in %, IoU {HEADLINE_IOU:g}"]
    head += [title for size in _SIZES for title in (f"{size}: best {best}", "all")]
    counts = [cell for size in _SIZES for cell in (quantity(measured["objects"][size], "object"), "")]
    rows = [
        [KINDS[kind], *(percent(found[size][str(HEADLINE_IOU)][top]) for size in _SIZES for top in (best, "all"))]
        for kind in KINDS
        if (found := measured["recall"].get(kind)) is not None
    ]
    return Table(head, [["", *counts], *rows])


def region_table(survey: Mapping[str, Any]) -> Table:
    """Quantiles of a store's regions."""
    titles = {"per_image": "regions per image", "confidence": "confidence", "side": "root of the box's area, pixels"}
    digits = {"per_image": 0, "confidence": 3, "side": 0}
    shown = {key: survey[key] for key in titles if survey[key] is not None}
    head = ["of all regions", *(f"{100 * float(q):.0f} %" for q in next(iter(shown.values()), {}))]
    return Table(
        head, [[titles[key], *(f"{value:.{digits[key]}f}" for value in row.values())] for key, row in shown.items()]
    )


def guess_shares(survey: Mapping[str, Any]) -> dict[str, float]:
    """Fraction of a store's regions by guessed name, most first."""
    return {name: count / survey["regions"] for name, count in survey["guesses"].items()}


def name_table(named: Mapping[str, Mapping[str, Any]]) -> Table:
    """The teacher's guesses of base objects by their names, most objects first."""
    order = sorted(named, key=lambda name: (-named[name]["objects"], name))
    rows = [
        [name, str(one["objects"]), percent(one["right"]), "" if one["instead"] is None else one["instead"][0]]
        for name, one in ((name, named[name]) for name in order)
    ]
    return Table(["base name", "objects", "named right, %", "most often said instead"], rows)


def caveats(document: Mapping[str, Any]) -> Iterator[str]:
    """Reasons why figures of held-out base names are not those of novel ones."""
    store, images = document["store"], document["images"]
    looked, unseen = images["looked_at"], images["unseen"]
    if document["options"]["teacher"]:
        yield (
            "Base names are held out of the filters in groups, each name once: neither their boxes nor a guess of them "
            "drops a region then, as if they were novel. Everything else is the store's: its proposals, its teacher."
        )
        yield (
            "The names of a group compete with each other and with all novel names of the store: regions guessed as "
            f"these take places among the best {HEADLINE_TOP}, and among those that are kept of an image."
        )
    else:
        yield "Without the teacher, only proposals are measured: what the filters keep of them is not known."
    if store["re_normalised"]:
        yield (
            "The teacher was re-normalised on crops of all base names, these included: it knows them better than it "
            "knows novel ones."
        )
    yield from _of_proposals(store["search"])
    if store["search"] != "run":
        used = looked - unseen
        yield (
            f"{unseen} of the {quantity(looked, 'image')} {inflected(unseen, 'was', 'were')} used by no training of "
            f"the store (re-normalisation, proposal network); base boxes of the other {used} were."
            if used
            else "No training of the store (re-normalisation, proposal network) has used "
            + inflected(looked, "this image.", f"these {looked} images.")
        )
    yield "Sizes are those of COCO, by the area of the box: small below 32 x 32 pixels, large from 96 x 96 on."
    yield "Objects of one image are no independent sample; a difference of a few objects is noise."


def _of_proposals(search: str) -> Iterator[str]:
    split = (
        "For a figure without this, build a small store of a dataset file in which some base names are novel and which "
        "leaves out the true novel names, and evaluate that."
    )
    if search == "learned":
        yield (
            "The proposal network was trained on boxes of all base names, these included: recall of names that it has "
            f"not learned is lower. {split}"
        )
    elif search == "run":
        yield (
            "The proposals are those of a run's proposal network, which has learned boxes of these very names, perhaps "
            f"in these very images: recall of names that it has not learned is lower. {split}"
        )
    elif search == "file":
        yield "The proposals are from a file: whether their maker has learned these names or images is not known here."
    elif search == "grid, novel":
        yield (
            "The proposals are anchors with a high probability of the novel names; held-out base names had no part in "
            "that: their recall is lower than that of novel objects."
        )


def summary(document: Mapping[str, Any], target: Path) -> str:
    """Lines for the terminal: numbers, verdicts and tables."""
    numbers = document["survey"]
    lines = [
        f"{document['store']['name']}: {quantity(numbers['regions'], 'region')} of "
        f"{quantity(numbers['images'], 'image')}; {looked_at(document)}"
    ]
    lines += ["", *_section(document["held_out"], objects_of(document))]
    if document["evaluation"] is not None:
        lines += ["", "Evaluation, by novel boxes (choose no setting by it):"]
        lines += _section(document["evaluation"], "novel objects")
    return "\n".join([*lines, "", str(target)])


def looked_at(document: Mapping[str, Any]) -> str:
    """Number of images looked at, and of those that no training has used where that is known."""
    images = document["images"]
    said = f"{quantity(images['looked_at'], 'image')} looked at"
    # What a run has learned from is not recorded.
    known = document["store"]["search"] != "run"
    return f"{said}, {images['unseen']} of them used by no training of the store" if known else said


def objects_of(document: Mapping[str, Any]) -> str:
    """Name of the base objects that were measured."""
    return "held-out base objects" if document["options"]["teacher"] else "base objects"


def _section(measured: Mapping[str, Any], objects: str) -> list[str]:
    said = [*verdict(measured, objects), placed(measured)]
    lines = [line for line in said if line]
    if measured["objects"].get("all"):
        recall, sizes = recall_table(measured), size_table(measured)
        lines += ["", *aligned(recall.head, recall.rows), "", *aligned(sizes.head, sizes.rows)]
    return lines


def as_json(document: Mapping[str, Any]) -> str:
    """A document as JSON."""
    return json.dumps(document, indent=1, ensure_ascii=False)
