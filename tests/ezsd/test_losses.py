"""The objective's parts: values by hand, inverses, and weights that only compare."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ezsd.losses import box_loss, classification_loss, decode_boxes, encode_boxes, region_weights, seesaw_logits

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


def seesaw(logits, label, counts):
    return classification_loss(seesaw_logits(logits, label, counts), label)


def seesaw_by_the_formulas(logits, label, counts):
    """Seesaw loss of the rows, as arXiv 2008.10032 states it, term by term."""
    base, losses = len(counts), []
    for z, i in zip(logits.double().tolist(), label.tolist(), strict=True):
        total = sum(math.exp(value) for value in z[:base])
        p = [math.exp(value) / total for value in z[:base]]
        denominator = 0.0
        for j, value in enumerate(z):
            weight = 1.0
            if j != i and i < base and j < base:
                n_i, n_j = max(counts[i].item(), 1), max(counts[j].item(), 1)
                mitigation = 1.0 if n_i <= n_j else (n_j / n_i) ** 0.8
                compensation = 1.0 if p[j] <= p[i] else max(1.0, p[j] / max(p[i], 0.01)) ** 2.0
                weight = mitigation * compensation
            denominator += weight * math.exp(value)
        losses.append(math.log(denominator) - z[i])
    return sum(losses) / len(losses)


@given(
    st.integers(1, 5),
    st.integers(0, 2),
    st.lists(st.tuples(st.integers(0, 5), st.lists(st.floats(-6, 6), min_size=8, max_size=8)), min_size=1, max_size=6),
    st.lists(st.sampled_from([0, 1, 3, 40, 2000]), min_size=5, max_size=5),
)
def test_seesaw_is_what_its_formulas_say(base, novel, rows, counts):
    logits = torch.tensor([values[: base + novel + 1] for _, values in rows])
    # Base classes, and background last.
    label = torch.tensor([number if number < base else base + novel for number, _ in rows])
    counts = torch.tensor(counts[:base])
    expected = seesaw_by_the_formulas(logits, label, counts)
    assert seesaw(logits, label, counts).item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_seesaw_protects_a_scarce_class_from_a_frequent_one_and_not_the_reverse():
    counts, even = torch.tensor([1000, 1]), torch.zeros(1, 3)
    # A thousandth to the power 0.8.
    assert seesaw(even, torch.tensor([0]), counts).item() == pytest.approx(math.log(1 + 0.0039811 + 1), rel=1e-5)
    assert seesaw(even, torch.tensor([1]), counts).item() == pytest.approx(math.log(3))


def test_seesaw_compensates_a_class_that_is_likelier_than_the_right_one():
    logits, counts = torch.tensor([[0.0, math.log(3), 0.0]]), torch.tensor([5, 5])
    assert seesaw(logits, torch.tensor([0]), counts).item() == pytest.approx(math.log(1 + 3 * 3**2 + 1))
    assert seesaw(logits, torch.tensor([1]), counts).item() == pytest.approx(math.log(5 / 3))
    # A probability of a millionth counts as a hundredth.
    far = torch.tensor([[0.0, math.log(1e6), -100.0]])
    assert seesaw(far, torch.tensor([0]), counts).item() == pytest.approx(math.log(1e6 * 100**2), rel=1e-4)


def test_seesaw_leaves_background_and_novel_names_alone():
    logits, counts = torch.randn(4, 6), torch.tensor([1, 900, 30])
    # Base, base, base, novel, novel, background: a region on background, and a novel name that is a label.
    label = torch.tensor([5, 3, 0, 1])
    found = seesaw_logits(logits, label, counts)
    assert torch.equal(found[:2], logits[:2])
    assert torch.equal(found[:, 3:], logits[:, 3:])
    assert not torch.equal(found[3, :3], logits[3, :3])


def test_seesaw_of_equal_numbers_and_right_guesses_is_cross_entropy():
    logits, label = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0]]), torch.tensor([0, 1])
    assert torch.equal(seesaw(logits, label, torch.zeros(2, dtype=torch.int64)), classification_loss(logits, label))


def test_no_gradient_flows_through_the_factors_of_seesaw():
    logits, label, counts = (
        torch.randn(5, 4, requires_grad=True),
        torch.tensor([0, 1, 2, 3, 0]),
        torch.tensor([9, 1, 4]),
    )
    added = (seesaw_logits(logits, label, counts) - logits).detach()
    (found,) = torch.autograd.grad(seesaw(logits, label, counts), logits)
    (expected,) = torch.autograd.grad(classification_loss(logits + added, label), logits)
    torch.testing.assert_close(found, expected)


def test_seesaw_of_nothing_is_zero():
    assert seesaw(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), torch.tensor([1, 2])).item() == 0


def test_box_loss_is_summed_over_coordinates_and_divided_by_all_sampled():
    deltas, target = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, -2.0]]), torch.zeros(2, 4)
    both = torch.tensor([True, True])
    assert box_loss(deltas, target, both, sampled=torch.tensor(8)).item() == pytest.approx(12 / 8)
    # Padding is not counted, whatever stands there.
    deltas, target = deltas.requires_grad_(), torch.tensor([[0.0, 0, 0, 0], [math.inf, math.nan, 0, 0]])
    loss = box_loss(deltas, target, torch.tensor([True, False]), sampled=torch.tensor(8))
    loss.backward()
    assert loss.item() == pytest.approx(10 / 8)
    assert deltas.grad.tolist() == [[1 / 8] * 4, [0] * 4]
    nothing = torch.zeros(0, 4)
    assert box_loss(nothing, nothing, both[:0], sampled=torch.tensor(0)).item() == 0


def test_classification_leaves_padding_out():
    logits, label = torch.tensor([[3.0, 1, 0], [0, 2, 1], [5, 5, 5]]), torch.tensor([0, 1, 2])
    counted = torch.tensor([True, True, False])
    assert classification_loss(logits, label, counted) == classification_loss(logits[:2], label[:2])


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
