"""Is a name found as well when it is asked for by itself? `python benchmarks/asked.py --run RUN [--data-root DIR]`.

AP50 of each name of a run on the validation images: among all names at once, asked for by itself while the run's other
names compete unseen, and asked for alone. Means over base and over novel names go to results/asked.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import rows

from ezsd.metrics import evaluate
from ezsd.pipeline.data.annotation_cache import evaluation_annotations
from ezsd.pipeline.inference.evaluate import detect_split, run_dataset
from ezsd.pipeline.inference.predictor import load_trained
from ezsd.pipeline.runs.run import Run


def by_name(run: Run, data_root: Path | None, share: slice) -> dict[str, dict[str, float | None]]:
    """AP50 of a share of the names, by how each is asked for: "among", "asked" and "alone"."""
    trained, dataset = load_trained(run, "cpu"), run_dataset(run, data_root)
    path, root = dataset.root / dataset.val_annotations, dataset.root / dataset.val_images
    annotations = evaluation_annotations(path, dataset.split)
    every = evaluate(
        path, detect_split(trained, annotations, root, trained.text, "among all", exif=dataset.exif), dataset.split
    )
    found: dict[str, dict[str, float | None]] = {}
    for index, name in list(enumerate(trained.names))[share]:
        found[name] = {"among": every["per_class"][name]["AP50"]}
        for way, alone in (("asked", False), ("alone", True)):
            row = trained.text[index : index + 1]
            one = detect_split(trained, annotations, root, row, f"{name}, {way}", exif=dataset.exif, alone=alone)
            one = dataclasses.replace(one, class_index=one.class_index + index)
            found[name][way] = evaluate(path, one, dataset.split, names=(name,))["per_class"][name]["AP50"]
    return found


def means(found: dict[str, dict[str, float | None]], names: Sequence[str]) -> dict[str, float]:
    """The mean over some names, by how they are asked for; names without an object are left out."""
    ways = ("among", "asked", "alone")
    return {way: statistics.mean(v for name in names if (v := found[name][way]) is not None) for way in ways}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--tag", default="demo")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    arguments = parser.parse_args()
    run = Run.open(arguments.run)
    shares = [slice(first, None, arguments.jobs) for first in range(arguments.jobs)]
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        parts = pool.map(partial(by_name, run, arguments.data_root), shares)
        found = {name: ways for part in parts for name, ways in part.items()}
    names, base_count = run.card["names"], run.card["base_count"]
    assert isinstance(names, list)
    assert isinstance(base_count, int)
    groups = {"base": means(found, names[:base_count]), "novel": means(found, names[base_count:])}
    rows.append("asked", {"tag": arguments.tag, "AP50": groups, "by_name": {name: found[name] for name in names}})
    for group, ways in groups.items():
        print(f"{group:<6}" + "".join(f"  {way} {100 * value:.1f}" for way, value in ways.items()))


if __name__ == "__main__":
    main()
