"""Class-agnostic region proposer: a backbone and a proposal network, trained on base boxes alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ezsd.detector.backbone import Pyramid
from ezsd.detector.rpn import NMS_IOU, proposal_network


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
        self.rpn, _ = proposal_network(backbone.channels, sizes, proposals=proposals, nms_iou=nms_iou)

    def forward(self, images: Tensor, sizes: list[tuple[int, int]], boxes: Sequence[Tensor]) -> Tensor:
        """Training loss of a batch: objectness and box regression, a scalar.

        Args:
            images: (B, 3, H, W) float in [0, 1], padded.
            sizes: (height, width) of each image without padding.
            boxes: objects of each image, (N, 4), input pixels.
        """
        maps = self.backbone.maps(images, sizes)
        _, losses = self.rpn.propose(images, sizes, maps, [{"boxes": b} for b in boxes])
        return torch.stack(list(losses.values())).sum()

    @torch.no_grad()
    def propose(self, images: Tensor, sizes: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
        """Boxes (P, 4) in input pixels and their objectness (P,) in [0, 1] for each image, best first."""
        boxes, _ = self.rpn.propose(images, sizes, self.backbone.maps(images, sizes))
        return list(zip(boxes, self.rpn.scores, strict=True))
