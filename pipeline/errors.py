"""Errors of the pipeline, and a test of which system errors are about a file or network. Imports nothing heavy."""

import errno

from ezsd.errors import EzsdError


class ArgumentError(EzsdError, ValueError):
    """An argument, or a file that it names, is not what the command needs."""


class ClusterError(EzsdError, ValueError):
    """A Dask cluster, or a worker of it, cannot do the work."""


class ConfigError(EzsdError, ValueError):
    """A setting is unknown or has an impossible value."""


class DamagedFile(EzsdError, ValueError):
    """A file that ezsd wrote holds something else now."""


class DatasetError(EzsdError, ValueError):
    """A dataset's files are not where they should be, or cannot be read."""


class ImageError(EzsdError, ValueError):
    """A file is missing, damaged, no image, or not the one that the annotations describe."""


class RunError(EzsdError, ValueError):
    """A run folder is missing, unfinished or another run's."""


class OutOfMemory(RunError):
    """A training step, or one image to detect in, does not fit in memory."""


class NonFiniteLoss(RunError, FloatingPointError):
    """A loss or a gradient of a training is infinite or no number."""


_OF_THE_DISK = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOLCK),
)
"""A disk that is full, may not be written to, or has no locks."""


def is_of_a_place(error: OSError) -> bool:
    """Test whether a system's error is about a file, disk or network that the user can do something about.

    Without the name of a file it says so of itself, or it comes from a call that ezsd got wrong.
    """
    return (
        error.filename is not None or error.errno in _OF_THE_DISK or isinstance(error, ConnectionError | TimeoutError)
    )
