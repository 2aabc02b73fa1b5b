"""The Teacher protocol and its implementation by open_clip.

A teacher embeds image crops and class names in one space. Any object with these methods is a teacher: an open_clip
model by name, the tiny model shipped with the package (`tiny-shapes`), or a plug-in (`plugin:package.module:factory`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import open_clip
import torch
import torch.nn.functional as F
from open_clip.constants import IMAGENET_MEAN, IMAGENET_STD, INCEPTION_MEAN, INCEPTION_STD
from torch import Tensor, nn

from ezsd.choices import Activation, Names, Normalisation, Precision
from ezsd.errors import TeacherError, VocabularyError
from ezsd.plugins import PLUGIN, find_factory
from ezsd.precision import has_bfloat16
from ezsd.teacher.requirements import TINY_SHAPES, require_teacher
from ezsd.teacher.weights import (
    activation_mismatch,
    load_checkpoint,
    require_activation,
    require_hub_file,
    require_transformers,
    transformers_missing,
)
from ezsd.transfer import to_device
from ezsd.vocabulary import canonical, clean_names, first_few, prompts, templates

__all__ = ["Teacher", "TeacherError", "device_of", "encode_crops", "load_teacher", "require_told_apart"]


log = logging.getLogger(__name__)

ALIKE = 1e-6
"""Largest distance from cosine 1 at which two text embeddings count as equal, so that their names are one class."""
_ROWS = 1024
"""Number of names that are compared with all others at once."""
_SHOWN = 3
"""Most names, or pairs of names, listed in one line."""
NORMALISATIONS: Mapping[Normalisation, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "openai": (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD),
    "inception": (INCEPTION_MEAN, INCEPTION_STD),
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "none": ((0.0,) * 3, (1.0,) * 3),
}
"""Mean and standard deviation of red, green and blue in [0, 1], for all published weights of open_clip."""


@runtime_checkable
class Teacher(Protocol):
    """Interface of a vision-language model for stage one."""

    name: str
    embed_dim: int
    """Dimension D of the embeddings."""
    input_size: int
    """Side of the square input crops, pixels."""
    logit_scale: float
    """Factor of the cosines before a softmax over class names."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Unit embeddings (B, D), float32, of RGB crops (B, 3, S, S), float in [0, 1]."""
        ...

    def encode_text(self, names: Sequence[str]) -> Tensor:
        """Unit embeddings (C, D), float32, of class names."""
        ...

    def layer_norms(self, *, vision_only: bool = False) -> Mapping[str, nn.Parameter]:
        """Parameters that re-normalisation tunes, by name; empty if there is nothing to tune."""
        ...

    def fingerprint(self) -> dict[str, object]:
        """JSON object with everything that determines an embedding, before re-normalisation."""
        ...


