"""Factories of plug-ins, named as plugin:package.module:factory."""

from __future__ import annotations

import importlib
import sysconfig
import traceback
from pathlib import Path
from typing import Any

from ezsd.errors import EzsdError

PLUGIN = "plugin:"
"""Beginning of the name of a plug-in, which is followed by a module and its factory."""

_OWN = Path(__file__).parent
_INSTALLED = tuple(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib"))


def find_factory(name: str, what: str, error_type: type[Exception]) -> Any:  # noqa: ANN401 - what a user's module holds
    """Import the factory of a plug-in.

    Args:
        name: plugin:package.module:factory.
        what: the setting and its value, for the message.
        error_type: raised when there is no such factory, or its module fails.
    """
    _, module, factory = name.split(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        lacks = "is its folder on PYTHONPATH?" if f"{module}.".startswith(f"{error.name}.") else "install it"
        raise error_type(f"{what}: {error}; {lacks}") from error
    except EzsdError:
        raise
    except (Exception, SystemExit) as error:
        # Some scripts end the process when they are imported; that a command is stopped is a kind of its own.
        if not isinstance(error, Exception) and type(error) is not SystemExit:
            raise
        raise error_type(f"{what}: {module} cannot be imported: {fault(error)}") from error
    if not hasattr(found, factory):
        raise error_type(f"{what}: {getattr(found, '__file__', None) or module} has no attribute {factory!r}")
    return getattr(found, factory)


def fault(error: BaseException) -> str:
    """One line about an error in a plug-in: its kind, what it says, and the line of the plug-in that it comes from."""
    lines = str(error).splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    return f"{text} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else text


def _is_users(file: str) -> bool:
    """Test whether a file of code is neither ours, nor Python's, nor of an installed package."""
    path = Path(file)
    return not file.startswith("<") and not any(path.is_relative_to(place) for place in (_OWN, *_INSTALLED))
