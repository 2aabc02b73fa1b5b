"""Bodies of backbones, the networks below the pyramid: the Body protocol, plug-ins, torchvision's MobileNets."""

from __future__ import annotations

import json
import math
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import UnionType
from typing import Protocol, TypeGuard, cast

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ezsd.detector.norms import FrozenNorm
from ezsd.detector.requirements import said
from ezsd.errors import BackboneError, EzsdError
from ezsd.plugins import fault, find_factory

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of red, green and blue in [0, 1]."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviation of red, green and blue."""
_TRIAL = (96, 64)
"""Height and width of the image that a body is tried out with: multiples of all strides, odd and even, not equal."""


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
    body = _called(factory, what, "the factory")
    if not isinstance(body, nn.Module):
        raise BackboneError(f"{what}: the factory made {reprlib.repr(body)}, expected a torch.nn.Module")
    _check_parts(body, what)
    body = cast("Body", body)
    _check_numbers(body, what)
    _check_fingerprint(_called(body.fingerprint, what, "its fingerprint()"), what)
    _check_stages(body, what)
    if weights is not None:
        try:
            found = cast("nn.Module", body).load_state_dict(dict(weights))
        except (RuntimeError, LookupError) as error:
            raise other_network(name, first_mismatch(error)) from error
        # A method of its own may take what is missing for granted.
        if missing := list(getattr(found, "missing_keys", [])):
            raise other_network(name, f"it has no {missing[0]}")
    return body


def _called(function: Callable[[], object], what: str, which: str) -> object:
    """Call a function of a plug-in. BackboneError where it fails, but for an error of ours that it raises."""
    try:
        return function()
    except EzsdError:
        raise
    except Exception as error:
        raise BackboneError(f"{what}: {which} fails: {fault(error)}") from error


def _check_parts(body: nn.Module, what: str) -> None:
    """Refuse a module that lacks a part of `Body`, or has a value where a method belongs."""
    missing = [part for part in ("strides", "mean", "std", "stages", "fingerprint") if not hasattr(body, part)]
    if missing:
        raise BackboneError(
            f"{what}: what the factory made is no Body, it lacks {', '.join(missing)}; add them as "
            "`ezsd.detector.bodies.Body` has them"
        )
    for part in ("stages", "fingerprint"):
        if not callable(value := getattr(body, part)):
            raise BackboneError(f"{what}: its {part} is {reprlib.repr(value)}, expected a method without arguments")


def _check_numbers(body: Body, what: str) -> None:
    strides = body.strides
    if not _are_numbers(strides, int) or not _are_of_a_pyramid(strides):
        raise BackboneError(
            f"{what}: its strides are {reprlib.repr(strides)}, expected a tuple of powers of two, each twice the one "
            "before, at most 32, such as (8, 16, 32)"
        )
    for part, least in (("mean", "0 or more"), ("std", "above 0")):
        values: object = getattr(body, part)
        said_of_it = f"{what}: its {part} is {reprlib.repr(values)}"
        if not _are_numbers(values, int | float) or len(values) != 3 or not all(map(math.isfinite, values)):
            raise BackboneError(f"{said_of_it}, expected a tuple of three numbers, for red, green and blue")
        if min(values) < 0 or (part == "std" and 0 in values):
            raise BackboneError(f"{said_of_it}, expected {least}")
        if max(values) > 1:
            raise BackboneError(
                f"{said_of_it}, expected that of pixels in [0, 1]; divide that of pixels up to 255 by 255"
            )


def _are_numbers(values: object, kind: type | UnionType) -> TypeGuard[Sequence[float]]:
    """Test for a tuple or list of Python's numbers, which JSON keeps; no bool."""
    return isinstance(values, tuple | list) and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)


def _are_of_a_pyramid(strides: Sequence[float]) -> bool:
    """Test for powers of two up to 32, each twice the one before."""
    doubled = [strides[0] * 2**i for i in range(len(strides))] if strides else []
    return bool(doubled) and list(strides) == doubled and strides[0] > 0 and 32 % strides[-1] == 0


