"""`ezsd cache build`: from a folder of images and base boxes to a committed store."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.resources import as_file
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cache import PRODUCTS, Forecast, Manifest, Store, StoreWriter, commit_shard, forecast, info
from ezsd.adapt import restore
from ezsd.data.annotations import Annotations
from ezsd.teacher import TINY_SHAPES, Teacher, shipped_weights
from pipeline.adapt import adapt_teacher
from pipeline.config import Config, ConfigError, to_tables
from pipeline.datasets import Dataset
from pipeline.extract import ExtractJob, extract_block, load_config_teacher
from pipeline.given import given_proposals
from pipeline.parsed import training_annotations
from pipeline.progress import Progress
from pipeline.provenance import as_json, describe, model_inputs
from pipeline.reuse import Reuse, plan_reuse
from pipeline.schedule import run_tasks
from pipeline.teachers import check_precision

log = logging.getLogger("ezsd")
WHOLE_PRODUCTS = ("teacher", "text")


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
    reuse: Path | None = None
    """A complete store to take over what would come out the same."""


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What a build did."""

    path: Path
    already_complete: bool
    seconds: dict[str, float]
    """By stage: adapt, extract, commit."""
    reused: tuple[str, ...]
    """Products taken over from another store."""
    computed: tuple[str, ...]
    """The others."""


def build_cache(request: BuildRequest) -> BuildReport:
    """Build a store, or go on with an unfinished one; a complete one with the same fingerprint is left alone.

    Reads the training split only, and of its boxes only the base ones.

    Raises:
        ValueError: (of many kinds) something about the input is wrong; the message is one line.
    """
    request.dataset.require()
    annotations = read_annotations(request)
    if _known_complete(request, annotations):
        return BuildReport(request.out, already_complete=True, seconds={}, reused=(), computed=())
    if request.config.proposals.boxes:
        # Whatever is wrong with them is said before anything is written.
        given_proposals(request.config.proposals, read_annotations(dataclasses.replace(request, limit=None)).images)
    teacher = load_config_teacher(request.config, request.device)
    manifest = describe(request.dataset, annotations, request.config, teacher.fingerprint())
    reuse = None if request.reuse is None else plan_reuse(request.reuse, manifest)
    reused = () if reuse is None else reuse.products
    seconds: dict[str, float] = {}
    with _open_writer(request, manifest, annotations, teacher.embed_dim) as writer:
        if writer.complete:
            return BuildReport(request.out, already_complete=True, seconds={}, reused=(), computed=())
        with _log_file(writer.log_path):
            _warn_of_room(request, annotations, teacher.embed_dim)
            _record_environment(writer, request, seconds, {})
            with _timed(seconds, "adapt"):
                job = _prepare(writer, request, teacher, annotations, reuse)
            workers = request.workers or (1 if request.device != "cpu" else os.cpu_count() or 1)
            with _timed(seconds, "extract"):
                passes = _extract(writer, job, workers)
            with _timed(seconds, "commit"):
                _write_shards(writer, workers)
                _record_environment(writer, request, seconds, passes)
                writer.finish()
    computed = tuple(product for product in PRODUCTS if product not in reused)
    return BuildReport(request.out, already_complete=False, seconds=seconds, reused=reused, computed=computed)


def read_annotations(request: BuildRequest) -> Annotations:
    """The images and base boxes that a build is of."""
    file = request.dataset.root / request.dataset.train_annotations
    annotations = take_first(training_annotations(file, request.dataset.split), request.limit)
    if not annotations.images:
        raise ConfigError(f"{file}: no images; there is nothing to build")
    return annotations


def _open_writer(request: BuildRequest, manifest: Manifest, annotations: Annotations, embed_dim: int) -> StoreWriter:
    return StoreWriter.open(
        request.out,
        manifest,
        image_ids=[image.id for image in annotations.images],
        widths=[image.width for image in annotations.images],
        heights=[image.height for image in annotations.images],
        embed_dim=embed_dim,
        block_images=request.config.build.block_images,
    )


