"""Rows of the ablation as tables in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ablation_arms import IDEAS, LENGTHS, Arm, named
from driver import difference, spread

Row = Mapping[str, Any]
COLUMNS = ("base", "novel", "all", "novel_only")
MEANING = (
    "AP50 in percent: mean (range) over the seeds. Differences are arm minus what it is compared with, paired over "
    "seeds, in points: mean [bootstrap interval over seeds]. **Bold**: the interval leaves out zero, which with three "
    "seeds means that all of them agree in sign (by chance one time in four); it is no 95 % interval of a wider "
    "population. One seed has no interval."
)


def tables(found: Sequence[Row], arms: Sequence[Arm]) -> str:
    """One table per group of arms, the share of the oracle, and AP50 over the length of training."""
    seeds = sorted({row["seed"] for row in found})
    parts = [f"Seeds {', '.join(map(str, seeds)) or 'none'}. {MEANING}"]
    for group in dict.fromkeys(arm.group for arm in arms):
        members = [arm for arm in arms if arm.group == group]
        parts.append(_table(found, members, "AP50", group))
        if group == "box regression":
            parts.append(_table(found, members, "AP75", f"{group}, AP75"))
    return "\n\n".join(part for part in (*parts, _of_oracle(found), _lengths(found), _on_the_way(found)) if part)


def values(found: Sequence[Row], arm: str, column: str, metric: str = "AP50") -> dict[int, float]:
    """A figure by seed, in percent."""
    figures = {row["seed"]: (row if metric == "AP50" else row[metric])[column] for row in found if row["arm"] == arm}
    return {seed: 100 * figure for seed, figure in figures.items() if figure is not None}


def _table(found: Sequence[Row], arms: Sequence[Arm], metric: str, title: str) -> str:
    lines = [_line(found, arm, metric) for arm in arms if any(row["arm"] == arm.name for row in found)]
    names = ["arm", "base", "novel", "all", "novel, alone", "compared with", "base, difference", "novel, difference"]
    head = [f"### {title}", "", "| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join([*head, *lines]) if lines else ""


def _line(found: Sequence[Row], arm: Arm, metric: str) -> str:
    cells = [spread(values(found, arm.name, column, metric).values()) for column in COLUMNS]
    differences = ["", ""]
    if arm.against != arm.name:
        differences = [_difference(found, arm, column, metric) for column in ("base", "novel")]
    return "| " + " | ".join([arm.name, *cells, arm.against if any(differences) else "", *differences]) + " |"


def _difference(found: Sequence[Row], arm: Arm, column: str, metric: str) -> str:
    seen = difference(values(found, arm.name, column, metric), values(found, arm.against, column, metric))
    if seen is None:
        return ""
    if len(seen.values) == 1:
        return f"{seen.mean:+.1f}"
    text = f"{seen.mean:+.1f} [{seen.low:+.1f}, {seen.high:+.1f}]"
    return f"**{text}**" if seen.excluded else text


def _of_oracle(found: Sequence[Row]) -> str:
    ours, oracle = values(found, "baseline", "novel"), values(found, "oracle", "novel")
    shares = {seed: 100 * ours[seed] / oracle[seed] for seed in ours.keys() & oracle.keys() if oracle[seed]}
    share = f"Novel AP50 of the baseline as a share of the oracle's, percent: {spread(shares.values())}."
    return share if shares else ""


def _lengths(found: Sequence[Row]) -> str:
    """Novel AP50 by steps: each length is a run of its own, whose rate falls to zero."""
    steps = {
        length: {row["steps"] for row in found for idea in IDEAS if row["arm"] == named(idea, length)}
        for length in sorted({1.0, *LENGTHS})
    }
    if not any(steps[length] for length in LENGTHS):
        return ""
    lines = ["### novel AP50 over the length of training, a run for each", ""]
    lines += ["| steps | " + " | ".join(IDEAS) + " |", "|" + "---|" * (1 + len(IDEAS))]
    for length, seen in steps.items():
        cells = [spread(values(found, named(idea, length), "novel").values()) for idea in IDEAS]
        lines.append("| " + " | ".join([", ".join(map(str, sorted(seen))) or "-", *cells]) + " |")
    return "\n".join(lines)


def _on_the_way(found: Sequence[Row]) -> str:
    """Novel AP50 of the longest runs before they end: the rate is still high there."""
    longest = max(LENGTHS)
    curves = {idea: [row["curve"] for row in found if row["arm"] == named(idea, longest)] for idea in IDEAS}
    steps = sorted({point["step"] for rows in curves.values() for curve in rows for point in curve})
    if not steps:
        return ""
    lines = [f"### novel AP50 on the way of the runs x {longest:g}", ""]
    lines += ["| step | " + " | ".join(IDEAS) + " |", "|" + "---|" * (1 + len(IDEAS))]
    for step in steps:
        seen = {
            idea: [100 * point["novel"] for curve in rows for point in curve if point["step"] == step]
            for idea, rows in curves.items()
        }
        cells = [spread(points) for points in seen.values()]
        lines.append("| " + " | ".join([str(step), *cells]) + " |")
    return "\n".join(lines)
