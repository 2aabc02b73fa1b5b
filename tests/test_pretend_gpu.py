"""The pretend GPU keeps apart what a GPU keeps apart, and counts what it makes the host wait for."""

import contextlib
import importlib
from operator import setitem

import pytest
import torch
from torch.nn.functional import normalize

from ezsd import kernels
from ezsd.kernels import Pooling, backend
from tests.pretend_gpu import PretendGpu, pretend_gpu

triton_crops = pytest.importorskip("ezsd.kernels.triton_crops")


@pytest.fixture
def gpu():
    with pretend_gpu() as gpu:
        yield gpu


def numbers(*shape):
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


def test_a_tensor_says_where_it_is(gpu):
    there = numbers(3).to("cuda")
    assert (there.device, there.is_cuda, (there + 1).device) == (torch.device("cuda", 0), True, there.device)
    assert there.to(there.device) is there
    assert type(there.cpu()) is torch.Tensor
    assert there.cpu().device == torch.device("cpu")
    with pytest.raises(TypeError):
        there.numpy()


@pytest.mark.parametrize(
    "mix",
    [
        lambda there: there + numbers(4),
        lambda there: torch.cat([numbers(4), there]),
        lambda there: numbers(4)[there.long()],
        lambda there: normalize(there[None] @ numbers(4, 4)),
    ],
)
def test_tensors_of_two_places_do_not_mix(gpu, mix):
    there = numbers(4).to("cuda")
    with pytest.raises(RuntimeError, match="on the CPU"):
        mix(there)


@pytest.mark.parametrize(
    ("call", "waits", "moved"),
    [
        (lambda x: x + 1, 0, 0),
        (lambda x: x + torch.tensor(1.0), 0, 0),
        (lambda x: x[1:].view(-1).to(torch.float64), 0, 0),
        (lambda x: setitem(x, x > 2, 0), 0, 0),
        (lambda x: torch.where(x > 2, x, 0).sum(), 0, 0),
        (lambda x: x[torch.ones(2, dtype=torch.int64, device="cuda")], 0, 0),
        (lambda x: x.repeat_interleave(torch.ones_like(x).long(), output_size=4), 0, 0),
        (lambda x: float(x.sum()), 1, 0),
        (lambda x: bool((x > 2).any()), 1, 0),
        (lambda x: torch.nonzero(x), 1, 0),
        (lambda x: x[x > 2], 1, 0),
        (lambda x: setitem(x, x > 2, x[3:].expand(1).clone()), 0, 0),
        (lambda x: setitem(x, x > 1, x[:2].clone()), 1, 0),
        (lambda x: x.repeat_interleave(torch.ones_like(x).long()), 1, 0),
        (lambda x: torch.cuda.synchronize(), 1, 0),
        (lambda x: x.cpu(), 1, 16),
        (lambda x: x.tolist(), 1, 16),
        (lambda x: numbers(5).to("cuda"), 1, 20),
        (lambda x: numbers(5).to(x), 1, 20),
        (lambda x: numbers(5).to("cuda", non_blocking=True), 0, 20),
        (lambda x: torch.tensor([1, 2], device=x.device), 1, 16),
        (lambda x: x.new_tensor([1, 2]), 1, 8),
        (lambda x: x[torch.tensor([0, 1])], 1, 16),
        (lambda x: x[[0, 1]], 1, 16),
        (lambda x: x.copy_(numbers(4)), 1, 16),
        (lambda x: numbers(4).pin_memory().to("cuda", non_blocking=True), 0, 16),
        (lambda x: torch.empty(4, pin_memory=True).copy_(x, non_blocking=True), 0, 16),
        (lambda x: torch.empty(4, pin_memory=True).copy_(x), 1, 16),
        (lambda x: torch.empty(4).copy_(x, non_blocking=True), 1, 16),
    ],
)
def test_waits_and_bytes_are_counted(gpu, call, waits, moved):
    there = numbers(4).to("cuda")
    with gpu.counting() as counts:
        call(there)
    assert (counts.waits.total(), counts.moved.total()) == (waits, moved)


def test_memory_of_the_cpu_alone_is_pinned(gpu):
    pinned = numbers(3).pin_memory()
    assert pinned.is_pinned()
    assert pinned.pin_memory() is pinned
    assert not numbers(3).is_pinned()
    with pytest.raises(RuntimeError, match="only dense CPU tensors"):
        pinned.to("cuda").pin_memory()


