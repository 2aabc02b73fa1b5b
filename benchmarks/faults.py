"""Do stores and runs survive what breaks processes and disks? The long form of tests/faults, as `make faults`.

Real commands on tiny drawn data are killed at random moments and at every failpoint, bits of all files of a store are
flipped, a random walk builds, kills, damages, mends and reads stores beside a model of them, and trainings are killed
while they save. `lost` counts trials after which anything finished was gone or came out otherwise than in an unbroken
run, and those in which a command failed by itself; `wrong` those in which damage was taken for data. Both must be 0,
and each trial must have had a fault: the exit code is 1 otherwise. The folder of a bad trial is kept and named.

Rows are kept in portions, and a second call goes on after those of the same code, seed and tag; what a trial does
follows from the seed and its number. But for the moments of kills: they follow from the speed of the machine too.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
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
STEPS = 4
"""Of a training."""
OF_RUN += [f"train.{one}" for one in ("batch_size=2", "reference_batch_size=2", "checkpoint_every=1", "rng=image")]
OF_RUN += [f"train.steps={STEPS}"]
WAIT_SECONDS = 600
ROOM = 2**30
"""Bytes that data, stores and runs of all trials need at most."""
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
        """Take in one trial; one that no fault has met is not survived."""
        self.trials += 1
        self.faults += outcome.faults
        self.lost += bool(outcome.lost)
        self.wrong += bool(outcome.wrong)
        self.survived += bool(outcome.faults) and not outcome.is_bad
        self.failures += [f"{trial}: {said}" for said in (outcome.lost, outcome.wrong) if said]
        if outcome == NOTHING:
            self.failures.append(f"{trial}: what was to be killed had ended before, {TRIES} times")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one trial came to; texts say what went wrong."""

    faults: int = 1
    lost: str = ""
    wrong: str = ""

    @property
    def is_bad(self) -> bool:
        """Whether anything was lost or taken for data."""
        return bool(self.lost or self.wrong)


NOTHING = Outcome(faults=0)
"""A process had ended before its kill."""
Trial = Callable[["Scene", random.Random, int], Outcome]


class Scene:
    """Data, an unbroken store and an unbroken run to compare with; made when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def trial(self) -> Path:
        """What the trial works on."""
        return self.folder / "trial"

    def empty(self) -> Path:
        """A folder for one trial, with nothing of the last one."""
        shutil.rmtree(self.trial, ignore_errors=True)
        self.trial.mkdir()
        return self.trial

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
        return self._whole("shared_run", lambda out: _done_by_two(self, out))

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
    done = scene.build(out, meanwhile=_kill_after(seconds))
    return _gone_on(scene, out) if _killed(done) else _by_itself(done)


def failpoint(scene: Scene, chance: random.Random, number: int) -> Outcome:
    """A build is killed at one of the failpoints, in turn, and goes on to the same bytes."""
    del chance
    out, point = scene.empty() / "store", FAILPOINTS[number % len(FAILPOINTS)]
    done = scene.build(out, EZSD_FAILPOINT=point)
    if not _killed(done):
        return Outcome(faults=0, lost=f"the failpoint {point} is not reached any more: {_last_words(done)}")
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
    if done.returncode not in ((0, 2) if killed else (0,)):
        return Outcome(len(killed), lost=_last_words(done))
    return _gone_on(scene, out, faults=len(killed))


def trainer(scene: Scene, chance: random.Random, number: int) -> Outcome:
    """A training is killed at a random moment and goes on to the same weights."""
    del number
    seconds, out = chance.random() * scene.train_seconds, scene.empty() / "run"
    done = scene.train(out, meanwhile=_kill_after(seconds))
    return _trained_on(scene, out) if _killed(done) else _by_itself(done)


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
    if done.returncode not in ((0, 2) if killed else (0,)) or "Traceback" in done.stderr:
        return Outcome(len(killed), lost=_last_words(done))
    return _trained_on(scene, out, faults=len(killed))


def rank(scene: Scene, chance: random.Random, number: int) -> Outcome:
    """One of two processes of torchrun is killed: the other ends, and the same command goes on."""
    del number
    expected, out = scene.shared_run, scene.empty() / "run"
    step, delay, which = chance.randrange(3), chance.random() * 0.3, chance.randrange(2)
    with _torchrun(scene, out) as job:
        ranks: list[int] = []
        while job.process.poll() is None and (len(ranks) < 2 or _steps(out) < step):
            ranks = [one for one in descendants(job.process.pid) if b"torch.distributed.run" not in _words(one)]
            time.sleep(0.01)
        time.sleep(delay)
        killed = _kill(sorted(ranks)[which]) if len(ranks) > which and job.process.poll() is None else []
        done = job.wait_for()
    if left := [one for one in ranks if _kill(one)]:
        return Outcome(len(killed), lost=f"processes {left} are still there")
    if done.returncode and not killed:
        return _by_itself(done)
    before = _newest(out)
    again = _done_by_two(scene, out)
    lost = _last_words(again) if again.returncode else _begun_elsewhere(out, before) or _other_weights(expected, out)
    return Outcome(len(killed), lost=lost)


@dataclass(frozen=True, slots=True)
class _Job:
    process: subprocess.Popen[str]

    def wait_for(self) -> subprocess.CompletedProcess[str]:
        _, said = self.process.communicate(timeout=WAIT_SECONDS)
        return subprocess.CompletedProcess([], self.process.returncode, "", said)


@contextlib.contextmanager
def _torchrun(scene: Scene, run: Path) -> Iterator[_Job]:
    """Two processes that train; nothing of them is left at the end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--", "ezsd"]
    command += map(str, scene.training(run))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "EZSD_CACHE_DIR": str(scene.folder / "parsed")}
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **streams) as process:
        try:
            yield _Job(process)
        finally:
            if process.poll() is None:
                for one in [process.pid, *descendants(process.pid)]:
                    _kill(one)


