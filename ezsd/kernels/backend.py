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

from ezsd.choices import Backend
from ezsd.errors import BackendError

logger = logging.getLogger(__name__)

Resolved = Literal["eager", "triton"]

MAX_LEVELS = 5
"""Pyramid levels one Triton launch can address."""


def resolve_backend(backend: Backend, maps: tuple[Tensor, ...]) -> Resolved:
    """Turn a wish into a backend that can serve these maps.

    Args:
        backend: "auto" takes Triton wherever it can run and says once in the log (INFO) what it took and why;
            "eager" and "triton" are taken at their word.
        maps: the feature maps, all of one dtype and device.

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
    obstacle = "the maps are on the CPU" if backend == "auto" and on_cpu else triton_obstacle(maps)
    if backend == "triton":
        if obstacle is not None:
            raise BackendError(_refusal(obstacle))
        return "triton"
    if not torch.compiler.is_compiling():
        _announce(obstacle)
    return "triton" if obstacle is None else "eager"


def triton_obstacle(maps: tuple[Tensor, ...]) -> str | None:
    """Say why Triton cannot serve these maps, or None if it can."""
    obstacle = _device_obstacle(maps[0].device.type)
    if obstacle is not None:
        return obstacle
    if maps[0].dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the maps are {maps[0].dtype}, not float32, float16 or bfloat16"
    if len(maps) > MAX_LEVELS:
        return f"there are {len(maps)} levels, a launch takes {MAX_LEVELS}"
    return None


def require_backend(backend: Backend, device: torch.device) -> None:
    """Refuse a backend that no maps on this device can be served by, before any work. BackendError says why."""
    obstacle = _device_obstacle(device.type) if backend == "triton" else None
    if obstacle is not None:
        raise BackendError(_refusal(obstacle))


def _refusal(obstacle: str) -> str:
    return f'backend="triton" cannot run here: {obstacle}. Use backend="auto" or "eager".'


def _device_obstacle(device: str) -> str | None:
    if not _installed():
        return "the package triton is not installed"
    if device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"the maps are on {device}, not on a GPU (and TRITON_INTERPRET is not 1)"
    return None


@torch.compiler.assume_constant_result
def _installed() -> bool:
    # torch.compile cannot look into this search, and need not: the answer does not change.
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _announce(obstacle: str | None) -> None:
    if obstacle is None:
        logger.info("RoI operators: backend auto took triton")
    else:
        logger.info("RoI operators: backend auto took eager, because %s", obstacle)
