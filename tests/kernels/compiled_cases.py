"""Run by test_kernel_triton.py in a process of its own: every kernel we ship, compiled for GPUs we do not have."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ezsd.detector.masks import POOL_SIZE
from ezsd.kernels import triton_distance, triton_pool
from ezsd.kernels.pooling import BoundPooling

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
POINTERS = {"boxes": "*fp32", "image_index": "*i64", "order": "*i64", "begins": "*i64", "keys": "*i32"}
POINTERS |= {"distance": "*fp32", "distance_grad": "*fp32", "target": "*fp16"}
INTEGERS = re.compile(r"(height|width|first)\d|images|regions|size")
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}
"""Shared memory that a program may use, by compute capability."""
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")

pytestmark = pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this Triton ships no cuobjdump")


def compile_kernel(kernel, settings, *, dtype, capability):
    options = {name: settings[name] for name in OPTIONS if name in settings}
    constants = {name: value for name, value in settings.items() if name not in OPTIONS}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif INTEGERS.fullmatch(name):
            signature[name] = "i32"
        elif name in ("scale", "threshold"):
            signature[name] = "fp32"
        else:
            signature[name] = POINTERS.get(name, f"*{NAMES[dtype]}")
    # Torch aligns its tensors, and the launcher tells the compiler so.
    aligned = [(place,) for place, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
    source = ASTSource(kernel, signature, constants, attrs={place: [["tt.divisibility", 16]] for place in aligned})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def inspect(compiled, folder):
    """Registers and stack bytes per thread, and the instructions that spill inside a loop."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    usage = re.search(r"REG:(\d+) STACK:(\d+)", disassemble("-res-usage", binary))
    instructions = [
        (int(place, 16), text)
        for place, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", disassemble("-sass", binary))
    ]
    jumps = [(int(to[1], 16), place) for place, text in instructions if (to := re.search(r"BRA.* 0x([0-9a-f]+)", text))]
    # Every kernel ends in a jump to itself; without any, the listing was not understood.
    assert jumps
    loops = [(begin, end) for begin, end in jumps if begin < end]
    spills = [place for place, text in instructions if re.search(r"\b(LDL|STL)\b", text)]
    in_loops = [place for place in spills if any(begin <= place <= end for begin, end in loops)]
    return int(usage[1]), int(usage[2]), in_loops


def disassemble(option, binary):
    # cuobjdump calls nvdisasm, which lies beside it.
    environment = os.environ | {"PATH": f"{CUOBJDUMP.parent}{os.pathsep}{os.environ['PATH']}"}
    command = [CUOBJDUMP, option, binary]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def make_pooling(dtype, bins):
    maps = tuple(torch.empty(16, 256, 8 >> level, 8 >> level, dtype=dtype, device="meta") for level in range(4))
    return BoundPooling(maps=maps, scale=0.25, threshold=1.0, bins=bins, samples=2)


@pytest.mark.parametrize(
    ("dtype", "bins", "capability"),
    [
        (torch.bfloat16, 7, 80),
        (torch.bfloat16, 7, 90),
        (torch.bfloat16, 1, 80),
        (torch.bfloat16, 1, 90),
        (torch.float16, 7, 90),
        (torch.float32, 7, 80),
        (torch.float32, 7, 90),
    ],
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_pooling_fits_the_machine(direction, dtype, bins, capability, tmp_path):
    pooling = make_pooling(dtype, bins)
    if direction == "forward":
        launch, settings = triton_pool.FORWARD[dtype], triton_pool.forward_settings(pooling)
        compiled = compile_kernel(triton_pool.pool_forward_kernel, settings, dtype=dtype, capability=capability)
    else:
        launch, settings = triton_pool.BACKWARD[dtype], triton_pool.backward_settings(pooling)
        compiled = compile_kernel(triton_pool.pool_backward_kernel, settings, dtype=dtype, capability=capability)
    registers, stack, spills_in_loops = inspect(compiled, tmp_path)
    assert registers <= launch.max_registers
    assert stack <= launch.max_stack
    assert spills_in_loops == []
    assert compiled.metadata.shared <= launch.max_shared
    if dtype != torch.float32:
        assert re.search(r"wgmma\.mma_async|mma\.sync", compiled.asm["ptx"]), "the product must use tensor cores"


@pytest.mark.parametrize(
    ("direction", "capability"),
    [("forward", 86), ("forward", 90), *(("backward", capability) for capability in SHARED_KIB)],
)
def test_the_mask_heads_pooling_fits_every_card(direction, capability, tmp_path):
    pooling = make_pooling(torch.bfloat16, POOL_SIZE)
    settings = getattr(triton_pool, f"{direction}_settings")(pooling)
    kernel = getattr(triton_pool, f"pool_{direction}_kernel")
    compiled = compile_kernel(kernel, settings, dtype=torch.bfloat16, capability=capability)
    _, stack, spills_in_loops = inspect(compiled, tmp_path)
    assert stack == 0
    assert spills_in_loops == []
    assert compiled.metadata.shared <= SHARED_KIB[capability] * 1024


@pytest.mark.parametrize(("l1", "capability"), [(False, 80), (False, 90), (True, 90)])
@pytest.mark.parametrize("name", ["distance_forward_kernel", "distance_backward_kernel"])
def test_distances_fit_the_machine(name, l1, capability, tmp_path):
    settings = {"L1": l1, "BLOCK": 512, "num_warps": triton_distance.WARPS, "enable_fp_fusion": False}
    compiled = compile_kernel(getattr(triton_distance, name), settings, dtype=torch.bfloat16, capability=capability)
    registers, stack, _ = inspect(compiled, tmp_path)
    assert registers <= triton_distance.MAX_REGISTERS
    assert stack == 0


def test_keys_fit_the_machine(tmp_path):
    settings = {"LEVELS": 4, "BLOCK": triton_pool.KEYS, "enable_fp_fusion": False}
    compiled = compile_kernel(triton_pool.box_keys_kernel, settings, dtype=torch.float32, capability=90)
    registers, stack, _ = inspect(compiled, tmp_path)
    assert registers <= triton_pool.KEYS_MAX_REGISTERS
    assert stack == 0
