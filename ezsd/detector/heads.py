"""Two region heads of the same parts: embedding, cosine classifier over frozen text, regressor that knows the class.

`FastHead` convolves the maps and embeds a region by one fused operator; `PaperHead` convolves each pooled region, as
the method's authors do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ezsd.choices import MAX_TEMPERATURE, Backend, Metric
from ezsd.kernels import roi_align, roi_align_cosine, roi_embed
from ezsd.kernels.reference import distances, unit, weighted_mean


class PoolingOptions(TypedDict):
    """What the three operators take alike; see `ezsd.kernels`."""

    spatial_scale: list[float]
    output_size: int
    canonical_size: int
    canonical_level: int
    backend: Backend


class Pooling:
    """How regions are pooled: one setting for classification, distillation and regression.

    Args:
        strides: pixels per cell of each level.
        size: P, bins per side.
        canonical_size: side of the box, pixels, that belongs on the level of stride 2 ** canonical_level.
        canonical_level: see there.
        backend: which kernel runs it.
    """

    def __init__(
        self, *, strides: tuple[int, ...], size: int, canonical_size: int, canonical_level: int, backend: Backend
    ) -> None:
        self.levels = len(strides)
        self.size = size
        self.options: PoolingOptions = {
            "spatial_scale": [1 / stride for stride in strides],
            "output_size": size,
            "canonical_size": canonical_size,
            "canonical_level": canonical_level,
            "backend": backend,
        }

    def align(self, maps: list[Tensor], boxes: Tensor, image_index: Tensor) -> Tensor:
        """(R, C, P, P) pooled features of boxes (R, 4) in input pixels."""
        return roi_align(
            maps,
            boxes,
            image_index,
            **self.options,
        )

    def embed(self, maps: list[Tensor], boxes: Tensor, image_index: Tensor, projection: nn.Linear) -> Tensor:
        """(R, D) unit embeddings."""
        return roi_embed(
            maps,
            boxes,
            image_index,
            projection=projection.weight,
            bias=projection.bias,
            **self.options,
        )

    def distance(
        self,
        maps: list[Tensor],
        boxes: Tensor,
        image_index: Tensor,
        target: Tensor,
        weight: Tensor,
        projection: nn.Linear,
        metric: Metric,
    ) -> Tensor:
        """Weighted mean of the distances between region embeddings and targets (R, D); scalar."""
        return roi_align_cosine(
            maps,
            boxes,
            image_index,
            target,
            weight,
            projection=projection.weight,
            bias=projection.bias,
            metric=metric,
            **self.options,
        )


def convolutions(channels: int, depth: int) -> nn.ModuleList:
    """So many 3 x 3 convolutions of one width, to be followed by ReLUs."""
    made = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(depth)]
    for convolution in made:
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        assert convolution.bias is not None
        nn.init.zeros_(convolution.bias)
    return nn.ModuleList(made)


class Tower(nn.Module):
    """Convolutions shared by all levels: everything non-linear lies before the pooling (docs/kernel.md says why)."""

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        self.convolutions = convolutions(channels, depth)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps in, maps of the same shapes out."""
        for convolution in self.convolutions:
            maps = [F.relu(convolution(m)) for m in maps]
        return maps


class CosineClassifier(nn.Module):
    """Scaled cosines to frozen text rows, and one learned background row that is not of unit length.

    The temperature is learned and stays within `MAX_TEMPERATURE`: whoever moves it calls `constrain` afterwards, as
    CLIP's training does. Limiting its value where it is used would make its gradient zero at the bound for ever.

    Args:
        embed_dim: D.
        temperature: start of the multiplier of cosines, in (0, `MAX_TEMPERATURE`].
    """

    def __init__(self, embed_dim: int, *, temperature: float) -> None:
        super().__init__()
        self.background = nn.Parameter(torch.zeros(embed_dim))
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        self.constrain()
        # Earlier versions limited the value in use: a parameter beyond the bound meant the bound.
        nn.Module.register_load_state_dict_post_hook(self, lambda module, _: module.constrain())

    @torch.no_grad()
    def constrain(self) -> None:
        """Move the temperature back within its bound."""
        self.log_temperature.clamp_(max=math.log(MAX_TEMPERATURE))

    def forward(self, embedding: Tensor, text: Tensor) -> Tensor:
        """Unit embeddings (R, D) against unit rows (C, D): logits (R, C + 1), background last."""
        # In 16 bits a cosine times 100 has steps of an eighth.
        with torch.autocast(embedding.device.type, enabled=False):
            embedding, text = embedding.float(), text.float()
            cosine = torch.cat([embedding @ text.T, (embedding @ self.background)[:, None]], 1)
            return self.log_temperature.exp() * cosine


