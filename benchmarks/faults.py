"""Do stores and runs survive what breaks processes and disks? The long form of tests/faults, as `make faults`.

Real commands on tiny drawn data are killed at random moments and at every failpoint, bits of all files of a store are
flipped, a random walk builds, kills, damages, mends and reads stores beside a model of them, and trainings are killed
while they save. `lost` counts trials after which anything finished was gone or came out otherwise than in an unbroken
run; `wrong` those in which damage was taken for data. Both must be 0: the exit code is 1 otherwise.

Rows are kept in portions, and a second call goes on after those of the same commit, seed and tag; what a trial does
follows from the seed and its number. But for the moments of kills: they follow from the speed of the machine too.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import driver
import numpy as np
from driver import ROOT, Row
from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as seeded
from hypothesis.stateful import invariant, run_state_machine_as_test

sys.path.insert(0, str(ROOT / "tests/cache"))

import storekit
import torch
from test_store_machine import StoreMachine

from ezsd.cache import Store, StoreError, verify
from ezsd.cache.files import FAILPOINTS
from ezsd.pipeline.data.shapes import write_shapes
from ezsd.pipeline.runs.run import Run
from tests.commandkit import ezsd
from tests.conftest import QUICK
from tests.pipeline.stopkit import alive, descendants

KILLS = {"builder": 80, "trainer": 60, "worker": 30, "reader": 15, "rank": 15}
"""Share of each victim in 200 kills."""
PORTION = {"flips": 100, "steps": 500, "saves": 25}
"""Trials to a row; 10 of the others."""
OF_RUN = [one for one in QUICK if one.startswith(("model.", "train."))]
OF_STORE = [
    *(one for one in QUICK if one not in OF_RUN),
    "adapt.steps=1",
    "adapt.batch_size=16",
    "build.block_images=1",
]
OF_RUN += [f"train.{one}" for one in ("batch_size=2", "reference_batch_size=2", "steps=4", "checkpoint_every=1")]
OF_RUN += ["train.rng=image"]
WAIT_SECONDS = 600
TRIES = 20
"""A trial in which a process had ended before its kill is made again so often."""


@dataclass
class Count:
    """What the trials of a portion came to."""

    trials: int = 0
    faults: int = 0
    survived: int = 0
    lost: int = 0
    wrong: int = 0
    failures: list[str] = field(default_factory=list)

    def add(self, trial: str, outcome: Outcome) -> None:
        """Take in one trial."""
        self.trials += 1
        self.faults += outcome.faults
        self.lost += bool(outcome.lost)
        self.wrong += bool(outcome.wrong)
        self.survived += not (outcome.lost or outcome.wrong)
        self.failures += [f"{trial}: {said}" for said in (outcome.lost, outcome.wrong) if said]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one trial came to; texts say what went wrong."""

    faults: int = 1
    lost: str = ""
    wrong: str = ""


NOTHING = Outcome(faults=0)
"""A process had ended before its kill."""
Trial = Callable[["Scene", random.Random, int], Outcome]


