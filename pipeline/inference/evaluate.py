"""Evaluation of a run on base, novel and all classes: `ezsd eval --run`; only evaluation reads novel boxes."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops import box_convert

from ezsd.adapt import crop_accuracy
from ezsd.data.annotations import Annotations
from ezsd.data.records import ImageRecord
from ezsd.detector.model import Detections
from ezsd.metrics import COCO_LIMITS, LVIS_LIMITS, Results, read_truth
from ezsd.pipeline.config.schema import changed_settings, setting_of
from ezsd.pipeline.data.annotation_cache import evaluation_annotations
from ezsd.pipeline.data.datasets import Dataset, recorded_dataset
from ezsd.pipeline.data.image_source import ImageSource
from ezsd.pipeline.data.requirements import require_evaluation
from ezsd.pipeline.errors import ArgumentError, ConfigError, DatasetError, RunError
from ezsd.pipeline.extraction.adapt import CropSource
from ezsd.pipeline.extraction.base_images import BaseImages
from ezsd.pipeline.files import write_json, write_text
from ezsd.pipeline.inference.evaluation_tables import (
    SPACES,
    Classes,
    Space,
    class_slice,
    coco_results,
    document,
    space_of,
)
from ezsd.pipeline.inference.predictor import (
    ResizedImage,
    Search,
    TrainedDetector,
    adapt_back,
    crop_settings,
    encode_masks,
    load_trained,
    run_teacher,
)
from ezsd.pipeline.progress import Progress
from ezsd.pipeline.read_ahead import read_ahead
from ezsd.pipeline.runs.card import write_card
from ezsd.pipeline.runs.run import Run
from ezsd.teacher.open_clip import device_of

BATCH_IMAGES = 16
KEEP = max(limit.count for limit in (*COCO_LIMITS, *LVIS_LIMITS))
"""Most detections per image in an evaluation: the highest of its limits."""
T = TypeVar("T")


def run_dataset(run: Run, data_root: Path | None) -> Dataset:
    """Dataset that a run was trained on, in its present folder."""
    root = Path(str(run.environment["data_root"])) if data_root is None else data_root
    if not root.is_dir():
        raise DatasetError(f"`run={run.folder}`: its images lay in {root}, which is gone; give `data_root=DIR`")
    return recorded_dataset(run.environment.get("dataset"), str(run.spec["dataset"]), root).require()


def detect_split(
    trained: TrainedDetector,
    annotations: Annotations,
    source: ImageSource,
    searches: Sequence[Search],
    stage: str,
    *,
    masks: bool = True,
) -> list[Results]:
    """Detect in all images of a record, the `KEEP` best in each, for each search; class indices are rows of its `text`.

    Masks are made if the settings have them, unless `masks` is false.
    """
    masks = masks and trained.config.model.masks
    found: list[list[tuple[int, Detections]]] = [[] for _ in searches]
    run_lengths: list[list[bytes]] = [[] for _ in searches]

    def read(records: Sequence[ImageRecord]) -> list[ResizedImage]:
        return trained.resized([source.read(record) for record in records])

    with Progress(stage, len(annotations.images), unit="image") as progress:
        for records, read_images in read_ahead(_chunks(annotations.images, BATCH_IMAGES), read):
            images = read_images()
            each = trained.detect_each(images, searches, keep=KEEP, masks=masks)
            for number, detected in enumerate(each):
                for record, image, one in zip(records, images, detected, strict=True):
                    run_lengths[number] += encode_masks(one, *image.original.shape[1:]) or ()
                    found[number].append((record.id, dataclasses.replace(one, masks=None)))
            progress.advance(len(records), "" if trained.ensemble is None else f"{trained.ensemble.crops} crops")
    if trained.ensemble is not None:
        trained.ensemble.log_cost(len(annotations.images))
    return [
        _results(parts, tuple(masks_of) if masks else None) for parts, masks_of in zip(found, run_lengths, strict=True)
    ]


def _results(found: Sequence[tuple[int, Detections]], masks: tuple[bytes, ...] | None) -> Results:
    parts = [one for _, one in found]
    return Results(
        image_id=np.concatenate([np.full(len(one.boxes), number, np.int64) for number, one in found]),
        xywh=box_convert(torch.cat([one.boxes for one in parts]).double(), "xyxy", "xywh").numpy(),
        score=torch.cat([one.scores for one in parts]).double().numpy(),
        class_index=torch.cat([one.labels for one in parts]).numpy(),
        masks=masks,
    )


def evaluate_run(
    run: Run,
    *,
    data_root: Path | None,
    device: str,
    split: str = "val",
    classes: Classes | None = None,
    alone: bool = False,
    max_detections: int | None = None,
    overrides: Sequence[str] = (),
    weights: Path | None = None,
) -> dict[str, object]:
    """Evaluate a finished run and write eval.json and detections.json.

    "generalised" detects all classes at once and is the headline. "novel_asked" detects the novel classes while the
    base classes compete unreported: it differs from the headline's novel figures by the places that detections of base
    classes take there. "novel_alone" has no competitors. Another split or label space goes into files named after it,
    such as eval-train-novel.json, and results with other settings into eval-set.json.

    Args:
        run: a finished run.
        data_root: folder of the images now; None takes the place recorded in the run.
        device: where to run.
        split: "val" or "train".
        classes: the classes detected at once: all, base or novel; None for all.
        alone: True to let no other classes compete with `classes`, base or novel; without `classes`, the novel classes
            are detected alone after all classes.
        max_detections: the limit of the headline; None for the usual one of the file's rules.
        overrides: settings used instead of the run's, see `at_test_time`; not `eval.max_detections`.
        weights: the teacher's weights, if they have moved; read where the settings let it take part in scores.

    Raises:
        ValueError: (of many kinds) an unfinished run, images or annotations that are not in order or none.
    """
    _refuse_max_detections(overrides)
    trained, dataset = load_trained(run, device, overrides, weights=weights), run_dataset(run, data_root)
    if trained.names != dataset.split.names:
        raise RunError(f"`run={run.folder}`: trained for other names than dataset {dataset.name} has now")
    path, source = _split_places(dataset, split)
    annotations = require_evaluation(dataset, part=split)
    truth = read_truth(path, dataset.split, masks=trained.config.model.masks)
    began = time.perf_counter()
    found = _search_all(trained, annotations, source, _spaces(classes, alone=alone))
    result = document(truth, found, max_detections)
    if overrides:
        result["settings"] = changed_settings(overrides, trained.config)
    apart = "alone" if classes and alone else ""
    words = ("" if split == "val" else split, classes or "", apart, "set" if overrides else "")
    suffix = "".join(f"-{word}" for word in words if word)
    write_json(run.folder / f"eval{suffix}.json", result)
    first = next(iter(found.values()))
    write_text(run.folder / f"detections{suffix}.json", coco_results(first, truth))
    run.record_seconds("eval", time.perf_counter() - began)
    write_card(run)
    return result


def _refuse_max_detections(overrides: Sequence[str]) -> None:
    for override in overrides:
        if setting_of(override) == "eval.max_detections":
            raise ConfigError(
                f"`overrides` {override}: an evaluation always asks for {KEEP} detections per image, and "
                "eval.max_detections is for `ezsd detect` alone; leave it out, `max_detections` says how many count in "
                "the headline"
            )


def _spaces(classes: Classes | None, *, alone: bool) -> tuple[Space, ...]:
    """Label spaces to evaluate, in their order."""
    if classes is not None:
        return (space_of(classes, alone=alone),)
    return ("generalised", "novel_alone") if alone else ("generalised",)


def _split_places(dataset: Dataset, split: str) -> tuple[Path, ImageSource]:
    """Annotations and images."""
    parts = ("val", "train")
    if split not in parts:
        raise ArgumentError(f"`split={split}`: expected one of {', '.join(parts)}")
    return dataset.annotations(split), dataset.images(split)


def _search_all(
    trained: TrainedDetector, annotations: Annotations, source: ImageSource, spaces: Sequence[Space]
) -> dict[Space, Results]:
    """Detect the names of label spaces, each as if alone; class indices are those of the whole split."""
    members = [class_slice(SPACES[space], len(trained.names), trained.base_count) for space in spaces]
    searches = [
        trained.search(trained.text[rows], alone=space.endswith("alone"))
        for rows, space in zip(members, spaces, strict=True)
    ]
    stage = "detect" if spaces[0] == "generalised" else f"detect {spaces[0].replace('_', ' ')}"
    each = detect_split(trained, annotations, source, searches, stage)
    return {
        space: _rounded(dataclasses.replace(found, class_index=found.class_index + rows.start))
        for space, rows, found in zip(spaces, members, each, strict=True)
    }


def _rounded(results: Results) -> Results:
    """Round results as their file does, so that evaluating the file gives the same figures."""
    # Nine digits tell all float32 apart: no two scores become equal.
    score = np.array([float(f"{score:.9g}") for score in results.score], dtype=np.float64)
    return dataclasses.replace(results, xywh=results.xywh.round(3), score=score)


def evaluate_crops(run: Run, *, data_root: Path | None, device: str, weights: Path | None = None) -> dict[str, object]:
    """Measure crop accuracy of the raw and the re-normalised teacher on validation objects; write crops.json.

    Each crop is compared with all classes; base and novel crops are counted apart.

    Args:
        run: the run of the teacher.
        data_root: folder of the images now; None takes the place recorded in the run.
        device: where to run.
        weights: the teacher's weights, if they have moved.

    Raises:
        ValueError: (of many kinds) the teacher is gone or another one, images or annotations are not in order.
    """
    dataset = run_dataset(run, data_root)
    annotations = evaluation_annotations(dataset.annotations("val"), dataset.split)
    config = crop_settings(run)
    teacher = run_teacher(run, device, adapted=False, weights=weights)
    images = BaseImages(annotations=annotations, source=dataset.images("val"), reader="the crop accuracy")
    source = CropSource(
        images,
        size=teacher.input_size,
        crops=config.proposals,
        least=config.adapt.min_crop_size,
        device=device_of(teacher),
    )
    single = ~annotations.crowd
    is_base = annotations.class_index < len(dataset.split.base)

    def accuracy() -> dict[str, float | None]:
        # Threads read ahead; they must not go on after an error, or Ctrl-C.
        with contextlib.closing(
            source.batches(range(len(annotations.images)), crops=config.build.batch_size)
        ) as batches:
            right = crop_accuracy(teacher, batches, dataset.split.names).numpy()
        return {"base": _mean(right[is_base & single]), "novel": _mean(right[~is_base & single])}

    raw = accuracy()
    adapt_back(run, teacher)
    result: dict[str, object] = {
        "raw": raw,
        "re_normalised": accuracy(),
        "crops": {"base": int((is_base & single).sum()), "novel": int((~is_base & single).sum())},
    }
    write_json(run.folder / "crops.json", result)
    write_card(run)
    return result


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _mean(values: NDArray[np.bool_]) -> float | None:
    return float(values.mean()) if len(values) else None
