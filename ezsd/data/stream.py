"""A JSON file read piece by piece: the entries of its outermost lists, one at a time.

Python's own scanner does the parsing, so that NaN and Infinity, which annotation files do hold,
are read and can be named; a file of any size takes the memory of one window and one entry.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO, TypeGuard

from ezsd.data.records import unfit

WINDOW = 2**22
"""Characters read at a time."""
FILE_CURE = "Give the path of a COCO-format annotation file."
"""Advice for a file that is not an annotation file."""

_BLANK = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()
# The longest literal is -Infinity, the longest escape a pair of \uXXXX: what stops further from
# the window's end than this is an error and no cut.
_CUT = 16


def is_finite(value: object) -> TypeGuard[float]:
    """Test whether a JSON value is a number that a float64 can hold."""
    if type(value) is float:
        return math.isfinite(value)
    if type(value) is not int:
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond 1e308
        return False


class JsonError(ValueError):
    """The text is not valid JSON; the message says what is wrong with it."""


@contextlib.contextmanager
def open_json(path: Path) -> Iterator[JsonReader]:
    """A reader of an annotation file.

    Raises:
        AnnotationError: the file cannot be read or is not UTF-8 JSON without a byte order mark; also while it is read.
    """
    try:
        with path.open("rb") as start:
            if start.read(3) == b"\xef\xbb\xbf":
                raise unfit(path, "byte 0", "JSON", "a UTF-8 byte order mark", "Save the file as UTF-8 without one.")
        with path.open(encoding="utf-8", newline="") as file:
            yield JsonReader(file)
    except OSError as error:
        raise unfit(path, "the file", "a readable file", error.strerror or str(error), FILE_CURE) from error
    except JsonError as error:
        raise unfit(path, "the file", "JSON in UTF-8", f"something else ({error})", FILE_CURE) from error


class JsonReader:
    """Walks over one JSON text; `peek` looks, `value` and `members` and `entries` consume."""

    def __init__(self, file: TextIO, window: int = WINDOW) -> None:
        self._file = file
        self._window = window
        self._text = ""
        self._at = 0
        self._before = 0
        self._ended = False

    def peek(self) -> str:
        """The next character that is not a blank; "" at the end."""
        while True:
            self._at = _BLANK.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read():
                return ""

    def take(self, expected: str) -> None:
        """Consume one character. JsonError for another one."""
        if self.peek() != expected:
            raise JsonError(f"expected {expected!r} at character {self._before + self._at}, found {self.peek()!r}")
        self._at += 1

    def value(self) -> object:
        """Consume one whole value."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _CUT
                if not (cut and self._read()):
                    raise JsonError(f"{error.msg} at character {self._before + error.pos}") from error
                continue
            except RecursionError as error:
                raise JsonError("nested too deeply") from error
            except ValueError as error:
                # Python's own limit on texts that become whole numbers. Behind the window's end a fraction may begin.
                digits = sys.get_int_max_str_digits()
                long = re.compile(rf"-?\d{{{digits + 1},}}").search(self._text, self._at)
                assert long is not None
                if long.end() < len(self._text) or not self._read():
                    at = self._before + long.start()
                    raise JsonError(f"a whole number of more than {digits} digits at character {at}") from error
                continue
            # A number may go on behind the window: 1 of 1e+5, with at most e+ of it within.
            if end < len(self._text) - 2 or not self._read():
                self._at = end
                return value

    def members(self) -> Iterator[str]:
        """Keys of an object, each before its value, which the caller consumes."""
        self.take("{")
        if self.peek() != "}":
            while True:
                key = self.value()
                if not isinstance(key, str):
                    raise JsonError(f"expected a key in quotes before character {self._before + self._at}")
                self.take(":")
                yield key
                if self.peek() != ",":
                    break
                self.take(",")
        self.take("}")

    def entries(self) -> Iterator[object]:
        """Values of a list."""
        self.take("[")
        if self.peek() != "]":
            while True:
                yield self.value()
                if self.peek() != ",":
                    break
                self.take(",")
        self.take("]")

    def _read(self) -> bool:
        """Move the window on, keeping what is not consumed; whether there was more."""
        if self._ended:
            return False
        try:
            # What does not end within the window doubles it: a long entry is scanned a few times, not many.
            more = self._file.read(max(self._window, len(self._text) - self._at))
        except UnicodeDecodeError as error:
            raise JsonError(f"{error.reason} at byte {error.start} of a piece: not UTF-8") from error
        if not more:
            self._ended = True
            return False
        self._before += self._at
        self._text, self._at = self._text[self._at :] + more, 0
        return True
