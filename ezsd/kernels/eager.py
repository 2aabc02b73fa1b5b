"""The eager backend, for CPUs and wherever Triton is missing: pooling as one sparse matrix product.

It computes what `reference` specifies. The matrix K of docs/kernel.md, eq. 3, has (2 S)^2 entries in each row, one per
bilinear tap. torch's embedding_bag multiplies it with the cells of all maps, and its transpose with the pooled
gradient; every value is summed in one order, whatever the number of threads.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ezsd.kernels.distance import unit
from ezsd.kernels.pooling import BoundPooling

_KEYS = (torch.int16, torch.int32, torch.int64)


def pool(pooling: BoundPooling, boxes: Tensor, image_index: Tensor) -> Tensor:
    """Pool every box on its level: (R, P, P, C), contiguous; maps of 16 bits are pooled in float32.

    Raises:
        ValueError: an image index does not exist.
    """
    _check_images(pooling, image_index)
    dtype = torch.promote_types(pooling.maps[0].dtype, torch.float32)
    cells = torch.cat([feature.permute(0, 2, 3, 1).reshape(-1, pooling.channels) for feature in pooling.maps]).to(dtype)
    cell, weight = taps(pooling, boxes.to(dtype), image_index)
    pooled = embedding_bag(cell, cells, mode="sum", per_sample_weights=weight)
    return pooled.view(-1, pooling.bins, pooling.bins, pooling.channels)


def pool_backward(pooling: BoundPooling, pooled_grad: Tensor, boxes: Tensor, image_index: Tensor) -> None:
    """Overwrite the maps of `pooling` with the gradient of `pool`, each cell once.

    Args:
        pooling: the maps to fill; the rest as in the forward.
        pooled_grad: (R, P, P, C), any float dtype; summed in float32 or better.
        boxes: as in the forward.
        image_index: as in the forward.
    """
    pooled_grad = pooled_grad.to(torch.promote_types(pooled_grad.dtype, torch.float32))
    cell, weight = taps(pooling, boxes.to(pooled_grad.dtype), image_index)
    sizes = [feature.numel() // pooling.channels for feature in pooling.maps]
    # The narrower the keys, the sooner they are sorted.
    keys = cell.flatten().to(next(kind for kind in _KEYS if sum(sizes) - 1 <= torch.iinfo(kind).max))
    order = keys.argsort(stable=True)
    counts = torch.bincount(keys, minlength=sum(sizes))
    gradient = embedding_bag(
        order // cell.shape[1],
        pooled_grad.reshape(-1, pooling.channels),
        counts.cumsum(0) - counts,
        mode="sum",
        per_sample_weights=weight.flatten()[order],
    )
    for feature, mine in zip(pooling.maps, gradient.split(sizes), strict=True):
        feature.copy_(mine.view(-1, *feature.shape[2:], pooling.channels).permute(0, 3, 1, 2))


def _check_images(pooling: BoundPooling, image_index: Tensor) -> None:
    if len(image_index) == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(image_index))
    if low < 0 or high >= pooling.images:
        raise ValueError(f"image_index spans {low} to {high}, but the batch has {pooling.images} images")


def taps(pooling: BoundPooling, boxes: Tensor, image_index: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of K: cells, numbered through all maps, and their weights, both (R * P * P, (2 S)^2)."""
    level = pooling.level_of(boxes)
    sizes = torch.tensor([(feature.shape[3], feature.shape[2]) for feature in pooling.maps], device=boxes.device)
    cells = sizes.prod(1) * pooling.images
    size = sizes[level]  # (R, 2): columns, rows
    first = (cells.cumsum(0) - cells)[level] + image_index * size.prod(1)  # (R,)
    edges = boxes * (pooling.scale * 0.5 ** level.to(boxes.dtype))[:, None] - 0.5
    tap, weight = _axis_taps(edges[:, :2], edges[:, 2:], size, bins=pooling.bins, samples=pooling.samples)
    (x, y), (across, down) = tap.unbind(1), weight.unbind(1)
    y = first[:, None, None] + y * size[:, :1, None]
    cell = y[:, :, None, :, None] + x[:, None, :, None, :]  # (R, P, P, 2 S, 2 S)
    weight = down[:, :, None, :, None] * across[:, None, :, None, :]
    return cell.view(-1, 4 * pooling.samples**2), weight.view(-1, 4 * pooling.samples**2)


def _axis_taps(start: Tensor, stop: Tensor, size: Tensor, *, bins: int, samples: int) -> tuple[Tensor, Tensor]:
    """The non-zero entries of `reference.axis_weights`, of both axes.

    Args:
        start: first edge of each box along each axis, (R, 2), in cells minus 0.5.
        stop: last edge, (R, 2), same unit.
        size: cells along each axis, (R, 2).
        bins: P.
        samples: S.

    Returns:
        Cells and weights of the two taps of each sample, (R, 2, P, 2 S) each.
    """
    step = (torch.arange(bins * samples, dtype=start.dtype, device=start.device) + 0.5) / (bins * samples)
    sample = start[:, :, None] + step * (stop - start)[:, :, None]  # (R, 2, P*S)
    size = size[:, :, None]
    inside = (sample >= -1) & (sample <= size)
    sample = torch.minimum(sample.clamp(min=0), size - 1)
    # NaN must reach the weights, and no cell outside the maps may be read for it.
    low = sample.nan_to_num().long()
    high = torch.minimum(low + 1, size - 1)
    fraction = sample - low
    weight = torch.stack([1 - fraction, fraction], 3) * (inside / samples)[..., None]
    shape = (-1, 2, bins, 2 * samples)
    return torch.stack([low, high], 3).view(shape), weight.view(shape)


def unit_backward(unit_grad: Tensor, embedding: Tensor) -> Tensor:
    """Gradient of `distance.unit`, in the embedding's dtype: only what lies across a row turns it."""
    direction = unit(embedding)
    squared = embedding.to(direction.dtype).square().sum(1, keepdim=True)
    inverse_length = torch.where(squared == 0, 0, torch.where(squared == 0, 1, squared).rsqrt())
    across = unit_grad - (unit_grad * direction).sum(1, keepdim=True) * direction
    return (across * inverse_length).to(embedding.dtype)


def distances_backward(distance_grad: Tensor, embedding: Tensor, target: Tensor, metric: str) -> Tensor:
    """Gradient of the distances of `distance.FUSED` with respect to the embedding (docs/kernel.md, eq. 5)."""
    student = unit(embedding)
    teacher = unit(target.to(student.dtype))
    known = student.any(1) & teacher.any(1)
    pull = -teacher if metric == "cosine" else (student - teacher).sign()
    return unit_backward(torch.where(known, distance_grad, 0)[:, None] * pull, embedding)
