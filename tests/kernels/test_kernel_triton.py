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


def run_cases(name, *options, **environment):
    report = run(["-m", "pytest", str(HERE / name), "-p", "no:cacheprovider", "-rs", *options], **environment)
    if "skipped" in report:
        pytest.skip(report)


# Each of the next ones is a whole suite in a process of its own.
@pytest.mark.timeout(1200)
@needs_triton
def test_interpreted_kernels_equal_the_reference():
    run_cases("interpreted_cases.py", TRITON_INTERPRET="1")


@pytest.mark.timeout(1200)
@needs_triton
def test_kernels_compile_for_gpus_within_their_limits(tmp_path):
    run_cases("compiled_cases.py", TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@needs_triton
@pytest.mark.parametrize("cases", ["compiled_cases.py", "interpreted_cases.py"])
def test_kernels_of_every_other_type_shape_and_gpu_do_too(cases, tmp_path):
    """What the two above leave out for its time."""
    interpreted = {"TRITON_INTERPRET": "1"} if cases == "interpreted_cases.py" else {}
    run_cases(cases, "-m", "slow", TRITON_CACHE_DIR=str(tmp_path), **interpreted)


# A GPU as far as Triton asks; what it finds missing beside it is really missing.
MISSING = """
import os, sys, torch
from ezsd.errors import BackendError
from ezsd.kernels import Pooling, backend, require_backend, roi_align, triton_distance
from tests.pretend_gpu import pretend_gpu

os.environ.pop("CC", None)
launch, gpu = triton_distance.distance_forward, torch.device("cuda", 0)
for change in sys.argv[2:]:
    name, value = change.split("=")
    os.environ |= {"TRITON_CACHE_DIR": sys.argv[1], "TRITON_LIBCUDA_PATH": sys.argv[1], name: value}
    with pretend_gpu():
        triton_distance.distance_forward = launch
        backend._tried_on.cache_clear()
        require_backend("auto", gpu)
        maps, boxes = torch.ones(1, 3, 8, 8, device=gpu), torch.tensor([[0.0, 0.0, 20.0, 20.0]], device=gpu)
        pooled = roi_align(maps, boxes, torch.zeros(1, dtype=torch.int64, device=gpu), Pooling(spatial_scale=(0.25,)))
        assert float(pooled.mean()) == 1
        try:
            require_backend("triton", gpu)
        except BackendError as error:
            print(error)
"""


@needs_triton
def test_auto_does_without_what_triton_needs_to_launch_and_says_why(tmp_path):
    missing = {
        "TRITON_CACHE_DIR=/dev/null/x": "NotADirectoryError: [Errno 20] Not a directory: '/dev/null/",
        "PATH=/nowhere": "RuntimeError: Failed to find C compiler",
    }
    # A GPU that is there would have Triton launch.
    said = run(["-c", MISSING, str(tmp_path), *missing], CUDA_VISIBLE_DEVICES="").splitlines()
    cure = "a C compiler, Python's headers, and a folder to write to, TRITON_CACHE_DIR or ~/.triton/cache."
    for line, reason in zip(said, missing.values(), strict=True):
        assert f"Triton cannot launch a kernel ({reason}" in line
        assert f"it needs {cure}" in line


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
