"""SIGTERM as a request: a scheduler's notice that time is up."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class StopSignal:
    """Notes a first SIGTERM instead of dying of it; a second one ends the process at once.

    Attributes:
        received: whether it has come.
    """

    def __init__(self) -> None:
        self.received = False
        # Python lets the main thread alone handle signals.
        self._handles = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> StopSignal:
        if self._handles:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handles:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, _: int, frame: FrameType | None) -> None:
        self.received = True
        signal.signal(signal.SIGTERM, self._before)
