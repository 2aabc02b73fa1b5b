"""Examination of a machine: versions, GPU, compiler, a first kernel, shared memory, disk, locks, weights."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import huggingface_hub
import open_clip
import torch
from packaging.requirements import Requirement

from ezsd.cache import FileLock, StoreBusy, write_atomic
from ezsd.errors import EzsdError
from ezsd.kernels import device_obstacle
from ezsd.pipeline.config.schema import load_preset
from ezsd.pipeline.devices import is_out_of_memory

Level = Literal["ok", "warning", "problem"]

OPTIONAL = ("triton",)
"""Packages that make a GPU faster and are not required."""
_GIB = 2**30
_LEAST_SHARED = 1 * _GIB
"""Bytes of /dev/shm for some DataLoader workers."""
_LEAST_DISK = 20 * _GIB
"""Bytes of a store of COCO with some room to build it."""
_LEAST_GPU = 8 * _GIB
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    subject: str
    text: str
    """Description of it."""
    cure: str = ""
    """Advice; empty where nothing needs to be done."""


def examine(folder: Path) -> list[Finding]:
    """Look at this machine, as far as ezsd depends on it; nothing is fetched from a network.

    Args:
        folder: where stores shall lie; need not exist.
    """
    return [
        *_packages(),
        *_processor(),
        *_gpus(),
        _shared_memory(),
        *_folder(folder),
        _teacher(),
    ]


def _packages() -> Iterator[Finding]:
    """Installed packages against what ezsd requires."""
    found, wrong = [f"Python {platform.python_version()}", f"ezsd {importlib.metadata.version('ezsd')}"], 0
    for text in importlib.metadata.requires("ezsd") or ():
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        version = _version(wanted.name)
        if version is None or not wanted.specifier.contains(version, prereleases=True):
            wrong += 1
            yield Finding(
                "problem",
                "packages",
                f"{wanted.name} is {version or 'missing'}, expected {wanted.specifier}",
                f"pip install '{wanted.name}{wanted.specifier}'",
            )
        elif wanted.name in ("torch", "torchvision", "open_clip_torch", "zarr", "dask"):
            found.append(f"{wanted.name} {version}")
    found += [f"{name} {version}" for name in OPTIONAL if (version := _version(name)) is not None]
    if not wrong:
        yield Finding("ok", "packages", ", ".join(found))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("ok", "processor", f"{cores} cores, {memory / _GIB:.0f} GiB of memory ({platform.machine()})")


def _gpus() -> Iterator[Finding]:
    """GPUs, the compiler that Triton needs for them, and whether a first kernel runs on each."""
    if not torch.cuda.is_available():
        yield _no_gpu()
        return
    for number in range(torch.cuda.device_count()):
        yield from _gpu(torch.device("cuda", number))
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), None)
    if compiler is None:
        yield Finding("warning", "compiler", "no C compiler, which Triton needs", "install gcc, or set CC")
    else:
        yield Finding("ok", "compiler", compiler)


def _no_gpu() -> Finding:
    if shutil.which("nvidia-smi") is None:
        return Finding("warning", "GPU", "none: everything works on the CPU, much slower")
    if torch.version.cuda is None:
        return Finding(
            "problem", "GPU", f"torch {torch.__version__} is built for the CPU alone", "install torch built for CUDA"
        )
    return Finding(
        "problem",
        "GPU",
        f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees none",
        "look at `nvidia-smi`: the driver may be too old for this CUDA; CUDA_VISIBLE_DEVICES may hide them",
    )


def _gpu(device: torch.device) -> Iterator[Finding]:
    name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    try:
        free, total = torch.cuda.mem_get_info(device)
        obstacle = device_obstacle(device)
    except RuntimeError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        cure = "end what holds its memory (`nvidia-smi`)" if is_out_of_memory(error) else "restart it, or the machine"
        yield Finding("problem", str(device), f"{name} does not work: {reason}", cure)
        return
    text = f"{name}, compute capability {major}.{minor}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free"
    if free < _LEAST_GPU:
        yield Finding("warning", str(device), text, "smaller batches: --set train.batch_size, --set build.batch_size")
    else:
        yield Finding("ok", str(device), text)
    if obstacle is None:
        yield Finding("ok", "Triton", f"a first kernel ran on {device}")
    else:
        cure = "everything works without, slower; see the reason above to have it"
        yield Finding("warning", "Triton", f"does not run on {device}: {obstacle}", cure)


def _shared_memory() -> Finding:
    if not _SHARED_MEMORY.is_dir():
        return Finding("ok", "shared memory", "not in a folder here")
    free = shutil.disk_usage(_SHARED_MEMORY).free
    text = f"{free / _GIB:.1f} GiB free in {_SHARED_MEMORY}"
    if free >= _LEAST_SHARED:
        return Finding("ok", "shared memory", text)
    cure = "needed by train.num_workers above 0: start the container with --shm-size=8g"
    return Finding("warning", "shared memory", text, cure)


def _folder(folder: Path) -> Iterator[Finding]:
    """Disk and locks where stores shall lie."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    text = f"{free / _GIB:.1f} GiB free for {folder}"
    if free >= _LEAST_DISK:
        yield Finding("ok", "disk", text)
    else:
        yield Finding("warning", "disk", text, "ezsd cache build --dry-run tells what a store needs")
    try:
        with tempfile.TemporaryDirectory(prefix=".ezsd-doctor-", dir=place) as scratch:
            lock = FileLock(Path(scratch, "lock"), busy=StoreBusy)
            write_atomic(Path(scratch, "file"), b"ezsd", scratch=Path(scratch), point="metadata")
            lock.release()
    except (OSError, EzsdError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        cure = "take another folder: --out DIR for stores, --run DIR for runs"
        yield Finding("problem", "folder", f"{place}: a file cannot be locked, written and renamed ({reason})", cure)
    else:
        yield Finding("ok", "folder", f"{place}: files can be locked, written and renamed")


def _teacher() -> Finding:
    """Weights of the teacher that most presets have."""
    teacher = load_preset("coco").teacher
    name, tag = teacher.name, str(teacher.weights)
    repository = open_clip.get_pretrained_cfg(name, tag)["hf_hub"].rstrip("/")
    files = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    cached = (huggingface_hub.try_to_load_from_cache(repository, file) for file in files)
    path = next((path for path in cached if isinstance(path, str)), None)
    if path is not None:
        return Finding("ok", "weights", f"{name}, {tag}: {path}")
    return Finding(
        "warning",
        "weights",
        f"{name}, {tag}: not in {huggingface_hub.constants.HF_HUB_CACHE}",
        f"the first build downloads {repository}; without a network, give a file as --weights FILE",
    )
