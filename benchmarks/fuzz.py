"""Is any hostile file more than an answer or one line? Fuzzing with coverage guidance, as `make fuzz`.

Each target of tests/fuzz reads one kind of file as the commands do, under atheris (libFuzzer): mutations of the files'
structure and of their bytes, kept where they reach new branches of ezsd, Pillow and the parsers in Python. `findings`
counts causes of whatever is neither an answer nor an error of ezsd: another exception, a hang, more than 2 GB, a file
outside of the folder, a process, a socket, an unpickled class, values that break their contract. It must be 0: the exit
code is 1 otherwise, and the inputs are named.

Corpora stay in --work: a second call goes on until the minutes of each target are over, and then adds its row. A row
says which commit the last minute was of. atheris has wheels for Linux alone: `pip install 'ezsd[fuzz]'`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import driver
from driver import ROOT, Row

from ezsd.cache import FileLock
from tests.fuzz.guard import CPU_SECONDS, MEMORY
from tests.fuzz.targets import BY_NAME

PORTION = 300
"""Seconds of one process: what Python's libraries keep in memory goes with it."""
HANG_SECONDS = 120
"""By the clock, after which libFuzzer ends a process: only code that Python's signals cannot interrupt comes so far."""
_STATUS = re.compile(r"#(\d+)\s.*cov: (\d+) ft: (\d+)")


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """Rows of the targets that have none of this tag yet."""
    for name in arguments.targets or BY_NAME:
        wanted = {"target": name, "tag": arguments.tag, "seed": arguments.seed, "minutes": arguments.minutes}
        if driver.is_there("fuzz", wanted, arguments.results):
            print(f"{name}: its row is there", flush=True)
            continue
        folder = arguments.work / name
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock", busy=partial(_busy, folder), owner=f"process {os.getpid()}\n"):
            row = {**wanted, **fuzz(name, folder, arguments), "note": arguments.note}
        yield row


def _busy(folder: Path, owner: str) -> Exception:
    return driver.UsageError(f"{folder}: {owner.strip()} fuzzes there; take other --targets, or another --work")


def fuzz(name: str, folder: Path, arguments: argparse.Namespace) -> Row:
    """Fuzz one target in its folder until its minutes are over, and count."""
    file = folder / "progress.json"
    empty = {"seconds": 0.0, "executions": 0, "edges": 0, "features": 0, "processes": 0}
    progress: dict[str, Any] = json.loads(file.read_text()) if file.exists() else empty
    while (left := 60 * arguments.minutes - progress["seconds"]) > 0:
        began = time.monotonic()
        found = _portion(name, folder, min(PORTION, max(1, round(left))), arguments.seed + progress["processes"])
        progress["seconds"] += time.monotonic() - began
        progress["processes"] += 1
        progress["executions"] += found["executions"]
        for key in ("edges", "features"):
            progress[key] = max(progress[key], found[key])
        file.write_text(json.dumps(progress))
        print(f"{name}: {progress}", flush=True)
    findings = sorted(one.name for one in (folder / "findings").iterdir() if one.suffix != ".txt")
    return {
        **{key: progress[key] for key in ("executions", "edges", "features", "processes")},
        "wall_seconds": round(progress["seconds"], 1),
        "corpus": len(list((folder / "corpus").iterdir())),
        "findings": len(findings),
        "found": findings,
        "cpu_seconds_limit": CPU_SECONDS,
        "memory_limit": MEMORY,
        "atheris": importlib.metadata.version("atheris"),
        "pillow": importlib.metadata.version("pillow"),
    }


def _portion(name: str, folder: Path, seconds: int, seed: int) -> dict[str, int]:
    """Fuzz in one process; where it ended by itself, the input of its end is one more finding."""
    command: list[object] = [sys.executable, ROOT / "benchmarks/fuzz_target.py", "--target", name, "--folder", folder]
    command += ["--seconds", seconds, "--hang-seconds", HANG_SECONDS, "--seed", seed + 1]
    log = folder / "log.txt"
    with log.open("w") as said:
        done = subprocess.run(list(map(str, command)), stdout=said, stderr=subprocess.STDOUT, cwd=ROOT, check=False)
    text = log.read_text(errors="replace")
    ends = list(folder.glob("ended-*"))
    if done.returncode and not ends:
        raise RuntimeError(f"{name}: the process ended with {done.returncode}: {text[-2000:]}")
    for end in ends:
        kept = end.rename(folder / "findings" / end.name.removeprefix("ended-"))
        kept.with_name(f"{kept.name}.txt").write_text(text[-20_000:])
    status = [tuple(map(int, one)) for one in _STATUS.findall(text)]
    executions, edges, features = status[-1] if status else (0, 0, 0)
    final = re.search(r"stat::number_of_executed_units:\s+(\d+)", text)
    return {"executions": int(final[1]) if final else executions, "edges": edges, "features": features}


def show(row: Row) -> str:
    """One line for a row, and one for each finding."""
    line = (
        f"{row['target']}: {row['executions']} executions in {row['wall_seconds']} s, {row['edges']} edges, "
        f"{row['findings']} findings"
    )
    return "\n".join([line, *(f"  {row['target']}/findings/{one}" for one in row["found"])])


def main() -> int:
    """Exit code 1 where anything was found."""
    bad: list[str] = []

    def measured(arguments: argparse.Namespace) -> Iterator[Row]:
        if importlib.util.find_spec("atheris") is None:
            raise driver.UsageError("atheris is not installed; it has wheels for Linux: pip install 'ezsd[fuzz]'")
        for row in measure(arguments):
            bad.extend(row["found"])
            yield row

    driver.run(
        "fuzz",
        measured,
        __doc__,
        "--work",
        driver.option("--minutes", type=float, default=30.0, help="of each target"),
        driver.option("--targets", nargs="*", choices=list(BY_NAME), default=[], help="all, one after another"),
        driver.option("--seed", type=int, default=0),
        "--tag",
        "--note",
        show=show,
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
