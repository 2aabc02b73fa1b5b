"""Process environment of a command: standard streams, memory allocation, variables of a launcher. Loads no torch."""

from __future__ import annotations

import codecs
import ctypes
import io
import os
import select
import sys
from collections.abc import Mapping

_LAUNCHER = ("RANK", "MASTER_ADDR", "MASTER_PORT")

_MOST = 2**31 - 1
_MALLOC = {"MALLOC_MMAP_MAX_": (-4, 0), "MALLOC_TRIM_THRESHOLD_": (-1, _MOST)}
"""Variables of glibc's malloc, with the parameter of mallopt(3) and the value: no block is mapped alone, and nothing is
given back before the end."""
MALLOC_ENVIRONMENT: Mapping[str, int] = {"MALLOC_ARENA_MAX": 1} | {name: value for name, (_, value) in _MALLOC.items()}
"""Variables with which a new process does as `keep_freed_memory` says, in all its threads."""


def prepare_streams() -> None:
    """Make standard streams take any text, and be there.

    A character that a stream's encoding lacks is written as its escape, and a byte of a file name that was
    no text as that byte. Messages of a process without standard error go nowhere.

    Raises:
        ArgumentError: standard output is closed: what a command prints would be lost.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - it lives as long as the process
    codecs.register_error("ezsd.escape", _escape)
    for stream in (sys.stdout, sys.stderr):
        # Whoever asked for something else, as with PYTHONIOENCODING=ascii:replace, gets it.
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="ezsd.escape")
    if sys.stdout is None:
        from ezsd.pipeline.errors import ArgumentError

        raise ArgumentError("standard output is closed; send it somewhere, for example to a file or /dev/null")


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.backslashreplace_errors(error)


def keep_freed_memory() -> None:
    """Make glibc's malloc keep freed memory for the next tensor, for the rest of this process.

    As it comes it maps every block above 32 MiB alone and unmaps it when it is freed, so each large tensor on a CPU
    costs a page fault per 4 KiB. The peak of the memory stays the same, but what was freed is not given back before the
    process ends. Variables of malloc that a user has set stay in force; other C libraries are left as they are.
    """
    if "malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in _MALLOC.values():
            mallopt(parameter, value)


def nobody_reads() -> bool:
    """Test whether standard output is a pipe whose reader has ended, as `| head -1` does."""
    poll = select.poll()
    poll.register(1, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def drop_output() -> None:
    """Let what is still to be printed go nowhere; the interpreter's end would stumble over it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def require_launcher(environment: Mapping[str, str]) -> int:
    """Processes of this training, from the variables that `torchrun` sets; 1 without them.

    Raises:
        ArgumentError: WORLD_SIZE says that there are several, and others that they need are missing or wrong.
    """
    text = environment.get("WORLD_SIZE", "1")
    if text == "1":
        return 1
    from ezsd.pipeline.errors import ArgumentError

    count = _number(text)
    if count is None or count < 1:
        raise ArgumentError(f"WORLD_SIZE={text}: expected the number of processes; start the training with torchrun")
    missing = [name for name in _LAUNCHER if not environment.get(name)]
    if missing:
        raise ArgumentError(
            f"WORLD_SIZE={text} is set in the environment without {', '.join(missing)}: start several processes with "
            "`torchrun`, or a single one with `env -u WORLD_SIZE ezsd train ...`"
        )
    rank, port = _number(environment["RANK"]), _number(environment["MASTER_PORT"])
    if rank is None or rank >= count or port is None:
        raise ArgumentError(
            f"RANK={environment['RANK']}, WORLD_SIZE={text}, MASTER_PORT={environment['MASTER_PORT']}: expected a rank "
            "below the number of processes, and a port's number; start the training with `torchrun`"
        )
    return count


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() else None