def _known_complete(request: BuildRequest, annotations: Annotations) -> bool:
    """Whether a complete store is the wanted one, decided without loading the teacher.

    The store remembers the digest of the file that its teacher's weights came from: the same file under the same
    name makes the same teacher. Where that does not settle it, nothing is known, and the teacher has to be loaded.
    """
    if not (request.out / "COMMIT.json").is_file():
        return False
    found = info(request.out)
    recorded = found.environment or {}
    same_file = recorded.get("weights_file_sha256") == (weights_file_digest(request.config) or "unknown")
    same_loader = recorded.get("versions", {}).get("open_clip_torch") == importlib.metadata.version("open_clip_torch")
    if not same_file or not same_loader or found.problems:
        return False
    asked = dataclasses.asdict(request.config.teacher) | {"weights": None}
    if dict(recorded.get("teacher", {})) | {"weights": None} != asked:
        return False
    model = model_inputs(found.manifest)
    wanted = describe(request.dataset, annotations, request.config, model)
    if wanted != found.manifest:
        return False
    # The store may have leftovers of its build, which opening it for writing removes.
    _open_writer(request, wanted, annotations, found.embed_dim).close()
    return True


def weights_file_digest(config: Config) -> str | None:
    """Sha256 of the local file that the teacher's weights come from; None where they come from elsewhere."""
    file = Path(config.teacher.weights) if config.teacher.weights else None
    if file is None and config.teacher.name == TINY_SHAPES:
        with as_file(shipped_weights()) as shipped:
            return _file_sha256(shipped)
    return _file_sha256(file) if file is not None and file.is_file() else None


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildForecast:
    """What a build would do, without doing any of it."""

    images: int
    blocks: int
    at_most: Forecast
    """With as many proposals and regions in each image as are kept at most."""
    free: int
    """Bytes free where the store would lie."""


