"""Errors that a user can mend: all are an `EzsdError`, whose text is one line with place, fault and cure.

Imports nothing heavy: whoever catches them need not load what raises them.
"""


class EzsdError(Exception):
    """Base of all errors about an input, a file or an environment. Anything else that is raised is a bug."""


class AnnotationError(EzsdError, ValueError):
    """An annotation file, or a path it names, is not what it must be.

    The message names the file, the place inside it, what was expected, what was found and what
    to do.
    """


class VocabularyError(EzsdError, ValueError):
    """A class name is unknown, doubled, empty or missing."""


class TeacherError(EzsdError, ValueError):
    """A teacher cannot be had as asked for; the message says what to bring."""


class BackendError(EzsdError, RuntimeError):
    """The Triton backend was asked for where it cannot run."""


class ResultsError(EzsdError, ValueError):
    """A results file is not what it must be; the message names the file, the place and what was expected."""
