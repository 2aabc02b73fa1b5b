"""Errors about stores."""

from ezsd.errors import EzsdError


class StoreError(EzsdError, ValueError):
    """A store, or something given to one, is not as it must be."""


class StoreIncomplete(StoreError):
    """The store has no commit mark yet: its build was interrupted or still runs."""


class StoreMismatch(StoreError):
    """The store was made from something else than what is wanted now."""


class StoreBusy(StoreError):
    """Another process is at work on the store."""


class StoreUnreadable(StoreError):
    """The system does not let a file be read; whether it is damaged is not known."""


class StoreKeyError(StoreError, KeyError):
    """The store has no image with this id."""

    # KeyError shows the repr of its message; a sentence must stay a sentence.
    __str__ = ValueError.__str__