class SemanticBoxRegressor(nn.Module):
    """Box deltas from pooled features and the text embedding of the class (EZSD, semantic-based regression).

    Args:
        trunk: pooled features (R, C, P, P) to non-negative features (R, width).
        width: see there.
        embed_dim: D, or 0 for a regressor that does not know the class.
    """

    def __init__(self, trunk: nn.Module, width: int, embed_dim: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.deltas = nn.Linear(width + embed_dim, 4)
        nn.init.normal_(self.deltas.weight, std=0.001)
        nn.init.zeros_(self.deltas.bias)
        self.semantic = embed_dim > 0

    def forward(self, pooled: Tensor, class_text: Tensor) -> Tensor:
        """Pooled (R, C, P, P) and the unit text row of each region's class (R, D) to deltas (R, 4).

        Rows of K classes for each region, (R, K, D), give deltas (R, K, 4).
        """
        hidden = self.trunk(pooled)
        if class_text.ndim == 3:
            hidden = hidden[:, None].expand(-1, class_text.shape[1], -1)
        if self.semantic:
            hidden = torch.cat([hidden, class_text.to(hidden.dtype)], -1)
        deltas: Tensor = self.deltas(hidden)
        return deltas


@dataclass(frozen=True, slots=True)
class EmbeddedRegions:
    """Regions as a head sees them."""

    embedding: Tensor
    """(R, D), unit rows."""
    pooled: Callable[[Tensor | slice], Tensor]
    """What the box regressor reads of the regions of a mask (R,) or slice: (N, C, P, P)."""


class Head(Protocol):
    """What the detector asks of a head."""

    pooling: Pooling
    classifier: CosineClassifier
    regressor: SemanticBoxRegressor

    def features(self, maps: list[Tensor]) -> list[Tensor]:
        """What regions are pooled from: maps (B, C, H, W), finest first, to maps of the same shapes."""
        ...

    def embed(self, features: list[Tensor], boxes: Tensor, image_index: Tensor) -> EmbeddedRegions:
        """Boxes (R, 4) in input pixels of images (R,)."""
        ...

    def distance(
        self,
        features: list[Tensor],
        boxes: Tensor,
        image_index: Tensor,
        target: Tensor,
        weight: Tensor,
        metric: Metric,
    ) -> Tensor:
        """Weighted mean of the distances between region embeddings and targets (R, D); scalar."""
        ...


class FastHead(nn.Module):
    """Convolutions on the maps, then pooling, one linear layer and unit length as one operator.

    Args:
        pooling: how regions are pooled.
        channels: width of the maps.
        embed_dim: D.
        depth: convolutions before the pooling.
        hidden: width of the box regressor's hidden layer.
        semantic: whether the regressor knows the class.
        temperature: start of the multiplier of cosines.
    """

    def __init__(
        self,
        pooling: Pooling,
        channels: int,
        embed_dim: int,
        *,
        depth: int,
        hidden: int,
        semantic: bool,
        temperature: float,
    ) -> None:
        super().__init__()
        inputs = channels * pooling.size**2
        self.pooling = pooling
        self.tower = Tower(channels, depth)
        self.projection = nn.Linear(inputs, embed_dim)
        self.classifier = CosineClassifier(embed_dim, temperature=temperature)
        trunk = nn.Sequential(nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU())
        self.regressor = SemanticBoxRegressor(trunk, hidden, embed_dim if semantic else 0)

    def features(self, maps: list[Tensor]) -> list[Tensor]:
        """See `Head`."""
        features: list[Tensor] = self.tower(maps)
        return features

    def embed(self, features: list[Tensor], boxes: Tensor, image_index: Tensor) -> EmbeddedRegions:
        """See `Head`; pooled features are made for the regions that are asked for, when they are."""
        embedding = self.pooling.embed(features, boxes, image_index, self.projection)
        return EmbeddedRegions(embedding, lambda rows: self.pooling.align(features, boxes[rows], image_index[rows]))

    def distance(
        self,
        features: list[Tensor],
        boxes: Tensor,
        image_index: Tensor,
        target: Tensor,
        weight: Tensor,
        metric: Metric,
    ) -> Tensor:
        """See `Head`; one operator for all regions of the batch."""
        return self.pooling.distance(features, boxes, image_index, target, weight, self.projection, metric)


class Branch(nn.Module):
    """One convolution and two fully connected layers: pooled features (R, C, P, P) to (R, width)."""

    def __init__(self, channels: int, size: int, width: int) -> None:
        super().__init__()
        self.convolutions = convolutions(channels, 1)
        self.layers = nn.ModuleList([nn.Linear(channels * size**2, width), nn.Linear(width, width)])
        for layer in self.layers:
            _xavier(layer)

    def forward(self, pooled: Tensor) -> Tensor:
        """See the class."""
        hidden = _convolve(self.convolutions, pooled).flatten(1)
        for layer in self.layers:
            hidden = F.relu(layer(hidden))
        return hidden


class PaperHead(nn.Module):
    """Convolutions on every pooled region, shared, then a branch for the embedding and one for the box.

    Args:
        pooling: how regions are pooled.
        channels: width of the maps.
        embed_dim: D.
        depth: convolutions that the branches share.
        hidden: width of the fully connected layers.
        semantic: whether the regressor knows the class.
        temperature: start of the multiplier of cosines.

    Source: EZAD (arXiv 2303.12145) and its authors' code, as docs/method.md describes them.
    """

    def __init__(
        self,
        pooling: Pooling,
        channels: int,
        embed_dim: int,
        *,
        depth: int,
        hidden: int,
        semantic: bool,
        temperature: float,
    ) -> None:
        super().__init__()
        self.pooling = pooling
        self.shared = convolutions(channels, depth)
        self.branch = Branch(channels, pooling.size, hidden)
        self.projection = nn.Linear(hidden, embed_dim)
        _xavier(self.projection)
        self.classifier = CosineClassifier(embed_dim, temperature=temperature)
        trunk = Branch(channels, pooling.size, hidden)
        self.regressor = SemanticBoxRegressor(trunk, hidden, embed_dim if semantic else 0)

    def features(self, maps: list[Tensor]) -> list[Tensor]:
        """See `Head`; regions are pooled from the pyramid itself."""
        return maps

    def embed(self, features: list[Tensor], boxes: Tensor, image_index: Tensor) -> EmbeddedRegions:
        """See `Head`."""
        shared = _convolve(self.shared, self.pooling.align(features, boxes, image_index))
        return EmbeddedRegions(unit(self.projection(self.branch(shared))), lambda rows: shared[rows])

    def distance(
        self,
        features: list[Tensor],
        boxes: Tensor,
        image_index: Tensor,
        target: Tensor,
        weight: Tensor,
        metric: Metric,
    ) -> Tensor:
        """See `Head`; the box branch is not run."""
        embedding = self.embed(features, boxes, image_index).embedding
        return weighted_mean(distances(embedding, target, metric), weight)


def _convolve(layers: nn.ModuleList, pooled: Tensor) -> Tensor:
    for layer in layers:
        pooled = F.relu(layer(pooled))
    return pooled


def _xavier(layer: nn.Module) -> None:
    assert isinstance(layer, nn.Linear)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
