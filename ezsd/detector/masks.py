"""Masks of regions, one channel for all classes: targets, head, and masks of an image's size.

An object's mask is kept in its own frame on a grid of fixed size: boxes are scaled, moved and mirrored with the image,
and the grid is at most mirrored. Memory depends on the number of objects, not on the size of the images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import roi_align

from ezsd import kernels
from ezsd.boxes import flip_horizontal, scale
from ezsd.kernels import Pooling

GRID = 112
"""Cells per side of an object's own mask: two for each cell of a target that covers half of the object."""
POOL_SIZE = 14
"""Bins per side of what the head sees of a region; a mask has twice as many cells."""
LAYERS = 4
"""Convolutions before the one that doubles the resolution."""


@dataclass(frozen=True, slots=True)
class ObjectMasks:
    """Masks of the objects of one image, in the order of its boxes."""

    frame: Tensor
    """Box that each grid covers, xyxy, (N, 4); may extend beyond the image."""
    grid: Tensor
    """(N, GRID, GRID) bool."""

    def __len__(self) -> int:
        return len(self.frame)

    def __getitem__(self, rows: Tensor | slice) -> ObjectMasks:
        return ObjectMasks(self.frame[rows], self.grid[rows])

    def scaled(self, sx: float, sy: float) -> ObjectMasks:
        """Follow an image resized by these factors."""
        return ObjectMasks(scale(self.frame, sx, sy), self.grid)

    def in_window(self, x: int, y: int) -> ObjectMasks:
        """Follow a crop of the image whose upper left corner is (x, y)."""
        return ObjectMasks(self.frame - self.frame.new_tensor([x, y, x, y]), self.grid)

    def mirrored(self, width: float) -> ObjectMasks:
        """Follow an image mirrored left to right."""
        return ObjectMasks(flip_horizontal(self.frame, width), self.grid.flip(2))

    def to(self, device: torch.device) -> ObjectMasks:
        """Move to another device."""
        return ObjectMasks(
            self.frame.to(device, non_blocking=True),
            self.grid.to(device, non_blocking=True),
        )


class MaskHead(nn.Module):
    """torchvision's Mask R-CNN head with one channel: regions' features to logits of 28 x 28 cells.

    Args:
        pooling: how regions are pooled from the pyramid, in POOL_SIZE bins.
        channels: width of the maps.

    Source: Mask R-CNN (arXiv 1703.06870); one channel for all classes as EZAD (arXiv 2303.12145) has it.
    """

    def __init__(self, pooling: Pooling, channels: int) -> None:
        super().__init__()
        self.pooling = pooling
        self.layers = MaskRCNNHeads(channels, (channels,) * LAYERS, 1)
        self.predictor = MaskRCNNPredictor(channels, channels, 1)

    def forward(self, maps: list[Tensor], boxes: Tensor, image_index: Tensor) -> Tensor:
        """Boxes (R, 4) in input pixels of images (R,) to logits (R, M, M)."""
        return self.predict(kernels.roi_align(maps, boxes, image_index, self.pooling))

    def predict(self, pooled: Tensor) -> Tensor:
        """Pooled regions (R, C, POOL_SIZE, POOL_SIZE) to logits (R, M, M)."""
        logits: Tensor = self.predictor(self.layers(pooled))
        return logits[:, 0]


def mask_targets(masks: ObjectMasks, boxes: Tensor, objects: Tensor, size: int) -> Tensor:
    """Mask targets: the fraction of each cell of a region that its object covers.

    Args:
        masks: of the objects of all images.
        boxes: regions, (P, 4).
        objects: the object of each region, positions in `masks`, (P,) int64.
        size: M, cells per side.

    Returns:
        Fractions in [0, 1], (P, M, M) float32.
    """
    frame = masks.frame[objects]
    corner, side = frame[:, :2].repeat(1, 2), (frame[:, 2:] - frame[:, :2]).repeat(1, 2)
    places = (boxes - corner) / side * GRID
    # Continuous coordinates, as everywhere: the centre of cell 0 is at one half.
    shares: Tensor = roi_align(
        masks.grid[:, None].float(), torch.cat([objects[:, None].to(places), places], 1), size, aligned=True
    )
    return shares[:, 0]


def concatenated(masks: Sequence[ObjectMasks]) -> ObjectMasks:
    """Masks of the objects of all images, one image after the other."""
    return ObjectMasks(torch.cat([one.frame for one in masks]), torch.cat([one.grid for one in masks]))


def paste(probability: Tensor, boxes: Tensor, height: int, width: int) -> Iterator[NDArray[np.bool_]]:
    """Masks of an image's size, one after the other: a pixel belongs to an object whose mask is >= 1/2 at its centre.

    Args:
        probability: of each cell, (N, M, M), on the CPU.
        boxes: places of the masks, xyxy, (N, 4), in the image's pixels; parts outside are cut off.
        height: of the image, pixels.
        width: the same, to the right.
    """
    for cells, box in zip(probability.float(), boxes.tolist(), strict=True):
        x, y = _centres(box[0], box[2], width), _centres(box[1], box[3], height)
        across, down = (2 * (at + 0.5 - low) / (high - low) - 1 for at, low, high in ((x, *box[::2]), (y, *box[1::2])))
        places = torch.stack(torch.meshgrid(down, across, indexing="ij")[::-1], 2)
        # Beyond the outermost cells' centres it fades, to one half at the edge of the box.
        values = F.grid_sample(cells[None, None], places[None].float(), align_corners=False)[0, 0]
        pixels = np.zeros((height, width), dtype=np.bool_)
        if values.numel():
            top, left = int(y[0]), int(x[0])
            pixels[top : top + len(y), left : left + len(x)] = (values >= 0.5).numpy()
        yield pixels


def _centres(low: float, high: float, limit: int) -> Tensor:
    """Pixels of 0 .. limit - 1 whose centre is between two coordinates."""
    first, end = max(int(np.floor(low)), 0), min(int(np.ceil(high)), limit)
    pixels = torch.arange(first, max(end, first), dtype=torch.float64)
    return pixels[(pixels + 0.5 >= low) & (pixels + 0.5 <= high)]