class OpenClipTeacher:
    """An open_clip model in evaluation mode with every weight frozen.

    Args:
        model: float32.
        name: what open_clip calls it.
        template: one or several, see `templates`.
        names: see `Names`.
        precision: "bf16" rounds the weights of convolutions and linear layers, and computes with them.
        descriptions: described names, each with sentences after it that take the place of its prompts.
        known_tokens: ids that the text tower has rows for, if not all.
    """

    def __init__(
        self,
        model: open_clip.CLIP,
        name: str,
        *,
        template: str | Sequence[str],
        names: Names = "raw",
        precision: Literal["fp32", "bf16"] = "fp32",
        descriptions: Sequence[Sequence[str]] = (),
        known_tokens: Tensor | None = None,
    ) -> None:
        preprocess = open_clip.get_model_preprocess_cfg(model)
        size = preprocess["size"]
        self._weights_sha256 = state_digest(model.state_dict())
        if precision == "bf16":
            model = _in_bf16(model, name)
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self.templates = templates(template)
        self.descriptions = {canonical(described): tuple(sentences) for described, *sentences in descriptions}
        self.names = names
        self.precision = precision
        self.input_size = int(size if isinstance(size, int) else size[0])
        self.mean, self.std = tuple(preprocess["mean"]), tuple(preprocess["std"])
        self.logit_scale = float(model.logit_scale.exp())
        self.device = model.logit_scale.device
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        """Number type of normalised crops."""
        self._mean, self._std = (_per_channel(values, self.device) for values in (self.mean, self.std))
        self.gain, self.shift = 1 / (255 * self._std.flatten()), -(self._mean / self._std).flatten()
        """Factor and summand (3,) that turn grey levels into normalised crops."""
        self._tokenizer = _tokenizer(name)
        self._known_tokens = known_tokens
        self._measured: set[str] = set()
        self.embed_dim = self._tried_out()

    @torch.no_grad()
    def _tried_out(self) -> int:
        """Dimension D of the embeddings, after a trial pass. TeacherError if a tower cannot compute in 16 bits."""
        try:
            if self.precision == "bf16":
                self.encode_image(torch.zeros(1, 3, self.input_size, self.input_size))
            return int(self.encode_text_tokens(self._tokenizer(["a"])).shape[1])
        except RuntimeError as error:
            if self.precision != "bf16":
                raise
            raise _fp32_alone(self.name, str(error).splitlines()[0]) from error

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Unit embeddings (B, D), float32, of RGB crops, see `Teacher`. Keeps the graph where gradients are enabled."""
        # In place: fresh memory for each of the two costs more than the arithmetic.
        return self.encode_normalised((pixels.to(self.device) - self._mean).div_(self._std))

    def encode_normalised(self, crops: Tensor) -> Tensor:
        """Unit embeddings (B, D), float32, of crops (B, 3, S, S) on the model's device, as `mean` and `std` scale them.

        Keeps the graph where gradients are enabled.
        """
        return F.normalize(self.model.encode_image(crops.to(self.dtype)).float(), dim=1)

    def use_template(self, template: str | Sequence[str]) -> None:
        """Make prompts of all names by a template from now on, those of described names too; see `templates`."""
        self.templates, self.descriptions = templates(template), {}

    def encode_text(self, names: Sequence[str]) -> Tensor:
        """Unit embeddings (C, D), float32, of class names, see `Teacher`.

        Several prompts of a name give the mean of their unit embeddings, normalised. A tokenizer truncates prompts
        longer than the model's context silently; this warns about them once.

        Raises:
            TeacherError: the model has no weights for a word.
        """
        tokens, counts = self.tokens(names)
        if len(tokens) == len(names):
            return self.encode_text_tokens(tokens)
        rows = torch.cat([self.encode_text_tokens(some) for some in tokens.split(_ROWS)])
        return F.normalize(torch.stack([own.mean(0) for own in rows.split(counts)]), dim=1)

    def tokens(self, names: Sequence[str]) -> tuple[Tensor, list[int]]:
        """Token rows (P, context) of all prompts of class names, in order, and the number of prompts of each name.

        Raises:
            TeacherError: the model has no weights for a word.
        """
        words = clean_names(names) if self.names == "clean" else names
        from_templates = zip(*(prompts(words, template) for template in self.templates), strict=True)
        said = [self.descriptions.get(canonical(n), own) for n, own in zip(names, from_templates, strict=True)]
        owners = [name for name, own in zip(names, said, strict=True) for _ in own]
        phrases = [prompt for own in said for prompt in own]
        tokens = self._tokenizer(phrases)
        self._warn_of_cuts(owners, phrases)
        if self._known_tokens is not None:
            for name, row in zip(owners, tokens, strict=True):
                if not torch.isin(row, self._known_tokens).all():
                    raise TeacherError(
                        f"teacher {self.name} has no weights for a word of {name!r}: it ships with the words of the "
                        f"shapes benchmark only; use those names or build the cache with another `teacher`"
                    )
        return tokens, [len(own) for own in said]

    def _warn_of_cuts(self, names: Sequence[str], said: Sequence[str]) -> None:
        new = {prompt: name for name, prompt in zip(names, said, strict=True) if prompt not in self._measured}
        self._measured |= new.keys()
        of_cut = [name for name, is_cut in zip(new.values(), self._are_cut(list(new)), strict=True) if is_cut]
        cut = list(dict.fromkeys(of_cut))
        if cut:
            log.warning(
                "teacher %s reads %d tokens of a prompt: the end is cut off, and makes no difference, for %s",
                self.name,
                self._tokenizer.context_length,
                first_few([repr(name) for name in cut], _SHOWN),
            )

    def _are_cut(self, said: list[str]) -> list[bool]:
        """Mark prompts that are longer than the context: with a context twice as long they have less padding."""
        if not said:
            return []
        length = self._tokenizer.context_length
        short, long = self._tokenizer(said), self._tokenizer(said, 2 * length)
        padding = self._tokenizer(["a"], 2 * length).mode().values
        added = (long == padding).sum(1) - (short == padding).sum(1)
        return [bool(count < length) for count in added]

    def encode_text_tokens(self, tokens: Tensor) -> Tensor:
        """Unit embeddings (C, D) of token rows (C, context)."""
        return F.normalize(self.model.encode_text(to_device(tokens, self.device)).float(), dim=1)

    def layer_norms(self, *, vision_only: bool = False) -> dict[str, nn.Parameter]:
        """Weights and biases of the LayerNorms of both towers or of one, chosen by module type and not by name.

        A vision tower without LayerNorms (a ResNet) offers the scale and shift of its batch norms instead; their
        statistics stay as published.
        """
        norms = {name: module for name, module in self.model.named_modules() if isinstance(module, nn.LayerNorm)}
        if not any(name.startswith("visual.") for name in norms):
            norms |= {
                n: m for n, m in self.model.visual.named_modules(prefix="visual") if isinstance(m, nn.BatchNorm2d)
            }
        return {
            f"{module_name}.{name}": parameter
            for module_name, module in norms.items()
            if not vision_only or module_name.startswith("visual.")
            for name, parameter in module.named_parameters(recurse=False)
        }

    def fingerprint(self) -> dict[str, object]:
        """JSON object with everything that determines an embedding, see `Teacher`.

        The digest of the weights is that of the tensors: a copy in another file format is the same teacher.
        """
        return {
            "name": self.name,
            "weights_sha256": self._weights_sha256,
            "activation": "quick_gelu" if has_quick_gelu(self.model) else "gelu",
            "input_size": self.input_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "template": self.templates[0] if len(self.templates) == 1 else list(self.templates),
            "names": self.names,
            "precision": self.precision,
            **({"descriptions_sha256": _digest_of(self.descriptions)} if self.descriptions else {}),
        }


def device_of(teacher: Teacher) -> torch.device:
    """Device that a teacher computes on; the CPU for a plug-in that names none."""
    return torch.device(getattr(teacher, "device", "cpu"))


def encode_crops(teacher: Teacher, crops: Tensor) -> Tensor:
    """Unit embeddings (B, D), float32, of crops (B, 3, S, S): uint8, or float in [0, 1]."""
    if crops.dtype != torch.uint8:
        return teacher.encode_image(crops)
    if isinstance(teacher, OpenClipTeacher) and teacher.device.type != "cpu":
        # Bytes cross, and are normalised in one pass.
        levels = to_device(crops, teacher.device)
        return teacher.encode_normalised(levels * teacher.gain[:, None, None] + teacher.shift[:, None, None])
    return teacher.encode_image(crops.float() / 255)


def _per_channel(values: Sequence[float], device: torch.device) -> Tensor:
    """Numbers of the three channels, (3, 1, 1)."""
    return torch.tensor(values, device=device)[:, None, None]


def _digest_of(descriptions: Mapping[str, Sequence[str]]) -> str:
    """Sha256 of descriptions by name, in whichever order."""
    return hashlib.sha256(json.dumps(descriptions, sort_keys=True).encode()).hexdigest()


def require_told_apart(names: Sequence[str], rows: Tensor) -> None:
    """Raise VocabularyError if two class names have equal text embeddings (see `ALIKE`), and so equal scores.

    Args:
        names: class names, (C,).
        rows: their unit text embeddings, (C, D).
    """
    exact = F.normalize(rows.detach().double().cpu(), dim=1)
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(exact), _ROWS):
        near = torch.triu(exact[start : start + _ROWS] @ exact.T > 1 - ALIKE, diagonal=start + 1)
        pairs += [(start + first, second) for first, second in near.nonzero().tolist()]
    if pairs:
        alike = first_few([f"{names[a]!r} from {names[b]!r}" for a, b in pairs], _SHOWN)
        raise VocabularyError(
            f"the teacher cannot tell {alike}: their text embeddings are equal; leave one of them out, or name it in "
            "other words"
        )


def load_teacher(
    name: str,
    weights: str | None,
    *,
    template: str | Sequence[str],
    descriptions: Sequence[Sequence[str]] = (),
    names: Names = "raw",
    activation: Activation | None = None,
    normalisation: Normalisation | None = None,
    precision: Precision = "fp32",
    device: str | torch.device = "cpu",
) -> Teacher:
    """Build the teacher that a command line names.

    Args:
        name: an open_clip model ("ViT-B-32-quickgelu"), one of its hub ("hf-hub:OWNER/NAME"), "tiny-shapes", or
            "plugin:package.module:factory".
        weights: an open_clip tag ("openai") or a local file (.safetensors, or .pt without pickled code); None is
            allowed for "tiny-shapes", hub models and plug-ins.
        template: prompt with one "{}" for the class name, or several; a plug-in makes its own prompts.
        descriptions: described names, each with sentences after it that take the place of its prompts.
        names: how the prompt says a class name.
        activation: what a local file was trained with; needed unless the file is a known one.
        normalisation: of the pixels, for a local file; needed where the published weights of the model differ in it.
        precision: "auto" is "bf16" where the device computes in it; a plug-in chooses its own.
        device: where it runs.

    Raises:
        TeacherError: unknown model, missing or unfit weights, an activation that is not the model's, a normalisation
            that nobody said, a package that is missing, no network for a tag or a hub model.
    """
    if normalisation is not None and (name == TINY_SHAPES or weights is None or not Path(weights).exists()):
        raise TeacherError(
            f"`teacher={name}`: teacher.normalisation={normalisation} is for a local file of an open_clip model; "
            f"leave it out, all other weights bring their own"
        )
    if name.startswith(PLUGIN):
        if precision == "bf16":
            raise TeacherError(f"`teacher={name}`: a plug-in chooses its own precision; leave teacher.precision out")
        if descriptions or not isinstance(template, str):
            left_out = "teacher.descriptions" if descriptions else "the list of teacher.template"
            raise TeacherError(f"`teacher={name}`: a plug-in makes its own prompts; leave {left_out} out")
        return _load_plugin(name, device)
    require_teacher(name, weights)
    model, known_tokens = _load_model(name, weights, activation, normalisation, device)
    wanted: Literal["fp32", "bf16"] = "bf16" if precision == "bf16" or _prefers_bf16(precision, device) else "fp32"
    return OpenClipTeacher(
        model,
        name,
        template=template,
        names=names,
        precision=wanted,
        descriptions=descriptions,
        known_tokens=known_tokens,
    )


def _load_model(
    name: str,
    weights: str | None,
    activation: Activation | None,
    normalisation: Normalisation | None,
    device: str | torch.device,
) -> tuple[open_clip.CLIP, Tensor | None]:
    """Load a float32 model, and the token ids it has rows for if it ships with only some of them."""
    if name == TINY_SHAPES:
        return _load_tiny(weights, device)
    if ":" not in name:
        require_transformers(f"`teacher={name}`", open_clip.get_model_config(name)["text_cfg"])
    if weights is None:
        if name.startswith("hf-hub:"):
            require_hub_file(f"`teacher={name}`", name.removeprefix("hf-hub:"), ["open_clip_config.json"])
        return _create(name, None, device, require_pretrained=True), None
    if Path(weights).exists():
        pixels = _preprocessing(name, weights, normalisation)
        model = _create(name, None, device, load_weights=False, force_preprocess_cfg=pixels)
        require_activation(name, Path(weights), activation, model_has_quick_gelu=has_quick_gelu(model))
        load_checkpoint(model, name, Path(weights))
        return model, None
    _require_tag(name, weights)
    return _create(name, weights, device, require_pretrained=True), None


def has_quick_gelu(model: nn.Module) -> bool:
    """Return whether a model uses QuickGELU, OpenAI's approximation of GELU."""
    return any(isinstance(module, open_clip.transformer.QuickGELU) for module in model.modules())


