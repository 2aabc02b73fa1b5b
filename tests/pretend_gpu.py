"""A pretend GPU for machines without one: tensors that say cuda:0, compute on the CPU, and refuse to mix with CPU ones.

What a GPU's speed hangs on is counted by the line of our code that asks for it: launches, waits of the host for the
device, and bytes that cross. Triton's kernels are stood in for by the eager code, in the types that they would return.
It shows no asynchrony, no rounding of 16-bit kernels, no NCCL and no torch.compile.

To torch's C++ these tensors are on cpu:0. It is the CPU, so nothing asks for a driver, and it is another device than
that of CPU tensors, cpu without a number.
"""

import contextlib
import dataclasses
import functools
import importlib
import math
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ezsd.kernels import backend, crops, eager, registered
from tests.kernels import stand_ins

CODE = Path(__file__).resolve().parent.parent / "ezsd"
GPU = torch.device("cuda", 0)
INSIDE = torch.device("cpu", 0)
"""Device of the same tensors in torch's C++."""
WAITING = {
    *("_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "unique_dim", "unique_consecutive"),
    *("equal", "nms"),
}
"""Operators whose result, or its size, the host needs before it goes on."""
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
MOVING = {"_to_copy", "copy_", "_foreach_copy_"}
IMPLEMENTATIONS = {
    one._qualname: one._init_fn for one in vars(registered).values() if isinstance(one, torch.library.CustomOpDef)
}
"""Functions behind our operators; they allocate, launch and multiply like any other code."""


@dataclass
class Counts:
    """What was asked of the device, by line of our code."""

    launches: Counter = field(default_factory=Counter)
    waits: Counter = field(default_factory=Counter)
    moved: Counter = field(default_factory=Counter)
    """Bytes copied to the device or from it."""

    def __add__(self, other):
        return Counts(*(getattr(self, one.name) + getattr(other, one.name) for one in dataclasses.fields(self)))

    def __str__(self):
        lines = [f"{self.launches.total()} launches, {self.waits.total()} waits, {self.moved.total()} bytes moved"]
        for what, counter in (("waits", self.waits), ("bytes", self.moved)):
            lines += [f"{count:12} {what}  {place}" for place, count in counter.most_common()]
        return "\n".join(lines)


class PretendTensor(torch.Tensor):
    """A tensor on the pretend GPU; `inner` is the CPU tensor with its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=INSIDE,
        )  # fmt: skip
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return PretendGpu.active.run(func, args, kwargs or {})

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.inner = value.inner

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __repr__(self):
        return f"PretendTensor({self.inner})"


class PretendGpu:
    """The device: runs operators, counts them in `counts`, and refuses those of tensors in two places."""

    active = None

    def __init__(self):
        self.counts = Counts()
        self.current = []
        """Devices that were made the current one."""
        self._within = []
        """Devices that are the current one for a while."""
        self.debug_mode = "default"
        """What torch.cuda.set_sync_debug_mode was told."""

    @contextlib.contextmanager
    def counting(self):
        """Count anew for a while."""
        before, self.counts = self.counts, Counts()
        try:
            yield self.counts
        finally:
            self.counts = before

    def calls_of(self, patch, owner, name):
        """List that receives the counts of each call of a function from now on."""
        found, function = [], getattr(owner, name)

        def counted(*args, **kwargs):
            with self.counting() as counts:
                result = function(*args, **kwargs)
            found.append(counts)
            return result

        patch.setattr(owner, name, counted)
        return found

    def wait(self):
        self.counts.waits[place()] += 1
        if self.debug_mode != "default":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)

    @contextlib.contextmanager
    def within(self, device):
        """Stand-in for torch.cuda.device."""
        self._within.append(device)
        try:
            yield
        finally:
            self._within.pop()

    def launch_of_triton(self, count=1):
        """Launch kernels of Triton's, which go to the current device wherever the tensors are."""
        if not self._within or torch.device(self._within[-1]) != GPU:
            raise RuntimeError(f"a launch at {place()} goes to whichever device is the current one, not to {GPU}")
        self.launch(count)

    def record(self, stream=None):
        """Stand-in for an event's method: without a stream it waits for whichever device is the current one."""
        if stream is None or stream.device != GPU:
            raise RuntimeError(f"an event at {place()} is recorded on a stream of another device than {GPU}")

    def set_debug_mode(self, mode):
        self.debug_mode = mode

    def launch(self, count=1):
        self.counts.launches[place()] += count

    def move(self, tensor):
        self.counts.moved[place()] += tensor.numel() * tensor.element_size()

    def run(self, func, args, kwargs):
        """Run an operator on the values, and give back its results as tensors of the device they belong to."""
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        ours = {id(one.inner): one for one in tensors if isinstance(one, PretendTensor)}
        device = _inside(kwargs.get("device"))
        result_is_ours = bool(ours) if device is None else device == INSIDE
        if not ours and not result_is_ours:
            return func(*args, **kwargs)
        name = func._schema.name
        if name in IMPLEMENTATIONS:
            with Devices(), Operators():
                return IMPLEMENTATIONS[name](*args, **kwargs)
        if func._can_decompose():
            with torch._C.DisableTorchFunction(), Operators():
                return func.decompose(*args, **kwargs)
        self._count(func, name.split("::")[1], args, kwargs, tensors, crosses=bool(ours) != result_is_ours)
        _refuse(name, args)
        if device is not None:
            kwargs = kwargs | {"device": torch.device("cpu")}
        values, options = tree_map_only(PretendTensor, lambda one: one.inner, (args, kwargs))
        found = func(*values, **options)
        if not result_is_ours:
            return found
        return tree_map_only(torch.Tensor, lambda one: _known(ours.get(id(one)), one), found)

    def _count(self, func, name, args, kwargs, tensors, *, crosses):
        apart = [one for one in tensors if not isinstance(one, PretendTensor) and one.ndim]
        mixed = bool(apart) and any(isinstance(one, PretendTensor) for one in tensors)
        if name in INDEXED and isinstance(args[0], PretendTensor):
            self._count_indexing(args)
        elif mixed and name not in MOVING:
            shapes = [tuple(one.shape) for one in apart]
            raise RuntimeError(f"{name} at {place()}: tensors of shapes {shapes} are on the CPU, others on {GPU}")
        elif name in MOVING and (mixed or crosses):
            self._count_move(args, kwargs)
        elif name in WAITING or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.launch()
            self.wait()
        elif not _is_view(func) and not name.startswith(("empty", "new_empty")):
            self.launch()

    def _count_indexing(self, args):
        indices = [one for one in args[1] if one is not None]
        value = args[2] if len(args) > 2 else None
        self.launch()
        for one in indices:
            if not isinstance(one, PretendTensor):
                self.move(one)
                self.wait()
            # One number is put where a mask is by filling; else the marks have to be counted first.
            elif one.dtype == torch.bool and (value is None or value.numel() > 1):
                self.wait()

    def _count_move(self, args, kwargs):
        source = args[1] if isinstance(args[1:2], tuple) and len(args) > 1 else args[0]
        for one in source if isinstance(source, list) else [source]:
            self.move(one)
        blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        # What a copy without waiting makes on the CPU is page-locked; its code waits for an event.
        into = isinstance(source, PretendTensor) and source is not args[0]
        if blocking or (into and not _is_pinned(args[0])):
            self.wait()


class Operators(TorchDispatchMode):
    """Shows the pretend GPU the operators without a tensor on it, which may make one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return PretendGpu.active.run(func, args, kwargs or {})


class Devices(TorchFunctionMode):
    """Turns cuda into the device that torch's C++ knows; it does not see what torch's own Python calls."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.device:
            return func(*args, **kwargs or {})
        args, kwargs = tuple(map(_inside, args)), {key: _inside(value) for key, value in (kwargs or {}).items()}
        # Pinned memory is the driver's; it is remembered whose it would be.
        if kwargs.get("pin_memory"):
            return _pin(func(*args, **kwargs | {"pin_memory": False}))
        # Values of lists become tensors below what a mode can see.
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == INSIDE:
            return func(*args, **kwargs | {"device": "cpu"}).to(INSIDE)
        if func is torch.Tensor.new_tensor and isinstance(args[0], PretendTensor):
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype} | kwargs).to(INSIDE)
        return func(*args, **kwargs)


