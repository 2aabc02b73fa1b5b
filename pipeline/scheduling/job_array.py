"""Parts of a build for job arrays: one job each, no scheduler, all on one store."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from ezsd.cache import Block, StoreBusy, StoreWriter

log = logging.getLogger("ezsd")

_AGAIN_SECONDS = 0.5
_TELL_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class Share:
    """Every `count`-th block, beginning with block `number` - 1: the same blocks in whichever process."""

    number: int
    """Number of the part, from 1 to count."""
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def has(self, block: Block) -> bool:
        """True if a block belongs to this part."""
        return block.index % self.count == self.number - 1


def open_share(open_writer: Callable[[bool], StoreWriter]) -> StoreWriter:
    """A writer of a store beside those of other parts, or alone as long as teacher and text have to be written.

    The first part to come has it alone and prepares it; the others wait. If that one is killed, another one prepares.

    Args:
        open_writer: opens the store, alone (False) or shared (True).
    """
    told = 0.0
    while True:
        for shared in (False, True):
            with contextlib.suppress(StoreBusy):
                return open_writer(shared)
        if time.monotonic() - told > _TELL_SECONDS:
            log.info("waiting for the process that prepares the store")
            told = time.monotonic()
        time.sleep(_AGAIN_SECONDS)
