"""The detector as one function of tensors alone, for torch.export: image and text embeddings in, detections out.

It computes what `Detector.detect_each` does, without what a graph cannot hold: the project's own operators, branches on
what was found, and lists with an entry per image. Every image of a batch has the same size; heights, widths, images and
classes may be as many as there are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms, roi_align

from ezsd.boxes import apply_deltas
from ezsd.detector.model import Detector, SeenRegions, Vocabulary
from ezsd.detector.rpn import SMALLEST
from ezsd.kernels import Pooling

_COLUMNS = 32
"""Columns of the chessboard on whose fields the groups of an NMS lie apart, see `_suppress`."""


class Found(NamedTuple):
    """Detections of all images of a batch, image by image, best first."""

    boxes: Tensor
    """(N, 4) xyxy, pixels of the images given."""
    scores: Tensor
    """(N,) in [0, 1]."""
    classes: Tensor
    """Row of the text embeddings, (N,) int64."""
    images: Tensor
    """Image of the batch, (N,) int64."""


class ExportableDetector(nn.Module):
    """Detector of one batch of images, traceable by torch.export.

    Args:
        detector: in evaluation mode, on the CPU; its weights are shared.
        pad_multiple: heights and widths that the backbone takes are multiples of it.
        score_floor: see `Detector.detect_each`, as the rest.
        nms_iou: see there.
        keep: see there.
        class_agnostic_nms: see there.
        objectness: see there.
        masks: see there.
    """

    score_floor: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        detector: Detector,
        *,
        pad_multiple: int,
        score_floor: float,
        nms_iou: float,
        keep: int,
        class_agnostic_nms: bool,
        objectness: float,
        masks: bool,
    ) -> None:
        super().__init__()
        self.detector, self.pad_multiple = detector, pad_multiple
        self.nms_iou, self.keep = nms_iou, keep
        self.class_agnostic_nms, self.objectness, self.masks = class_agnostic_nms, objectness, masks
        backbone = detector.backbone
        # Tensors keep their names in an exported file: a floor can be found and changed there.
        self.register_buffer("score_floor", torch.tensor(score_floor))
        self.register_buffer("mean", torch.tensor(backbone.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(backbone.std)[:, None, None])

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, H, W) uint8 RGB and unit rows (C, D) to the fields of `Found`, and masks (N, M, M) if asked."""
        detector, (height, width) = self.detector, image.shape[2:]
        # In this form torch.export knows that the sum of side and padding is a multiple.
        bottom, right = (
            (side + self.pad_multiple - 1) // self.pad_multiple * self.pad_multiple - side for side in (height, width)
        )
        padded = F.pad((image / 255 - self.mean) / self.std, (0, right, 0, bottom))
        maps = detector.backbone(padded)
        boxes, objectness, marks, index = self._propose(maps, (padded.shape[2], padded.shape[3]), height, width)
        levels = maps[: detector.head.pooling.levels]
        pooled = pool(detector.head.features(levels), boxes, index, detector.head.pooling)
        seen = SeenRegions(
            boxes=boxes, objectness=objectness, marks=marks, counts=[], regions=detector.head.embed_pooled(pooled)
        )
        found, slots = self._name(seen, index, text, height, width)
        if not self.masks:
            return tuple(one[slots] for one in found)
        assert detector.mask_head is not None
        # In all slots, whose number is known before anything is found.
        cells = detector.mask_head.predict(pool(levels, found.boxes, found.images, detector.mask_head.pooling))
        return (*(one[slots] for one in found), cells.sigmoid()[slots])

    def _propose(
        self, maps: list[Tensor], size: tuple[int, int], height: int, width: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`ProposalNetwork.propose`: boxes (R, 4), objectness (R,), marks (R,) and images (R,) of B x P slots."""
        rpn, images = self.detector.rpn, maps[0].shape[0]
        boxes, scores, marks = [], [], []
        for anchors, logit, delta in zip(rpn.level_anchors(maps, size), *rpn.head(maps), strict=True):
            logits = logit.permute(0, 2, 3, 1).flatten(1)
            deltas = delta.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)
            # As many are taken from a level with fewer anchors, which the exporter need not know: the rest are marked.
            none = torch.full_like(logits[:, :1], -torch.inf).expand(-1, rpn.proposals)
            best = torch.cat([logits, none], 1).topk(rpn.proposals, 1)
            row = best.indices.clamp(max=anchors.shape[0] - 1)
            moved = apply_deltas(anchors[row], deltas.gather(1, row[:, :, None].expand(-1, -1, 4)))
            boxes.append(moved)
            scores.append(best.values.sigmoid())
            marks.append(best.values > -torch.inf)
        inside = _clip(torch.cat(boxes, 1), height, width)
        whole = torch.cat(marks, 1) & ((inside[:, :, 2:] - inside[:, :, :2]) >= SMALLEST).all(2)
        level = torch.arange(len(boxes)).repeat_interleave(rpn.proposals)
        image = torch.arange(images)[:, None].expand(-1, len(level))
        group = image * len(boxes) + level
        score = torch.cat(scores, 1)
        rows = torch.nonzero(whole.flatten())[:, 0]
        box, image = inside.flatten(0, 1)[rows], image.flatten()[rows]
        score, group = score.flatten()[rows], group.flatten()[rows]
        kept = _suppress(box, score, group, height, width, rpn.nms_iou)
        slot, taken = _slots(image[kept], images, rpn.proposals)
        kept = kept[taken]
        slots = images * rpn.proposals
        return (
            box.new_zeros(slots, 4).index_put((slot,), box[kept]),
            score.new_zeros(slots).index_put((slot,), score[kept]),
            score.new_zeros(slots).index_put((slot,), torch.ones_like(score[kept])) > 0,
            torch.arange(images)[:, None].expand(-1, rpn.proposals).flatten(),
        )

    def _name(self, seen: SeenRegions, index: Tensor, text: Tensor, height: int, width: int) -> tuple[Found, Tensor]:
        """Detections in `keep` slots for each image, and the slots that hold one, (N,) int64."""
        detector = self.detector
        moved, own, probability = detector.name_regions(seen, Vocabulary(text=text))
        if self.objectness:
            probability = probability ** (1 - self.objectness) * seen.objectness[:, None] ** self.objectness
        probability = torch.where(seen.marks[:, None], probability, -1)
        moved = _clip(moved, height, width)
        whole = ((moved[..., 2:] - moved[..., :2]) >= 1).all(-1)
        rows = torch.nonzero((probability >= self.score_floor) & whole.gather(1, own))
        region, label = rows[:, 0], rows[:, 1]
        box, score, image = moved[region, own[region, label]], probability[region, label], index[region]
        group = image if self.class_agnostic_nms else image * text.shape[0] + label
        kept = _suppress(box, score, group, height, width, self.nms_iou)
        images = seen.marks.shape[0] // detector.rpn.proposals
        slot, taken = _slots(image[kept], images, self.keep)
        kept = kept[taken]
        slots = images * self.keep
        found = Found(
            boxes=box.new_zeros(slots, 4).index_put((slot,), box[kept]),
            scores=score.new_full((slots,), -1).index_put((slot,), score[kept]),
            classes=label.new_zeros(slots).index_put((slot,), label[kept]),
            images=torch.arange(images)[:, None].expand(-1, self.keep).flatten(),
        )
        return found, torch.nonzero(found.scores >= 0)[:, 0]


def pool(maps: list[Tensor], boxes: Tensor, image_index: Tensor, pooling: Pooling) -> Tensor:
    """`ezsd.kernels.roi_align` by torchvision's operator, each box on its own level: (R, C, P, P)."""
    bound = pooling.bind(maps)
    level_of = bound.level_of(boxes)
    regions = torch.cat([image_index[:, None].to(boxes.dtype), boxes], 1)
    pooled = maps[0].new_zeros(boxes.shape[0], bound.channels, bound.bins, bound.bins)
    for level, feature in enumerate(bound.maps):
        rows = torch.nonzero(level_of == level)[:, 0]
        mine = roi_align(
            feature, regions[rows], bound.bins, bound.scale / 2**level, sampling_ratio=bound.samples, aligned=True
        )
        pooled = pooled.index_put((rows,), mine)
    return pooled


def _clip(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes (..., 4) within an image."""
    limit = torch.cat([boxes.new_ones(1) * width, boxes.new_ones(1) * height]).repeat(2)
    return torch.minimum(boxes.clamp(min=0), limit)


def _suppress(boxes: Tensor, scores: Tensor, group: Tensor, height: int, width: int, iou_threshold: float) -> Tensor:
    """NMS within each group: positions (K,) of the boxes (N, 4) that stay, best first.

    Boxes of different groups are moved apart, as torchvision's `batched_nms` does, but on a chessboard instead of a
    line: float32 then holds small parts of a pixel also with a thousand groups.
    """
    down, right = group // _COLUMNS * (height + 1), group % _COLUMNS * (width + 1)
    place = torch.stack([right, down, right, down], 1).to(boxes.dtype)
    kept: Tensor = nms(boxes + place, scores, iou_threshold)
    return kept


def _slots(image: Tensor, images: int, most: int) -> tuple[Tensor, Tensor]:
    """Places of ranked rows in `most` slots for each image, (K,), and the rows that have one, (K,) int64."""
    mine = (image[:, None] == torch.arange(images)).to(torch.int64)
    rank = (mine.cumsum(0) * mine).sum(1) - 1
    taken = torch.nonzero(rank < most)[:, 0]
    return (image * most + rank)[taken], taken
