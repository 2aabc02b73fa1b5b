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
