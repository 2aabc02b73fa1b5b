"""SIGINT (Ctrl-C) and SIGTERM (a scheduler's notice): the first is a request, the second ends the process at once.

Loads nothing heavy: the command line listens before it imports anything.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any, NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LOOK_SECONDS = 0.1
"""Seconds between checks that `Stopped` has ended the process."""
_SHOW_CURSOR = "\x1b[?25h"
_SAID = "EZSD_STOP_IS_SAID"
"""Set for commands that another one runs: that one says that all of them stop, and what to type."""
_ONE_REQUEST_SECONDS = 0.5
"""Seconds within which signals count as one: a terminal and a scheduler tell all processes, and those their own."""


class Stopped(SystemExit):
    """A first signal ended the work. Nobody catches it for good: it passes where errors are handled.

    Attributes:
        code: 128 + the signal's number, as shells have it.
        kept: what is kept and what to type, once somebody knows; None where another process says so.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.kept: str | None = ""

    @property
    def is_told(self) -> bool:
        """True if this process is the one to say what is kept."""
        return self.kept is not None and _SAID not in os.environ

    def __str__(self) -> str:
        name = signal.Signals(int(self.code or 0) - 128).name
        return f"stopped by {name}: {self.kept or 'nothing is begun yet; run the same command again'}"


@dataclass
class _State:
    """State of this process, since signal handlers belong to the process too."""

    received: int | None = None
    raised: bool = False
    """True once it has ended the work, with `Stopped`."""
    finishing: str | None = None
    """Work that is finished before the process ends; None where it may end anywhere."""
    children: list[subprocess.Popen[Any]] = field(default_factory=list)
    before: dict[int, Any] = field(default_factory=dict)
    """The handlers that were there before ours."""
    told: int = -1
    """File descriptor to which the system writes the number of each signal."""
    answered: threading.Event = field(default_factory=threading.Event)
    """Set once the first signal has its line."""


_state = _State()


def listen() -> None:
    """Install handlers: a first SIGINT or SIGTERM raises `Stopped` in the main thread, a second ends the process.

    A signal that the process was started to ignore (`nohup`, a background job) stays ignored. Does nothing where it is
    done already, and outside the main thread, which alone may handle signals.
    """
    if _state.before or threading.current_thread() is not threading.main_thread():
        return
    _state.received, _state.raised = None, False
    _state.answered.clear()
    reading, _state.told = os.pipe()
    os.set_blocking(_state.told, False)
    signal.set_wakeup_fd(_state.told, warn_on_full_buffer=False)
    threading.Thread(target=_answer, args=(reading,), name="signals", daemon=True).start()
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            _state.before[number] = signal.signal(number, _note)


def stop_listening() -> None:
    """Put the handlers back that were there before `listen`."""
    for number, handler in _state.before.items():
        signal.signal(number, handler)
    _forget()


def end_listening() -> None:
    """The work is over: a signal kills what is left of the process, without a traceback. `listen` may begin again."""
    for number in _state.before:
        signal.signal(number, signal.SIG_DFL)
    _forget()


def _forget() -> None:
    _state.before.clear()
    if _state.raised:
        _state.raised = False
        _disarm()
    if _state.told >= 0:
        signal.set_wakeup_fd(-1)
        os.close(_state.told)
        _state.told = -1


def _note(number: int, _: FrameType | None) -> None:
    if _state.received is not None:
        return
    _state.received = number
    # The last line comes after the first.
    _state.answered.wait(1)
    if _state.finishing is None:
        _end()


def _end() -> NoReturn:
    """Raise `Stopped`, and see to it that no library catches it for good: torch does, while it loads numpy."""
    assert _state.received is not None
    _state.raised = True
    # Not where somebody else has an alarm set.
    if signal.getsignal(signal.SIGALRM) is signal.SIG_DFL and not signal.getitimer(signal.ITIMER_REAL)[0]:
        signal.signal(signal.SIGALRM, _end_again)
        signal.setitimer(signal.ITIMER_REAL, _LOOK_SECONDS, _LOOK_SECONDS)
        # A slow exit of Python takes handlers away first: the alarm would then kill the process, and its exit code.
        atexit.register(_disarm)
    raise Stopped(_state.received)


