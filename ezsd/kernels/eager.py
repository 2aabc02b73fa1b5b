"""The eager backend, for CPUs and wherever Triton is missing: matrix products or torchvision's RoIAlign.

It computes what `reference` specifies. On a small map the matrix products of docs/kernel.md, eq. 3b, beat torchvision's
loops several times over; on a large one a box touches too little of the map, and torchvision's operator is called.
Regions are worked on in the order of their maps, so that the wide pooled tensor is never gathered or scattered.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torchvision.ops import roi_align

from ezsd.kernels.geometry import Pooling, Rows
from ezsd.kernels.reference import axis_weights, unit

PRODUCT_LIMIT = 16
"""Multiplications of the products, per bilinear tap of torchvision, up to which the products are taken on a CPU."""


def sort_by_map(pooling: Pooling, boxes: Tensor, image_index: Tensor) -> Rows:
    """Sort the boxes by level and image.

    Raises:
        ValueError: an image index does not exist.
    """
    if len(boxes):
        low, high = (int(bound) for bound in torch.aminmax(image_index))
        if low < 0 or high >= pooling.images:
            raise ValueError(f"image_index spans {low} to {high}, but the batch has {pooling.images} images")
    owner = pooling.level_of(boxes) * pooling.images + image_index
    counts = torch.bincount(owner, minlength=len(pooling.maps) * pooling.images).tolist()
    if bool((owner[1:] >= owner[:-1]).all()):
        return Rows(boxes=boxes, image_index=image_index, counts=counts)
    order = owner.argsort(stable=True)
    return Rows(boxes=boxes[order], image_index=image_index[order], order=order, counts=counts)


def pool(pooling: Pooling, rows: Rows) -> Tensor:
    """Pool boxes sorted by map: (R, P, P, C), contiguous; maps of 16 bits are pooled in float32."""
    dtype = torch.promote_types(pooling.maps[0].dtype, torch.float32)
    bins = pooling.bins
    pooled = torch.empty(len(rows.boxes), bins, bins, pooling.channels, dtype=dtype, device=rows.boxes.device)
    for level, part, mine in _by_level(pooling, rows, pooled):
        feature = pooling.maps[level].to(dtype)
        if prefers_products(feature, bins=bins, samples=pooling.samples):
            _products(pooling, feature, mine, part, level=level)
        else:
            part.copy_(_taps(pooling, feature, mine, level=level))
    return pooled


def pool_backward(pooling: Pooling, rows: Rows, pooled_grad: Tensor) -> None:
    """Overwrite the maps of `pooling` with the gradient of `pool`, given that of its result (R, P, P, C)."""
    for level, part, mine in _by_level(pooling, rows, pooled_grad):
        feature = pooling.maps[level]
        if prefers_products(feature, bins=pooling.bins, samples=pooling.samples):
            _products_backward(pooling, feature, mine, part, level=level)
        else:
            _taps_backward(pooling, feature, mine, part, level=level)


def unit_backward(unit_grad: Tensor, embedding: Tensor) -> Tensor:
    """Gradient of `reference.unit`, in the embedding's dtype: only what lies across a row turns it."""
    direction = unit(embedding)
    squared = embedding.to(direction.dtype).square().sum(1, keepdim=True)
    inverse_length = torch.where(squared == 0, 0, torch.where(squared == 0, 1, squared).rsqrt())
    across = unit_grad - (unit_grad * direction).sum(1, keepdim=True) * direction
    return (across * inverse_length).to(embedding.dtype)


def distances_backward(distance_grad: Tensor, embedding: Tensor, target: Tensor, metric: str) -> Tensor:
    """Gradient of `reference.distances` with respect to the embedding (docs/kernel.md, eq. 5)."""
    student = unit(embedding)
    teacher = unit(target.to(student.dtype))
    known = student.any(1) & teacher.any(1)
    pull = -teacher if metric == "cosine" else (student - teacher).sign()
    return unit_backward(torch.where(known, distance_grad, 0)[:, None] * pull, embedding)


def prefers_products(feature: Tensor, *, bins: int, samples: int) -> bool:
    """Whether matrix products over the whole map are expected to beat bilinear taps."""
    height, width = feature.shape[2:]
    products = bins * width * (height + bins)
    taps = 4 * samples**2 * bins**2
    return feature.device.type == "cpu" and products <= PRODUCT_LIMIT * taps


