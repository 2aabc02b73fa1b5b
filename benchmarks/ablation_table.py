"""Rows of the ablation as tables in Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ablation_arms import ARMS, Arm
from driver import Difference, difference, holm, spread

from ezsd.data.shapes import BENCHMARKS

Row = Mapping[str, Any]
Pair = tuple[str, int]
"""Dataset, which is a benchmark with one of its splits, and seed."""
GROUPS = ("base", "novel", "all")
FIGURES = (*((metric, group) for group in GROUPS for metric in ("AP50", "AP75", "AP")), ("IoU", "novel"))
COMPARED = (("AP50", "base"), ("AP50", "novel"), ("AP75", "novel"), ("IoU", "novel"))
LEVEL = 0.05
MEANING = (
    "Figures in percent: mean (range) over splits and seeds. IoU, novel: of each novel object with the best-scored "
    "detection of its name, among those that overlap it by at least 0.1 and no other object of that name more; mean "
    "over the objects that have one. Differences are arm minus what it is compared with, in points, paired over splits "
    "and seeds: mean [95 % t interval], which takes the pairs for independent, and how many have the sign of the mean. "
    "**Bold**: p < 0.05 in a paired t test after Holm's correction for all differences of the benchmark; one pair has "
    "neither interval nor test. The difference of a run and itself with other random numbers is in no family; it says "
    "what chance alone does."
)


def tables(found: Sequence[Row], arms: Sequence[Arm]) -> str:
    """The tables of each benchmark that has rows."""
    parts = [MEANING]
    for benchmark in BENCHMARKS:
        rows = [row for row in found if row["dataset"].partition("-")[0] == benchmark]
        if rows:
            parts += _of_benchmark(benchmark, rows, [arm for arm in arms if values(rows, arm.name, *FIGURES[0])])
    return "\n\n".join(part for part in parts if part)


def values(found: Sequence[Row], arm: str, metric: str, group: str) -> dict[Pair, float]:
    """A figure by dataset and seed, in percent."""
    figures = {(row["dataset"], row["seed"]): row[metric][group] for row in found if row["arm"] == arm}
    return {pair: 100 * figure for pair, figure in figures.items() if figure is not None}


def _of_benchmark(benchmark: str, rows: Sequence[Row], arms: Sequence[Arm]) -> list[str]:
    seeds: dict[str, set[int]] = {}
    for row in rows:
        seeds.setdefault(row["dataset"], set()).add(row["seed"])
    told = "; ".join(f"`{name}` with seeds {', '.join(map(str, sorted(of)))}" for name, of in sorted(seeds.items()))
    differences = _differences(rows, arms)
    return [
        f"### {benchmark}",
        f"Runs on {told}.",
        _table(
            ["arm", *(f"{metric}, {group}" for metric, group in FIGURES)],
            [[arm.name, *(spread(values(rows, arm.name, *figure).values()) for figure in FIGURES)] for arm in arms],
        ),
        _compared(arms, differences),
        _by_split(arms, sorted(seeds), differences),
        _of_itself(rows),
        _of_oracle(rows),
        _of_teacher(rows),
    ]


def _differences(rows: Sequence[Row], arms: Sequence[Arm]) -> dict[tuple[str, str, str], dict[str, Difference]]:
    """Of each arm and figure, by dataset and of all ("")."""
    found: dict[tuple[str, str, str], dict[str, Difference]] = {}
    for arm in arms:
        for metric, group in COMPARED if arm.against != arm.name else ():
            ours, theirs = values(rows, arm.name, metric, group), values(rows, arm.against, metric, group)
            for part in ("", *sorted({dataset for dataset, _ in ours})):
                one = difference({pair: figure for pair, figure in ours.items() if part in ("", pair[0])}, theirs)
                if one is not None:
                    found.setdefault((arm.name, metric, group), {})[part] = one
    return found


def _compared(arms: Sequence[Arm], differences: Mapping[tuple[str, str, str], Mapping[str, Difference]]) -> str:
    tested = {key: of[""].p for key, of in differences.items() if not ARMS[key[0]].again and len(of[""].values) > 1}
    corrected = holm(tested)
    lines = []
    for arm in arms:
        seen = {figure: differences[arm.name, *figure][""] for figure in COMPARED if (arm.name, *figure) in differences}
        if seen:
            pairs = len(next(iter(seen.values())).values)
            cells = [
                _cell(seen[figure], bold=corrected.get((arm.name, *figure), 1) < LEVEL) if figure in seen else ""
                for figure in COMPARED
            ]
            lines.append([arm.name, arm.against, str(pairs), *cells])
    family = f"Differences; {len(tested)} of them tested." if tested else "Differences."
    heads = ["arm", "compared with", "pairs", *(f"{metric}, {group}" for metric, group in COMPARED)]
    return f"{family}\n\n{_table(heads, lines)}" if lines else ""


def _cell(seen: Difference, *, bold: bool) -> str:
    if math.isinf(seen.half_width):
        return f"{seen.mean:+.1f}"
    low, high = seen.mean - seen.half_width, seen.mean + seen.half_width
    alike = sum(value * seen.mean > 0 for value in seen.values)
    text = f"{seen.mean:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"{f'**{text}**' if bold else text}, {alike} of {len(seen.values)} so"


def _by_split(
    arms: Sequence[Arm],
    datasets: Sequence[str],
    differences: Mapping[tuple[str, str, str], Mapping[str, Difference]],
) -> str:
    if len(datasets) < 2:
        return ""
    lines = [
        [arm.name, arm.against, *(f"{of[name].mean:+.1f}" if name in of else "" for name in datasets)]
        for arm in arms
        if (of := differences.get((arm.name, "AP50", "novel")))
    ]
    return f"Difference in novel AP50 by split.\n\n{_table(['arm', 'compared with', *datasets], lines)}"


def _of_itself(rows: Sequence[Row]) -> str:
    """Spread of a run: two runs differ by the square root of two times it."""
    cells = []
    for metric, group in COMPARED:
        seen = difference(values(rows, "ours, again", metric, group), values(rows, "ours", metric, group))
        if seen is not None and len(seen.values) > 1:
            deviation = math.sqrt(statistics.mean(value * value for value in seen.values) / 2)
            cells.append(f"{metric}, {group} {deviation:.1f}")
    return f"Standard deviation of one run, from runs with other random numbers, points: {'; '.join(cells)}." * bool(
        cells
    )


def _of_oracle(rows: Sequence[Row]) -> str:
    cells = []
    for oracle in ("oracle", "oracle, distilled"):
        for metric in ("AP50", "AP75"):
            ours, theirs = (values(rows, arm, metric, "novel") for arm in ("ours", oracle))
            shares = [100 * ours[pair] / theirs[pair] for pair in ours.keys() & theirs.keys() if theirs[pair]]
            cells += [f"{metric} of *{oracle}* {spread(shares)}"] * bool(shares)
    return f"Share that *ours* reaches of the novel figures of an oracle, percent: {'; '.join(cells)}." * bool(cells)


def _of_teacher(rows: Sequence[Row]) -> str:
    crops = [row["crops"] for row in rows if row.get("crops")]
    cells = [
        f"{group} {spread([100 * one['raw'][group] for one in crops])} and "
        f"{spread([100 * one['re_normalised'][group] for one in crops])}"
        for group in ("base", "novel")
    ]
    told = f"Crop accuracy of the teacher on validation objects, raw and re-normalised, percent: {'; '.join(cells)}."
    return told * bool(crops)


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *lines))
