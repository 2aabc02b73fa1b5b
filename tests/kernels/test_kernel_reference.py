import pytest
import torch
from torch.testing import assert_close

from ezsd.kernels import Pooling, reference
from ezsd.kernels.distance import FUSED, mean_distance
from tests.kernels.kernel_problems import make_problem, run_align, run_loss, torchvision_align, torchvision_loss

# Both sides sum a few hundred terms of size one in float64.
EXACT = {"rtol": 1e-11, "atol": 1e-11}


@pytest.mark.parametrize("levels", [1, 4])
@pytest.mark.parametrize(("bins", "regions"), [(1, 7), (5, 1), (7, 0), (7, 100)])
def test_pooling_equals_torchvision_forward_and_backward(bins, regions, levels):
    problem = make_problem(regions=regions, bins=bins, channels=5, levels=levels)
    assert_close(run_align(reference.roi_align, problem), run_align(torchvision_align, problem), **EXACT)


@pytest.mark.parametrize("metric", ["cosine", "l1"])
@pytest.mark.parametrize(("levels", "bins"), [(1, 1), (4, 5)])
def test_loss_equals_torchvision_forward_and_backward(metric, levels, bins):
    problem = make_problem(regions=20, bins=bins, channels=6, levels=levels)
    expected = run_loss(torchvision_loss, problem, metric=metric)
    assert_close(run_loss(reference.roi_align_cosine, problem, metric=metric), expected, **EXACT)


def test_embeddings_are_unit_or_zero():
    problem = make_problem(regions=7, bins=1, channels=5, head=False)
    length = reference.roi_embed(*problem.pooled()).norm(dim=1)
    # Box 3 lies wholly outside the image and there is no bias.
    assert_close(length, torch.tensor([1, 1, 1, 0, 1, 1, 1], dtype=torch.float64))


@pytest.mark.parametrize("metric", ["cosine", "l1"])
def test_gradients_agree_with_finite_differences(metric):
    problem = make_problem(regions=5, bins=2, channels=2, dim=3, levels=2, seed=3)
    _, boxes, image_index, pooling = problem.pooled(canonical_size=8)
    corners = tuple(feature[..., :4, :3].contiguous() for feature in problem.maps)
    leaves = [leaf.requires_grad_() for leaf in (*corners, problem.projection, problem.bias)]

    def loss(*leaves):
        regions = (list(leaves[:2]), boxes * 0.3, image_index, pooling)
        constants = {"target": problem.target, "weight": problem.weight}
        return reference.roi_align_cosine(*regions, *leaves[2:], **constants, metric=metric)

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("metric", ["cosine", "l1"])
def test_zero_rows_count_with_their_weight_and_pull_nothing(metric):
    embedding = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0]], requires_grad=True)
    target = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]])
    loss = mean_distance(embedding, target, torch.ones(3), FUSED[metric])
    assert_close(loss.item(), (1.0 if metric == "cosine" else 2.0) / 3)
    loss.backward()
    assert embedding.grad[:2].count_nonzero() == 0
    assert embedding.grad[2].count_nonzero() > 0


def test_weights_that_sum_to_zero_give_zero_and_no_gradient():
    problem = make_problem(regions=6, bins=1)
    problem.weight.zero_()
    for value in run_loss(reference.roi_align_cosine, problem):
        assert value.count_nonzero() == 0


def test_nan_is_passed_on():
    rows = torch.full((1, 3), torch.nan), torch.ones(1, 3), torch.ones(1)
    assert mean_distance(*rows, FUSED["cosine"]).isnan()


def test_level_changes_exactly_at_the_canonical_powers_of_two():
    maps = [torch.zeros(1, 1, 8, 8)] * 4
    pooling = Pooling(spatial_scale=(1 / 4, 1 / 8, 1 / 16, 1 / 32)).bind(maps)
    sides = torch.tensor([1.0, 111.9, 112.0, 223.9, 224.0, 447.9, 448.0, 5000.0, -3.0, torch.nan])
    boxes = torch.stack([torch.zeros_like(sides), torch.zeros_like(sides), sides, sides.abs()], dim=1)
    assert pooling.level_of(boxes).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 0, 0]
