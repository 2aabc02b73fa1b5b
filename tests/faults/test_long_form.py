"""The long form in small: rows by portions, a second call adds none, and what goes wrong is counted and told."""

import importlib
import json
import sys

import pytest

from tests.faults.registry import FAULTS, ROOT

COUNTS = ("trials", "faults", "survived", "lost", "wrong")


@pytest.fixture
def faults(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("faults")


@pytest.fixture
def run(faults, tmp_path, monkeypatch):
    """Exit code and rows of a call."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["faults", "--results", str(tmp_path), *words])
        code = faults.main()
        return code, [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]

    return call


def test_every_part_holds_a_fault_of_the_list(faults):
    assert {part for fault in FAULTS.values() for part in fault.long} == {*faults.PARTS, "steps"}


def test_parts_are_counted_in_rows_and_a_second_call_goes_on(run, faults, monkeypatch):
    words = ("--parts", "flips", "steps", "--steps", "20", "--flips")
    code, rows = run(*words, "4")
    assert code == 0
    assert [row["part"] for row in rows] == ["flips", "steps"]
    assert [rows[0][name] for name in COUNTS] == [4, 4, 4, 0, 0]
    assert rows[1]["trials"] == rows[1]["survived"] >= 20
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
