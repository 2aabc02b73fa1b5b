"""What all benchmarks share: command line, work folder, clocks, runs in turns, result rows."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import mpmath
import numpy as np

from ezsd.data.shapes import DEV_SEED
from ezsd.pipeline.config.schema import Config, to_tables

T = TypeVar("T")
Key = TypeVar("Key")
Row = dict[str, Any]
Option = tuple[str, dict[str, Any]]
"""A flag or position of the command line, and the keywords of `add_argument`."""

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
OPTIONS: dict[str, dict[str, Any]] = {
    "--work": {"type": Path, "required": True, "help": "folder of data, stores and runs; a second call resumes there"},
    "--cache": {"type": Path, "required": True, "help": "a finished store"},
    "--data-root": {"type": Path, "help": "folder of the images, if they have moved"},
    "--photos": {"type": Path, "help": "folder in COCO's layout"},
    "--seeds": {"type": int, "nargs": "*", "default": [DEV_SEED], "help": "of the drawn data; 0 is for choosing"},
    "--images": {"type": int},
    "--rounds": {"type": int},
    "--jobs": {"type": int, "default": 1, "help": "processes"},
    "--tag": {"default": "headline", "help": "name of a group of rows"},
    "--note": {"default": "", "help": "what else the machine was doing"},
    "--set": {"dest": "overrides", "action": "append", "default": [], "metavar": "KEY=VALUE", "help": "of all runs"},
    "--results": {"type": Path, "default": RESULTS, "help": "folder of the result rows"},
}
"""Options with one meaning in every script; a script may change their defaults."""


class UsageError(Exception):
    """Options that do not go together."""


def option(flag: str, **keywords: object) -> Option:
    """An option of a script; keywords of `OPTIONS` hold unless they are changed here."""
    return flag, OPTIONS.get(flag, {}) | keywords


def parser(doc: str | None, *options: Option | str) -> argparse.ArgumentParser:
    """A command line of the given options and --results."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for one in (*options, "--results"):
        flag, keywords = option(one) if isinstance(one, str) else one
        found.add_argument(flag, **keywords)
    return found


def run(
    name: str,
    measure: Callable[[argparse.Namespace], Iterable[Row]],
    doc: str | None,
    *options: Option | str,
    show: Callable[[Row], str] = lambda row: json.dumps(row, indent=1),
) -> None:
    """Parse the command line, make the work folder, measure; keep and print each row as soon as it is there.

    Args:
        name: of the benchmark; its rows go to NAME.jsonl.
        measure: takes the parsed command line and gives rows. UsageError: the command line is wrong.
        doc: help text.
        options: names of `OPTIONS` or results of `option`.
        show: what is printed of a row.
    """
    command_line = parser(doc, *options)
    arguments = command_line.parse_args()
    if getattr(arguments, "work", None):
        arguments.work.mkdir(parents=True, exist_ok=True)
    try:
        for row in measure(arguments):
            append(name, row, arguments.results)
            print(show(row), flush=True)
    except UsageError as error:
        command_line.error(str(error))


def conditions() -> Row:
    """Versions, machine, date and commit of a measurement."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "python": platform.python_version(),
        **versions("torch", "torchvision"),
        "cpu": _of_cpu("model name") or platform.processor(),
        "cores": os.cpu_count(),
    }


def commit() -> str | None:
    """Abbreviated name of the commit; None in a copy that is no git repository."""
    if shutil.which("git") is None:
        return None
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip() or None


def versions(*packages: str) -> dict[str, str]:
    """Versions of installed packages, by name."""
    return {package: importlib.metadata.version(package) for package in packages}


def bf16_instructions() -> list[str]:
    """The processor's instructions for bf16."""
    return sorted({"amx_bf16", "avx512_bf16"} & set(_of_cpu("flags").split()))


