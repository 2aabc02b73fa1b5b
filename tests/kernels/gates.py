"""How far from float64 the kernels may be: as far as the roundings on their way allow."""

import math
from dataclasses import replace

import torch

from ezsd import kernels
from ezsd.kernels import reference
from tests.kernels.kernel_problems import run_loss

ROUNDINGS = 7
"""On the longest way, to a map's gradient in 16 bits: of bin weights, pooled values and embeddings forward, of the
gradients of the last two, of bin weights again and of the result backward. Sums are float32."""


def tolerance(dtype):
    """Largest norm of a difference over the norm of what is expected, of a whole result and of each of its rows.

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
    """Relative errors of an operator's results and gradients: of each as a whole, then of each one's worst row."""
    if run is run_loss:
        options = {"scale": loss_scale(len(problem.boxes))} | options
    problem = placed(problem, dtype, device)
    expected = run(getattr(reference, name), problem.to(torch.float64), **options)
    found = run(getattr(kernels, name), problem, backend="triton", **options)
    pairs = list(zip(found, expected, strict=True))
    return [measure(value, right) for measure in (relative_error, worst_row) for value, right in pairs]


def relative_error(value, right):
    """Norm of the difference over the norm of what is right; 0 where there is none, infinite where 0 is right."""
    error, size = float((value.double() - right).norm()), float(right.norm())
    if error == 0:
        return 0.0
    return error / size if size else math.inf


def worst_row(value, right):
    """Largest norm of a row's difference over that row's norm, or over the root mean square of all where it is less.

    One box among thousands is lost in the norm of them all. Rows are boxes, of a map its cells.
    """
    wrong, size = row_norms(value.double() - right), row_norms(right)
    if wrong.count_nonzero() == 0:
        return 0.0
    usual = size.square().mean().sqrt()
    # A row of NaN is NaN here too: torch's maximum passes it on.
    return float((wrong / torch.maximum(size, usual)).max())


def row_norms(value):
    """Norm of each row; channels are the second dimension of maps and of pooled boxes, the last of all else.

    A vector's rows are its numbers.
    """
    if value.ndim == 4:
        value = value.movedim(1, -1)
    return value.abs() if value.ndim < 2 else torch.linalg.vector_norm(value, dim=-1)


def passes(found, dtype):
    """Whether all errors are small enough. NaN is not; Python's max would drop it."""
    return all(error <= tolerance(dtype) for error in found)


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
