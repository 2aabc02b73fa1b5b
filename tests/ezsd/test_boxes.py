"""The box geometry agrees with hand-made cases, torchvision and its own inverses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import box_iou

from ezsd import boxes

WIDTH, HEIGHT = 64, 48


@st.composite
def box_sets(draw):
    """Up to five boxes inside the image, on quarter pixels so that float32 holds every sum."""
    rows = draw(st.lists(st.tuples(*[st.integers(0, 4 * HEIGHT - 1)] * 2, *[st.integers(1, 40)] * 2), max_size=5))
    quarters = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in rows], dtype=torch.float32).reshape(-1, 4)
    return quarters / 4


def test_clip_moves_corners_into_the_image():
    found = boxes.clip(torch.tensor([[-5.0, 2.0, 100.0, 60.0], [70.0, 50.0, 80.0, 55.0]]), WIDTH, HEIGHT)
    assert found.tolist() == [[0, 2, 64, 48], [64, 48, 64, 48]]


@given(a=box_sets(), b=box_sets())
def test_iou_agrees_with_torchvision(a, b):
    torch.testing.assert_close(boxes.iou(a, b), box_iou(a, b))


def test_iou_of_boxes_without_area_is_zero():
    point = torch.tensor([[5.0, 5.0, 5.0, 5.0]])
    assert boxes.iou(point, torch.cat([point, torch.tensor([[0.0, 0.0, 10.0, 10.0]])])).tolist() == [[0, 0]]


def test_iou_of_large_half_precision_boxes_does_not_overflow():
    large = torch.tensor([[0.0, 0.0, 1000.0, 800.0], [0.0, 0.0, 1000.0, 400.0]], dtype=torch.float16)
    found = boxes.iou(large, large)
    assert found.dtype == torch.float32
    assert found.tolist() == [[1, 0.5], [0.5, 1]]


@pytest.mark.parametrize(("floor", "expected"), [(0.5, [True, False, False]), (0.25, [True, True, False])])
def test_a_box_overlaps_any_from_the_floor_on(floor, expected):
    given_boxes = torch.tensor([[0, 0, 4, 2], [0, 0, 4, 1], [20, 20, 21, 21]]).float()
    others = torch.tensor([[8, 8, 9, 9], [0, 0, 4, 4]]).float()
    assert boxes.overlaps_any(given_boxes, others, iou_floor=floor).tolist() == expected
    assert boxes.overlaps_any(given_boxes, others[:0], iou_floor=floor).tolist() == [False] * 3


@given(box_sets())
def test_flipping_twice_is_identity_and_keeps_order(given_boxes):
    flipped = boxes.flip_horizontal(given_boxes, WIDTH)
    assert (flipped[:, 2:] > flipped[:, :2]).all()
    assert torch.equal(boxes.flip_horizontal(flipped, WIDTH), given_boxes)


def test_flip_mirrors_the_edges():
    assert boxes.flip_horizontal(torch.tensor([[0.0, 1.0, 10.0, 2.0]]), 64).tolist() == [[54, 1, 64, 2]]


def test_scale_follows_each_direction():
    assert boxes.scale(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), 2, 0.5).tolist() == [[2, 1, 6, 2]]


@pytest.mark.parametrize("factors", [(0, 1), (1, -1), (float("nan"), 1)])
def test_scale_refuses_factors_that_are_not_positive(factors):
    with pytest.raises(ValueError, match="must be > 0"):
        boxes.scale(torch.zeros(1, 4), *factors)


def test_no_boxes_are_fine_everywhere():
    none = torch.zeros(0, 4)
    for found in (boxes.clip(none, 1, 1), boxes.flip_horizontal(none, 1)):
        assert found.shape == (0, 4)
    assert boxes.iou(none, torch.ones(3, 4)).shape == (0, 3)
    assert boxes.scale(none, 2, 2).shape == (0, 4)
