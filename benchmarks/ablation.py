"""What does each idea bring? `python benchmarks/ablation.py --work DIR [--arms NAME ...] [--seeds 1 2 3] [--jobs 2]`.

Trains the arms of `ablation_arms.py` on `shapes`, each of which differs from the preset in the named thing alone, and
appends one row per arm and seed to results/ablation.jsonl. A row that is there is not made again, and work left in DIR
by a kill is taken up where it was: run the same command. Settings are chosen on the dev seed (0, the default); the test
seeds 1, 2 and 3 are reported.

First, per seed, a gate: `ezsd cache build` must know the baseline's store as its own, and `ezsd train` must have the
baseline's losses for some steps, digit for digit. `--table` prints the rows as tables and does nothing else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import driver
import torch
from ablation_arms import ARMS, STORES, Arm, chosen
from ablation_boxes import network_proposals, random_anchors, store_proposals, write_boxes
from ablation_table import tables
from shapes import permuted

from ezsd.cache import Store
from ezsd.data.shapes import SHAPES_SPLIT
from ezsd.metrics import evaluate
from ezsd.pipeline.config.schema import STAGE_ONE, load_preset
from ezsd.pipeline.data.annotation_cache import evaluation_annotations
from ezsd.pipeline.data.datasets import Dataset, find_dataset
from ezsd.pipeline.data.shapes import TRAIN_IMAGES, VAL_IMAGES, write_shapes
from ezsd.pipeline.extraction.build import build_cache
from ezsd.pipeline.extraction.request import BuildRequest
from ezsd.pipeline.files import write_text
from ezsd.pipeline.inference.evaluate import detect_split
from ezsd.pipeline.inference.predictor import TrainedDetector, load_trained
from ezsd.pipeline.runs.run import Run
from ezsd.pipeline.training.train import TrainRequest, train

GATE_STEPS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is run, where, and under which settings of all arms."""

    work: Path
    results: Path
    tag: str
    seed: int
    steps: int
    """Of an arm of length one."""
    images: tuple[int, int]
    """Training and validation images."""
    overrides: tuple[str, ...]
    jobs: int

    @property
    def folder(self) -> Path:
        """Everything of this seed."""
        return self.work / f"seed-{self.seed}"

    def dataset(self, *, oracle: bool = False) -> Dataset:
        """The benchmark; for the oracle the same files with all names as base names."""
        if not oracle:
            return find_dataset("shapes", self.folder / "data")
        return find_dataset(str(self.folder / "oracle.toml"), self.folder / "data")


def prepare_data(plan: Plan) -> None:
    """Draw the scenes, and write down the oracle's split of them."""
    write_shapes(plan.folder / "data", train=plan.images[0], val=plan.images[1], seed=plan.seed)
    split = plan.folder / "oracle.toml"
    if split.is_file():
        return
    lines = ['name = "shapes-oracle"']
    for part in ("train", "val"):
        lines += [f"[{part}]", f'images = "{part}"', f'annotations = "annotations/instances_{part}.json"']
    # The order of the split: rows of the text table mean the same names as everywhere else.
    lines += ["[classes]", f"base = {json.dumps(SHAPES_SPLIT.names)}", "novel = []"]
    write_text(split, "\n".join(lines) + "\n")


def prepared_store(plan: Plan, name: str) -> Path:
    """A store of `STORES`, built unless it is there; what it needs is made first."""
    spec = STORES[name]
    out = plan.folder / "stores" / (name if spec.after is None else f"{name} of {plan.steps} steps").replace(", ", "-")
    overrides = [*plan.overrides, *spec.overrides]
    if spec.boxes is not None:
        boxes = plan.folder / "boxes" / f"{out.name}.json"
        if not boxes.is_file():
            _write_given(plan, name, boxes)
        overrides.append(f"proposals.boxes={json.dumps(str(boxes))}")
    request = BuildRequest(
        dataset=plan.dataset(oracle=spec.oracle),
        config=load_preset("shapes", overrides),
        out=out,
        preset="shapes",
        workers=plan.jobs,
        reuse=None if spec.reuse is None else prepared_store(plan, spec.reuse),
    )
    build_cache(request)
    return out


def _write_given(plan: Plan, name: str, out: Path) -> None:
    spec = STORES[name]
    if spec.boxes in ("raw", "baseline"):
        write_boxes(out, store_proposals(Store(prepared_store(plan, spec.boxes))))
        return
    store, dataset, as_many = Store(prepared_store(plan, "baseline")), plan.dataset(), "filtered" not in str(spec.boxes)
    if spec.after is not None:
        run = trained_run(plan, ARMS[spec.after])
        write_boxes(out, network_proposals(run, store, dataset, as_many=as_many))
        return
    grid = load_preset("shapes", plan.overrides).proposals
    write_boxes(out, random_anchors(store, dataset, grid, seed=plan.seed, as_many=as_many))