def file_system(folder: Path) -> str:
    """Name of a folder's file system, as `stat -f` has it: ext2, ext3 and ext4 have one name there."""
    done = subprocess.run(["stat", "-f", "-c", "%T", str(folder)], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def settings(config: Config) -> dict[str, dict[str, object]]:
    """All settings but weights, which may be paths of this machine: rows have digests of what is in them."""
    tables = to_tables(config)
    return {section: {key: v for key, v in table.items() if key != "weights"} for section, table in tables.items()}


def append(name: str, row: Row, folder: Path = RESULTS) -> None:
    """Add a row with its conditions to NAME.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps({"bench": name, **row, **conditions()}) + "\n")


def is_there(name: str, wanted: Row, folder: Path = RESULTS) -> bool:
    """Whether NAME.jsonl has a row with these values."""
    return any({key: row.get(key) for key in wanted} == wanted for row in read(name, folder))


def read(name: str, folder: Path = RESULTS) -> list[Row]:
    """All rows of NAME.jsonl."""
    path = folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds of one call."""

    wall: float
    cpu: float
    """Of this process, all threads."""


def timed(call: Callable[[], T]) -> tuple[T, Spent]:
    """Result and time of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, Spent(time.perf_counter() - wall, time.process_time() - cpu)


def in_turns(calls: Mapping[str, Callable[[int], T]], rounds: Collection[int]) -> dict[str, list[T]]:
    """Results of calls by name and round. Each gets the number of the round, whose order is drawn from it.

    Other work on the machine then slows all alike, and so does what one call leaves in the caches for the next.
    """
    found: dict[str, list[T]] = {name: [] for name in calls}
    for turn in rounds:
        for name in np.random.default_rng(turn).permutation(list(calls)).tolist():
            found[name].append(calls[name](turn))
    return found


def beside(commands: Mapping[str, Sequence[str]], jobs: int, logs: Path, *, of: str = "") -> list[str]:
    """Run commands in processes of one thread each, `jobs` at a time; returns the names of those that failed.

    Args:
        commands: by a name.
        jobs: processes at a time.
        logs: folder of their output, NAME.log.
        of: what is printed before a name.
    """
    logs.mkdir(parents=True, exist_ok=True)

    def one(name: str) -> str | None:
        log = logs / f"{name}.log"
        with log.open("a") as file:
            code = subprocess.run(
                commands[name], env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=file, stderr=subprocess.STDOUT
            ).returncode
        print(f"{of}{name}: {'done' if code == 0 else f'FAILED, see {log}'}", flush=True)
        return None if code == 0 else name

    with ThreadPoolExecutor(jobs) as pool:
        return [name for name in pool.map(one, commands) if name is not None]


def peak_mib() -> float:
    """Peak memory of this process, MiB. Unlike `ru_maxrss` it leaves out the process that started this one."""
    status = Path("/proc/self/status").read_text()
    return round(int(status.partition("VmHWM:")[2].split()[0]) / 2**10, 1)


def spread(values: Collection[float]) -> str:
    """Mean and range, one decimal; "-" without values."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


@dataclass(frozen=True, slots=True)
class Difference:
    """Difference of two arms on what both were run on."""

    values: tuple[float, ...]
    mean: float
    half_width: float
    """Of the 95 % t interval around the mean; infinite for a single value."""
    p: float
    """Of the paired t test, two-sided; 1 for a single value."""


def difference(arm: Mapping[Key, float], other: Mapping[Key, float]) -> Difference | None:
    """Mean of arm - other over the keys that both have, with Student's t; None without a common key."""
    keys = arm.keys() & other.keys()
    if not keys:
        return None
    values = [arm[key] - other[key] for key in sorted(keys)]
    mean, degrees = statistics.mean(values), len(values) - 1
    if not degrees:
        return Difference(tuple(values), mean, math.inf, 1.0)
    error = statistics.stdev(values) / math.sqrt(len(values))
    p = t_tail(abs(mean) / error, degrees) if error else float(mean == 0)
    return Difference(tuple(values), mean, t_quantile(0.05, degrees) * error, p)


def t_tail(t: float, degrees: int) -> float:
    """Probability that Student's t is at least this far from zero, on either side."""
    # torch brings mpmath with it; scipy would be one more package.
    return float(mpmath.betainc(degrees / 2, 0.5, 0, degrees / (degrees + t * t), regularized=True))


def t_quantile(p: float, degrees: int) -> float:
    """The inverse of `t_tail`."""
    low, high = 0.0, 1.0
    while t_tail(high, degrees) > p:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, degrees) > p else (low, middle)
    return high


def holm(found: Mapping[Key, float]) -> dict[Key, float]:
    """Probabilities of a family of tests, corrected for their number by Holm's step-down procedure."""
    corrected, least = {}, 0.0
    for rank, key in enumerate(sorted(found, key=lambda key: found[key])):
        least = max(least, min(1.0, (len(found) - rank) * found[key]))
        corrected[key] = least
    return corrected


def _of_cpu(field: str) -> str:
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == field), "")
