"""Figures of the store that a run was trained from: what its filters kept, confidence of the teacher, recall.

Recall of novel objects is evaluation: it reads the novel boxes of the training images, and goes into the page alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ezsd.boxes import iou as box_iou
from ezsd.cache import JSON, Store
from ezsd.data.annotations import Annotations
from ezsd.errors import quantity
from ezsd.metrics.recall import first_overlaps
from ezsd.pipeline.extraction.provenance import proposal_settings
from ezsd.pipeline.report.tables import DASH, Table
from ezsd.proposals.refine import vote
from ezsd.proposals.select import clear_of_base

SEED = 0
"""Seed of the choice of images."""
LOOKED_AT = 1000
"""Most images that recall and filters are measured on."""
_IOUS = (0.3, 0.5, 0.7)
_BINS = 10
_NOT_RECORDED = "not recorded"
_GUESSES = {
    "drop_base_guesses": "taken for a base class by the teacher",
    "drop_background": "taken for background by the teacher",
}
"""Settings of filters by the teacher's guess, and what they drop."""
_FOUND_BY = (("base", "proposals"), ("novel", "proposals"), ("novel", "regions"))
"""Groups of objects and the boxes that are to find them."""


class ConfidenceBar(NamedTuple):
    """Regions whose confidence lies in a bin."""

    title: str
    base: int
    """Regions that the teacher takes for a base class."""
    novel: int


class StoreFigures(NamedTuple):
    """Tables and counts of a store."""

    looked_at: int
    """Images that recall and filters are measured on, chosen at random."""
    images: int
    """All images of the store."""
    regions: int
    without_region: int
    """Images without a region."""
    confidence: Sequence[ConfidenceBar]
    filters: Table
    recall: Table

    @property
    def most_in_a_bar(self) -> int:
        """Regions of the fullest bin, at least 1."""
        return max(1, *(bar.base + bar.novel for bar in self.confidence))


def store_figures(store: Store, annotations: Annotations, novel: frozenset[str]) -> StoreFigures:
    """Measure a store.

    Args:
        store: complete.
        annotations: base and novel boxes of its images, for evaluation.
        novel: names of novel classes.
    """
    ids = store.image_ids.tolist()
    confidence, counts = store.regions.column("confidence", ids)
    guess, _ = store.regions.column("class_index", ids)
    names, _ = store.text
    guessed_novel = np.array([name in novel for name in names], np.bool_)[guess]
    chosen = np.sort(np.random.default_rng(SEED).permutation(store.image_ids)[:LOOKED_AT]).tolist()
    settings = proposal_settings(store.manifest)
    looked = [_Looked.at(store, image, settings) for image in chosen]
    return StoreFigures(
        looked_at=len(chosen),
        images=len(ids),
        regions=len(confidence),
        without_region=int((counts == 0).sum()),
        confidence=_confidence(confidence, guessed_novel),
        filters=_filters(settings, looked),
        recall=_recall(looked, annotations, novel),
    )


class _Looked(NamedTuple):
    """Boxes of an image in the store, xyxy in its pixels, best first."""

    image_id: int
    stored: Tensor
    """Proposals as the store has them, (P, 4)."""
    proposals: Tensor
    """Proposals as the filters got them: after box voting, where there was any."""
    base: Tensor
    """Base boxes, (N, 4)."""
    regions: Tensor
    """(R, 4)."""

    @classmethod
    def at(cls, store: Store, image_id: int, settings: Mapping[str, JSON]) -> _Looked:
        rows = store.proposals[image_id]
        stored = proposals = torch.from_numpy(rows.box)
        if settings["refine"] != "none":
            refine_iou, nms_iou = (float(str(settings[key])) for key in ("refine_iou", "nms_iou"))
            proposals, _ = vote(stored, torch.from_numpy(rows.score), refine_iou=refine_iou, nms_iou=nms_iou)
        base, regions = (torch.from_numpy(one[image_id].box) for one in (store.ground_truth, store.regions))
        return cls(image_id, stored, proposals, base, regions)


