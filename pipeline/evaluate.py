"""`ezsd eval`: base, novel and all, on the validation split; the only place that meets novel boxes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache import JSON, Manifest
from ezsd.adapt import crop_accuracy, restore
from ezsd.data.annotations import Annotations
from ezsd.data.dataset import pad_images, resize
from ezsd.detector.model import Detector
from ezsd.metrics import Detections, evaluate
from ezsd.teacher import Teacher, TeacherError
from pipeline.adapt import CropSource
from pipeline.config import Config, TeacherConfig, from_tables, to_tables
from pipeline.datasets import Dataset, DatasetError, read_dataset_image, recorded_dataset
from pipeline.parsed import evaluation_annotations
from pipeline.progress import Progress
from pipeline.runs import Run, RunError, write_json
from pipeline.teachers import configured_teacher
from pipeline.train import build_detector

BATCH_IMAGES = 16
T = TypeVar("T")
Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedDetector:
    """A finished run, ready to look at images."""

    detector: Detector
    config: Config
    names: tuple[str, ...]
    """Base names, then novel ones."""
    base_count: int
    text: Tensor
    """Unit rows of `names`, (C, D)."""
    device: torch.device

    def find(self, images: Sequence[Tensor], text: Tensor) -> list[tuple[Floats, Floats, Integers]]:
        """Boxes (N, 4) in the pixels of the given images, scores (N,) and rows of `text` (N,), best first.

        Args:
            images: (3, H, W) uint8 RGB each, at original size.
            text: unit rows of the names to look for, (C, D).
        """
        settings = self.config.train
        resized = [resize(i, short_side=settings.short_side, long_side=settings.long_side) for i in images]
        batch, sizes = pad_images([image for image, _, _ in resized])
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            found = self.detector.detect(
                batch.to(self.device),
                sizes,
                text.to(self.device),
                score_floor=self.config.eval.score_floor,
                nms_iou=self.config.eval.nms_iou,
                keep=self.config.eval.keep,
            )
        results = []
        for one, (_, sx, sy) in zip(found, resized, strict=True):
            boxes = one.boxes.float().cpu() / torch.tensor([sx, sy, sx, sy])
            results.append((boxes.numpy(), one.scores.float().cpu().numpy(), one.labels.cpu().numpy()))
        return results


def load_trained(run: Run, device: str) -> TrainedDetector:
    """The detector of a finished run. RunError when training has not ended."""
    checkpoint, card, tables = run.finished(), run.card, run.tables()
    config = from_tables(_table(card, "config"), where=str(run.folder / "run.json"))
    embed_dim, base_count = card["embed_dim"], card["base_count"]
    assert isinstance(embed_dim, int)
    assert isinstance(base_count, int)
    state = checkpoint.model()
    # Frozen normalisation is chosen by the presence of weights; the state replaces them whole.
    frozen = card["backbone_weights"] is not None
    detector = build_detector(config, embed_dim, None, frozen_norms=frozen)
    try:
        detector.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise RunError(
            f"--run {run.folder}: was trained by another version of ezsd ({reason}); train it again"
        ) from error
    names = card["names"]
    assert isinstance(names, list)
    return TrainedDetector(
        detector=detector.to(device).eval(),
        config=config,
        names=tuple(names),
        base_count=base_count,
        text=tables["text"],
        device=torch.device(device),
    )


def run_dataset(run: Run, data_root: Path | None) -> Dataset:
    """The dataset a run was trained on, where it lies now."""
    root = Path(str(run.environment["data_root"])) if data_root is None else data_root
    if not root.is_dir():
        raise DatasetError(f"--run {run.folder}: its images lay in {root}, which is gone; give --data-root DIR")
    return recorded_dataset(run.environment.get("dataset"), str(run.card["dataset"]), root).require()


def detect_split(
    trained: TrainedDetector, annotations: Annotations, root: Path, text: Tensor, stage: str
) -> Detections:
    """Detections in all images of a record; class indices are rows of `text`."""
    ids: list[Integers] = []
    parts: list[tuple[Floats, Floats, Integers]] = []
    with Progress(stage, len(annotations.images), unit="image") as progress:
        for records in _chunks(annotations.images, BATCH_IMAGES):
            images = [read_dataset_image(root, r.file_name, r.width, r.height) for r in records]
            for record, found in zip(records, trained.find(images, text), strict=True):
                ids.append(np.full(len(found[0]), record.id, np.int64))
                parts.append(found)
            progress.advance(len(records))
    return Detections(
        image_id=np.concatenate(ids),
        box=np.concatenate([p[0] for p in parts]).astype(np.float32),
        score=np.concatenate([p[1] for p in parts]).astype(np.float32),
        class_index=np.concatenate([p[2] for p in parts]).astype(np.int32),
    )


def evaluate_run(run: Run, *, data_root: Path | None, device: str) -> dict[str, object]:
    """Evaluate a finished run on the validation split and write eval.json and detections.json.

    "generalised" looks for all names at once and is the headline; "novel_only" looks for novel names alone.
    """
    trained, dataset = load_trained(run, device), run_dataset(run, data_root)
    path, root = dataset.root / dataset.val_annotations, dataset.root / dataset.val_images
    annotations = evaluation_annotations(path, dataset.split)
    if trained.names != dataset.split.names:
        raise RunError(f"--run {run.folder}: trained for other names than dataset {dataset.name} has now")
    began = time.perf_counter()
    found = detect_split(trained, annotations, root, trained.text, "detect")
    scores = evaluate(path, found, dataset.split)
    novel = novel_only(trained, annotations, root)
    result: dict[str, object] = {
        "generalised": scores,
        "novel_only": evaluate(path, novel, dataset.split, names=dataset.split.novel),
    }
    write_json(run.folder / "eval.json", result)
    write_json(run.folder / "detections.json", coco_results(found, trained.names))
    run.record_seconds("eval", time.perf_counter() - began)
    return result


def novel_only(trained: TrainedDetector, annotations: Annotations, root: Path) -> Detections:
    """Detections when only novel names are looked for; class indices are those of the whole split."""
    found = detect_split(trained, annotations, root, trained.text[trained.base_count :], "detect novel")
    return Detections(
        image_id=found.image_id,
        box=found.box,
        score=found.score,
        class_index=found.class_index + np.int32(trained.base_count),
    )


def evaluate_crops(run: Run, *, data_root: Path | None, device: str) -> dict[str, object]:
    """Crop accuracy of the raw and the re-normalised teacher on validation objects, and write crops.json.

    Each crop is compared with all names; base and novel crops are counted apart.
    """
    dataset = run_dataset(run, data_root)
    annotations = evaluation_annotations(dataset.root / dataset.val_annotations, dataset.split)
    config = from_tables(_table(run.card, "config"), where=str(run.folder / "run.json"))
    teacher = run_teacher(run, device, adapted=False)
    made_with = _manifest(run).fields["proposals"]
    # The store's own crop rule: the run's configuration says nothing of stage one.
    crops = from_tables(to_tables(config) | {"proposals": dict(_fields(made_with))}, where="store").proposals
    source = CropSource(
        annotations,
        dataset.root / dataset.val_images,
        size=teacher.input_size,
        ratio=crops.crop_ratio,
        surround=crops.surround,
    )
    single = ~annotations.crowd
    is_base = annotations.class_index < len(dataset.split.base)

    def accuracy() -> dict[str, float | None]:
        batches = source.batches(range(len(annotations.images)), crops=config.build.batch)
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
    return result


def run_teacher(run: Run, device: str, *, adapted: bool) -> Teacher:
    """The teacher of a run, raw or re-normalised. TeacherError when it is not the one the store was made with."""
    recorded = run.environment["teacher"]
    if not isinstance(recorded, dict):
        raise TeacherError(f"--run {run.folder}: its store did not say which teacher made it")
    teacher = configured_teacher(TeacherConfig(**recorded), device)
    differences = Manifest(_fields(_manifest(run).fields["teacher"])).differences(
        Manifest(json.loads(json.dumps(teacher.fingerprint())))
    )
    if differences:
        raise TeacherError(f"--run {run.folder}: the teacher is another now: {'; '.join(differences)}")
    if adapted:
        adapt_back(run, teacher)
    return teacher


def adapt_back(run: Run, teacher: Teacher) -> None:
    """Give a teacher the run's re-normalised LayerNorms."""
    table = run.card["layer_norms"]
    assert isinstance(table, list)
    restore(teacher.layer_norms(), run.tables()["layer_norms"].numpy(), table)


