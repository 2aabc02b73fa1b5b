"""Does a long training with faults end as one without? `python benchmarks/long_training.py --work DIR`.

The same small training of `--steps` steps runs twice from one store: undisturbed, and with a fault about every
`--between` seconds, after which the same command goes on. Faults, in turn: SIGKILL, SIGTERM, SIGKILL of the process
that reads images, and SIGKILL with a flipped bit in the newest checkpoint. One row goes to results/long_training.jsonl.
Its gate: the last weights, all metrics of all steps and the evaluation are equal, digit for digit. Exit code 1
otherwise.

Both trainings stay in DIR, and the same command goes on with them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import driver
from driver import ROOT

sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests/cache"))

import storekit

from ezsd.pipeline.data.shapes import write_shapes
from ezsd.pipeline.files import write_text
from ezsd.pipeline.runs.run import Run
from tests.commandkit import ezsd
from tests.conftest import QUICK
from tests.pipeline.stopkit import alive, descendants

FAULTS = ("kill", "terminate", "reader", "flip")
WAIT_SECONDS = 24 * 3600
OF_STORE = [one for one in QUICK if not one.startswith(("model.", "train."))]
SMALL = [
    *(f"model.{one}" for one in ("fpn_channels=8", "tower_depth=1", "box_hidden=16", "rpn_proposals=20")),
    *(f"train.{one}" for one in ("batch_size=2", "reference_batch_size=2", "min_size=64", "max_size=64")),
    *(f"train.{one}" for one in ("regions_per_image=2", "num_workers=1", "rng=image", "pseudo_confidence=0")),
    "model.box_batch_size_per_image=8",
]
"""A detector that trains tens of steps a second."""


@dataclass
class Met:
    """Faults of a training so far."""

    faults: Counter[str] = field(default_factory=Counter)
    passed_over: int = 0
    """Damaged checkpoints that a start has passed over."""

    @classmethod
    def read(cls, path: Path) -> Met:
        """Those of earlier calls."""
        if not path.exists():
            return cls()
        found = json.loads(path.read_text())
        return cls(Counter(found["faults"]), found["passed_over"])

    def write(self, path: Path) -> None:
        """Keep them for a later call."""
        write_text(path, json.dumps(vars(self)))


def measure(arguments: argparse.Namespace) -> Iterator[driver.Row]:
    """One row of one pair."""
    work = arguments.work.absolute()
    data, store = work / "shapes", work / "store"
    write_shapes(data, train=24, val=8, seed=5, workers=1)
    _done(*("cache", "build", "--dataset", "shapes", "--data-root", data, "--out", store), settings=OF_STORE)
    every = f"train.checkpoint_every={arguments.every}"
    words = ("train", "--cache", store, "--device", "cpu")
    settings = [*SMALL, f"train.steps={arguments.steps}", every]
    whole, disturbed = work / "whole", work / "disturbed"
    _done(*words, "--run", whole, settings=settings)
    met = with_faults(disturbed, (*words, "--run", disturbed, *_set(settings)), arguments)
    figures = [figures_of(folder, data) for folder in (whole, disturbed)]
    equal = {name: figures[0][name] == figures[1][name] for name in figures[0]}
    yield {
        "steps": arguments.steps,
        "checkpoint_every": arguments.every,
        "between_seconds": arguments.between,
        "seed": arguments.seed,
        "faults": dict(met.faults),
        "passed_over": met.passed_over,
        "starts": len(Run(disturbed).starts()),
        "undisturbed_seconds": Run(whole).seconds()["train"],
        "equal": equal,
        "last_loss": Run(whole).read_metrics()[-1]["loss"],
        "note": arguments.note,
    }
    missing = [fault for fault in FAULTS if not met.faults[fault]]
    if missing or not all(equal.values()):
        raise SystemExit(f"equal: {equal}; faults that did not occur: {missing}")


def with_faults(run: Path, words: tuple[object, ...], arguments: argparse.Namespace) -> Met:
    """Train to the end, with faults at random moments that follow from the seed and their number."""
    note = run.with_name("faults.json")
    found = Met.read(note)
    while True:
        number = found.faults.total()
        chance, fault = random.Random(f"{arguments.seed}-{number}"), FAULTS[number % len(FAULTS)]
        done, met = one_start(words, run, fault, seconds=chance.expovariate(1 / arguments.between))
        found.passed_over += "damaged, passed over" in done.stderr
        # A reader whose training was killed has a traceback of its own.
        told = done.returncode < 0 or "Traceback" not in done.stderr
        if done.returncode and not (met and told):
            raise SystemExit(f"a training failed by itself: exit code {done.returncode}: {done.stderr[-1000:]}")
        if done.returncode:
            if fault == "flip":
                flip(run, chance)
            found.faults[fault] += 1
            print(f"{fault} {found.faults[fault]} at step {newest(run)} of {arguments.steps}", flush=True)
        found.write(note)
        if not done.returncode:
            return found


def one_start(
    words: tuple[object, ...], run: Path, fault: str, *, seconds: float
) -> tuple[subprocess.CompletedProcess[str], bool]:
    """Begin or go on with a training, with a fault after some seconds; and whether any process met it."""
    began, met = newest(run), list[int]()

    def meanwhile(process: int) -> None:
        until = time.monotonic() + seconds
        while alive(process) and not met:
            time.sleep(0.02)
            # Each start gets somewhere: a fault before the first new checkpoint would only be repeated.
            if time.monotonic() >= until and newest(run) > began:
                met.extend(inject(process, fault))

    return ezsd(*words, timeout=WAIT_SECONDS, meanwhile=meanwhile), bool(met)


def inject(process: int, fault: str) -> list[int]:
    """Bring a fault on a training, or on its reader; the process that met it."""
    if not alive(process):
        return []
    victim, sent = process, signal.SIGTERM if fault == "terminate" else signal.SIGKILL
    if fault == "reader":
        # The server that readers are forked from is a child; they are its children.
        found = [deeper for child in descendants(process) for deeper in descendants(child)]
        if not found:
            return []
        victim = found[0]
    try:
        os.kill(victim, sent)
    except ProcessLookupError:
        return []
    return [victim]


def flip(run: Path, chance: random.Random) -> None:
    """Flip a bit of the newest checkpoint, which a start then passes over."""
    file = chance.choice(sorted((run / "checkpoints" / f"step-{newest(run):08d}").glob("*.safetensors")))
    storekit.flip(file, chance.randrange(8 * file.stat().st_size))


def newest(run: Path) -> int:
    """Step of the newest checkpoint; 0 without one."""
    return max((int(folder.name[5:]) for folder in run.glob("checkpoints/step-*")), default=0)


def figures_of(run: Path, data: Path) -> driver.Row:
    """What two equal trainings have in common: weights, metrics and evaluation."""
    _done("eval", "--run", run, "--data-root", data, "--device", "cpu")
    trained = Run(run)
    last = trained.finished()
    weights = {file.name: file.read_bytes() for file in sorted(last.folder.glob("*.safetensors"))}
    metrics = [{key: value for key, value in line.items() if key != "seconds"} for line in trained.read_metrics()]
    return {"weights": weights, "metrics": metrics, "evaluation": json.loads((run / "eval.json").read_text())}


def _set(settings: list[str]) -> list[str]:
    return [word for value in settings for word in ("--set", value)]


def _done(*words: object, settings: list[str] | None = None) -> bool:
    """Run a command that must end well."""
    done = ezsd(*words, *_set(settings or []), timeout=WAIT_SECONDS)
    if done.returncode:
        raise SystemExit(f"without any fault: {done.stderr[-1000:]}")
    return True


if __name__ == "__main__":
    driver.run(
        "long_training",
        measure,
        __doc__,
        "--work",
        driver.option("--steps", type=int, default=20_000),
        driver.option("--every", type=int, default=100, help="steps from checkpoint to checkpoint"),
        driver.option("--between", type=float, default=15.0, help="seconds between faults, on average"),
        driver.option("--seed", type=int, default=0, help="of the moments of faults"),
        "--note",
    )