def forecast_build(request: BuildRequest) -> BuildForecast:
    """How large the store would become, and how much the disk must hold meanwhile."""
    request.dataset.require()
    annotations = read_annotations(request)
    teacher = load_config_teacher(request.config, "cpu")
    images, size = len(annotations.images), request.config.build.block_images
    return BuildForecast(
        images=images,
        blocks=-(-images // size),
        at_most=_at_most(request, annotations, teacher.embed_dim),
        free=_free(request.out),
    )


def _at_most(request: BuildRequest, annotations: Annotations, embed_dim: int) -> Forecast:
    images, settings = len(annotations.images), request.config.proposals
    rows = {
        "proposals": images * settings.keep,
        "regions": images * min(settings.keep, settings.regions),
        "ground_truth": len(annotations.box),
    }
    return forecast(rows, images=images, embed_dim=embed_dim, embedding=request.config.build.embedding)


def _free(folder: Path) -> int:
    there = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    return shutil.disk_usage(there).free


def _warn_of_room(request: BuildRequest, annotations: Annotations, embed_dim: int) -> None:
    most, free = _at_most(request, annotations, embed_dim), _free(request.out)
    if most.peak > free:
        log.warning("%s: the build may need up to %s bytes, %s are free", request.out, f"{most.peak:,}", f"{free:,}")


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


def _prepare(
    writer: StoreWriter, request: BuildRequest, teacher: Teacher, annotations: Annotations, reuse: Reuse | None
) -> ExtractJob:
    """Re-normalise and embed the names, or take both from the journal or an earlier store."""
    for product in WHOLE_PRODUCTS:
        if reuse is not None and product in reuse.products and not writer.has_whole(product):
            writer.write_whole(product, *Store(reuse.store).read_whole(product))
    if not writer.has_whole("teacher"):
        values, tuned = adapted(request, teacher, annotations)
        writer.write_whole("teacher", {"values": values}, as_json(tuned))
    arrays, attributes = writer.read_whole("teacher")
    restored = (arrays["values"], attributes["parameters"])
    restore(teacher.layer_norms(), *restored)
    check_precision(teacher, request.config, request.dataset, annotations, restored, request.device)
    if not writer.has_whole("text"):
        split = request.dataset.split
        names = {"names": split.names, "base_count": len(split.base), "template": request.config.teacher.template}
        writer.write_whole("text", {"embedding": embed_names(teacher, split.names)}, as_json(names))
    text_rows, _ = writer.read_whole("text")
    return extract_job(request, attributes["parameters"], arrays["values"], text_rows["embedding"], reuse)


def adapted(
    request: BuildRequest, teacher: Teacher, annotations: Annotations
) -> tuple[NDArray[np.float32], dict[str, object]]:
    """Re-normalise the teacher in place; its tuned values and what is said about them."""
    dataset, config = request.dataset, request.config
    torch.manual_seed(config.build.seed)
    values, tuned = adapt_teacher(
        teacher,
        annotations,
        dataset.root / dataset.train_images,
        config=config.adapt,
        crops=config.proposals,
        seed=config.build.seed,
    )
    before, after = tuned["base_accuracy_before"], tuned["base_accuracy_after"]
    log.info("re-normalised: held-out base accuracy %.3f -> %.3f", before, after)
    return values, tuned


def embed_names(teacher: Teacher, names: Sequence[str]) -> NDArray[np.float32]:
    """Unit text rows (C, D) float32."""
    with torch.no_grad():
        rows: NDArray[np.float32] = teacher.encode_text(names).float().cpu().numpy()
    return rows


def extract_job(
    request: BuildRequest,
    parameters: object,
    values: NDArray[np.float32],
    text: NDArray[np.float32],
    reuse: Reuse | None = None,
) -> ExtractJob:
    """What a worker needs to know."""
    return ExtractJob(
        store=str(request.out.absolute()),
        dataset=json.dumps(request.dataset.definition()),
        root=str(request.dataset.root.absolute()),
        config=json.dumps(to_tables(request.config)),
        device=request.device,
        values=values.astype(np.float32).tobytes(),
        parameters=json.dumps(parameters),
        text=text.astype(np.float32).tobytes(),
        reuse=reuse,
    )


def _extract(writer: StoreWriter, job: ExtractJob, workers: int) -> dict[str, int]:
    """Do what is left to do; says how many images that were, and how many crops the teacher was shown for them."""
    pending, total = writer.pending(), len(writer.blocks)
    if len(pending) < total:
        log.info("resuming: %d of %d blocks are done", total - len(pending), total)
    with Progress("extract", total, unit="block", done=total - len(pending)) as progress:
        crops = sum(run_tasks(partial(extract_block, job), pending, workers=workers, progress=progress))
    images = sum(block.stop - block.start for block in pending)
    log.info("the teacher saw %s crops, %.0f an image", f"{crops:,}", crops / max(images, 1))
    return {"images": images, "crops": crops}


def _write_shards(writer: StoreWriter, workers: int) -> None:
    tasks = writer.commit_tasks()
    # Small commits are over before worker processes have started.
    workers = workers if len(tasks) > 64 else 1
    with Progress("commit", len(tasks), unit="shard") as progress:
        run_tasks(partial(commit_shard, writer.path), tasks, workers=workers, progress=progress)


def _record_environment(
    writer: StoreWriter, request: BuildRequest, seconds: dict[str, float], passes: dict[str, int]
) -> None:
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "open_clip_torch", "zarr", "numpy", "ezsd")
    }
    writer.write_environment(
        {
            "dataset": as_json(request.dataset.definition()),
            "data_root": str(request.dataset.root.absolute()),
            "preset": request.preset,
            "limit": request.limit,
            "device": request.device,
            "teacher": dataclasses.asdict(request.config.teacher),
            "weights_file_sha256": weights_file_digest(request.config),
            "config": as_json(to_tables(request.config)),
            "reused_from": None if request.reuse is None else str(request.reuse.absolute()),
            "host": platform.node(),
            "python": platform.python_version(),
            "versions": dict(versions),
            "seconds": {stage: round(spent, 2) for stage, spent in seconds.items()},
            # Of the images that were extracted by the last call of the build.
            "encoded": dict(passes),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
    )


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
