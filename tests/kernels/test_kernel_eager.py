import importlib.util
import logging
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from ezsd import kernels
from ezsd.errors import BackendError
from ezsd.kernels import Pooling, reference
from ezsd.kernels import backend as backend_module
from tests.kernels.kernel_problems import (
    TINY,
    make_problem,
    run_align,
    run_embed,
    run_embed_cosine,
    run_loss,
    torchvision_align,
)

# float64: sums of a few hundred terms of size one. float32: the same, and sample positions rounded differently.
TOLERANCE = {torch.float64: {"rtol": 1e-11, "atol": 1e-11}, torch.float32: {"rtol": 1e-4, "atol": 1e-5}}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("regions", "bins", "levels"), [(0, 7, 1), (1, 5, 4), (7, 1, 1), (100, 7, 4)])
def test_pooling_equals_the_reference(dtype, regions, bins, levels):
    problem = make_problem(regions=regions, bins=bins, channels=63, levels=levels)
    expected = run_align(reference.roi_align, problem)
    found = run_align(kernels.roi_align, problem.to(dtype), backend="eager")
    assert all(value.dtype == dtype for value in found)
    assert_close([value.double() for value in found], expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("metric", ["cosine", "l1"])
@pytest.mark.parametrize(
    ("regions", "bins", "levels", "dim"), [(0, 5, 4, 9), (1, 7, 1, 63), (40, 5, 4, 63), (40, 1, 1, 9)]
)
def test_loss_equals_the_reference(metric, regions, bins, levels, dim):
    problem = make_problem(regions=regions, bins=bins, channels=10, dim=dim, levels=levels)
    expected = run_loss(reference.roi_align_cosine, problem, metric=metric)
    found = run_loss(kernels.roi_align_cosine, problem, metric=metric, backend="eager")
    assert_close(found, expected, **TOLERANCE[torch.float64])


def test_embeddings_equal_the_reference_in_the_order_of_the_boxes():
    problem = make_problem(regions=30, bins=5, levels=4)
    arguments = (*problem.pooled(), problem.projection, problem.bias)
    assert_close(kernels.roi_embed(*arguments), reference.roi_embed(*arguments), **TOLERANCE[torch.float64])
    assert_close(
        run_embed(kernels.roi_embed, problem), run_embed(reference.roi_embed, problem), **TOLERANCE[torch.float64]
    )


@pytest.mark.parametrize("targets", [1, 12, 30])
def test_boxes_that_are_embedded_and_boxes_that_are_compared_are_pooled_together(targets):
    problem = make_problem(regions=30, bins=5, levels=4)
    expected = run_embed_cosine(reference.roi_embed_cosine, problem, targets=targets)
    found = run_embed_cosine(kernels.roi_embed_cosine, problem, targets=targets)
    assert [len(one) for one in found[:2]] == [30 - targets, 30]
    assert_close(found, expected, **TOLERANCE[torch.float64])


def test_more_targets_than_boxes_are_refused():
    problem = make_problem(regions=3, bins=2)
    more = {"target": problem.target.repeat(2, 1), "weight": problem.weight.repeat(2)}
    with pytest.raises(ValueError, match="6 rows for the last of 3 boxes"):
        kernels.roi_embed_cosine(*problem.pooled(), problem.projection, problem.bias, **more)


def test_a_single_map_may_come_without_a_list():
    problem = make_problem(regions=9, bins=3)
    (feature,), *rest = problem.pooled()
    assert_close(kernels.roi_align(feature, *rest), kernels.roi_align([feature], *rest), rtol=0, atol=0)


def test_no_projection_means_the_pooled_channels():
    problem = make_problem(regions=12, bins=1, channels=8, levels=2, head=False)
    expected = run_loss(reference.roi_align_cosine, problem)
    assert_close(run_loss(kernels.roi_align_cosine, problem), expected, **TOLERANCE[torch.float64])


def test_inputs_may_be_strided_views():
    problem = make_problem(regions=12, bins=5, levels=2)
    expected = run_loss(kernels.roi_align_cosine, problem)
    for leaf in (*problem.maps, problem.boxes, problem.target, problem.projection):
        spread = torch.full((*leaf.shape[:-1], 2 * leaf.shape[-1]), torch.nan, dtype=leaf.dtype)
        spread[..., ::2] = leaf
        leaf.set_(spread[..., ::2])
        assert not leaf.is_contiguous()
    assert_close(run_loss(kernels.roi_align_cosine, problem), expected, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_maps_of_16_bits_are_summed_in_float32(dtype):
    problem = make_problem(regions=12, bins=5, levels=2).to(torch.float32)
    maps = tuple(feature.to(dtype) for feature in problem.maps)
    narrow = run_loss(kernels.roi_align_cosine, problem.__class__(**{**vars(problem), "maps": maps}))
    wide = run_loss(
        kernels.roi_align_cosine, problem.__class__(**{**vars(problem), "maps": tuple(m.float() for m in maps)})
    )
    assert narrow[0].dtype == torch.float32
    assert_close(narrow[0], wide[0])
    assert_close(narrow[1], wide[1].to(dtype))


def test_levels_and_images_without_a_box_get_zero_gradients():
    problem = make_problem(regions=12, bins=5, levels=4)
    # Areas of at most a pixel all belong to the finest level.
    problem = replace(problem, boxes=problem.boxes / 90, image_index=torch.ones_like(problem.image_index))
    expected = run_loss(reference.roi_align_cosine, problem)
    found = run_loss(kernels.roi_align_cosine, problem)
    assert_close(found, expected, **TOLERANCE[torch.float64])
    assert found[1][0].count_nonzero() == 0
    assert all(gradient.count_nonzero() == 0 for gradient in found[2:5])


def test_twenty_thousand_boxes():
    problem = make_problem(regions=20_000, bins=1, channels=2, levels=2, sizes=TINY)
    expected = run_loss(reference.roi_align_cosine, problem)
    assert_close(run_loss(kernels.roi_align_cosine, problem), expected, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("metric", ["cosine", "l1"])
def test_zero_rows_count_with_their_weight_and_pull_nothing(metric):
    problem = make_problem(regions=7, bins=1, channels=5, head=False)
    # Box 3 lies outside, so its embedding is zero; target 4 is zero; box 2 weighs nothing.
    expected = run_loss(reference.roi_align_cosine, problem, metric=metric)
    assert_close(run_loss(kernels.roi_align_cosine, problem, metric=metric), expected, **TOLERANCE[torch.float64])
    problem.weight.zero_()
    for value in run_loss(kernels.roi_align_cosine, problem, metric=metric):
        assert value.count_nonzero() == 0


def test_a_box_without_numbers_spoils_its_own_row_alone():
    problem = make_problem(regions=3, bins=2, levels=2)
    whole = run_align(kernels.roi_align, problem)[0]
    problem.boxes[1, 2] = torch.nan
    pooled = run_align(kernels.roi_align, problem)[0]
    assert pooled[1].isnan().all()
    assert_close(pooled[::2], whole[::2], rtol=0, atol=0)


def test_ten_runs_are_bit_equal():
    problem = make_problem(regions=50, bins=5, levels=4).to(torch.float32)
    first = run_loss(kernels.roi_align_cosine, problem)
    for _ in range(9):
        assert_close(run_loss(kernels.roi_align_cosine, problem), first, rtol=0, atol=0)


def test_half_precision_targets_are_normalised_inside():
    problem = make_problem(regions=12, bins=1).to(torch.float32)
    half = problem.__class__(**{**vars(problem), "target": (problem.target * 3).half()})
    assert_close(
        run_loss(kernels.roi_align_cosine, half)[0], run_loss(kernels.roi_align_cosine, problem)[0], rtol=1e-3, atol=0
    )


def call(**changes):
    problem = make_problem(regions=3, bins=2, channels=4, dim=5).to(torch.float32)
    features, boxes, image_index, pooling = problem.pooled()
    options = {name: changes.pop(name) for name in Pooling.__dataclass_fields__ if name in changes}
    arguments = {"features": features, "boxes": boxes, "image_index": image_index, "target": problem.target}
    arguments |= {"weight": problem.weight, "projection": problem.projection, "bias": problem.bias}
    return kernels.roi_align_cosine(**(arguments | changes), pooling=replace(pooling, **options))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": []}, "expected 1 feature maps, one per spatial scale, got 0"),
        ({"spatial_scale": ()}, "at least one level"),
        ({"features": torch.zeros(2, 4, 8)}, r"level 0: expected a floating map \(B, C, H, W\)"),
        ({"features": torch.zeros(2, 4, 0, 8)}, "no cells"),
        ({"features": [torch.zeros(2, 4, 8, 8), torch.zeros(2, 3, 4, 4)], "spatial_scale": (0.5, 0.25)}, "level 1"),
        ({"features": [torch.zeros(2, 4, 8, 8)] * 2, "spatial_scale": (0.5,)}, "expected 1 feature maps"),
        ({"features": [torch.zeros(2, 4, 8, 8)] * 2, "spatial_scale": (0.5, 0.2)}, "half of the one before"),
        ({"spatial_scale": (0.0,)}, "spatial_scale must be > 0"),
        ({"output_size": 0}, "output_size must be >= 1"),
        ({"sampling_ratio": 0}, "sampling_ratio must be >= 1"),
        ({"canonical_size": 0}, "canonical_size must be > 0"),
        ({"boxes": torch.zeros(3, 5)}, r"boxes must be floating \(R, 4\)"),
        ({"boxes": torch.zeros(3, 4, dtype=torch.int64)}, r"boxes must be floating \(R, 4\)"),
        ({"image_index": torch.zeros(3)}, "image_index must be int64"),
        ({"image_index": torch.tensor([0, 2, 0])}, "spans 0 to 2, but the batch has 2 images"),
        ({"projection": torch.zeros(5, 4)}, r"projection must be \(D, 16\)"),
        ({"projection": None}, "needs a projection"),
        ({"projection": None, "output_size": 1}, "a bias needs a projection"),
        ({"bias": torch.zeros(4)}, r"bias must be torch.float32 \(5,\)"),
        ({"target": torch.zeros(3, 4)}, r"target must be floating \(3, 5\)"),
        ({"weight": torch.zeros(2)}, r"weight must be floating \(3,\)"),
        ({"metric": "l2"}, "metric must be one of cosine, l1"),
        ({"backend": "cuda"}, "backend must be one of auto, eager, triton"),
    ],
)
def test_a_wrong_argument_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_triton_on_a_cpu_is_an_error_unless_interpreted(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match="cannot run here"):
        call(backend="triton")


def test_everything_but_triton_works_without_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert call().isfinite()
    with pytest.raises(BackendError, match="triton is not installed"):
        call(backend="triton")


def test_float64_deep_pyramids_and_many_bins_are_left_to_eager(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert "float64" in backend_module.triton_obstacle((torch.zeros(1, 1, 1, 1, dtype=torch.float64),), bins=7)
    assert "6 levels" in backend_module.triton_obstacle((torch.zeros(1, 1, 1, 1),) * 6, bins=7)
    assert "17 bins" in backend_module.triton_obstacle((torch.zeros(1, 1, 1, 1),), bins=17)
    assert backend_module.triton_obstacle((torch.zeros(1, 1, 1, 1),), bins=16) is None


def test_auto_says_once_what_it_took(caplog):
    backend_module._announce.cache_clear()
    with caplog.at_level(logging.DEBUG, logger="ezsd.kernels"):
        call()
        call()
    assert [record.message.split(",")[0] for record in caplog.records] == ["RoI operators: backend auto took eager"]


def test_canonical_arguments_are_torchvisions_by_default():
    problem = make_problem(regions=20, bins=1, levels=4)
    *regions, pooling = problem.pooled(canonical_size=224, canonical_level=4)
    plain = Pooling(spatial_scale=pooling.spatial_scale, output_size=1)
    assert_close(kernels.roi_align(*regions, plain), kernels.roi_align(*regions, pooling), rtol=0, atol=0)
    assert_close(kernels.roi_align(*regions, plain), torchvision_align(*regions, pooling), **TOLERANCE[torch.float64])
