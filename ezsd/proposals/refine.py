"""Box voting: a proposal moved to where the proposals around it lie."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import nms

from ezsd.boxes import iou


def vote(boxes: Tensor, score: Tensor, *, refine_iou: float, nms_iou: float) -> tuple[Tensor, Tensor]:
    """Replace each box by the score-weighted mean of the boxes that overlap it, and apply NMS again.

    Args:
        boxes: (P, 4) xyxy, best first.
        score: scores (P,); one below zero has no vote.
        refine_iou: least IoU with a box, at which another one has a vote on it.
        nms_iou: IoU threshold of NMS.

    Returns:
        Boxes (K, 4) float32 and scores (K,), best first. A box that no vote is cast on stays.

    Source: Gidaris and Komodakis, box voting (arXiv 1505.01749).
    """
    weight = score.double().clamp(min=0) * (iou(boxes, boxes) >= refine_iou)
    total = weight.sum(1, keepdim=True)
    voted = torch.where(total > 0, weight @ boxes.double() / total, boxes.double()).float()
    kept = nms(voted, score, nms_iou)
    return voted[kept], score[kept]