def _inside(value):
    if isinstance(value, torch.device):
        return INSIDE if value.type == "cuda" else value
    return INSIDE if isinstance(value, str) and value.startswith("cuda") else value


def _pin(tensor, device=None):
    """The values of a CPU tensor in memory that a GPU copies by itself."""
    if isinstance(tensor, PretendTensor):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")  # noqa: TRY004 - torch's
    if _is_pinned(tensor):
        return tensor
    pinned = tensor.clone()
    pinned.pinned_by_pretend_gpu = True
    return pinned


def _is_pinned(tensor, device=None):
    return getattr(tensor, "pinned_by_pretend_gpu", False)


def _known(ours, value):
    """A result as a tensor of the device: the argument itself where an operator works in place."""
    if ours is None:
        return PretendTensor(value)
    if ours.shape != value.shape:
        raise NotImplementedError("an operator that changes a tensor's shape in place")
    return ours


def _refuse(name, args):
    """Raise what torch raises on a GPU for what it can do on a CPU alone."""
    if name == "aten::_upsample_bicubic2d_aa":
        # Weights of 32 columns, of a row, and of what lies between them.
        taps = 2 * math.ceil(2 * args[0].shape[-1] / args[1][-1]) + 1
        if 65 * taps * torch.float32.itemsize > 48 * 1024:
            raise RuntimeError("Provided interpolation parameters can not be handled with current algorithm")


def _is_view(func):
    return any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns)


def place():
    """The innermost line of our code that runs now."""
    frame = sys._getframe(1)
    while frame is not None:
        name = _named(frame.f_code.co_filename)
        if name is not None:
            return f"{name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "tests"


