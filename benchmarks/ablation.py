"""What does each idea bring? `python benchmarks/ablation.py --work DIR [--datasets NAME ...] [--arms NAME ...]`.

Trains the arms of `ablation_arms.py` on the embedded benchmarks (`shapes`, `clutter`, and the other splits of their
names: `shapes-split2`, ...) and appends one row per dataset, seed and arm to results/ablation.jsonl. A row that is
there is not made again, and work left in DIR by a kill is taken up where it was: run the same command. Settings are
chosen on the dev seed (0, the default); the test seeds (4 to 8) are reported.

First, per dataset and seed, a gate: `ezsd cache build` must know the store of the arm "ours" as its own, and
`ezsd train` must have that arm's losses for some steps, digit for digit. `--table` prints the rows as tables and does
nothing else.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import driver
import torch
from ablation_arms import ARMS, LEARNED, STORES, Arm, chosen
from ablation_boxes import random_anchors, store_regions, write_boxes
from ablation_table import tables
from scoring import permuted, score

from ezsd.cache import Store
from ezsd.pipeline.config.schema import STAGE_ONE, load_preset
from ezsd.pipeline.data.dataset_toml import Places, dataset_toml
from ezsd.pipeline.data.datasets import DRAWN, Dataset, find_dataset
from ezsd.pipeline.data.shapes import TRAIN_IMAGES, VAL_IMAGES, write_shapes
from ezsd.pipeline.extraction.build import build_cache
from ezsd.pipeline.extraction.request import BuildRequest
from ezsd.pipeline.files import write_text
from ezsd.pipeline.inference.evaluate import evaluate_crops
from ezsd.pipeline.inference.predictor import load_trained
from ezsd.pipeline.runs.run import Run
from ezsd.pipeline.training.train import TrainRequest, train
from ezsd.vocabulary import Split

GATE_STEPS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is run, where, and under which settings of all arms."""

    work: Path
    results: Path
    tag: str
    name: str
    """One of `DRAWN`: a benchmark with one of its splits."""
    seed: int
    steps: int
    """Of an arm of length one."""
    images: tuple[int, int]
    """Training and validation images."""
    overrides: tuple[str, ...]
    jobs: int

    @property
    def folder(self) -> Path:
        """Everything of this dataset and seed but the images."""
        return self.work / self.name / f"seed-{self.seed}"

    @property
    def data(self) -> Path:
        """Images and annotations, which all splits share."""
        return self.work / "data" / f"{DRAWN[self.name][0]}-{self.seed}"

    def dataset(self, *, oracle: bool = False) -> Dataset:
        """The benchmark; for the oracle the same files with all names as base names."""
        return find_dataset(str(self.folder / "oracle.toml") if oracle else self.name, self.data)


