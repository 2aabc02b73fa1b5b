"""Recall of objects by a store's boxes and by random ones, by IoU, number of boxes and size of the objects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ezsd.boxes import area
from ezsd.boxes import iou as box_iou
from ezsd.metrics.matching import AREAS, Size
from ezsd.metrics.recall import first_overlaps, random_boxes

TOP: dict[str, int | None] = {"10": 10, "20": 20, "50": 50, "all": None}
"""Numbers of an image's best boxes that may find objects; None for all."""
IOUS = (0.3, 0.5, 0.7)
"""Least IoU with an object that finds it."""
HEADLINE_IOU = 0.5
HEADLINE_TOP = 10
DRAWS = 10
"""Random boxes are drawn as often; their figures are means."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """An image, objects in it that are to be found, and boxes that may find them, best first; pixels of the image."""

    image_id: int
    width: int
    height: int
    objects: NDArray[np.float32]
    """xyxy, (G, 4)."""
    classes: NDArray[np.int32]
    """Positions of the objects' names in the store's vocabulary, (G,)."""
    base_boxes: NDArray[np.float32]
    """Boxes that the filters keep regions away from, (N, 4)."""
    proposals: NDArray[np.float32]
    """Boxes before the filters, (P, 4)."""
    regions: NDArray[np.float32] | None
    """Boxes after the filters, (R, 4); None where nobody has filtered."""
    guesses: NDArray[np.int32] | None
    """Positions of the regions' names, (R,)."""


def measure(cases: Sequence[Case], *, base_iou: float, nms_iou: float, seed: int) -> dict[str, Any]:
    """Measure recall over all objects of some cases together.

    Random boxes have the number and the sizes of the regions, in their order, and stay as far away from known base
    objects and from each other; where nobody has filtered, those of the proposals, anywhere.

    Args:
        cases: what to find by what.
        base_iou: IoU with a base box that regions are dropped from.
        nms_iou: IoU threshold of the NMS that the proposals have passed; 1 without.
        seed: seed of the random boxes.

    Returns:
        JSON: `images`, `objects` (number by size of the objects, an area of their box), `boxes` (mean number per image
        by kind of box), `recall` (kind, size, IoU, number of boxes; None without an object of that size), and
        `on_objects`: fraction of the best `HEADLINE_TOP` boxes with IoU `HEADLINE_IOU` or more with an object.
    """
    overlaps = [_overlaps(case, base_iou=base_iou, nms_iou=nms_iou, seed=seed) for case in cases]
    sides = _concatenated(area(torch.from_numpy(case.objects)).numpy() for case in cases)
    sizes = {size: _of_size(sides, size) for size in AREAS}
    found = {
        kind: _concatenated(
            np.moveaxis(first_overlaps(one[kind], list(TOP.values())).numpy(), -2, 0) for one in overlaps
        )
        for kind in (overlaps[0] if overlaps else {})
    }
    return {
        "images": len({case.image_id for case in cases}),
        "objects": {size: int(rows.sum()) for size, rows in sizes.items()},
        "boxes": {
            kind: float(np.mean([one[kind].shape[-1] for one in overlaps])) for kind in found if kind != "named_regions"
        },
        "recall": {
            kind: {size: _recall(values[rows]) for size, rows in sizes.items()} for kind, values in found.items()
        },
        "on_objects": {
            kind: _on_objects([one[kind] for one in overlaps]) for kind in ("regions", "random_boxes") if kind in found
        },
    }


def headline(measured: Mapping[str, Any], kind: str, top: str = str(HEADLINE_TOP)) -> float | None:
    """Recall of objects of all sizes at `HEADLINE_IOU`; None without objects, or without boxes of that kind."""
    found: float | None = measured["recall"].get(kind, {}).get("all", {}).get(str(HEADLINE_IOU), {}).get(top)
    return found


def _overlaps(case: Case, *, base_iou: float, nms_iou: float, seed: int) -> dict[str, Tensor]:
    """IoU of objects (G, R) by kind of box; of random boxes (DRAWS, G, R)."""
    objects, proposals = torch.from_numpy(case.objects), torch.from_numpy(case.proposals)
    rng = np.random.default_rng([seed, case.image_id])
    found = {"proposals": box_iou(objects, proposals)}
    like, avoid = proposals, objects[:0]
    if case.regions is not None and case.guesses is not None:
        like, avoid = torch.from_numpy(case.regions), torch.from_numpy(case.base_boxes)
        overlap = box_iou(objects, like)
        named = torch.from_numpy(case.guesses[None, :] == case.classes[:, None])
        found = {"regions": overlap, "named_regions": overlap * named, **found}
    drawn = random_boxes(
        like,
        width=case.width,
        height=case.height,
        avoid=avoid,
        avoid_iou=base_iou,
        nms_iou=nms_iou,
        draws=DRAWS,
        rng=rng,
    )
    flat = box_iou(objects, drawn.reshape(-1, 4))
    found["random_boxes"] = flat.reshape(len(objects), DRAWS, len(like)).transpose(0, 1)
    return found


def _concatenated(parts: Iterable[NDArray[Any]]) -> NDArray[Any]:
    """One array of all parts, along their first axis; empty without a part."""
    arrays = list(parts)
    return np.concatenate(arrays) if arrays else np.zeros(0, np.float32)


def _of_size(areas: NDArray[np.float32], size: Size) -> NDArray[np.bool_]:
    least, most = AREAS[size]
    # A side on the border belongs to the larger class, so that the classes add up.
    rows: NDArray[np.bool_] = (areas >= least) & (areas < most)
    return rows


def _recall(overlap: NDArray[np.float32]) -> dict[str, dict[str, float | None]]:
    """Recall by IoU and number of boxes, from the largest IoU of each object, (G, ..., len(TOP))."""
    return {
        str(least): {
            top: float((overlap[..., column] >= least).mean()) if len(overlap) else None
            for column, top in enumerate(TOP)
        }
        for least in IOUS
    }


def _on_objects(overlaps: Sequence[Tensor]) -> float | None:
    """Fraction of the best boxes that lie on an object."""
    hits = [(one[..., :HEADLINE_TOP].amax(-2) >= HEADLINE_IOU).flatten() for one in overlaps if one.shape[-1]]
    return float(torch.cat(hits).float().mean()) if hits else None
