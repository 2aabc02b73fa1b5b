"""The Triton kernels without a GPU. A jitted function can be interpreted or compiled, not both in one process."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed, so its kernels are not tested here"
)


def run(arguments, **environment):
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")
    }
    inherited |= {"OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=inherited, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_cases(name, **environment):
    report = run(["-m", "pytest", str(HERE / name), "-p", "no:cacheprovider", "-rs"], **environment)
    if "skipped" in report:
        pytest.skip(report)


# Each of the next two is a whole suite in a process of its own, half a minute of a core that may be shared.
@pytest.mark.timeout(1200)
@needs_triton
def test_interpreted_kernels_equal_the_reference():
    run_cases("interpreted_cases.py", TRITON_INTERPRET="1")


@pytest.mark.timeout(1200)
@needs_triton
def test_kernels_compile_for_gpus_within_their_limits(tmp_path):
    run_cases("compiled_cases.py", TRITON_CACHE_DIR=str(tmp_path))


def test_the_package_works_where_triton_cannot_be_imported():
    script = """
import sys
sys.modules["triton"] = None
import torch
from ezsd import kernels
maps = torch.randn(1, 3, 8, 8, requires_grad=True)
boxes, image = torch.tensor([[0.0, 0.0, 20.0, 20.0]]), torch.zeros(1, dtype=torch.int64)
kernels.roi_align(maps, boxes, image, kernels.Pooling(spatial_scale=(0.25,))).sum().backward()
assert maps.grad.isfinite().all()
"""
    run(["-c", script])
