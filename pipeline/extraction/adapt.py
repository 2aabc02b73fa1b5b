"""Stage one, first half: crops of base objects for re-normalisation, and how well it went."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ezsd.adapt import crop_accuracy, flatten, tune_layer_norms
from ezsd.crops import crop_boxes, with_least_side
from ezsd.pipeline.config.schema import AdaptConfig, ProposalConfig
from ezsd.pipeline.errors import ConfigError
from ezsd.pipeline.extraction.base_images import BaseImages, halving_where_memory_is_short
from ezsd.pipeline.progress import Progress
from ezsd.teacher.open_clip import Teacher

# Crops of small benchmarks are kept; those of large ones are made again when their image comes up.
_MEMO_BYTES = 2**30


class CropSource:
    """Crops of an annotation record's boxes, image by image; images that cannot be read have none, up to a limit."""

    def __init__(self, images: BaseImages, *, size: int, crops: ProposalConfig, least: float) -> None:
        self.images = images
        self.size = size
        self.least = least
        self.ratio = crops.crop_ratio
        self.surround = crops.padding
        self._memo: dict[int, Tensor] = {}
        self._memo_bytes = 0

    def image(self, position: int) -> tuple[Tensor, Tensor]:
        """Crops (R, 3, S, S) uint8 of one image's boxes, and their classes (R,) int64.

        Raises:
            ImageError: it cannot be read, and with it more than may be left out.
        """
        annotations = self.images.annotations
        label = torch.from_numpy(annotations.class_index[annotations.rows(position)].astype(np.int64))
        if position in self._memo:
            return self._memo[position], label
        pixels = self.images.read(position)
        if pixels is None:
            return torch.zeros(0, 3, self.size, self.size, dtype=torch.uint8), label[:0]
        boxes = with_least_side(self.images.boxes(position), self.least)
        crops = crop_boxes(pixels, boxes, size=self.size, ratio=self.ratio, surround=self.surround)
        if self._memo_bytes + crops.numel() <= _MEMO_BYTES:
            self._memo[position] = crops
            self._memo_bytes += crops.numel()
        return crops, label

    def batches(self, positions: Iterable[int], *, crops: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Crops (up to `crops`, 3, S, S), float in [0, 1], and classes of the given images in order."""
        pixels: list[Tensor] = []
        labels: list[Tensor] = []
        held = 0
        for position in positions:
            image_pixels, image_labels = self.image(position)
            pixels.append(image_pixels)
            labels.append(image_labels)
            held += len(image_labels)
            while held >= crops:
                all_pixels, all_labels = torch.cat(pixels), torch.cat(labels)
                yield all_pixels[:crops].float() / 255, all_labels[:crops]
                pixels, labels, held = [all_pixels[crops:]], [all_labels[crops:]], held - crops
        if held:
            yield torch.cat(pixels).float() / 255, torch.cat(labels)

    def endless(
        self, positions: Sequence[int], *, crops: int, flip: float, seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Full batches for ever, images reshuffled each round, each crop mirrored with probability `flip`."""
        rng, mirror = np.random.default_rng([seed, 1]), np.random.default_rng([seed, 2])

        def rounds() -> Iterator[int]:
            while True:
                yield from rng.permutation(positions).tolist()

        for pixels, label in self.batches(rounds(), crops=crops):
            if flip:
                mirrored = torch.from_numpy(mirror.random(len(pixels)) < flip)
                pixels[mirrored] = pixels[mirrored].flip(3)
            yield pixels, label


def adapt_teacher(
    teacher: Teacher,
    images: BaseImages,
    *,
    config: AdaptConfig,
    crops: ProposalConfig,
    seed: int,
) -> tuple[NDArray[np.float32], dict[str, object]]:
    """Tune the teacher's LayerNorms in place on base crops of the training images.

    Args:
        teacher: tuned in place.
        images: training images with their BASE boxes.
        config: see `AdaptConfig`.
        crops: how boxes are cropped, as in the later stages.
        seed: of the held-out choice and the shuffling.

    Returns:
        The tuned values (K,), and attributes for the store: parameter table, steps, base accuracy before and after on
        the held-out images, ids of images left out if there are any.

    Raises:
        ConfigError: there are too few base boxes to hold some out, or too many crops in a step for the memory.
        ImageError: more images than that cannot be read.
    """
    source = CropSource(images, size=teacher.input_size, crops=crops, least=config.min_crop_size)
    names = images.annotations.names
    tuned_on, held_out = images.split(config.held_out, seed=seed)
    if not tuned_on:
        raise ConfigError(f"re-normalisation needs base boxes in at least 2 images, found them in {len(held_out)}")

    def accuracy() -> tuple[float, int]:
        right = crop_accuracy(teacher, source.batches(held_out, crops=config.batch_size), names)
        if not len(right):
            raise ConfigError("re-normalisation needs base boxes in images that can be read, found none to hold out")
        return float(right.float().mean()), len(right)

    parameters = teacher.layer_norms()
    before, measured = accuracy()
    learning = list(teacher.layer_norms(vision_only=config.towers == "vision").values())
    steps = config.steps if learning else 0
    if steps:
        batches = source.endless(tuned_on, crops=config.batch_size, flip=config.flip, seed=seed)
        losses = tune_layer_norms(
            teacher,
            batches,
            names,
            learning,
            loss=config.loss,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            clip_norm=config.max_grad_norm,
        )
        with (
            halving_where_memory_is_short("adapt.batch_size", config.batch_size, "crops"),
            Progress("adapt", steps, unit="step") as progress,
        ):
            for _, value in zip(range(steps), losses, strict=False):
                progress.advance(note=f"loss {value:.3f}")
    values, table = flatten(parameters)
    attributes: dict[str, object] = {
        "parameters": table,
        "steps": steps,
        "held_out_crops": measured,
        "base_accuracy_before": before,
        "base_accuracy_after": accuracy()[0] if steps else before,
    }
    if images.bad:
        attributes["left_out_images"] = sorted(images.bad)
    return values, attributes
