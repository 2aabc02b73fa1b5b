import importlib
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

# What torch says of the sparse matrices of variant C.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
]


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("kernel")


@pytest.fixture
def case(kernel):
    sizes = {"images": 2, "boxes": 5, "sizes": ((12, 9), (6, 5)), "stride": 8, "channels": 4, "bins": 2, "dim": 6}
    return kernel.Case(name="tiny", dtype=torch.float32, canonical_size=40, **sizes)


def test_every_variant_agrees_with_float64_and_is_timed(kernel, case):
    found = list(kernel.cpu_rows(case, kernel.VARIANTS, rounds=2))
    assert [(row["variant"], row["pass"]) for row in found] == [
        (v, p) for p in kernel.PASSES for v in ("A", "C", "ours")
    ]
    assert all(row["ratio_p50"] > 0 for row in found)


def test_a_wrong_variant_gets_no_time(kernel, case):
    variants = kernel.VARIANTS | {"wrong": lambda problem: kernel.ours(problem) * 1.001}
    wrong = [row for row in kernel.cpu_rows(case, variants, rounds=2) if row["variant"] == "wrong"]
    assert len(wrong) == 1
    assert wrong[0]["gate"] == "failed"
    assert "ratio_p50" not in wrong[0]


def test_the_floor_is_the_larger_of_traffic_and_products(kernel):
    work = kernel.Work(bytes_=1000, forward=4e6, backward=16e6)
    rates = kernel.Rates(copy=1e6, matmul=8e9)
    assert work.floor_ms(rates, forward_only=True) == pytest.approx(1.0)
    assert work.floor_ms(rates, forward_only=False) == pytest.approx(1.0 + 2.0)
