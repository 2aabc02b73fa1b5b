"""Checks of a teacher's name and weights before anything heavy is loaded."""

import sys
from importlib.util import find_spec
from pathlib import Path

from ezsd.errors import TeacherError
from ezsd.plugins import PLUGIN
from ezsd.vocabulary import suggest

TINY_SHAPES = "tiny-shapes"
"""Name of the shipped teacher of the `shapes` benchmark: a real open_clip model of 0.9 M parameters in use."""


def require_teacher(name: str, weights: str | None) -> None:
    """Check a teacher's name and weights as far as possible before anything is loaded.

    Raises:
        TeacherError: an unknown model, no weights where it needs some, a file that is not there.
    """
    if name.startswith(PLUGIN):
        return
    on_hub = ":" in name
    if name != TINY_SHAPES and not on_hub and name not in open_clip_models():
        near = suggest(name, open_clip_models())
        raise TeacherError(
            f"`teacher={name}`: no such open_clip model; {near} `open_clip.list_models()` names them all"
        )
    if weights is None:
        if name != TINY_SHAPES and not on_hub:
            raise TeacherError(f"`teacher={name}` needs `weights`: a tag such as openai, or a local .safetensors file")
    elif not Path(weights).exists() and (name == TINY_SHAPES or names_file(weights)):
        raise TeacherError(f"`weights={weights}`: no such file")


def names_file(weights: str) -> bool:
    """Return whether weights are given as a local file, existing or not, rather than as an open_clip tag."""
    return Path(weights).is_absolute() or Path(weights).suffix in {".safetensors", ".pt", ".pth", ".bin"}


def open_clip_models() -> list[str]:
    """Names of open_clip's models, as from `open_clip.list_models`, without importing open_clip."""
    if "open_clip" in sys.modules:
        # Models may have been added to it.
        return list(sys.modules["open_clip"].list_models())
    spec = find_spec("open_clip")
    folders = spec.submodule_search_locations if spec is not None else None
    return sorted(file.stem for folder in folders or () for file in Path(folder).glob("model_configs/*.json"))
