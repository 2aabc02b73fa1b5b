"""Result rows: one JSON line each, describing itself."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def conditions() -> dict[str, object]:
    """Versions, machine, date and commit of a measurement."""
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=root, check=True
    )
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "torchvision": importlib.metadata.version("torchvision"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
    }


def file_system(folder: Path) -> str:
    """Name of the file system that a folder lies on, as `stat -f` has it: ext2, ext3 and ext4 are one to it."""
    done = subprocess.run(["stat", "-f", "-c", "%T", str(folder)], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def append(name: str, row: dict[str, object], folder: Path = RESULTS) -> None:
    """Add a row to results/NAME.jsonl, or to that of another folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps({"bench": name, **row, **conditions()}) + "\n")


def read(name: str, folder: Path = RESULTS) -> list[dict[str, object]]:
    """All rows of results/NAME.jsonl, or of that of another folder."""
    path = folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
