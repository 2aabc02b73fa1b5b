"""What a read of a hostile file may come to: an answer, or an error of ezsd; everything else is a `Finding`.

An audit hook sees files that are opened, made or removed, processes, sockets and unpickled classes; timers and the
limit of the address space see the rest. An audit hook cannot be taken back: it sleeps outside of `watched`.
"""

import contextlib
import errno
import hashlib
import os
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ezsd.errors import EzsdError
from ezsd.pipeline.errors import is_of_a_place

CPU_SECONDS = 20
"""Of one input: files of some kilobytes are read in milliseconds."""
MEMORY = 2 * 2**30
"""Bytes of address space that one input may add."""

_PROCESSES = frozenset(
    ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn")
)
_NETWORK = frozenset(("socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.Request"))
_CODE = frozenset(("pickle.find_class",))
_CHANGES = frozenset(
    (
        *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod"),
        "os.utime",
    )
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Finding(BaseException):
    """A read that came to something else; nothing that catches Exception may swallow it."""

    def __init__(self, kind: str, said: str, trace: str = "") -> None:
        super().__init__(f"{kind}: {said}")
        self.kind, self.trace = kind, trace

    @property
    def signature(self) -> str:
        """Name that is equal for findings of one cause: the kind and where it came from."""
        places = [line for line in self.trace.splitlines() if line.lstrip().startswith('File "')][-4:]
        return f"{self.kind}-{hashlib.sha256((self.kind + ''.join(places)).encode()).hexdigest()[:10]}"


@dataclass(slots=True)
class _Watch:
    folders: tuple[str, ...] = ()
    secret: str = ""
    """Folder beside them that nothing may open; "" where links and paths may be followed for reading."""
    active: bool = False
    found: Finding | None = None
    refused: list[str] = field(default_factory=list)


_watch = _Watch()
_installed: list[bool] = []


def _hook(event: str, arguments: tuple) -> None:
    if not _watch.active:
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, str | bytes):
            _opened(os.fsdecode(path), flags)
    elif event in _CHANGES:
        # Of a symbolic link the second is what is made.
        paths = arguments[1:2] if event in ("os.symlink", "os.link") else arguments[:2]
        folders = [f"/proc/self/fd/{one}" for one in arguments[1:] if type(one) is int and one >= 0]
        for path in paths:
            if isinstance(path, str | bytes | os.PathLike):
                # Within an open folder, as `shutil.rmtree` does it; the mode of a new folder is no descriptor.
                here = folders[-1] if folders and event != "os.mkdir" else ""
                _require_inside(os.path.join(here, os.fsdecode(path)), event)
    elif event in _PROCESSES | _NETWORK | _CODE:
        _stop(event, repr(arguments)[:300])


def _opened(path: str, flags: int | None) -> None:
    if path == os.devnull:
        return
    if (flags or 0) & _WRITES:
        _require_inside(path, "write")
    elif _watch.secret and os.path.realpath(path).startswith(_watch.secret):
        _stop("read outside", path)


def _require_inside(path: str, event: str) -> None:
    # Only the last part may be a link: a link is made, removed and renamed as itself.
    folder, name = os.path.split(os.path.abspath(path))
    real = os.path.join(os.path.realpath(folder), name)
    if event == "write":
        real = os.path.realpath(real)
    if not any(real == inside or real.startswith(inside + os.sep) for inside in _watch.folders):
        _stop(f"{event} outside", path)


def _stop(kind: str, said: str) -> None:
    """Raise where it happens, before it is done, and keep it in case that somebody swallows it."""
    finding = Finding(kind, said, "".join(traceback.format_stack(limit=40)))
    if _watch.found is None:
        _watch.found = finding
    raise finding


def _out_of_time(_signal: int, frame: object) -> None:
    raise Finding("time", f"more than {CPU_SECONDS} s of a processor", "".join(traceback.format_stack(frame, limit=40)))


@contextlib.contextmanager
def watched(folder: Path, *also: Path, secret: Path | None = None):
    """Whatever is read within may write in these folders alone. Yields the errors of ezsd; raises `Finding`."""
    if not _installed:
        sys.addaudithook(_hook)
        _installed.append(True)
    _watch.folders = tuple(os.path.realpath(one) for one in (folder, *also))
    _watch.secret = os.path.realpath(secret) if secret is not None else ""
    _watch.found, _watch.refused, before = None, [], resource.getrlimit(resource.RLIMIT_AS)
    # The timer of a processor: other work on the machine does not count, and pytest's own timer is another.
    handler = signal.signal(signal.SIGPROF, _out_of_time)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Numbers that overflow are answers that are wrong.
            warnings.simplefilter("error", RuntimeWarning)
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY, before[1]))
            _watch.active = True
            yield _watch.refused
    except Finding:
        raise
    except Exception as error:
        _watch.active = False
        _judge(error)
    finally:
        _watch.active = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGPROF, handler)
    if _watch.found is not None:
        raise _watch.found


def tried(call: Callable[[], Any]) -> Any:
    """Result of a call, or the error of ezsd with which it refused."""
    try:
        return call()
    except Exception as error:
        _judge(error)
        return error


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _wanted_memory(error: BaseException | None) -> bool:
    """True where an error says, or was made of one that says, that memory was refused."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


def _judge(error: Exception) -> None:
    """Return for an error of ezsd, or of the system about a place; raise a Finding for any other."""
    trace = "".join(traceback.format_exception(error))
    answered = is_of_a_place(error) if isinstance(error, OSError) else isinstance(error, EzsdError)
    if not answered:
        raise Finding(type(error).__name__, str(error)[:500], trace) from error
    if _wanted_memory(error):
        raise Finding("memory", f"more than {MEMORY} bytes were wanted: {error}"[:500], trace) from error
    _watch.refused.append(f"{type(error).__name__}: {error}")
