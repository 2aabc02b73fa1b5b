"""docs/building.md: commands on the shapes run in the order in which they stand, others have options that exist."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from ezsd import cli
from tests.commandkit import ezsd
from tests.conftest import QUICK

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs/building.md").read_text(encoding="utf-8")


def commands(language):
    blocks = re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words[1:] for words in lines if words[:1] == ["ezsd"]]


def test_every_way_of_building_makes_the_same_store(shapes_root, shapes_store, tmp_path):
    from ezsd.cache import compare

    found = commands("sh")
    assert len(found) == 6
    (tmp_path / "data").mkdir()
    (tmp_path / "data/shapes").symlink_to(shapes_root)
    for words in found:
        quick = [word for setting in QUICK for word in ("--set", setting)] if words[1] == "build" else []
        # One build starts worker processes, which take as long to start as all the rest.
        quick += ["--workers", "1"] if "--blocks" in words else []
        done = ezsd(*words, *quick, cwd=tmp_path)
        assert done.returncode == 0, f"{words}\n{done.stderr}"
        if words[1] == "diff":
            assert "same content, file for file" in done.stdout
    for name in ("here", "shared"):
        assert compare(tmp_path / "cache" / name, shapes_store).content == ()


@pytest.mark.parametrize("words", commands("bash"), ids=" ".join)
def test_the_other_commands_have_these_options(words):
    group = typer.main.get_command(cli.app)
    command = group.commands[words[0]].commands[words[1]]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_the_job_array_makes_the_store_under_a_queue(shapes_root, shapes_store, tmp_path):
    """The script of the docs, on the shapes, started as SLURM does; one job is killed and put back in the queue."""
    from ezsd.cache import compare

    (script,) = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", TEXT, re.DOTALL)
    array = re.search(r"--array=1-(\d+)", script)
    assert "--requeue" in script
    assert int(array[1]) > 1
    quick = " ".join(f"--set {shlex.quote(setting)}" for setting in QUICK)
    body = script.replace(
        "--dataset coco --data-root DIR", f"--dataset shapes --data-root {shapes_root} --workers 1 {quick}"
    )
    (tmp_path / "job.sh").write_text(body)
    (tmp_path / "ezsd").write_text(f'#!/bin/sh\nexec {sys.executable} -m ezsd "$@"\n')
    (tmp_path / "ezsd").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    common = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SLURM_ARRAY_TASK_COUNT": "2"}

    def started(task, **environment):
        own = common | {"SLURM_ARRAY_TASK_ID": str(task)} | environment
        return subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=own)

    jobs = [started(1, EZSD_FAILPOINT="block.before_rename"), started(2)]
    assert [job.wait() for job in jobs] == [128 + signal.SIGKILL, 0]
    assert started(1).wait() == 0
    assert ezsd("cache", "commit", "cache/coco", cwd=tmp_path).returncode == 0
    assert compare(tmp_path / "cache/coco", shapes_store).content == ()
