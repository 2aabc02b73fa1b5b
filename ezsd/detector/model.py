"""The detector, assembled: maps -> proposals -> region embeddings -> names and boxes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import batched_nms

from ezsd.boxes import iou
from ezsd.detector.backbone import Pyramid, normalise
from ezsd.detector.heads import CosineClassifier, Pooling, SemanticBoxRegressor, Tower
from ezsd.kernels import Backend, Metric
from ezsd.losses import box_loss, classification_loss, decode_boxes, encode_boxes, region_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Training images with everything the losses need; boxes are in batched-input pixels."""

    images: Tensor
    """(B, 3, H, W) float in [0, 1], padded with zeros at the right and bottom."""
    sizes: list[tuple[int, int]]
    """(height, width) of each image without padding."""
    boxes: list[Tensor]
    """Base ground truth of each image, (N, 4)."""
    labels: list[Tensor]
    """Their classes, (N,) int64, positions in the text rows given beside the batch."""
    region_boxes: Tensor
    """Cached regions of all images, (R, 4)."""
    region_image: Tensor
    """Which image each belongs to, (R,) int64."""
    region_target: Tensor
    """Cached teacher embeddings, (R, D), any float dtype."""
    region_confidence: Tensor
    """1 for base ground truth, the teacher's confidence for a proposal, (R,) float32."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(
            images=self.images.to(device, non_blocking=True),
            sizes=self.sizes,
            boxes=[b.to(device, non_blocking=True) for b in self.boxes],
            labels=[v.to(device, non_blocking=True) for v in self.labels],
            region_boxes=self.region_boxes.to(device, non_blocking=True),
            region_image=self.region_image.to(device, non_blocking=True),
            region_target=self.region_target.to(device, non_blocking=True),
            region_confidence=self.region_confidence.to(device, non_blocking=True),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Detections:
    """What was found in one image, best first; boxes in batched-input pixels."""

    boxes: Tensor
    """(N, 4) xyxy."""
    scores: Tensor
    """(N,) in [0, 1]."""
    labels: Tensor
    """(N,) int64, positions in the text rows that were asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorSettings:
    """Everything about the detector but its weights; the values live in the presets."""

    embed_dim: int
    """D."""
    rpn_sizes: tuple[tuple[int, ...], ...]
    """Anchor sizes per level, input pixels."""
    rpn_proposals: int
    """Boxes per image that the proposal network hands on."""
    pool_size: int
    """P, bins per side."""
    canonical_size: int
    """See `Pooling`."""
    canonical_level: int
    """See `Pooling`."""
    tower_depth: int
    """Convolutions before the pooling."""
    box_hidden: int
    """Width of the box regressor's hidden layer."""
    semantic_boxes: bool
    """Whether the box regressor knows the class."""
    temperature: float
    """Start of the learned multiplier of cosines."""
    sampled_regions: int
    """Regions per image that the box head learns from."""
    positive_share: float
    """At most this share of them on objects."""
    spare_confidence: float
    """Regions on a cached region of this confidence are no background; above 1 none is spared."""
    backend: Backend
    """Kernel backend."""


