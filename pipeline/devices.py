"""Devices by name, and what they say when their memory is short. Loads torch only where a device is asked."""

from __future__ import annotations

import os
import platform
import re
from typing import TYPE_CHECKING

from ezsd.errors import inflected, quantity
from ezsd.pipeline.errors import ArgumentError, OutOfMemory

if TYPE_CHECKING:
    import torch

    from ezsd.choices import Backend

_WORDS = re.compile(
    # The last two are oneDNN's and cuBLAS's, which have no other words for it.
    r"out of memory|can't allocate memory|not enough memory|_ALLOC_FAILED|bad_alloc|could not create a primitive|"
    r"CUBLAS_STATUS_NOT_INITIALIZED",
    re.IGNORECASE,
)


def usable_cores() -> int:
    """Number of CPU cores that this process may use: a job on a shared machine has fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine(device: torch.device) -> dict[str, str]:
    """Kind of this machine, without its name: processor, system, Python, and the GPU where one is used."""
    found = {
        "processor": f"{platform.machine()}, {quantity(usable_cores(), 'core')}",
        "system": platform.system(),
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        import torch

        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def require_device_name(name: str) -> None:
    """ArgumentError for anything but a device's name; the device itself is looked for later."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ArgumentError(f"`device={name}`: expected auto, cpu, cuda or cuda:N")


def resolve_device(name: str) -> str:
    """Resolve a device name; "auto" takes a GPU if there is one.

    Raises:
        ArgumentError: no device's name, or that of a GPU which is not there.
    """
    require_device_name(name)
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    count = torch.cuda.device_count()
    if kind == "cuda" and int(number or 0) >= count:
        raise ArgumentError(
            f"`device={name}`: this machine has {count} usable {inflected(count, 'GPU', 'GPUs')}; use `device=cpu`"
        )
    return name


def require_backend_there(backend: Backend, device: torch.device) -> None:
    """Refuse a backend that cannot run on a device, as `ezsd.kernels.require_backend` does.

    Raises:
        BackendError: says why.
        OutOfMemory: a GPU has no room for a first kernel.
    """
    from ezsd.errors import BackendError
    from ezsd.kernels import require_backend

    try:
        require_backend(backend, device)
    except BackendError:
        raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"out of memory on {device} before anything is loaded{said_instead(error)}: not even a first kernel of one "
            "row fits. Other programs hold its memory, which `nvidia-smi` lists: end them, or use another GPU, "
            "`device=cuda:N`, or `device=cpu`"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Test whether memory was short: torch has a type for its own GPU allocator only, and messages for all others."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError | OutOfMemory):
        return True
    return isinstance(error, RuntimeError) and _WORDS.search(str(error)) is not None


def said_instead(error: BaseException) -> str:
    """First line of an error that means a lack of memory in other words, as " (LINE)"; empty where it says "memory".

    It may mean something else: cuBLAS has one word for a lack of memory and for a driver that does not work.
    """
    line = (str(error).splitlines() or [""])[0].replace("`", "'")
    return "" if not line or "memory" in line.lower() else f" ({line})"


def more_memory(device: torch.device) -> str:
    """Cure for a lack of memory on a device where nothing can be made smaller."""
    if device.type == "cpu":
        return "use a machine with more memory"
    return "use a GPU with more memory, or `device=cpu`"
