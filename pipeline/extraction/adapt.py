"""Stage one, first half: crops of base objects for re-normalisation, and how well it went."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import islice

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
from ezsd.teacher.open_clip import Teacher, device_of
from ezsd.transfer import to_device

_MEMO_BYTES = 2**30
"""Most bytes of crops that are kept; those of larger datasets are made again when their image comes up."""


class CropSource:
    """Crops of an annotation record's boxes, image by image; images that cannot be read have none, up to a limit.

    Args:
        images: source of the images, and their boxes.
        size: side S of the crops.
        crops: how boxes are cropped.
        least: shorter sides of boxes are widened to it, pixels.
        device: where the crops are made, and stay.
    """

    def __init__(
        self,
        images: BaseImages,
        *,
        size: int,
        crops: ProposalConfig,
        least: float,
        device: torch.device,
    ) -> None:
        self.images = images
        self.size = size
        self.least = least
        self.device = device
        self.ratio = crops.crop_ratio
        self.surround = crops.padding
        self._keeps = len(images.annotations.box) * 3 * size**2 <= _MEMO_BYTES
        self._memo: dict[int, Tensor] = {}

    def crops(self, positions: Iterable[int]) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Crops (R, 3, S, S) uint8 of the boxes of each image in order, and their classes (R,) int64 on the CPU.

        Raises:
            ImageError: one cannot be read, and with it more than may be left out.
        """
        with contextlib.closing(self.images.ahead(positions, device=self.device, known=self._memo)) as images:
            for position, pixels in images:
                annotations = self.images.annotations
                label = torch.from_numpy(annotations.class_index[annotations.rows(position)].astype(np.int64))
                if pixels is None:
                    yield torch.zeros(0, 3, self.size, self.size, dtype=torch.uint8, device=self.device), label[:0]
                elif position in self._memo:
                    yield self._memo[position], label
                else:
                    yield self._made(position, pixels), label

    def _made(self, position: int, pixels: Tensor) -> Tensor:
        boxes = with_least_side(self.images.boxes(position), self.least)
        image = to_device(pixels, self.device)
        crops = crop_boxes(image, boxes, size=self.size, ratio=self.ratio, surround=self.surround)
        if self._keeps:
            self._memo[position] = crops
        return crops

    def batches(self, positions: Iterable[int], *, crops: int) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Crops (up to `crops`, 3, S, S) uint8 and classes of the given images in order."""
        parts: list[tuple[Tensor, Tensor]] = []
        held = 0
        with contextlib.closing(self.crops(positions)) as images:
            for pixels, label in images:
                while len(label):
                    taken = min(crops - held, len(label))
                    parts.append((pixels[:taken], label[:taken]))
                    held += taken
                    pixels, label = pixels[taken:], label[taken:]
                    if held == crops:
                        yield _joined(parts)
                        parts, held = [], 0
        if held:
            yield _joined(parts)

    def endless(
        self, positions: Sequence[int], *, crops: int, flip: float, seed: int
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Full batches for ever, images reshuffled each round, each crop mirrored with probability `flip`."""
        rng, mirror = np.random.default_rng([seed, 1]), np.random.default_rng([seed, 2])

        def rounds() -> Iterator[int]:
            while True:
                yield from rng.permutation(positions).tolist()

        with contextlib.closing(self.batches(rounds(), crops=crops)) as batches:
            for pixels, label in batches:
                if not flip:
                    yield pixels, label
                    continue
                mirrored = torch.from_numpy(mirror.random(len(pixels)) < flip)
                chosen = to_device(mirrored, self.device)[:, None, None, None]
                yield torch.where(chosen, pixels.flip(3), pixels), label


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([pixels for pixels, _ in parts]), torch.cat([label for _, label in parts])


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
    size, device = teacher.input_size, device_of(teacher)
    source = CropSource(images, size=size, crops=crops, least=config.min_crop_size, device=device)
    names = images.annotations.names
    tuned_on, held_out = images.split(config.held_out, seed=seed)
    if not tuned_on:
        raise ConfigError(f"re-normalisation needs base boxes in at least 2 images, found them in {len(held_out)}")

    def accuracy() -> tuple[float, int]:
        # Threads read ahead; they must not go on after an error, or Ctrl-C.
        with contextlib.closing(source.batches(held_out, crops=config.batch_size)) as batches:
            right = crop_accuracy(teacher, batches, names)
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
            islice(batches, steps),
            names,
            learning,
            loss=config.loss,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            clip_norm=config.max_grad_norm,
        )
        with (
            contextlib.closing(batches),
            halving_where_memory_is_short("adapt.batch_size", config.batch_size, "crops"),
            Progress("adapt", steps, unit="step") as progress,
        ):
            for value in losses:
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
