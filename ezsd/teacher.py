"""The Teacher protocol, and open_clip behind it.

A teacher embeds image crops and class names in one space. Anything with these methods will do: an open_clip model by
name, the tiny model that the package ships (`tiny-shapes`), or a plug-in (`plugin:package.module:factory`).
"""

from __future__ import annotations

import hashlib
import importlib
import logging
from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Protocol, runtime_checkable

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ezsd.vocabulary import prompts

log = logging.getLogger(__name__)

TINY_SHAPES = "tiny-shapes"
"""Name of the shipped teacher of the `shapes` benchmark: a real open_clip model of 0.9 M parameters in use."""


class TeacherError(ValueError):
    """A teacher cannot be had as asked for; the message says what to bring."""


@runtime_checkable
class Teacher(Protocol):
    """What stage one needs of a vision-language model."""

    name: str
    embed_dim: int
    """D."""
    input_size: int
    """Side of the square crops it takes, pixels."""
    logit_scale: float
    """Multiplier of cosines before a softmax over names."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Unit embeddings (B, D), float32, of RGB crops (B, 3, S, S), float in [0, 1]."""
        ...

    def encode_text(self, names: Sequence[str]) -> Tensor:
        """Unit embeddings (C, D), float32, of class names."""
        ...

    def layer_norms(self, *, vision_only: bool = False) -> Mapping[str, nn.Parameter]:
        """Parameters that re-normalisation tunes, by name; empty where there is nothing to tune."""
        ...

    def fingerprint(self) -> dict[str, object]:
        """JSON of everything that decides an embedding, before any re-normalisation."""
        ...


class OpenClipTeacher:
    """An open_clip model in evaluation mode with every weight frozen."""

    def __init__(self, model: open_clip.CLIP, name: str, *, template: str, known_tokens: Tensor | None = None) -> None:
        preprocess = open_clip.get_model_preprocess_cfg(model)
        size = preprocess["size"]
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self.template = template
        self.input_size = int(size if isinstance(size, int) else size[0])
        self.mean, self.std = tuple(preprocess["mean"]), tuple(preprocess["std"])
        self.logit_scale = float(model.logit_scale.exp())
        self.device = model.logit_scale.device
        self._tokenizer = open_clip.get_tokenizer(name)
        self._known_tokens = known_tokens
        self._weights_sha256 = state_digest(model.state_dict())
        self.embed_dim = int(self.encode_text_tokens(self._tokenizer(["a"])).shape[1])

    def encode_image(self, pixels: Tensor) -> Tensor:
        """See `Teacher`. Keeps the graph where gradients are enabled."""
        mean = torch.tensor(self.mean, device=self.device)[:, None, None]
        std = torch.tensor(self.std, device=self.device)[:, None, None]
        embedding = self.model.encode_image((pixels.to(self.device) - mean) / std)
        return F.normalize(embedding.float(), dim=1)

    def encode_text(self, names: Sequence[str]) -> Tensor:
        """See `Teacher`. TeacherError for a word the model has no weights for."""
        tokens = self._tokenizer(list(prompts(names, self.template)))
        if self._known_tokens is not None:
            for name, row in zip(names, tokens, strict=True):
                if not torch.isin(row, self._known_tokens).all():
                    raise TeacherError(
                        f"teacher {self.name} has no weights for a word of {name!r}: it ships with the words of the "
                        f"shapes benchmark only; use those names or build the cache with another --teacher"
                    )
        return self.encode_text_tokens(tokens)

    def encode_text_tokens(self, tokens: Tensor) -> Tensor:
        """Unit embeddings (C, D) of token rows (C, context)."""
        return F.normalize(self.model.encode_text(tokens.to(self.device)).float(), dim=1)

    def layer_norms(self, *, vision_only: bool = False) -> dict[str, nn.Parameter]:
        """Weights and biases of the LayerNorms of both towers or of one, chosen by module type and not by name."""
        return {
            f"{module_name}.{name}": parameter
            for module_name, module in self.model.named_modules()
            if isinstance(module, nn.LayerNorm) and (not vision_only or module_name.startswith("visual."))
            for name, parameter in module.named_parameters(recurse=False)
        }

    def fingerprint(self) -> dict[str, object]:
        """See `Teacher`. The weights' digest is of tensors, so a copy or another file format is the same teacher."""
        quick = any(isinstance(m, open_clip.transformer.QuickGELU) for m in self.model.modules())
        return {
            "name": self.name,
            "weights_sha256": self._weights_sha256,
            "activation": "quick_gelu" if quick else "gelu",
            "input_size": self.input_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "template": self.template,
            "precision": "fp32",
        }


def load_teacher(name: str, weights: str | None, *, template: str, device: str | torch.device = "cpu") -> Teacher:
    """Build the teacher that a command line names.

    Args:
        name: an open_clip model ("ViT-B-32-quickgelu"), "tiny-shapes", or "plugin:package.module:factory".
        weights: an open_clip tag ("openai") or a local file (.safetensors, or .pt without pickled code); None is
            allowed for "tiny-shapes" and plug-ins.
        template: prompt with one "{}" for the class name; a plug-in makes its own prompts.
        device: where it runs.

    Raises:
        TeacherError: unknown model, missing or unfit weights, no network for a tag.
    """
    if name.startswith("plugin:"):
        return _load_plugin(name, device)
    if name == TINY_SHAPES:
        return _load_tiny(weights, template=template, device=device)
    if name not in open_clip.list_models() and ":" not in name:
        raise TeacherError(f"--teacher {name}: no such open_clip model; `open_clip.list_models()` names them all")
    if weights is None and ":" not in name:
        raise TeacherError(f"--teacher {name} needs --weights: a tag such as openai, or a local .safetensors file")
    if weights is not None and Path(weights).exists():
        model = _create(name, None, device)
        load_weights(model, Path(weights))
        return OpenClipTeacher(model, name, template=template)
    if weights is not None and Path(weights).suffix in {".safetensors", ".pt", ".pth", ".bin"}:
        raise TeacherError(f"--weights {weights}: no such file")
    _require_same_activation(name, weights)
    return OpenClipTeacher(_create(name, weights, device), name, template=template)


