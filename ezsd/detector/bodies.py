"""Bodies of backbones, the networks below the pyramid: the Body protocol, plug-ins, torchvision's MobileNetV3."""

from __future__ import annotations

import json
import math
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, cast, runtime_checkable

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ezsd.detector.norms import FrozenNorm
from ezsd.detector.requirements import said
from ezsd.errors import BackboneError
from ezsd.plugins import find_factory

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of red, green and blue in [0, 1]."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviation of red, green and blue."""
_TRIAL = (96, 64)
"""Height and width of the image that a body is tried out with: multiples of all strides, and not equal."""


@runtime_checkable
class Body(Protocol):
    """Interface of a backbone's body, a `torch.nn.Module` that turns images into feature maps.

    Its weights are those of a run, or those of a file, which `load_state_dict` is given: a body overrides that method
    where the file has other names or more.
    """

    @property
    def strides(self) -> Sequence[int]:
        """Input pixels per cell of each map, finest first: powers of two, each twice the one before, at most 32."""
        ...

    @property
    def mean(self) -> Sequence[float]:
        """Mean of red, green and blue in [0, 1], which is subtracted from the pixels."""
        ...

    @property
    def std(self) -> Sequence[float]:
        """Standard deviation of red, green and blue, by which the pixels are then divided."""
        ...

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Maps (B, C, H / stride, W / stride), one per stride, of normalised images (B, 3, H, W).

        H and W are multiples of 32. C may differ from map to map.
        """
        ...

    def stages(self) -> Sequence[Iterable[nn.Parameter]]:
        """All parameters: those of the stem, and then those of each stage, in the order in which they are used."""
        ...

    def fingerprint(self) -> dict[str, object]:
        """JSON object with everything that determines a map, but for weights, strides and normalisation."""
        ...


def load_plugin(name: str, weights: Mapping[str, Tensor] | None, section: str) -> Body:
    """Make the body of a plug-in.

    Args:
        name: plugin:package.module:factory; the factory is called without arguments.
        weights: state for `load_state_dict`, or None to leave the values as they are.
        section: table of the setting, for messages.

    Raises:
        BackboneError: there is no such factory, what it makes is no `Body`, or the state is another network's.
    """
    what = said(name, section)
    factory = find_factory(name, what, BackboneError)
    if not callable(factory):
        found_name = name.rpartition(":")[2]
        raise BackboneError(f"{what}: expected a factory, found {found_name} = {reprlib.repr(factory)}")
    try:
        body = factory()
    except TypeError as error:
        raise BackboneError(f"{what}: {error}") from error
    if not isinstance(body, nn.Module):
        raise BackboneError(f"{what}: the factory made {reprlib.repr(body)}, expected a torch.nn.Module")
    if not isinstance(body, Body):
        missing = [part for part in ("strides", "mean", "std", "stages", "fingerprint") if not hasattr(body, part)]
        raise BackboneError(f"{what}: what the factory made is no Body, it lacks {', '.join(missing)}")
    _check_numbers(body, what)
    _check_stages(body, what)
    if weights is not None:
        try:
            found = body.load_state_dict(dict(weights))
        except (RuntimeError, LookupError) as error:
            raise other_network(name, first_mismatch(error)) from error
        # A method of its own may take what is missing for granted.
        if missing := list(getattr(found, "missing_keys", [])):
            raise other_network(name, f"it has no {missing[0]}")
    return body


def _check_numbers(body: Body, what: str) -> None:
    strides, pixels = list(body.strides), [*body.mean, *body.std]
    if not strides or strides != [strides[0] * 2**i for i in range(len(strides))] or 32 % strides[-1]:
        raise BackboneError(
            f"{what}: its strides are {strides}, expected powers of two, each twice the one before, at most 32"
        )
    if len(body.mean) != 3 or len(body.std) != 3 or min(body.std) <= 0 or not all(map(math.isfinite, pixels)):
        raise BackboneError(
            f"{what}: its mean and std are {body.mean} and {body.std}, expected three numbers each, std above 0"
        )
    if min(pixels) < 0 or max(pixels) > 1:
        raise BackboneError(
            f"{what}: its mean and std are {body.mean} and {body.std}, expected those of pixels in [0, 1]; divide "
            "those of pixels up to 255 by 255"
        )
    try:
        json.dumps(body.fingerprint())
    except (TypeError, ValueError) as error:
        raise BackboneError(f"{what}: its fingerprint is no JSON object: {error}") from error


def _check_stages(body: Body, what: str) -> None:
    counts = Counter(id(parameter) for stage in body.stages() for parameter in stage)
    for key, parameter in cast("nn.Module", body).named_parameters():
        if counts[id(parameter)] != 1:
            raise BackboneError(f"{what}: {key} is {counts[id(parameter)]} times in its stages, expected once")


def other_network(name: str, wrong: str) -> BackboneError:
    """Error about weights of another network than the one of a name."""
    return BackboneError(f"backbone weights are not a state of {name}: {wrong}")


def first_line(error: Exception) -> str:
    """First line of an error, or its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def first_mismatch(error: Exception) -> str:
    """First fault that `load_state_dict` lists in its error."""
    lines = [line.strip() for line in str(error).splitlines()]
    fault = lines[1] if len(lines) > 1 else first_line(error)
    # All keys that are missing, or too many, stand in one line.
    return fault.partition(", ")[0] if "key(s) in state_dict" in fault else fault


