"""TOML files of users, read in bounded time."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

_MOST_DOTS = 100
_TEXTS_AND_COMMENTS = re.compile(
    r'''"""(?:[^"\\]++|\\.|"(?!""))*+(?:"{3,5}|\Z)|\'\'\'(?:[^']++|'(?!''))*+(?:'{3,5}|\Z)'''
    r"""|"(?:[^"\\\n]++|\\[^\n])*+"?|'[^'\n]*+'?|\#[^\n]*+""",
    re.DOTALL,
)
"""Texts and comments, whose dots separate no keys. A text without an end goes up to the end of its line or of the file:
tomllib refuses it there."""


def read_toml(path: Path) -> dict[str, Any]:
    """Read a file of TOML in UTF-8, in a time that grows with its size alone.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not TOML, is nested too deeply, or has a line with more than 100 dots outside of texts and
            comments: as parts of a key they take tomllib a time that grows with the square of their number.
    """
    text = path.read_text(encoding="utf-8")
    bare = _TEXTS_AND_COMMENTS.sub(lambda found: "\n" * found[0].count("\n"), text)
    for number, line in enumerate(bare.split("\n"), 1):
        if line.count(".") > _MOST_DOTS:
            raise ValueError(f"line {number}: more than {_MOST_DOTS} dots outside of texts; write it as several lines")
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError(error) from error
