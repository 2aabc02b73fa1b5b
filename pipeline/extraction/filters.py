"""Explanation of a store without regions: which of the filters dropped its proposals."""

from __future__ import annotations

from pathlib import Path

import torch

from ezsd.cache import Store
from ezsd.pipeline.extraction.provenance import proposal_settings
from ezsd.proposals.refine import vote
from ezsd.proposals.select import clear_of_base

_GUESSES = {"drop_base_guesses": "look like a base name", "drop_background": "look like background"}


def why_no_regions(path: Path) -> str:
    """Explain a complete store without regions in one line: what each filter dropped, and what to build instead."""
    store = Store(path)
    settings = proposal_settings(store.manifest)
    base_iou = float(str(settings["base_iou"]))
    proposals = clear = 0
    for image in store.image_ids.tolist():
        boxes = torch.from_numpy(store.proposals[image].box)
        if settings["refine"] != "none":
            score = torch.from_numpy(store.proposals[image].score)
            refine_iou, nms_iou = (float(str(settings[key])) for key in ("refine_iou", "nms_iou"))
            boxes, _ = vote(boxes, score, refine_iou=refine_iou, nms_iou=nms_iou)
        base = torch.from_numpy(store.ground_truth[image].box)
        proposals += len(boxes)
        clear += int(clear_of_base(boxes, base, base_iou=base_iou).sum())
    dropping = [key for key in _GUESSES if settings[key]]
    if not proposals:
        cure = "give it other proposals.boxes" if _given(store) else "lower proposals.stride, or add proposals.sizes"
    elif not clear:
        cure = f"raise proposals.base_iou above {base_iou:g}"
    else:
        cure = " or ".join(f"`proposals.{key}=false`" for key in dropping)
    why = " or ".join(_GUESSES[key] for key in dropping) or "were not asked for"
    return (
        f"no region was kept, so there is nothing to distil from: of {proposals:,} proposals {proposals - clear:,} lie "
        f"on a base object, {clear:,} {why}. Build another store (`reuse={path}` `out=STORE`): {cure}; or train with "
        f"`loss.distillation=0`"
    )


def _given(store: Store) -> bool:
    return "boxes_sha256" in store.manifest.products["proposals"].inputs