def _disarm() -> None:
    """Take the alarm of `_end` away, unless somebody else has it."""
    if signal.getsignal(signal.SIGALRM) is _end_again:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _end_again(_: int, __: FrameType | None) -> None:
    if _state.finishing is not None:
        # Whoever finishes something looks at the request.
        return
    error = sys.exception()
    while error is not None:
        if isinstance(error, SystemExit):
            # On its way: what is called here is what cleans up.
            return
        error = error.__context__
    _end()


def _answer(reading: int) -> None:
    """Say at once that a signal has come, and end the process with a second one.

    A thread's work: the main one may be deep in a library that does not come back to Python for long.
    """
    first = 0.0
    while numbers := os.read(reading, 1):
        number = signal.Signals(numbers[0])
        if number not in _SIGNALS:
            continue
        if not first:
            first = time.monotonic()
            _say_so(number)
            _state.answered.set()
        elif time.monotonic() - first > _ONE_REQUEST_SECONDS:
            for child in _state.children:
                child.kill()
            os._exit(128 + number)
    os.close(reading)


def _say_so(number: signal.Signals) -> None:
    if os.environ.get("RANK", "0") != "0" or _SAID in os.environ:
        return
    when = f"stopping after {_state.finishing}" if _state.finishing else "stopping"
    again = "Ctrl-C again to stop at once" if number is signal.SIGINT else "a second one stops at once"
    # A bar has hidden the cursor, and a process that ends at once does not bring it back.
    start = f"{_SHOW_CURSOR}\n" if sys.stderr is not None and sys.stderr.isatty() else ""
    with contextlib.suppress(OSError):
        # Not through Python's stream: another thread may be writing to it.
        os.write(2, f"{start}{number.name}: {when}; {again}\n".encode())


@contextlib.contextmanager
def keeping(say: str | Callable[[], str | None]) -> Iterator[None]:
    """Say what is kept of the work, and what to type, if it is stopped meanwhile; the innermost words count.

    Serves as a decorator too.

    Args:
        say: the words, or what finds them once the work has stopped.
    """
    try:
        yield
    except Stopped as stopped:
        if stopped.kept == "":
            stopped.kept = say if isinstance(say, str) else say()
        raise
    except Exception as error:
        if not _state.raised or _state.received is None:
            raise
        # Some library has caught `Stopped`, and stumbles over what is then not there.
        caught = Stopped(_state.received)
        caught.kept = say if isinstance(say, str) else say()
        raise caught from error


class Request:
    """Request to end the work of a `finishing`, if one came."""

    @property
    def signal(self) -> int:
        """The first signal that came; 0 for none."""
        return _state.received or 0

    @contextlib.contextmanager
    def ending_anywhere(self) -> Iterator[None]:
        """Work within that may be left where it stands."""
        what, _state.finishing = _state.finishing, None
        try:
            if _state.received is not None:
                _end()
            yield
        finally:
            _state.finishing = what


@contextlib.contextmanager
def finishing(what: str) -> Iterator[Request]:
    """Note a first signal meanwhile instead of ending: who works here looks at the request, and finishes `what` first.

    Listens meanwhile where nobody did, as when ezsd is used as a library.
    """
    own = not _state.before
    listen()
    outer, _state.finishing = _state.finishing, what
    try:
        yield Request()
    finally:
        _state.finishing = outer
        if own:
            stop_listening()


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Threads and processes that are started meanwhile never see SIGINT, which a terminal sends to all at once.

    Whoever started them ends them. What starts processes later, such as a server, has to be started here itself.
    """
    # Whoever needs it starts it first, and that lets SIGINT through again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        # Handles one that came meanwhile.
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_commands(commands: Sequence[Sequence[str]], environment: Mapping[str, str]) -> list[int]:
    """Exit codes of commands run side by side. They are asked to stop where this process is, and waited for.

    What is kept is said by this process alone.
    """
    children = _state.children
    try:
        with shielded():
            for command in commands:
                children.append(subprocess.Popen(command, env={**environment, _SAID: "1"}))
        return [child.wait() for child in children]
    except Stopped:
        for child in children:
            child.terminate()
        for child in children:
            child.wait()
        raise
    finally:
        children.clear()
