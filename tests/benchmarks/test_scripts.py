"""Every benchmark still fits the package that it measures."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_script_still_imports_what_it_needs():
    scripts = sorted(p.stem for p in (ROOT / "benchmarks").glob("*.py"))
    # One process for all: most of the time is torch's import.
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(f"import {name}" for name in scripts)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
