"""Stage one, first half: crops of base objects for re-normalisation, and how well it went."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ezsd.adapt import crop_accuracy, flatten, tune_layer_norms
from ezsd.crops import crop_boxes
from ezsd.data.annotations import Annotations
from ezsd.pipeline.config.schema import AdaptConfig, ProposalConfig
from ezsd.pipeline.data.image_source import ImageSource
from ezsd.pipeline.data.images import require_few_bad
from ezsd.pipeline.data.requirements import held_out_images, too_few_to_hold_out
from ezsd.pipeline.devices import is_out_of_memory
from ezsd.pipeline.errors import ConfigError, ImageError
from ezsd.pipeline.progress import Progress
from ezsd.teacher.open_clip import Teacher

log = logging.getLogger("ezsd")

# Crops of small benchmarks are kept; those of large ones are made again when their image comes up.
_MEMO_BYTES = 2**30


class CropSource:
    """Crops of an annotation record's boxes, image by image; images that cannot be read have none, up to a limit."""

    def __init__(
        self,
        annotations: Annotations,
        images: ImageSource,
        *,
        size: int,
        crops: ProposalConfig,
        most_bad: int = 0,
    ) -> None:
        self.annotations = annotations
        self.most_bad = most_bad
        self.bad: dict[int, str] = {}
        """Images left out so far, by id, and why."""
        self.images = images
        self.size = size
        self.ratio = crops.crop_ratio
        self.surround = crops.padding
        self._memo: dict[int, Tensor] = {}
        self._memo_bytes = 0

    def image(self, position: int) -> tuple[Tensor, Tensor]:
        """Crops (R, 3, S, S) uint8 of one image's boxes, and their classes (R,) int64.

        Raises:
            ImageError: it cannot be read, and with it more than may be left out.
        """
        rows = self.annotations.rows(position)
        label = torch.from_numpy(self.annotations.class_index[rows].astype(np.int64))
        if position in self._memo:
            return self._memo[position], label
        record = self.annotations.images[position]
        try:
            pixels = self.images.read(record)
        except ImageError as error:
            self._leave_out(record.id, error)
            return torch.zeros(0, 3, self.size, self.size, dtype=torch.uint8), label[:0]
        boxes = torch.from_numpy(self.annotations.box[rows])
        crops = crop_boxes(pixels, boxes, size=self.size, ratio=self.ratio, surround=self.surround)
        if self._memo_bytes + crops.numel() <= _MEMO_BYTES:
            self._memo[position] = crops
            self._memo_bytes += crops.numel()
        return crops, label

    def _leave_out(self, image_id: int, error: ImageError) -> None:
        if not self.most_bad:
            raise error
        if image_id not in self.bad:
            log.warning("left out of re-normalisation: %s", error)
            self.bad[image_id] = str(error)
            require_few_bad(self.bad, self.most_bad)

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

    def endless(self, positions: Sequence[int], *, crops: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Full batches for ever, images reshuffled each round."""
        rng = np.random.default_rng([seed, 1])

        def rounds() -> Iterator[int]:
            while True:
                yield from rng.permutation(positions).tolist()

        return self.batches(rounds(), crops=crops)


def adapt_teacher(
    teacher: Teacher,
    annotations: Annotations,
    images: ImageSource,
    *,
    config: AdaptConfig,
    crops: ProposalConfig,
    seed: int,
    most_bad: int = 0,
) -> tuple[NDArray[np.float32], dict[str, object]]:
    """Tune the teacher's LayerNorms in place on base crops of the training images.

    Args:
        teacher: tuned in place.
        annotations: BASE boxes of the training split.
        images: those of the annotations.
        config: see `AdaptConfig`.
        crops: how boxes are cropped, as in the later stages.
        seed: of the held-out choice and the shuffling.
        most_bad: images that may be left out because they cannot be read.

    Returns:
        The tuned values (K,), and attributes for the store: parameter table, steps, base accuracy before and after on
        the held-out images, ids of images left out if there are any.

    Raises:
        ConfigError: there are too few base boxes to hold some out, or too many crops in a step for the memory.
        ImageError: more images than that cannot be read.
    """
    source = CropSource(annotations, images, size=teacher.input_size, crops=crops, most_bad=most_bad)
    with_boxes = np.unique(annotations.image_index)
    held = held_out_images(len(with_boxes), config.held_out)
    if too_few_to_hold_out(len(with_boxes), config.held_out):
        raise ConfigError(f"re-normalisation needs base boxes in at least 2 images, found them in {len(with_boxes)}")
    order = np.random.default_rng([seed, 0]).permutation(with_boxes)
    tuned_on, held_out = np.sort(order[held:]).tolist(), np.sort(order[:held]).tolist()

    def accuracy() -> tuple[float, int]:
        right = crop_accuracy(teacher, source.batches(held_out, crops=config.batch_size), annotations.names)
        if not len(right):
            raise ConfigError("re-normalisation needs base boxes in images that can be read, found none to hold out")
        return float(right.float().mean()), len(right)

    parameters = teacher.layer_norms()
    before, measured = accuracy()
    learning = list(teacher.layer_norms(vision_only=config.towers == "vision").values())
    steps = config.steps if learning else 0
    if steps:
        batches = source.endless(tuned_on, crops=config.batch_size, seed=seed)
        losses = tune_layer_norms(
            teacher,
            batches,
            annotations.names,
            learning,
            loss=config.loss,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            clip_norm=config.max_grad_norm,
        )
        try:
            with Progress("adapt", steps, unit="step") as progress:
                for _, value in zip(range(steps), losses, strict=False):
                    progress.advance(note=f"loss {value:.3f}")
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise ConfigError(
                f"adapt.batch_size={config.batch_size}: so many crops in a step do not fit the memory; use "
                f"`adapt.batch_size={max(1, config.batch_size // 2)}`"
            ) from error
    values, table = flatten(parameters)
    attributes: dict[str, object] = {
        "parameters": table,
        "steps": steps,
        "held_out_crops": measured,
        "base_accuracy_before": before,
        "base_accuracy_after": accuracy()[0] if steps else before,
    }
    if source.bad:
        attributes["left_out_images"] = sorted(source.bad)
    return values, attributes
