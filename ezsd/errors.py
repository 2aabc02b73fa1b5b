"""Errors that a user can fix: subclasses of `EzsdError`, each with a one-line message of place, fault and remedy.

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
