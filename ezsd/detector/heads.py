"""Two region heads of the same parts: embedding, cosine classifier over frozen text, regressor that knows the class.

`FastHead` convolves the maps and embeds a region by one fused operator; `PaperHead` convolves each pooled region,
as the method's authors do.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ezsd.choices import MAX_TEMPERATURE, Metric
from ezsd.kernels import Pooling, roi_align, roi_embed_cosine
from ezsd.kernels.distance import FUSED, unit
from ezsd.kernels.reference import project
from ezsd.losses import distillation_loss


def convolutions(channels: int, depth: int) -> nn.ModuleList:
    """Make 3 x 3 convolutions of one width, which ReLUs follow."""
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
    """Embeddings of regions, and the features that they were made of."""

    embedding: Tensor
    """(R, D), unit rows."""
    pooled: Tensor
    """Pooled features for the box regressor, (R, C, P, P)."""


class Head(nn.Module, ABC):
    """Region head: embeddings of regions, their classifier and their box regressor.

    Args:
        pooling: RoI pooling of all regions, whether classified, distilled or regressed.
        channels: width of the maps.
        embed_dim: D.
        depth: convolutions before the projection, see the class.
        hidden: width of fully connected layers.
        semantic: whether the regressor knows the class.
        temperature: start of the multiplier of cosines.
    """

    pooling: Pooling
    classifier: CosineClassifier
    regressor: SemanticBoxRegressor

    def features(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps that regions are pooled from, of maps (B, C, H, W), finest first, and of their shapes."""
        return maps

    @abstractmethod
    def embed(self, features: list[Tensor], boxes: Tensor, image_index: Tensor) -> EmbeddedRegions:
        """Embed boxes (R, 4) in input pixels of images (R,)."""

    @abstractmethod
    def embed_pooled(self, pooled: Tensor) -> EmbeddedRegions:
        """Embed regions whose features have been pooled, (R, C, P, P)."""

    def embed_and_distil(
        self,
        features: list[Tensor],
        boxes: Tensor,
        image_index: Tensor,
        target: Tensor,
        weight: Tensor,
        metric: Metric,
    ) -> tuple[EmbeddedRegions, Tensor]:
        """Embed the first boxes, and distil the last.

        Args:
            features: maps that regions are pooled from.
            boxes: (R, 4), input pixels; the last N of them are compared with targets.
            image_index: image of each box, (R,).
            target: (N, D).
            weight: (N,), see `region_weights`.
            metric: distance between an embedding and its target.

        Returns:
            The first R - N regions, and the weighted mean distance of the last to their targets, a scalar.
        """
        seen, named = self.embed(features, boxes, image_index), len(boxes) - len(target)
        loss = distillation_loss(seen.embedding[named:], target, weight, metric)
        return EmbeddedRegions(seen.embedding[:named], seen.pooled[:named]), loss


class FastHead(Head):
    """Convolutions on the maps, then pooling, one linear layer and unit length as one operator; arguments of `Head`."""

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
        inputs = channels * pooling.output_size**2
        self.pooling = pooling
        self.tower = Tower(channels, depth)
        self.projection = nn.Linear(inputs, embed_dim)
        # The operator reads the projection's weights: a layer after it, for hooks that look at what layers give.
        self.embedded = nn.Identity()
        self.classifier = CosineClassifier(embed_dim, temperature=temperature)
        trunk = nn.Sequential(nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU())
        self.regressor = SemanticBoxRegressor(trunk, hidden, embed_dim if semantic else 0)

    def features(self, maps: list[Tensor]) -> list[Tensor]:
        """Run the convolutions, once for all regions."""
        features: list[Tensor] = self.tower(maps)
        return features

    def embed(self, features: list[Tensor], boxes: Tensor, image_index: Tensor) -> EmbeddedRegions:
        """Pool once, for the embedding and the box regressor alike."""
        nothing = boxes.new_zeros(0, self.projection.out_features)
        return self.embed_and_distil(features, boxes, image_index, nothing, nothing[:, 0], "cosine")[0]

    def embed_pooled(self, pooled: Tensor) -> EmbeddedRegions:
        """Project the bins, channels innermost, and scale to unit length: the operator's steps after its pooling."""
        bins = pooled.permute(0, 2, 3, 1)
        return EmbeddedRegions(unit(project(bins, self.projection.weight, self.projection.bias)), pooled)

    def embed_and_distil(
        self,
        features: list[Tensor],
        boxes: Tensor,
        image_index: Tensor,
        target: Tensor,
        weight: Tensor,
        metric: Metric,
    ) -> tuple[EmbeddedRegions, Tensor]:
        """Pool once, embed and compare by one fused operator, for the metrics that it has."""
        if metric not in FUSED:
            return super().embed_and_distil(features, boxes, image_index, target, weight, metric)
        head = self.projection.weight, self.projection.bias
        embedding, pooled, loss = roi_embed_cosine(
            features, boxes, image_index, self.pooling, *head, target=target, weight=weight, metric=metric
        )
        return EmbeddedRegions(self.embedded(embedding), pooled[: len(embedding)]), loss


class Branch(nn.Module):
    """Branch of the paper's head: a convolution and two fully connected layers, (R, C, P, P) to (R, width)."""

    def __init__(self, channels: int, size: int, width: int) -> None:
        super().__init__()
        self.convolutions = convolutions(channels, 1)
        self.layers = nn.ModuleList([nn.Linear(channels * size**2, width), nn.Linear(width, width)])
        for layer in self.layers:
            _xavier(layer)

    def forward(self, pooled: Tensor) -> Tensor:
        """Map pooled features (R, C, P, P) to (R, width)."""
        hidden = _convolve(self.convolutions, pooled).flatten(1)
        for layer in self.layers:
            hidden = F.relu(layer(hidden))
        return hidden


class PaperHead(Head):
    """Convolutions on every pooled region, shared, then a branch for the embedding and one for the box.

    Arguments of `Head`; both branches have a convolution and two fully connected layers of their own.

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
        self.branch = Branch(channels, pooling.output_size, hidden)
        self.projection = nn.Linear(hidden, embed_dim)
        _xavier(self.projection)
        self.classifier = CosineClassifier(embed_dim, temperature=temperature)
        trunk = Branch(channels, pooling.output_size, hidden)
        self.regressor = SemanticBoxRegressor(trunk, hidden, embed_dim if semantic else 0)

    def embed(self, features: list[Tensor], boxes: Tensor, image_index: Tensor) -> EmbeddedRegions:
        """Pool every region, then `embed_pooled`."""
        return self.embed_pooled(roi_align(features, boxes, image_index, self.pooling))

    def embed_pooled(self, pooled: Tensor) -> EmbeddedRegions:
        """Run the shared convolutions on every region, then the branch of the embedding."""
        shared = _convolve(self.shared, pooled)
        return EmbeddedRegions(unit(self.projection(self.branch(shared))), shared)


def _convolve(layers: nn.ModuleList, pooled: Tensor) -> Tensor:
    for layer in layers:
        pooled = F.relu(layer(pooled))
    return pooled


def _xavier(layer: nn.Module) -> None:
    assert isinstance(layer, nn.Linear)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
