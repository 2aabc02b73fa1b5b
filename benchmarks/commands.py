"""How long do whole commands take? `python benchmarks/commands.py --work DIR ["make demo" "make test"]`.

The commands run one after another in a fresh clone of the last commit, so the first `make` installs. Wall seconds, exit
status and last lines of output of each go to results/commands.jsonl.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import driver

LAST_LINES = 15


def measure(arguments: argparse.Namespace) -> Iterator[driver.Row]:
    """One row a command."""
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        clone = Path(folder).resolve() / "ezsd"
        subprocess.run(["git", "clone", "--quiet", str(driver.ROOT), str(clone)], check=True)
        for number, command in enumerate(arguments.commands):
            call = partial(subprocess.run, shlex.split(command), cwd=clone, stdout=subprocess.PIPE, text=True)
            done, spent = driver.timed(call)
            yield {
                "command": command,
                "fresh_clone": number == 0,
                "wall_seconds": round(spent.wall, 1),
                "status": done.returncode,
                "output": done.stdout.replace(str(clone), ".").splitlines()[-LAST_LINES:],
                "note": arguments.note,
            }


if __name__ == "__main__":
    commands = driver.option("commands", nargs="*", default=["make demo", "make test"], metavar="COMMAND")
    driver.run("commands", measure, __doc__, commands, "--work", "--note")
