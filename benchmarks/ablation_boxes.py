"""Boxes to distil that are no CLIP proposals of the store they go into, as results files in COCO's format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ezsd.cache import Store
from ezsd.data.annotations import ImageRecord
from ezsd.pipeline.config.schema import ProposalConfig
from ezsd.pipeline.data.annotation_cache import training_annotations
from ezsd.pipeline.data.datasets import Dataset
from ezsd.pipeline.extraction.anchors import image_anchors
from ezsd.pipeline.files import write_text

Found = Iterator[tuple[int, np.ndarray, np.ndarray]]
"""Image id, boxes (K, 4) xyxy float32, scores (K,)."""


def write_boxes(path: Path, found: Found) -> None:
    """Write boxes as a results file, which gives the same float32 corners when it is read."""
    entries = [
        json.dumps({"image_id": image_id, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score})
        for image_id, boxes, scores in found
        for (x1, y1, x2, y2), score in zip(boxes.astype(np.float64).tolist(), scores.tolist(), strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "[\n" + ",\n".join(entries) + "\n]\n")


def store_regions(store: Store) -> Found:
    """The regions of a store, in its order."""
    for image_id in store.image_ids.tolist():
        yield _ranked(image_id, store.regions[image_id].box)


def random_anchors(store: Store, dataset: Dataset, grid: ProposalConfig, *, seed: int) -> Found:
    """Anchors of the images of a store in random order, as many as an image has regions there."""
    known = set(store.image_ids.tolist())
    for image in (image for image in _images(dataset) if image.id in known):
        anchors = image_anchors(grid, image.width, image.height).numpy()
        order = np.random.default_rng([seed, image.id]).permutation(len(anchors))
        yield _ranked(image.id, anchors[order[: len(store.regions[image.id].box)]])


def _ranked(image_id: int, boxes: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    return image_id, boxes, -np.arange(len(boxes), dtype=np.float64)


def _images(dataset: Dataset) -> Iterator[ImageRecord]:
    return iter(training_annotations(dataset.root / dataset.train_annotations, dataset.split).images)
