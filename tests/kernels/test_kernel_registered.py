"""The operators as torch sees them: one node each, for autograd, autocast, torch.compile and torch.export."""

import shutil
from dataclasses import replace

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.testing import assert_close

from ezsd import kernels
from ezsd.kernels import registered
from tests.kernels.kernel_problems import make_problem, run_align, run_loss

GRID = (0.25, 900.0, 2, 2)
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.fixture
def problem():
    return make_problem(regions=5, bins=2, channels=3, dim=4, levels=2)


def leaves(problem, *, form=torch.contiguous_format):
    maps = [feature.contiguous(memory_format=form).requires_grad_() for feature in problem.maps]
    return maps, problem.projection.requires_grad_(), problem.bias.requires_grad_()


@pytest.mark.parametrize("head", [True, False])
def test_operators_meet_torchs_own_checks(head):
    problem = make_problem(regions=5, bins=2 if head else 1, channels=4, dim=4, levels=2, head=head)
    check_operators(problem, backend="eager")


def check_operators(problem, *, backend):
    maps = [feature.requires_grad_() for feature in problem.maps]
    boxes, image_index, head = problem.boxes, problem.image_index, (problem.projection, problem.bias)
    grid = (*GRID[:2], problem.bins, 2)
    calls = [
        (registered._align, (maps, boxes, image_index, *grid, backend)),
        (registered._embed, (maps, boxes, image_index, None, None, *head, "cosine", *grid, backend)),
        (registered._cosine, (maps, boxes, image_index, problem.target, problem.weight, *head, "l1", *grid, backend)),
    ]
    if problem.projection is not None:
        some = (problem.target[-2:], problem.weight[-2:])
        calls.append((registered._embed, (maps, boxes, image_index, *some, *head, "l1", *grid, backend)))
    for operator, arguments in calls:
        # The remaining check, dispatch under aot_autograd, stumbles over lists of leaves; test_one_graph... stands in.
        torch.library.opcheck(operator, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("metric", ["cosine", "l1"])
def test_gradients_pass_finite_differences(problem, metric):
    maps, *head = leaves(problem)

    def loss(*leaves):
        arguments = (*problem.pooled()[1:], *leaves[-2:])
        constants = {"target": problem.target, "weight": problem.weight}
        return kernels.roi_align_cosine(list(leaves[:-2]), *arguments, **constants, metric=metric)

    assert torch.autograd.gradcheck(loss, (*maps, *head), fast_mode=True)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_wanted_gradients_are_computed(problem, wanted):
    full = run_loss(kernels.roi_align_cosine, problem)[1:]
    maps, projection, bias = leaves(problem)
    parts = [(maps, full[:2]), ([projection], full[2:3]), ([bias], full[3:])]
    for (tensors, _), keep in zip(parts, wanted, strict=True):
        for tensor in tensors:
            tensor.requires_grad_(keep)
    constants = {"target": problem.target, "weight": problem.weight}
    kernels.roi_align_cosine(*problem.pooled(), projection, bias, **constants).backward()
    for (tensors, expected), keep in zip(parts, wanted, strict=True):
        for tensor, gradient in zip(tensors, expected, strict=True):
            assert (tensor.grad is None) == (not keep)
            if keep:
                assert_close(tensor.grad, gradient)


def nodes(graph_module):
    return [str(node.target) for node in graph_module.graph.nodes if "ezsd" in str(node.target)]


def test_one_graph_holds_the_whole_loss(problem):
    seen = []

    def keep_graph(graph_module, _):
        seen.extend(nodes(graph_module))
        return make_boxed_func(graph_module.forward)

    problem = problem.to(torch.float32)
    expected = run_loss(kernels.roi_align_cosine, problem)
    aot = aot_autograd(fw_compiler=keep_graph, bw_compiler=keep_graph)
    compiled = torch.compile(kernels.roi_align_cosine, backend=aot, fullgraph=True)
    assert_close(run_loss(compiled, problem), expected)
    assert seen == [
        f"ezsd.{name}.default" for name in ("roi_align_cosine", "region_distances_backward", "regions_backward")
    ]


# torch 2.11's inductor itself uses what it deprecates.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
def test_compiled_pooling_and_loss_equal_the_plain_ones(problem):
    problem = problem.to(torch.float32)

    def both(*arguments):
        return torch.compile(kernels.roi_align, fullgraph=True)(*arguments) * 2

    assert_close(run_align(both, problem), run_align(lambda *arguments: kernels.roi_align(*arguments) * 2, problem))


def test_an_exported_program_holds_one_node_and_takes_any_number_of_boxes(problem):
    problem = problem.to(torch.float32)

    class Embed(torch.nn.Module):
        def forward(self, maps, boxes, image_index, projection, bias):
            return kernels.roi_embed(maps, boxes, image_index, problem.pooled()[-1], projection, bias)

    arguments = (list(problem.maps), problem.boxes, problem.image_index, problem.projection, problem.bias)
    regions = torch.export.Dim("regions", min=2)
    shapes = ([None, None], {0: regions}, {0: regions}, None, None)
    exported = torch.export.export(Embed(), arguments, dynamic_shapes=shapes)
    assert nodes(exported.graph_module) == ["ezsd.roi_embed_cosine.default"]
    more = make_problem(regions=9, bins=2, channels=3, dim=4, levels=2).to(torch.float32)
    arguments = (arguments[0], more.boxes, more.image_index, *arguments[3:])
    assert_close(exported.module()(*arguments), Embed()(*arguments))


def test_autocast_casts_the_products_operands_and_nothing_else(problem):
    problem = problem.to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run_loss(kernels.roi_align_cosine, problem)
    narrow = problem.to(torch.bfloat16)
    by_hand = replace(problem, maps=narrow.maps, projection=narrow.projection, bias=narrow.bias)
    expected = run_loss(kernels.roi_align_cosine, by_hand)
    assert [value.dtype for value in found] == [torch.float32] * len(found)
    assert_close(found, [value.float() for value in expected], rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run_align(kernels.roi_align, problem)[0].dtype == torch.bfloat16


def test_an_image_that_does_not_exist_is_named_inside_a_compiled_graph_too(problem):
    problem.image_index[1] = 2
    with pytest.raises(ValueError, match="spans 1 to 2, but the batch has 2 images"):
        torch.compile(kernels.roi_align, backend="aot_eager", fullgraph=True)(*problem.pooled())
