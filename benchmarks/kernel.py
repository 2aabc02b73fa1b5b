"""How fast are pooling, projection and cosine loss? `python benchmarks/kernel.py [--tag NAME]`.

On a GPU: A (torchvision and eager torch), B (A under torch.compile, at 216 boxes), C (a sparse product) and the Triton
operator; median of many with a cold L2, beside the floor measured in the same run. Without one: A, C and the CPU path
at small sizes on one thread, in CPU time; then only ratios to A are kept, because machines differ and are shared.

A variant is timed after its loss and gradients have agreed with float64; otherwise its row says how far off it is, and
no time. Rows go to results/kernel.jsonl.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import itertools
import math
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import driver
import torch
from kernel_variants import Problem, Variant, ours, sparse_product, torchvision_eager
from torch import Tensor

GATE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Largest relative error (norm of the difference over the norm) of the loss and of each gradient.

float32: sample positions are rounded at 1e-7 of some hundred cells, and sums have thousands of terms. bfloat16: a value
is rounded at 4e-3 at each of the four stages between the maps and their gradient.
"""
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
FLUSH_BYTES = 2 << 30
"""More than any GPU's L2 holds; clearing it takes long enough for the CPU to queue a variant's launches."""
NO_ROOM = "out of memory"
PASSES = ("forward", "forward+backward")
VARIANTS: dict[str, Variant] = {"A": torchvision_eager, "C": sparse_product, "ours": ours}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of a problem."""

    name: str
    images: int
    boxes: int
    """Per image."""
    sizes: tuple[tuple[int, int], ...]
    """Rows and columns of every map."""
    stride: int
    """Pixels per cell of the first map; the next ones double it."""
    channels: int
    bins: int
    dim: int
    dtype: torch.dtype
    canonical_size: int = 224

    def make(self, device: str) -> Problem:
        """Random maps and boxes of 4 % to 60 % of the image's side."""
        random = torch.Generator(device).manual_seed(0)
        options = {"device": device, "generator": random}
        count = self.images * self.boxes
        maps = [
            torch.randn(self.images, self.channels, *size, **options)
            .to(self.dtype, memory_format=torch.channels_last if device == "cuda" else torch.contiguous_format)
            .requires_grad_()
            for size in self.sizes
        ]
        extent = torch.tensor([self.sizes[0][1], self.sizes[0][0]], device=device) * self.stride
        side = (0.04 + 0.56 * torch.rand(count, 2, **options) ** 2) * extent
        corner = torch.rand(count, 2, **options) * (extent - side)
        width = self.channels * self.bins**2
        return Problem(
            maps=maps,
            scales=[1 / (self.stride << level) for level in range(len(maps))],
            boxes=torch.cat([corner, corner + side], 1),
            image_index=torch.arange(self.images, device=device).repeat_interleave(self.boxes),
            target=torch.randn(count, self.dim, **options).half(),
            weight=torch.rand(count, **options),
            projection=(torch.randn(self.dim, width, **options) / width**0.5).requires_grad_(),
            bias=(torch.randn(self.dim, **options) / 10).requires_grad_(),
            bins=self.bins,
            canonical_size=self.canonical_size,
            canonical_level=4,
        )

    def row(self) -> driver.Row:
        """The case in words and numbers."""
        return {
            "case": self.name,
            "images": self.images,
            "boxes_per_image": self.boxes,
            "maps": [list(size) for size in self.sizes],
            "C": self.channels,
            "P": self.bins,
            "D": self.dim,
            "dtype": NAMES[self.dtype],
        }


def gpu_cases() -> Iterator[Case]:
    """What is promised of a GPU: 16 images, an FPN at 800 x 1344 pixels and one map of stride 8."""
    pyramid = ((200, 336), (100, 168), (50, 84), (25, 42))
    for dtype, bins, boxes in itertools.product((torch.bfloat16, torch.float32), (7, 1), (216, 50, 1000)):
        common = {"images": 16, "boxes": boxes, "channels": 256, "bins": bins, "dim": 512, "dtype": dtype}
        yield Case(name="fpn", sizes=pyramid, stride=4, **common)
        yield Case(name="stride 8", sizes=pyramid[1:2], stride=8, **common)


def cpu_cases() -> Iterator[Case]:
    """The demo's training step (classified and distilled regions), and maps where taps beat products."""
    demo = {"images": 8, "sizes": ((16, 16), (8, 8)), "stride": 8, "channels": 64, "dtype": torch.float32, "dim": 128}
    yield Case(name="demo, classified", boxes=64, bins=5, canonical_size=48, **demo)
    yield Case(name="demo, distilled", boxes=14, bins=5, canonical_size=48, **demo)
    yield Case(name="demo, one bin", boxes=64, bins=1, canonical_size=48, **demo)
    large = {
        "images": 2,
        "sizes": ((100, 84), (50, 42)),
        "stride": 4,
        "channels": 32,
        "dtype": torch.float32,
        "dim": 64,
    }
    yield Case(name="large maps", boxes=50, bins=7, canonical_size=112, **large)


