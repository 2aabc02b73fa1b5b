"""Number formats that a device computes networks in."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

FIRST_WITH_BFLOAT16 = (8, 0)
"""Compute capability of the first GPUs that multiply bfloat16; earlier ones emulate it, slowly."""


def has_bfloat16(device: torch.device) -> bool:
    """Test whether a GPU multiplies bfloat16 itself. torch's own test counts emulation, and asks the current GPU."""
    return torch.cuda.get_device_capability(device) >= FIRST_WITH_BFLOAT16


def network_dtype(device: torch.device, *, training: bool) -> torch.dtype:
    """Type of a network's products on a device: bfloat16 on a GPU that has it, else float32.

    A GPU without it detects in float16. It trains in float32, for gradients in float16 vanish unless they are scaled.
    """
    if device.type != "cuda":
        return torch.float32
    if has_bfloat16(device):
        return torch.bfloat16
    return torch.float32 if training else torch.float16


class FiniteOutputs:
    """Context that notes whether an output of a network's layers is infinite or no number, as float16 beyond 65504 is.

    Args:
        network: whose layers are looked at.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._finite: list[Tensor] = []

    def __enter__(self) -> FiniteOutputs:
        self._finite.clear()
        layers = [module for module in self._network.modules() if not any(module.children())]
        self._handles = [layer.register_forward_hook(self._look) for layer in layers]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    def __bool__(self) -> bool:
        """True if all were finite; the host waits for the device."""
        return not self._finite or bool(torch.stack(self._finite).all())

    def _look(self, module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ANN401 - whatever a layer takes
        if isinstance(output, Tensor) and output.is_floating_point():
            self._finite.append(output.isfinite().all())


def autocast(device: torch.device, *, training: bool) -> torch.autocast:
    """Context in which a network computes in `network_dtype`."""
    dtype = network_dtype(device, training=training)
    if dtype == torch.float32:
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=dtype)
