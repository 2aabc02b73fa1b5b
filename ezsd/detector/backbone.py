"""Backbones with a feature pyramid: a small one for small images, ResNets and other bodies for photos."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FeaturePyramidNetwork

from ezsd.choices import BACKBONES, MOBILENETS, RESNETS
from ezsd.detector.bodies import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Body,
    MobileNet,
    freeze_norms,
    load_classifier,
    load_plugin,
    maps_of,
    try_out,
)
from ezsd.detector.norms import FrozenNorm, fold_norms
from ezsd.detector.requirements import has_form, require_backbone, said
from ezsd.errors import BackboneError
from ezsd.plugins import PLUGIN
from ezsd.transfer import to_device

Stages = Sequence[Iterable[nn.Parameter]]
"""Parameters of a body's stem, and of each of its stages."""


class Pyramid(nn.Module):
    """Images to a list of feature maps, finest first.

    Args:
        network: a body with a pyramid on it; gives the maps by name.
        strides: pixels of input per cell, one per level.
        channels: C, the same for all levels.
        body: modules of the body, all of them in `network`.
        extra: coarsest levels that only the proposal network has: no region is pooled from them.
        mean: of red, green and blue in [0, 1], for `normalise`.
        std: standard deviation of red, green and blue, likewise.
        fingerprint: JSON object that tells the body from others, but for its weights; None where its name does.

    Attributes:
        strides: as given, like channels, extra and fingerprint.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        strides: tuple[int, ...],
        channels: int,
        body: Sequence[nn.Module],
        extra: int = 0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        fingerprint: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__()
        self.body = network
        self.strides = strides
        self.channels = channels
        self.extra = extra
        self.fingerprint = fingerprint
        self.mean, self.std = tuple(mean), tuple(std)
        # A tuple, which torch does not look into: in a state they have their names below `body` alone.
        self._below = tuple(body)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W), normalised, to one (B, C, H / stride, W / stride) map per level."""
        return list(self.body(images).values())

    def maps(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Maps of RGB images (B, 3, H, W), see `normalise`, whose heights and widths without padding are `sizes`."""
        maps: list[Tensor] = self(normalise(images, sizes, self.mean, self.std))
        return maps

    def body_parameters(self) -> list[nn.Parameter]:
        """Parameters of the body, without those of the pyramid."""
        return [parameter for module in self._below for parameter in module.parameters()]


def build_backbone(
    name: str,
    *,
    channels: int,
    weights: Mapping[str, Tensor] | None,
    frozen_stages: int = 1,
    frozen_norms: bool | None = None,
    section: str = "model",
) -> Pyramid:
    """Make a backbone by name.

    Args:
        name: one of `BACKBONES`, "timm:MODEL", or "plugin:package.module:factory", see `Body`.
        channels: width of the pyramid.
        weights: pretrained state for all but "tiny", or None to start from random values. With weights the
            normalisation statistics are frozen, and the stem and first stages are not trained; without, all is trained.
        frozen_stages: stages after the stem that are not trained, with weights; 0 is the stem alone, -1 nothing.
        frozen_norms: build a body as if with weights, for a trained state to be loaded; None decides by `weights`.
        section: table of the settings, for messages.

    Raises:
        ValueError: unknown name, weights for "tiny" or of another network, more frozen stages than there are. It is a
            `BackboneError` where a body cannot be made.
    """
    if name == "tiny":
        if weights is not None:
            raise ValueError(
                f"the tiny backbone has no pretrained weights; choose {section}.backbone = resnet50 for a file"
            )
        tiny = _TinyBody(channels)
        return Pyramid(tiny, strides=(8, 16), channels=channels, body=(tiny.stem, tiny.middle, tiny.deep))
    if not has_form(name):
        raise ValueError(f"{section}.backbone {name!r} is unknown; choose one of {', '.join(BACKBONES)}")
    frozen = weights is not None if frozen_norms is None else frozen_norms
    if name in RESNETS:
        return _resnet(name, channels, weights, frozen_stages, section, frozen_norms=frozen)
    body = _load_body(name, weights, section, frozen_norms=frozen)
    network = cast("nn.Module", body)
    if frozen:
        freeze_norms(network, said(name, section))
    if name in MOBILENETS:
        fold_norms(network)
    if weights is not None and frozen_stages >= 0:
        _freeze(body.stages(), frozen_stages, name, section)
    return Pyramid(
        _WithPyramid(network, try_out(body, said(name, section)), channels),
        strides=tuple(body.strides),
        channels=channels,
        body=(network,),
        mean=body.mean,
        std=body.std,
        fingerprint=None if name in MOBILENETS else _of_body(name, body),
    )


@torch.no_grad()
def try_size(backbone: Pyramid, name: str, size: tuple[int, int], section: str = "model") -> None:
    """Try a backbone out on one image of the size of its training: some bodies take small images alone.

    Args:
        backbone: on the CPU.
        name: its name; one of `BACKBONES` takes all sizes and is not tried.
        size: height and width, multiples of 32.
        section: table of the setting, for messages.

    Raises:
        BackboneError: it fails, or its maps are not of the sizes that its strides say.
    """
    if name not in BACKBONES:
        maps_of(backbone, backbone.strides, size, said(name, section))


def body_fingerprint(name: str, section: str = "model") -> dict[str, object] | None:
    """The attribute `fingerprint` of a name's `Pyramid`, for less than the whole of it: no pass, of timm no network.

    Raises:
        BackboneError: there is no such body.
    """
    if name in BACKBONES:
        return None
    require_backbone(name, section)
    if name.startswith(PLUGIN):
        body = load_plugin(name, None, section)
        return _of_body(name, body)
    # For these names alone: timm may be missing.
    from ezsd.detector.timm_body import TimmBody, normalisation

    return _fingerprint(name, TimmBody.strides, *normalisation(name, section, pretrained=False), own={})


def _resnet(
    name: str,
    channels: int,
    weights: Mapping[str, Tensor] | None,
    frozen_stages: int,
    section: str,
    *,
    frozen_norms: bool,
) -> Pyramid:
    norm = FrozenNorm if frozen_norms else nn.BatchNorm2d
    network = getattr(torchvision.models, name)(weights=None, norm_layer=norm)
    if weights is not None:
        load_classifier(network, name, weights, classifier="fc.")
        parts = [
            (network.conv1, network.bn1),
            (network.layer1,),
            (network.layer2,),
            (network.layer3,),
            (network.layer4,),
        ]
        _freeze([[p for m in modules for p in m.parameters()] for modules in parts], frozen_stages, name, section)
    fold_norms(network)
    width = network.fc.in_features // 8
    body = BackboneWithFPN(
        network,
        return_layers={f"layer{i}": str(i - 1) for i in range(1, 5)},
        in_channels_list=[width * 2**i for i in range(4)],
        out_channels=channels,
    )
    return Pyramid(body, strides=(4, 8, 16, 32, 64), channels=channels, body=(body.body,), extra=1)


def _load_body(name: str, weights: Mapping[str, Tensor] | None, section: str, *, frozen_norms: bool) -> Body:
    if name in MOBILENETS:
        return MobileNet(name, weights)
    if name.startswith(PLUGIN):
        return load_plugin(name, weights, section)
    require_backbone(name, section)
    # For these names alone: timm may be missing.
    from ezsd.detector.timm_body import TimmBody

    return TimmBody(name, weights, section, frozen_norms=frozen_norms)


def _freeze(stages: Stages, count: int, name: str, section: str) -> None:
    """Train neither the stem nor `count` stages after it. BackboneError where there are fewer."""
    if count >= len(stages):
        raise BackboneError(
            f"`{section}.frozen_stages={count}`: {name} has {len(stages) - 1} stages after its stem, expected -1 to "
            f"{len(stages) - 1}"
        )
    for stage in stages[: count + 1]:
        for parameter in stage:
            parameter.requires_grad_(False)


def _fingerprint(
    name: str, strides: Sequence[int], mean: Sequence[float], std: Sequence[float], own: Mapping[str, object]
) -> dict[str, object]:
    pixels = {"mean": list(mean), "std": list(std)}
    return {"name": name, "strides": list(strides), **pixels, **({"fingerprint": own} if own else {})}


def _of_body(name: str, body: Body) -> dict[str, object]:
    return _fingerprint(name, body.strides, body.mean, body.std, own=body.fingerprint())


class _WithPyramid(nn.Module):
    """A body, and a pyramid on all of its maps."""

    def __init__(self, body: nn.Module, inputs: list[int], channels: int) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(inputs, channels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = self.fpn({str(level): one for level, one in enumerate(self.body(images))})
        return maps


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


def normalise(
    images: Tensor,
    sizes: Sequence[tuple[int, int]],
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Tensor:
    """Normalise RGB images (B, 3, H, W), uint8 or float in [0, 1], like ImageNet's unless told; zeros beyond each size.

    A convolution then sees beside an image what it sees at the border of a batch.

    Args:
        images: padded.
        sizes: (height, width) of each image without padding.
        mean: of red, green and blue.
        std: standard deviation of red, green and blue.
    """
    images = images if images.is_floating_point() else images / 255
    made = (images - _by_channel(mean, images)) / _by_channel(std, images)
    for image, (height, width) in zip(made, sizes, strict=True):
        image[:, height:] = 0
        image[:, :, width:] = 0
    return made


def _by_channel(values: Sequence[float], images: Tensor) -> Tensor:
    return to_device(torch.tensor(values), images.device)[:, None, None]
