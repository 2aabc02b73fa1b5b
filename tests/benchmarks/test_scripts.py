"""Every benchmark still fits the package that it measures, and they share one driver."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# One process for all: most of the time is torch's import.
HELP = """
import runpy, sys
for path in sys.argv[1:]:
    sys.argv = [path, "--help"]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as done:
        assert done.code == 0, path
    else:
        print("module:", path)
"""


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return __import__("driver")


def test_every_script_imports_what_it_needs_and_says_its_question_and_options():
    scripts = sorted((ROOT / "benchmarks").glob("*.py"))
    done = subprocess.run(
        [sys.executable, "-c", HELP, *map(str, scripts)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    modules = done.stdout.count("module: ")
    assert done.stdout.count("show this help message") == len(scripts) - modules
    assert modules == len(
        {"ablation_arms", "ablation_boxes", "ablation_table", "cost_model", "driver", "gpu_check_stage"}
        | {"gpu_check_step", "kernel_variants", "scoring", "store_geometry"}
    )


def test_rows_are_kept_one_by_one_with_their_conditions(driver, tmp_path, monkeypatch, capsys):
    def measure(arguments):
        yield {"tag": arguments.tag, "work": arguments.work.is_dir()}
        raise driver.UsageError("--tag: no second row")

    monkeypatch.setattr(sys, "argv", ["x", "--work", str(tmp_path / "w"), "--results", str(tmp_path), "--tag", "t"])
    with pytest.raises(SystemExit, match="2"):
        driver.run("x", measure, "What?", "--work", "--tag", show=str)
    assert "error: --tag: no second row" in capsys.readouterr().err
    (row,) = driver.read("x", tmp_path)
    assert json.loads((tmp_path / "x.jsonl").read_text()) == row
    assert (row["bench"], row["tag"], row["work"]) == ("x", "t", True)
    assert {"date", "commit", "python", "torch", "torchvision", "cpu", "cores"} <= row.keys()


def test_every_round_has_every_call_once_in_an_order_of_its_own(driver):
    told = []

    def call(name, turn):
        told.append((turn, name))
        return turn

    found = driver.in_turns({name: partial(call, name) for name in "abc"}, range(4))
    assert found == {name: [0, 1, 2, 3] for name in "abc"}
    assert [turn for turn, _ in told] == sorted(3 * [0, 1, 2, 3])
    assert len({tuple(name for turn, name in told if turn == one) for one in range(4)}) > 1


def test_a_command_is_timed_in_a_fresh_clone(tmp_path):
    words = ["--work", str(tmp_path), "--results", str(tmp_path), "git status --short", "false"]
    script = [sys.executable, str(ROOT / "benchmarks/commands.py"), *words]
    subprocess.run(script, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    first, second = map(json.loads, (tmp_path / "commands.jsonl").read_text().splitlines())
    assert (first["command"], first["status"], first["output"]) == ("git status --short", 0, [])
    assert (second["status"], second["fresh_clone"]) == (1, False)


def test_a_soak_watches_every_process_of_a_cluster(tmp_path):
    script = [sys.executable, str(ROOT / "benchmarks/cluster.py"), "--results", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for most, code in (("1000", 0), ("-1000", 1)):
        words = ["--tasks", "40", "--workers", "1", "--most", most]
        done = subprocess.run([*script, *words], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
    row, refused = map(json.loads, (tmp_path / "cluster.jsonl").read_text().splitlines())
    assert (row["results_right"], row["memory_flat"], refused["memory_flat"]) == (True, True, False)
    assert {name: len(figures) for name, figures in row["resident_mib"].items()} == dict.fromkeys(
        ("client", "scheduler", "worker 0"), 20
    )