def _check_fingerprint(found: object, what: str) -> None:
    if not isinstance(found, dict):
        raise BackboneError(
            f'{what}: its fingerprint is {reprlib.repr(found)}, expected a JSON object, such as {{"version": 1}}'
        )
    try:
        json.dumps(found, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BackboneError(
            f"{what}: its fingerprint is no JSON object: {error}; give plain numbers, texts, lists and dictionaries"
        ) from error


def _check_stages(body: Body, what: str) -> None:
    counts = Counter(
        cast("list[int]", _called(lambda: [id(p) for stage in body.stages() for p in stage], what, "its stages()"))
    )
    for key, parameter in cast("nn.Module", body).named_parameters():
        if counts[id(parameter)] != 1:
            raise BackboneError(
                f"{what}: {key} is {counts[id(parameter)]} times in its stages, expected once; return a list of "
                "lists, the parameters of the stem and of each stage"
            )


def other_network(name: str, wrong: str) -> BackboneError:
    """Error about weights of another network than the one of a name."""
    return BackboneError(f"backbone weights are not a state of {name}: {wrong}; give a file of the same network")


def first_line(error: Exception) -> str:
    """First line of an error, or its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def first_mismatch(error: Exception) -> str:
    """First fault that `load_state_dict` lists in its error."""
    lines = [line.strip() for line in str(error).splitlines()]
    fault = lines[1] if len(lines) > 1 else first_line(error)
    # All keys that are missing, or too many, stand in one line.
    return fault.partition(", ")[0] if "key(s) in state_dict" in fault else fault


class MobileNet(nn.Module):
    """Convolutions of torchvision's MobileNetV2 or V3, with the last map of each of the strides 8, 16 and 32.

    Args:
        name: one of `MOBILENETS`.
        weights: torchvision's ImageNet state, or None for random values.
    """

    strides = (8, 16, 32)
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    _ENDS: Mapping[str, tuple[int, ...]] = {
        # Its last convolution, to 1,280 channels, is made for the classifier alone.
        "mobilenet_v2": (1, 3, 6, 13, 17),
        "mobilenet_v3_large": (1, 3, 6, 12, 16),
        "mobilenet_v3_small": (0, 1, 3, 8, 12),
    }
    """Last layer of each of the strides 2, 4, 8, 16 and 32."""

    def __init__(self, name: str, weights: Mapping[str, Tensor] | None) -> None:
        super().__init__()
        network = getattr(torchvision.models, name)(weights=None)
        if weights is not None:
            load_classifier(network, name, weights, classifier="classifier.")
        self._ends = self._ENDS[name]
        self.features = network.features[: self._ends[-1] + 1]

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
    network = cast("nn.Module", body)
    with torch.enable_grad():
        maps = maps_of(network, body.strides, _TRIAL, what)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    sums = [one.sum() for one in maps if one.requires_grad]
    gradients = torch.autograd.grad(sums, trained, allow_unused=True) if sums else [None] * len(trained)
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)
    return [int(one.shape[1]) for one in maps]


def maps_of(network: nn.Module, strides: Sequence[int], size: tuple[int, int], what: str) -> list[Tensor]:
    """Maps of one black image, in evaluation mode.

    Args:
        network: a body, or a pyramid on one; on the CPU. It is in training mode afterwards.
        strides: input pixels per cell of each map.
        size: height and width of the image, multiples of 32.
        what: the setting and its value, for the message.

    Raises:
        BackboneError: it fails, or its maps are not of the sizes that its strides say.
    """
    image, pixels = torch.zeros(1, 3, *size), f"an image of {size[1]} x {size[0]} pixels"
    network.eval()
    try:
        maps = network(image)
    except Exception as error:
        raise BackboneError(f"{what}: fails on {pixels}: {fault(error)}") from error
    network.train()
    if not isinstance(maps, list | tuple) or not all(isinstance(one, Tensor) and one.ndim == 4 for one in maps):
        raise BackboneError(f"{what}: gives {_kind(maps)}, expected a list of maps (B, C, H, W)")
    wanted = [(1, size[0] // stride, size[1] // stride) for stride in strides]
    found = [(len(one), *one.shape[2:]) for one in maps]
    if found != wanted:
        raise BackboneError(
            f"{what}: gives maps (B, H, W) of {found} for {pixels}, expected {wanted} by its strides {tuple(strides)}"
        )
    if strange := [str(one.dtype) for one in maps if one.dtype != image.dtype]:
        raise BackboneError(f"{what}: gives maps of {strange[0]} for an image of {image.dtype}, expected the same type")
    return list(maps)


def _kind(maps: object) -> str:
    """Name of the type of something that is no list of maps, or the shapes in it."""
    if not isinstance(maps, list | tuple):
        return type(maps).__name__
    return f"a list of {', '.join(str(tuple(m.shape)) if isinstance(m, Tensor) else type(m).__name__ for m in maps)}"


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
                f"{what}: {path} is {type(module).__name__}, which has no frozen form, and its statistics would be "
                "those of a few images; take a body whose norms are torch.nn.BatchNorm2d, affine and with running "
                "statistics, or keep none"
            )