def gradients(variant: Variant, problem: Problem) -> list[Tensor]:
    """The loss and the gradients of all leaves."""
    loss = variant(problem)
    return [loss.detach(), *torch.autograd.grad(loss, problem.leaves)]


def worst_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest relative error over the loss and the gradients; NaN where one is."""
    wrong = torch.stack([(a.double() - b).norm() for a, b in zip(found, expected, strict=True)])
    size = torch.stack([b.norm() for b in expected])
    # A map without a box has a gradient of 0, and no error is none there too. torch's maximum passes NaN on.
    return float(torch.where(wrong == 0, 0, wrong / size).max())


def gated(case: Case, problem: Problem, variants: dict[str, Variant]) -> tuple[dict[str, Variant], list[dict]]:
    """The variants that agree with float64, and a row for each that does not, or does not fit in memory."""
    try:
        expected = gradients(torchvision_eager, problem.double())
    except torch.OutOfMemoryError:
        return {}, [{**case.row(), "variant": name, "gate": f"not timed: float64 is {NO_ROOM}"} for name in variants]
    passed, failed = {}, []
    for name, variant in variants.items():
        row = {**case.row(), "variant": name}
        try:
            error = worst_error(gradients(variant, problem), expected)
        except torch.OutOfMemoryError:
            failed.append({**row, "gate": NO_ROOM})
            continue
        if error <= GATE[case.dtype]:
            passed[name] = variant
        else:
            failed.append({**row, "gate": "failed", "error": error})
    return passed, failed


def steps(variant: Variant, problem: Problem) -> dict[str, Callable[[], object]]:
    """What is timed."""

    def forward() -> None:
        with torch.no_grad():
            variant(problem)

    return {PASSES[0]: forward, PASSES[1]: lambda: gradients(variant, problem)}


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """20 %, 50 % and 80 %."""
    cuts = statistics.quantiles(values, n=10)
    return cuts[1], statistics.median(values), cuts[7]


def cpu_seconds(call: Callable[[], object], _: int) -> float:
    """CPU time of a call, whatever the round."""
    return driver.timed(call)[1].cpu


def cpu_rows(case: Case, variants: dict[str, Variant], rounds: int) -> Iterator[driver.Row]:
    """Ratios to A in CPU time, the variants in turns; none where A has not passed."""
    problem = case.make("cpu")
    passed, failed = gated(case, problem, variants)
    yield from failed
    if "A" not in passed:
        return
    for name in PASSES:
        calls = {variant: partial(cpu_seconds, steps(function, problem)[name]) for variant, function in passed.items()}
        # The first round warms up.
        spent = {variant: values[1:] for variant, values in driver.in_turns(calls, range(rounds + 1)).items()}
        for variant, values in spent.items():
            ratios = quantiles([mine / base for mine, base in zip(values, spent["A"], strict=True)])
            named = dict(zip(("ratio_p20", "ratio_p50", "ratio_p80"), (round(r, 3) for r in ratios), strict=True))
            yield {**case.row(), "variant": variant, "pass": name, "device": "cpu", "rounds": rounds, **named}


def gpu_rows(case: Case, rounds: int, rates: Rates, variants: dict[str, Variant]) -> Iterator[driver.Row]:
    """Milliseconds, memory and traffic beside the floor."""
    problem = case.make("cuda")
    passed, failed = gated(case, problem, variants)
    yield from failed
    work = Work.of(case, problem)
    for variant, function in passed.items():
        for name, call in steps(function, problem).items():
            forward_only = name == PASSES[0]
            row = {**case.row(), "variant": variant, "pass": name}
            try:
                milliseconds, peak = [gpu_milliseconds(call) for _ in range(rounds + 3)][3:], peak_mib(call)
            except torch.OutOfMemoryError:
                yield {**row, "gate": NO_ROOM}
                continue
            low, middle, high = quantiles(milliseconds)
            floor = work.floor_ms(rates, forward_only=forward_only)
            flop = work.forward + (0 if forward_only else work.backward)
            yield {
                **row,
                "rounds": rounds,
                "ms_p20": round(low, 4),
                "ms_p50": round(middle, 4),
                "ms_p80": round(high, 4),
                "floor_ms": round(floor, 4),
                "times_floor": round(middle / floor, 2),
                "gb_per_s": round(work.bytes_ * (1 if forward_only else 2) / middle / 1e6, 1),
                "tflop_per_s": round(flop / middle / 1e9, 1),
                "peak_mib": round(peak, 1),
                "gradient_maps_mib": round(work.bytes_ / 2**20, 1),
                **rates.row(),
            }


def gpu_table(rounds: int) -> Iterator[driver.Row]:
    """All cases; B comes last, because compiling takes minutes."""
    rates = {dtype: Rates.measure(dtype) for dtype in NAMES}
    for case in gpu_cases():
        yield from gpu_rows(case, rounds, rates[case.dtype], VARIANTS)
    for case in gpu_cases():
        if case.boxes == 216:
            torch.compiler.reset()
            yield from gpu_rows(case, rounds, rates[case.dtype], {"B": torch.compile(torchvision_eager)})


def gpu_milliseconds(call: Callable[[], object]) -> float:
    """Time of one call on the device, with nothing of its input in the L2 cache."""
    torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda").zero_()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def peak_mib(call: Callable[[], object]) -> float:
    """Memory that a call needs beyond what lay there before, its results included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What this GPU reaches at best, measured now."""

    copy: float
    """Bytes read and written per second."""
    matmul: float
    """FLOP per second of a large product in the case's dtype."""

    @classmethod
    def measure(cls, dtype: torch.dtype) -> Rates:
        """Copy 1 GiB, multiply two 8192 x 8192 matrices; the best of 20."""
        source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
        target = torch.empty_like(source)
        matrix = torch.randn(8192, 8192, dtype=dtype, device="cuda")
        copy = min(gpu_milliseconds(lambda: target.copy_(source)) for _ in range(20))
        product = min(gpu_milliseconds(lambda: matrix @ matrix) for _ in range(20))
        return cls(copy=2 * 2**30 / copy * 1e3, matmul=2 * 8192**3 / product * 1e3)

    def row(self) -> driver.Row:
        """The rates beside a time, and where they were measured."""
        return {
            "copy_gb_per_s": round(self.copy / 1e9),
            "matmul_tflop_per_s": round(self.matmul / 1e12, 1),
            "device": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
        }


