"""Differences paired over seeds, with a bootstrap interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Difference:
    """How much one arm differs from another on the seeds that both have."""

    values: tuple[float, ...]
    """By seed."""
    mean: float
    low: float
    """2.5 % of the resampled means lie below."""
    high: float
    """2.5 % lie above."""

    @property
    def excluded(self) -> bool:
        """Whether the interval leaves out zero; of one seed nothing can be said."""
        return len(self.values) > 1 and (self.low > 0 or self.high < 0)


def difference(arm: Mapping[int, float], other: Mapping[int, float]) -> Difference | None:
    """The mean over common seeds of arm - other, and the percentile interval of `RESAMPLES` resamples of the seeds.

    With three seeds there are ten different resamples, and one in 27 holds the worst seed alone: the 95 % interval is
    the range of the three differences. It leaves out zero when all seeds agree in sign, which chance does one time in
    four where there is no difference. It says nothing of a wider population; only more seeds do.
    """
    seeds = sorted(arm.keys() & other.keys())
    if not seeds:
        return None
    values = np.array([arm[seed] - other[seed] for seed in seeds])
    rows = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[rows].mean(1), (2.5, 97.5))
    return Difference(tuple(values.tolist()), float(values.mean()), float(low), float(high))
