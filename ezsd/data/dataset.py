"""Training samples: an image, its base boxes and its cached regions, resized and flipped together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import nms

from ezsd.boxes import flip_horizontal, scale
from ezsd.data.transforms import SEEN_SHARE, Augmentation, boxes_in_window, draw_limits, draw_window
from ezsd.detector.masks import ObjectMasks
from ezsd.detector.model import Batch

PAD_MULTIPLE = 32
"""Batches are padded to a multiple of this: levels up to stride 32 then have whole cells."""


NMS_IOU = 0.5
"""IoU of two pseudo-labels of one image above which the less believed one is dropped."""


class Key(NamedTuple):
    """Inputs that a sample depends on, beside the seed."""

    epoch: int
    """Number of times that the image was drawn before; without repeats that is the epoch."""
    position: int
    """Position of the image in the dataset."""
    canvas: tuple[int, int] = (0, 0)
    """Least height and width of the batch, pixels: parts of a step that have one in common are padded alike."""


class GroundTruth(Protocol):
    """Base objects of one image, as a cache holds them."""

    @property
    def box(self) -> NDArray[np.float32]:
        """(N, 4) xyxy, original-image pixels."""
        ...

    @property
    def class_index(self) -> NDArray[np.int32]:
        """(N,)."""
        ...

    @property
    def embedding(self) -> NDArray[np.float16]:
        """Unit teacher embeddings, (N, D)."""
        ...


class Regions(Protocol):
    """Distillation regions of one image, as a cache holds them."""

    @property
    def box(self) -> NDArray[np.float32]:
        """(K, 4) xyxy, original-image pixels, best first."""
        ...

    @property
    def confidence(self) -> NDArray[np.float32]:
        """(K,) in (0, 1]."""
        ...

    @property
    def score(self) -> NDArray[np.float32]:
        """Score of the proposal that a region was, (K,): objectness in [0, 1] of a learned proposer's."""
        ...

    @property
    def class_index(self) -> NDArray[np.int32]:
        """Class that the teacher gives each, (K,)."""
        ...

    @property
    def embedding(self) -> NDArray[np.float16]:
        """Unit teacher embeddings, (K, D)."""
        ...


class GroundTruthSource(Protocol):
    """Anything that returns the base objects of an image."""

    def __getitem__(self, image_id: int, /) -> GroundTruth: ...


class RegionSource(Protocol):
    """Anything that returns the cached regions of an image."""

    def __getitem__(self, image_id: int, /) -> Regions: ...


class MaskSource(Protocol):
    """Anything that returns the masks of an image's base objects, in the order of its ground truth."""

    def __getitem__(self, image_id: int, /) -> ObjectMasks: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """An image ready for batching, with its boxes in pixels of the resized image."""

    image: Tensor
    """(3, H, W) uint8."""
    boxes: Tensor
    """Base ground truth, then pseudo-labels, (N, 4)."""
    labels: Tensor
    """(N,) int64."""
    region_boxes: Tensor
    """Base ground truth first, then drawn regions, (R, 4); with jitter only those of which the window shows enough."""
    region_target: Tensor
    """(R, D) float16."""
    region_confidence: Tensor
    """1 for ground truth, (R,) float32."""
    cached_boxes: Tensor
    """All of the image's regions, drawn or not, in the form of `region_boxes`, (K, 4)."""
    cached_confidence: Tensor
    """(K,) float32."""
    canvas: tuple[int, int]
    """Least height and width of the batch, pixels; see `Key`."""
    seed: int | None
    """Seed for the detector's random draws on this image; None uses torch's global state."""
    masks: ObjectMasks | None = None
    """Masks of the base ground truth; None where none are learned."""


