"""Run by test_kernel_triton.py in a process of its own: the kernels under Triton's interpreter, on CPU tensors.

The interpreter is a loop over numpy operations, hence float32 and tiny shapes.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from torch.testing import assert_close

from ezsd import kernels
from ezsd.kernels import crops, reference, triton_crops, triton_pool
from tests.kernels import kernel_problems
from tests.kernels.kernel_problems import run_align, run_embed, run_embed_cosine, run_loss
from tests.kernels.test_kernel_registered import check_operators

# Sums of a few hundred float32 terms of size one; sample positions are rounded to float32 as well.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}

# What NumPy before 2.4 says to the loops of Triton 3.6's interpreter; see `_interpreter_can_loop`.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")

make_problem = partial(kernel_problems.make_problem, sizes=kernel_problems.TINY)


@triton.jit
def counting_kernel(count, limit):
    for _ in range(tl.load(limit)):
        tl.store(count, tl.load(count) + 1)


@pytest.fixture(autouse=True, scope="session")
def _interpreter_can_loop():
    """Triton 3.6's interpreter cannot loop up to a loaded number under NumPy 2.4 and later; its compiler can."""
    count = torch.zeros(1, dtype=torch.int32)
    try:
        counting_kernel[(1,)](count, torch.full((1,), 3, dtype=torch.int32))
    except Exception as error:
        pytest.skip(f"this Triton's interpreter cannot run loops with this NumPy: {error}")
    assert count.item() == 3


