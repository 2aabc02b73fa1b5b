"""Errors about stores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ezsd.errors import EzsdError

if TYPE_CHECKING:
    from ezsd.cache.format.sealed_json import Difference

_LISTED = 10
"""Most differences listed in one message."""


class StoreError(EzsdError, ValueError):
    """A store, or something given to one, is not as it must be."""


class StoreIncomplete(StoreError):
    """The store has no commit mark yet: its build was interrupted or still runs."""


class StoreMismatch(StoreError):
    """The store was made from something else than what is wanted now."""

    differences: Sequence[Difference] = ()
    """The values that differ, where these are the reason."""
    shared: Sequence[str] = ()
    """Products that are the same in the store and in what is wanted, where the store is complete."""
    folder: Path | None = None
    """Folder beside the store that is not there yet, where what is wanted has to be built in another one."""
    _frame = ("", "")
    """The message before and after them."""

    @classmethod
    def between(cls, store: object, differences: Sequence[Difference], *, cure: str) -> StoreMismatch:
        """The error about differences between a store and what is wanted; `cure` says what to do."""
        return cls._framed(f"{store}: this store was made from something else: ", differences, f"; {cure}")

    def reworded(
        self, reword: Callable[[Sequence[Difference]], Sequence[Difference]], *, cure: str | None = None
    ) -> StoreMismatch:
        """Reword the differences, and the `cure` if one is given; equal lines are listed once."""
        if not self.differences:
            return self
        before, after = self._frame
        return self._framed(before, reword(self.differences), after if cure is None else f"; {cure}")

    @classmethod
    def _framed(cls, before: str, differences: Sequence[Difference], after: str) -> StoreMismatch:
        lines = list(dict.fromkeys(map(str, differences)))
        rest = len(lines) - _LISTED
        error = cls(before + "; ".join(lines[:_LISTED] + ([f"and {rest} more"] if rest > 0 else [])) + after)
        error.differences, error._frame = differences, (before, after)
        return error


class StoreBusy(StoreError):
    """Another process is at work on the store."""


class StoreUnreadable(StoreError):
    """The system does not let a file be read; whether it is damaged is not known."""


class StoreKeyError(StoreError, KeyError):
    """The store has no image with this id."""

    # KeyError shows the repr of its message; a sentence must stay a sentence.
    __str__ = ValueError.__str__
