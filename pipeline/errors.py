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


_MODE = "have its mode changed (`chmod -R u+rwX`), or choose another place"
_CURES = {
    errno.ENOSPC: "make room on that disk and run the same command again",
    errno.EDQUOT: "make room, or have your quota raised, and run the same command again",
    errno.EFBIG: "have the limit of a file's size raised (`ulimit -f unlimited`) and run the same command again",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`) and run the same command again",
    errno.ENFILE: "end other programs, or have the machine's limit (fs.file-max) raised; run the same command again",
    errno.EROFS: "choose a place on a disk that may be written to",
    errno.EACCES: _MODE,
    errno.EPERM: _MODE,
    errno.EIO: "see the system's log about this disk and run the same command again",
    errno.ESTALE: "mount its file system anew and run the same command again",
}
"""Cures of errors about a disk, a limit or a mode, by number."""


def is_of_a_place(error: OSError) -> bool:
    """Test whether a system's error is about a file, disk, limit or network that the user can do something about.

    Without the name of a file it says so of itself, or it comes from a call that ezsd got wrong.
    """
    return error.filename is not None or error.errno in _CURES or isinstance(error, ConnectionError | TimeoutError)


def with_cure(error: OSError) -> str:
    """Text of a system's error: its place and cause, and the cure where one is known."""
    cure = _CURES.get(error.errno or 0)
    # Without a file's name it is a socket that may not be used, which has no mode.
    if cure is None or (cure is _MODE and error.filename is None):
        return str(error)
    place = "" if error.filename is None else f"{error.filename}: "
    return f"{place}{error.strerror}; {cure}"
