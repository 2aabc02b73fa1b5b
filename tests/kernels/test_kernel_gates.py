"""The gates of `make gpu-check` without a GPU: the kernels' arithmetic passes them, a wrong one does not."""

import math
import subprocess
from pathlib import Path

import pytest
import torch

from tests.kernels import stand_ins
from tests.kernels.gates import errors, passes, relative_error, tolerance, worst_row
from tests.kernels.kernel_problems import make_problem, run_align, run_embed, run_embed_cosine, run_loss

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
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
        found = torch.tensor(errors(run, name, problem, dtype, device="cpu"))
        whole, rows = found.chunk(2)
        assert (whole < tolerance(dtype) / 3).all()
        assert (rows < tolerance(dtype) / 2).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_the_detectors_own_operator_passes(dtype):
    problem = make_problem(regions=100, channels=63, levels=4)
    assert passes(errors(run_embed_cosine, "roi_embed_cosine", problem, dtype, device="cpu", targets=40), dtype)


def shifted_forward(pooling, boxes, image_index):
    return stand_ins.pool_forward(pooling, boxes + 0.2, image_index)


def shifted_backward(pooling, pooled_grad, boxes, image_index):
    stand_ins.pool_backward(pooling, pooled_grad, boxes + 0.2, image_index)


def nan_backward(pooling, pooled_grad, boxes, image_index):
    """One that never writes a cell of its last map, which begins as NaN."""
    stand_ins.pool_backward(pooling, pooled_grad, boxes, image_index)
    pooling.maps[-1][-1, :, -1, -1] = torch.nan


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("wrong", [shifted_forward, shifted_backward, nan_backward])
def test_wrong_kernels_do_not(dtype, wrong, monkeypatch):
    monkeypatch.setattr(triton_pool, f"pool_{wrong.__name__.split('_')[1]}", wrong)
    problem = make_problem(regions=20, bins=7, channels=20, levels=2)
    assert not passes(errors(run_loss, "roi_align_cosine", problem, dtype, device="cpu"), dtype)


def losing_forward(pooling, boxes, image_index):
    pooled = stand_ins.pool_forward(pooling, boxes, image_index)
    pooled[len(boxes) // 2] = 0
    return pooled


def losing_backward(pooling, pooled_grad, boxes, image_index):
    pooled_grad = pooled_grad.clone()
    pooled_grad[len(boxes) // 2] = 0
    stand_ins.pool_backward(pooling, pooled_grad, boxes, image_index)


@pytest.mark.parametrize("wrong", [losing_forward, losing_backward])
def test_one_lost_box_of_twenty_thousand_is_seen(wrong, monkeypatch):
    monkeypatch.setattr(triton_pool, f"pool_{wrong.__name__.split('_')[1]}", wrong)
    problem, dtype = make_problem(regions=20_000, bins=1, channels=8, levels=4), torch.bfloat16
    found = errors(run_align, "roi_align", problem, dtype, device="cpu")
    assert passes(found[: len(found) // 2], dtype)
    assert not passes(found, dtype)


def test_an_error_beside_nothing_is_infinite():
    value, nothing = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.float64)
    assert relative_error(value, nothing) == worst_row(value, nothing) == math.inf
    assert relative_error(nothing, nothing) == worst_row(nothing, nothing) == 0


@pytest.mark.parametrize("code", [0, 1, 2])
def test_the_check_is_one_call_that_ends_as_its_script_does(code, tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho $@\nexit {code}\n")
    python.chmod(0o755)
    (tmp_path / "installed").touch()
    command = ["make", "--silent", "gpu-check", f"BIN={tmp_path}", f"STAMP={tmp_path}/installed"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["benchmarks/gpu_check.py"]
    # Make itself ends with 2, and says with what the command did.
    assert bool(done.returncode) == bool(code)
    assert (f"Error {code}" in done.stderr) == bool(code)


def test_float16_has_no_digits_for_a_loss_that_is_not_scaled():
    problem = make_problem(**MANY)
    unscaled = errors(run_loss, "roi_align_cosine", problem, torch.float16, device="cpu", scale=1.0)
    assert max(unscaled) > 5 * tolerance(torch.float16)
