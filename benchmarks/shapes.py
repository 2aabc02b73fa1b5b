"""Does distillation find classes without a box? `python benchmarks/shapes.py --work DIR [--seeds 1 2 3] [--tag NAME]`.

For each seed: data, cache, then the detector with and without distillation (the loss weight alone differs), evaluated
on all names at once; a control whose novel text rows are permuted; crop accuracy of the raw and the
re-normalised teacher. One row per arm goes to results/shapes.jsonl. Work left in DIR is taken up again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import rows
import torch

from ezsd.data.annotations import load_evaluation
from ezsd.data.shapes import TEST_SEEDS
from ezsd.metrics import evaluate
from ezsd.pipeline.demo import ARMS, run_demo
from ezsd.pipeline.inference.evaluate import detect_split, run_dataset
from ezsd.pipeline.inference.predictor import load_trained
from ezsd.pipeline.runs.run import Run

GROUPS = ("base", "novel", "all")


def permuted_control(run: Run, data: Path) -> dict[str, float | None]:
    """AP50 of a run whose novel text rows have each been given to another novel name."""
    trained, dataset = load_trained(run, "cpu"), run_dataset(run, data)
    path = dataset.root / dataset.val_annotations
    novel = trained.text[trained.base_count :]
    text = torch.cat([trained.text[: trained.base_count], novel.roll(1, 0)])
    annotations = load_evaluation(path, dataset.split)
    found = detect_split(trained, annotations, dataset.root / dataset.val_images, text, "control", exif=dataset.exif)
    scores = evaluate(path, found, dataset.split)
    return {group: scores[group]["AP50"] for group in ("base", "novel", "all")}


def run_seed(work: Path, seed: int, tag: str, overrides: tuple[str, ...]) -> None:
    """Everything of one seed, and its rows."""
    result = run_demo(work / f"seed-{seed}", seed=seed, device="cpu", overrides=overrides)
    crops = json.loads((work / f"seed-{seed}/runs/distilled/crops.json").read_text())
    common: dict[str, object] = {"tag": tag, "seed": seed, "overrides": list(overrides), "images": "500 train, 250 val"}
    seconds = {stage: round(spent, 1) for stage, spent in result.seconds.items()}
    for arm in ARMS:
        rows.append("shapes", {"arm": arm, **result.scores[arm], "seconds": seconds, **common})
    control = permuted_control(Run.open(work / f"seed-{seed}/runs/distilled"), work / f"seed-{seed}/data")
    rows.append("shapes", {"arm": "permuted novel names", **control, **common})
    rows.append("shapes", {"arm": "crops", **crops, **common})


def summary(tag: str) -> str:
    """Mean and range over the seeds per arm, and differences paired over seeds."""
    found = [row for row in rows.read("shapes") if row["tag"] == tag]
    lines = [f"{'arm':<22}" + "".join(f"{group:>22}" for group in GROUPS)]
    for arm in (*ARMS, "permuted novel names"):
        cells = []
        for group in GROUPS:
            values = [float(str(row[group])) for row in found if row["arm"] == arm and row.get(group) is not None]
            cells.append(spread(values) if values else "-")
        lines.append(f"{arm:<22}" + "".join(f"{cell:>22}" for cell in cells))
    for group in GROUPS:
        pairs = {arm: {row["seed"]: float(str(row[group])) for row in found if row["arm"] == arm} for arm in ARMS}
        gain = [pairs["distilled"][seed] - value for seed, value in pairs["plain"].items()]
        lines.append(f"distilled - plain, {group}: {spread(gain)}")
    for group in ("base", "novel"):
        crops = [row for row in found if row["arm"] == "crops"]
        gain = [row["re_normalised"][group] - row["raw"][group] for row in crops]
        lines.append(f"crop accuracy, re-normalised - raw, {group}: {spread(gain)}")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean and range, in points."""
    return f"{100 * statistics.mean(values):.1f} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=list(TEST_SEEDS))
    parser.add_argument("--tag", default="headline")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        run_seed(arguments.work, seed, arguments.tag, tuple(arguments.overrides))
    print(summary(arguments.tag))


if __name__ == "__main__":
    main()