def _load_plugin(name: str, device: str | torch.device) -> Teacher:
    parts = name.split(":")
    if len(parts) != 3:
        raise TeacherError(f"--teacher {name}: expected plugin:package.module:factory")
    try:
        factory = getattr(importlib.import_module(parts[1]), parts[2])
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise TeacherError(f"--teacher {name}: {error}; is its folder on PYTHONPATH?") from error
    try:
        teacher = factory(device=str(device))
    except TypeError as error:
        raise TeacherError(f"--teacher {name}: {error}") from error
    if not isinstance(teacher, Teacher):
        numbers, methods = "name embed_dim input_size logit_scale", "encode_image encode_text layer_norms fingerprint"
        missing = [part for part in f"{numbers} {methods}".split() if not hasattr(teacher, part)]
        raise TeacherError(f"--teacher {name}: what the factory made is no Teacher, it lacks {', '.join(missing)}")
    return teacher


def _load_tiny(weights: str | None, *, template: str, device: str | torch.device) -> Teacher:
    with as_file(files("ezsd.weights") / f"{TINY_SHAPES}.json") as config:
        open_clip.add_model_config(config)
    model = _create(TINY_SHAPES, None, device)
    with as_file(shipped_weights()) as shipped:
        known = load_weights(model, Path(weights) if weights else shipped)
    return OpenClipTeacher(model, TINY_SHAPES, template=template, known_tokens=known)


def shipped_weights() -> Traversable:
    """The file with the weights of `tiny-shapes`."""
    return files("ezsd.weights") / f"{TINY_SHAPES}.safetensors"


def _create(name: str, tag: str | None, device: str | torch.device) -> open_clip.CLIP:
    logging.getLogger("open_clip").setLevel(logging.ERROR)
    root_level = logging.root.level
    # open_clip logs through the root logger, and warns of "random initialisation" before we load the file ourselves.
    logging.root.setLevel(logging.CRITICAL)
    try:
        model = open_clip.create_model(name, pretrained=tag, device=device, require_pretrained=bool(tag))
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TeacherError(
            f"--teacher {name} --weights {tag}: {reason}. Without a network, download the model's .safetensors file "
            f"elsewhere and give its path as --weights FILE"
        ) from error
    finally:
        logging.root.setLevel(root_level)
    return model


def load_weights(model: open_clip.CLIP, path: Path) -> Tensor | None:
    """Load a local file into an open_clip model; returns the token ids it has rows for when it ships only some.

    Raises:
        TeacherError: not readable, another model's, or with code in it.
    """
    try:
        state = load_file(path) if path.suffix == ".safetensors" else None
        if state is not None and "token_embedding.ids" in state:
            return _load_compact(model, state)
        open_clip.load_checkpoint(model, str(path), weights_only=True)
    except Exception as error:
        # A file that is no state at all fails in open_clip's loader in a dozen ways; all mean the same to its owner.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = lines[1] if lines[0].startswith("Error(s) in loading") and len(lines) > 1 else lines[0]
        raise TeacherError(
            f"--weights {path}: not loadable into this model: {reason}. Expected an open_clip state as .safetensors, "
            f"or as .pt without pickled code"
        ) from error
    return None


def _load_compact(model: open_clip.CLIP, state: dict[str, Tensor]) -> Tensor:
    ids = state.pop("token_embedding.ids")
    rows = state.pop("token_embedding.rows").float()
    table = torch.zeros(model.token_embedding.num_embeddings, rows.shape[1])
    table[ids] = rows
    state["token_embedding.weight"] = table
    model.load_state_dict({name: value.float() for name, value in state.items()}, strict=False)
    missing = {n for n, _ in model.named_parameters()} - set(state)
    if missing:
        raise ValueError(f"weights lack {sorted(missing)[0]} and {len(missing) - 1} more")
    return ids


def _require_same_activation(name: str, tag: str | None) -> None:
    """Refuse a tag whose weights were trained with QuickGELU in a model that has GELU, and the reverse."""
    if tag is None:
        return
    pretrained = open_clip.get_pretrained_cfg(name, tag)
    if not pretrained:
        raise TeacherError(f"--teacher {name} has no weights tagged {tag!r}; give a known tag or a local file")
    wants = bool(pretrained.get("quick_gelu", False))
    has = bool((open_clip.get_model_config(name) or {}).get("quick_gelu", False))
    if wants != has:
        cure = f"--teacher {name}-quickgelu" if wants else f"--teacher {name.removesuffix('-quickgelu')}"
        raise TeacherError(
            f"--teacher {name} --weights {tag}: the weights expect {'QuickGELU' if wants else 'GELU'}, the model has "
            f"{'QuickGELU' if has else 'GELU'}, and embeddings would be silently wrong; use {cure}"
        )


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Content digest of named tensors, independent of file format and order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
