"""The cost model counts what it says it counts, and its page has its figures."""

import importlib
from pathlib import Path

import pytest
import torch

from ezsd.kernels import Pooling, roi_align_cosine, roi_embed

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cost(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("cost")


def test_the_page_has_the_tables_of_the_newest_count(cost):
    page = (ROOT / "docs/cost.md").read_text()
    for title, table in cost.tables(cost.driver.read("cost")[-1]).items():
        assert f"## {title}\n\n{table}\n" in page, f"docs/cost.md: copy {title!r} from benchmarks/cost.py"


def test_the_linear_layer_inside_a_fused_operator_is_counted_forwards_and_backwards(cost):
    channels, bins, dim, regions = 4, 2, 6, 5
    layer = torch.nn.Linear(channels * bins**2, dim)
    maps, boxes = torch.rand(1, channels, 9, 9, requires_grad=True), torch.tensor([[1.0, 1.0, 7.0, 8.0]] * regions)
    image, pooling = torch.zeros(regions, dtype=torch.int64), Pooling(spatial_scale=(1.0,), output_size=bins)
    target, weight = torch.rand(regions, dim), torch.ones(regions)
    with cost.counting(layer) as embed:
        roi_embed(maps, boxes, image, pooling, layer.weight, layer.bias).sum().backward()
    with cost.counting(layer) as distance:
        arguments = (maps, boxes, image, pooling, layer.weight, layer.bias)
        roi_align_cosine(*arguments, target=target, weight=weight, metric="l1").backward()
    # One product forwards; backwards one for the bins and one for the weight.
    once = 2 * regions * dim * channels * bins**2
    assert embed.gflop * 1e9 == pytest.approx(3 * once)
    assert distance.gflop * 1e9 == pytest.approx(3 * once)


def test_activations_that_the_backward_pass_needs_are_counted_without_weights(cost):
    layer = torch.nn.Linear(8, 16)
    rows = torch.rand(10, 8, requires_grad=True)
    with cost.counting(layer) as count:
        torch.tanh(layer(rows)).sum().backward()
    # The layer keeps its input, tanh its output.
    assert count.kept_gb * 1e9 == pytest.approx(4 * (10 * 8 + 10 * 16))


GPU = {"tflops": 100.0, "memory": 1.0, "link": 10.0}


def test_time_is_of_products_and_memory(cost):
    model = importlib.import_module("cost_model")
    assumed = model.Assumed(utilisation=0.5, memory=0.5)
    gpu = model.Gpu(**GPU)
    # 100 GFLOP at 50 TFLOP/s, and 1 GB of float32 in 16 bits twice at 0.5 TB/s.
    found = model.gpu_ms(gpu, assumed, gflop=100, kept_gb=1, passes=2)
    assert found == pytest.approx(2 + 2)


def test_what_the_host_does_is_hidden_or_adds_up(cost):
    model = importlib.import_module("cost_model")
    gpu, assumed = model.Gpu(**GPU), model.Assumed()
    size = {"crops": 1000, "gflop": 0.0, "kept_gb": 0.0}
    hidden, in_turn = (model.looking_ms(gpu, assumed, host, **size) for host in model.ENDS)
    assert hidden == pytest.approx((5 + 2) / 8)
    assert in_turn == pytest.approx(14 + 25 + 0.3)
    assert [host.beside(10, 8) for host in model.ENDS] == [10, 18]
    step = {"images": 16, "gflop": 0.0, "kept_gb": 0.0, "trained": 0.0, "pixels": 0}
    # Reading processes bound a step at either end.
    found = [model.training_ms(gpu, assumed, host, **step) for host in model.ENDS]
    assert found == pytest.approx([16 * 7 / 8, 16 * 8.7 / 4])
    link = model.tuning_ms(gpu, assumed, model.IN_TURN, crops=1, gflop=0, kept_gb=0, side=1000)
    assert link == pytest.approx(1.85 + 3 * 1e6 / 1e6)