@pytest.fixture(autouse=True)
def _outputs_begin_as_nan():
    """Deterministic mode fills every tensor that torch.empty makes with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def check(problem, **options):
    expected = run_loss(reference.roi_align_cosine, problem, **options)
    found = run_loss(kernels.roi_align_cosine, problem.to(torch.float32), backend="triton", **options)
    assert_close([value.double() for value in found], expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("bins", "channels", "levels"), [(1, 70, 1), pytest.param(5, 9, 2, marks=pytest.mark.slow), (7, 5, 4), (9, 5, 5)]
)
def test_pooling_equals_the_reference(bins, channels, levels):
    problem = make_problem(regions=5, bins=bins, channels=channels, levels=min(levels, 4))
    if levels == 5:
        coarsest = torch.ones(2, channels, 1, 1, dtype=torch.float64)
        problem = replace(problem, maps=(*problem.maps, coarsest), boxes=problem.boxes * 3)
    found = run_align(kernels.roi_align, problem.to(torch.float32), backend="triton")
    expected = run_align(reference.roi_align, problem)
    assert_close([value.double() for value in found], expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("bins", "channels", "dim", "levels", "metric"),
    [
        (1, 63, 9, 1, "cosine"),
        (5, 6, 63, 4, "cosine"),
        (1, 63, 9, 1, "l1"),
        pytest.param(5, 6, 63, 4, "l1", marks=pytest.mark.slow),
    ],
)
def test_loss_equals_the_reference(metric, bins, channels, dim, levels):
    check(make_problem(regions=5, bins=bins, channels=channels, dim=dim, levels=levels), metric=metric)


@pytest.mark.parametrize("regions", [0, 1])
def test_few_or_no_boxes(regions):
    check(make_problem(regions=regions, bins=5, levels=2))


def test_more_boxes_and_tiles_than_are_listed_at_a_time(monkeypatch):
    monkeypatch.setattr(triton_pool, "MAP_BOXES", 8)
    monkeypatch.setattr(triton_pool, "LIST_BOXES", 4)
    monkeypatch.setattr(triton_pool, "LIST_TILES", 2)
    check(make_problem(regions=14, bins=1, channels=5, sizes=((11, 19),)))


def test_an_image_without_boxes_gets_a_zero_gradient():
    problem = make_problem(regions=5, bins=2, channels=5, levels=2)
    problem.image_index.fill_(1)
    check(problem)


def test_channels_are_pooled_without_a_projection():
    check(make_problem(regions=7, bins=1, channels=17, head=False))


def test_weights_that_sum_to_zero():
    problem = make_problem(regions=5, bins=1, channels=5)
    problem.weight.zero_()
    check(problem)


def test_embeddings_equal_the_reference():
    problem = make_problem(regions=5, bins=2, channels=5, levels=2)
    expected = run_embed(reference.roi_embed, problem)
    found = run_embed(kernels.roi_embed, problem.to(torch.float32), backend="triton")
    assert_close([value.double() for value in found], expected, **TOLERANCE)


def test_boxes_that_are_embedded_and_boxes_that_are_compared_are_pooled_together():
    problem = make_problem(regions=5, bins=2, channels=5, levels=2)
    expected = run_embed_cosine(reference.roi_embed_cosine, problem)
    found = run_embed_cosine(kernels.roi_embed_cosine, problem.to(torch.float32), backend="triton")
    assert_close([value.double() for value in found], expected, **TOLERANCE)


def test_inputs_may_be_strided_views_and_targets_half():
    problem = make_problem(regions=5, bins=2, channels=5).to(torch.float32)
    target = problem.target.half()
    expected = run_loss(kernels.roi_align_cosine, replace(problem, target=target), backend="triton")
    strided = replace(
        problem,
        maps=tuple(torch.stack([feature, feature], dim=-1)[..., 0] for feature in problem.maps),
        boxes=problem.boxes.T.contiguous().T,
        target=target.T.contiguous().T,
        projection=problem.projection.T.contiguous().T,
    )
    # The projection's product may sum a transposed matrix in another order.
    assert_close(run_loss(kernels.roi_align_cosine, strided, backend="triton"), expected, **TOLERANCE)


def test_runs_are_bit_equal():
    problem = make_problem(regions=4, bins=1, channels=5).to(torch.float32)
    first = run_loss(kernels.roi_align_cosine, problem, backend="triton")
    for _ in range(2):
        assert_close(run_loss(kernels.roi_align_cosine, problem, backend="triton"), first, rtol=0, atol=0)


def test_nan_in_a_target_reaches_the_loss_and_the_gradient():
    for metric in ("cosine", "l1"):
        problem = make_problem(regions=2, bins=1, channels=5).to(torch.float32)
        problem.target[1, 0] = torch.nan
        loss, map_grad, *_ = run_loss(kernels.roi_align_cosine, problem, backend="triton", metric=metric)
        assert loss.isnan()
        assert map_grad.isnan().any()


@pytest.mark.parametrize("corner", [0, 3])
def test_a_box_of_nan_is_nan_and_adds_to_no_map(corner):
    problem = make_problem(regions=3, bins=2, channels=5, levels=2).to(torch.float32)
    others = replace(problem, boxes=problem.boxes[[0, 2]], image_index=problem.image_index[[0, 2]])
    problem.boxes[1, corner] = torch.nan
    pull = torch.randn(3, 5, 2, 2, generator=torch.Generator().manual_seed(1))
    found, expected = pulled(problem, pull), pulled(others, pull[[0, 2]])
    assert found[0][1].isnan().all()
    assert_close([found[0][[0, 2]], *found[1:]], expected, rtol=0, atol=0)
    loss, *gradients = run_loss(kernels.roi_align_cosine, problem, backend="triton")
    assert loss.isnan()
    assert gradients[-2].isnan().any(), "of the projection"


def pulled(problem, pull):
    """The pooled boxes, and the gradients of the sum of their products with `pull` with respect to the maps."""
    leaves = [feature.detach().requires_grad_() for feature in problem.maps]
    pooled = kernels.roi_align(*replace(problem, maps=tuple(leaves)).pooled(backend="triton"))
    return [pooled.detach(), *torch.autograd.grad(pooled, leaves, pull)]


def test_levels_without_a_box_get_a_zero_gradient():
    problem = make_problem(regions=5, bins=2, channels=5, levels=4)
    # Areas of at most a pixel all belong to the finest level.
    check(replace(problem, boxes=problem.boxes / 90))


def test_an_image_that_does_not_exist_is_nan_and_touches_no_map():
    problem = replace(
        make_problem(regions=3, bins=1, channels=5).to(torch.float32), image_index=torch.tensor([0, 2, -1])
    )
    pooled, feature_grad = run_align(kernels.roi_align, problem, backend="triton")
    assert pooled[0].isfinite().all()
    assert pooled[1:].isnan().all()
    assert feature_grad[1].count_nonzero() == 0


def test_operators_meet_torchs_own_checks():
    problem = make_problem(regions=3, bins=2, channels=3, levels=2).to(torch.float32)
    check_operators(problem, backend="triton")


def test_channels_last_maps_have_channels_last_gradients():
    problem = make_problem(regions=5, bins=2, channels=5).to(torch.float32)
    feature = problem.maps[0].contiguous(memory_format=torch.channels_last)
    last = run_align(kernels.roi_align, replace(problem, maps=(feature,)), backend="triton")
    assert last[1].is_contiguous(memory_format=torch.channels_last)
    assert_close(last, run_align(kernels.roi_align, problem, backend="triton"), rtol=0, atol=0)


def test_the_gradient_of_a_plain_sum_is_laid_out_first():
    problem = make_problem(regions=3, bins=2, channels=5).to(torch.float32)
    (feature,), *rest = problem.pooled(backend="triton")
    feature.requires_grad_()
    kernels.roi_align(feature, *rest).sum().backward()
    found, feature.grad = feature.grad, None
    reference.roi_align(feature, *rest).sum().backward()
    assert_close(found, feature.grad, **TOLERANCE)


@pytest.mark.parametrize(("size", "dtype"), [(24, torch.uint8), (40, torch.float32)])
def test_crops_equal_their_eager_twin(size, dtype):
    random = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 70, 90), dtype=torch.uint8, generator=random)
    image[:, :, 45:] = (image[:, :, 45:] > 127) * 255
    # Thin, tiny, as large as the crop, all of the image.
    windows = [(20, 11, 53, 41), (0, 0, 90, 70), (44, 5, 45, 66), (3, 30, 88, 31), (30, 30, 31, 31), (50, 20, 74, 44)]
    table, gain, shift = torch.tensor(windows, dtype=torch.int32), torch.rand(3), torch.rand(3)
    if dtype == torch.uint8:
        gain, shift = torch.ones(3), torch.zeros(3)
    found = triton_crops.crop(image, table, gain, shift, size, dtype)
    expected = crops.eager(image, table, gain, shift, size, dtype)
    # A sum on the border of two grey levels may fall to either side.
    difference = (found.float() - expected.float()).abs() / gain[:, None, None]
    assert difference.max() <= 1.001
    assert (difference > 0.01).float().mean() < 1e-3