def trained_run(plan: Plan, arm: Arm) -> Run:
    """The finished run of an arm, trained or gone on with unless it is there."""
    steps = max(1, round(plan.steps * arm.length))
    overrides = [*plan.overrides, *arm.train, f"train.seed={plan.seed}", f"train.steps={steps}"]
    folder = plan.folder / "runs" / f"{arm.name} of {steps} steps".replace(", ", "-")
    config = load_preset("shapes", overrides)
    return train(TrainRequest(cache=prepared_store(plan, arm.store), run=folder, config=config))


def measure(plan: Plan, arm: Arm) -> driver.Row:
    """The row of an arm, but for what names it."""
    run = trained_run(plan, ARMS["baseline"] if arm.evaluation else arm)
    trained = load_trained(run, "cpu")
    if arm.evaluation == "permuted":
        trained = permuted(trained)
    if arm.evaluation == "reference box class":
        trained.detector.settings = replace(trained.detector.settings, box_class="reference")
    store = Store(prepared_store(plan, arm.store))
    counts = [len(store.regions[i].box) for i in store.image_ids.tolist()]
    curve = run.folder / "validation.jsonl"
    return {
        **score(trained, plan.dataset()),
        "curve": [json.loads(line) for line in curve.read_text().splitlines()] if curve.is_file() else [],
        "regions_per_image": round(sum(counts) / len(counts), 2),
        "store": store.manifest.digest,
        "seconds": run.seconds(),
    }


def score(trained: TrainedDetector, dataset: Dataset) -> driver.Row:
    """AP50 of base, novel and all names at once and of novel names alone ("novel_only"); AP and AP75 likewise.

    The split is always that of the benchmark, whatever a run was trained on. A run whose text rows have the order of
    `SHAPES_SPLIT.names` is all that is asked for.
    """
    if trained.names != SHAPES_SPLIT.names:
        raise ValueError(f"expected text rows of {SHAPES_SPLIT.names}, found {trained.names}")
    path, images = dataset.annotations("val"), dataset.images("val")
    annotations, first = evaluation_annotations(path, dataset.split), len(dataset.split.base)
    every = evaluate(path, detect_split(trained, annotations, images, trained.text, "detect"), dataset.split)
    found = detect_split(trained, annotations, images, trained.text[first:], "detect novel alone", alone=True)
    alone = replace(found, class_index=found.class_index + first)
    novel = evaluate(path, alone, dataset.split, names=dataset.split.novel)["novel"]
    groups = {"base": every["base"], "novel": every["novel"], "all": every["all"], "novel_only": novel}
    return {
        **{group: scores["AP50"] for group, scores in groups.items()},
        "AP": {group: scores["AP"] for group, scores in groups.items()},
        "AP75": {group: scores["AP75"] for group, scores in groups.items()},
    }


def gate(plan: Plan) -> None:
    """Stop unless the command line's own baseline is this baseline: the same store, the same losses."""
    passed = plan.folder / "gate.json"
    if passed.is_file():
        return
    store, data = prepared_store(plan, "baseline"), plan.folder / "data"
    built = _ezsd("cache", "build", "--dataset", "shapes", "--data-root", str(data), "--out", str(store), plan=plan)
    if "complete already" not in built:
        raise SystemExit(f"gate: `ezsd cache build` did not take {store} for its own: {built}")
    # Those of stage one are the store's, and `ezsd train` refuses them.
    own = [override for override in plan.overrides if override.partition(".")[0] not in STAGE_ONE]
    short = replace(plan, overrides=(*own, f"train.seed={plan.seed}", f"train.steps={GATE_STEPS}"))
    folder = plan.folder / "gate"
    _ezsd("train", "--cache", str(store), "--run", str(folder), "--device", "cpu", plan=short)
    theirs = _losses(Run.open(folder))
    ours = _losses(trained_run(replace(plan, steps=GATE_STEPS), ARMS["baseline"]))
    if ours != theirs or len(ours) != GATE_STEPS:
        raise SystemExit(f"gate: `ezsd train` has other losses than this baseline: {theirs} and {ours}")
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
        "group": arm.group,
        "against": arm.against,
        "seed": plan.seed,
        "steps": max(1, round(plan.steps * arm.length)),
        "images": list(plan.images),
        "settings": list(arm.train),
        "regions_of": {"store": arm.store, "settings": list(spec.overrides), "boxes": spec.boxes},
        "overrides": list(plan.overrides),
    }


