"""Weights of open_clip models: checks of local files, and of the availability of published ones."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import huggingface_hub
import open_clip
import torch
from safetensors.torch import load_file
from torch import Tensor

from ezsd.errors import TeacherError

# Files as their publishers have them, by sha256. open_clip checks the activation of its tags only, not of files.
_KNOWN: dict[str, Literal["gelu", "quickgelu"]] = {
    # open_clip_model.safetensors of timm/vit_base_patch32_clip_224.openai
    "e6d1bd7789aa45192b3bf90570a789b478bae1b74ebcce7eddd908e83a2b7c31": "quickgelu",
}
_HUB_SECONDS = 5.0


def require_activation(name: str, path: Path, stated: str | None, *, model_has_quick_gelu: bool) -> None:
    """Refuse a local file of weights whose activation is unknown or differs from the model's.

    Args:
        name: the open_clip model.
        path: the file.
        stated: activation given by the user, "gelu" or "quickgelu"; None to rely on the known files.
        model_has_quick_gelu: whether the model uses QuickGELU.

    Raises:
        TeacherError: as above, or the user's activation contradicts that of a known file.
    """
    known = _KNOWN.get(_sha256(path)) if path.is_file() else stated
    if known and stated and known != stated:
        raise TeacherError(f"`weights={path}`: these are published weights trained with {known}, not {stated}")
    activation = known or stated
    if activation is None:
        raise TeacherError(
            f"`weights={path}`: a file that ezsd does not know, and embeddings are silently wrong with the wrong "
            f"activation; say `activation=quickgelu` (OpenAI's and their kin) or `activation=gelu` (most others)"
        )
    if (activation == "quickgelu") != model_has_quick_gelu:
        raise activation_mismatch(f"`teacher={name}` `weights={path}`", name, wants=activation == "quickgelu")


def activation_mismatch(where: str, name: str, *, wants: bool) -> TeacherError:
    """Error for weights with QuickGELU in a model with GELU, or the reverse."""
    cure = f"{name}-quickgelu" if wants else name.removesuffix("-quickgelu")
    has = f"use `teacher={cure}`" if cure in open_clip.list_models() else f"open_clip has no {cure} to use instead"
    expected, found = ("QuickGELU", "GELU") if wants else ("GELU", "QuickGELU")
    return TeacherError(
        f"{where}: the weights expect {expected}, the model has {found}, and embeddings would be silently wrong; {has}"
    )


def require_transformers(where: str, text: Mapping[str, object]) -> None:
    """Refuse a model whose text tower or tokenizer needs the package transformers, if it is not installed.

    Args:
        where: the options that requested the model, for the message.
        text: open_clip's settings of the text tower.
    """
    if (text.get("hf_model_name") or text.get("hf_tokenizer_name")) and find_spec("transformers") is None:
        raise transformers_missing(where)


def transformers_missing(where: str) -> TeacherError:
    """Error for a model that needs the package transformers."""
    return TeacherError(
        f"{where}: its text side needs the package transformers, which is not installed: pip install "
        f"'ezsd[transformers]'"
    )


def load_checkpoint(model: open_clip.CLIP, name: str, path: Path) -> Tensor | None:
    """Load a local file into an open_clip model; returns the token ids it has rows for when it ships only some.

    Raises:
        TeacherError: not readable, another model's, or with code in it.
    """
    if _is_torchscript(path):
        raise TeacherError(
            f"`weights={path}`: a TorchScript archive, as OpenAI's are, which cannot be loaded without running code "
            f"out of it; bring {_safe_twin(name)} instead"
        )
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
            f"`weights={path}`: not loadable into this model: {reason}. Expected an open_clip state as .safetensors, "
            f"or as .pt without pickled code"
        ) from error
    return None


def require_hub_file(where: str, repository: str, names: Sequence[str], *, activation: str | None = None) -> None:
    """Require that one of several files of a Hugging Face repository is available; tries only once.

    The download itself tries again for most of a minute before it says that there is no network.

    Args:
        where: the options that requested the file, for the message.
        repository: OWNER/NAME.
        names: the files; one of them is enough.
        activation: activation of the weights, for the message.

    Raises:
        TeacherError: none is in the local cache, and the hub does not have them or cannot be reached.
    """
    if any(isinstance(huggingface_hub.try_to_load_from_cache(repository, name), str) for name in names):
        return
    reason = ""
    for name in names:
        try:
            address = huggingface_hub.hf_hub_url(repository, name)
            huggingface_hub.get_hf_file_metadata(address, timeout=_HUB_SECONDS)
        except Exception as error:
            # Which exceptions come out depends on the client's version, its transport and its settings.
            reason = reason or (str(error).splitlines() or [type(error).__name__])[0]
        else:
            return
    also = f"`activation={activation}` and " if activation else ""
    bring = "open_clip_model.safetensors" if activation is None else names[0]
    raise TeacherError(
        f"{where}: {repository} cannot be had ({reason}). Without a network, download {bring} of huggingface.co/"
        f"{repository} elsewhere and give {also}its path as `weights=FILE`"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_torchscript(path: Path) -> bool:
    """Return whether a file is a zip archive with TorchScript's code folder; reads only its table of contents."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            # Everything lies below one folder, named after the file.
            return any(member.split("/")[1:2] == ["code"] for member in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        # The loader says what is wrong with it. ValueError: a name that is not UTF-8.
        return False


def _safe_twin(name: str) -> str:
    """Name the file that holds the same weights without code."""
    published = open_clip.get_pretrained_cfg(name, "openai") or {}
    repository = str(published.get("hf_hub", "")).rstrip("/")
    of = f" of huggingface.co/{repository}" if repository else ""
    return f"open_clip_model.safetensors{of}"


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
