"""Re-normalisation touches LayerNorms and nothing else, and its result can be put back exactly."""

import math

import numpy as np
import open_clip
import pytest
import torch
from torch import nn

from ezsd.adapt import adaptation_loss, crop_accuracy, flatten, restore, tune_layer_norms
from ezsd.teacher.open_clip import OpenClipTeacher

NAMES = ("circle", "square", "bar")
OPTIONS = {"loss": "softmax_ce", "learning_rate": 3e-3, "weight_decay": 1e-4, "clip_norm": 1.0}


def toy_batch():
    """Crops whose brightness tells their class."""
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(12) % 3
    pixels = label[:, None, None, None] / 2 + 0.1 * torch.rand(12, 3, 16, 16, generator=generator)
    return pixels.clamp(0, 1), label


def tune(teacher, batches, *, vision_only=False, **changes):
    parameters = list(teacher.layer_norms(vision_only=vision_only).values())
    return list(tune_layer_norms(teacher, batches, NAMES, parameters, **(OPTIONS | changes)))


def copy_of(state):
    return {name: value.clone() for name, value in state.items()}


@pytest.mark.parametrize("vision_only", [False, True])
@pytest.mark.parametrize("loss", ["bce", "softmax_ce"])
def test_layer_norms_change_and_everything_else_stays_bit_identical(small_teacher, loss, vision_only):
    before = copy_of(small_teacher.model.state_dict())
    tune(small_teacher, [toy_batch()] * 2, loss=loss, vision_only=vision_only)
    after = small_teacher.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # open_clip names its LayerNorms ln_...; the teacher finds them by type.
    assert changed == {name for name in before if "ln_" in name and (name.startswith("visual.") or not vision_only)}


@pytest.mark.parametrize("loss", ["bce", "softmax_ce"])
def test_the_loss_goes_down_on_a_toy_problem(small_teacher, loss):
    losses = tune(small_teacher, [toy_batch()] * 25, loss=loss, learning_rate=1e-2)
    assert len(losses) == 25
    assert losses[-1] < 0.8 * losses[0]


def test_the_first_loss_is_that_of_the_untuned_teacher(small_teacher):
    pixels, label = toy_batch()
    logits = small_teacher.logit_scale * small_teacher.encode_image(pixels) @ small_teacher.encode_text(NAMES).T
    expected = nn.functional.cross_entropy(logits, label).item()
    assert tune(small_teacher, [(pixels, label)]) == [pytest.approx(expected, rel=1e-5)]


def test_gradients_are_limited(small_teacher):
    # AdamW forgives the scale of a gradient, but not one that drowns in its epsilon.
    before = copy_of(small_teacher.model.state_dict())
    tune(small_teacher, [toy_batch()], clip_norm=1e-12, weight_decay=0.0)
    moved = max((before[n] - v).abs().max().item() for n, v in small_teacher.model.state_dict().items())
    assert moved < 0.1 * OPTIONS["learning_rate"]


@pytest.mark.parametrize(("vision_only", "encoded"), [(True, 1), (False, 4)])
def test_names_are_embedded_again_only_where_that_changes_something(small_teacher, monkeypatch, vision_only, encoded):
    seen, real = [], small_teacher.encode_text
    monkeypatch.setattr(small_teacher, "encode_text", lambda names: seen.append(names) or real(names))
    tune(small_teacher, [toy_batch()] * 4, vision_only=vision_only)
    assert seen == [NAMES] * encoded


def test_parameters_are_frozen_again_afterwards(small_teacher):
    tune(small_teacher, [toy_batch()])
    assert not any(p.requires_grad for p in small_teacher.model.parameters())
    assert not small_teacher.encode_image(toy_batch()[0]).requires_grad


def test_parameters_are_frozen_again_when_the_batches_raise(small_teacher):
    def broken():
        yield toy_batch()
        raise OSError("unreadable image")

    with pytest.raises(OSError, match="unreadable image"):
        tune(small_teacher, broken())
    assert not any(p.requires_grad for p in small_teacher.model.parameters())


