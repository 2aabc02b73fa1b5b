"""Checks of a backbone's name before anything heavy is loaded."""

from __future__ import annotations

import functools
import re
import sys
from importlib.util import find_spec
from pathlib import Path

from ezsd.choices import BACKBONES
from ezsd.errors import BackboneError
from ezsd.plugins import PLUGIN
from ezsd.vocabulary import suggest

TIMM = "timm:"
"""Beginning of a backbone's name that is followed by that of a model of timm."""

_REGISTERED = re.compile(r"^@register_model\b.*\n(?:[@#].*\n)*def (\w+)\(", re.MULTILINE)


def has_form(name: str) -> bool:
    """Return whether a text can be the name of a backbone, be there such a one or not."""
    if name.startswith(TIMM):
        return len(name) > len(TIMM)
    if name.startswith(PLUGIN):
        return len(name.split(":")) == 3 and all(name.split(":"))
    return name in BACKBONES


def require_backbone(name: str, section: str = "model") -> None:
    """Check a backbone's name as far as possible before anything is loaded.

    Args:
        name: of the form of one, see `has_form`.
        section: table of the setting, for the message.

    Raises:
        BackboneError: timm, its model or the plug-in's package is not there.
    """
    if name.startswith(TIMM):
        if find_spec("timm") is None:
            raise BackboneError(f"{said(name, section)}: timm is not installed; pip install timm")
        model = name.removeprefix(TIMM).partition(".")[0]
        if model not in timm_models():
            raise BackboneError(f"{said(name, section)}: no such timm model; {suggest(model, timm_models())}")
    if name.startswith(PLUGIN):
        package = name.split(":")[1].partition(".")[0]
        if not package or not _is_there(package):
            raise BackboneError(f"{said(name, section)}: no module named {package!r}; is its folder on PYTHONPATH?")


def _is_there(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:
        # A module without a specification, such as a script's own.
        return package in sys.modules


def said(name: str, section: str) -> str:
    """The setting of a section's backbone with its value, as messages name it."""
    return f"`{section}.backbone={name}`"


@functools.cache
def timm_models() -> tuple[str, ...]:
    """Names of timm's models, as from `timm.list_models`, without importing timm."""
    spec = find_spec("timm")
    folders = spec.submodule_search_locations if spec is not None else None
    files = [file for folder in folders or () for file in Path(folder).glob("models/*.py")]
    return tuple(sorted(name for file in files for name in _REGISTERED.findall(file.read_text(encoding="utf-8"))))
