"""The detector, assembled: maps -> proposals -> region embeddings -> names and boxes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from ezsd.choices import Backend, Metric
from ezsd.detector.backbone import Pyramid
from ezsd.detector.heads import EmbeddedRegions, FastHead, Head, PaperHead
from ezsd.detector.masks import POOL_SIZE, MaskHead, ObjectMasks, concatenated, mask_targets
from ezsd.detector.rpn import SAMPLED_ANCHORS, AnchorLosses, ProposalNetwork, Proposals
from ezsd.detector.sampling import (
    SampledRegions,
    image_of_rows,
    image_seeds,
    pad_rows,
    sample_regions,
    worth_computing,
)
from ezsd.detector.settings import DetectorSettings
from ezsd.kernels import Pooling
from ezsd.losses import (
    box_loss,
    classification_loss,
    decode_boxes,
    encode_boxes,
    mask_loss,
    region_weights,
    seesaw_logits,
)
from ezsd.transfer import to_device


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Training images with everything the losses need; boxes are in batched-input pixels."""

    images: Tensor
    """(B, 3, H, W) uint8, or float in [0, 1], padded with zeros at the right and bottom."""
    sizes: list[tuple[int, int]]
    """(height, width) of each image without padding."""
    boxes: list[Tensor]
    """Base ground truth of each image, then its pseudo-labels, (N, 4)."""
    labels: list[Tensor]
    """Classes of the boxes, (N,) int64, as positions in the text rows given beside the batch."""
    region_boxes: Tensor
    """Cached regions of all images, (R, 4)."""
    region_image: Tensor
    """Image of each cached region, (R,) int64."""
    region_target: Tensor
    """Cached teacher embeddings, (R, D), any float dtype."""
    region_confidence: Tensor
    """1 for base ground truth, the teacher's confidence for a proposal, (R,) float32."""
    cached_boxes: list[Tensor]
    """Base ground truth and all cached regions of each image, also those not among `region_boxes`, (K, 4)."""
    cached_confidence: list[Tensor]
    """Confidence of each of `cached_boxes`, like `region_confidence`, (K,) float32."""
    seeds: tuple[int, ...] | None = None
    """Random seed of each image: its samples depend on no other image. None samples from torch's global state."""
    masks: list[ObjectMasks] | None = None
    """Masks of the base ground truth of each image; None where masks are not trained."""

    def pin_memory(self) -> Batch:
        """Copy what is large into page-locked memory, from which a GPU fetches it while the host goes on."""
        return dataclasses.replace(self, images=self.images.pin_memory(), region_target=self.region_target.pin_memory())

    def to(self, device: torch.device) -> Batch:
        """Move to another device."""
        return Batch(
            images=self.images.to(device, non_blocking=True),
            sizes=self.sizes,
            boxes=_moved(self.boxes, device),
            labels=_moved(self.labels, device),
            region_boxes=self.region_boxes.to(device, non_blocking=True),
            region_image=self.region_image.to(device, non_blocking=True),
            region_target=self.region_target.to(device, non_blocking=True),
            region_confidence=self.region_confidence.to(device, non_blocking=True),
            cached_boxes=_moved(self.cached_boxes, device),
            cached_confidence=_moved(self.cached_confidence, device),
            seeds=self.seeds,
            masks=None if self.masks is None else [m.to(device) for m in self.masks],
        )


