"""A store of COCO's size, at a size of seconds: killed in its build, it goes on to one row."""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ezsd.cache import Store

ROOT = Path(__file__).parents[2]


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("load")


def test_a_killed_start_goes_on_to_a_row(load, monkeypatch, tmp_path, capsys):
    words = ["--work", str(tmp_path / "work"), "--results", str(tmp_path), "--images", "24", "--workers", "1"]
    words += ["--block-images", "8", "--readers", "1", "--period", "0.05"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/load.py"), *words],
        env=os.environ | {"EZSD_FAILPOINT": "block.half_written:2", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    with (tmp_path / "work/samples.jsonl").open("a") as file:
        file.write('{"start": 1, "sta')
    monkeypatch.setattr(sys, "argv", ["load.py", *words])
    load.driver.run("load", load.measure, load.__doc__, *load.OPTIONS)
    (row,) = load.driver.read("load", tmp_path)
    assert (row["images"], row["starts"], row["damage"]) == (24, 2, [])
    assert row["peak_bytes"] >= row["bytes"] > 24 * 207 * 512
    store = Store(tmp_path / "work/store")
    assert row["digest"] == store.digest
    assert store.regions.batch(store.image_ids.tolist()).counts.tolist() == [200] * 24
    assert set(row["stages"]) >= {"prepare", "commit", "verify", "verify deep", "read"}
    reading = row["stages"]["read"]
    assert reading["peak_handles"] > row["stages"]["verify"]["peak_handles"]
    assert reading["flat"] is None
    monkeypatch.setattr(sys, "argv", ["load.py", *words, "--images", "25"])
    with pytest.raises(SystemExit, match="2"):
        load.driver.run("load", load.measure, load.__doc__, *load.OPTIONS)
    assert "choose another folder, or remove it" in capsys.readouterr().err


def seen(load, start, memory, *, handles=40, seconds=100, processes=9):
    """Samples of a second each; the memory of each by its number."""
    return [
        load.Sample(start, "read", at, at / 2, processes, memory(at), 0, handles, 0, at) for at in range(seconds + 1)
    ]


def test_growth_is_told_from_noise_and_from_a_start(load):
    noise = [0, 3, -2, 1, -3, 2]
    flat = seen(load, 1, lambda at: 1000 + noise[at % 6])
    assert load.figures(flat, 50)["flat"] is True
    assert load.figures(flat, 50)["images_per_second"] == 0.5
    # 3 % in all.
    assert load.figures(seen(load, 1, lambda at: 1000 + 30 * at // 100), 50)["flat"] is False
    begun = [load.Sample(1, "read", at, 0, 2, 10 * at, 0, 5, 0, 0) for at in range(-9, 0)]
    assert load.figures(begun + flat, 50)["memory_drift"] == pytest.approx(0, abs=1e-3)
    assert load.figures(seen(load, 1, lambda at: 50 * at, seconds=30), 50)["flat"] is None
    twice = load.figures(seen(load, 1, lambda at: 9 * at, seconds=40) + seen(load, 2, lambda at: 1000), 70)
    assert (twice["seconds"], twice["cpu_seconds"], twice["images_per_second"]) == (140, 70, 0.5)
    assert twice["flat"] is True
