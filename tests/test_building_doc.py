"""docs/building.md: commands on the shapes run in the order in which they stand, others have options that exist."""

import re
import shlex
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
