"""Settings of the detector. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Interval

from ezsd.choices import BoxClass, HeadName


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorSettings:
    """Architecture of the detector, what its box head learns from, and whose boxes it gives at inference."""

    backbone: str
    """"tiny", a ResNet or MobileNet of torchvision, "timm:MODEL", or "plugin:package.module:factory"
    (docs/backbones.md)."""
    fpn_channels: Annotated[int, Interval(gt=0)]
    """Width of the pyramid."""
    rpn_sizes: tuple[Annotated[int, Interval(gt=0)], ...]
    """Proposal network's anchor size per level, input pixels; ratios 1/2, 1, 2."""
    rpn_proposals: Annotated[int, Interval(gt=0)]
    """Boxes per image that the proposal network hands on."""
    pool_size: Annotated[int, Interval(gt=0, le=16)]
    """Bins per side of RoI-align, at most as many as the GPU's kernels take."""
    canonical_size: Annotated[int, Interval(gt=0)]
    """Side of a box, input pixels, that belongs on the level of stride 2 ** canonical_level."""
    canonical_level: Annotated[int, Interval(ge=0)]
    """Level of a box of side canonical_size: that of stride 2 ** canonical_level."""
    tower_depth: Annotated[int, Interval(ge=0)]
    """Convolutions before the pooling ("fast"), or on each pooled region, for both branches ("paper")."""
    box_hidden: Annotated[int, Interval(gt=0)]
    """Width of the box regressor's hidden layer ("fast"), or of all fully connected layers ("paper")."""
    logit_scale: Annotated[float, Interval(gt=0)]
    """Initial value of the learned multiplier of cosines, at most 100 (`MAX_TEMPERATURE`) while it learns."""
    frozen_stages: Annotated[int, Interval(ge=-1)] = 1
    """Stages after the stem that a backbone with pretrained weights does not train; 0 is the stem alone, -1 nothing."""
    head: HeadName = "fast"
    """"fast" convolves the maps and embeds a region by one operator; "paper" convolves each region, as its authors."""
    semantic_boxes: bool = True
    """Condition the box regressor on the class."""
    box_class: BoxClass = "foreground"
    """Class whose text row the regressor sees at inference: the likeliest name's; "reference": zeros where background
    is likelier; "topk": each of the `box_top_k` likeliest names has a box of its own, the others take the first's."""
    box_top_k: Annotated[int, Interval(gt=0)] = 5
    """Names with a box of their own, with box_class "topk"."""
    box_batch_size_per_image: Annotated[int, Interval(gt=0)] = 512
    """Regions per image that the box head learns from."""
    box_positive_fraction: Annotated[float, Interval(ge=0, le=1)] = 0.25
    """Largest fraction of these regions that are on objects."""
    ignore_confidence: Annotated[float, Interval(ge=0)] = 2.0
    """Regions on a cached region of this confidence are not taught to be background; above 1 none is ignored."""
    masks: bool = False
    """Give objects masks, one channel for all classes, learned from the base objects' segmentations."""
    ignore_rpn: bool = False
    """Do not use these cached regions as negatives of the proposal network either."""
