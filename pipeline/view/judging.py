"""Judging of a run's detections by a thread of its own, which says how far it is."""

from __future__ import annotations

import threading
from concurrent.futures import Future, wait

from ezsd.metrics.judging import Errors, Found, Objects, judge


class Judging:
    """Errors of the detections of all images, found in the background."""

    def __init__(self, objects: Objects, found: Found) -> None:
        self._errors: Future[Errors] = Future()
        self.progress = (0, 0)
        """Images done, and all that have a detection; zeros until the first is done."""
        # Nobody waits for it where the page is closed.
        threading.Thread(target=self._work, args=(objects, found), name="judging", daemon=True).start()

    def _work(self, objects: Objects, found: Found) -> None:
        try:
            self._errors.set_result(judge(objects, found, each=self._count))
        except BaseException as error:
            # Raised where the errors are asked for.
            self._errors.set_exception(error)

    def _count(self, done: int, every: int) -> None:
        self.progress = (done, every)

    def errors(self, patience: float | None = None) -> Errors | None:
        """The errors; None if they are not found within so many seconds, None for any number."""
        done, _ = wait([self._errors], patience)
        return self._errors.result() if done else None