class MobileNetV3(nn.Module):
    """Convolutions of torchvision's MobileNetV3, with the last map of each of the strides 8, 16 and 32.

    Args:
        name: one of `MOBILENETS`.
        weights: torchvision's ImageNet state, or None for random values.
    """

    strides = (8, 16, 32)
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    _ENDS: Mapping[str, tuple[int, ...]] = {
        "mobilenet_v3_large": (1, 3, 6, 12, 16),
        "mobilenet_v3_small": (0, 1, 3, 8, 12),
    }
    """Last layer of each of the strides 2, 4, 8, 16 and 32."""

    def __init__(self, name: str, weights: Mapping[str, Tensor] | None) -> None:
        super().__init__()
        network = getattr(torchvision.models, name)(weights=None)
        if weights is not None:
            load_classifier(network, name, weights, classifier="classifier.")
        self.features = network.features
        self._ends = self._ENDS[name]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps of normalised images (B, 3, H, W), see `Body`."""
        maps, last = [], images
        for number, layer in enumerate(self.features):
            last = layer(last)
            if number in self._ends[2:]:
                maps.append(last)
        return maps

    def stages(self) -> list[list[nn.Parameter]]:
        """Parameters by the stride that a layer ends at: 2, which is the stem, 4, 8, 16, 32."""
        begins = (0, *(end + 1 for end in self._ends))
        return [list(self.features[begin:end].parameters()) for begin, end in zip(begins, begins[1:], strict=False)]

    def fingerprint(self) -> dict[str, object]:
        """Empty: the name says it all."""
        return {}


def load_classifier(network: nn.Module, name: str, weights: Mapping[str, Tensor], *, classifier: str) -> None:
    """Load torchvision's ImageNet state into a network, all but its classifier.

    Raises:
        ValueError: the state is another network's; says what does not match.
    """
    # Frozen normalisation has no step counter.
    state = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked") and not k.startswith(classifier)}
    try:
        found = network.load_state_dict(state, strict=False)
    except RuntimeError as error:
        wrong = str(error).splitlines()[1].strip()
        raise ValueError(f"backbone weights are not an ImageNet state of {name}: {wrong}") from error
    missing = [k for k in found.missing_keys if not k.startswith(classifier)]
    if missing or found.unexpected_keys:
        wrong = (missing + list(found.unexpected_keys))[0]
        raise ValueError(f"backbone weights are not an ImageNet state of {name}: {wrong!r} does not match")


def try_out(body: Body, what: str) -> list[int]:
    """Channels of a body's maps, found with one image; parameters that no map depends on are not trained from then on.

    Several processes that train together wait for the gradient of every parameter that is trained.

    Args:
        body: on the CPU.
        what: the setting and its value, for the message.

    Raises:
        BackboneError: it fails, or its maps are not of the sizes that its strides say.
    """
    network = cast("nn.Module", body).eval()
    try:
        with torch.enable_grad():
            maps = body(torch.zeros(1, 3, *_TRIAL))
    except (RuntimeError, TypeError, ValueError, AssertionError, LookupError) as error:
        size = f"{_TRIAL[1]} x {_TRIAL[0]}"
        raise BackboneError(f"{what}: fails on an image of {size} pixels: {first_line(error)}") from error
    network.train()
    if not isinstance(maps, list | tuple) or not all(isinstance(one, Tensor) and one.ndim == 4 for one in maps):
        raise BackboneError(f"{what}: gives {type(maps).__name__}, expected a list of maps (B, C, H, W)")
    wanted = [(_TRIAL[0] // stride, _TRIAL[1] // stride) for stride in body.strides]
    found = [tuple(one.shape[2:]) for one in maps]
    if found != wanted:
        raise BackboneError(
            f"{what}: gives maps of {found} cells for an image of {_TRIAL}, expected {wanted} by its strides"
        )
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    sums = [one.sum() for one in maps if one.requires_grad]
    gradients = torch.autograd.grad(sums, trained, allow_unused=True) if sums else [None] * len(trained)
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)
    return [int(one.shape[1]) for one in maps]


def freeze_norms(body: nn.Module, what: str) -> None:
    """Replace all batch normalisation in a body by its frozen form: constant statistics, scale and shift.

    Args:
        body: with its weights.
        what: the setting and its value, for the message.

    Raises:
        BackboneError: some of it has no frozen form.
    """
    replaced: dict[int, FrozenNorm] = {}
    # A module may be reached by several paths: cutting a Sequential into parts leaves both.
    for path, module in list(body.named_modules(remove_duplicate=False)):
        if type(module) is nn.BatchNorm2d and module.affine and module.track_running_stats:
            frozen = replaced.setdefault(id(module), FrozenNorm(module.num_features, eps=module.eps))
            frozen.load_state_dict(module.state_dict())
            parent, _, name = path.rpartition(".")
            setattr(body.get_submodule(parent), name, frozen)
        elif isinstance(module, _BatchNorm):
            raise BackboneError(
                f"{what}: {path} is {type(module).__name__}, which has no frozen form: its statistics would be those "
                "of a few images"
            )