class Scene:
    """Data, an unbroken store and an unbroken run to compare with; made when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def empty(self) -> Path:
        """A folder for one trial, with nothing of the last one."""
        folder = self.folder / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    @cached_property
    def data(self) -> Path:
        """Three drawn scenes to train on, two to validate."""
        root = self.folder / "shapes"
        write_shapes(root, train=3, val=2, seed=5, workers=1)
        return root

    def build(self, out: Path, *options: object, **how: Any) -> subprocess.CompletedProcess[str]:  # noqa: ANN401 - handed on
        """Build or go on with a store."""
        words = ("cache", "build", "--dataset", "shapes", "--data-root", self.data, "--device", "cpu", "--out", out)
        return self._command(*words, *(options or ("--scheduler", "sync")), *_settings(OF_STORE), **how)

    def train(self, run: Path, *changes: str, **how: Any) -> subprocess.CompletedProcess[str]:  # noqa: ANN401 - handed on
        """Train or go on with a run."""
        return self._command(*self.training(run, *changes), **how)

    def training(self, run: Path, *changes: str) -> tuple[object, ...]:
        """Words of the command."""
        return ("train", "--cache", self.store, "--run", run, "--device", "cpu", *_settings([*OF_RUN, *changes]))

    def _command(self, *words: object, **how: Any) -> subprocess.CompletedProcess[str]:  # noqa: ANN401 - handed on
        return ezsd(*words, timeout=WAIT_SECONDS, EZSD_CACHE_DIR=str(self.folder / "parsed"), **how)

    @cached_property
    def store(self) -> Path:
        """The store of an unbroken build."""
        return self._whole("store", self.build)

    @cached_property
    def run(self) -> Path:
        """The run of an unbroken training."""
        return self._whole("run", self.train)

    @cached_property
    def shared_run(self) -> Path:
        """The run of an unbroken training in two processes."""
        return self._whole("shared_run", lambda out: _torchrun(self, out).wait_for())

    def _whole(self, name: str, command: Callable[[Path], subprocess.CompletedProcess[str]]) -> Path:
        done = command(self.folder / name)
        if done.returncode:
            raise RuntimeError(f"without any fault: {done.stderr}")
        return self.folder / name

    @cached_property
    def build_seconds(self) -> float:
        """Time of an unbroken build, without its preparations."""
        _ = self.store
        return driver.timed(lambda: self.build(self.empty() / "store"))[1].wall

    @cached_property
    def train_seconds(self) -> float:
        """Time of an unbroken training."""
        _ = self.store
        return driver.timed(lambda: self.train(self.empty() / "run"))[1].wall


def _settings(values: list[str]) -> list[str]:
    return [word for value in values for word in ("--set", value)]


# Kills of processes


def builder(scene: Scene, chance: random.Random, number: int) -> Outcome:
    """A build is killed at a random moment and goes on to the same bytes."""
    del number
    seconds, out = chance.random() * scene.build_seconds, scene.empty() / "store"
    return _gone_on(scene, out) if _killed(scene.build(out, meanwhile=_kill_after(seconds))) else NOTHING


def failpoint(scene: Scene, chance: random.Random, number: int) -> Outcome:
    """A build is killed at one of the failpoints, in turn, and goes on to the same bytes."""
    del chance
    out, point = scene.empty() / "store", FAILPOINTS[number % len(FAILPOINTS)]
    if not _killed(scene.build(out, EZSD_FAILPOINT=point)):
        return Outcome(lost=f"the failpoint {point} is not reached any more")
    return _gone_on(scene, out)


def worker(scene: Scene, chance: random.Random, number: int) -> Outcome:
    """One of two workers is killed after some blocks; the build goes on by itself, or the same command does."""
    del number
    out, blocks, delay = scene.empty() / "store", chance.randrange(3), chance.random()
    killed: list[int] = []

    def meanwhile(process: int) -> None:
        workers: list[int] = []
        while alive(process) and (len(workers) < 2 or _blocks(out) < blocks):
            workers = _of_kind(process, "spawn_main")
            time.sleep(0.01)
        time.sleep(delay * 0.3)
        killed.extend(_kill(chance.choice(workers)) if workers and alive(process) else ())

    done = scene.build(out, "--workers", "2", meanwhile=meanwhile)
    if done.returncode not in (0, 2):
        return Outcome(len(killed), lost=f"exit code {done.returncode}: {done.stderr[-500:]}")
    return _gone_on(scene, out, faults=len(killed))


def trainer(scene: Scene, chance: random.Random, number: int) -> Outcome:
    """A training is killed at a random moment and goes on to the same weights."""
    del number
    seconds, out = chance.random() * scene.train_seconds, scene.empty() / "run"
    return _trained_on(scene, out) if _killed(scene.train(out, meanwhile=_kill_after(seconds))) else NOTHING


def reader(scene: Scene, chance: random.Random, number: int) -> Outcome:
    """The process that reads a training's images is killed: one line, and the same command goes on."""
    del number
    out, delay = scene.empty() / "run", chance.random() * 0.5
    killed: list[int] = []

    def meanwhile(process: int) -> None:
        found: list[int] = []
        while alive(process) and not found:
            # The server that readers are forked from is a child; they are its children.
            found = [deeper for child in descendants(process) for deeper in descendants(child)]
            time.sleep(0.01)
        time.sleep(delay)
        killed.extend(_kill(found[0]) if found and alive(process) else ())

    done = scene.train(out, "train.num_workers=1", meanwhile=meanwhile)
    if done.returncode not in (0, 2) or "Traceback" in done.stderr:
        return Outcome(len(killed), lost=f"exit code {done.returncode}: {done.stderr[-500:]}")
    return _trained_on(scene, out, faults=len(killed))


