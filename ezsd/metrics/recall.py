"""Recall of proposals."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ezsd.boxes import iou as box_iou


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


def _host(boxes: Tensor | npt.NDArray[np.float32]) -> Tensor:
    """Boxes as a float32 tensor on the CPU, (N, 4); a copy, since a store's arrays are read-only."""
    if isinstance(boxes, Tensor):
        return boxes.detach().to("cpu", torch.float32).reshape(-1, 4)
    return torch.from_numpy(np.array(boxes, dtype=np.float32)).reshape(-1, 4)
