"""State of a per-store product that is still being made, so that a killed build goes on with it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ezsd.cache.errors import StoreError, StoreUnreadable
from ezsd.cache.files import discard, disk_room
from ezsd.cache.format.sealed_json import JSON
from ezsd.cache.journal.entries import Entry, journal_folder, little_endian, set_aside, write_entry
from ezsd.cache.journal.plan import Plan


@dataclass(frozen=True, slots=True)
class Unfinished:
    """Place in a build's journal for the state of a product that takes many steps to make."""

    plan: Plan
    product: str

    def write(self, step: int, arrays: Mapping[str, NDArray[Any]], attributes: Mapping[str, JSON]) -> None:
        """Keep the state after a step, all of it or nothing; states of other steps go once it is durable.

        Args:
            step: steps done.
            arrays: by name, of any shape; float32, int64, int32, int8 or float16.
            attributes: a JSON object.

        Raises:
            StoreError: the disk is full.
        """
        store, name = self.plan.store, f"{self._prefix}{step:08d}"
        rows = {name: _little_endian(values) for name, values in arrays.items()}
        with disk_room(store, sum(values.nbytes for values in rows.values())):
            set_aside(store, name)
            write_entry(store, name, rows, {"plan": self.plan.digest, "user": attributes}, point="unfinished")
        for folder in self._newest_first():
            if folder.name != name:
                discard(folder)

    def read(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]] | None:
        """Arrays and attributes of the newest state that is whole; None where there is none.

        A damaged one is passed over: what is made from an earlier one, or from nothing, is the same.
        """
        for folder in self._newest_first():
            try:
                entry = Entry.read(folder)
                if entry.attributes.get("plan") == self.plan.digest:
                    return {name: np.array(entry.array(name)) for name in entry.arrays}, dict(entry.attributes["user"])
            except StoreUnreadable:
                raise
            except StoreError:
                continue
        return None

    def discard(self) -> None:
        """Remove all states: the product is finished."""
        for folder in self._newest_first():
            discard(folder)

    def _newest_first(self) -> list[Path]:
        return sorted(journal_folder(self.plan.store).glob(f"{self._prefix}*"), reverse=True)

    @property
    def _prefix(self) -> str:
        return f"unfinished-{self.product}-"


def _little_endian(values: NDArray[Any]) -> NDArray[Any]:
    # A single number would come back as an array of one.
    return little_endian(values, values.dtype.newbyteorder("<").str).reshape(values.shape)
