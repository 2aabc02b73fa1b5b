"""The ways to pool, project and compare regions that benchmarks/kernel.py times. All share one signature."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional
from torchvision.ops import roi_align
from torchvision.ops.poolers import LevelMapper

from ezsd import kernels
from ezsd.kernels.eager import taps

SAMPLES = 2


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One step's regions; `maps`, `projection` and `bias` are the leaves."""

    maps: list[Tensor]
    scales: list[float]
    boxes: Tensor
    image_index: Tensor
    target: Tensor
    weight: Tensor
    projection: Tensor
    bias: Tensor
    bins: int
    canonical_size: float
    canonical_level: int

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients flow to."""
        return [*self.maps, self.projection, self.bias]

    def double(self) -> Problem:
        """The same in float64, with leaves of its own."""
        names = ("boxes", "target", "weight")
        plain = {name: getattr(self, name).double() for name in names}
        leaves = [leaf.detach().double().requires_grad_() for leaf in self.leaves]
        return replace(self, maps=leaves[:-2], projection=leaves[-2], bias=leaves[-1], **plain)


Variant = Callable[[Problem], Tensor]


def ours(problem: Problem) -> Tensor:
    """The operator of ezsd.kernels."""
    head = problem.projection, problem.bias
    return kernels.roi_align_cosine(
        problem.maps,
        problem.boxes,
        problem.image_index,
        _pooling(problem),
        *head,
        target=problem.target,
        weight=problem.weight,
    )


def torchvision_eager(problem: Problem) -> Tensor:
    """A: one torchvision RoIAlign per level, masks between them, linear, cosine.

    What MultiScaleRoIAlign does, with aligned=True; that class has no such option. Maps of 16 bits become float32, as
    under autocast.
    """
    maps = [feature if feature.dtype.itemsize >= 4 else feature.float() for feature in problem.maps]
    dtype = maps[0].dtype
    rois = torch.cat([problem.image_index[:, None].to(dtype), problem.boxes.to(dtype)], 1)
    levels = _levels(problem)
    shape = (len(rois), maps[0].shape[1], problem.bins, problem.bins)
    pooled = torch.zeros(shape, dtype=dtype, device=rois.device)
    for level, (feature, scale) in enumerate(zip(maps, problem.scales, strict=True)):
        mine = torch.where(levels == level)[0]
        pooled[mine] = roi_align(feature, rois[mine], problem.bins, scale, SAMPLES, aligned=True)
    return _loss(problem, pooled.permute(0, 2, 3, 1).flatten(1))


def sparse_product(problem: Problem) -> Tensor:
    """C: the same K as one sparse matrix over the cells of all maps, built on the device."""
    dtype = problem.maps[0].dtype
    cells = torch.cat([feature.permute(0, 2, 3, 1).flatten(0, 2) for feature in problem.maps])
    rows, columns, values = _taps(problem)
    shape = (len(problem.boxes) * problem.bins**2, len(cells))
    pooled = _SparseProduct.apply(cells, rows, columns, values.to(dtype), shape)
    return _loss(problem, pooled.view(len(problem.boxes), -1))


def _pooling(problem: Problem) -> kernels.Pooling:
    return kernels.Pooling(
        spatial_scale=tuple(problem.scales),
        output_size=problem.bins,
        sampling_ratio=SAMPLES,
        canonical_size=problem.canonical_size,
        canonical_level=problem.canonical_level,
    )


def _levels(problem: Problem) -> Tensor:
    if len(problem.maps) == 1:
        return torch.zeros_like(problem.image_index)
    finest = round(-math.log2(problem.scales[0]))
    mapper = LevelMapper(finest, finest + len(problem.maps) - 1, int(problem.canonical_size), problem.canonical_level)
    found: Tensor = mapper([problem.boxes])
    return found


def _loss(problem: Problem, pooled: Tensor) -> Tensor:
    # Float32 bins beside 16-bit maps stand for autocast, whose linear layers are 16-bit.
    dtype = problem.maps[0].dtype
    head = problem.projection.to(dtype), problem.bias.to(dtype)
    embedding = functional.linear(pooled.to(dtype), *head)
    wide = torch.promote_types(dtype, torch.float32)
    distance = 1 - functional.cosine_similarity(embedding.to(wide), problem.target.to(wide))
    return (problem.weight * distance).sum() / problem.weight.sum()


class _SparseProduct(torch.autograd.Function):
    """K @ cells with K in compressed rows, and K^T @ gradient with K^T in compressed rows."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, cells: Tensor, rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(rows, columns, values)
        ctx.shape = shape
        return _compressed(rows, columns, values, shape) @ cells

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        rows, columns, values = ctx.saved_tensors
        order = columns.argsort(stable=True)
        transposed = _compressed(columns[order], rows[order], values[order], ctx.shape[::-1])
        return transposed @ gradient.contiguous(), None, None, None, None


def _compressed(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """A CSR matrix of entries sorted by row; several may share a place."""
    begins = functional.pad(torch.bincount(rows, minlength=shape[0]).cumsum(0), (1, 0))
    return torch.sparse_csr_tensor(begins, columns, values, shape, check_invariants=False)


def _taps(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Row (box, bin), column (cell) and weight of every bilinear tap, in the order of rows."""
    pooling = _pooling(problem).bind(problem.maps)
    dtype = torch.promote_types(problem.boxes.dtype, torch.float32)
    cell, weight = taps(pooling, problem.boxes.to(dtype), problem.image_index)
    row = torch.arange(len(cell), device=cell.device)
    return row.repeat_interleave(cell.shape[1]), cell.flatten(), weight.flatten()