@functools.cache
def _named(file):
    path = Path(file)
    if not path.is_relative_to(CODE):
        return None
    name = path.relative_to(CODE)
    return str(name if name.parts[0] in ("pipeline", "cache") else Path("ezsd") / name)


class _Autocast(torch.autocast):
    def __init__(self, device_type, *args, **kwargs):
        super().__init__(_autocast_type(device_type), *args, **kwargs)


def _autocast_type(device_type):
    return "cpu" if device_type.startswith("cuda") else device_type


@contextlib.contextmanager
def pretend_gpu(*, capability=(9, 0)):
    """A machine with one GPU of a compute capability; skips the test on a machine that has a GPU."""
    # A test that patches it by a fixture of its own would leave it half there.
    assert torch.cuda.device_count.__module__ == "torch.cuda", "a patch over an earlier pretend GPU came back"
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, which `make gpu-check` tests")
    gpu = PretendGpu()
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setattr(PretendGpu, "active", gpu)
        _patch_torch(patch, gpu, capability)
        _patch_triton(patch, gpu)
        for answer in (backend._tried_on, backend._announce):
            answer.cache_clear()
            stack.callback(answer.cache_clear)
        with Devices(), Operators():
            # Whether Triton can launch is found out once, which is no part of any step.
            with gpu.counting():
                backend._tried_on(GPU.index)
            yield gpu


def _patch_torch(patch, gpu, capability):
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": capability,
        "get_device_name": "pretend GPU",
        "is_bf16_supported": capability >= (8, 0),
        "is_current_stream_capturing": False,
        "empty_cache": None,
        "_lazy_init": None,
        "manual_seed_all": None,
        "mem_get_info": (80 * 2**30, 80 * 2**30),
        "reset_peak_memory_stats": None,
        "max_memory_allocated": 0,
    }
    for name, answer in answers.items():
        patch.setattr(torch.cuda, name, lambda *args, _answer=answer, **kwargs: _answer)
    patch.setattr(torch.cuda, "device", gpu.within)
    patch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(device=device))
    patch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=gpu.record, synchronize=gpu.wait))
    patch.setattr(torch.cuda, "set_device", gpu.current.append)
    patch.setattr(torch.cuda, "set_sync_debug_mode", gpu.set_debug_mode)
    patch.setattr(torch.cuda, "synchronize", lambda device=None: gpu.wait())
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        real = getattr(torch, name)
        patch.setattr(torch, name, lambda device_type="cuda", _real=real: _real(_autocast_type(device_type)))
    patch.setattr(torch, "autocast", _Autocast)
    patch.setattr(torch.Tensor, "pin_memory", _pin)
    patch.setattr(torch.Tensor, "is_pinned", _is_pinned)
    # A module's parameters are replaced: a tensor cannot become one of another class.
    patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    # The device's tensors are updated together, as those of a GPU are.
    optimiser = importlib.import_module("torch.optim.optimizer")
    patch.setattr(optimiser, "_foreach_supported_types", [*optimiser._foreach_supported_types, PretendTensor])
    patch.setattr(torch.nn.utils.clip_grad, "_has_foreach_support", lambda tensors, device: True)
    # It asks the driver.
    check = "_accelerator_graph_capture_health_check"
    patch.setattr(torch.optim.Optimizer, check, lambda self: None, raising=False)


def _patch_triton(patch, gpu):
    """Compute on the values what Triton's kernels compute, in float32, and round it as they do."""
    triton_pool = pytest.importorskip("ezsd.kernels.triton_pool")
    triton_distance = pytest.importorskip("ezsd.kernels.triton_distance")

    triton_crops = pytest.importorskip("ezsd.kernels.triton_crops")

    def inner(pooling):
        return dataclasses.replace(pooling, maps=tuple(one.inner for one in pooling.maps))

    def pool_forward(pooling, boxes, image_index):
        gpu.launch_of_triton()
        pooled = eager.pool(inner(pooling), boxes.inner.float(), image_index.inner)
        return PretendTensor(pooled.to(pooling.maps[0].dtype))

    def pool_backward(pooling, pooled_grad, boxes, image_index):
        # The sorting keys and the gather; sorting itself is torch's.
        gpu.launch_of_triton(2)
        eager.pool_backward(inner(pooling), pooled_grad.inner, boxes.inner.float(), image_index.inner)

    def distance_forward(embedding, target, metric):
        gpu.launch_of_triton()
        return PretendTensor(stand_ins.distance_forward(embedding.inner, target.inner, metric))

    def distance_backward(gradient, embedding, target, metric):
        gpu.launch_of_triton()
        return PretendTensor(stand_ins.distance_backward(gradient.inner, embedding.inner, target.inner, metric))

    def crop(image, windows, gain, shift, size, dtype):
        gpu.launch_of_triton()
        values = (one.inner for one in (image, windows, gain, shift))
        return PretendTensor(crops.eager(*values, size, dtype))

    for module, functions in (
        (triton_crops, (crop,)),
        (triton_pool, (pool_forward, pool_backward)),
        (triton_distance, (distance_forward, distance_backward)),
    ):
        for function in functions:
            patch.setattr(module, function.__name__, function)
