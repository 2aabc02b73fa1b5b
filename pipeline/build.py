"""`ezsd cache build`: from a folder of images and base boxes to a committed store."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cache import JSON, Manifest, StoreWriter, commit_shard
from ezsd.adapt import restore
from ezsd.data.annotations import Annotations
from ezsd.teacher import Teacher
from pipeline.adapt import adapt_teacher
from pipeline.config import Config, ConfigError, to_tables
from pipeline.datasets import Dataset
from pipeline.extract import ExtractJob, extract_block, load_config_teacher, run_tasks
from pipeline.parsed import training_annotations
from pipeline.progress import Progress
from pipeline.teachers import check_precision

log = logging.getLogger("ezsd")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """One build, as the command line asks for it."""

    dataset: Dataset
    config: Config
    out: Path
    """The store's folder."""
    preset: str | None = None
    """Name of the preset that the configuration came from: `ezsd train` then starts from the same."""
    limit: int | None = None
    """Only the first images of the training split, by id."""
    device: str = "cpu"
    """Where the teacher runs."""
    workers: int = 0
    """Processes that extract; 0 takes one per core on the CPU and one with a GPU."""


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What a build did."""

    path: Path
    already_complete: bool
    seconds: dict[str, float]
    """By stage: adapt, extract, commit."""


def build_cache(request: BuildRequest) -> BuildReport:
    """Build a store, or go on with an unfinished one; a complete one with the same fingerprint is left alone.

    Reads the training split only, and of its boxes only the base ones.

    Raises:
        ValueError: (of many kinds) something about the input is wrong; the message is one line.
    """
    dataset, config = request.dataset.require(), request.config
    annotations = take_first(
        training_annotations(dataset.root / dataset.train_annotations, dataset.split), request.limit
    )
    if not annotations.images:
        raise ConfigError(f"{dataset.root / dataset.train_annotations}: no images; there is nothing to build")
    teacher = load_config_teacher(config, request.device)
    manifest = describe(dataset, annotations, config, teacher)
    seconds: dict[str, float] = {}
    with StoreWriter.open(
        request.out,
        manifest,
        image_ids=[image.id for image in annotations.images],
        widths=[image.width for image in annotations.images],
        heights=[image.height for image in annotations.images],
        embed_dim=teacher.embed_dim,
        block_images=config.build.block_images,
    ) as writer:
        if writer.complete:
            return BuildReport(request.out, already_complete=True, seconds={})
        with _log_file(writer.log_path):
            _record_environment(writer, request, seconds)
            with _timed(seconds, "adapt"):
                job = _prepare(writer, request, teacher, annotations)
            workers = request.workers or (1 if request.device != "cpu" else os.cpu_count() or 1)
            with _timed(seconds, "extract"):
                _extract(writer, job, workers)
            with _timed(seconds, "commit"):
                _write_shards(writer, workers)
                _record_environment(writer, request, seconds)
                writer.finish()
    return BuildReport(request.out, already_complete=False, seconds=seconds)


def describe(dataset: Dataset, annotations: Annotations, config: Config, teacher: Teacher) -> Manifest:
    """Everything that shapes the store's bytes: content, never a path or a version."""
    digests = annotations.digest()
    return Manifest(
        {
            "dataset": {
                "name": dataset.name,
                "image_list_sha256": digests["images"],
                "base_boxes_sha256": digests["boxes"],
                "base_names": list(dataset.split.base),
                "novel_names": list(dataset.split.novel),
            },
            "teacher": _json(teacher.fingerprint()),
            "background": config.teacher.background,
            "adapt": dataclasses.asdict(config.adapt),
            "proposals": _json(to_tables(config)["proposals"]),
            "build": dataclasses.asdict(config.build),
        }
    )


