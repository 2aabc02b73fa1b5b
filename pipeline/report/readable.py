"""Sections of a page that are made from files, which may be gone: the section, or the reason why there is none."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from ezsd.cache import StoreError
from ezsd.errors import AnnotationError, ResultsError
from ezsd.pipeline.console.options import as_options
from ezsd.pipeline.errors import DamagedFile, DatasetError, ImageError, RunError, is_of_a_place

log = logging.getLogger("ezsd")
T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class Part(Generic[T]):
    """Content of a section, or the reason why there is none."""

    content: T | None
    missing: str | None = None
    """None where there is content."""

    def then(self, make: Callable[[T], U]) -> Part[U]:
        """Content made from this one; without content for the same reason."""
        if self.missing is not None:
            return Part(None, self.missing)
        return readable(lambda: make(cast("T", self.content)))


def readable(make: Callable[[], T]) -> Part[T]:
    """Make a section; without content where its files are gone or damaged, after a warning."""
    try:
        return Part(make())
    except (
        AnnotationError,
        DamagedFile,
        DatasetError,
        ImageError,
        ResultsError,
        RunError,
        StoreError,
        OSError,
    ) as error:
        if isinstance(error, OSError) and not is_of_a_place(error):
            raise
        log.warning("report: left out: %s", error)
        return Part(None, as_options(str(error)))
