"""Differences between runs. Runs that differ in their training seed alone are one arm; equal seeds of two arms pair."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ezsd.pipeline.inference import evaluation_tables as evaluations
from ezsd.pipeline.report.run_data import RunData
from ezsd.pipeline.report.tables import DASH, Table

_T_95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""Student's t that 95 % lie within, for 1, 2, ... degrees of freedom."""
_T_BEYOND = 2.042
"""Student's t for more degrees of freedom: that of the last, a little too wide."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean difference of two samples of values."""

    mean: float
    half: float | None
    """Half the width of the 95 % interval of Student's t; None where one value says nothing of the spread."""


@dataclass(frozen=True, slots=True, eq=False)
class Arm:
    """Evaluated runs that differ in their training seed alone."""

    label: str
    by_seed: Mapping[int, Mapping[str, float | None]]
    """AP50 by group, in [0, 1], of each seed; means where several runs have the same seed."""


def difference_table(runs: Sequence[RunData], columns: Mapping[str, str]) -> Table | None:
    """Difference of the main run's arm to each other arm, in points of AP50; None without another one evaluated.

    Args:
        runs: the main one first.
        columns: titles of the groups by their keys.
    """
    main, *others = arms(runs)
    if not others:
        return None
    rows = []
    for other in others:
        both = sorted(main.by_seed.keys() & other.by_seed.keys())
        cells = [_cell(_difference(main, other, key, both)) for key in columns]
        rows.append([f"{main.label} minus {other.label}", *cells, _seeds(main, other, both)])
    return Table(["difference", *(f"{title}, points" for title in columns.values()), "seeds"], rows)


def means_table(runs: Sequence[RunData], columns: Mapping[str, str]) -> Table | None:
    """Mean and range of AP50 over the seeds of each arm, in percent; None where no arm has several."""
    found = arms(runs)
    if all(len(arm.by_seed) < 2 for arm in found):
        return None
    rows = []
    for arm in found:
        values = [[scores.get(key) for scores in arm.by_seed.values()] for key in columns]
        rows.append([arm.label, *(_range([v for v in one if v is not None]) for one in values), _listed(arm.by_seed)])
    return Table(["runs", *(f"{title}, %" for title in columns.values()), "seeds"], rows)


def _range(values: Sequence[float]) -> str:
    if not values:
        return DASH
    mean, *ends = (f"{100 * value:.1f}" for value in (statistics.mean(values), min(values), max(values)))
    return f"{mean} ({ends[0]} to {ends[1]})"


def arms(runs: Sequence[RunData]) -> list[Arm]:
    """Arms of the evaluated runs, that of the main run first."""
    grouped: dict[str, list[RunData]] = {}
    for run in runs:
        if run.evaluation is not None:
            grouped.setdefault(_key(run), []).append(run)
    return [Arm(", ".join(run.label for run in members), _by_seed(members)) for members in grouped.values()]


def _key(run: RunData) -> str:
    """Everything that makes a run what it is, without its training seed."""
    config = run.spec["config"]
    train = {key: value for key, value in config["train"].items() if key != "seed"}
    return json.dumps({**run.spec, "config": {**config, "train": train}}, sort_keys=True)


def _by_seed(members: Sequence[RunData]) -> dict[int, dict[str, float | None]]:
    found: dict[int, list[Mapping[str, float | None]]] = {}
    for run in members:
        assert run.evaluation is not None
        found.setdefault(int(run.spec["config"]["train"]["seed"]), []).append(evaluations.headline(run.evaluation))
    return {
        seed: {key: _mean([one.get(key) for one in scores]) for key in dict.fromkeys(k for one in scores for k in one)}
        for seed, scores in found.items()
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _difference(main: Arm, other: Arm, key: str, both: Sequence[int]) -> Difference | None:
    """Difference of a group in points: of pairs where a seed is in both arms, else of the means."""
    ours, theirs = (
        {seed: 100 * value for seed, scores in arm.by_seed.items() if (value := scores.get(key)) is not None}
        for arm in (main, other)
    )
    if both:
        return paired([ours[seed] - theirs[seed] for seed in both if seed in ours and seed in theirs])
    return unpaired(list(ours.values()), list(theirs.values()))


def paired(differences: Sequence[float]) -> Difference | None:
    """Mean of differences of pairs, with the interval of Student's t; None without one."""
    if not differences:
        return None
    mean, degrees = statistics.mean(differences), len(differences) - 1
    if not degrees:
        return Difference(mean, None)
    return Difference(mean, _t(degrees) * statistics.stdev(differences) / math.sqrt(len(differences)))


def unpaired(ours: Sequence[float], theirs: Sequence[float]) -> Difference | None:
    """Difference of two means, with Welch's interval; None without a value on either side."""
    if not ours or not theirs:
        return None
    mean = statistics.mean(ours) - statistics.mean(theirs)
    if min(len(ours), len(theirs)) < 2:
        return Difference(mean, None)
    parts = [statistics.variance(values) / len(values) for values in (ours, theirs)]
    if not sum(parts):
        return Difference(mean, 0.0)
    degrees = sum(parts) ** 2 / sum(
        part**2 / (len(values) - 1) for part, values in zip(parts, (ours, theirs), strict=True)
    )
    # Fewer degrees of freedom make a wider interval.
    return Difference(mean, _t(max(math.floor(degrees), 1)) * math.sqrt(sum(parts)))


def _t(degrees: int) -> float:
    return _T_95[degrees - 1] if degrees <= len(_T_95) else _T_BEYOND


def _cell(found: Difference | None) -> str:
    if found is None:
        return DASH
    if found.half is None:
        return f"{found.mean:+.1f}"
    return f"{found.mean:+.1f} [{found.mean - found.half:+.1f}, {found.mean + found.half:+.1f}]"


def _seeds(main: Arm, other: Arm, both: Sequence[int]) -> str:
    """Seeds that a difference is of."""
    if both:
        left_out = sorted((main.by_seed.keys() | other.by_seed.keys()) - set(both))
        said = f"{_listed(both)}, paired" if len(both) > 1 else f"{both[0]}; one seed, no interval"
        return f"{said}; without {_listed(left_out)}" if left_out else said
    few = min(len(main.by_seed), len(other.by_seed)) < 2
    return f"{_listed(main.by_seed)} against {_listed(other.by_seed)}, not paired{'; no interval' if few else ''}"


def _listed(seeds: Iterable[int]) -> str:
    return ", ".join(str(seed) for seed in sorted(seeds))
