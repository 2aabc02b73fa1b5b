"""The proposal network: torchvision's head and anchors; matching, sampling and suppression do not wait for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.rpn import RPNHead, concat_box_prediction_layers
from torchvision.ops import batched_nms

from ezsd.boxes import apply_deltas, deltas_between, iou
from ezsd.detector.sampling import draw_balanced, overlapped
from ezsd.transfer import to_device

SAMPLED_ANCHORS = 256
"""Anchors per image that the proposal network learns from, at most half of them on objects."""
NMS_IOU = 0.7
"""IoU threshold of NMS, within a level of the pyramid."""
OBJECT_IOU, NEGATIVE_IOU = 0.7, 0.3
"""IoU from which an anchor is taught to be an object, and below which to be none, unless it overlaps an ignored region
this much. The anchors that overlap an object most are taught to be it, too."""
SMALLEST = 1e-3
"""Least width and height of a proposal, input pixels."""
_BETA = 1 / 9
"""Difference at which smooth L1 turns from a parabola to a line."""
_ROUNDS = 8
"""Rounds of NMS on a GPU between two looks at whether it is done."""


@dataclass(frozen=True, slots=True)
class Proposals:
    """Boxes of a batch, best first."""

    boxes: Tensor
    """(B, P, 4), input pixels; zeros below the last."""
    scores: Tensor
    """Objectness in [0, 1], (B, P)."""
    marks: Tensor
    """Marks the boxes among the rows, (B, P) bool."""


@dataclass(frozen=True, slots=True)
class AnchorPredictions:
    """Predictions for the A anchors of each image."""

    anchors: Tensor
    """(A, 4), input pixels; level after level."""
    levels: list[int]
    """Anchors of each level."""
    objectness: Tensor
    """Logits, (B, A) float32."""
    deltas: Tensor
    """From anchor to box, (B, A, 4) float32."""


@dataclass(frozen=True, slots=True)
class AnchorLosses:
    """Terms of the loss, means over the sampled anchors."""

    objectness: Tensor
    box: Tensor
    sampled: Tensor
    """Number of sampled anchors, a scalar."""


class ProposalNetwork(nn.Module):
    """Region proposal network of torchvision's parts.

    Args:
        channels: width of the pyramid.
        sizes: anchor size per level, input pixels; ratios are 1/2, 1, 2.
        proposals: boxes per image that it hands on.
        nms_iou: IoU threshold of NMS, within a level.

    Source: Ren et al., Faster R-CNN (arXiv 1506.01497).
    """

    def __init__(self, channels: int, sizes: tuple[int, ...], *, proposals: int, nms_iou: float = NMS_IOU) -> None:
        super().__init__()
        self.proposals, self.nms_iou = proposals, nms_iou
        self.anchor_generator = AnchorGenerator(tuple((size,) for size in sizes), ((0.5, 1.0, 2.0),) * len(sizes))
        self.head = RPNHead(channels, self.anchor_generator.num_anchors_per_location()[0])

    # torch's own method, which all of `to`, `cuda` and `float` call.
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ProposalNetwork:  # noqa: FBT001, FBT002
        # torchvision moves them when they are first used, which waits for a GPU.
        self.anchor_generator.cell_anchors = [fn(cell) for cell in self.anchor_generator.cell_anchors]
        moved: ProposalNetwork = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return moved

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> AnchorPredictions:
        """Predict objectness and deltas of all anchors.

        Args:
            maps: pyramid levels (B, C, H, W), finest first.
            size: height and width of the padded images.
        """
        objectness, deltas = self.head(list(maps))
        levels = [one[0].numel() for one in objectness]
        # Convolutions in autocast's type; what becomes of their results is computed in float32.
        logits, moves = concat_box_prediction_layers([o.float() for o in objectness], [d.float() for d in deltas])
        images = len(maps[0])
        return AnchorPredictions(
            torch.cat(self.level_anchors(maps, size)), levels, logits.view(images, -1), moves.view(images, -1, 4)
        )

    @torch.no_grad()
    def propose(self, found: AnchorPredictions, sizes: Sequence[tuple[int, int]]) -> Proposals:
        """Boxes of the best anchors of each level, inside their images, after NMS.

        Args:
            found: the predictions.
            sizes: (height, width) of each image without padding.
        """
        best = self.proposals * (2 if self.training else 1)
        counts = [min(best, level) for level in found.levels]
        first, tops = 0, []
        for level, count in zip(found.levels, counts, strict=True):
            tops.append(found.objectness[:, first : first + level].topk(count, 1).indices + first)
            first += level
        top = torch.cat(tops, 1)
        chosen = found.deltas.gather(1, top[:, :, None].expand(-1, -1, 4))
        limits = torch.tensor([(width, height, width, height) for height, width in sizes], dtype=torch.float32)
        inside = torch.minimum(
            apply_deltas(found.anchors[top], chosen).clamp(min=0), to_device(limits, top.device)[:, None]
        )
        whole = ((inside[:, :, 2:] - inside[:, :, :2]) >= SMALLEST).all(2)
        scores = found.objectness.gather(1, top).sigmoid()
        suppress = suppress_on_gpu if top.is_cuda else suppress_on_cpu
        return suppress(inside, scores, whole, counts, iou_threshold=self.nms_iou, keep=self.proposals)

    def losses(
        self,
        found: AnchorPredictions,
        boxes: Sequence[Tensor],
        seeds: Tensor,
        spared: tuple[Tensor, Tensor] | None = None,
    ) -> AnchorLosses:
        """Losses of sampled anchors.

        Args:
            found: the predictions.
            boxes: objects of each image, (N, 4), input pixels.
            seeds: of each image's sample, (B,) int64.
            spared: boxes that may hold an object without a label, (B, U, 4), and marks of those that count, (B, U):
                anchors on them are no negatives.
        """
        with torch.no_grad():
            positive, negative, targets = self._match(found.anchors, boxes, spared)
            drawn = draw_balanced(positive, negative, seeds, count=SAMPLED_ANCHORS, share=0.5)
            sampled = drawn.counted.sum()
            some = min(SAMPLED_ANCHORS // 2, drawn.rows.shape[1])
            rows, on_object = drawn.rows[:, :some, None].expand(-1, -1, 4), drawn.positive[:, :some, None]
            moves = deltas_between(found.anchors[drawn.rows[:, :some]], targets.gather(1, rows))
            wanted = torch.where(on_object, moves, 0)
        box = F.smooth_l1_loss(found.deltas.gather(1, rows) * on_object, wanted, beta=_BETA, reduction="sum")
        every = F.binary_cross_entropy_with_logits(
            found.objectness.gather(1, drawn.rows), drawn.positive.float(), reduction="none"
        )
        count = sampled.clamp(min=1)
        return AnchorLosses((every * drawn.counted).sum() / count, box / count, sampled)

    def level_anchors(self, maps: Sequence[Tensor], size: tuple[int, int]) -> list[Tensor]:
        """Anchors (A, 4) of each level of a pyramid of images of a padded height and width, input pixels."""
        grids = [(one.shape[2], one.shape[3]) for one in maps]
        strides = [(size[0] // rows, size[1] // columns) for rows, columns in grids]
        anchors: list[Tensor] = self.anchor_generator.grid_anchors(grids, strides)
        return anchors

    def _match(
        self, anchors: Tensor, boxes: Sequence[Tensor], spared: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Marks of anchors on objects and on none, (B, A), and the box that each would have, (B, A, 4)."""
        # Image by image: one with many objects would make all of them large.
        found = [_match_image(anchors, one) for one in boxes]
        positive, negative, targets = (torch.stack(parts) for parts in zip(*found, strict=True))
        if spared is not None:
            others, marks = spared
            for number, one in enumerate(negative):
                one &= ~overlapped(anchors, others[number], marks[number], iou_floor=NEGATIVE_IOU)
        return positive, negative, targets


