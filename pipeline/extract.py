"""Stage one, second half: one task turns one block of images into journaled proposals, regions and ground truth."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cache import Block, RaggedRows, write_block
from ezsd.adapt import restore
from ezsd.crops import crop_boxes, distinct_crops
from ezsd.data.annotations import Annotations, ImageRecord
from ezsd.proposals import (
    anchor_scores,
    clear_of_base,
    guesses,
    may_be_unseen,
    select_regions,
)
from ezsd.teacher import Teacher
from pipeline.anchors import look_at_anchors
from pipeline.config import Config, from_tables
from pipeline.datasets import Dataset, from_definition, read_dataset_image
from pipeline.given import given_proposals
from pipeline.parsed import training_annotations
from pipeline.reuse import Columns, KnownRegion, Reuse, ReusedRows
from pipeline.teachers import configured_teacher

_SHORT = 16
"""Batches are never shorter."""


@dataclass(frozen=True, slots=True)
class ExtractJob:
    """Everything a worker needs, in names and numbers: it makes the teacher and reads the annotations itself."""

    store: str
    dataset: str
    """Its definition as JSON."""
    root: str
    config: str
    """The configuration as JSON."""
    device: str
    values: bytes
    """Re-normalised LayerNorms, float32."""
    parameters: str
    """Their names and shapes as JSON."""
    text: bytes
    """Unit text rows of base + novel names, float32 (C, D)."""
    reuse: Reuse | None = None
    """What an earlier store has already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Worker:
    """What one process keeps between blocks."""

    config: Config
    dataset: Dataset
    annotations: Annotations
    teacher: Teacher
    text: Tensor
    background: Tensor | None
    reused: ReusedRows | None
    given: Mapping[int, Columns] | None
    """Proposals by image, where a file has them."""


def load_config_teacher(config: Config, device: str) -> Teacher:
    """The teacher of a configuration, as published."""
    return configured_teacher(config.teacher, device)


@lru_cache(maxsize=1)
def _worker(job: ExtractJob) -> _Worker:
    config = from_tables(json.loads(job.config), where="job")
    dataset = from_definition(json.loads(job.dataset), Path(job.root))
    teacher = load_config_teacher(config, job.device)
    restore(teacher.layer_norms(), np.frombuffer(job.values, np.float32), json.loads(job.parameters))
    rows = torch.from_numpy(np.frombuffer(job.text, np.float32).copy()).reshape(-1, teacher.embed_dim)
    background = None
    if config.teacher.background is not None:
        with torch.no_grad():
            background = teacher.encode_text([config.teacher.background])[0].cpu()
    annotations = training_annotations(dataset.root / dataset.train_annotations, dataset.split)
    return _Worker(
        config=config,
        dataset=dataset,
        annotations=annotations,
        teacher=teacher,
        text=rows,
        background=background,
        reused=None if job.reuse is None else ReusedRows(job.reuse),
        given=given_proposals(config.proposals, annotations.images) if config.proposals.boxes else None,
    )


def extract_block(job: ExtractJob, block: Block) -> int:
    """Compute one block and write it whole into the store's journal; returns how many crops the teacher was shown."""
    rows, passes = _extract(job, block)
    write_block(job.store, block, rows)
    return passes


def block_rows(job: ExtractJob, block: Block) -> dict[str, RaggedRows]:
    """All rows of one block of images."""
    rows, _ = _extract(job, block)
    return rows


def _extract(job: ExtractJob, block: Block) -> tuple[dict[str, RaggedRows], int]:
    """The rows of a block, and how many crops the teacher was shown for them.

    One thread per process: sums are then added in one order, and the store has the same bytes from any number of
    workers.
    """
    with _single_thread():
        worker = _worker(job)
        images, passes = zip(*(_extract_image(worker, p) for p in range(block.start, block.stop)), strict=True)
    return _collate(images), sum(passes)


@contextlib.contextmanager
def _single_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _extract_image(worker: _Worker, position: int) -> tuple[dict[str, Columns], int]:
    record = worker.annotations.images[position]
    rows = {} if worker.reused is None else worker.reused.taken(record.id)
    view = _View(worker, record)
    if "ground_truth" not in rows:
        rows["ground_truth"] = _ground_truth(view, worker.annotations, worker.annotations.rows(position))
    if "proposals" not in rows and worker.given is not None:
        rows["proposals"] = worker.given[record.id]
    if "regions" not in rows:
        base_boxes = torch.from_numpy(worker.annotations.box[worker.annotations.rows(position)])
        if "proposals" in rows:
            rows["regions"] = _filtered(view, rows["proposals"], base_boxes)
        else:
            rows |= _proposed(view, base_boxes)
    return rows, view.passes


def encode_boxes(teacher: Teacher, pixels: Tensor, boxes: Tensor, config: Config) -> tuple[Tensor, int]:
    """Unit embeddings (R, D) float32 on the CPU of boxes (R, 4) of one image, and how many crops were encoded.

    Batches never cross an image, and short ones are filled up: a matrix product of few rows adds in another order.
    An embedding then depends on its crop alone, whatever is encoded beside it, and boxes with the same crop share one
    pass.
    """
    size, height, width = teacher.input_size, *pixels.shape[1:]
    ratio, surround = config.proposals.crop_ratio, config.proposals.surround
    first, crop = distinct_crops(boxes, ratio=ratio, surround=surround, width=width, height=height)
    parts = [torch.zeros(0, teacher.embed_dim)]
    for chunk in boxes[first].split(config.build.batch) if len(boxes) else ():
        filled = torch.cat([chunk, chunk[:1].expand(max(0, _SHORT - len(chunk)), 4)])
        crops = crop_boxes(pixels, filled, size=size, ratio=ratio, surround=surround)
        parts.append(teacher.encode_image(crops.float() / 255).float().cpu()[: len(chunk)])
    return torch.cat(parts)[crop], len(first)