def _done_by_two(scene: Scene, run: Path) -> subprocess.CompletedProcess[str]:
    with _torchrun(scene, run) as job:
        return job.wait_for()


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


def _by_itself(done: subprocess.CompletedProcess[str]) -> Outcome:
    """What a command came to that nothing has killed: it must have ended well."""
    return Outcome(faults=0, lost=_last_words(done)) if done.returncode else NOTHING


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    # Of a traceback's files the names alone: rows are read elsewhere.
    said = re.sub(r'(?<=File ")/[^"]*/', "", done.stderr)
    return f"exit code {done.returncode}: {said[-500:]}"


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


def _newest(run: Path) -> int:
    """Step of the newest checkpoint that is in place; 0 without one."""
    return max((int(one.name[5:]) for one in run.glob("checkpoints/step-*")), default=0)


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
    finished = _finished(out)
    done = scene.build(out, EZSD_FAILPOINT="record.before_rename")
    redone = _redone(finished)
    if _killed(done):
        done = scene.build(out)
    if redone := redone or _redone(finished):
        return Outcome(faults, lost=f"{redone[0]} was finished and is made again")
    if done.returncode:
        return Outcome(faults, lost=_last_words(done))
    differing = {name for name, _ in expected.items() ^ storekit.contents(out).items()}
    return Outcome(faults, lost=f"other bytes than an unbroken build has: {sorted(differing)}" if differing else "")


def _finished(out: Path) -> dict[Path, int]:
    """Times at which blocks of the journal and shards with a record were made: they are taken over as they are."""
    records = [json.loads(record.read_bytes()) for record in out.glob("journal/shards/*.json")]
    files = [*out.glob("journal/block-*/entry.json"), *(out / record["file"] for record in records)]
    return {file: file.stat().st_mtime_ns for file in files}


def _redone(finished: dict[Path, int]) -> list[Path]:
    """Those that were made again. Blocks go when all of their rows are in the store."""
    return [file for file, made in finished.items() if file.exists() and file.stat().st_mtime_ns != made]


def _trained_on(scene: Scene, out: Path, *, faults: int = 1) -> Outcome:
    """The newest checkpoint is whole, and the same command trains what an unbroken training does."""
    before = _newest(out)
    latest = Run(out).latest() if (out / "run.json").exists() else None
    if before and (latest is None or latest.step != before):
        return Outcome(faults, lost=f"the checkpoint of step {before} was in place and is not taken")
    done = scene.train(out)
    if done.returncode:
        return Outcome(faults, lost=_last_words(done))
    return Outcome(faults, lost=_begun_elsewhere(out, before) or _other_weights(scene.run, out))


def _begun_elsewhere(run: Path, before: int) -> str:
    """What to say where a training did not go on from its newest checkpoint."""
    starts = Run(run).starts()
    if before == STEPS or (starts and starts[-1]["step"] == before):
        return ""
    return f"the checkpoint of step {before} was in place, and the training began at {starts[-1:]}"


