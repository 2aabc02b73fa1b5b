"""`ezsd demo`: the whole pipeline on the embedded benchmark, in minutes."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ezsd.choices import Benchmark
from ezsd.pipeline.config.relations import load_settings
from ezsd.pipeline.config.schema import STAGE_ONE, setting_of
from ezsd.pipeline.data.datasets import find_dataset
from ezsd.pipeline.data.shapes import write_shapes
from ezsd.pipeline.errors import RunError
from ezsd.pipeline.extraction.build import build_cache
from ezsd.pipeline.extraction.request import BuildRequest
from ezsd.pipeline.inference.evaluate import evaluate_crops, evaluate_run
from ezsd.pipeline.inference.evaluation_tables import headline
from ezsd.pipeline.interrupts import run_commands
from ezsd.pipeline.report import write_report
from ezsd.pipeline.runs.run import Run

log = logging.getLogger("ezsd")

ARMS = {"distilled": (), "plain": ("loss.distillation=0", "train.pseudo_confidence=0")}
"""The two runs of the demo: only the first learns from the teacher's regions."""
_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Exit codes of a training that was told to end."""


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Results that the demo prints."""

    scores: dict[str, dict[str, float | None]]
    """AP50 by arm and group."""
    seconds: dict[str, float]
    """Seconds by stage."""
    report: Path


def run_demo(
    out: Path, *, seed: int, device: str, overrides: tuple[str, ...] = (), benchmark: Benchmark = "shapes"
) -> DemoResult:
    """Draw `shapes` or `clutter`, build the cache, train with and without distillation, evaluate, report.

    Everything lands below `out`; a second call goes on where the first was stopped.
    """
    seconds: dict[str, float] = {}
    clock = _Clock(seconds)
    data, store = out / "data", out / "cache"
    config = load_settings("shapes", overrides)
    write_shapes(data, seed=seed, benchmark=benchmark)
    clock.lap(benchmark)
    built = build_cache(
        BuildRequest(dataset=find_dataset(benchmark, data), config=config, out=store, preset="shapes", device=device)
    )
    seconds |= {f"cache: {stage}": spent for stage, spent in built.seconds.items()}
    clock.restart()
    train_arms(out, store, seed=seed, device=device, overrides=overrides)
    clock.lap("train both")
    scores = {}
    for arm in ARMS:
        run = Run.open(out / "runs" / arm)
        scores[arm] = headline(evaluate_run(run, data_root=data, device=device))
    evaluate_crops(Run.open(out / "runs/distilled"), data_root=data, device=device)
    clock.lap("evaluate both")
    report = write_report(Run.open(out / "runs/distilled"), data_root=data, compare=[Run.open(out / "runs/plain")])
    clock.lap("report")
    return DemoResult(scores, seconds, report)


def train_arms(out: Path, store: Path, *, seed: int, device: str, overrides: tuple[str, ...]) -> None:
    """Train both arms: side by side with one thread each on a CPU, one after the other on a GPU."""
    waiting = [_command(out, store, arm, seed, device, (*overrides, *extra)) for arm, extra in ARMS.items()]
    # Contended cores make multi-threaded sums collapse: one thread per process, one process per core.
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if device == "cpu" else {})
    together = 2 if device == "cpu" and (os.cpu_count() or 1) > 1 else 1
    for start in range(0, len(waiting), together):
        codes = run_commands(waiting[start : start + together], environment)
        if any(codes) and not set(codes) - {0, *_STOPPED}:
            # It was told alone, and leaves the word to the demo.
            raise RunError(f"a training was stopped by a signal (exit codes {codes}); run the same command to go on")
        if any(codes):
            raise RunError(f"training stopped with exit codes {codes}; its message stands above")


def _command(out: Path, store: Path, arm: str, seed: int, device: str, overrides: tuple[str, ...]) -> list[str]:
    # -P: a folder named ezsd/ where the user works must not stand in for the package.
    command = [sys.executable, "-P", "-m", "ezsd", "train", "--cache", str(store), "--run", str(out / "runs" / arm)]
    command += ["--device", device, "--set", f"train.seed={seed}"]
    for override in overrides:
        # What the store is built with is said to its build alone: a training refuses it.
        if setting_of(override).partition(".")[0] not in STAGE_ONE:
            command += ["--set", override]
    return command


class _Clock:
    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self.restart()

    def restart(self) -> None:
        self.began = time.perf_counter()

    def lap(self, stage: str) -> None:
        self.seconds[stage] = time.perf_counter() - self.began
        self.restart()