def _confidence(confidence: NDArray[np.float32], guessed_novel: NDArray[np.bool_]) -> list[ConfidenceBar]:
    """Regions by confidence, in bins of a tenth."""
    # Of grids that were scored otherwise it can be a little more than 1.
    place = np.minimum((confidence * _BINS).astype(np.int64), _BINS - 1)
    each = [np.bincount(place[marks], minlength=_BINS) for marks in (~guessed_novel, guessed_novel)]
    return [
        ConfidenceBar(f"{i / _BINS:.1f} to {(i + 1) / _BINS:.1f}", int(each[0][i]), int(each[1][i]))
        for i in range(_BINS)
    ]


def _filters(settings: Mapping[str, JSON], looked: Sequence[_Looked]) -> Table:
    """Proposals of some images that each filter dropped, as far as the store's rows and settings tell."""
    base_iou, most = float(str(settings["base_iou"])), int(str(settings["max_regions"]))
    clear = np.array([int(clear_of_base(one.proposals, one.base, base_iou=base_iou).sum()) for one in looked], int)
    kept = np.array([len(one.regions) for one in looked], int)
    stored, entered = (sum(map(len, each)) for each in ([o.stored for o in looked], [o.proposals for o in looked]))
    # Below the limit, nothing but the teacher's guess drops a box that is clear of base objects.
    full = kept >= most
    guesses = [what for key, what in _GUESSES.items() if settings[key]]
    rows: dict[str, tuple[int | None, str]] = {}
    rows["proposals in the store"] = (stored, "what NMS kept; how many boxes it dropped is not recorded")
    if stored != entered:
        rows["joined by box voting"] = (stored - entered, "computed again")
    rows[f"on a base object (IoU {base_iou:g} or more)"] = (entered - int(clear.sum()), "computed again")
    below = int((clear - kept)[~full].sum())
    if len(guesses) == 1:
        rows[guesses[0]] = (below, "in images below the limit")
    elif guesses:
        rows |= dict.fromkeys(guesses, (None, "the store keeps no guess of a dropped box"))
        rows["by one of these two guesses"] = (below, "in images below the limit")
    beyond = f"beyond the best {most} of an image" + (", or by a guess" if guesses else "")
    unknown = "; which of them is not recorded" if guesses else ""
    rows[beyond] = (
        int((clear - kept)[full].sum()),
        f"in the {quantity(int(full.sum()), 'image')} at the limit{unknown}",
    )
    rows["kept as regions"] = (int(kept.sum()), "")
    cells = [[title, _NOT_RECORDED if count is None else f"{count:,}"] for title, (count, _) in rows.items()]
    return Table(["boxes", "number"], cells, {title: note for title, (_, note) in rows.items()})


def _recall(looked: Sequence[_Looked], annotations: Annotations, novel: frozenset[str]) -> Table:
    """Recall of annotated objects by the boxes of their image, groups left out."""
    position = {number: index for index, number in enumerate(annotations.images.id.tolist())}
    is_novel = np.array([name in novel for name in annotations.names], np.bool_)
    best: dict[str, list[Tensor]] = {f"{group} objects, by {by}": [] for group, by in _FOUND_BY}
    for one in looked:
        rows = annotations.rows(position[one.image_id])
        single = ~annotations.crowd[rows]
        boxes = torch.from_numpy(np.array(annotations.box[rows])[single])
        of_novel = torch.from_numpy(is_novel[annotations.class_index[rows]][single])
        for title, (group, by) in zip(best, _FOUND_BY, strict=True):
            wanted = boxes[of_novel if group == "novel" else ~of_novel]
            overlap = box_iou(wanted, one.regions if by == "regions" else one.proposals)
            best[title].append(first_overlaps(overlap, [None])[:, 0])
    found = {title: torch.cat(parts) for title, parts in best.items()}
    lines = [
        [
            title,
            *(f"{100 * float((each >= least).float().mean()):.1f}" if len(each) else DASH for least in _IOUS),
            f"{len(each):,}",
        ]
        for title, each in found.items()
    ]
    return Table(["recall, %", *(f"IoU {least}" for least in _IOUS), "objects"], lines)
