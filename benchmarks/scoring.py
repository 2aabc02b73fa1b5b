"""Figures of a trained detector on the validation images of a benchmark."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import driver
import numpy as np
import torch
from torchvision.ops import box_convert, box_iou

from ezsd.metrics import evaluate
from ezsd.metrics.ground_truth import Truth, read_truth
from ezsd.metrics.results import Results
from ezsd.pipeline.data.annotation_cache import evaluation_annotations
from ezsd.pipeline.data.datasets import Dataset
from ezsd.pipeline.inference.evaluate import detect_split
from ezsd.pipeline.inference.predictor import TrainedDetector

LEAST_IOU = 0.1
"""Of a detection with the object that it may have found; below, it is on the background."""


def permuted(trained: TrainedDetector) -> TrainedDetector:
    """The detector with each novel name's text row given to the next novel name."""
    base, novel = trained.text[: trained.base_count], trained.text[trained.base_count :]
    return replace(trained, text=torch.cat([base, novel.roll(1, 0)]))


def score(trained: TrainedDetector, dataset: Dataset) -> driver.Row:
    """AP50, AP75, AP and mean IoU of base, novel and all names, which are detected at once; AP50 of each.

    The split is always that of the benchmark, whatever a run was trained on. A run whose text rows have the order of
    its names is all that is asked for.
    """
    split = dataset.split
    if trained.names != split.names:
        raise ValueError(f"expected text rows of {split.names}, found {trained.names}")
    path = dataset.annotations("val")
    annotations, searches = evaluation_annotations(path, split), [trained.search(trained.text)]
    (found,) = detect_split(trained, annotations, dataset.images("val"), searches, "detect")
    scores, truth = evaluate(path, found, split), read_truth(path, split)
    ious = placing(truth, found)
    base = truth.class_index < len(split.base)
    groups = {"base": base, "novel": ~base, "all": np.ones_like(base)}
    figures: driver.Row = {
        metric: {group: scores[group][metric] for group in groups} for metric in ("AP50", "AP75", "AP")
    }
    matched = ~np.isnan(ious)
    return {
        **figures,
        "IoU": {group: _mean(ious[members & matched]) for group, members in groups.items()},
        "matched": {group: _mean(matched[members]) for group, members in groups.items()},
        "per_class": {name: one["AP50"] for name, one in scores["per_class"].items()},
    }


def placing(truth: Truth, found: Results) -> np.ndarray:
    """IoU of each object (N,) with the best-scored detection of its name, NaN without one.

    A detection is of the object of its image and name that it overlaps most, if by at least `LEAST_IOU`.
    """
    ious, best = np.full(len(truth.image_id), np.nan), np.full(len(truth.image_id), -np.inf)
    corners = [box_convert(torch.from_numpy(boxes), "xywh", "xyxy") for boxes in (truth.xywh, found.xywh)]
    for image, name in {*zip(truth.image_id.tolist(), truth.class_index.tolist(), strict=True)}:
        objects = np.flatnonzero((truth.image_id == image) & (truth.class_index == name))
        for row in np.flatnonzero((found.image_id == image) & (found.class_index == name)):
            overlaps = box_iou(corners[0][objects], corners[1][[row]])[:, 0].numpy()
            nearest = objects[overlaps.argmax()]
            if overlaps.max() >= LEAST_IOU and found.score[row] > best[nearest]:
                ious[nearest], best[nearest] = overlaps.max(), found.score[row]
    return ious


def _mean(numbers: np.ndarray[Any, Any]) -> float | None:
    return float(numbers.mean()) if len(numbers) else None
