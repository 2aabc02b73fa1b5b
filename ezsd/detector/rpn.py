"""The proposal network: torchvision's, with seeded sampling and boxes that are never negatives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from ezsd.boxes import overlaps_any
from ezsd.detector.sampling import draw_balanced

SAMPLED_ANCHORS = 256
"""Anchors per image that the proposal network learns from, at most half of them on objects."""
NMS_IOU = 0.7
"""IoU threshold of NMS, within a level of the pyramid."""
NEGATIVE_IOU = 0.3
"""IoU below which an anchor is taught to be no object, unless it overlaps an ignored region this much."""


class AnchorSampler:
    """Stands in for torchvision's sampler, draws the same, and counts what it drew.

    Attributes:
        seeds: one per image of the next call; None draws from torch's global state.
        drawn: number of anchors chosen in the last call, a scalar.
    """

    def __init__(self) -> None:
        self.seeds: Sequence[int] | None = None
        self.drawn = torch.zeros((), dtype=torch.int64)

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Masks of the chosen positives and negatives of each image, by labels 1 (object), 0 (none), -1 (left out)."""
        positives, negatives = [], []
        for number, label in enumerate(labels):
            if self.seeds is not None:
                torch.manual_seed(self.seeds[number])
            positive, negative = draw_balanced(
                torch.nonzero(label >= 1)[:, 0], torch.nonzero(label == 0)[:, 0], count=SAMPLED_ANCHORS, share=0.5
            )
            nowhere = torch.zeros_like(label, dtype=torch.bool)
            positives.append(nowhere.index_fill(0, positive, value=True))
            negatives.append(nowhere.index_fill(0, negative, value=True))
        self.drawn = torch.stack([mask.sum() for mask in (*positives, *negatives)]).sum()
        return positives, negatives


class ProposalNetwork(RegionProposalNetwork):  # type: ignore[misc]
    """Region proposal network of torchvision; a target's "spared" boxes, (U, 4), cover what may be an object.

    Attributes:
        scores: objectness in [0, 1] of the boxes of the last call, best first, (P,) for each image.
    """

    scores: list[Tensor]

    def propose(
        self,
        images: Tensor,
        sizes: list[tuple[int, int]],
        maps: Sequence[Tensor],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Run the network in float32, also under autocast.

        Args:
            images: (B, 3, H, W), padded.
            sizes: (height, width) of each image without padding.
            maps: pyramid levels, finest first.
            targets: "boxes" of each image, (N, 4), and "spared" ones; None in evaluation mode.

        Returns:
            Boxes (P, 4) of each image in input pixels, best first, and in training mode torchvision's losses.
        """
        levels = {str(i): m.float() for i, m in enumerate(maps)}
        with torch.autocast(images.device.type, enabled=False):
            found: tuple[list[Tensor], dict[str, Tensor]] = self(ImageList(images, sizes), levels, targets)
        return found

    def filter_proposals(
        self,
        proposals: Tensor,
        objectness: Tensor,
        image_shapes: list[tuple[int, int]],
        num_anchors_per_level: list[int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Suppress and keep the best boxes, and keep their scores, which torchvision's `forward` drops."""
        boxes, self.scores = super().filter_proposals(proposals, objectness, image_shapes, num_anchors_per_level)
        return boxes, self.scores

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Labels 1 (object), 0 (none) and -1 (left out) per anchor, and the box of each."""
        labels, matched = super().assign_targets_to_anchors(anchors, targets)
        for label, anchor, target in zip(labels, anchors, targets, strict=True):
            spared = target.get("spared")
            if spared is not None:
                label[(label == 0) & overlaps_any(anchor, spared, iou_floor=NEGATIVE_IOU)] = -1
        return labels, matched


def proposal_network(
    channels: int, sizes: tuple[int, ...], *, proposals: int, nms_iou: float = NMS_IOU
) -> tuple[ProposalNetwork, AnchorSampler]:
    """The network and the sampler it draws with.

    Args:
        channels: width of the pyramid.
        sizes: anchor size per level, input pixels; ratios are 1/2, 1, 2.
        proposals: boxes per image that it hands on.
        nms_iou: IoU threshold of NMS, within a level.
    """
    anchors = AnchorGenerator(tuple((size,) for size in sizes), ((0.5, 1.0, 2.0),) * len(sizes))
    network = ProposalNetwork(
        anchors,
        RPNHead(channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=NEGATIVE_IOU,
        batch_size_per_image=SAMPLED_ANCHORS,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2 * proposals, "testing": proposals},
        post_nms_top_n={"training": proposals, "testing": proposals},
        nms_thresh=nms_iou,
    )
    network.fg_bg_sampler = sampler = AnchorSampler()
    return network, sampler
