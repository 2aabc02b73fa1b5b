"""Run by test_kernel_triton.py in a process of its own: every kernel we ship, compiled for GPUs we do not have.

Not marked slow: what the presets use, on the oldest card with bfloat16 and on the one that is most in use.
"""

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ezsd.detector.masks import POOL_SIZE
from ezsd.kernels import triton_crops, triton_distance, triton_pool
from ezsd.kernels.pooling import BoundPooling

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
POINTERS = {"boxes": "*fp32", "image_index": "*i64", "samples": "*fp32"}
POINTERS |= dict.fromkeys(("order", "begins", "listed", "counts"), "*i32")
POINTERS |= {"distance": "*fp32", "distance_grad": "*fp32", "target": "*fp16"}
POINTERS |= {"image": "*u8", "windows": "*i32", "gain": "*fp32", "shift": "*fp32"}
INTEGERS = re.compile(r"(height|width|first)\d?|images|regions|size|tiles")
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Shared memory that a program may use, by compute capability."""
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
PRODUCT = r"wgmma\.mma_async|mma\.sync|tcgen05\.mma"


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


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


@dataclass(frozen=True, kw_only=True)
class Usage:
    registers: int
    """Per thread."""
    stack: int
    """Bytes per thread."""
    loop: int
    """Instructions of the innermost loop that reads memory ahead, which is that of the products; 0 without one."""
    spills: int
    """Registers that loops read back from the stack or write to it."""


def inspect(compiled, folder):
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
    loops = [
        [text for place, text in instructions if begin <= place <= end] for begin, end in set(jumps) if begin < end
    ]
    return Usage(
        registers=int(usage[1]),
        stack=int(usage[2]),
        loop=min((len(loop) for loop in loops if any("LDGSTS" in text for text in loop)), default=0),
        spills=max((sum(bool(re.search(r"\b(LDL|STL)\b", text)) for text in loop) for loop in loops), default=0),
    )


def disassemble(option, binary):
    # cuobjdump calls nvdisasm, which lies beside it.
    environment = os.environ | {"PATH": f"{CUOBJDUMP.parent}{os.pathsep}{os.environ['PATH']}"}
    command = [CUOBJDUMP, option, binary]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def make_pooling(dtype, bins):
    maps = tuple(torch.empty(16, 256, 8 >> level, 8 >> level, dtype=dtype, device="meta") for level in range(4))
    return BoundPooling(maps=maps, scale=0.25, threshold=1.0, bins=bins, samples=2)


def compile_pooling(direction, dtype, bins, capability, folder):
    settings = getattr(triton_pool, f"{direction}_settings")(make_pooling(dtype, bins))
    kernel = getattr(triton_pool, f"pool_{direction}_kernel")
    compiled = compile_kernel(kernel, settings, dtype=dtype, capability=capability)
    return compiled, inspect(compiled, folder)


@pytest.mark.parametrize(
    ("dtype", "bins", "capability"),
    [
        (torch.bfloat16, 7, 80),
        (torch.bfloat16, 7, 90),
        slow(torch.bfloat16, 7, 100),
        slow(torch.bfloat16, 7, 120),
        slow(torch.bfloat16, 1, 90),
        slow(torch.float16, 7, 80),
        slow(torch.float32, 7, 80),
        slow(torch.float32, 7, 90),
    ],
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_pooling_fits_the_machine(direction, dtype, bins, capability, tmp_path):
    launch = {"forward": triton_pool.FORWARD, "backward": triton_pool.BACKWARD}[direction][dtype]
    compiled, usage = compile_pooling(direction, dtype, bins, capability, tmp_path)
    assert usage.registers <= launch.max_registers
    squeezed = (direction, capability) == ("forward", 80) and dtype != torch.float32
    assert usage.stack <= (triton_pool.MAX_STACK if squeezed else 0)
    assert usage.spills <= (2 if squeezed else 0)
    assert compiled.metadata.shared <= launch.max_shared
    assert 0 < usage.loop <= launch.max_loop
    if dtype != torch.float32:
        assert re.search(PRODUCT, compiled.asm["ptx"]), "the product must use tensor cores"


@pytest.mark.parametrize(
    ("dtype", "capability"),
    [
        # Of the least shared memory.
        (torch.bfloat16, 86),
        *(slow(torch.bfloat16, capability) for capability in (90, 120)),
        slow(torch.float16, 86),
        *(slow(torch.float32, capability) for capability in (86, 120)),
    ],
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_mask_heads_pooling_fits_every_card(direction, dtype, capability, tmp_path):
    compiled, usage = compile_pooling(direction, dtype, POOL_SIZE, capability, tmp_path)
    assert usage.stack == 0
    assert usage.spills == 0
    assert compiled.metadata.shared <= SHARED_KIB[capability] * 1024


@pytest.mark.parametrize(("l1", "capability"), [slow(False, 80), (False, 90), (True, 90)])
@pytest.mark.parametrize("name", ["distance_forward_kernel", "distance_backward_kernel"])
def test_distances_fit_the_machine(name, l1, capability, tmp_path):
    settings = {"L1": l1, "BLOCK": 512, "num_warps": triton_distance.WARPS, "enable_fp_fusion": False}
    compiled = compile_kernel(getattr(triton_distance, name), settings, dtype=torch.bfloat16, capability=capability)
    usage = inspect(compiled, tmp_path)
    assert usage.registers <= triton_distance.MAX_REGISTERS
    assert usage.stack == 0


@pytest.mark.parametrize("capability", [slow(80), 90])
def test_lists_of_boxes_fit_the_machine(capability, tmp_path):
    tiles = triton_pool.listing_settings(make_pooling(torch.bfloat16, 7))
    maps = {"LEVELS": 4, "BLOCK": triton_pool.MAP_BOXES, "enable_fp_fusion": False}
    for kernel, settings in ((triton_pool.map_boxes_kernel, maps), (triton_pool.tile_boxes_kernel, tiles)):
        compiled = compile_kernel(kernel, settings, dtype=torch.float32, capability=capability)
        usage = inspect(compiled, tmp_path)
        assert usage.registers <= triton_pool.LIST_MAX_REGISTERS
        assert usage.stack == 0


@pytest.mark.parametrize(
    ("ones", "capability"),
    [slow((), 80), ((), 90), slow(("height",), 90), slow(("width",), 90), (("height", "width", "tiles"), 90)],
)
def test_crops_fit_the_machine(ones, capability, tmp_path):
    # Triton makes a constant of a number that is 1.
    settings = {"TILE": triton_crops.TILE, "CHUNK": triton_crops.CHUNK, "num_warps": triton_crops.WARPS}
    settings |= dict.fromkeys(ones, 1)
    compiled = compile_kernel(triton_crops.crops_kernel, settings, dtype=torch.bfloat16, capability=capability)
    usage = inspect(compiled, tmp_path)
    assert usage.registers <= triton_crops.MAX_REGISTERS
    assert usage.stack == 0
    assert compiled.metadata.shared <= triton_crops.MAX_SHARED
    assert re.search(PRODUCT, compiled.asm["ptx"]), "the product must use tensor cores"
