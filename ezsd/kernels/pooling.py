"""RoI pooling: its grid and pyramid levels, bound to feature maps, and the checks of the operators' arguments."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ezsd.choices import Backend
from ezsd.kernels.distance import FUSED

# torchvision adds this to the (fractional) level before rounding down, so that a box of exactly the
# canonical size does not fall to the finer level by one rounding error of float32.
LEVEL_SLACK = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooling:
    """RoI pooling from a feature pyramid: the grid over every box, the level of a box, and the backend.

    Raises:
        ValueError: scales or sampling grid are not as described; the message says which.
    """

    spatial_scale: tuple[float, ...]
    """Map cells per input pixel of every level, finest first: powers of two, each half of the one before. A single
    level may have any scale above 0."""
    output_size: int = 7
    """P >= 1, bins per box side."""
    sampling_ratio: int = 2
    """S >= 1, sampling points per bin side."""
    canonical_size: float = 224
    """Side, in pixels, of the square box that belongs to `canonical_level`."""
    canonical_level: int = 4
    """Pyramid level (2 means a scale of 1/4) of a box of `canonical_size`."""
    backend: Backend = "auto"
    """Kernel backend, see `ezsd.kernels.resolve_backend`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "spatial_scale", tuple(self.spatial_scale))
        _check_scales(self.spatial_scale)
        if self.output_size < 1:
            raise ValueError(f"output_size must be >= 1, got {self.output_size}")
        if self.sampling_ratio < 1:
            raise ValueError(
                f"sampling_ratio must be >= 1, got {self.sampling_ratio}: the adaptive grid is not offered"
            )
        if self.canonical_size <= 0:
            raise ValueError(f"canonical_size must be > 0 pixels, got {self.canonical_size}")

    @property
    def levels(self) -> int:
        """Pyramid levels that boxes are pooled from."""
        return len(self.spatial_scale)

    def bind(self, features: Tensor | Sequence[Tensor]) -> "BoundPooling":
        """Check the maps of a batch, one (B, C, H, W) per level or a single map, and lay the grid over them.

        Raises:
            ValueError: the maps are not what `ezsd.kernels` asks for; the message says which.
        """
        maps = (features,) if isinstance(features, Tensor) else tuple(features)
        if len(maps) != self.levels:
            raise ValueError(f"expected {self.levels} feature maps, one per spatial scale, got {len(maps)}")
        _check_maps(maps)
        finest = round(-math.log2(self.spatial_scale[0]))
        threshold = self.canonical_size**2 * 4.0 ** (finest + 1 - self.canonical_level - LEVEL_SLACK)
        return BoundPooling(
            maps=maps,
            scale=self.spatial_scale[0],
            threshold=threshold,
            bins=self.output_size,
            samples=self.sampling_ratio,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundPooling:
    """Feature maps and the sampling grid laid over every box."""

    maps: tuple[Tensor, ...]
    """Pyramid levels, finest first, each (B, C, H, W); every level halves the scale of the one before."""
    scale: float
    """Map cells per input pixel on the finest level."""
    threshold: float
    """Box area (square pixels) from which the second level is used; the next ones start at 4x, 16x, ... of it."""
    bins: int
    """P: bins per box side."""
    samples: int
    """S: sampling points per bin side."""

    @property
    def images(self) -> int:
        """B, the images in the batch."""
        return self.maps[0].shape[0]

    @property
    def channels(self) -> int:
        """C, the channels of every map."""
        return self.maps[0].shape[1]

    @property
    def grid(self) -> tuple[float, float, int, int]:
        """Everything but the maps."""
        return self.scale, self.threshold, self.bins, self.samples

    def level_of(self, boxes: Tensor) -> Tensor:
        """Index of the map that each box (R, 4) is pooled from: (R,) int64.

        Areas are compared with thresholds, which needs no logarithm and is exact at powers of two.
        An inverted or NaN box belongs to the finest level.
        """
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        level = torch.zeros_like(area, dtype=torch.int64)
        for coarser in range(len(self.maps) - 1):
            level += area >= self.threshold * 4.0**coarser
        return level


def _check_maps(maps: tuple[Tensor, ...]) -> None:
    first = maps[0]
    for level, feature in enumerate(maps):
        if feature.ndim != 4 or not feature.is_floating_point():
            raise ValueError(
                f"level {level}: expected a floating map (B, C, H, W), got {feature.dtype} {tuple(feature.shape)}"
            )
        if min(feature.shape[2:]) < 1:
            raise ValueError(f"level {level}: the map has no cells, its shape is {tuple(feature.shape)}")
        if feature.shape[:2] != first.shape[:2] or feature.dtype != first.dtype or feature.device != first.device:
            raise ValueError(
                f"level {level}: every map must share B, C, dtype and device; got {tuple(feature.shape)} "
                f"{feature.dtype} {feature.device} beside {tuple(first.shape)} {first.dtype} {first.device}"
            )


def _check_scales(scales: tuple[float, ...]) -> None:
    if not scales:
        raise ValueError("spatial_scale must have at least one level")
    if not all(math.isfinite(scale) and scale > 0 for scale in scales):
        raise ValueError(f"spatial_scale must be > 0 cells per pixel, got {scales}")
    expected = tuple(scales[0] / 2**level for level in range(len(scales)))
    if len(scales) > 1 and (scales != expected or math.frexp(scales[0])[0] != 0.5):
        raise ValueError(f"the scales of a pyramid must be powers of two, each half of the one before, got {scales}")


def check_boxes(pooling: BoundPooling, boxes: Tensor, image_index: Tensor) -> None:
    """Check shapes, dtypes and devices of the boxes; their values are looked at by the backends.

    Raises:
        ValueError: with the argument, what was expected and what was found.
    """
    regions = boxes.shape[0] if boxes.ndim else -1
    if boxes.shape != (regions, 4) or not boxes.is_floating_point():
        raise ValueError(f"boxes must be floating (R, 4) xyxy pixels, got {boxes.dtype} {tuple(boxes.shape)}")
    if image_index.shape != (regions,) or image_index.dtype != torch.int64:
        raise ValueError(f"image_index must be int64 ({regions},), got {image_index.dtype} {tuple(image_index.shape)}")
    device = pooling.maps[0].device
    if boxes.device != device or image_index.device != device:
        raise ValueError(f"features are on {device}, boxes on {boxes.device}, image_index on {image_index.device}")


def check_head(pooling: BoundPooling, projection: Tensor | None, bias: Tensor | None) -> None:
    """Check that the projection takes the pooled bins, channels innermost.

    Raises:
        ValueError: with the argument, what was expected and what was found.
    """
    width = pooling.bins**2 * pooling.channels
    if projection is None:
        if pooling.bins != 1:
            raise ValueError(f"output_size={pooling.bins} needs a projection (D, {width}); None is for output_size=1")
        if bias is not None:
            raise ValueError("a bias needs a projection")
        return
    if projection.ndim != 2 or projection.shape[1] != width:
        raise ValueError(f"projection must be (D, {width}) = (D, P*P*C), got {tuple(projection.shape)}")
    if bias is not None and (bias.shape != projection.shape[:1] or bias.dtype != projection.dtype):
        raise ValueError(
            f"bias must be {projection.dtype} ({projection.shape[0]},) as the projection, "
            f"got {bias.dtype} {tuple(bias.shape)}"
        )


def check_targets(target: Tensor, weight: Tensor, metric: str, *, regions: int, dim: int) -> None:
    """Check shapes and dtypes of the distillation targets, and the metric's name.

    Raises:
        ValueError: with the argument, what was expected and what was found.
    """
    if target.shape != (regions, dim) or not target.is_floating_point():
        raise ValueError(f"target must be floating ({regions}, {dim}), got {target.dtype} {tuple(target.shape)}")
    if weight.shape != (regions,) or not weight.is_floating_point():
        raise ValueError(f"weight must be floating ({regions},), got {weight.dtype} {tuple(weight.shape)}")
    if metric not in FUSED:
        raise ValueError(f"metric must be one of {', '.join(FUSED)}, got {metric!r}")
