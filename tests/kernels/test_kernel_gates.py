"""The gates of `make gpu-check` without a GPU: the kernels' arithmetic passes them, a wrong one does not."""

import subprocess
from pathlib import Path

import pytest
import torch

from tests.kernels import stand_ins
from tests.kernels.gates import errors, tolerance
from tests.kernels.kernel_problems import make_problem, run_align, run_embed, run_loss

ROOT = Path(__file__).resolve().parents[2]
HALVES = (torch.float16, torch.bfloat16)
LAUNCHES = {
    "triton_pool": ("pool_forward", "pool_backward"),
    "triton_distance": ("distance_forward", "distance_backward"),
}
triton_pool = pytest.importorskip("ezsd.kernels.triton_pool")


@pytest.fixture(autouse=True)
def _rounded_as_on_a_gpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for module, names in LAUNCHES.items():
        for name in names:
            monkeypatch.setattr(f"ezsd.kernels.{module}.{name}", getattr(stand_ins, name))


MANY = {"regions": 1000, "bins": 1, "channels": 63, "dim": 512}
"""Loss gradients of size 1 / R, the smallest that gpu_cases.py has."""


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "sizes",
    [
        {**MANY, "levels": 1},
        {**MANY, "levels": 4},
        {"regions": 7, "bins": 7, "channels": 63, "levels": 4},
        {"regions": 0},
    ],
)
def test_right_kernels_pass(dtype, sizes):
    problem = make_problem(**sizes)
    for run, name in ((run_loss, "roi_align_cosine"), (run_embed, "roi_embed"), (run_align, "roi_align")):
        assert max(errors(run, name, problem, dtype, device="cpu")) < tolerance(dtype) / 3


@pytest.mark.parametrize("dtype", HALVES)
def test_a_kernel_that_places_its_samples_wrong_does_not(dtype, monkeypatch):
    def shifted(pooling, boxes, image_index):
        return stand_ins.pool_forward(pooling, boxes + 0.2, image_index)

    monkeypatch.setattr(triton_pool, "pool_forward", shifted)
    problem = make_problem(regions=20, bins=7, channels=20)
    assert max(errors(run_loss, "roi_align_cosine", problem, dtype, device="cpu")) > tolerance(dtype)


@pytest.mark.parametrize(
    ("tests", "table", "said", "code"),
    [(0, 0, "tests table", 0), (1, 0, "tests table", 1), (0, 3, "tests table", 3), (2, 0, "tests", 2)],
)
def test_the_table_comes_after_failed_tests_too_but_not_without_a_gpu(tests, table, said, code, tmp_path):
    for name, text, ends in (("pytest", "tests", tests), ("python", "table", table)):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {text}\nexit {ends}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "installed").touch()
    command = ["make", "--silent", "gpu-check", f"BIN={tmp_path}", f"STAMP={tmp_path}/installed"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == said.split()
    # Make itself ends with 2, and says with what the commands did.
    assert bool(done.returncode) == bool(code)
    assert (f"Error {code}" in done.stderr) == bool(code)


def test_float16_has_no_digits_for_a_loss_that_is_not_scaled():
    problem = make_problem(**MANY)
    unscaled = errors(run_loss, "roi_align_cosine", problem, torch.float16, device="cpu", scale=1.0)
    assert max(unscaled) > 5 * tolerance(torch.float16)