def _other_weights(expected: Path, found: Path) -> str:
    ours, theirs = (
        {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted((run / f"checkpoints/step-{STEPS:08d}").glob("*.safetensors"))
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
    if not _killed(done):
        return Outcome(faults=0, lost=_last_words(done))
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

        def teardown(self) -> None:
            # Invariants are looked at before the first step too.
            count.trials -= 1
            count.faults += self.faults
            super().teardown()

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
        count.failures.append(f"walk {seed}: {_told(error)}")
    count.survived = count.trials - count.wrong
    return count


def _told(error: Exception) -> str:
    """An exception's kind, text and notes: Hypothesis says in notes how it comes about."""
    return "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])


PARTS: dict[str, Trial] = {
    **{"builder": builder, "failpoint": failpoint, "worker": worker, "trainer": trainer, "reader": reader},
    **{"rank": rank, "saves": save, "flips": flip},
}


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """Rows of all parts that are not there yet."""
    wanted = {name: round(arguments.kills * share / sum(KILLS.values())) for name, share in KILLS.items()}
    wanted |= {"failpoint": arguments.rounds * len(FAILPOINTS), "saves": arguments.saves, "flips": arguments.flips}
    wanted["steps"] = arguments.steps
    with tempfile.TemporaryDirectory(dir=_memory(), prefix="ezsd-faults-") as folder:
        scene = Scene(Path(folder))
        for part in arguments.parts or wanted:
            yield from _rows(scene, part, wanted[part], arguments)


def _memory() -> str | None:
    """A folder in memory with room for all trials; None without one."""
    place = Path("/dev/shm")
    fits = os.access(place, os.W_OK) and shutil.disk_usage(place).free >= ROOM
    return str(place) if fits else None


def _outcome(scene: Scene, part: str, chance: random.Random, number: int) -> Outcome:
    """What one trial came to; what it raises is lost, and the folder of a bad one is kept."""
    shutil.rmtree(scene.trial, ignore_errors=True)
    try:
        outcome = PARTS[part](scene, chance, number)
    except Exception as error:
        outcome = Outcome(faults=0, lost=_told(error))
    if not outcome.is_bad or not scene.trial.exists():
        return outcome
    kept = shutil.move(scene.trial, tempfile.mkdtemp(prefix=f"ezsd-faults-{part}-{number}-"))
    said = {name: f"{said} (kept: {kept})" for name in ("lost", "wrong") if (said := getattr(outcome, name))}
    return replace(outcome, **said)


def _rows(scene: Scene, part: str, wanted: int, arguments: argparse.Namespace) -> Iterator[Row]:
    """Rows of one part, until all is done or something went wrong."""
    there = [row for row in _there(arguments) if row["part"] == part]
    done = sum(row["trials"] for row in there)
    if there:
        print(f"{part}: {done} trials are there already, in {len(there)} rows", flush=True)
    while done < wanted and not any(map(_is_bad, there)):
        began, cpu = time.perf_counter(), _cpu()
        if part == "steps":
            # As long as any other: a short walk may meet no fault.
            count = walk(int(hashlib.sha256(f"{arguments.seed}-{done}".encode()).hexdigest()[:12], 16), PORTION[part])
        else:
            count, size = Count(), min(PORTION.get(part, 10), wanted - done)
            for number in range(done, done + size):
                name = f"{part} {number} of seed {arguments.seed}"
                chance = random.Random(name)
                outcomes = (_outcome(scene, part, chance, number) for _ in range(TRIES))
                count.add(name, next((one for one in outcomes if one != NOTHING), NOTHING))
        there.append(
            {
                **{"part": part, "seed": arguments.seed, "tag": arguments.tag, "first": done, **vars(count)},
                "changes": _changes(),
                "wall_seconds": round(time.perf_counter() - began, 1),
                "cpu_seconds": round(_cpu() - cpu, 1),
                "note": arguments.note,
            }
        )
        yield there[-1]
        done += count.trials


def _there(arguments: argparse.Namespace) -> list[Row]:
    """Rows of earlier calls of the same code."""
    same = {"seed": arguments.seed, "tag": arguments.tag, "commit": driver.commit(), "changes": _changes()}
    return [row for row in driver.read("faults", arguments.results) if same.items() <= row.items()]


def _changes() -> str:
    """Digest of what is changed since the commit, but for results; empty without changes."""
    if driver.commit() is None:
        return ""
    command = ["git", "diff", "HEAD", "--", ".", ":(exclude)benchmarks/results"]
    changed = subprocess.run(command, capture_output=True, cwd=ROOT, check=True).stdout
    return hashlib.sha256(changed).hexdigest()[:12] if changed else ""


def _is_bad(row: Row) -> bool:
    # Most steps of a walk build, read or mend.
    met = 1 if row["part"] == "steps" else row["trials"]
    return bool(row["lost"] or row["wrong"] or row["faults"] < met)


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
    """Exit code 1 where anything was lost, damage was taken for data, or a trial met no fault."""
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
