"""Class-agnostic region proposer: a backbone and a proposal network, trained on base boxes alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ezsd.detector.backbone import Pyramid
from ezsd.detector.rpn import NMS_IOU, ProposalNetwork
from ezsd.detector.sampling import image_seeds


class Proposer(nn.Module):
    """Region proposal network with a backbone of its own.

    Args:
        backbone: images to maps.
        sizes: anchor size per level, input pixels.
        proposals: most boxes per image.
        nms_iou: IoU threshold of NMS, within a level of the pyramid.

    Source: Ren et al., Faster R-CNN (arXiv 1506.01497).
    """

    def __init__(self, backbone: Pyramid, sizes: tuple[int, ...], *, proposals: int, nms_iou: float = NMS_IOU) -> None:
        super().__init__()
        self.backbone = backbone
        self.rpn = ProposalNetwork(backbone.channels, sizes, proposals=proposals, nms_iou=nms_iou)

    def forward(self, images: Tensor, sizes: list[tuple[int, int]], boxes: Sequence[Tensor]) -> Tensor:
        """Training loss of a batch: objectness and box regression, a scalar.

        Args:
            images: (B, 3, H, W) uint8, or float in [0, 1], padded.
            sizes: (height, width) of each image without padding.
            boxes: objects of each image, (N, 4), input pixels.
        """
        found = self.rpn(self.backbone.maps(images, sizes), images.shape[2:])
        losses = self.rpn.losses(found, boxes, image_seeds(None, len(images), images.device))
        return losses.objectness + losses.box

    @torch.no_grad()
    def propose(self, images: Tensor, sizes: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
        """Boxes (P, 4) in input pixels and their objectness (P,) in [0, 1] for each image, best first."""
        found = self.rpn.propose(self.rpn(self.backbone.maps(images, sizes), images.shape[2:]), sizes)
        rows = zip(found.boxes, found.scores, found.marks, strict=True)
        return [(boxes[marks], scores[marks]) for boxes, scores, marks in rows]
