"""Remarks on files that are converted: faults, for which they are refused, and oddities, which are counted."""

from __future__ import annotations

from pathlib import Path

from ezsd.errors import EzsdError, quantity
from ezsd.pipeline.errors import DatasetError


class Findings:
    """Faults and oddities of a conversion, with their places."""

    def __init__(self) -> None:
        self._faults: list[str] = []
        self._oddities: dict[str, tuple[int, str]] = {}

    def refuse(self, fault: EzsdError) -> None:
        """Take in a fault; the files that follow are still looked at."""
        self._faults.append(str(fault))

    def note(self, oddity: str, place: Path | str) -> None:
        """Count what is accepted."""
        count, first = self._oddities.get(oddity, (0, str(place)))
        self._oddities[oddity] = count + 1, first

    def require_sound(self) -> None:
        """DatasetError for the first fault, with the number of the others."""
        if self._faults:
            others = len(self._faults) - 1
            files = quantity(others, "more file is", "more files are")
            more = f" ({files} refused: {self._faults[1].partition(': ')[0]}, ...)" if others else ""
            raise DatasetError(f"{self._faults[0]}{more}")

    def lines(self) -> list[str]:
        """The oddities, one line each."""
        return [f"{oddity}: {count:,}, the first {first}" for oddity, (count, first) in self._oddities.items()]
