"""Examination of a machine: versions, GPU, compiler, a first kernel, shared memory, disk, locks, weights."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from packaging.requirements import Requirement

from ezsd.errors import EzsdError, quantity
from ezsd.pipeline.devices import is_out_of_memory, usable_cores

if TYPE_CHECKING:
    import torch

Level = Literal["ok", "warning", "problem"]

OPTIONAL = ("triton",)
"""Packages that make a GPU faster and are not required."""
_GIB = 2**30
_LEAST_SHARED = 1 * _GIB
"""Bytes of /dev/shm for some DataLoader workers."""
_LEAST_DISK = 20 * _GIB
"""Bytes of a store of COCO with some room to build it."""
_LEAST_GPU = 8 * _GIB
_LEAST_MEMORY = 8 * _GIB
_SHARED_MEMORY = Path("/dev/shm")
_CONTAINER_MEMORY = Path("/sys/fs/cgroup/memory.max")


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
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        *(_packages, _processor, _gpus, _shared_memory, partial(_disk, folder), partial(_folder, folder), _teacher),
    )
    return [finding for check in checks for finding in _checked(check)]


def _checked(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """Findings of a check. The packages that it needs are loaded in it: one that does not load is a finding itself."""
    try:
        return list(check())
    except (ImportError, RuntimeError) as error:
        cure = "install the packages again, in versions that belong together"
        return [Finding("problem", "packages", f"a package does not load: {_first_line(error)}", cure)]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _packages() -> Iterator[Finding]:
    """Installed packages against what ezsd requires."""
    found, wrong = [f"Python {platform.python_version()}", f"ezsd {importlib.metadata.version('ezsd')}"], 0
    for text in importlib.metadata.requires("ezsd") or ():
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        version = version_of(wanted.name)
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
    found += [f"{name} {version}" for name in OPTIONAL if (version := version_of(name)) is not None]
    if not wrong:
        yield Finding("ok", "packages", ", ".join(found))


def version_of(package: str) -> str | None:
    """Version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> Iterator[Finding]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # A container has less than its machine.
    limit = _CONTAINER_MEMORY.read_text().strip() if _CONTAINER_MEMORY.is_file() else "max"
    memory = memory if limit == "max" else min(memory, int(limit))
    text = f"{quantity(usable_cores(), 'core')}, {memory / _GIB:.0f} GiB of memory ({platform.machine()})"
    if memory >= _LEAST_MEMORY:
        yield Finding("ok", "processor", text)
    else:
        yield Finding("warning", "processor", text, "fewer worker processes: --workers 1, --set train.num_workers=0")


def _gpus() -> Iterator[Finding]:
    """GPUs, the compiler that Triton needs for them, and whether a first kernel runs on each."""
    import torch

    if not torch.cuda.is_available():
        yield _no_gpu()
        return
    for number in range(torch.cuda.device_count()):
        yield from _gpu(torch.device("cuda", number))
    found = compiler()
    if found is None:
        yield Finding("warning", "compiler", "no C compiler, which Triton needs", "install gcc, or set CC")
    else:
        yield Finding("ok", "compiler", found)


def compiler() -> str | None:
    """C compiler that Triton would take; None if there is none."""
    return os.environ.get("CC") or next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), None)


def _no_gpu() -> Finding:
    import torch

    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return Finding("warning", "GPU", "hidden by CUDA_VISIBLE_DEVICES: everything works on the CPU, much slower")
    if not _driver_has_gpus():
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


def _driver_has_gpus() -> bool:
    """True if NVIDIA's driver lists a GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    done = subprocess.run([program, "-L"], capture_output=True, text=True, check=False)
    return done.returncode == 0 and done.stdout.startswith("GPU ")


def _gpu(device: torch.device) -> Iterator[Finding]:
    import torch

    from ezsd.kernels import device_obstacle

    try:
        name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        free, total = torch.cuda.mem_get_info(device)
        obstacle = device_obstacle(device)
    except RuntimeError as error:
        cure = "end what holds its memory (`nvidia-smi`)" if is_out_of_memory(error) else "restart it, or the machine"
        yield Finding("problem", str(device), f"does not work: {_first_line(error)}", cure)
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


def _shared_memory() -> Iterator[Finding]:
    if not _SHARED_MEMORY.is_dir():
        return
    free = shutil.disk_usage(_SHARED_MEMORY).free
    text = f"{free / _GIB:.1f} GiB free in {_SHARED_MEMORY}"
    if free >= _LEAST_SHARED:
        yield Finding("ok", "shared memory", text)
    else:
        cure = "needed by train.num_workers above 0: start the container with --shm-size=8g"
        yield Finding("warning", "shared memory", text, cure)


def _disk(folder: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(_existing(folder)).free
    text = f"{free / _GIB:.1f} GiB free for {folder}"
    if free >= _LEAST_DISK:
        yield Finding("ok", "disk", text)
    else:
        yield Finding("warning", "disk", text, "ezsd cache build --dry-run tells what a store needs")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())


def _folder(folder: Path) -> Iterator[Finding]:
    """Locks, flushes and renames where stores shall lie."""
    from ezsd.cache import FileLock, StoreBusy, write_atomic

    place = _existing(folder)
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


def _teacher() -> Iterator[Finding]:
    """Weights of the teacher that most presets have."""
    import huggingface_hub
    import open_clip

    from ezsd.pipeline.config.schema import load_preset

    teacher = load_preset("coco").teacher
    name, tag = teacher.name, str(teacher.weights)
    repository = open_clip.get_pretrained_cfg(name, tag)["hf_hub"].rstrip("/")
    files = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    cached = (huggingface_hub.try_to_load_from_cache(repository, file) for file in files)
    path = next((path for path in cached if isinstance(path, str)), None)
    if path is not None:
        yield Finding("ok", "weights", f"{name}, {tag}: {path}")
        return
    yield Finding(
        "warning",
        "weights",
        f"{name}, {tag}: not in {huggingface_hub.constants.HF_HUB_CACHE}",
        f"the first build downloads {repository}; without a network, give a file as --weights FILE",
    )
