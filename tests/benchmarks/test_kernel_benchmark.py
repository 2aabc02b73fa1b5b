import argparse
import contextlib
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


def no_room(*_):
    raise torch.OutOfMemoryError


def test_nan_is_no_small_error(kernel):
    found, expected = [torch.ones(2), torch.full((2,), torch.nan), torch.ones(2)], [torch.ones(2).double()] * 3
    assert not kernel.worst_error(found, expected) <= 1e9


def test_without_a_right_a_there_are_no_ratios(kernel, case):
    variants = kernel.VARIANTS | {"A": lambda problem: kernel.ours(problem) * 1.001}
    assert [(row["variant"], row["gate"]) for row in kernel.cpu_rows(case, variants, rounds=2)] == [("A", "failed")]


def test_what_does_not_fit_in_memory_refuses_no_machine(kernel, case, monkeypatch):
    monkeypatch.setattr(kernel, "cpu_cases", lambda: [case])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(kernel.VARIANTS, "ours", no_room)
    arguments = argparse.Namespace(rounds=2, tag=None)
    rows = list(kernel.measure(arguments))
    assert [row["gate"] for row in rows if row["variant"] == "ours"] == ["out of memory"]
    monkeypatch.setattr(kernel, "torchvision_eager", no_room)
    rows = list(kernel.measure(arguments))
    assert [row["gate"] for row in rows] == ["not timed: float64 is out of memory"] * 3
    assert all("out of memory" in kernel.show(row) for row in rows)


def test_a_pass_that_does_not_fit_beside_the_timer_leaves_the_others(kernel, case, monkeypatch):
    def milliseconds(call):
        return no_room() if "lambda" in call.__qualname__ else 1.0

    make = kernel.Case.make
    monkeypatch.setattr(kernel.Case, "make", lambda self, device: make(self, "cpu"))
    monkeypatch.setattr(kernel, "gpu_milliseconds", milliseconds)
    monkeypatch.setattr(kernel, "peak_mib", lambda call: 1.0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    rates = kernel.Rates(copy=1e6, matmul=8e9)
    found = list(kernel.gpu_rows(case, 2, rates, {"ours": kernel.ours}))
    assert [(row["pass"], row.get("ms_p50"), row.get("gate")) for row in found] == [
        ("forward", 1.0, None),
        ("forward+backward", None, "out of memory"),
    ]


@pytest.mark.parametrize("wrong", ["C", "ours"])
def test_only_the_operators_own_gate_fails_the_benchmark(kernel, case, wrong, monkeypatch):
    right = kernel.VARIANTS[wrong]
    monkeypatch.setattr(kernel, "cpu_cases", lambda: [case])
    monkeypatch.setitem(kernel.VARIANTS, wrong, lambda problem: right(problem) * 1.001)
    with pytest.raises(SystemExit, match="failed 1 gates") if wrong == "ours" else contextlib.nullcontext():
        rows = list(kernel.measure(argparse.Namespace(tag=None, rounds=2)))
        assert [row["variant"] for row in rows if "gate" in row] == ["C"]


def test_the_floor_is_the_larger_of_traffic_and_products(kernel):
    work = kernel.Work(bytes_=1000, forward=4e6, backward=16e6)
    rates = kernel.Rates(copy=1e6, matmul=8e9)
    assert work.floor_ms(rates, forward_only=True) == pytest.approx(1.0)
    assert work.floor_ms(rates, forward_only=False) == pytest.approx(1.0 + 2.0)
