"""The objective's parts: values by hand, inverses, and weights that only compare."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ezsd.losses import box_loss, classification_loss, decode_boxes, encode_boxes, region_weights

coordinate = st.floats(-100, 1000, width=32)
# Growth beyond 62.5 times is cut off, see decode_boxes.
side = st.floats(4, 200, width=32)


@st.composite
def boxes(draw):
    x, y, w, h = draw(st.tuples(coordinate, coordinate, side, side))
    return [x, y, x + w, y + h]


@given(st.lists(st.tuples(boxes(), boxes()), min_size=1, max_size=5))
def test_decoding_inverts_encoding(pairs):
    reference, target = (torch.tensor(column) for column in zip(*pairs, strict=True))
    found = decode_boxes(reference, encode_boxes(reference, target))
    # Deltas are float32 multiples of the reference's side; far-away targets lose digits.
    torch.testing.assert_close(found, target, atol=0.02, rtol=1e-5)


def test_deltas_have_the_usual_meaning_and_scale():
    reference, target = torch.tensor([[10.0, 20.0, 30.0, 60.0]]), torch.tensor([[16.0, 20.0, 76.0, 100.0]])
    expected = [10 * 26 / 20, 10 * 20 / 40, 5 * math.log(3), 5 * math.log(2)]
    assert encode_boxes(reference, target)[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_zero_deltas_leave_boxes_alone():
    reference = torch.tensor([[10.0, 20.0, 30.0, 60.0], [0.0, 0.0, 1.0, 1.0]])
    assert torch.equal(encode_boxes(reference, reference), torch.zeros(2, 4))
    torch.testing.assert_close(decode_boxes(reference, torch.zeros(2, 4)), reference)


def test_growth_is_limited_and_finite():
    found = decode_boxes(torch.tensor([[0.0, 0.0, 16.0, 16.0]]), torch.tensor([[0.0, 0.0, 1e4, 1e4]]))
    assert found[0].tolist() == pytest.approx([-492, -492, 508, 508], rel=1e-4)


def test_half_precision_deltas_are_decoded_in_float32():
    reference = torch.tensor([[1000.0, 1000.0, 1016.0, 1016.0]])
    found = decode_boxes(reference, torch.zeros(1, 4, dtype=torch.bfloat16))
    assert torch.equal(found, reference)


def test_no_boxes_are_fine():
    none = torch.zeros(0, 4)
    assert encode_boxes(none, none).shape == (0, 4)
    assert decode_boxes(none, none).shape == (0, 4)


def test_classification_is_the_mean_cross_entropy_with_background_last():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    expected = (math.log(math.exp(2) + 2) - 2 + math.log(math.e + 2) - 1) / 2
    assert classification_loss(logits, torch.tensor([0, 2])).item() == pytest.approx(expected)


def test_novel_names_compete_where_their_logits_are_given():
    # Base, base, novel, background.
    logits = torch.tensor([[2.0, 0.0, 1.0, 0.0]])
    expected = math.log(math.exp(2) + 1 + math.e + 1) - 2
    assert classification_loss(logits, torch.tensor([0])).item() == pytest.approx(expected)


def test_classification_of_nothing_is_zero_with_zero_gradient():
    logits = torch.zeros(0, 3, requires_grad=True)
    loss = classification_loss(logits, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.shape == (0, 3)


def test_box_loss_is_summed_over_coordinates_and_divided_by_all_sampled():
    deltas, target = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, -2.0]]), torch.zeros(2, 4)
    assert box_loss(deltas, target, sampled=8).item() == pytest.approx(12 / 8)
    assert box_loss(torch.zeros(0, 4), torch.zeros(0, 4), sampled=0).item() == 0


@st.composite
def weighted_regions(draw):
    rows = draw(st.lists(st.tuples(st.integers(0, 3), st.floats(0.001953125, 1, width=32)), min_size=1, max_size=20))
    index, confidence = zip(*rows, strict=True)
    return torch.tensor(confidence), torch.tensor(index)


@given(weighted_regions())
def test_weights_have_mean_one_in_every_image(regions):
    confidence, index = regions
    weight = region_weights(confidence, index, images=4)
    assert weight.dtype == torch.float32
    for image in index.unique():
        assert weight[index == image].mean().item() == pytest.approx(1, rel=1e-4)


@given(weighted_regions(), st.tuples(*[st.floats(0.125, 8, width=32)] * 4))
def test_weights_ignore_a_factor_of_each_image(regions, factors):
    confidence, index = regions
    scaled = confidence * torch.tensor(factors)[index]
    torch.testing.assert_close(
        region_weights(scaled, index, images=4), region_weights(confidence, index, images=4), rtol=1e-4, atol=1e-6
    )


def test_weights_are_proportional_to_confidence():
    weight = region_weights(torch.tensor([1.0, 0.5, 0.25]), torch.tensor([0, 1, 1]), images=3)
    assert weight.tolist() == pytest.approx([1, 4 / 3, 2 / 3])


def test_no_regions_have_no_weights():
    assert region_weights(torch.zeros(0), torch.zeros(0, dtype=torch.int64), images=2).shape == (0,)
