"""Errors that a user can fix, subclasses of `EzsdError`, and the numbers in what is said to users.

Each error has a one-line message of place, fault and remedy.

Importing this module loads nothing heavy, so errors can be caught without the code that raises them.
"""


class EzsdError(Exception):
    """Base class of all errors about an input, a file or an environment. Any other exception is a bug."""


class AnnotationError(EzsdError, ValueError):
    """An annotation file, or a path in it, is not valid.

    The message names the file, the place inside it, what was expected, what was found and what
    to do.
    """


class VocabularyError(EzsdError, ValueError):
    """A class name is unknown, duplicate, empty or missing."""


class TeacherError(EzsdError, ValueError):
    """A teacher cannot be loaded as requested; the message says what to provide."""


class BackboneError(EzsdError, ValueError):
    """A backbone cannot be made as requested; the message says what to provide."""


class BackendError(EzsdError, RuntimeError):
    """The Triton backend was requested where it cannot run."""


class ResultsError(EzsdError, ValueError):
    """A results file is not valid; the message gives the file, the place and the expected value."""


def quantity(count: int, one: str, many: str | None = None) -> str:
    """A number with its noun as messages say it: "1 image", "2 images", "1,000 boxes".

    Args:
        count: 0 or more.
        one: the noun for 1, with its verb where that changes too ("file is").
        many: the noun for every other number; None adds an s.
    """
    return f"{count:,} {inflected(count, one, many or f'{one}s')}"


def inflected(count: int, one: str, many: str) -> str:
    """The form of a word that goes with a number of things: "is" for 1, "are" for every other."""
    return one if count == 1 else many
