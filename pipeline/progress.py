"""Progress of long work: a rich bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

log = logging.getLogger("ezsd")
LINE_EVERY_SECONDS = 15.0
RATE_OVER_SECONDS = 300.0
"""Rate and time left are those of the last minutes: an hour that the process was suspended for is soon forgotten."""
LEAST_SAMPLES = 10
"""Samples that a rate is over at least: blocks of several workers end together, and may be minutes apart."""


class Progress:
    """Counts steps of a stage and shows rate and time left.

    Args:
        stage: its name.
        total: steps in all; None where nobody knows.
        unit: what a step is, singular.
        done: steps that an earlier run finished; they do not count into the rate.
    """

    def __init__(self, stage: str, total: int | None, *, unit: str, done: int = 0) -> None:
        self.stage, self.total, self.unit, self.done = stage, total, unit, done
        self._start_done = done
        self._note = ""
        self._bar: object | None = None
        self._recent: deque[tuple[float, int]] = deque()

    def __enter__(self) -> Self:
        self._began = self._last_line = time.monotonic()
        self._recent.append((self._began, self.done))
        if sys.stderr.isatty():
            # Imported here: a log file needs no bar.
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            said = (TextColumn("{task.fields[rate]}"), TextColumn("{task.fields[note]}"))
            # What a command prints meanwhile must reach whatever its output leads to, unless that is the terminal.
            own = sys.stdout is not None and sys.stdout.isatty()
            self._bar = bar = Bar(
                *columns,
                *said,
                console=Console(stderr=True),
                redirect_stdout=own,
                speed_estimate_period=RATE_OVER_SECONDS,
            )
            bar.start()
            self._task = bar.add_task(self.stage, total=self.total, completed=self.done, rate="", note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from rich.progress import Progress as Bar

        if isinstance(self._bar, Bar):
            self._bar.stop()
        elif kind is None:
            self._line(self._mean_rate())

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count steps; `note` is a short status such as a loss."""
        self.done += steps
        self._note = note
        if self._bar is not None:
            from rich.progress import Progress as Bar

            assert isinstance(self._bar, Bar)
            self._bar.update(self._task, completed=self.done, rate=_rate_text(self._recent_rate()), note=note)
        elif time.monotonic() - self._last_line > LINE_EVERY_SECONDS:
            self._line(self._recent_rate())

    def finish(self, item: object, result: object) -> None:
        """Count a finished task as one step; a stage that counts otherwise overrides this."""
        self.advance()

    def _line(self, rate: float) -> None:
        self._last_line = time.monotonic()
        left = ""
        if self.total is not None and rate and self.done < self.total:
            left = f", {duration((self.total - self.done) / rate)} left"
        note = f", {self._note}" if self._note else ""
        done = f"{self.done}" if self.total is None else f"{self.done}/{self.total}"
        log.info("%s: %s %ss, %s%s%s", self.stage, done, self.unit, _rate_text(rate), left, note)

    @property
    def seconds(self) -> float:
        """Since the stage began, > 0."""
        return max(time.monotonic() - self._began, 1e-9)

    def _mean_rate(self) -> float:
        """Steps a second since the stage began."""
        return (self.done - self._start_done) / self.seconds

    def _recent_rate(self) -> float:
        """Steps a second of the last minutes."""
        now = time.monotonic()
        while len(self._recent) > LEAST_SAMPLES and self._recent[1][0] <= now - RATE_OVER_SECONDS:
            self._recent.popleft()
        began, done = self._recent[0]
        # At most one a second: a training has thousands of steps in those minutes.
        if now - self._recent[-1][0] >= 1:
            self._recent.append((now, self.done))
        return (self.done - done) / max(now - began, 1e-9)


def _rate_text(rate: float) -> str:
    """Steps a second, as one says it."""
    return f"{rate:.1f}/s" if rate >= 1 else f"{60 * rate:.1f}/min"


def duration(seconds: float) -> str:
    """A time to wait, as one says it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add a stage's duration to `seconds`."""
    began = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - began


def now() -> str:
    """The time of day, UTC, for a record."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Everything logged meanwhile also goes to the end of a file."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()
