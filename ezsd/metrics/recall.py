"""Recall of proposals, and boxes at random as its chance level."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ezsd.boxes import iou as box_iou
from ezsd.boxes import overlaps_any


def recall_at(
    boxes_per_image: Sequence[Tensor | npt.NDArray[np.float32]],
    gt_boxes_per_image: Sequence[Tensor | npt.NDArray[np.float32]],
    iou: float = 0.5,
    top: Sequence[int] = (100, 300),
) -> dict[int, float | None]:
    """Recall of ground-truth boxes by the first k proposals of their image.

    A ground-truth box is covered if at least one of those k boxes has IoU >= `iou` with it. One
    proposal may cover several: it is a ceiling for a detector, not a one-to-one matching.

    Args:
        boxes_per_image: for each image its proposals, best first, xyxy, (R_i, 4).
        gt_boxes_per_image: for the same images, xyxy in the same pixels, (G_i, 4).
        iou: least overlap that counts, in (0, 1].
        top: the values of k, each >= 1.

    Returns:
        Recall in [0, 1] for each k, over all images together; None without any ground truth.

    Raises:
        ValueError: the numbers of images differ, or `iou` or a k is out of range.
    """
    if len(boxes_per_image) != len(gt_boxes_per_image):
        raise ValueError(f"proposals of {len(boxes_per_image)} images, ground truth of {len(gt_boxes_per_image)}")
    if not 0 < iou <= 1 or any(k < 1 for k in top):
        raise ValueError(f"iou must be in (0, 1] and every k >= 1, got {iou} and {list(top)}")
    covered = dict.fromkeys(top, 0)
    total = 0
    for boxes, gt_boxes in zip(boxes_per_image, gt_boxes_per_image, strict=True):
        overlap = box_iou(_host(gt_boxes), _host(boxes)) >= iou  # (G, R)
        total += overlap.shape[0]
        for k in covered:
            covered[k] += int(overlap[:, :k].any(dim=1).sum())
    return {k: count / total if total else None for k, count in covered.items()}


def first_overlaps(overlap: Tensor, top: Sequence[int | None]) -> Tensor:
    """Largest IoU of each object with one of the first k boxes.

    Args:
        overlap: IoU of G objects with R boxes, best first, (..., G, R).
        top: the values of k, each >= 1; None for all boxes.

    Returns:
        (..., G, len(top)); 0 where there is no box.
    """
    if not overlap.shape[-1]:
        return overlap.new_zeros(*overlap.shape[:-1], len(top))
    rising = overlap.cummax(-1).values
    last = overlap.shape[-1]
    return rising[..., [min(k or last, last) - 1 for k in top]]


def random_boxes(
    like: Tensor,
    *,
    width: int,
    height: int,
    avoid: Tensor,
    avoid_iou: float,
    nms_iou: float,
    draws: int,
    rng: np.random.Generator,
    tries: int = 8,
) -> Tensor:
    """Boxes of the sizes of given ones at random places of the image, away from some boxes where that is possible.

    Boxes after NMS are spread over the image, and so find more than as many without: chance is given the same spread.

    Args:
        like: xyxy, (R, 4), whose widths and heights are taken in their order.
        width: of the image, pixels.
        height: likewise.
        avoid: xyxy, (N, 4); a place with this IoU or more with one of them is drawn again.
        avoid_iou: in (0, 1].
        nms_iou: in (0, 1]; a place with a higher IoU with a box before it is drawn again; 1 lets all be.
        draws: number of times that all are drawn.
        rng: source of the places.
        tries: most places drawn for a box; the first is taken where all lie on boxes to avoid, and the last of the
            others where each lies on a box before it.

    Returns:
        (draws, R, 4) float32.
    """
    extent = (like[:, 2:] - like[:, :2]).double()
    room = (torch.tensor([width, height], dtype=torch.float64) - extent).clamp(min=0)
    corner = torch.from_numpy(rng.random((draws, tries, len(like), 2))) * room
    boxes = torch.cat([corner, corner + extent], -1).float()
    clear = ~overlaps_any(boxes.reshape(-1, 4), avoid, iou_floor=avoid_iou).reshape(boxes.shape[:-1])
    return torch.stack([_spread(*one, nms_iou=nms_iou) for one in zip(boxes, clear, strict=True)])


def _spread(places: Tensor, clear: Tensor, *, nms_iou: float) -> Tensor:
    """The boxes (R, 4) at the first of their places (tries, R, 4) that is clear, and not on a box before them."""
    clear, column = clear.clone(), torch.arange(places.shape[1])
    # The first of all where none is clear.
    first = clear.int().argmax(0)
    for _ in range(len(places) - 1):
        boxes = places[first, column]
        again = (box_iou(boxes, boxes) > nms_iou).tril(-1).any(1)
        if not again.any():
            break
        clear[first[again], column[again]] = False
        # Where no other is clear, the last stays.
        again &= clear.any(0)
        first = torch.where(again, clear.int().argmax(0), first)
    return places[first, column]


def _host(boxes: Tensor | npt.NDArray[np.float32]) -> Tensor:
    """Boxes as a float32 tensor on the CPU, (N, 4); a copy, since a store's arrays are read-only."""
    if isinstance(boxes, Tensor):
        return boxes.detach().to("cpu", torch.float32).reshape(-1, 4)
    return torch.from_numpy(np.array(boxes, dtype=np.float32)).reshape(-1, 4)