def _prefers_bf16(precision: Precision, device: str | torch.device) -> bool:
    if precision != "auto":
        return False
    if torch.device(device).type == "cuda":
        return has_bfloat16(torch.device(device))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


_NORMS = (nn.LayerNorm, nn.BatchNorm2d)
_WITH_QUERIES = (open_clip.transformer.AttentionalPooler, open_clip.transformer.TextTransformer)


def _in_bf16(model: open_clip.CLIP, name: str) -> open_clip.CLIP:
    """Copy a model with weights rounded to bfloat16, made by open_clip so that its LayerNorms compute in float32."""
    preprocess = open_clip.get_model_preprocess_cfg(model)
    device = model.logit_scale.device
    twin = _create(name, None, device, load_weights=False, precision="bf16", force_preprocess_cfg=preprocess)
    twin.load_state_dict(model.state_dict())
    # open_clip leaves CoCa's queries and class token in float32, and feeds them to attention in bfloat16.
    for module in twin.modules():
        for own in ("query", "cls_emb") if isinstance(module, _WITH_QUERIES) else ():
            if isinstance(parameter := getattr(module, own, None), nn.Parameter):
                parameter.data = parameter.data.bfloat16()
    rounded = [n for n, m in twin.named_modules() if isinstance(m, _NORMS) and m.weight.dtype != torch.float32]
    if rounded:
        raise _fp32_alone(
            name,
            f"open_clip rounds {rounded[0]} and others of its norms too, whose tuning would be lost in the rounding",
        )
    return twin