def _moved(of_images: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy the tensors of all images to another device in one piece."""
    whole = torch.cat(list(of_images)).to(device, non_blocking=True)
    return list(whole.split([len(one) for one in of_images]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Denominators of the losses of an optimiser step, when a batch is only a part of it."""

    images: int
    """Images of the step. Sampled anchors and regions count as asked for, whatever is found."""
    regions: int
    """Cached regions of the step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeliest:
    """The likeliest names of detections' regions, requested or competing, the likeliest first."""

    labels: Tensor
    """(N, K) int64, positions in the text rows that were asked for and, behind them, in those that compete."""
    scores: Tensor
    """(N, K) in [0, 1], of the same kind as the detections' scores."""

    def take(self, rows: Tensor) -> Likeliest:
        """Names of some detections, see `Detections.take`."""
        return Likeliest(labels=self.labels[rows], scores=self.scores[rows])

    def cpu(self) -> Likeliest:
        """A copy on the CPU."""
        return Likeliest(labels=self.labels.cpu(), scores=self.scores.cpu())

    def split(self, counts: list[int]) -> list[Likeliest]:
        """Names of consecutive detections, so many at a time."""
        parts = zip(self.labels.split(counts), self.scores.split(counts), strict=True)
        return [Likeliest(labels=labels, scores=scores) for labels, scores in parts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Detections:
    """Detections of one image, best first; `Detector.detect_each` gives their boxes in batched-input pixels."""

    boxes: Tensor
    """(N, 4) xyxy."""
    scores: Tensor
    """(N,) in [0, 1]."""
    labels: Tensor
    """(N,) int64, positions in the text rows that were asked for."""
    masks: Tensor | None = None
    """Probability that each cell of a box is the object, (N, M, M) float32; None where none were asked for."""
    likeliest: Likeliest | None = None
    """Names that competed for each detection, its own among them; None where they were not asked for."""

    def take(self, rows: Tensor) -> Detections:
        """Detections of some rows: their positions in the new order, or a mark for each, (N,) bool."""
        masks = None if self.masks is None else self.masks[rows]
        return Detections(
            boxes=self.boxes[rows],
            scores=self.scores[rows],
            labels=self.labels[rows],
            masks=masks,
            likeliest=None if self.likeliest is None else self.likeliest.take(rows),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Names to look for in images."""

    text: Tensor
    """Unit rows of the names, (C, D)."""
    competing: Tensor | None = None
    """Unit rows of other names, (K, D): a region may be called by one of them, and has its box then, but is no
    detection. None for none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenRegions:
    """Proposals of a batch that detections are made of, all images' one after the other, and their embeddings."""

    boxes: Tensor
    """(R, 4)."""
    objectness: Tensor
    """(R,)."""
    marks: Tensor
    """Marks what is a proposal, (R,) bool; the other rows are padding."""
    counts: list[int]
    """Rows of each image."""
    regions: EmbeddedRegions


class Detector(nn.Module):
    """Faster R-CNN whose regions are embedded in the teacher's space.

    Args:
        backbone: what `build_backbone` makes of the settings.
        settings: see `DetectorSettings`; the width of the embeddings is the teacher's, the backend the machine's.
        embed_dim: D, width of the teacher's embeddings.
        backend: where the fused operators run.
    """

    def __init__(self, backbone: Pyramid, settings: DetectorSettings, *, embed_dim: int, backend: Backend) -> None:
        super().__init__()
        self.settings = settings
        self.backbone = backbone
        self.rpn = ProposalNetwork(backbone.channels, settings.rpn_sizes, proposals=settings.rpn_proposals)
        pooling = functools.partial(_pooling, backbone, settings, backend)
        self.head = _build_head(backbone, settings, pooling(settings.pool_size), embed_dim)
        # Last, so that all else starts with the same weights without it.
        self.mask_head = MaskHead(pooling(POOL_SIZE), backbone.channels) if settings.masks else None

    def forward(self, *inputs: Any, **options: Any) -> Any:  # noqa: ANN401 - those of `losses` or of `detect`
        """`losses` in training mode, `detect` in evaluation mode, with their arguments and results."""
        return self.losses(*inputs, **options) if self.training else self.detect(*inputs, **options)

    def losses(
        self,
        batch: Batch,
        text: Tensor,
        *,
        distill: Metric | None,
        totals: Totals | None = None,
        class_counts: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Loss terms, unweighted: rpn_objectness, rpn_box, classification, box; mask and distillation if asked for.

        Args:
            batch: images, base boxes and cached regions.
            text: unit rows of the base classes, and of novel classes if they are to compete with them, (C, D).
            distill: how the distance to the cached embeddings is measured; None leaves out the distillation. Cached
                regions then still decide what is spared from being background, if `ignore_confidence` asks for that.
            totals: of the optimiser step that the batch is a part of; the terms of all parts then add up to those of
                the step. None divides by what was found in this batch.
            class_counts: objects of each base class so far, (B,), for Seesaw loss; None for cross-entropy.
        """
        maps = self.backbone.maps(batch.images, batch.sizes)
        seeds = image_seeds(batch.seeds, len(batch.sizes), batch.images.device)
        found = self.rpn(maps, batch.images.shape[2:])
        spared = self._spared(batch)
        anchors = self.rpn.losses(found, batch.boxes, seeds, spared if self.settings.ignore_rpn else None)
        sampled = self._sample(self.rpn.propose(found, batch.sizes), batch, seeds, spared, background=len(text))
        losses = {"rpn_objectness": anchors.objectness, "rpn_box": anchors.box}
        losses |= self._region_losses(maps[: self.head.pooling.levels], sampled, batch, text, distill, class_counts)
        if self.mask_head is not None:
            losses["mask"] = self._mask_loss(self.mask_head, maps[: self.head.pooling.levels], sampled, batch)
        if totals is None:
            return losses
        share = self._shares(totals, anchors, sampled, batch)
        return {name: part * share[name] for name, part in losses.items()}

    def constrain(self) -> None:
        """Move parameters that have a bound back within it; to be called after each step of an optimiser."""
        self.head.classifier.constrain()

    def _shares(
        self, totals: Totals, anchors: AnchorLosses, sampled: SampledRegions, batch: Batch
    ) -> dict[str, float | Tensor]:
        """Fraction of the step's term that each mean over this batch is."""
        of_anchors = anchors.sampled / (totals.images * SAMPLED_ANCHORS)
        regions = sampled.counted.sum() / (totals.images * self.settings.box_batch_size_per_image)
        most = max(int(self.settings.box_batch_size_per_image * self.settings.box_positive_fraction), 1)
        return {
            "rpn_objectness": of_anchors,
            "rpn_box": of_anchors,
            "classification": regions,
            "box": regions,
            "mask": _on_masks(sampled, batch).sum() / (totals.images * most),
            "distillation": len(batch.region_boxes) / max(totals.regions, 1),
        }

    def detect(
        self,
        images: Tensor,
        sizes: list[tuple[int, int]],
        text: Tensor,
        *,
        competing: Tensor | None = None,
        **options: Any,  # noqa: ANN401 - those of `detect_each`
    ) -> list[Detections]:
        """Find objects of any named classes: `detect_each` with one vocabulary."""
        return self.detect_each(images, sizes, [Vocabulary(text=text, competing=competing)], **options)[0]

    @torch.no_grad()
    def detect_each(
        self,
        images: Tensor,
        sizes: list[tuple[int, int]],
        vocabularies: Sequence[Vocabulary],
        *,
        score_floor: float,
        nms_iou: float,
        keep: int,
        class_agnostic_nms: bool = False,
        objectness: float = 0,
        masks: bool = False,
        likeliest: int = 0,
    ) -> list[list[Detections]]:
        """Find objects of several vocabularies, each as if it were alone, in one pass of the network.

        Args:
            images: (B, 3, H, W) uint8, or float in [0, 1], padded.
            sizes: (height, width) of each image.
            vocabularies: names to look for, and those that compete with them.
            score_floor: detections below it are dropped.
            nms_iou: IoU threshold of NMS within a class.
            keep: most detections per image.
            class_agnostic_nms: whether classes suppress each other too, competing ones as well.
            objectness: weight a in [0, 1) of the proposal network in a score: p(class)^(1 - a) p(object)^a.
            masks: whether to say which part of a box is the object; for a detector that has learned it.
            likeliest: number of the likeliest names to give with each detection; 0 for none.

        Returns:
            Detections of each image, for each vocabulary.
        """
        maps = self.backbone.maps(images, sizes)
        proposals = self.rpn.propose(self.rpn(maps, images.shape[2:]), sizes)
        levels = maps[: self.head.pooling.levels]
        marks = proposals.marks.flatten()
        rows = worth_computing(marks)
        boxes, index = proposals.boxes.flatten(0, 1)[rows], image_of_rows(proposals.marks).flatten()[rows]
        most = proposals.marks.shape[1]
        seen = SeenRegions(
            boxes=boxes,
            objectness=proposals.scores.flatten()[rows],
            marks=marks[rows],
            # As many as there are rows to compute.
            counts=[most] * len(sizes) if isinstance(rows, slice) else proposals.marks.sum(1).tolist(),
            regions=self.head.embed(self.head.features(levels), boxes, index),
        )
        found = []
        for vocabulary in vocabularies:
            moved, own, every = self.name_regions(seen, vocabulary)
            # Where classes do not suppress each other, the competitors' part ends here, before anything is counted.
            probability = every if class_agnostic_nms else every[:, : len(vocabulary.text)]
            own = own[:, : probability.shape[1]]
            if objectness:
                probability = probability ** (1 - objectness) * seen.objectness[:, None] ** objectness
            of_images: Sequence[Likeliest | None] = [None] * len(sizes)
            if likeliest:
                of_images = _likeliest(every, seen.objectness, objectness, likeliest).split(seen.counts)
            # Padding has no score that reaches a floor.
            probability = torch.where(seen.marks[:, None], probability, -1)
            parts = zip(*(one.split(seen.counts) for one in (moved, own, probability)), sizes, strict=True)
            detections = [
                _suppress(
                    *part,
                    likeliest=names,
                    asked=len(vocabulary.text),
                    score_floor=score_floor,
                    nms_iou=nms_iou,
                    class_agnostic=class_agnostic_nms,
                    keep=keep,
                )
                for part, names in zip(parts, of_images, strict=True)
            ]
            found.append(self._filled(levels, detections) if masks else detections)
        return found

    def name_regions(self, seen: SeenRegions, vocabulary: Vocabulary) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes of regions (R, K, 4), which of them is each name's (R, C), and the probability of each name (R, C).

        The names that compete are the last ones.
        """
        text, competing = vocabulary.text, vocabulary.competing
        known = text if competing is None else torch.cat([text, competing])
        every = self.head.classifier(seen.regions.embedding, known).float().softmax(1)
        probability = every[:, :-1]
        names = self._box_names(probability)
        classes = known[names]
        if self.settings.box_class == "reference":
            classes = classes * (every.argmax(1) < known.shape[0])[:, None, None]
        deltas = self.head.regressor(seen.regions.pooled, classes)
        count = names.shape[1]
        moved = decode_boxes(seen.boxes.repeat_interleave(count, 0), deltas.flatten(0, 1)).unflatten(0, (-1, count))
        own = torch.zeros_like(probability, dtype=torch.int64).scatter_(
            1, names, torch.arange(count, device=names.device).expand_as(names)
        )
        return moved, own, probability

    def _filled(self, maps: list[Tensor], found: list[Detections]) -> list[Detections]:
        """Add masks to detections, image by image: hundreds of regions need much memory."""
        assert self.mask_head is not None
        filled = []
        for i, one in enumerate(found):
            logits = self.mask_head(maps, one.boxes, torch.full_like(one.labels, i))
            filled.append(dataclasses.replace(one, masks=logits.float().sigmoid()))
        return filled

    def _box_names(self, probability: Tensor) -> Tensor:
        """Classes that each region gets a box of at inference, the likeliest first, (R, K)."""
        if self.settings.box_class == "topk":
            return probability.topk(min(self.settings.box_top_k, probability.shape[1]), 1).indices
        # As for the likeliest object, never for background: a row of zeros was never trained.
        return probability.argmax(1, keepdim=True)

    def _spared(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Cached boxes, (B, U, 4), and marks of those that may hold an object without a label, (B, U); or None."""
        if self.settings.ignore_confidence > 1:
            return None
        boxes, cached = pad_rows(batch.cached_boxes)
        return boxes, cached & (pad_rows(batch.cached_confidence)[0] >= self.settings.ignore_confidence)

    def _sample(
        self,
        proposals: Proposals,
        batch: Batch,
        seeds: Tensor,
        spared: tuple[Tensor, Tensor] | None,
        *,
        background: int,
    ) -> SampledRegions:
        return sample_regions(
            proposals.boxes,
            proposals.marks,
            batch.boxes,
            batch.labels,
            # Other numbers than the proposal network's.
            seeds + 1,
            background=background,
            count=self.settings.box_batch_size_per_image,
            share=self.settings.box_positive_fraction,
            unknown=spared,
        )

    def _region_losses(
        self,
        maps: list[Tensor],
        sampled: SampledRegions,
        batch: Batch,
        text: Tensor,
        distill: Metric | None,
        class_counts: Tensor | None,
    ) -> dict[str, Tensor]:
        """Classification, box and distillation; all their regions are pooled at once."""
        counted = sampled.counted.flatten()
        rows = worth_computing(counted)
        boxes, index, counted = sampled.boxes.flatten(0, 1)[rows], sampled.image_index.flatten()[rows], counted[rows]
        label = sampled.labels.flatten()[rows]
        features, losses = self.head.features(maps), {}
        if distill is None:
            seen = self.head.embed(features, boxes, index)
        else:
            weight = region_weights(batch.region_confidence, batch.region_image, images=len(batch.sizes))
            of_all = torch.cat([boxes, batch.region_boxes]), torch.cat([index, batch.region_image])
            seen, distance = self.head.embed_and_distil(features, *of_all, batch.region_target, weight, distill)
            losses["distillation"] = distance
        logits = self.head.classifier(seen.embedding, text)
        if class_counts is not None:
            logits = seesaw_logits(logits, label, class_counts)
        positive = counted & (label < len(text))
        # Where padding is computed too, objects come in the first slots.
        some = torch.nonzero(positive)[:, 0] if isinstance(rows, Tensor) else _first_slots(sampled)
        deltas = self.head.regressor(seen.pooled[some], text[label[some].clamp(max=len(text) - 1)])
        wanted = encode_boxes(boxes[some], sampled.targets.flatten(0, 1)[rows][some])
        return {
            "classification": classification_loss(logits, label, counted),
            "box": box_loss(deltas, wanted, positive[some], sampled=counted.sum()),
            **losses,
        }

    def _mask_loss(self, head: MaskHead, maps: list[Tensor], sampled: SampledRegions, batch: Batch) -> Tensor:
        assert batch.masks is not None
        # A region costs the head so much that their number is worth a wait.
        rows = torch.nonzero(_on_masks(sampled, batch).flatten())[:, 0]
        boxes, index = sampled.boxes.flatten(0, 1)[rows], sampled.image_index.flatten()[rows]
        counts = torch.tensor([len(one) for one in batch.masks])
        first = to_device(counts.cumsum(0) - counts, rows.device)
        objects = sampled.objects.flatten()[rows] + first[index]
        logits = head(maps, boxes, index)
        return mask_loss(logits, mask_targets(concatenated(batch.masks), boxes, objects, logits.shape[-1]))


def _on_masks(sampled: SampledRegions, batch: Batch) -> Tensor:
    """Mark regions that are on an object with a mask, (B, S); pseudo-labels, the last objects, have none."""
    counts = [len(b) for b in batch.boxes] if batch.masks is None else [len(m) for m in batch.masks]
    numbers = to_device(torch.tensor(counts), sampled.objects.device)
    return (sampled.objects >= 0) & (sampled.objects < numbers[:, None])


def _first_slots(sampled: SampledRegions) -> Tensor:
    """Positions of the slots that may hold a region on an object, among those of all images."""
    images, slots = sampled.labels.shape
    positions = torch.arange(images * slots, device=sampled.labels.device).view(images, slots)
    return positions[:, : sampled.object_slots].flatten()


def _suppress(
    boxes: Tensor,
    own: Tensor,
    probability: Tensor,
    size: tuple[int, int],
    *,
    asked: int,
    score_floor: float,
    nms_iou: float,
    class_agnostic: bool,
    keep: int,
    likeliest: Likeliest | None,
) -> Detections:
    """Drop low scores and empty boxes, apply NMS, keep the best detections of the first classes.

    Args:
        boxes: K for each region, (R, K, 4).
        own: which of them is each name's, (R, C) int64.
        probability: (R, C).
        size: height and width of the image.
        asked: number of the classes to keep; the others only suppress.
        score_floor: see `Detector.detect_each`, as the rest.
        nms_iou: see there.
        class_agnostic: whether NMS is between all classes instead of within each.
        keep: see there.
        likeliest: of each region; None for none.
    """
    height, width = size
    limit = torch.tensor([width, height, width, height], dtype=boxes.dtype)
    boxes = torch.minimum(boxes.clamp(min=0), to_device(limit, boxes.device))
    whole = ((boxes[..., 2:] - boxes[..., :2]) >= 1).all(-1)
    region, label = torch.nonzero((probability >= score_floor) & whole.gather(1, own), as_tuple=True)
    box, score = boxes[region, own[region, label]], probability[region, label]
    kept = batched_nms(box, score, torch.zeros_like(label) if class_agnostic else label, nms_iou)
    if asked < probability.shape[1]:
        kept = kept[label[kept] < asked]
    kept = kept[:keep]
    return Detections(
        boxes=box[kept],
        scores=score[kept],
        labels=label[kept],
        likeliest=None if likeliest is None else likeliest.take(region[kept]),
    )


def _likeliest(probability: Tensor, objectness: Tensor, weight: float, count: int) -> Likeliest:
    """The `count` likeliest names of regions by their probabilities (R, C), scored as detections are."""
    best = probability.topk(min(count, probability.shape[1]), 1)
    return Likeliest(labels=best.indices, scores=best.values ** (1 - weight) * objectness[:, None] ** weight)


def _pooled_levels(backbone: Pyramid) -> int:
    """Levels that regions are pooled from: all but P6 of a ResNet pyramid, which the proposal network alone has."""
    return len(backbone.strides) - backbone.extra


def _pooling(backbone: Pyramid, settings: DetectorSettings, backend: Backend, size: int) -> Pooling:
    return Pooling(
        spatial_scale=tuple(1 / stride for stride in backbone.strides[: _pooled_levels(backbone)]),
        output_size=size,
        canonical_size=settings.canonical_size,
        canonical_level=settings.canonical_level,
        backend=backend,
    )


def _build_head(backbone: Pyramid, settings: DetectorSettings, pooling: Pooling, embed_dim: int) -> Head:
    kind = FastHead if settings.head == "fast" else PaperHead
    return kind(
        pooling,
        backbone.channels,
        embed_dim,
        depth=settings.tower_depth,
        hidden=settings.box_hidden,
        semantic=settings.semantic_boxes,
        temperature=settings.logit_scale,
    )
