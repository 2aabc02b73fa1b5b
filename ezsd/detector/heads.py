"""The heads: region embedding, cosine classifier over frozen text, box regressor that knows the class."""

from __future__ import annotations

import math
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ezsd.kernels import Backend, Metric, roi_align, roi_align_cosine, roi_embed


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


class Tower(nn.Module):
    """Convolutions shared by all levels: everything non-linear lies before the pooling (docs/kernel.md says why)."""

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(depth)]
        self.convolutions = nn.ModuleList(convolutions)
        for convolution in convolutions:
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            assert convolution.bias is not None
            nn.init.zeros_(convolution.bias)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps in, maps of the same shapes out."""
        for convolution in self.convolutions:
            maps = [F.relu(convolution(m)) for m in maps]
        return maps


class CosineClassifier(nn.Module):
    """Scaled cosines to frozen text rows, and one learned background row that is not of unit length."""

    def __init__(self, embed_dim: int, *, temperature: float) -> None:
        super().__init__()
        self.background = nn.Parameter(torch.zeros(embed_dim))
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    def forward(self, embedding: Tensor, text: Tensor) -> Tensor:
        """Unit embeddings (R, D) against unit rows (C, D): logits (R, C + 1), background last."""
        # In 16 bits a cosine times 100 has steps of an eighth.
        with torch.autocast(embedding.device.type, enabled=False):
            embedding, text = embedding.float(), text.float()
            cosine = torch.cat([embedding @ text.T, (embedding @ self.background)[:, None]], 1)
            # Above 100 the softmax is as hard as CLIP's own, and gradients vanish.
            return self.log_temperature.clamp(max=math.log(100.0)).exp() * cosine


class SemanticBoxRegressor(nn.Module):
    """Box deltas from pooled features and the text embedding of the class (EZSD, semantic-based regression).

    Args:
        inputs: C * P * P.
        hidden: width of the hidden layer.
        embed_dim: D, or 0 for a regressor that does not know the class.
    """

    def __init__(self, inputs: int, hidden: int, embed_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, hidden)
        self.deltas = nn.Linear(hidden + embed_dim, 4)
        nn.init.normal_(self.deltas.weight, std=0.001)
        nn.init.zeros_(self.deltas.bias)
        self.semantic = embed_dim > 0

    def forward(self, pooled: Tensor, class_text: Tensor) -> Tensor:
        """Pooled (R, C, P, P) and the unit text row of each region's class (R, D) to deltas (R, 4)."""
        hidden = F.relu(self.hidden(pooled.flatten(1)))
        if self.semantic:
            hidden = torch.cat([hidden, class_text.to(hidden.dtype)], 1)
        deltas: Tensor = self.deltas(hidden)
        return deltas