def test_waits_are_told_where_torch_is_asked_to_tell_them(gpu):
    there = numbers(3).to("cuda")
    torch.cuda.set_sync_debug_mode("warn")
    with pytest.warns(UserWarning, match="synchronizing"):
        there.tolist()
    torch.cuda.set_sync_debug_mode("default")
    there.tolist()


def test_launches_and_events_are_refused_where_another_device_may_be_the_current_one(gpu):
    there = numbers(3, 2, 2).byte().to("cuda")
    window, one = torch.tensor([[0, 0, 2, 2]], dtype=torch.int32).to("cuda"), torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="goes to whichever device is the current one"):
        triton_crops.crop(there, window, one, one, 2, torch.float32)
    with pytest.raises(RuntimeError, match="on a stream of another device"):
        torch.cuda.Event().record()
    with torch.cuda.device(there.device):
        assert triton_crops.crop(there, window, one, one, 2, torch.float32).is_cuda
    torch.cuda.Event().record(torch.cuda.current_stream(there.device))


PATCHED = {
    "torch.cuda": torch.cuda,
    "torch": torch,
    "torch.Tensor": torch.Tensor,
    "torch.__future__": torch.__future__,
    "torch.optim.optimizer": importlib.import_module("torch.optim.optimizer"),
    "torch.optim.Optimizer": torch.optim.Optimizer,
    "torch.nn.utils.clip_grad": importlib.import_module("torch.nn.utils.clip_grad"),
    "triton_pool": pytest.importorskip("ezsd.kernels.triton_pool"),
    "triton_crops": triton_crops,
    "triton_distance": pytest.importorskip("ezsd.kernels.triton_distance"),
    "PretendGpu": PretendGpu,
}
"""What the pretend GPU is put over, by name."""


def contents():
    return {f"{name}.{key}": value for name, where in PATCHED.items() for key, value in vars(where).items()}


@pytest.mark.parametrize("error", [None, RuntimeError("in the test")])
def test_nothing_of_it_is_left_behind(error):
    # Torch fills in some of its names when they are first looked at.
    with pretend_gpu():
        kernels.roi_align(*there_and_boxes())
    before = contents()
    with contextlib.suppress(RuntimeError), pretend_gpu():
        assert {name for name, value in contents().items() if value is not before.get(name)} >= {
            *("torch.cuda.is_available", "torch.autocast", "torch.Tensor.pin_memory", "triton_pool.pool_forward"),
            *("torch.__future__._overwrite_module_params_on_conversion", "PretendGpu.active"),
        }
        kernels.roi_align(*there_and_boxes())
        if error is not None:
            raise error
    after = contents()
    assert {name for name in before.keys() | after.keys() if before.get(name) is not after.get(name)} == set()
    assert not torch.cuda.is_available()
    assert backend._tried_on.cache_info().currsize == backend._announce.cache_info().currsize == 0
    # No mode is still looking.
    assert torch.ones(2).device == torch.device("cpu")
    assert not torch.overrides._get_current_function_mode_stack()
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    with pytest.raises((RuntimeError, AssertionError)):
        torch.ones(2, device="cuda")


def there_and_boxes():
    features, boxes = numbers(1, 4, 3, 3).to("cuda"), torch.tensor([[0.0, 0, 2, 2]], device="cuda")
    return (
        features,
        boxes,
        torch.zeros(1, dtype=torch.int64, device="cuda"),
        Pooling(spatial_scale=(1.0,), output_size=2),
    )


def test_counts_say_where_in_our_code(gpu):
    features = numbers(1, 4, 3, 3).to("cuda").requires_grad_()
    boxes, image = torch.tensor([[0.0, 0, 2, 2]], device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
    with gpu.counting() as counts:
        pooled = kernels.roi_align(features, boxes, image, Pooling(spatial_scale=(1.0,), output_size=2))
        pooled.sum().backward()
    assert features.grad.device.type == "cuda"
    assert any(place.startswith("ezsd/kernels/registered.py") for place in counts.launches)
    assert not counts.waits
    with gpu.counting() as counts:
        kernels.roi_align(features, boxes, image, Pooling(spatial_scale=(1.0,), output_size=2, backend="eager"))
    assert {place.split(":")[0] for place in counts.waits} == {"ezsd/kernels/eager.py"}
