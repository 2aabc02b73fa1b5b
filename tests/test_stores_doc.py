"""docs/stores.md, to the letter: its commands run in the order in which they stand, its Python too."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ezsd.cache import compare
from tests.commandkit import ezsd
from tests.conftest import QUICK

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs/stores.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]


@pytest.fixture(scope="module")
def work(tmp_path_factory, shapes_store, shapes_root):
    folder = tmp_path_factory.mktemp("stores")
    shutil.copytree(shapes_store, folder / "cache/shapes")
    shutil.copytree(shapes_store, folder / "cache/copy")
    (folder / "data").symlink_to(shapes_root)
    return folder


def test_every_command_does_what_stands_there(work):
    assert len(COMMANDS) == 14
    for line in COMMANDS:
        words = shlex.split(line, comments=True)[1:]
        words = [word.replace("s3://bucket", f"file://{work}/bucket") for word in words]
        if words[:2] == ["cache", "build"]:
            words += ["--workers", "1", *(word for setting in QUICK for word in ("--set", setting))]
        if words[:2] == ["cache", "pull"]:
            shutil.rmtree(work / "cache/copy")
        done = ezsd(*words, cwd=work)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        if words[:2] == ["cache", "build"]:
            assert "computed: regions" in done.stderr + done.stdout
    assert compare(work / "cache/shapes", work / "cache/copy").content == ()
    assert (work / "exported/images.npz").is_file()


def test_the_python_reads_a_store(work):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    code = code.replace("[42, 7]", "[2, 1]").replace("[42]", "[2]")
    done = subprocess.run(
        [sys.executable, "-c", code + "\nprint(len(rows.box), batch.counts.sum() >= len(rows.box))"],
        cwd=work,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == "True"
