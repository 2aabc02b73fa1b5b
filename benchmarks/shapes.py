"""Does distillation find classes without a box? `python benchmarks/shapes.py --work DIR [--seeds 1 2 3] [--tag NAME]`.

For each seed: data, cache, then the detector with and without distillation (the loss weight alone differs), evaluated
on all names at once; a control whose novel text rows are permuted; crop accuracy of the raw and the
re-normalised teacher. One row per arm goes to results/shapes.jsonl.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import driver
import torch

from ezsd.data.annotations import load_evaluation
from ezsd.data.shapes import TEST_SEEDS
from ezsd.metrics import evaluate
from ezsd.pipeline.demo import ARMS, run_demo
from ezsd.pipeline.inference.evaluate import detect_split, run_dataset
from ezsd.pipeline.inference.predictor import TrainedDetector, load_trained
from ezsd.pipeline.runs.run import Run

GROUPS = ("base", "novel", "all")
CONTROL = "permuted novel names"


def permuted(trained: TrainedDetector) -> TrainedDetector:
    """The detector with each novel name's text row given to the next novel name."""
    base, novel = trained.text[: trained.base_count], trained.text[trained.base_count :]
    return replace(trained, text=torch.cat([base, novel.roll(1, 0)]))


def permuted_control(run: Run, data: Path) -> dict[str, float | None]:
    """AP50 of a run with permuted novel names."""
    trained, dataset = permuted(load_trained(run, "cpu")), run_dataset(run, data)
    path = dataset.root / dataset.val_annotations
    annotations = load_evaluation(path, dataset.split)
    found = detect_split(trained, annotations, dataset.images("val"), trained.text, "control")
    scores = evaluate(path, found, dataset.split)
    return {group: scores[group]["AP50"] for group in GROUPS}


def measure(arguments: argparse.Namespace) -> Iterator[driver.Row]:
    """The rows of every seed; then print the summary of all rows of the tag."""
    for seed in arguments.seeds:
        work = arguments.work / f"seed-{seed}"
        result = run_demo(work, seed=seed, device="cpu", overrides=tuple(arguments.overrides))
        common = {
            "tag": arguments.tag,
            "seed": seed,
            "overrides": arguments.overrides,
            "images": "500 train, 250 val",
        }
        seconds = {stage: round(spent, 1) for stage, spent in result.seconds.items()}
        for arm in ARMS:
            yield {"arm": arm, **result.scores[arm], "seconds": seconds, **common}
        yield {"arm": CONTROL, **permuted_control(Run.open(work / "runs/distilled"), work / "data"), **common}
        yield {"arm": "crops", **json.loads((work / "runs/distilled/crops.json").read_text()), **common}
    print(summary([row for row in driver.read("shapes", arguments.results) if row["tag"] == arguments.tag]))


def summary(found: list[driver.Row]) -> str:
    """Mean and range over the seeds per arm, and differences paired over seeds, in percent."""
    of = {arm: {row["seed"]: row for row in found if row["arm"] == arm} for arm in (*ARMS, CONTROL, "crops")}
    lines = [f"{'arm':<22}" + "".join(f"{group:>22}" for group in GROUPS)]
    for arm in (*ARMS, CONTROL):
        rows = of[arm].values()
        cells = [driver.spread([100 * row[group] for row in rows if row.get(group) is not None]) for group in GROUPS]
        lines.append(f"{arm:<22}" + "".join(f"{cell:>22}" for cell in cells))
    for group in GROUPS:
        gain = [100 * (of["distilled"][seed][group] - row[group]) for seed, row in of["plain"].items()]
        lines.append(f"distilled - plain, {group}: {driver.spread(gain)}")
    for group in ("base", "novel"):
        gain = [100 * (row["re_normalised"][group] - row["raw"][group]) for row in of["crops"].values()]
        lines.append(f"crop accuracy, re-normalised - raw, {group}: {driver.spread(gain)}")
    return "\n".join(lines)


if __name__ == "__main__":
    seeds = driver.option("--seeds", default=list(TEST_SEEDS))
    driver.run("shapes", measure, __doc__, "--work", seeds, "--tag", "--set", show=json.dumps)
