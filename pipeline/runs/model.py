"""The detector of a configuration, and the weights that its backbone begins with."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ezsd.detector.backbone import Pyramid, build_backbone
from ezsd.detector.model import Detector
from ezsd.pipeline.config.schema import Config, ModelConfig, ProposerConfig
from ezsd.pipeline.errors import ConfigError

log = logging.getLogger("ezsd")


def build_detector(
    config: Config, embed_dim: int, weights: dict[str, Tensor] | None, *, frozen_norms: bool | None = None
) -> Detector:
    """The detector of a configuration, freshly initialised; `build_backbone` explains the last two arguments."""
    backbone = configured_backbone("model", config.model, weights, frozen_norms=frozen_norms)
    return Detector(backbone, config.model, embed_dim=embed_dim, backend=config.train.backend)


def configured_backbone(
    section: str,
    settings: ModelConfig | ProposerConfig,
    weights: dict[str, Tensor] | None,
    *,
    frozen_norms: bool | None,
) -> Pyramid:
    """Backbone of the settings of a section; `build_backbone` explains the last two arguments.

    Raises:
        ConfigError: the weights do not fit the backbone, or the anchor sizes its levels; names the section's settings.
    """
    try:
        backbone = build_backbone(
            settings.backbone, channels=settings.fpn_channels, weights=weights, frozen_norms=frozen_norms
        )
    except ValueError as error:
        raise ConfigError(str(error).replace("model.", f"{section}.")) from error
    if len(settings.rpn_sizes) != len(backbone.strides):
        raise ConfigError(
            f"{section}.rpn_sizes needs one size per level of {settings.backbone} (strides {backbone.strides}), "
            f"got {len(settings.rpn_sizes)}"
        )
    return backbone


def warn_of_random_weights(backbone: str, setting: str) -> None:
    """Log that a ResNet has no pretrained weights; `setting` is where they are given."""
    log.warning(
        "%s starts from random weights and learns much more slowly: give `%s=FILE`, ImageNet's as torchvision has them",
        backbone,
        setting,
    )


def read_backbone(path: Path, setting: str = "backbone_weights") -> dict[str, Tensor]:
    """Read an ImageNet state from .safetensors, or from .pth without running code in it; errors name the setting."""
    if not path.is_file():
        raise ConfigError(f"`{setting}={path}`: no such file")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"`{setting}={path}`: not a plain state of tensors: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ConfigError(f"`{setting}={path}`: expected a dictionary of tensors")
    return state