class _View:
    """One image as the teacher sees it; read only if anything of it has to be encoded."""

    def __init__(self, worker: _Worker, record: ImageRecord) -> None:
        self.worker, self.record = worker, record
        self.passes = 0
        """Crops that the teacher was shown, but for those that fill up a batch."""

    def encode(self, boxes: Tensor) -> Tensor:
        """Unit embeddings (R, D) float32 on the CPU of boxes (R, 4); see `encode_boxes`."""
        if not len(boxes):
            return torch.zeros(0, self.worker.teacher.embed_dim)
        embedding, passes = encode_boxes(self.worker.teacher, self.pixels, boxes, self.worker.config)
        self.passes += passes
        return embedding

    def score(self, embedding: Tensor) -> Tensor:
        """Scores (R,) of embeddings (R, D); see `select_regions`."""
        worker = self.worker
        names, present = guesses(embedding, worker.text, worker.background, logit_scale=worker.teacher.logit_scale)
        base_count = len(worker.dataset.split.base)
        return anchor_scores(names, present, base_count=base_count, score=worker.config.proposals.score)

    @cached_property
    def pixels(self) -> Tensor:
        """(3, H, W) uint8, where the teacher is."""
        folder = self.worker.dataset.root / self.worker.dataset.train_images
        pixels = read_dataset_image(folder, self.record)
        return pixels.to(getattr(self.worker.teacher, "device", "cpu"))


def _proposed(view: _View, base_boxes: Tensor) -> dict[str, Columns]:
    """Proposals and regions from the anchors."""
    worker, record = view.worker, view.record
    settings = worker.config.proposals
    anchors, embedding = look_at_anchors(settings, record.width, record.height, view.encode, view.score)
    found = select_regions(
        anchors,
        embedding,
        worker.text,
        base_boxes,
        base_count=len(worker.dataset.split.base),
        background=worker.background,
        logit_scale=worker.teacher.logit_scale,
        score=settings.score,
        nms_iou=settings.nms_iou,
        keep_proposals=settings.keep,
        base_iou=settings.base_iou,
        drop_base_guesses=settings.drop_base_guesses,
        keep_regions=settings.regions,
        drop_background=settings.drop_background,
    )
    return {
        "proposals": {"box": anchors[found.proposal].numpy(), "score": found.proposal_score.numpy()},
        "regions": {
            "box": anchors[found.region].numpy(),
            "score": found.region_score.numpy(),
            "confidence": found.confidence.numpy(),
            "class_index": found.class_index.numpy().astype(np.int32),
            "embedding": embedding[found.region].half().numpy(),
        },
    }


def _filtered(view: _View, proposals: Columns, base_boxes: Tensor) -> Columns:
    """Regions from kept proposals, best first, encoding only as many as the filters make necessary."""
    worker, settings = view.worker, view.worker.config.proposals
    box = torch.from_numpy(proposals["box"])
    clear = torch.nonzero(clear_of_base(box, base_boxes, base_iou=settings.base_iou))[:, 0]
    known = {} if worker.reused is None else worker.reused.known(view.record.id)
    found: list[tuple[int, np.float32, int, np.ndarray]] = []
    for places in clear.split(max(settings.regions, _SHORT)):
        missing = [place for place in places.tolist() if box[place].numpy().tobytes() not in known]
        known |= _encoded(view, box[missing])
        for place in places.tolist():
            one = known[box[place].numpy().tobytes()]
            present, guess = torch.tensor([one.present]), torch.tensor([one.class_index])
            if may_be_unseen(
                present,
                guess,
                base_count=len(worker.dataset.split.base),
                drop_base_guesses=settings.drop_base_guesses,
                drop_background=settings.drop_background,
            ):
                found.append((place, one.confidence, one.class_index, one.embedding))
        if len(found) >= settings.regions:
            break
    kept = found[: settings.regions]
    places = np.array([place for place, *_ in kept], np.int64)
    empty = np.zeros((0, worker.teacher.embed_dim), np.float16)
    return {
        "box": proposals["box"][places],
        "score": proposals["score"][places],
        "confidence": np.array([confidence for _, confidence, _, _ in kept], np.float32),
        "class_index": np.array([guess for _, _, guess, _ in kept], np.int32),
        "embedding": np.stack([embedding for *_, embedding in kept]) if kept else empty,
    }


def _encoded(view: _View, boxes: Tensor) -> dict[bytes, KnownRegion]:
    """What the teacher makes of boxes, by their bytes."""
    worker, embedding = view.worker, view.encode(boxes)
    names, present = guesses(embedding, worker.text, worker.background, logit_scale=worker.teacher.logit_scale)
    confidence, guess = names.max(1)
    sure, half = (confidence * present).numpy(), embedding.half().numpy()
    return {
        box.numpy().tobytes(): KnownRegion(float(present[row]), sure[row], int(guess[row]), half[row])
        for row, box in enumerate(boxes)
    }


def _ground_truth(view: _View, annotations: Annotations, rows: slice) -> Columns:
    return {
        "box": annotations.box[rows],
        "class_index": annotations.class_index[rows],
        "annotation_id": annotations.annotation_id[rows],
        "embedding": view.encode(torch.from_numpy(annotations.box[rows])).half().numpy(),
    }


def _collate(images: Sequence[dict[str, Columns]]) -> dict[str, RaggedRows]:
    return {
        product: RaggedRows(
            counts=np.array([len(image[product]["box"]) for image in images], np.int32),
            fields={name: np.concatenate([image[product][name] for image in images]) for name in images[0][product]},
        )
        for product in images[0]
    }
