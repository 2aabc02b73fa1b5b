"""Number formats that a device computes networks in."""

from __future__ import annotations

import torch

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


def autocast(device: torch.device, *, training: bool) -> torch.autocast:
    """Context in which a network computes in `network_dtype`."""
    dtype = network_dtype(device, training=training)
    if dtype == torch.float32:
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=dtype)
