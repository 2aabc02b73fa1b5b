"""Triton: the distance of an embedding to its target, row by row, forward and backward.

Equations: docs/kernel.md, 4 and 5. The mean over regions is left to torch, whose sums are deterministic.
"""

# A kernel's parameters are pointers, run-time scalars and tl.constexpr; Python's types cannot say which, and Triton
# ships none for its decorator.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 4
MAX_REGISTERS = 64
"""Registers per thread that a test allows at D = 512."""


@triton.jit
def _unit_row(vector, column, size):
    """Load one row in float32 and scale it to unit length; also 1 / length, 0 for a zero row."""
    value = tl.load(vector + column, mask=column < size, other=0.0).to(tl.float32)
    squared = tl.sum(value * value)
    # Not `squared > 0`: a NaN must pass through rather than count as zero.
    inverse = tl.where(squared == 0, 0.0, 1.0 / tl.sqrt(tl.where(squared == 0, 1.0, squared)))
    return value * inverse, inverse


@triton.jit
def distance_forward_kernel(distance, embedding, target, size, L1: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """Grid (R,). One program owns one region: reads 2 D values, writes 1; sums in float32."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    student, student_inverse = _unit_row(embedding + row * size, column, size)
    teacher, teacher_inverse = _unit_row(target + row * size, column, size)
    value = tl.sum(tl.abs(student - teacher)) if L1 else 1.0 - tl.sum(student * teacher)
    known = (student_inverse != 0) & (teacher_inverse != 0)
    tl.store(distance + row, tl.where(known, value, 0.0))


@triton.jit
def distance_backward_kernel(
    embedding_grad, distance_grad, embedding, target, size, L1: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Grid (R,). One program owns one region: reads 2 D + 1 values, writes D; sums in float32."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    student, student_inverse = _unit_row(embedding + row * size, column, size)
    teacher, teacher_inverse = _unit_row(target + row * size, column, size)
    if L1:
        difference = student - teacher
        pull = tl.where(difference > 0, 1.0, 0.0) - tl.where(difference < 0, 1.0, 0.0)
        # Comparisons swallow NaN, this sum brings it back.
        pull += difference * 0.0
    else:
        pull = -teacher
    # Only the part of the pull across the embedding changes a unit vector.
    across = (pull - tl.sum(pull * student) * student) * student_inverse
    known = (student_inverse != 0) & (teacher_inverse != 0)
    gradient = tl.where(known, across * tl.load(distance_grad + row), 0.0)
    tl.store(embedding_grad + row * size + column, gradient, mask=column < size)


def distance_forward(embedding: Tensor, target: Tensor, metric: str) -> Tensor:
    """Distances (R,) float32 of contiguous rows (R, D)."""
    regions, size = embedding.shape
    distance = torch.empty(regions, dtype=torch.float32, device=embedding.device)
    if regions:
        distance_forward_kernel[(regions,)](
            distance,
            embedding,
            target,
            size,
            L1=metric == "l1",
            BLOCK=1 << (size - 1).bit_length(),
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return distance


def distance_backward(gradient: Tensor, embedding: Tensor, target: Tensor, metric: str) -> Tensor:
    """Gradient (R, D) of the embeddings, from the gradient (R,) of the distances."""
    regions, size = embedding.shape
    embedding_grad = torch.empty_like(embedding)
    if regions:
        distance_backward_kernel[(regions,)](
            embedding_grad,
            gradient,
            embedding,
            target,
            size,
            L1=metric == "l1",
            BLOCK=1 << (size - 1).bit_length(),
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return embedding_grad
