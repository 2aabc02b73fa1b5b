"""The long form in small: rows by portions, a second call adds none, and what goes wrong is counted and told."""

import importlib
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ezsd.pipeline.runs.run import Run
from tests.faults.registry import FAULTS, ROOT

COUNTS = ("trials", "faults", "survived", "lost", "wrong")


@pytest.fixture
def faults(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("faults")


@pytest.fixture
def run(faults, tmp_path, monkeypatch):
    """Exit code and rows of a call, whose bad trials are kept in the test's folder."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["faults", "--results", str(tmp_path), *words])
        code = faults.main()
        return code, [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]

    return call


def test_every_part_holds_a_fault_of_the_list(faults):
    assert {part for fault in FAULTS.values() for part in fault.long} == {*faults.PARTS, "steps"}


def test_parts_are_counted_in_rows_and_a_second_call_goes_on(run, faults, monkeypatch):
    words = ("--parts", "flips", "steps", "--steps", "150", "--flips")
    monkeypatch.setitem(faults.PORTION, "steps", 200)
    code, rows = run(*words, "4")
    assert code == 0
    assert [row["part"] for row in rows] == ["flips", "steps"]
    assert [rows[0][name] for name in COUNTS] == [4, 4, 4, 0, 0]
    assert rows[1]["trials"] == rows[1]["survived"] >= 150
    # Kills and damages of the walk: most of its steps are neither.
    assert 0 < rows[1]["faults"] < rows[1]["trials"]
    assert run(*words, "4") == (0, rows)
    monkeypatch.setitem(faults.PORTION, "flips", 2)
    _, more = run(*words, "7")
    assert [(row["first"], row["trials"]) for row in more[2:]] == [(4, 2), (6, 1)]


def test_what_is_lost_or_wrong_is_an_exit_code_and_a_line(run, faults, monkeypatch, capsys):
    monkeypatch.setattr(faults, "verify", lambda *_, **__: [])
    code, (row,) = run("--parts", "flips", "--flips", "3")
    assert code == 1
    assert [row[name] for name in COUNTS] == [3, 3, 0, 3, 0]
    assert "flips 0 of seed 0: bit " in capsys.readouterr().out


def test_a_walk_that_meets_a_fault_is_counted_wrong(run, faults, monkeypatch):
    def broken(*_, **__):
        raise AssertionError("of the model")

    monkeypatch.setattr(faults.StoreMachine, "writer", broken)
    words = ("--parts", "steps", "--steps", "1000")
    code, (row,) = run(*words)
    assert (code, row["wrong"]) == (1, 1)
    # It is looked into before it goes on.
    assert run(*words) == (1, [row])


# Commands that do not do what they should: `--kills 3` is one trial of a builder and one of a trainer


def ended(code, said=""):
    return subprocess.CompletedProcess([], code, "", said)


@pytest.fixture
def scene(faults, monkeypatch):
    """Stands in for the scene: a test says what its commands come to."""

    class Scene(faults.Scene):
        build_seconds = train_seconds = 0.0

    monkeypatch.setattr(faults, "Scene", Scene)
    return Scene


@pytest.mark.parametrize("part", ["builder", "trainer"])
@pytest.mark.parametrize(
    ("code", "lost", "said"), [(1, 1, "exit code 1: of the command"), (0, 0, "had ended before, 20 times")]
)
def test_a_command_that_fails_by_itself_or_is_never_hit_has_not_survived(run, scene, part, code, lost, said):
    scene.build = scene.train = lambda *_, **__: ended(code, "of the command")
    found, (row,) = run("--parts", part, "--kills", "3")
    assert found == 1
    assert [row[name] for name in COUNTS] == [1, 0, 0, lost, 0]
    assert said in row["failures"][0]


def test_what_a_trial_raises_is_lost_and_its_folder_is_kept(run, scene, capsys):
    def build(self, out, **_):
        out.mkdir()
        error = subprocess.TimeoutExpired("ezsd", 600)
        error.add_note("of the clock")
        raise error

    scene.build = build
    code, (row,) = run("--parts", "builder", "--kills", "3")
    assert (code, row["lost"], row["survived"]) == (1, 1, 0)
    kept = Path(re.search(r"kept: (.*)\)", row["failures"][0])[1])
    assert "TimeoutExpired: " in row["failures"][0]
    assert "of the clock" in capsys.readouterr().out
    assert (kept / "store").is_dir()


@pytest.mark.parametrize("forgets", [False, True])
def test_a_training_that_does_not_go_on_from_its_newest_checkpoint_has_lost_it(run, scene, tmp_path, forgets):
    def save(folder, begin, step):
        spec = {"names": [], "text_sha256": "", "store": {"digest": ""}, "config": {"train": {}}}
        found = Run.create_or_resume(folder, spec, {"text": torch.eye(2)})
        found.write_environment({})
        found.record_start(begin, {})
        model = torch.nn.Linear(1, 1)
        torch.nn.init.ones_(model.weight)
        torch.nn.init.ones_(model.bias)
        found.save(step, model, torch.optim.SGD(model.parameters(), lr=0.0))
        return folder

    def train(self, out, **how):
        if how:
            save(out, 0, 2)
            return ended(-signal.SIGKILL)
        save(out, 0 if forgets else 2, 4)
        return ended(0)

    scene.train, scene.run = train, save(tmp_path / "unbroken", 0, 4)
    code, (row,) = run("--parts", "trainer", "--kills", "3")
    assert (code, row["lost"], row["survived"]) == (int(forgets), int(forgets), int(not forgets))
    assert ["the checkpoint of step 2 was in place, and the training began at [" in one for one in row["failures"]] == (
        [True] * forgets
    )


def test_a_saver_that_dies_by_itself_is_lost(run, scene, faults, monkeypatch):
    monkeypatch.setattr(faults, "ezsd", lambda **_: ended(1, "of the saver"))
    code, (row,) = run("--parts", "saves", "--saves", "1")
    assert [code, *(row[name] for name in COUNTS)] == [1, 1, 0, 0, 1, 0]
    assert "exit code 1: of the saver" in row["failures"][0]
