"""The eager backend, for CPUs and wherever Triton is missing: matrix products or torchvision's RoIAlign.

It computes what `reference` specifies. On a small map the matrix products of docs/kernel.md, eq. 3, beat torchvision's
loops several times over; on a large one a box touches too little of the map, and torchvision's operator is called.
Regions are worked on in the order of their maps, so that the wide pooled tensor is never gathered or scattered; only
the narrow embeddings or targets change places.
"""

import torch
from torch import Tensor
from torchvision.ops import roi_align

from ezsd.kernels.geometry import Pooling
from ezsd.kernels.reference import axis_weights

PRODUCT_LIMIT = 16
"""Multiplications of the products, per bilinear tap of torchvision, up to which the products are taken on a CPU."""


def pool(pooling: Pooling, boxes: Tensor, image_index: Tensor) -> tuple[Tensor, Tensor | None]:
    """Pool every box on its level.

    Returns:
        The pooled boxes (R, P, P, C) sorted by level and image, and that order: row n belongs to box order[n]. None
        stands for the given order. Maps of 16 bits are pooled in float32.
    """
    maps = [feature.float() if feature.dtype.itemsize < 4 else feature for feature in pooling.maps]
    boxes = boxes.detach().to(maps[0].dtype)
    if len(maps) == 1 and not prefers_products(maps[0], bins=pooling.bins, samples=pooling.samples):
        return _pool_by_taps(pooling, maps[0], boxes, image_index, level=0), None
    owner = pooling.level_of(boxes) * pooling.images + image_index
    order = owner.argsort(stable=True)
    counts = torch.bincount(owner, minlength=len(maps) * pooling.images).tolist()
    boxes, image_index = boxes[order], image_index[order]
    parts, begin = [], 0
    for level, feature in enumerate(maps):
        mine = counts[level * pooling.images : (level + 1) * pooling.images]
        rows = slice(begin, begin + sum(mine))
        begin = rows.stop
        if prefers_products(feature, bins=pooling.bins, samples=pooling.samples):
            parts.append(_pool_by_products(pooling, feature, boxes[rows], mine, level=level))
        else:
            parts.append(_pool_by_taps(pooling, feature, boxes[rows], image_index[rows], level=level))
    return torch.cat(parts), order


def prefers_products(feature: Tensor, *, bins: int, samples: int) -> bool:
    """Whether matrix products over the whole map are expected to beat bilinear taps."""
    height, width = feature.shape[2:]
    products = bins * width * (height + bins)
    taps = 4 * samples**2 * bins**2
    return feature.device.type == "cpu" and products <= PRODUCT_LIMIT * taps


def _pool_by_products(pooling: Pooling, feature: Tensor, boxes: Tensor, counts: list[int], *, level: int) -> Tensor:
    """Pool boxes sorted by image, counts[b] of them in image b: rows of the map first, then columns."""
    channels, height, width = feature.shape[1:]
    x1, y1, x2, y2 = (boxes * (pooling.scale / 2**level) - 0.5).unbind(1)
    rows = axis_weights(y1, y2, size=height, bins=pooling.bins, samples=pooling.samples)
    columns = axis_weights(x1, x2, size=width, bins=pooling.bins, samples=pooling.samples)
    images = feature.permute(0, 2, 3, 1).flatten(2).unbind(0)  # B x (H, W * C)
    pooled = []
    for image, down, across in zip(images, torch.split(rows, counts), torch.split(columns, counts), strict=True):
        strips = (down.flatten(0, 1) @ image).view(-1, pooling.bins, width, channels)
        pooled.append(across[:, None] @ strips)
    return torch.cat(pooled)


def _pool_by_taps(pooling: Pooling, feature: Tensor, boxes: Tensor, image_index: Tensor, *, level: int) -> Tensor:
    pooled: Tensor = roi_align(
        feature,
        torch.cat([image_index[:, None].to(boxes.dtype), boxes], dim=1),
        output_size=pooling.bins,
        spatial_scale=pooling.scale / 2**level,
        sampling_ratio=pooling.samples,
        aligned=True,
    )
    return pooled.permute(0, 2, 3, 1)


def restore(rows: Tensor, order: Tensor | None) -> Tensor:
    """Bring sorted rows back to the order the boxes came in."""
    if order is None:
        return rows
    return torch.empty_like(rows, requires_grad=False).index_copy_(0, order, rows)


def arrange(rows: Tensor, order: Tensor | None) -> Tensor:
    """Sort rows that are in the boxes' order."""
    return rows if order is None else rows[order]
