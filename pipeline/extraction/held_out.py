"""Regions as a store would have them were some of its base names novel: its proposals under filters without these.

A finished store cannot say so by itself: its filters have dropped all regions on base objects, and what the teacher
said of a dropped proposal is not kept. So the teacher is shown the stored proposals of some images again. Base boxes
are all that is read here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ezsd.adapt import restore
from ezsd.cache import Store
from ezsd.data.annotations import Annotations
from ezsd.pipeline.config.schema import Config
from ezsd.pipeline.data.datasets import Dataset
from ezsd.pipeline.extraction.base_images import hold_out
from ezsd.pipeline.extraction.encoder import CropEncoder
from ezsd.pipeline.extraction.in_flight import finished
from ezsd.pipeline.extraction.proposer import HELD_OUT_IMAGES
from ezsd.pipeline.extraction.provenance import built_settings
from ezsd.pipeline.extraction.reuse import Columns
from ezsd.pipeline.extraction.worker import View, Worker, filtered
from ezsd.teacher.open_clip import Teacher, device_of
from ezsd.transfer import to_device

MOST_FOLDS = 5
"""Most groups that base names are held out in: with few novel names, more would have to be held out at once."""


def folds(base: int, novel: int, *, seed: int) -> list[tuple[int, ...]]:
    """Groups of base names, as near to the number of novel ones as 2 to `MOST_FOLDS` groups allow; each name is in one.

    Args:
        base: number of base names, at least 1.
        novel: number of novel names.
        seed: seed of the choice.

    Returns:
        Positions among the base names, 2 to `MOST_FOLDS` groups; one group where there is only one name.
    """
    count = min(base, max(2, min(MOST_FOLDS, round(base / max(novel, 1)))))
    order = np.random.default_rng([seed, 0]).permutation(base)
    return [tuple(np.sort(order[first::count]).tolist()) for first in range(count)]


def unseen_images(annotations: Annotations, store: Store, *, by: Literal["teacher", "all"]) -> NDArray[np.int64]:
    """Positions of the images with base boxes that no training of stage one has used, ascending.

    Args:
        annotations: the images and BASE boxes of the store.
        store: complete.
        by: "teacher" asks for re-normalisation alone, "all" for the training of the proposal network too. The network
            of a run may have learned from any image.
    """
    learned = store.manifest.products.get("proposer") if by == "all" else None
    if learned is not None and "run_sha256" in learned.inputs:
        return np.zeros(0, np.int64)
    if learned is None and not store.teacher[1]["steps"]:
        return np.unique(annotations.image_index).astype(np.int64)
    settings = built_settings(store.manifest)
    seed, fraction = settings["build"]["seed"], settings["adapt"]["held_out"]
    assert isinstance(seed, int)
    assert isinstance(fraction, float)
    # Both trainings hold out the first of one order.
    most = None if learned is None else HELD_OUT_IMAGES
    return np.array(hold_out(annotations, fraction, seed=seed, most=most)[1], np.int64)


class HeldOutFilters:
    """The filters of a store with base names held out: neither their boxes nor a guess of them drops a region.

    Args:
        store: complete.
        dataset: source of its images.
        annotations: the images and BASE boxes that it was made from.
        config: what it was built with.
        teacher: the store's, as published; its LayerNorms are set to the store's.
    """

    def __init__(
        self, store: Store, dataset: Dataset, annotations: Annotations, config: Config, teacher: Teacher
    ) -> None:
        values, tuned = store.teacher
        restore(teacher.layer_norms(), values, tuned["parameters"])
        backgrounds = config.teacher.backgrounds
        with torch.no_grad():
            background = to_device(teacher.encode_text(backgrounds), device_of(teacher)) if backgrounds else None
        self._encoder = _OncePerBox(teacher, config)
        self._store = store
        self._worker = Worker(
            config=config,
            images=dataset.images("train"),
            annotations=annotations,
            teacher=teacher,
            encoder=self._encoder,
            text=torch.from_numpy(store.text[1]).to(device_of(teacher)),
            base_count=len(dataset.split.base),
            background=background,
        )

    @property
    def passes(self) -> int:
        """Crops that the teacher was shown so far."""
        return self._encoder.passes

    @torch.no_grad()
    def regions(self, position: int, held_out: Sequence[Sequence[int]]) -> list[Columns]:
        """Regions of an image for each of several groups of held-out names, best first.

        Args:
            position: position among the annotations' images.
            held_out: groups of positions among the base names.

        Returns:
            Columns of the product `regions`; `class_index` is a position among the store's names.

        Raises:
            ImageError: the image cannot be read.
        """
        self._encoder.forget()
        record = self._worker.annotations.images[position]
        pixels, rows = self._worker.images.read(record), self._store.proposals[record.id]
        proposals = {"box": rows.box, "score": rows.score}
        return [self._regions(position, pixels, proposals, np.array(group, np.int64)) for group in held_out]

    def _regions(self, position: int, pixels: Tensor, proposals: Columns, held_out: NDArray[np.int64]) -> Columns:
        annotations, names = self._worker.annotations, np.arange(len(self._worker.text))
        base = np.setdiff1d(names[: self._worker.base_count], held_out)
        order = np.concatenate([base, held_out, names[self._worker.base_count :]])
        worker = dataclasses.replace(self._worker, text=self._worker.text[order], base_count=len(base))
        rows = annotations.rows(position)
        boxes = annotations.box[rows][np.isin(annotations.class_index[rows], base)]
        found = finished(filtered(View(worker, position, lambda: pixels), proposals, torch.from_numpy(boxes)))
        return {**found, "class_index": order[found["class_index"]].astype(np.int32)}


class _OncePerBox(CropEncoder):
    """Encoder that shows the teacher each box of an image once, whichever names are held out.

    An embedding depends on its crop alone, see `CropEncoder`.
    """

    def __init__(self, teacher: Teacher, config: Config) -> None:
        super().__init__(teacher, config)
        self._known: dict[bytes, Tensor] = {}
        self.passes = 0
        """Crops that the teacher was shown."""

    def forget(self) -> None:
        """Begin with another image."""
        self._known.clear()

    def encode(self, pixels: Tensor, boxes: Tensor) -> tuple[Tensor, int]:
        """See `CropEncoder.encode`."""
        keys = [box.numpy().tobytes() for box in boxes]
        missing = [row for row, key in enumerate(keys) if key not in self._known]
        passes = 0
        if missing:
            embedding, passes = super().encode(pixels, boxes[missing])
            self._known |= {keys[row]: one for row, one in zip(missing, embedding, strict=True)}
        self.passes += passes
        return torch.stack([self._known[key] for key in keys]), passes