def is_done(plan: Plan, arm: Arm) -> bool:
    """Whether the row is there."""
    wanted = name_of(plan, arm)
    return any({key: row.get(key) for key in wanted} == wanted for row in driver.read("ablation", plan.results))


def run_here(plan: Plan, arms: Sequence[Arm]) -> None:
    """Arms one after the other in this process."""
    for arm in arms:
        row = {**name_of(plan, arm), **measure(plan, arm)}
        # What a killed start left running may have been quicker.
        if not is_done(plan, arm):
            driver.append("ablation", row, plan.results)
        print(f"seed {plan.seed}, {arm.name}: done", flush=True)


def run_beside(plan: Plan, arms: Sequence[Arm], own: Sequence[str]) -> list[str]:
    """Arms in processes of one thread each, `jobs` at a time; returns those that failed, whose log says why."""
    logs = plan.folder / "logs"
    logs.mkdir(exist_ok=True)

    def one(arm: Arm) -> str | None:
        command = [sys.executable, __file__, *own, "--arms", arm.name, "--seeds", str(plan.seed), "--jobs", "1"]
        log = logs / f"{arm.name}.log"
        with log.open("a") as file:
            code = subprocess.run(
                command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=file, stderr=subprocess.STDOUT
            ).returncode
        print(f"seed {plan.seed}, {arm.name}: {'done' if code == 0 else f'FAILED, see {log}'}", flush=True)
        return None if code == 0 else arm.name

    with ThreadPoolExecutor(plan.jobs) as pool:
        return [name for name in pool.map(one, arms) if name is not None]


def run_seed(plan: Plan, arms: Sequence[Arm], own: Sequence[str]) -> list[str]:
    """All wanted rows of one seed; returns the arms that failed."""
    waiting = [arm for arm in arms if not is_done(plan, arm)]
    if not waiting:
        return []
    prepare_data(plan)
    gate(plan)
    if plan.jobs == 1:
        run_here(plan, waiting)
        return []
    # What needs another arm's run comes after it, and stores are made before two processes may want the same one.
    trained = [arm for arm in waiting if not arm.evaluation]
    after = [arm for arm in trained if STORES[arm.store].after]
    failed = []
    for wave in ([arm for arm in trained if arm not in after], after):
        for name in dict.fromkeys(arm.store for arm in wave):
            prepared_store(plan, name)
        failed += run_beside(plan, wave, own)
    # All of these share the baseline's run, which is locked while it is looked at.
    run_here(plan, [arm for arm in waiting if arm.evaluation])
    return failed


def main(words: Sequence[str] | None = None) -> None:
    """Parse, run, print."""
    parser = driver.parser(
        __doc__,
        driver.option("--work", required=False),
        driver.option("--arms", nargs="*", default=[], help="names or groups; all by default"),
        "--seeds",
        driver.option("--steps", type=int, default=load_preset("shapes").train.steps, help="of an arm of length one"),
        "--jobs",
        driver.option("--images", nargs=2, default=[TRAIN_IMAGES, VAL_IMAGES], metavar=("TRAIN", "VAL")),
        "--set",
        driver.option("--tag", default="preset"),
        driver.option("--list", action="store_true", help="name the arms and stop"),
        driver.option("--table", action="store_true", help="print the rows of --tag and --seeds as tables and stop"),
    )
    asked = parser.parse_args(words)
    try:
        arms = chosen(asked.arms)
    except ValueError as error:
        parser.error(str(error))
    if asked.list:
        print("\n".join(f"{arm.group}: {arm.name}" for arm in arms))
        return
    if asked.table:
        found = [row for row in driver.read("ablation", asked.results) if row["tag"] == asked.tag]
        print(tables([row for row in found if row["seed"] in asked.seeds], arms))
        return
    if asked.work is None:
        parser.error("--work DIR is needed")
    torch.set_num_threads(1)
    own = ["--work", str(asked.work), "--steps", str(asked.steps), "--images", *map(str, asked.images)]
    own += ["--tag", asked.tag, "--results", str(asked.results)]
    own += [word for override in asked.overrides for word in ("--set", override)]
    failed = []
    for seed in asked.seeds:
        plan = Plan(
            work=asked.work.absolute(),
            results=asked.results,
            tag=asked.tag,
            seed=seed,
            steps=asked.steps,
            images=(asked.images[0], asked.images[1]),
            overrides=tuple(asked.overrides),
            jobs=asked.jobs,
        )
        failed += [f"{name} (seed {seed})" for name in run_seed(plan, arms, own)]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; the same command goes on with them")


if __name__ == "__main__":
    main()
