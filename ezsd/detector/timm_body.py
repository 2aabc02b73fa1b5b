"""Bodies of backbones from timm: any model that gives feature maps of the strides 8, 16 and 32."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

import timm
from timm.layers.norm_act import freeze_batch_norm_2d
from timm.models import FeatureInfo, PretrainedCfg
from torch import Tensor, nn

from ezsd.detector.bodies import first_line, first_mismatch, other_network
from ezsd.detector.requirements import TIMM, said
from ezsd.errors import BackboneError

_FAULTS = (RuntimeError, NotImplementedError, AssertionError, AttributeError, LookupError, TypeError, ValueError)
"""Errors by which timm's models refuse to give feature maps, or to take a state."""
_STAGES = 5
"""Stem, and stages that end at the strides 4, 8, 16 and 32."""


class TimmBody(nn.Module):
    """Feature extractor of a timm model, with its maps of the strides 8, 16 and 32.

    Args:
        name: "timm:MODEL" or "timm:MODEL.TAG"; the tag says whose pixel normalisation it has.
        weights: state of the whole model, or None for random values.
        section: table of the setting, for messages.
        frozen_norms: whether batch normalisation has its frozen form, see `ezsd.detector.bodies.freeze_norms`.

    Raises:
        BackboneError: the tag is unknown or has to be said, the model gives no such maps, or the state is another's.
    """

    strides = (8, 16, 32)

    def __init__(
        self, name: str, weights: Mapping[str, Tensor] | None, section: str, *, frozen_norms: bool = False
    ) -> None:
        super().__init__()
        self._name, self._section = name, section
        self.mean, self.std = normalisation(name, section, pretrained=weights is not None)
        self.network = self._extractor({} if weights is None else self._state(weights))
        info = cast("FeatureInfo", self.network.feature_info)
        self._ends = list(zip(info.module_name(), info.reduction(), strict=True))
        found = info.reduction()
        if not set(self.strides) <= set(found):
            raise BackboneError(
                f"{self._said}: gives maps of the strides {', '.join(map(str, found))}, expected 8, 16 and 32 among "
                f"them; choose a model with stages, such as {TIMM}resnet18"
            )
        # The last map of a stride is the deepest.
        self._taken = [len(found) - 1 - found[::-1].index(stride) for stride in self.strides]
        self._channels_last = getattr(self.network, "output_fmt", "NCHW") == "NHWC"
        if frozen_norms:
            # Its norms have the activation in them.
            freeze_batch_norm_2d(self.network)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps of normalised images (B, 3, H, W), see `Body`."""
        maps = self.network(images)
        taken = [maps[place] for place in self._taken]
        return [one.permute(0, 3, 1, 2) for one in taken] if self._channels_last else taken

    def stages(self) -> list[list[nn.Parameter]]:
        """Parameters of the stem, and of the stages that end at the strides 4, 8, 16 and 32.

        Raises:
            BackboneError: timm does not say where a stage ends.
        """
        found: list[list[nn.Parameter]] = [[] for _ in range(_STAGES)]
        end, inside = 0, False
        for name, module in _whole(self.network).named_modules():
            within = self._is_within(name, end)
            if inside and not within:
                end += 1
                within = self._is_within(name, end)
            inside = within
            found[self._stage(end, within)] += module.parameters(recurse=False)
        if end + inside < len(self._ends):
            raise BackboneError(
                f"{self._said}: timm does not say which parameters belong to which of its stages; set "
                f"`{self._section}.frozen_stages=-1` to train them all"
            )
        return found

    def fingerprint(self) -> dict[str, object]:
        """Empty: the name says it all."""
        return {}

    @property
    def _said(self) -> str:
        return said(self._name, self._section)

    def _is_within(self, name: str, end: int) -> bool:
        """Test whether a module is the one that the map number `end` comes from, or is in it."""
        if end == len(self._ends):
            return False
        # Extractors write the first dot of a name as an underscore.
        flat, last = name.replace(".", "_"), self._ends[end][0].replace(".", "_")
        return flat == last or flat.startswith(f"{last}_")

    def _stage(self, end: int, within: bool) -> int:
        """Stage of a module that stands before the end of the map number `end`, or within it."""
        if end == 0 and not within:
            return 0
        # What comes after the last map has no gradient.
        stride = self._ends[min(end, len(self._ends) - 1)][1]
        return min(max(int(math.log2(stride)) - 1, 0), _STAGES - 1)

    @property
    def _model(self) -> str:
        return self._name.removeprefix(TIMM)

    def _create(self, **options: Any) -> nn.Module:  # noqa: ANN401 - those of timm
        if _config(self._model).fixed_input_size:
            # One that was trained with one size of images may take all, if it is told to.
            with contextlib.suppress(TypeError):
                return timm.create_model(self._model, strict_img_size=False, **options)
        return timm.create_model(self._model, **options)

    def _extractor(self, options: dict[str, Any]) -> nn.Module:
        try:
            with _quiet():
                return self._create(features_only=True, **options)
        except _FAULTS as error:
            raise BackboneError(
                f"{self._said}: gives no feature maps (features_only of timm): {first_line(error)}"
            ) from error

    def _state(self, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """Options by which a model takes its values from a state. BackboneError for that of another model."""
        if not weights:
            # To timm it would be as good as none, and it would look for the published ones.
            raise other_network(self._name, "it holds no tensors")
        classifier = _config(self._model).classifier or ""
        rows = weights.get(f"{classifier if isinstance(classifier, str) else classifier[0]}.weight")
        classes = 0 if rows is None else len(rows)
        overlay = {"state_dict": dict(weights), "num_classes": classes}
        try:
            # The whole model takes all or nothing, while an extractor takes from a state what it knows.
            self._create(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes)
        except _FAULTS as error:
            raise other_network(self._name, first_mismatch(error)) from error
        return {"pretrained": True, "pretrained_cfg_overlay": overlay | {"state_dict": dict(weights)}}


def normalisation(name: str, section: str, *, pretrained: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the pixels that a model's published weights were trained with.

    Args:
        name: "timm:MODEL" or "timm:MODEL.TAG", of a model that there is.
        section: table of the setting, for messages.
        pretrained: whether it gets weights: whose they are has to be said then, where it matters.

    Raises:
        BackboneError: the tag is unknown or has to be said.
    """
    full = name.removeprefix(TIMM)
    model, _, tag = full.partition(".")
    published = timm.list_models(f"{model}.*", include_tags=True)
    if tag and full not in published:
        known = ", ".join(one.partition(".")[2] for one in published)
        raise BackboneError(f"{said(name, section)}: no weights of {model} are tagged {tag!r}; known are {known}")
    if pretrained and not tag:
        first = {(_config(one).mean, _config(one).std): f"{TIMM}{one}" for one in reversed(published)}
        if len(first) > 1:
            raise BackboneError(
                f"{said(name, section)}: published weights of {model} differ in the mean and deviation of pixels; say "
                f"whose the file has, such as `{section}.backbone={sorted(first.values())[0]}`"
            )
    config = _config(full)
    return tuple(config.mean), tuple(config.std)


def _config(model: str) -> PretrainedCfg:
    """Facts about the published weights of a model and tag, or timm's defaults where there are none."""
    return timm.get_pretrained_cfg(model) or PretrainedCfg()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without timm's list of what an extractor has no use for."""
    log = logging.getLogger("timm")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _whole(network: nn.Module) -> nn.Module:
    """The model within an extractor that leaves it as it is; the extractor itself where it took the model apart."""
    children = dict(network.named_children())
    return children.popitem()[1] if children.keys() in ({"model"}, {"body"}) else network