def _by_level(pooling: Pooling, rows: Rows, pooled: Tensor) -> Iterator[tuple[int, Tensor, Rows]]:
    """Each level with its part of the pooled tensor and its boxes."""
    begin = 0
    for level in range(len(pooling.maps)):
        counts = rows.counts[level * pooling.images : (level + 1) * pooling.images]
        end = begin + sum(counts)
        mine = Rows(boxes=rows.boxes[begin:end], image_index=rows.image_index[begin:end], counts=counts)
        yield level, pooled[begin:end], mine
        begin = end


def _products(pooling: Pooling, feature: Tensor, rows: Rows, pooled: Tensor, *, level: int) -> None:
    """Rows of the map first, then columns, one image after another: what lies between stays in the cache."""
    channels, height, width = feature.shape[1:]
    down, across = _axes(pooling, rows.boxes.to(feature.dtype), height, width, level=level)
    images = feature.permute(0, 2, 3, 1).reshape(-1, height, width * channels)
    buffer = feature.new_empty(max(rows.counts) * pooling.bins, width * channels)
    for image, a, c, part in zip(images, *(torch.split(x, rows.counts) for x in (down, across, pooled)), strict=True):
        strips = torch.mm(a.flatten(0, 1), image, out=buffer[: a.shape[0] * pooling.bins])
        c = c.repeat_interleave(pooling.bins, 0)
        torch.bmm(c, strips.view(-1, width, channels), out=part.view(-1, pooling.bins, channels))


def _products_backward(pooling: Pooling, feature: Tensor, rows: Rows, pooled_grad: Tensor, *, level: int) -> None:
    channels, height, width = feature.shape[1:]
    down, across = _axes(pooling, rows.boxes.to(pooled_grad.dtype), height, width, level=level)
    gradient = pooled_grad.new_empty(pooling.images, height, width * channels)
    buffer = pooled_grad.new_empty(max(rows.counts) * pooling.bins, width, channels)
    parts = (torch.split(x, rows.counts) for x in (down, across, pooled_grad))
    for image, a, c, part in zip(gradient, *parts, strict=True):
        c = c.repeat_interleave(pooling.bins, 0)
        strips = torch.bmm(c.mT, part.flatten(0, 1), out=buffer[: len(c)])
        torch.mm(a.flatten(0, 1).T, strips.flatten(1), out=image)
    feature.copy_(gradient.view(-1, height, width, channels).permute(0, 3, 1, 2))


def _axes(pooling: Pooling, boxes: Tensor, height: int, width: int, *, level: int) -> tuple[Tensor, Tensor]:
    """Weights of rows (R, P, H) and columns (R, P, W), docs/kernel.md, eq. 1."""
    x1, y1, x2, y2 = (boxes * (pooling.scale / 2**level) - 0.5).unbind(1)
    down = axis_weights(y1, y2, size=height, bins=pooling.bins, samples=pooling.samples)
    return down, axis_weights(x1, x2, size=width, bins=pooling.bins, samples=pooling.samples)


def _taps(pooling: Pooling, feature: Tensor, rows: Rows, *, level: int) -> Tensor:
    pooled: Tensor = roi_align(
        feature,
        _rois(rows, feature.dtype),
        output_size=pooling.bins,
        spatial_scale=pooling.scale / 2**level,
        sampling_ratio=pooling.samples,
        aligned=True,
    )
    return pooled.permute(0, 2, 3, 1)


def _taps_backward(pooling: Pooling, feature: Tensor, rows: Rows, pooled_grad: Tensor, *, level: int) -> None:
    # torchvision offers its gradient through autograd alone, which does not run inside an operator.
    gradient = torch.ops.torchvision._roi_align_backward(
        pooled_grad.permute(0, 3, 1, 2),
        _rois(rows, pooled_grad.dtype),
        pooling.scale / 2**level,
        pooling.bins,
        pooling.bins,
        *feature.shape,
        pooling.samples,
        True,
    )
    feature.copy_(gradient)


def _rois(rows: Rows, dtype: torch.dtype) -> Tensor:
    """Boxes as torchvision wants them: (R, 5), the image first."""
    return torch.cat([rows.image_index[:, None].to(dtype), rows.boxes.to(dtype)], 1)
