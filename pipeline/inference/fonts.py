"""Choice of a font that has the letters of a text: one that the user names, DejaVu Sans, or any installed one."""

from __future__ import annotations

import logging
import os
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import matplotlib
from matplotlib.font_manager import findSystemFonts
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

from ezsd.pipeline.errors import ArgumentError

log = logging.getLogger("ezsd")

VARIABLE = "EZSD_FONT"
"""Environment variable with the file of the font to try first."""

_warned: list[str] = []
"""Texts that a warning was given of."""


def require_named_font() -> None:
    """Check that `EZSD_FONT`, if set, names a font file. ArgumentError if not."""
    name = os.environ.get(VARIABLE)
    if name and _letters(Path(name)) is None:
        raise ArgumentError(f"{VARIABLE}={name}: is not a font file that can be read; expected a .ttf, .otf or .ttc")


def font_for(text: str, size: float) -> tuple[str, ImageFont.FreeTypeFont]:
    """Choose a font for a text; returns the text as the font can write it, and the font.

    Where no font has all letters, those that are missing become their code points: names that differ stay different.
    The first time, a warning says so.

    Args:
        text: one line.
        size: of the font, pixels.

    Raises:
        ArgumentError: `EZSD_FONT` names no font file.
    """
    text = unicodedata.normalize("NFC", text)
    needed = {ord(letter) for letter in text if not _is_invisible(letter)}
    path = _font_with(frozenset(needed), os.environ.get(VARIABLE, ""))
    if path is not None:
        return text, ImageFont.truetype(path, size)
    base = _base_font()
    available = _letters(base) or frozenset()
    _warn_of(text)
    shown = "".join(
        letter if _is_invisible(letter) or ord(letter) in available else f"<U+{ord(letter):04X}>" for letter in text
    )
    return shown, ImageFont.truetype(base, size)


@cache
def _font_with(needed: frozenset[int], named: str) -> Path | None:
    """First font that has all code points; None where none has. `named` is the value of `EZSD_FONT`."""
    require_named_font()
    return next((path for path in _fonts(named) if needed <= (_letters(path) or frozenset())), None)


def _fonts(named: str) -> Iterator[Path]:
    if named:
        yield Path(named)
    yield _base_font()
    # Looked for only where the others lack a letter.
    yield from map(Path, sorted(findSystemFonts()))


def _base_font() -> Path:
    """File of DejaVu Sans, which comes with matplotlib: Latin, Greek, Cyrillic and more."""
    return Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"


@cache
def _letters(path: Path) -> frozenset[int] | None:
    """Code points that a font has; None for a file that is not a font."""
    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return None


def _is_invisible(letter: str) -> bool:
    """True for a letter without a shape of its own: blanks, joiners, variation selectors."""
    return letter.isspace() or unicodedata.category(letter) in ("Cc", "Cf") or "\ufe00" <= letter <= "\ufe0f"


def _warn_of(text: str) -> None:
    """Warn of the first text that no font has all letters of; the others are not worth a line each."""
    if not _warned:
        _warned.append(text)
        log.warning(
            "pictures: no font of this machine has all letters of %r; letters that are missing are written as code "
            "points. Install a font that has them, or name its file with %s",
            text,
            VARIABLE,
        )