@dataclass(frozen=True, kw_only=True)
class Work:
    """What no implementation can avoid, after docs/kernel.md."""

    bytes_: int
    """Of all maps: read in the forward, written as gradients in the backward."""
    forward: float
    """FLOP of pooling and projection."""
    backward: float
    """FLOP of their gradients."""

    @classmethod
    def of(cls, case: Case, problem: Problem) -> Work:
        """Count cells under boxes, each box on its level."""
        area = (problem.boxes[:, 2:] - problem.boxes[:, :2]).prod(1)
        level = torch.floor(4 + torch.log2(area.sqrt() / case.canonical_size)) - math.log2(case.stride)
        stride = case.stride * 2.0 ** level.clamp(0, len(case.sizes) - 1)
        extent = (problem.boxes[:, 2:] - problem.boxes[:, :2]) / stride[:, None] + 1
        pooling = 2 * case.bins**2 * case.channels * float(extent.prod(1).sum())
        projection = 2 * len(area) * case.bins**2 * case.channels * case.dim
        bytes_ = sum(feature.nbytes for feature in problem.maps)
        return cls(bytes_=bytes_, forward=pooling + projection, backward=pooling + 2 * projection)

    def floor_ms(self, rates: Rates, *, forward_only: bool) -> float:
        """max(bytes / copy rate, FLOP / matmul rate), summed over the passes."""
        passes = [self.forward] if forward_only else [self.forward, self.backward]
        return 1e3 * sum(max(self.bytes_ / rates.copy, flop / rates.matmul) for flop in passes)


def show(row: driver.Row) -> str:
    """One line per row."""
    size = f"{row['case']:<17} {row['dtype']} {row['boxes_per_image']:>5} boxes P={row['P']} {row['variant']:<5}"
    if "error" in row:
        return f"{size} GATE FAILED: relative error {row['error']:.1e}"
    if "gate" in row:
        return f"{size} {row['gate']}"
    if "ratio_p50" in row:
        return f"{size} {row['pass']:<17} {row['ratio_p50']:7.3f} of A ({row['ratio_p20']} to {row['ratio_p80']})"
    return f"{size} {row['pass']:<17} {row['ms_p50']:8.3f} ms  {row['times_floor']:6.2f} x floor  {row['peak_mib']} MiB"


def measure(arguments: argparse.Namespace) -> Iterator[driver.Row]:
    """Rows of all cases; SystemExit at the end if the operator has failed a gate."""
    # What torch says of the sparse matrices of variant C.
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")
    # The gate's matrix products must not be rounded to tf32.
    torch.set_float32_matmul_precision("highest")
    if torch.cuda.is_available():
        found = gpu_table(arguments.rounds)
    else:
        print("No GPU: CPU variants at small sizes, one thread; figures are ratios of CPU time to A (torchvision).")
        torch.set_num_threads(1)
        found = (row for case in cpu_cases() for row in cpu_rows(case, VARIANTS, arguments.rounds))
    triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None
    failures = 0
    for row in found:
        yield {"tag": arguments.tag, "triton": triton, **row}
        # What does not fit in memory says nothing of the operator.
        failures += row.get("gate") == "failed" and row["variant"] == "ours"
    if failures:
        raise SystemExit(f"the operator failed {failures} gates and was not timed there")


if __name__ == "__main__":
    driver.run("kernel", measure, __doc__, "--tag", driver.option("--rounds", default=50), show=show)