def _match_image(anchors: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not len(boxes):
        nothing = torch.zeros(len(anchors), dtype=torch.bool, device=anchors.device)
        return nothing, ~nothing, torch.zeros_like(anchors)
    overlap = iou(boxes, anchors)
    most, nearest = overlap.max(0)
    closest = (overlap == overlap.amax(1, keepdim=True)).any(0)
    return closest | (most >= OBJECT_IOU), ~closest & (most < NEGATIVE_IOU), boxes[nearest]


def suppress_on_cpu(
    boxes: Tensor, scores: Tensor, marks: Tensor, levels: Sequence[int], *, iou_threshold: float, keep: int
) -> Proposals:
    """NMS within each level of each image by torchvision, whose results the host counts.

    Args:
        boxes: (B, K, 4); best first within each level.
        scores: (B, K).
        marks: boxes that take part, (B, K) bool.
        levels: numbers of boxes of each level, which are K together.
        iou_threshold: boxes that overlap a better one more than this are dropped.
        keep: most boxes per image.
    """
    level = torch.arange(len(levels)).repeat_interleave(torch.tensor(levels))
    kept = []
    for box, score, mark in zip(boxes, scores, marks, strict=True):
        rows = torch.nonzero(mark)[:, 0]
        kept.append(rows[batched_nms(box[rows], score[rows], level[rows], iou_threshold)[:keep]])
    # As many as on a GPU, whatever the images of the batch: what is drawn among them goes by their positions.
    most = min(keep, scores.shape[1])
    made = boxes.new_zeros(len(boxes), most, 4), scores.new_zeros(len(boxes), most)
    found = Proposals(*made, torch.zeros_like(made[1], dtype=torch.bool))
    for image, rows in enumerate(kept):
        found.boxes[image, : len(rows)] = boxes[image, rows]
        found.scores[image, : len(rows)] = scores[image, rows]
        found.marks[image, : len(rows)] = True
    return found


def suppress_on_gpu(
    boxes: Tensor, scores: Tensor, marks: Tensor, levels: Sequence[int], *, iou_threshold: float, keep: int
) -> Proposals:
    """NMS of `suppress_on_cpu` for all images at once: rounds of tensor operations, of which the host looks at few.

    A box stays if no better one that stays overlaps it. Each round takes that from the round before, and so is right
    for one more link of every chain of overlaps; there is only one set of boxes that a round leaves as it is.
    """
    kept = list(marks.split(list(levels), 1))
    over = [
        _overlaps_better(box, mark, iou_threshold) for box, mark in zip(boxes.split(list(levels), 1), kept, strict=True)
    ]
    moved = True
    while moved:
        for _ in range(_ROUNDS):
            before, kept = (
                kept,
                [
                    mark & ~(one & stays[:, :, None]).any(1)
                    for one, mark, stays in zip(over, marks.split(list(levels), 1), kept, strict=True)
                ],
            )
        moved = bool(torch.stack([(a != b).any() for a, b in zip(before, kept, strict=True)]).any())
    ranked = torch.where(torch.cat(kept, 1), scores, -1).topk(min(keep, scores.shape[1]))
    found = ranked.values >= 0
    return Proposals(
        torch.where(found[:, :, None], boxes.gather(1, ranked.indices[:, :, None].expand(-1, -1, 4)), 0),
        torch.where(found, ranked.values, 0),
        found,
    )


def _overlaps_better(boxes: Tensor, marks: Tensor, threshold: float) -> Tensor:
    """Mark pairs of an earlier box that takes part and a later one that it overlaps, (B, K, K)."""
    # Image by image: the numbers that an overlap takes are many times as large as its mark.
    return torch.stack(
        [((iou(box, box) > threshold) & mark[:, None]).triu(1) for box, mark in zip(boxes, marks, strict=True)]
    )