def rank(scene: Scene, chance: random.Random, number: int) -> Outcome:
    """One of two processes of torchrun is killed: the other ends, and the same command goes on."""
    del number
    expected, out = scene.shared_run, scene.empty() / "run"
    step, delay, which = chance.randrange(3), chance.random() * 0.3, chance.randrange(2)
    job = _torchrun(scene, out)
    ranks: list[int] = []
    while job.process.poll() is None and (len(ranks) < 2 or _steps(out) < step):
        ranks = [child for child in descendants(job.process.pid) if b"torch.distributed.run" not in _words(child)]
        time.sleep(0.01)
    time.sleep(delay)
    killed = _kill(sorted(ranks)[which]) if len(ranks) > which and job.process.poll() is None else []
    job.wait_for()
    if left := [one for one in ranks if alive(one)]:
        return Outcome(len(killed), lost=f"processes {left} are still there")
    again = _torchrun(scene, out).wait_for()
    return Outcome(len(killed), lost=again.stderr[-500:] if again.returncode else _other_weights(expected, out))


@dataclass(frozen=True, slots=True)
class _Job:
    process: subprocess.Popen[str]

    def wait_for(self) -> subprocess.CompletedProcess[str]:
        _, said = self.process.communicate(timeout=WAIT_SECONDS)
        return subprocess.CompletedProcess([], self.process.returncode, "", said)


def _torchrun(scene: Scene, run: Path) -> _Job:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--", "ezsd"]
    command += map(str, scene.training(run))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "EZSD_CACHE_DIR": str(scene.folder / "parsed")}
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return _Job(subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **streams))


def _kill_after(seconds: float) -> Callable[[int], None]:
    def meanwhile(process: int) -> None:
        until = time.monotonic() + seconds
        while alive(process) and time.monotonic() < until:
            time.sleep(0.002)
        _kill(process)

    return meanwhile


def _kill(process: int) -> list[int]:
    """Kill a process; itself in a list, or an empty one where it had ended."""
    if not alive(process):
        return []
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
        return [process]
    return []


def _killed(done: subprocess.CompletedProcess[str]) -> bool:
    return done.returncode == -signal.SIGKILL


def _of_kind(process: int, word: str) -> list[int]:
    return [child for child in descendants(process) if word.encode() in _words(child)]


