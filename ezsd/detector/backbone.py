"""Backbones with a feature pyramid: a small one for small images, torchvision's ResNets for photos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d

from ezsd.choices import BACKBONES, RESNETS


class Pyramid(nn.Module):
    """Images to a list of feature maps, finest first.

    Attributes:
        strides: pixels of input per cell, one per level.
        channels: C, the same for all levels.
    """

    def __init__(self, body: nn.Module, *, strides: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.body = body
        self.strides = strides
        self.channels = channels

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W), normalised, to one (B, C, H / stride, W / stride) map per level."""
        return list(self.body(images).values())


def build_backbone(
    name: str, *, channels: int, weights: Mapping[str, Tensor] | None, frozen_norms: bool | None = None
) -> Pyramid:
    """Make a backbone by name.

    Args:
        name: one of `BACKBONES`.
        channels: width of the pyramid.
        weights: ImageNet classification state for a ResNet, or None to start from random values. With weights the
            normalisation statistics are frozen and the stem and first stage are not trained; without, all is trained.
        frozen_norms: build a ResNet as if with weights, for a trained state to be loaded; None decides by `weights`.

    Raises:
        ValueError: unknown name, weights for "tiny", or a state of another network.
    """
    if name == "tiny":
        if weights is not None:
            raise ValueError("the tiny backbone has no pretrained weights; choose model.backbone = resnet50 for a file")
        return Pyramid(_TinyBody(channels), strides=(8, 16), channels=channels)
    if name not in RESNETS:
        raise ValueError(f"model.backbone {name!r} is unknown; choose one of {', '.join(BACKBONES)}")
    frozen = weights is not None if frozen_norms is None else frozen_norms
    norm = FrozenBatchNorm2d if frozen else nn.BatchNorm2d
    network = getattr(torchvision.models, name)(weights=None, norm_layer=norm)
    if weights is not None:
        _load_classifier(network, name, weights)
        for part in (network.conv1, network.bn1, network.layer1):
            part.requires_grad_(False)
    width = network.fc.in_features // 8
    body = BackboneWithFPN(
        network,
        return_layers={f"layer{i}": str(i - 1) for i in range(1, 5)},
        in_channels_list=[width * 2**i for i in range(4)],
        out_channels=channels,
    )
    return Pyramid(body, strides=(4, 8, 16, 32, 64), channels=channels)


def _load_classifier(network: nn.Module, name: str, weights: Mapping[str, Tensor]) -> None:
    # Frozen normalisation has no step counter, and the classifier is thrown away.
    state = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked") and not k.startswith("fc.")}
    try:
        found = network.load_state_dict(state, strict=False)
    except RuntimeError as error:
        wrong = str(error).splitlines()[1].strip()
        raise ValueError(f"backbone weights are not an ImageNet state of {name}: {wrong}") from error
    missing = [k for k in found.missing_keys if not k.startswith("fc.")]
    if missing or found.unexpected_keys:
        wrong = (missing + list(found.unexpected_keys))[0]
        raise ValueError(f"backbone weights are not an ImageNet state of {name}: {wrong!r} does not match")


class _TinyBody(nn.Module):
    """Seven convolutions and a two-level pyramid, for images of about 128 px."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(3, 24, stride=2), _conv(24, 48, stride=2), _conv(48, 48))
        self.middle = nn.Sequential(_conv(48, 80, stride=2), _conv(80, 80))
        self.deep = nn.Sequential(_conv(80, 112, stride=2), _conv(112, 112))
        self.pyramid = FeaturePyramidNetwork([80, 112], channels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        middle = self.middle(self.stem(images))
        maps: dict[str, Tensor] = self.pyramid({"0": middle, "1": self.deep(middle)})
        return maps


def _conv(inputs: int, outputs: int, *, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def normalise(images: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """ImageNet normalisation of RGB images (B, 3, H, W), float in [0, 1]; zeros beyond each (height, width).

    A convolution then sees beside an image what it sees at the border of a batch.
    """
    mean = torch.tensor((0.485, 0.456, 0.406), device=images.device)[:, None, None]
    std = torch.tensor((0.229, 0.224, 0.225), device=images.device)[:, None, None]
    made = (images - mean) / std
    for image, (height, width) in zip(made, sizes, strict=True):
        image[:, height:] = 0
        image[:, :, width:] = 0
    return made
