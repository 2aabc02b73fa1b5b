"""The one place that chooses between the eager and the Triton backend."""

# torch gives its `assume_constant_result` no types.
# mypy: disable-error-code="untyped-decorator"

import functools
import importlib.util
import logging
import os
from typing import Literal, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ezsd.choices import Backend
from ezsd.errors import BackendError
from ezsd.precision import has_bfloat16

logger = logging.getLogger(__name__)

Resolved = Literal["eager", "triton"]

MAX_LEVELS = 5
"""Pyramid levels one Triton launch can address."""
MAX_BINS = 16
"""Bins per box side of the Triton kernels: twice as many would need more shared memory than any GPU has."""


def resolve_backend(backend: Backend, maps: tuple[Tensor, ...], *, bins: int) -> Resolved:
    """Turn a wish into a backend that can serve these maps.

    Args:
        backend: "auto" takes Triton wherever it can run and says once in the log what it took and why; "eager" and
            "triton" are taken at their word.
        maps: the feature maps, all of one dtype and device.
        bins: P, bins per box side.

    Raises:
        BackendError: "triton" was asked for and cannot run here.
        ValueError: `backend` is not one of the three words.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    if backend == "eager":
        return "eager"
    # Tests interpret the kernels on CPU tensors; that is far too slow to be anybody's automatic choice.
    on_cpu = maps[0].device.type == "cpu"
    obstacle = "the maps are on the CPU" if backend == "auto" and on_cpu else triton_obstacle(maps, bins=bins)
    if backend == "triton":
        if obstacle is not None:
            raise BackendError(_refusal(obstacle))
        return "triton"
    if not torch.compiler.is_compiling():
        _announce(obstacle, _level(obstacle, maps[0].device))
    return "triton" if obstacle is None else "eager"


def triton_obstacle(maps: tuple[Tensor, ...], *, bins: int) -> str | None:
    """Say why Triton cannot serve these maps, or None if it can."""
    # The device comes last: a GPU is asked by launching a kernel on it.
    if maps[0].dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the maps are {maps[0].dtype}, not float32, float16 or bfloat16"
    if len(maps) > MAX_LEVELS:
        return f"there are {len(maps)} levels, a launch takes {MAX_LEVELS}"
    if bins > MAX_BINS:
        return f"there are {bins} bins per side, the kernels take {MAX_BINS}"
    return device_obstacle(maps[0].device)


def current_device(tensor: Tensor) -> torch.cuda.device:
    """Make a tensor's device the current one, on which Triton launches; nothing where it is on the CPU."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)


def require_backend(backend: Backend, device: torch.device) -> None:
    """Refuse a backend that no maps on this device can be served by, before any work. BackendError says why.

    With "auto", a GPU on which Triton cannot run is logged now. A first kernel is launched while the GPU still has
    memory for it.
    """
    if backend == "eager" or (backend == "auto" and device.type == "cpu"):
        return
    obstacle = device_obstacle(device)
    if obstacle is not None and backend == "triton":
        raise BackendError(_refusal(obstacle))
    if obstacle is not None:
        _announce(obstacle, _level(obstacle, device))


def _refusal(obstacle: str) -> str:
    return f'backend="triton" cannot run here: {obstacle}. Use backend="auto" or "eager".'


def device_obstacle(device: torch.device) -> str | None:
    """Say why Triton cannot run on a device, or None if it can; a GPU is asked once, by launching a kernel."""
    if not _installed():
        return "the package triton is not installed"
    if device.type == "cuda":
        obstacle: str | None = _gpu_obstacle(device.index)
        return obstacle
    if device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        return f"the maps are on {device.type}, not on a GPU (and TRITON_INTERPRET is not 1)"
    return None


# torch.compile cannot look into these, and need not: their answers do not change.
@torch.compiler.assume_constant_result
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def _gpu_obstacle(index: int | None) -> str | None:
    # Under a mode of fake tensors, as in an export, no kernel would be launched.
    with unset_fake_temporarily():
        return _tried_on(torch.cuda.current_device() if index is None else index)


@functools.cache
def _tried_on(index: int) -> str | None:
    """Launch a kernel of one row on a GPU, once per process: what Triton lacks there shows in no other way.

    What is not Triton's is raised and not remembered: memory that is short now, and errors of earlier kernels.
    """
    device = torch.device("cuda", index)
    if not has_bfloat16(device):
        major, minor = torch.cuda.get_device_capability(device)
        return f"the GPU has compute capability {major}.{minor}, and the kernels are for 8.0 and above"
    from ezsd.kernels import triton_distance

    # An earlier kernel's error shows here, and not as one of ours.
    torch.cuda.synchronize(device)
    try:
        row = torch.ones(1, 16, device=device)
        with torch.cuda.device(device):
            distance = float(triton_distance.distance_forward(row, row, "cosine"))
    except (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        # The driver's own words, which Triton passes on.
        if "out of memory" in str(error):
            raise
        # Compiler, headers, the driver's library, a folder to write to: each has its own error where it is missing.
        reason = (str(error).splitlines() or [""])[0][:200]
        return (
            f"Triton cannot launch a kernel ({type(error).__name__}: {reason}); it needs a C compiler, Python's "
            "headers, and a folder to write to, TRITON_CACHE_DIR or ~/.triton/cache"
        )
    return None if abs(distance) < 1e-5 else f"a first kernel of Triton's returned {distance} instead of 0"


def _level(obstacle: str | None, device: torch.device) -> int:
    """Log level of an obstacle: a warning on a GPU that the kernels are for, which is slower than its owner expects.

    Elsewhere it is what everybody expects: a detail for log files.
    """
    missed = obstacle is not None and device.type == "cuda" and has_bfloat16(device)
    return logging.WARNING if missed else logging.DEBUG


@functools.cache
def _announce(obstacle: str | None, level: int) -> None:
    if obstacle is None:
        logger.log(level, "RoI operators: backend auto took triton")
    else:
        logger.log(level, "RoI operators: backend auto took eager, because %s", obstacle)
