"""Descriptions of classes: sentences that take the place of a name's prompts."""

from __future__ import annotations

import json
import reprlib
from pathlib import Path

from ezsd.errors import VocabularyError
from ezsd.pipeline.errors import ConfigError
from ezsd.vocabulary import is_writable, require_different

Descriptions = tuple[tuple[str, ...], ...]
"""Described names, each with its sentences after it."""


def read_descriptions(path: Path) -> Descriptions:
    """Read a JSON file {"NAME": ["SENTENCE", ...], ...}.

    Raises:
        ConfigError: it cannot be read, is not of that form, or has a name twice.
    """
    where = f"`teacher.descriptions={path}`"
    try:
        # Objects come as tuples of pairs, arrays as lists: doubled keys stay visible.
        found = json.loads(path.read_bytes(), object_pairs_hook=tuple)
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: is not valid JSON: {error}") from error
    if not isinstance(found, tuple) or not found:
        raise ConfigError(f'{where}: expected {{"NAME": ["SENTENCE", ...], ...}}, found {_shown(found)}')
    for name, sentences in found:
        if not isinstance(sentences, list) or not sentences or not all(map(_is_sentence, sentences)):
            raise ConfigError(f"{where}: {name!r}: expected a list of sentences, found {_shown(sentences)}")
    try:
        require_different(name for name, _ in found)
    except VocabularyError as error:
        raise ConfigError(f"{where}: {error}") from error
    return tuple((name, *sentences) for name, sentences in found)


def _is_sentence(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip()) and is_writable(value)


def _shown(value: object) -> str:
    """A value in one short line: strangers' nests may be deeper than `repr` goes."""
    text = reprlib.repr(dict(value) if isinstance(value, tuple) else value).encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 60 else f"{text[:57]}..."
