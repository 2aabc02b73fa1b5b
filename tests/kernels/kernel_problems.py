"""Random pooling problems with every kind of box, shared by the kernel tests."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn import functional
from torchvision.ops import roi_align
from torchvision.ops.poolers import LevelMapper

from ezsd.kernels import Pooling

SIZES = ((21, 18), (11, 9), (5, 5), (3, 2))
"""Rows and columns of the maps at strides 4, 8, 16, 32; no multiple of a block."""
TINY = ((11, 9), (5, 5), (3, 2), (2, 1))
"""The same for an image of half the side, for the interpreter."""
IMAGES = 2
CANONICAL = {"canonical_size": 32, "canonical_level": 3}


@dataclass(frozen=True, kw_only=True)
class Problem:
    maps: tuple
    boxes: torch.Tensor
    image_index: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor
    projection: torch.Tensor | None
    bias: torch.Tensor | None
    bins: int

    def to(self, dtype):
        def cast(tensor):
            return None if tensor is None else tensor.to(dtype)

        return replace(
            self,
            maps=tuple(map(cast, self.maps)),
            boxes=cast(self.boxes),
            target=cast(self.target),
            weight=cast(self.weight),
            projection=cast(self.projection),
            bias=cast(self.bias),
        )

    def pooled(self, **options):
        """Features, boxes, their images and the pooling: what every operator takes first."""
        scales = tuple(0.25 / 2**level for level in range(len(self.maps)))
        pooling = Pooling(spatial_scale=scales, output_size=self.bins, **(CANONICAL | options))
        return list(self.maps), self.boxes, self.image_index, pooling

    @property
    def leaves(self):
        return [tensor for tensor in (*self.maps, self.projection, self.bias) if tensor is not None]


def make_problem(*, regions, bins=7, channels=20, dim=9, levels=1, seed=0, head=True, sizes=SIZES):
    """Boxes in float32 precision, from a pixel to the whole image, some partly and some wholly outside."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    corner = torch.rand(regions, 2, generator=random) * 110 - 20
    side = torch.rand(regions, 2, generator=random) ** 2 * 90 + 1
    boxes = torch.cat([corner, corner + side], dim=1) * sizes[0][0] / SIZES[0][0]
    boxes[3:4] = torch.tensor([500.0, 500.0, 540.0, 530.0])
    weight = torch.rand(regions, generator=random, dtype=torch.float64)
    weight[2:3] = 0
    target = normal(regions, dim if head else channels)
    target[4:5] = 0
    return Problem(
        maps=tuple(normal(IMAGES, channels, height, width) for height, width in sizes[:levels]),
        boxes=boxes.double(),
        image_index=torch.randint(0, IMAGES, (regions,), generator=random),
        target=target,
        weight=weight,
        projection=normal(dim, bins * bins * channels) / bins if head else None,
        bias=normal(dim) if head else None,
        bins=bins,
    )


def run_align(align, problem, **pooling):
    """The pooled boxes, and the gradients of a random sum of them with respect to the maps."""
    problem = replace(problem, maps=tuple(feature.detach().requires_grad_() for feature in problem.maps))
    pooled = align(*problem.pooled(**pooling))
    pull = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (pooled * pull.to(pooled)).sum().backward()
    return [pooled.detach(), *(feature.grad for feature in problem.maps)]


def run_embed(embed, problem, backend="auto"):
    """The unit embeddings, and the gradients of a weighted sum of them with respect to maps, projection and bias."""
    return _run(embed, problem, backend, pull=problem.target)


def run_loss(loss, problem, backend="auto", scale=1.0, **options):
    """The loss, and the gradients of `scale` times it with respect to the maps, the projection and the bias."""
    compare = partial(loss, target=problem.target, weight=problem.weight, **options)
    return _run(compare, problem, backend, pull=torch.tensor(scale))


def run_embed_cosine(function, problem, backend="auto", targets=3, **options):
    """Embeddings, pooled boxes and loss, the last boxes having targets, and the gradients of a weighted sum of all."""
    own = {"target": problem.target[-targets:], "weight": problem.weight[-targets:], **options}
    random = torch.Generator().manual_seed(1)

    def summed(*arguments):
        found = function(*arguments, **own)
        pulls = [torch.randn(one.shape, generator=random, dtype=torch.float64).to(one) for one in found]
        values.extend(one.detach() for one in found)
        return torch.stack([(one * pull).sum().to(found[-1]) for one, pull in zip(found, pulls, strict=True)]).sum()

    values = []
    gradients = _run(summed, problem, backend, pull=torch.tensor(1.0))
    return [*values, *gradients]


def _run(function, problem, backend, *, pull):
    """A function's value, and the gradients of the product of it and `pull`."""
    leaves = [leaf.detach().requires_grad_() for leaf in problem.leaves]
    count = len(problem.maps)
    projection, bias = leaves[count:] or (None, None)
    problem = replace(problem, maps=tuple(leaves[:count]), projection=projection, bias=bias)
    value = function(*problem.pooled(backend=backend), projection, bias)
    return [value.detach(), *torch.autograd.grad(value, leaves, pull.to(value))]


def torchvision_align(features, boxes, image_index, pooling):
    """The usual way, as an oracle: one RoIAlign per level, and torchvision's own level rule."""
    mapper = LevelMapper(2, 1 + len(features), pooling.canonical_size, pooling.canonical_level)
    levels = mapper([boxes]) if len(features) > 1 else torch.zeros_like(image_index)
    rois = torch.cat([image_index[:, None].to(boxes.dtype), boxes], dim=1)
    pooled = boxes.new_zeros(len(boxes), features[0].shape[1], pooling.output_size, pooling.output_size)
    for level, (feature, scale) in enumerate(zip(features, pooling.spatial_scale, strict=True)):
        mine = torch.where(levels == level)[0]
        part = roi_align(feature, rois[mine], pooling.output_size, scale, pooling.sampling_ratio, aligned=True)
        pooled = pooled.index_copy(0, mine, part)
    return pooled


def torchvision_loss(features, boxes, image_index, pooling, projection, bias, *, target, weight, metric="cosine"):
    """The loss over torchvision's pooling, in torch's own words; no row may be zero except with a zero weight."""
    pooled = torchvision_align(features, boxes, image_index, pooling).permute(0, 2, 3, 1).flatten(1)
    embedding = pooled if projection is None else functional.linear(pooled, projection, bias)
    if metric == "cosine":
        distance = 1 - functional.cosine_similarity(embedding, target)
    else:
        distance = (functional.normalize(embedding) - functional.normalize(target)).abs().sum(1)
    distance = torch.where((target == 0).all(1), 0, distance)
    return (weight * distance).sum() / weight.sum()