def prepare_data(plan: Plan) -> None:
    """Draw the scenes, and write down the oracle's split of them."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    plan.data.parent.mkdir(parents=True, exist_ok=True)
    benchmark, names = DRAWN[plan.name][0], DRAWN[plan.name][1].names
    write_shapes(plan.data, train=plan.images[0], val=plan.images[1], seed=plan.seed, benchmark=benchmark)
    split = plan.folder / "oracle.toml"
    if split.is_file():
        return
    places = {part: Places(part, f"annotations/instances_{part}.json") for part in ("train", "val")}
    # The order of the split: rows of the text table mean the same names as everywhere else.
    write_text(split, dataset_toml(f"{plan.name}-oracle", places, Split(base=names, novel=())))


def prepared_store(plan: Plan, name: str) -> Path:
    """A store of `STORES`, built unless it is there; what it needs is made first."""
    spec = STORES[name]
    out = plan.folder / "stores" / (name if spec.after is None else f"{name} of {plan.steps} steps").replace(", ", "-")
    overrides = [*plan.overrides, *spec.overrides]
    if spec.after is not None:
        overrides.append(f"proposer.run={json.dumps(str(trained_run(plan, ARMS[spec.after]).folder))}")
    elif spec.boxes is not None:
        boxes = plan.folder / "boxes" / f"{out.name}.json"
        if not boxes.is_file():
            _write_given(plan, name, boxes)
        overrides.append(f"proposals.boxes={json.dumps(str(boxes))}")
    config = load_preset("shapes", overrides)
    if not spec.background:
        config = replace(config, teacher=replace(config.teacher, background=None))
    request = BuildRequest(
        dataset=plan.dataset(oracle=spec.oracle),
        config=config,
        out=out,
        preset="shapes",
        workers=plan.jobs,
        reuse=None if spec.reuse is None else prepared_store(plan, spec.reuse),
    )
    build_cache(request)
    return out


def _write_given(plan: Plan, name: str, out: Path) -> None:
    spec, dataset = STORES[name], plan.dataset()
    ours = Store(prepared_store(plan, "ours"))
    if spec.boxes == "ours":
        write_boxes(out, store_regions(ours))
        return
    grid = load_preset("shapes", [*plan.overrides, *spec.overrides]).proposals
    write_boxes(out, random_anchors(ours, dataset, grid, seed=plan.seed))


def trained_run(plan: Plan, arm: Arm) -> Run:
    """The finished run of an arm, trained or gone on with unless it is there."""
    steps = max(1, round(plan.steps * arm.length))
    # Other random numbers than those of any seed of the data.
    seed = plan.seed + 1000 * arm.again
    overrides = [*plan.overrides, *arm.train, f"train.seed={seed}", f"train.steps={steps}"]
    folder = plan.folder / "runs" / f"{arm.name} of {steps} steps".replace(", ", "-")
    config = load_preset("shapes", overrides)
    return train(TrainRequest(cache=prepared_store(plan, arm.store), run=folder, config=config))


def measure(plan: Plan, arm: Arm) -> driver.Row:
    """The row of an arm, but for what names it."""
    run = trained_run(plan, ARMS["ours"] if arm.permuted else arm)
    trained = load_trained(run, "cpu")
    store = Store(prepared_store(plan, arm.store))
    counts = [len(store.regions[i].box) for i in store.image_ids.tolist()]
    return {
        **score(permuted(trained) if arm.permuted else trained, plan.dataset()),
        "regions_per_image": round(sum(counts) / len(counts), 2),
        "crops": evaluate_crops(run, data_root=plan.data, device="cpu") if arm.name == "ours" else None,
        "store": store.manifest.digest,
        "seconds": run.seconds(),
    }


def gate(plan: Plan) -> None:
    """Stop unless the command line has the store and the losses of "ours"."""
    passed = plan.folder / "gate.json"
    if passed.is_file():
        return
    store = prepared_store(plan, "ours")
    words = ["cache", "build", "--dataset", plan.name, "--data-root", str(plan.data), "--out", str(store)]
    built = _ezsd(*words, plan=replace(plan, overrides=(*plan.overrides, *LEARNED)))
    if "complete already" not in built:
        raise SystemExit(f"gate: `ezsd cache build` did not take {store} for its own: {built}")
    # Those of stage one are the store's, and `ezsd train` refuses them.
    own = [override for override in plan.overrides if override.partition(".")[0] not in STAGE_ONE]
    short = replace(plan, overrides=(*own, f"train.seed={plan.seed}", f"train.steps={GATE_STEPS}"))
    folder = plan.folder / "gate"
    _ezsd("train", "--cache", str(store), "--run", str(folder), "--device", "cpu", plan=short)
    theirs = _losses(Run.open(folder))
    ours = _losses(trained_run(replace(plan, steps=GATE_STEPS), ARMS["ours"]))
    if ours != theirs or len(ours) != GATE_STEPS:
        raise SystemExit(f"gate: `ezsd train` has other losses than this arm: {theirs} and {ours}")
    passed.write_text(json.dumps({"store": Store(store).manifest.digest, "losses": ours}, indent=1) + "\n")


def _losses(run: Run) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in run.read_metrics()]


def _ezsd(*words: str, plan: Plan) -> str:
    command = [sys.executable, "-P", "-m", "ezsd", *words]
    for override in plan.overrides:
        command += ["--set", override]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"gate: {' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def name_of(plan: Plan, arm: Arm) -> driver.Row:
    """What tells a row from all others: a row that has it already is not made again."""
    spec = STORES[arm.store]
    return {
        "tag": plan.tag,
        "arm": arm.name,
        "against": arm.against,
        "dataset": plan.name,
        "seed": plan.seed,
        "steps": max(1, round(plan.steps * arm.length)),
        "images": list(plan.images),
        "settings": list(arm.train),
        "again": arm.again,
        "built": {"settings": list(spec.overrides), "boxes": spec.boxes, "background": spec.background},
        "overrides": list(plan.overrides),
    }


def is_done(plan: Plan, arm: Arm) -> bool:
    """Whether the row is there."""
    return driver.is_there("ablation", name_of(plan, arm), plan.results)


def run_here(plan: Plan, arms: Sequence[Arm]) -> None:
    """Arms one after the other in this process."""
    for arm in arms:
        row = {**name_of(plan, arm), **measure(plan, arm)}
        # What a killed start left running may have been quicker.
        if not is_done(plan, arm):
            driver.append("ablation", row, plan.results)
        print(f"{plan.name}, seed {plan.seed}, {arm.name}: done", flush=True)


def run_beside(plan: Plan, arms: Sequence[Arm], own: Sequence[str]) -> list[str]:
    """Arms in processes of one thread each, `jobs` at a time; returns those that failed, whose log says why."""
    beside = {
        arm.name: [sys.executable, __file__, *own, "--arms", arm.name, "--jobs", "1"]
        + ["--datasets", plan.name, "--seeds", str(plan.seed)]
        for arm in arms
    }
    return driver.beside(beside, plan.jobs, plan.folder / "logs", of=f"{plan.name}, seed {plan.seed}, ")


def run_seed(plan: Plan, arms: Sequence[Arm], own: Sequence[str]) -> list[str]:
    """All wanted rows of one dataset and seed; returns the arms that failed."""
    waiting = [arm for arm in arms if not is_done(plan, arm)]
    if not waiting:
        return []
    prepare_data(plan)
    gate(plan)
    if plan.jobs == 1:
        run_here(plan, waiting)
        return []
    # What needs another arm's run comes after it, and stores are made before two processes may want the same one.
    trained = [arm for arm in waiting if not arm.permuted]
    after = [arm for arm in trained if STORES[arm.store].after]
    failed = []
    for wave in ([arm for arm in trained if arm not in after], after):
        for name in dict.fromkeys(arm.store for arm in wave):
            prepared_store(plan, name)
        failed += run_beside(plan, wave, own)
    # It takes the run of another arm, which is locked while it is looked at.
    run_here(plan, [arm for arm in waiting if arm.permuted])
    return failed


def main(words: Sequence[str] | None = None) -> None:
    """Parse, run, print."""
    parser = driver.parser(
        __doc__,
        driver.option("--work", required=False),
        driver.option("--datasets", nargs="*", choices=[*DRAWN], default=["shapes"], metavar="NAME"),
        driver.option("--arms", nargs="*", default=[], help="names; all by default"),
        "--seeds",
        driver.option("--steps", type=int, default=load_preset("shapes").train.steps, help="of an arm of length one"),
        "--jobs",
        driver.option("--images", nargs=2, default=[TRAIN_IMAGES, VAL_IMAGES], metavar=("TRAIN", "VAL")),
        "--set",
        driver.option("--tag", default="arms"),
        driver.option("--list", action="store_true", help="name the arms and stop"),
        driver.option("--table", action="store_true", help="print the rows of the tag, datasets and seeds and stop"),
    )
    asked = parser.parse_args(words)
    try:
        arms = chosen(asked.arms)
    except ValueError as error:
        parser.error(str(error))
    if asked.list:
        print("\n".join(arm.name for arm in arms))
        return
    if asked.table:
        found = [row for row in driver.read("ablation", asked.results) if row["tag"] == asked.tag]
        print(tables([row for row in found if row["seed"] in asked.seeds and row["dataset"] in asked.datasets], arms))
        return
    if asked.work is None:
        parser.error("--work DIR is needed")
    torch.set_num_threads(1)
    own = ["--work", str(asked.work), "--steps", str(asked.steps), "--images", *map(str, asked.images)]
    own += ["--tag", asked.tag, "--results", str(asked.results)]
    own += [word for override in asked.overrides for word in ("--set", override)]
    failed = []
    for name, seed in itertools.product(asked.datasets, asked.seeds):
        plan = Plan(
            work=asked.work.absolute(),
            results=asked.results,
            tag=asked.tag,
            name=name,
            seed=seed,
            steps=asked.steps,
            images=(asked.images[0], asked.images[1]),
            overrides=tuple(asked.overrides),
            jobs=asked.jobs,
        )
        failed += [f"{arm} ({name}, seed {seed})" for arm in run_seed(plan, arms, own)]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; the same command goes on with them")


if __name__ == "__main__":
    main()