def take_first(annotations: Annotations, limit: int | None) -> Annotations:
    """The record of the first `limit` images."""
    if limit is None or limit >= len(annotations.images):
        return annotations
    if limit < 1:
        raise ConfigError(f"--limit must be at least 1, got {limit}")
    rows = annotations.image_index < limit
    return dataclasses.replace(
        annotations,
        images=annotations.images[:limit],
        image_index=annotations.image_index[rows],
        box=annotations.box[rows],
        class_index=annotations.class_index[rows],
        annotation_id=annotations.annotation_id[rows],
        crowd=annotations.crowd[rows],
    )


def _prepare(writer: StoreWriter, request: BuildRequest, teacher: Teacher, annotations: Annotations) -> ExtractJob:
    """Re-normalise and embed the names, or take both from the journal."""
    dataset, config = request.dataset, request.config
    if not writer.has_whole("teacher"):
        torch.manual_seed(config.build.seed)
        values, tuned = adapt_teacher(
            teacher,
            annotations,
            dataset.root / dataset.train_images,
            config=config.adapt,
            crops=config.proposals,
            seed=config.build.seed,
        )
        log.info(
            "re-normalised: held-out base accuracy %.3f -> %.3f",
            tuned["base_accuracy_before"],
            tuned["base_accuracy_after"],
        )
        writer.write_whole("teacher", {"values": values}, _json(tuned))
    arrays, attributes = writer.read_whole("teacher")
    restored = (arrays["values"], attributes["parameters"])
    restore(teacher.layer_norms(), *restored)
    check_precision(teacher, config, dataset, annotations, restored, request.device)
    if not writer.has_whole("text"):
        with torch.no_grad():
            text = teacher.encode_text(dataset.split.names).float().cpu().numpy()
        names = {"names": list(dataset.split.names), "base_count": len(dataset.split.base)}
        writer.write_whole("text", {"embedding": text}, _json(names))
    text_rows, _ = writer.read_whole("text")
    return ExtractJob(
        store=str(request.out.absolute()),
        dataset=json.dumps(dataset.definition()),
        root=str(dataset.root.absolute()),
        config=json.dumps(to_tables(config)),
        device=request.device,
        values=arrays["values"].astype(np.float32).tobytes(),
        parameters=json.dumps(attributes["parameters"]),
        text=text_rows["embedding"].astype(np.float32).tobytes(),
    )


def _extract(writer: StoreWriter, job: ExtractJob, workers: int) -> None:
    pending, total = writer.pending(), len(writer.blocks)
    if len(pending) < total:
        log.info("resuming: %d of %d blocks are done", total - len(pending), total)
    with Progress("extract", total, unit="block", done=total - len(pending)) as progress:
        run_tasks(partial(extract_block, job), pending, workers=workers, progress=progress)


def _write_shards(writer: StoreWriter, workers: int) -> None:
    tasks = writer.commit_tasks()
    # Small commits are over before worker processes have started.
    workers = workers if len(tasks) > 64 else 1
    with Progress("commit", len(tasks), unit="shard") as progress:
        run_tasks(partial(commit_shard, writer.path), tasks, workers=workers, progress=progress)


def _record_environment(writer: StoreWriter, request: BuildRequest, seconds: dict[str, float]) -> None:
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "open_clip_torch", "zarr", "numpy", "ezsd")
    }
    writer.write_environment(
        {
            "dataset": _json(request.dataset.definition()),
            "data_root": str(request.dataset.root.absolute()),
            "preset": request.preset,
            "limit": request.limit,
            "device": request.device,
            "teacher": dataclasses.asdict(request.config.teacher),
            "host": platform.node(),
            "python": platform.python_version(),
            "versions": dict(versions),
            "seconds": {stage: round(spent, 2) for stage, spent in seconds.items()},
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
    )


def _json(value: object) -> dict[str, JSON]:
    """A table as JSON has it: tuples become lists."""
    table: dict[str, JSON] = json.loads(json.dumps(value))
    return table


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - began


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Everything logged meanwhile also goes into the store's build.log."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()