def _words(process: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes()
    return b""


def _blocks(store: Path) -> int:
    return len(list(store.glob("journal/block-*")))


def _steps(run: Path) -> int:
    return len(list(run.glob("checkpoints/step-*")))


def _gone_on(scene: Scene, out: Path, *, faults: int = 1) -> Outcome:
    """What is left is refused or whole, and the same command makes the bytes of an unbroken build of it."""
    expected = storekit.contents(scene.store)
    if (out / "COMMIT.json").exists():
        if found := verify(out, deep=True):
            return Outcome(faults, lost=f"a store that says that it is whole is not: {found[0]}")
    else:
        with contextlib.suppress(StoreError):
            Store(out)
            return Outcome(faults, wrong="an unfinished store was opened")
    # Blocks of the journal are taken over as they are, until all of them are in the store.
    finished = {block: block.stat().st_mtime_ns for block in out.glob("journal/block-*/entry.json")}
    done = scene.build(out, EZSD_FAILPOINT="record.before_rename")
    redone = [block for block, made in finished.items() if block.exists() and block.stat().st_mtime_ns != made]
    if redone:
        return Outcome(faults, lost=f"{redone[0]} was finished and is made again")
    if _killed(done):
        done = scene.build(out)
    if done.returncode:
        return Outcome(faults, lost=done.stderr[-500:])
    differing = {name for name, _ in expected.items() ^ storekit.contents(out).items()}
    return Outcome(faults, lost=f"other bytes than an unbroken build has: {sorted(differing)}" if differing else "")


def _trained_on(scene: Scene, out: Path, *, faults: int = 1) -> Outcome:
    """The newest checkpoint is whole, and the same command trains what an unbroken training does."""
    before = max((int(one.name[5:]) for one in out.glob("checkpoints/step-*")), default=0)
    latest = Run(out).latest() if (out / "run.json").exists() else None
    if before and (latest is None or latest.step != before):
        return Outcome(faults, lost=f"the checkpoint of step {before} was in place and is not taken")
    done = scene.train(out)
    if done.returncode:
        return Outcome(faults, lost=done.stderr[-500:])
    return Outcome(faults, lost=_other_weights(scene.run, out))


def _other_weights(expected: Path, found: Path) -> str:
    ours, theirs = (
        {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted((run / "checkpoints/step-00000004").glob("*.safetensors"))
        }
        for run in (found, expected)
    )
    return "" if ours and ours == theirs else "other weights than those of an unbroken training"


# Saves


def save(scene: Scene, chance: random.Random, number: int) -> Outcome:
    """A process that saves one checkpoint after another is killed: the newest whole one is the last that was said."""
    del number
    folder = scene.empty() / "run"
    spec = {"names": ["cat"], "text_sha256": "ab", "store": {"digest": "cd"}, "config": {"train": {"steps": 9}}}
    run = Run.create_or_resume(folder, spec, {"text": torch.eye(2)})
    seconds = 0.2 * chance.random()

    def meanwhile(process: int) -> None:
        while alive(process) and not _steps(folder):
            time.sleep(0.002)
        _kill_after(seconds)(process)

    done = ezsd(faults=[["save_checkpoints", str(folder)]], meanwhile=meanwhile)
    # The last line may be cut, or missing.
    told = max((int(line) for line in done.stdout.split("\n")[:-1]), default=0)
    latest = run.latest()
    if latest is None or latest.step < told:
        return Outcome(lost=f"step {told} was saved, the newest is {latest and latest.step}")
    values = {value.item() for tensor in latest.trained().values() for value in tensor.flatten()}
    return Outcome(wrong="" if values == {float(latest.step)} else f"step {latest.step} holds the weights of {values}")


# Flipped bits


FLIPPED = ({"embedding": "float16"}, {"embedding": "int8"}, {"embedding": "int8", "proposer": storekit.PROPOSER})


def flip(scene: Scene, chance: random.Random, number: int) -> Outcome:
    """One bit of any file of a store is flipped: it is found by its file's name, and is nowhere read as data."""
    kind = number % len(FLIPPED)
    store = scene.folder / f"flipped-{kind}"
    if not store.exists():
        storekit.build(store, manifest=storekit.manifest(**FLIPPED[kind]))
    expected = _values(store)
    files = [file for file in sorted(store.rglob("*")) if file.is_file()]
    # As likely by file as by size: large files would have nearly all of the flips.
    file = (
        chance.choice(files) if chance.random() < 0.5 else chance.choices(files, [f.stat().st_size for f in files])[0]
    )
    bit, name = chance.randrange(8 * file.stat().st_size), file.relative_to(store).as_posix()
    storekit.flip(file, bit)
    try:
        with contextlib.suppress(StoreError):
            if not any(found.name == name for found in verify(store, deep=True)):
                return Outcome(lost=f"bit {bit} of {name} was not found")
        with contextlib.suppress(StoreError):
            if not _equal(_values(store), expected):
                return Outcome(wrong=f"bit {bit} of {name} was read as data")
    finally:
        storekit.flip(file, bit)
    return Outcome()


def _values(path: Path) -> list[Any]:
    """All that a store gives."""
    store = Store(path)
    found: list[Any] = [store.image_ids, store.text[0], store.text[1], *store.teacher]
    for product, fields in storekit.FIELDS.items():
        batch = getattr(store, product).batch(store.image_ids)
        found += [batch.counts, *(getattr(batch.rows, name) for name in fields)]
    return found


def _equal(ours: list[Any], theirs: list[Any]) -> bool:
    return all(
        np.array_equal(mine, other) if isinstance(mine, np.ndarray) else mine == other
        for mine, other in zip(ours, theirs, strict=True)
    )


# The random walk


def walk(seed: int, steps: int) -> Count:
    """At least so many steps of the machine over the store."""
    count = Count()

    class Counted(StoreMachine):
        @invariant()
        def count(self) -> None:
            count.trials += 1

    quiet = settings(
        max_examples=-(-steps // 50),
        stateful_step_count=50,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(seeded(seed)(Counted), settings=quiet)
    except Exception as error:
        count.wrong += 1
        count.failures.append(f"walk {seed}: {type(error).__name__}: {error}")
    count.faults, count.survived = count.trials, count.trials - count.wrong
    return count


PARTS: dict[str, Trial] = {
    **{"builder": builder, "failpoint": failpoint, "worker": worker, "trainer": trainer, "reader": reader},
    **{"rank": rank, "saves": save, "flips": flip},
}


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """Rows of all parts that are not there yet."""
    wanted = {name: round(arguments.kills * share / sum(KILLS.values())) for name, share in KILLS.items()}
    wanted |= {"failpoint": arguments.rounds * len(FAILPOINTS), "saves": arguments.saves, "flips": arguments.flips}
    wanted["steps"] = arguments.steps
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory, prefix="ezsd-faults-") as folder:
        scene = Scene(Path(folder))
        for part in arguments.parts or wanted:
            yield from _rows(scene, part, wanted[part], arguments)


def _rows(scene: Scene, part: str, wanted: int, arguments: argparse.Namespace) -> Iterator[Row]:
    """Rows of one part, until all is done or something went wrong."""
    there = [row for row in _there(arguments) if row["part"] == part]
    done = sum(row["trials"] for row in there)
    while done < wanted and not any(map(_is_bad, there)):
        size = min(PORTION.get(part, 10), wanted - done)
        began, cpu = time.perf_counter(), _cpu()
        if part == "steps":
            count = walk(int(hashlib.sha256(f"{arguments.seed}-{done}".encode()).hexdigest()[:12], 16), size)
        else:
            count = Count()
            for number in range(done, done + size):
                name = f"{part} {number} of seed {arguments.seed}"
                chance = random.Random(name)
                outcomes = (PARTS[part](scene, chance, number) for _ in range(TRIES))
                count.add(name, next((one for one in outcomes if one != NOTHING), NOTHING))
        there.append(
            {
                **{"part": part, "seed": arguments.seed, "tag": arguments.tag, "first": done, **vars(count)},
                "wall_seconds": round(time.perf_counter() - began, 1),
                "cpu_seconds": round(_cpu() - cpu, 1),
                "note": arguments.note,
            }
        )
        yield there[-1]
        done += count.trials


def _there(arguments: argparse.Namespace) -> list[Row]:
    """Rows of earlier calls of the same commit."""
    same = {"seed": arguments.seed, "tag": arguments.tag, "commit": driver.commit()}
    return [row for row in driver.read("faults", arguments.results) if same.items() <= row.items()]


def _is_bad(row: Row) -> bool:
    return bool(row["lost"] or row["wrong"])


def _cpu() -> float:
    """CPU seconds of this process, of its children, and of those that these have seen end."""
    clock = os.sysconf("SC_CLK_TCK")
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    running = 0
    for child in descendants(os.getpid()):
        with contextlib.suppress(OSError):
            running += sum(map(int, Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[11:15]))
    return time.process_time() + ended.ru_utime + ended.ru_stime + running / clock


def show(row: Row) -> str:
    """One line for a row, and one for each failure."""
    figures = ", ".join(f"{row[name]} {name}" for name in ("trials", "faults", "survived", "lost", "wrong"))
    return "\n".join([f"{row['part']} from {row['first']}: {figures} ({row['wall_seconds']} s)", *row["failures"]])


def main() -> int:
    """Exit code 1 where anything was lost or damage was taken for data."""
    bad: list[Row] = []

    def measured(arguments: argparse.Namespace) -> Iterator[Row]:
        yield from measure(arguments)
        bad.extend(filter(_is_bad, _there(arguments)))

    driver.run(
        "faults",
        measured,
        __doc__,
        driver.option("--kills", type=int, default=200, help="of builder, trainer, worker, reader and rank together"),
        driver.option("--rounds", default=1, help="kills at every failpoint"),
        driver.option("--flips", type=int, default=1000),
        driver.option("--steps", type=int, default=10_000, help="of the machine over the store"),
        driver.option("--saves", type=int, default=50, help="kills of a process that saves checkpoints"),
        driver.option("--seed", type=int, default=0),
        driver.option("--parts", nargs="*", choices=[*KILLS, "failpoint", "saves", "flips", "steps"], default=[]),
        "--tag",
        "--note",
        show=show,
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