def test_parameters_are_frozen_again_when_the_caller_stops_early(small_teacher):
    parameters = list(small_teacher.layer_norms().values())
    steps = tune_layer_norms(small_teacher, [toy_batch()] * 5, NAMES, parameters, **OPTIONS)
    next(steps)
    assert any(p.requires_grad for p in small_teacher.model.parameters())
    steps.close()
    assert not any(p.requires_grad for p in small_teacher.model.parameters())


def test_tuning_is_reproducible(small_teacher):
    start = copy_of(small_teacher.model.state_dict())
    first = tune(small_teacher, [toy_batch()] * 3)
    small_teacher.model.load_state_dict(start)
    assert tune(small_teacher, [toy_batch()] * 3) == first


LOGITS, LABEL = torch.tensor([[2.0, -1.0], [0.5, 3.0], [1.0, 1.0]]), torch.tensor([0, 1, 0])


def softplus(x):
    return math.log1p(math.exp(x))


def test_bce_is_the_mean_over_crops_and_names():
    right, wrong = softplus(-2) + softplus(-3) + softplus(-1), softplus(-1) + softplus(0.5) + softplus(1)
    assert adaptation_loss(LOGITS, LABEL, loss="bce").item() == pytest.approx((right + wrong) / 6)


def test_softmax_ce_is_the_mean_over_crops():
    expected = (softplus(-3) + softplus(-2.5) + math.log(2)) / 3
    assert adaptation_loss(LOGITS, LABEL, loss="softmax_ce").item() == pytest.approx(expected)


def test_crop_accuracy_is_per_crop_and_in_order(small_teacher):
    pixels, _ = toy_batch()
    with torch.no_grad():
        guess = (small_teacher.encode_image(pixels) @ small_teacher.encode_text(NAMES).T).argmax(1)
    label = guess.clone()
    label[[2, 7]] = (guess[[2, 7]] + 1) % 3
    batches = [(pixels[:5], label[:5]), (pixels[5:], label[5:])]
    found = crop_accuracy(small_teacher, batches, NAMES)
    assert torch.nonzero(~found)[:, 0].tolist() == [2, 7]
    assert crop_accuracy(small_teacher, [], NAMES).shape == (0,)


def test_flattened_values_can_be_put_back(small_teacher):
    parameters = small_teacher.layer_norms()
    tune(small_teacher, [toy_batch()])
    tuned = copy_of(small_teacher.model.state_dict())
    values, table = flatten(parameters)
    assert values.dtype == np.float32
    assert len(values) == sum(p.numel() for p in parameters.values())
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.fill_(3)
    assert values.max() < 3
    restore(parameters, values, table)
    for name, value in small_teacher.model.state_dict().items():
        assert torch.equal(value, tuned[name])


def small_parameters(**shapes):
    return {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "other",
    [
        small_parameters(a=(2,), c=(3,)),
        small_parameters(a=(2,)),
        small_parameters(a=(2,), b=(2,)),
        small_parameters(b=(3,), a=(2,)),
        small_parameters(),
    ],
    ids=["another name", "one less", "another shape", "another order", "none"],
)
def test_restore_refuses_another_model_and_leaves_it_alone(other):
    values, table = flatten({name: nn.Parameter(p + 1) for name, p in small_parameters(a=(2,), b=(3,)).items()})
    with pytest.raises(ValueError, match="not this network's"):
        restore(other, values, table)
    assert all((p == 0).all() for p in other.values())


def test_a_teacher_without_layer_norms_flattens_to_nothing():
    values, table = flatten({})
    assert (values.shape, values.dtype, table) == ((0,), np.float32, [])
    restore({}, values, table)


def test_vit_b_32_has_the_methods_layer_norms():
    teacher = OpenClipTeacher.__new__(OpenClipTeacher)
    # Without memory for the other 151 million parameters.
    with torch.device("meta"):
        teacher.model = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32"))
    parameters = teacher.layer_norms()
    vision = teacher.layer_norms(vision_only=True)
    assert set(vision) == {name for name in parameters if name.startswith("visual.")}
    text = {name: p for name, p in parameters.items() if not name.startswith("visual.")}
    assert (len(vision), sum(p.numel() for p in vision.values())) == (2 * 26, 39_936)
    assert (len(text), sum(p.numel() for p in text.values())) == (2 * 25, 25_600)
