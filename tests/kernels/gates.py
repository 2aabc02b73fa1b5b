"""How far from float64 the kernels may be: as far as the roundings on their way allow."""

from dataclasses import replace

import torch

from ezsd import kernels
from ezsd.kernels import reference
from tests.kernels.kernel_problems import run_loss

ROUNDINGS = 7
"""On the longest way, to a map's gradient in 16 bits: of bin weights, pooled values and embeddings forward, of the
gradients of the last two, of bin weights again and of the result backward. Sums are float32."""


def tolerance(dtype):
    """Largest norm of a difference over the norm of what is expected.

    A rounding to 16 bits moves a number by at most half an eps of itself, and at worst all of them add up. In float32
    sums have thousands of terms, and positions of tens of cells are rounded as well.
    """
    return 1e-4 if dtype == torch.float32 else ROUNDINGS * torch.finfo(dtype).eps / 2


def loss_scale(regions):
    """Factor of a mean over regions whose gradients are then of size one, a power of two.

    Of size 1 / R they would lie where float16 has few digits left: its normal numbers end at 6e-5.
    """
    return 2.0 ** (max(regions, 1) - 1).bit_length()


def errors(run, name, problem, dtype, *, device, **options):
    """Relative errors of an operator's results and gradients, each with what it is of."""
    if run is run_loss:
        options = {"scale": loss_scale(len(problem.boxes))} | options
    problem = placed(problem, dtype, device)
    expected = run(getattr(reference, name), problem.to(torch.float64), **options)
    found = run(getattr(kernels, name), problem, backend="triton", **options)
    return [relative_error(value, right) for value, right in zip(found, expected, strict=True)]


def relative_error(value, right):
    """Norm of the difference over the norm of what is right; 0 where both are 0."""
    error, size = float((value.double() - right).norm()), float(right.norm())
    return error / size if error else 0.0


def placed(problem, dtype, device):
    """The problem on a device, its maps and head in `dtype`, everything else in float32."""
    problem = problem.to(torch.float32)

    def move(tensor, dtype=None):
        return None if tensor is None else tensor.to(device, dtype)

    return replace(
        problem,
        maps=tuple(move(feature, dtype).contiguous(memory_format=torch.channels_last) for feature in problem.maps),
        projection=move(problem.projection, dtype),
        bias=move(problem.bias, dtype),
        **{name: move(getattr(problem, name)) for name in ("boxes", "image_index", "target", "weight")},
    )
