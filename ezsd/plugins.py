"""Factories of plug-ins, named as plugin:package.module:factory."""

from __future__ import annotations

import importlib
from typing import Any

PLUGIN = "plugin:"
"""Beginning of the name of a plug-in, which is followed by a module and its factory."""


def find_factory(name: str, what: str, error_type: type[Exception]) -> Any:  # noqa: ANN401 - what a user's module holds
    """Import the factory of a plug-in.

    Args:
        name: plugin:package.module:factory.
        what: the setting and its value, for the message.
        error_type: raised when there is no such factory.
    """
    _, module, factory = name.split(":")
    try:
        return getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise error_type(f"{what}: {error}; is its folder on PYTHONPATH?") from error