class Detector(nn.Module):
    """Faster R-CNN whose regions are embedded in the teacher's space by one fused operator."""

    def __init__(self, backbone: Pyramid, settings: DetectorSettings) -> None:
        super().__init__()
        channels, pool = backbone.channels, settings.pool_size
        self.settings = settings
        self.backbone = backbone
        self.rpn = _proposal_network(backbone, settings)
        self.pooling = Pooling(
            strides=backbone.strides[: len(backbone.strides) - _pool_only_levels(backbone)],
            size=pool,
            canonical_size=settings.canonical_size,
            canonical_level=settings.canonical_level,
            backend=settings.backend,
        )
        self.tower = Tower(channels, settings.tower_depth)
        self.projection = nn.Linear(channels * pool * pool, settings.embed_dim)
        self.classifier = CosineClassifier(settings.embed_dim, temperature=settings.temperature)
        embed_dim = settings.embed_dim if settings.semantic_boxes else 0
        self.regressor = SemanticBoxRegressor(channels * pool * pool, settings.box_hidden, embed_dim)

    def losses(self, batch: Batch, text: Tensor, *, distill: Metric | None) -> dict[str, Tensor]:
        """Loss terms, unweighted: rpn_objectness, rpn_box, classification, box, and distillation when asked for.

        Args:
            batch: images, base boxes and cached regions.
            text: unit rows of the base names, and of novel names if they are to compete with them, (C, D).
            distill: how the distance to the cached embeddings is measured; None leaves out the distillation. Cached
                regions then still decide what is spared from being background, if `spare_confidence` asks for that.
        """
        maps = self.backbone(normalise(batch.images))
        proposals, losses = self._propose(batch.images, batch.sizes, maps, batch)
        features = self.tower(maps[: self.pooling.levels])
        losses |= self._region_losses(features, proposals, batch, text)
        if distill is not None:
            weight = region_weights(batch.region_confidence, batch.region_image, images=len(batch.sizes))
            losses["distillation"] = self.pooling.distance(
                features,
                batch.region_boxes,
                batch.region_image,
                batch.region_target,
                weight,
                self.projection,
                distill,
            )
        return losses

    @torch.no_grad()
    def detect(
        self,
        images: Tensor,
        sizes: list[tuple[int, int]],
        text: Tensor,
        *,
        score_floor: float,
        nms_iou: float,
        keep: int,
    ) -> list[Detections]:
        """Find objects of any named classes.

        Args:
            images: (B, 3, H, W) float in [0, 1], padded.
            sizes: (height, width) of each image.
            text: unit rows of the names to look for, (C, D).
            score_floor: detections below it are dropped.
            nms_iou: suppression within a class.
            keep: most detections per image.
        """
        maps = self.backbone(normalise(images))
        proposals, _ = self._propose(images, sizes, maps, None)
        features = self.tower(maps[: self.pooling.levels])
        boxes, index = torch.cat(proposals), _image_index(proposals)
        probability = self.classifier(self._embed(features, boxes, index), text).float().softmax(1)[:, :-1]
        # The regressor is asked as for the likeliest object: a row of zeros for background was never trained.
        likeliest = text[probability.argmax(1)]
        moved = decode_boxes(boxes, self.regressor(self.pooling.align(features, boxes, index), likeliest))
        return [
            _suppress(
                moved[index == i], probability[index == i], size, score_floor=score_floor, nms_iou=nms_iou, keep=keep
            )
            for i, size in enumerate(sizes)
        ]

    def _embed(self, features: list[Tensor], boxes: Tensor, index: Tensor) -> Tensor:
        return self.pooling.embed(features, boxes, index, self.projection)

    def _propose(
        self, images: Tensor, sizes: list[tuple[int, int]], maps: list[Tensor], batch: Batch | None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        levels = {str(i): m.float() for i, m in enumerate(maps)}
        targets = None if batch is None else [{"boxes": b} for b in batch.boxes]
        with torch.autocast(images.device.type, enabled=False):
            proposals, losses = self.rpn(ImageList(images, sizes), levels, targets)
        if not self.training:
            return proposals, {}
        return proposals, {"rpn_objectness": losses["loss_objectness"], "rpn_box": losses["loss_rpn_box_reg"]}

    def _region_losses(
        self, features: list[Tensor], proposals: list[Tensor], batch: Batch, text: Tensor
    ) -> dict[str, Tensor]:
        likely_objects = batch.region_confidence >= self.settings.spare_confidence
        sampled = [
            sample_regions(
                p,
                b,
                v,
                background=len(text),
                count=self.settings.sampled_regions,
                share=self.settings.positive_share,
                unknown=batch.region_boxes[(batch.region_image == i) & likely_objects],
            )
            for i, (p, b, v) in enumerate(zip(proposals, batch.boxes, batch.labels, strict=True))
        ]
        boxes, index = torch.cat([s.boxes for s in sampled]), _image_index([s.boxes for s in sampled])
        label, target = torch.cat([s.labels for s in sampled]), torch.cat([s.targets for s in sampled])
        logits = self.classifier(self._embed(features, boxes, index), text)
        object_ = label < len(text)
        pooled = self.pooling.align(features, boxes[object_], index[object_])
        deltas = self.regressor(pooled, text[label[object_]])
        wanted = encode_boxes(boxes[object_], target[object_])
        return {
            "classification": classification_loss(logits, label),
            "box": box_loss(deltas, wanted, sampled=len(label)),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledRegions:
    """Regions of one image that the box head learns from."""

    boxes: Tensor
    """(R, 4)."""
    labels: Tensor
    """(R,) int64; the background's number is the count of names."""
    targets: Tensor
    """The ground-truth box of each, (R, 4); zeros for background."""


@torch.no_grad()
def sample_regions(
    proposals: Tensor, boxes: Tensor, labels: Tensor, *, background: int, count: int, share: float, unknown: Tensor
) -> SampledRegions:
    """Choose regions at random: IoU >= 0.5 with a ground-truth box is that object, the rest is background.

    What overlaps an `unknown` box at IoU 0.5 or more, and no ground truth, is neither: it is not chosen.

    Args:
        proposals: (P, 4); the ground truth is added to them.
        boxes: base ground truth, (N, 4).
        labels: (N,) int64.
        background: label of what is no object.
        count: most regions in all.
        share: most of them on objects.
        unknown: boxes that may hold an object without a label, (U, 4).
    """
    likely = (
        iou(proposals, unknown).amax(1) >= 0.5 if len(unknown) else torch.zeros_like(proposals[:, 0], dtype=torch.bool)
    )
    if not len(boxes):
        proposals = proposals[~likely]
        chosen = proposals[torch.randperm(len(proposals))[:count].to(proposals.device)]
        label = torch.full((len(chosen),), background, device=proposals.device)
        return SampledRegions(boxes=chosen, labels=label, targets=torch.zeros_like(chosen))
    candidates = torch.cat([proposals, boxes])
    overlap, nearest = iou(candidates, boxes).max(1)
    nothing = overlap < 0.5
    nothing[: len(proposals)] &= ~likely
    positive, negative = torch.nonzero(overlap >= 0.5)[:, 0], torch.nonzero(nothing)[:, 0]
    positive = positive[torch.randperm(len(positive))[: int(count * share)].to(positive.device)]
    negative = negative[torch.randperm(len(negative))[: count - len(positive)].to(negative.device)]
    rows = torch.cat([positive, negative])
    label = labels[nearest[rows]].clone()
    label[len(positive) :] = background
    target = boxes[nearest[rows]].clone()
    target[len(positive) :] = 0
    return SampledRegions(boxes=candidates[rows], labels=label, targets=target)


def _suppress(
    boxes: Tensor, probability: Tensor, size: tuple[int, int], *, score_floor: float, nms_iou: float, keep: int
) -> Detections:
    """One box per region, a score per name: drop the faint and the empty, suppress within each name, keep the best."""
    height, width = size
    limit = boxes.new_tensor([width, height, width, height])
    boxes = torch.minimum(boxes.clamp(min=0), limit)
    whole = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1)
    region, label = torch.nonzero((probability >= score_floor) & whole[:, None], as_tuple=True)
    score = probability[region, label]
    kept = batched_nms(boxes[region], score, label, nms_iou)[:keep]
    return Detections(boxes=boxes[region[kept]], scores=score[kept], labels=label[kept])


def _image_index(groups: list[Tensor]) -> Tensor:
    counts = torch.tensor([len(g) for g in groups], device=groups[0].device)
    return torch.repeat_interleave(torch.arange(len(groups), device=groups[0].device), counts)


def _pool_only_levels(backbone: Pyramid) -> int:
    """Levels made by max-pooling for the proposal network alone (P6 of a ResNet pyramid)."""
    return 1 if len(backbone.strides) == 5 else 0


def _proposal_network(backbone: Pyramid, settings: DetectorSettings) -> RegionProposalNetwork:
    ratios = ((0.5, 1.0, 2.0),) * len(settings.rpn_sizes)
    anchors = AnchorGenerator(settings.rpn_sizes, ratios)
    head = RPNHead(backbone.channels, anchors.num_anchors_per_location()[0])
    count = settings.rpn_proposals
    return RegionProposalNetwork(
        anchors,
        head,
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2 * count, "testing": count},
        post_nms_top_n={"training": count, "testing": count},
        nms_thresh=0.7,
    )
