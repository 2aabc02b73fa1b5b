"""The detector of a configuration, and the weights that its backbone begins with."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from ezsd.cache import differences, short_json
from ezsd.data.dataset import fitted, padded_size
from ezsd.detector.backbone import Pyramid, build_backbone, try_size
from ezsd.detector.bodies import first_line
from ezsd.detector.model import Detector
from ezsd.detector.proposer import Proposer
from ezsd.detector.requirements import TIMM
from ezsd.errors import BackboneError
from ezsd.pipeline.config.schema import Config, ModelConfig, ProposerConfig, TrainConfig
from ezsd.pipeline.errors import ConfigError, RunError
from ezsd.pipeline.files import as_json
from ezsd.pipeline.runs.run import Run, unlike_a_run
from ezsd.plugins import PLUGIN

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
        ConfigError: there is no such backbone, the weights do not fit it, or the anchor sizes do not fit its levels.
    """
    try:
        backbone = build_backbone(
            settings.backbone,
            channels=settings.fpn_channels,
            weights=weights,
            frozen_stages=settings.frozen_stages,
            frozen_norms=frozen_norms,
            section=section,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if len(settings.rpn_sizes) != len(backbone.strides):
        example = [4 * stride for stride in backbone.strides]
        raise ConfigError(
            f"{section}.rpn_sizes needs one size per level of {settings.backbone} (strides {backbone.strides}), "
            f"got {len(settings.rpn_sizes)}; for example `{section}.rpn_sizes={example}`"
        )
    return backbone


def require_sizes(
    section: str,
    settings: ModelConfig | ProposerConfig,
    backbone: Pyramid,
    limits: TrainConfig | ProposerConfig,
    sizes: NDArray[np.int32],
) -> None:
    """Try a backbone out on an image as large as a batch of the training may be, see `try_size`.

    Args:
        section: table of the backbone's settings.
        settings: of the backbone.
        backbone: on the CPU.
        limits: sizes that images are resized to.
        sizes: widths and heights of the images, (N, 2).

    Raises:
        ConfigError: the backbone does not take it.
    """
    short, long = limits.min_size, limits.max_size
    after = [fitted(height, width, short_side=short, long_side=long) for width, height in np.unique(sizes, axis=0)]
    if isinstance(limits, TrainConfig) and limits.scale_jitter:
        after.append((long, long))
    try:
        try_size(backbone, settings.backbone, padded_size(after), section)
    except BackboneError as error:
        raise ConfigError(str(error)) from error


def rate_groups(model: Detector | Proposer, backbone_lr_mult: float) -> list[tuple[list[nn.Parameter], float]]:
    """Parameters that are trained, by the factor of their learning rate; one group where it is 1 for all of them."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if backbone_lr_mult == 1:
        return [(trained, 1.0)]
    body = {id(parameter) for parameter in model.backbone.body_parameters()}
    groups = [
        ([parameter for parameter in trained if id(parameter) not in body], 1.0),
        ([parameter for parameter in trained if id(parameter) in body], backbone_lr_mult),
    ]
    return [(parameters, factor) for parameters, factor in groups if parameters]


def require_same_body(run: Run, backbone: Pyramid) -> None:
    """Raise RunError where a run was trained with another body of the same name."""
    recorded = run.spec.get("backbone") or {}
    if not isinstance(recorded, Mapping):
        raise unlike_a_run(f"`run={run.folder}`", "run.json: backbone: expected an object")
    changed = differences(recorded, as_json(backbone.fingerprint or {}))
    if changed:
        listed = [f"{one.name}: {short_json(one.stored)} then, {short_json(one.wanted)} now" for one in changed]
        raise RunError(
            f"`run={run.folder}`: the backbone is another one now, and the weights are not for it: {'; '.join(listed)}"
        )


_WEIGHTS = {TIMM: "the state of the whole model, as timm has it", PLUGIN: "a state that it takes"}


def warn_of_random_weights(backbone: str, setting: str, owner: str = "") -> None:
    """Log that a backbone has no pretrained weights.

    Args:
        backbone: its name.
        setting: name of the setting or option by which they are given.
        owner: whose backbone it is, in words.
    """
    kind = next(
        (kind for start, kind in _WEIGHTS.items() if backbone.startswith(start)), "ImageNet's as torchvision has them"
    )
    log.warning(
        "%s%s starts from random weights and learns much more slowly: give `%s=FILE`, %s",
        owner,
        backbone,
        setting,
        kind,
    )


def read_backbone(path: Path, setting: str = "backbone_weights") -> dict[str, Tensor]:
    """Read a pretrained state from .safetensors, or from .pth without running code in it; errors name the setting."""
    if not path.is_file():
        raise ConfigError(f"`{setting}={path}`: no such file")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    except Exception as error:
        raise ConfigError(
            f"`{setting}={path}`: not a plain state of tensors: {first_line(error)}; give .safetensors, or .pth of "
            "tensors alone"
        ) from error
    strange = {key: v for key, v in state.items() if not isinstance(v, Tensor)} if isinstance(state, dict) else None
    if strange is None or strange:
        found = type(state).__name__ if strange is None else f"{next(iter(strange))!r} that is none"
        raise ConfigError(
            f"`{setting}={path}`: expected a dictionary of tensors, found {found}; save a network's state_dict()"
        )
    return state
