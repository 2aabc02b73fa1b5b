"""Stage one, second half: one task turns one block of images into journaled proposals, regions and ground truth."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from cache import Block, RaggedRows, write_block
from ezsd.adapt import restore
from ezsd.boxes import clip
from ezsd.crops import crop_boxes
from ezsd.data.annotations import Annotations
from ezsd.proposals import Selection, faithful_anchors, select_regions, sliding_anchors
from ezsd.teacher import Teacher
from pipeline.config import Config, ProposalConfig, from_tables
from pipeline.datasets import Dataset, from_definition, read_dataset_image
from pipeline.parsed import training_annotations
from pipeline.progress import Progress
from pipeline.teachers import configured_teacher

T = TypeVar("T")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Worker:
    """What one process keeps between blocks."""

    config: Config
    dataset: Dataset
    annotations: Annotations
    teacher: Teacher
    text: Tensor
    background: Tensor | None


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
    return _Worker(
        config=config,
        dataset=dataset,
        annotations=training_annotations(dataset.root / dataset.train_annotations, dataset.split),
        teacher=teacher,
        text=rows,
        background=background,
    )


def extract_block(job: ExtractJob, block: Block) -> int:
    """Compute one block and write it whole into the store's journal; returns its number.

    One thread per process: sums are then added in one order, and the store has the same bytes from any number of
    workers.
    """
    with _single_thread():
        worker = _worker(job)
        images = [_extract_image(worker, position) for position in range(block.start, block.stop)]
    write_block(job.store, block, _collate(images, worker.teacher.embed_dim))
    return block.index


@contextlib.contextmanager
def _single_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def image_anchors(config: ProposalConfig, width: int, height: int) -> Tensor:
    """Anchors (A, 4) of an image that are at least one pixel wide and high, original-image pixels."""
    if config.grid == "faithful":
        stride = round(config.stride)
        anchors = faithful_anchors(width, height, sizes=config.sizes, ratios=config.ratios, stride=stride)
    else:
        anchors = sliding_anchors(width, height, sizes=config.sizes, ratios=config.ratios, stride=config.stride)
    return anchors[((anchors[:, 2:] - anchors[:, :2]) >= 1).all(1)]


@torch.no_grad()
def _extract_image(worker: _Worker, position: int) -> dict[str, dict[str, np.ndarray]]:
    settings, record = worker.config.proposals, worker.annotations.images[position]
    folder = worker.dataset.root / worker.dataset.train_images
    pixels = read_dataset_image(folder, record.file_name, record.width, record.height)
    rows = worker.annotations.rows(position)
    base_boxes = torch.from_numpy(worker.annotations.box[rows])
    anchors = clip(image_anchors(settings, record.width, record.height), record.width, record.height)
    embedding = _encode(worker, pixels, torch.cat([anchors, base_boxes]))
    found = select_regions(
        anchors,
        embedding[: len(anchors)],
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
    )
    return _products(found, anchors, embedding, worker.annotations, rows)


def _products(
    found: Selection, anchors: Tensor, embedding: Tensor, annotations: Annotations, rows: slice
) -> dict[str, dict[str, np.ndarray]]:
    half = embedding.half().numpy()
    return {
        "proposals": {"box": anchors[found.proposal].numpy(), "score": found.proposal_score.numpy()},
        "regions": {
            "box": anchors[found.region].numpy(),
            "score": found.region_score.numpy(),
            "confidence": found.confidence.numpy(),
            "class_index": found.class_index.numpy().astype(np.int32),
            "embedding": half[found.region.numpy()],
        },
        "ground_truth": {
            "box": annotations.box[rows],
            "class_index": annotations.class_index[rows],
            "annotation_id": annotations.annotation_id[rows],
            "embedding": half[len(anchors) :],
        },
    }


def _encode(worker: _Worker, pixels: Tensor, boxes: Tensor) -> Tensor:
    """Unit embeddings (R, D) float32 on the CPU; batches never cross an image, so nothing else decides their bits."""
    image = pixels.to(getattr(worker.teacher, "device", "cpu"))
    size, settings = worker.teacher.input_size, worker.config.proposals
    parts = []
    for chunk in boxes.split(worker.config.build.batch):
        crops = crop_boxes(image, chunk, size=size, ratio=settings.crop_ratio, surround=settings.surround)
        parts.append(worker.teacher.encode_image(crops.float() / 255).float().cpu())
    return torch.cat(parts) if parts else torch.zeros(0, worker.teacher.embed_dim)


def _collate(images: list[dict[str, dict[str, np.ndarray]]], embed_dim: int) -> dict[str, RaggedRows]:
    return {
        product: RaggedRows(
            counts=np.array([len(image[product]["box"]) for image in images], np.int32),
            fields={name: np.concatenate([image[product][name] for image in images]) for name in images[0][product]},
        )
        for product in images[0]
    }


def run_tasks(task: Callable[[T], object], items: Sequence[T], *, workers: int, progress: Progress) -> None:
    """Run one Dask task per item, in this process or in `workers` of them; the first failure is raised.

    Args:
        task: picklable; its results are thrown away.
        items: small and picklable: only numbers travel in the graph.
        workers: processes; 1 runs here.
        progress: advanced by one per finished item.
    """
    if workers == 1 or len(items) <= 1:
        from dask.base import compute
        from dask.delayed import delayed

        for item in items:
            compute(delayed(task)(item), scheduler="synchronous")
            progress.advance()
        return
    from dask import config
    from distributed import Client, LocalCluster, as_completed

    # Dask tells its workers' allocator to give memory back at once; every tensor then costs a system call and fresh
    # pages, which took a third of the time here. One thread per process is what it sets besides, and stays.
    threads = {f"{library}_NUM_THREADS": 1 for library in ("OMP", "MKL", "OPENBLAS")}

    # Its workers' comings and goings are no user's business; what fails is raised below.
    logging.getLogger("distributed").setLevel(logging.ERROR)
    with (
        config.set({"distributed.nanny.pre-spawn-environ": threads}),
        tempfile.TemporaryDirectory(prefix="ezsd-dask-") as scratch,
        LocalCluster(
            n_workers=min(workers, len(items)),
            threads_per_worker=1,
            processes=True,
            # Any free port, and nothing to look at there.
            dashboard_address=":0",
            scheduler_kwargs={"dashboard": False},
            memory_limit=None,
            local_directory=scratch,
            silence_logs="ERROR",
        ) as cluster,
        Client(cluster) as client,
    ):
        futures = client.map(task, items, pure=False)
        for future in as_completed(futures):
            # A failed task raises its own error here.
            future.result()
            progress.advance()
