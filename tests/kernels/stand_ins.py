"""What Triton's launches compute, in torch on the CPU: for machines that cannot launch them."""

import torch

from ezsd.kernels import eager, reference
from ezsd.kernels.distance import FUSED, unit


def distance_forward(embedding, target, metric):
    student, teacher = unit(embedding), unit(target)
    known = student.any(1) & teacher.any(1)
    return torch.where(known, FUSED[metric](student, teacher), 0)


def distance_backward(gradient, embedding, target, metric):
    return eager.distances_backward(gradient, embedding, target, metric)


def pool_forward(pooling, boxes, image_index):
    """Pool with the kernel's roundings: bin weights and results in the maps' type, sums in float32."""
    dtype = pooling.maps[0].dtype
    pooled = torch.zeros(len(boxes), pooling.bins**2, pooling.channels)
    for mine, feature, weight in _products(pooling, boxes, image_index):
        pooled[mine] = (weight.flatten(0, 1) @ feature.float().flatten(1).T).unflatten(0, weight.shape[:2])
    return pooled.to(dtype).unflatten(1, (pooling.bins, pooling.bins))


def pool_backward(pooling, pooled_grad, boxes, image_index):
    for feature in pooling.maps:
        feature.zero_()
    for mine, feature, weight in _products(pooling, boxes, image_index):
        gradient = weight.flatten(0, 1).T @ pooled_grad[mine].float().flatten(0, 2)
        feature.copy_(gradient.T.unflatten(1, feature.shape[1:]))


def _products(pooling, boxes, image_index):
    """For each map of an image: its boxes, the map (C, H, W), and the bins' weights of its cells (R, P * P, H * W)."""
    level_of = pooling.level_of(boxes)
    for level, features in enumerate(pooling.maps):
        height, width = features.shape[2:]
        for image, feature in enumerate(features):
            mine = torch.nonzero((level_of == level) & (image_index == image))[:, 0]
            x1, y1, x2, y2 = (boxes[mine].float() * (pooling.scale / 2**level) - 0.5).unbind(1)
            options = {"bins": pooling.bins, "samples": pooling.samples}
            rows = reference.axis_weights(y1, y2, size=height, **options)
            columns = reference.axis_weights(x1, x2, size=width, **options)
            weight = rows[:, :, None, :, None] * columns[:, None, :, None, :]
            yield mine, feature, weight.to(feature.dtype).float().flatten(3).flatten(1, 2)