def coco_results(found: Detections, names: Sequence[str]) -> list[dict[str, object]]:
    """Detections as plain records, best first within an image; boxes are xywh as COCO's result files have them."""
    order = np.lexsort((-found.score, found.image_id))
    return [
        {
            "image_id": int(found.image_id[i]),
            "name": names[int(found.class_index[i])],
            "bbox": [round(float(v), 2) for v in (*found.box[i, :2], *(found.box[i, 2:] - found.box[i, :2]))],
            "score": round(float(found.score[i]), 5),
        }
        for i in order
    ]


def headline(result: dict[str, object]) -> dict[str, float | None]:
    """AP50 of base, novel and all names (generalised), and of novel names alone."""
    generalised, alone = result["generalised"], result["novel_only"]
    scores: dict[str, float | None] = {}
    for group in ("base", "novel", "all"):
        scores[group] = _ap50(generalised, group)
    scores["novel_only"] = _ap50(alone, "novel")
    return scores


def _ap50(evaluation: object, group: str) -> float | None:
    assert isinstance(evaluation, dict)
    value: float | None = evaluation[group]["AP50"]
    return value


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _mean(values: NDArray[np.bool_]) -> float | None:
    return float(values.mean()) if len(values) else None


def _manifest(run: Run) -> Manifest:
    return Manifest(_fields(_table(run.card, "store")["manifest"]))


def _table(card: dict[str, object], key: str) -> dict[str, dict[str, object]]:
    value = card[key]
    assert isinstance(value, dict)
    return value


def _fields(value: object) -> dict[str, JSON]:
    assert isinstance(value, dict)
    return value