def _fp32_alone(name: str, reason: str) -> TeacherError:
    return TeacherError(f"`teacher={name}`: cannot be used in bf16 ({reason}); use `teacher.precision=fp32`")


class Tokenizer(Protocol):
    """Common interface of open_clip's tokenizers."""

    context_length: int

    def __call__(self, texts: list[str], context_length: int | None = None) -> Tensor:
        """Token rows (N, context), cut or padded to the context."""
        ...


@functools.cache
def _tiny_tokenizer() -> Tokenizer:
    """Tokenizer of the packaged model. Kept: it reads 49,000 merges, and a build loads its teacher twice."""
    tokenizer: Tokenizer = open_clip.get_tokenizer(TINY_SHAPES)
    return tokenizer


def _tokenizer(name: str) -> Tokenizer:
    if name == TINY_SHAPES:
        return _tiny_tokenizer()
    try:
        tokenizer: Tokenizer = open_clip.get_tokenizer(name)
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise transformers_missing(f"`teacher={name}`") from error
    except (OSError, ImportError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TeacherError(f"`teacher={name}`: its tokenizer cannot be had: {reason}") from error
    return tokenizer


def _preprocessing(name: str, weights: str, stated: Normalisation | None) -> dict[str, Any]:
    """Mean and standard deviation of pixels for a local file: as stated, or as in all published weights of the model.

    A model without published weights has open_clip's own. TeacherError where its published weights differ.
    """
    if stated is not None:
        mean, std = NORMALISATIONS[stated]
        return {"mean": mean, "std": std}
    tags = open_clip.list_pretrained_tags_by_model(name)
    of_tags = [open_clip.get_pretrained_cfg(name, tag) for tag in tags]
    shared = {(cfg.get("mean"), cfg.get("std")) for cfg in of_tags}
    if len(shared) > 1:
        known = [
            f"{key} ({_tags_with(of_tags, tags, values)})" for key, values in NORMALISATIONS.items() if values in shared
        ]
        raise TeacherError(
            f"`weights={weights}`: published weights of {name} differ in the mean and deviation of pixels, and "
            f"embeddings are silently wrong with the wrong ones; say `teacher.normalisation={' or '.join(known)}`"
        )
    for mean, std in shared:
        if mean and std:
            return {"mean": mean, "std": std}
    return {}


def _tags_with(configs: Sequence[Mapping[str, Any]], tags: Sequence[str], values: tuple[tuple[float, ...], ...]) -> str:
    """The first tags whose weights have a given mean and standard deviation of pixels."""
    mine = [t for t, cfg in zip(tags, configs, strict=True) if (cfg.get("mean"), cfg.get("std")) == values]
    return ", ".join(mine[:3]) + (", ..." if len(mine) > 3 else "")


def _load_plugin(name: str, device: str | torch.device) -> Teacher:
    if name.count(":") != 2:
        raise TeacherError(f"`teacher={name}`: expected plugin:package.module:factory")
    factory = find_factory(name, f"`teacher={name}`", TeacherError)
    try:
        teacher = factory(device=str(device))
    except TypeError as error:
        raise TeacherError(f"`teacher={name}`: {error}") from error
    if not isinstance(teacher, Teacher):
        numbers, methods = "name embed_dim input_size logit_scale", "encode_image encode_text layer_norms fingerprint"
        missing = [part for part in f"{numbers} {methods}".split() if not hasattr(teacher, part)]
        raise TeacherError(f"`teacher={name}`: what the factory made is no Teacher, it lacks {', '.join(missing)}")
    return teacher


def _load_tiny(weights: str | None, device: str | torch.device) -> tuple[open_clip.CLIP, Tensor | None]:
    with as_file(files("ezsd.weights") / f"{TINY_SHAPES}.json") as config:
        open_clip.add_model_config(config)
    model = _create(TINY_SHAPES, None, device)
    with as_file(shipped_weights()) as shipped:
        return model, load_checkpoint(model, TINY_SHAPES, Path(weights) if weights else shipped)


def shipped_weights() -> Traversable:
    """The file with the weights of `tiny-shapes`."""
    return files("ezsd.weights") / f"{TINY_SHAPES}.safetensors"


def _create(name: str, tag: str | None, device: str | torch.device, **options: object) -> open_clip.CLIP:
    logging.getLogger("open_clip").setLevel(logging.ERROR)
    root_level = logging.root.level
    # open_clip logs through the root logger, and warns of "random initialisation" before we load the file ourselves.
    logging.root.setLevel(logging.CRITICAL)
    try:
        return open_clip.create_model(name, pretrained=tag, device=device, **options)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        weights = f" `weights={tag}`" if tag else ""
        raise TeacherError(f"`teacher={name}`{weights}: {reason}") from error
    finally:
        logging.root.setLevel(root_level)


def _require_tag(name: str, tag: str) -> None:
    """Refuse a tag that does not exist, has another activation than the model, or cannot be downloaded now."""
    if ":" in name:
        raise TeacherError(
            f"`teacher={name}` `weights={tag}`: a hub model brings its weights; give a local file or none"
        )
    pretrained = open_clip.get_pretrained_cfg(name, tag)
    if not pretrained:
        raise TeacherError(f"`teacher={name}` has no weights tagged {tag!r}; give a known tag or a local file")
    wants = bool(pretrained.get("quick_gelu", False))
    has = bool((open_clip.get_model_config(name) or {}).get("quick_gelu", False))
    if wants != has:
        raise activation_mismatch(f"`teacher={name}` `weights={tag}`", name, wants=wants)
    if pretrained.get("hf_hub"):
        repository, file_name = pretrained["hf_hub"].rstrip("/"), None
        if repository.count("/") > 1:
            repository, file_name = repository.rsplit("/", 1)
        names = [file_name] if file_name else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
        kind = "quickgelu" if wants else "gelu"
        require_hub_file(f"`teacher={name}` `weights={tag}`", repository, names, activation=kind)


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Content digest of named tensors, independent of file format and order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
