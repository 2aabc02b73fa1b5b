"""The first kernel on a GPU: what Triton lacks is remembered and told, what is not Triton's is neither."""

import logging
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ezsd.errors import BackendError
from ezsd.kernels import backend, require_backend
from tests.pretend_gpu import GPU, pretend_gpu

triton_distance = pytest.importorskip("ezsd.kernels.triton_distance")


@pytest.fixture
def fails():
    """Let the first kernel's launch fail, and forget what was found before."""

    def install(error):
        def launch(*_):
            raise error

        patch.setattr(triton_distance, "distance_forward", launch)
        backend._tried_on.cache_clear()

    # What is patched over the pretend GPU is taken back before it goes.
    with pretend_gpu(), pytest.MonkeyPatch.context() as patch:
        yield install


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    ],
)
def test_an_error_that_is_not_tritons_is_raised_and_forgotten(error, fails, monkeypatch):
    with monkeypatch.context() as patch:
        launch = triton_distance.distance_forward
        fails(error)
        with pytest.raises(type(error), match=re.escape(str(error))):
            require_backend("triton", GPU)
        patch.setattr(triton_distance, "distance_forward", launch)
        require_backend("triton", GPU)


def test_an_earlier_kernels_error_keeps_its_name(fails, monkeypatch):
    def synchronize(device):
        raise RuntimeError("CUDA error: device-side assert triggered")

    fails(OSError("would be said of Triton"))
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", synchronize)
        with pytest.raises(RuntimeError, match="device-side assert"):
            require_backend("auto", GPU)


def test_a_first_call_with_fake_tensors_launches_a_real_kernel(fails):
    backend._tried_on.cache_clear()
    with FakeTensorMode():
        assert backend._gpu_obstacle(0) is None


def test_a_gpu_that_the_kernels_are_for_is_warned_of(fails, caplog):
    fails(OSError("no compiler"))
    with caplog.at_level(logging.INFO):
        require_backend("auto", GPU)
        require_backend("auto", GPU)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "Triton cannot launch a kernel (OSError: no compiler)" in caplog.text
    with pytest.raises(BackendError, match="no compiler"):
        require_backend("triton", GPU)


def test_an_older_gpu_is_told_of(caplog):
    with pretend_gpu(capability=(7, 5)), caplog.at_level(logging.DEBUG):
        require_backend("auto", GPU)
    assert [record.levelname for record in caplog.records] == ["DEBUG"]


def test_maps_that_no_launch_takes_launch_nothing(fails):
    fails(AssertionError("launched"))
    assert "float64" in backend.triton_obstacle((torch.zeros(1, 1, 1, 1, dtype=torch.float64, device="cuda"),), bins=7)
    assert backend._tried_on.cache_info().currsize == 0