class DetectionDataset(torch.utils.data.Dataset[Sample]):
    """Samples by `Key`: what is drawn depends on epoch, position and the seed, on no worker and no order.

    Args:
        image_ids: the training images.
        read_image: image id to (3, H, W) uint8 pixels at original size.
        image_size: image id to original height and width.
        ground_truth: base objects by image id.
        regions: cached regions by image id.
        regions_per_image: drawn without replacement, confidence-blind.
        short_side: resize limit, pixels; 0 keeps the size.
        long_side: see there.
        seed: of flips and draws.
        augmentation: of size, beside the flip; None for neither.
        seeded: whether batches carry a seed per image, see `Batch.seeds`.
        masks: masks by image id, in original pixels; None for none.
        repeats: times that each image comes in an epoch, see `epoch_order`.
        pseudo_labels: which regions become pseudo-labels; None for none.
    """

    def __init__(
        self,
        image_ids: Sequence[int],
        read_image: Callable[[int], Tensor],
        image_size: Callable[[int], tuple[int, int]],
        ground_truth: GroundTruthSource,
        regions: RegionSource,
        *,
        regions_per_image: int,
        short_side: int,
        long_side: int,
        seed: int,
        augmentation: Augmentation | None = None,
        seeded: bool = False,
        masks: MaskSource | None = None,
        repeats: NDArray[np.float64] | None = None,
        pseudo_labels: PseudoLabels | None = None,
    ) -> None:
        self.image_ids = image_ids
        self.read_image = read_image
        self.image_size = image_size
        self.ground_truth = ground_truth
        self.regions = regions
        self.regions_per_image = regions_per_image
        self.short_side = short_side
        self.long_side = long_side
        self.seed = seed
        self.augmentation = augmentation or Augmentation()
        self.seeded = seeded
        self.masks = masks
        self.repeats = repeats
        self.pseudo_labels = pseudo_labels

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def epoch_images(self) -> int:
        """Images of an epoch; with repeats, on average."""
        return len(self) if self.repeats is None else round(float(self.repeats.sum()))

    def size(self, epoch: int, position: int) -> tuple[int, int]:
        """Height and width that a sample's image will have; nothing is read for it."""
        short_side, long_side = self._limits(epoch, position)
        height, width = self.image_size(self.image_ids[position])
        height, width = fitted(height, width, short_side=short_side, long_side=long_side)
        if self.augmentation.jitter is None:
            return height, width
        return min(height, self.long_side), min(width, self.long_side)

    def _limits(self, epoch: int, position: int) -> tuple[int, int]:
        # A stream of its own: what else is drawn takes the number of regions.
        rng = np.random.default_rng([self.seed, 2, epoch, self.image_ids[position]])
        return draw_limits(rng, self.augmentation, self.short_side, self.long_side)

    def __getitem__(self, key: tuple[int, int] | Key) -> Sample:
        epoch, position, canvas = Key(*key)
        image_id = self.image_ids[position]
        rng = np.random.default_rng([self.seed, epoch, image_id])
        truth, regions = self.ground_truth[image_id], self.regions[image_id]
        objects = len(truth.box)
        drawn = np.sort(rng.permutation(len(regions.box))[: self.regions_per_image])
        flipped = rng.random() < 0.5
        short_side, long_side = self._limits(epoch, position)
        image, sx, sy = resize(self.read_image(image_id), short_side=short_side, long_side=long_side)
        cached = scale(torch.from_numpy(np.concatenate([truth.box, regions.box])), sx, sy)
        masks = None if self.masks is None else self.masks[image_id].scaled(sx, sy)
        assert masks is None or len(masks) == objects
        believed = np.zeros(0, np.int64) if self.pseudo_labels is None else self.pseudo_labels.select(regions)
        boxes = torch.cat([cached[:objects], cached[objects:][believed]])
        labels = torch.from_numpy(np.concatenate([truth.class_index, regions.class_index[believed]]).astype(np.int64))
        known, seen = torch.ones(len(boxes), dtype=torch.bool), torch.ones(len(cached), dtype=torch.bool)
        if self.augmentation.jitter is not None:
            window = draw_window(rng, image, self.long_side)
            image, boxes, cached, known, seen = crop(image, boxes, cached, window)
            masks = None if masks is None else masks.in_window(*window[:2])[known[:objects]]
        # The target stays that of the unflipped crop: CLIP hardly notices a mirror.
        if flipped:
            image = image.flip(2)
            boxes = flip_horizontal(boxes, image.shape[2])
            cached = flip_horizontal(cached, image.shape[2])
            masks = None if masks is None else masks.mirrored(image.shape[2])
        confidence = torch.cat([torch.ones(objects), torch.from_numpy(regions.confidence.astype(np.float32))])
        chosen = torch.cat([torch.arange(objects), objects + torch.from_numpy(drawn)])
        target = torch.from_numpy(np.concatenate([truth.embedding, regions.embedding[drawn]]))[seen[chosen]]
        chosen = chosen[seen[chosen]]
        return Sample(
            image=image,
            boxes=boxes,
            labels=labels[known],
            region_boxes=cached[chosen],
            region_target=target,
            region_confidence=confidence[chosen],
            cached_boxes=cached[seen],
            cached_confidence=confidence[seen],
            canvas=canvas,
            seed=int(rng.integers(2**62)) if self.seeded else None,
            masks=masks,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PseudoLabels:
    """Cached regions that are taken for objects: the teacher is sure of their name, a proposal network of their box."""

    confidence: float
    """Least confidence of the teacher."""
    objectness: float
    """Least objectness of the proposal network."""
    base_count: int
    """Number of base classes, whose objects all have a label."""

    def select(self, regions: Regions) -> NDArray[np.int64]:
        """Positions of an image's pseudo-labels among its regions, best objectness first, (P,)."""
        sure = (regions.confidence >= self.confidence) & (regions.class_index >= self.base_count)
        rows = np.flatnonzero(sure & (regions.score >= self.objectness))
        kept = nms(torch.from_numpy(regions.box[rows]), torch.from_numpy(regions.score[rows]), NMS_IOU)
        chosen: NDArray[np.int64] = rows[kept.numpy()]
        return chosen


def crop(
    image: Tensor, boxes: Tensor, cached: Tensor, window: tuple[int, int, int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """An image and its boxes in a window.

    Returns:
        The window's pixels; what is left of the boxes; the cached boxes, clipped to it; which boxes are left; which
        cached ones are shown well enough.
    """
    x, y, width, height = window
    inside, _ = boxes_in_window(boxes, window)
    known = ((inside[:, 2:] - inside[:, :2]) >= 1).all(1)
    clipped, share = boxes_in_window(cached, window)
    return image[:, y : y + height, x : x + width], inside[known], clipped, known, share >= SEEN_SHARE


def resize(image: Tensor, *, short_side: int, long_side: int) -> tuple[Tensor, float, float]:
    """Fit an image (3, H, W) uint8 into short_side x long_side, ratio kept; returns it and the x and y factors."""
    height, width = image.shape[1:]
    if short_side == 0:
        return image, 1.0, 1.0
    size = fitted(height, width, short_side=short_side, long_side=long_side)
    smaller = F.interpolate(image[None].contiguous(), size, mode="bilinear", antialias=True)[0]
    return smaller, size[1] / width, size[0] / height


def fitted(height: int, width: int, *, short_side: int, long_side: int) -> tuple[int, int]:
    """Height and width of an image that `resize` fits."""
    if short_side == 0:
        return height, width
    factor = min(short_side / min(height, width), long_side / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def collate(samples: Sequence[Sample]) -> Batch:
    """Pad images at the right and bottom to a common size and concatenate the regions."""
    counts = torch.tensor([len(s.region_boxes) for s in samples])
    least = max(s.canvas[0] for s in samples), max(s.canvas[1] for s in samples)
    images, sizes = pad_images([s.image for s in samples], least)
    seeds = tuple(s.seed for s in samples if s.seed is not None)
    return Batch(
        images=images,
        sizes=sizes,
        boxes=[s.boxes for s in samples],
        labels=[s.labels for s in samples],
        region_boxes=torch.cat([s.region_boxes for s in samples]),
        region_image=torch.repeat_interleave(torch.arange(len(samples)), counts),
        region_target=torch.cat([s.region_target for s in samples]),
        region_confidence=torch.cat([s.region_confidence for s in samples]),
        cached_boxes=[s.cached_boxes for s in samples],
        cached_confidence=[s.cached_confidence for s in samples],
        seeds=seeds or None,
        masks=[s.masks for s in samples if s.masks is not None] or None,
    )


def pad_images(images: Sequence[Tensor], least: tuple[int, int] = (0, 0)) -> tuple[Tensor, list[tuple[int, int]]]:
    """Images (3, H, W) uint8 in one batch (B, 3, H', W') uint8, padded with zeros, and their (height, width).

    Args:
        images: of any sizes.
        least: height and width that H' and W' reach at least.
    """
    sizes = [(int(i.shape[1]), int(i.shape[2])) for i in images]
    height, width = padded_size([*sizes, least])
    out = torch.zeros(len(images), 3, height, width, dtype=torch.uint8)
    for row, image in zip(out, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return out, sizes


def padded_size(sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Height and width of a batch of images of these heights and widths."""
    heights, widths = zip(*sizes, strict=True)
    return -(-max(heights) // PAD_MULTIPLE) * PAD_MULTIPLE, -(-max(widths) // PAD_MULTIPLE) * PAD_MULTIPLE


def epoch_order(
    images: int,
    *,
    per_step: int,
    first_step: int,
    steps: int,
    seed: int,
    repeats: NDArray[np.float64] | None = None,
) -> Iterator[list[tuple[int, int]]]:
    """Batches of `Key.epoch` and position from `first_step` up to `steps`: every image once per epoch, reshuffled.

    A batch may span two epochs; none is cut short.

    Args:
        images: number of images, at least 1.
        per_step: images of a batch.
        first_step: first batch to give.
        steps: end of the batches.
        seed: of the order.
        repeats: how often each image comes in an epoch, (images,), at least 1: as often as the whole part says, and
            once more with the probability of the rest. None for once each.
    """
    wanted, begin = range(first_step * per_step, steps * per_step), 0
    batch: list[tuple[int, int]] = []
    for keys in _epochs(images, seed, repeats) if wanted else ():
        for earlier, position in keys[max(wanted.start - begin, 0) : wanted.stop - begin].tolist():
            batch.append((earlier, position))
            if len(batch) == per_step:
                yield batch
                batch = []
        begin += len(keys)
        if begin >= wanted.stop:
            return


def _epochs(images: int, seed: int, repeats: NDArray[np.float64] | None) -> Iterator[NDArray[np.int64]]:
    """Epochs of `epoch_order`, each (N, 2)."""
    assert images
    earlier, times = np.zeros(images, np.int64), np.ones(images, np.int64)
    for epoch in count():
        if repeats is not None:
            extra = np.random.default_rng([seed, 3, epoch]).random(images) < repeats % 1
            times = repeats.astype(np.int64) + extra
        order = np.random.default_rng([seed, 1, epoch]).permutation(np.repeat(np.arange(images), times))
        # An image that comes again in its epoch is flipped and cropped anew.
        again = np.empty_like(order)
        again[order.argsort(kind="stable")] = np.arange(len(order)) - np.repeat(times.cumsum() - times, times)
        yield np.stack([earlier[order] + again, order], 1)
        earlier += times


def repeat_factors(
    image_index: NDArray[np.int64], class_index: NDArray[np.int32], *, images: int, threshold: float
) -> NDArray[np.float64]:
    """Repeat factor of each image, (images,): the largest max(1, sqrt(threshold / f)) of the classes that it shows.

    f is the fraction of images that show a class. An image without any object has 1.

    Args:
        image_index: image of each object, (N,), 0 .. images - 1.
        class_index: its class, (N,).
        images: number of images.
        threshold: fraction of images up to which a class is scarce, in (0, 1].

    Source: Gupta et al., "LVIS: A Dataset for Large Vocabulary Instance Segmentation", arXiv 1908.03195.
    """
    image, label = np.unique(np.stack([image_index, class_index]), axis=1)
    fraction = np.bincount(label) / images
    factors = np.ones(images)
    np.maximum.at(factors, image, np.sqrt(threshold / fraction[label]))
    return factors
