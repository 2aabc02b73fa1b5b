"""One optimiser step: equal weights pull equally hard, the temperature learns, the rate follows the images."""

import dataclasses
import math
import shutil

import pytest
import torch
import torch.nn.functional as F

from ezsd import losses
from ezsd.cache import Store
from ezsd.detector.heads import FastHead, PaperHead
from ezsd.kernels import Pooling
from ezsd.losses import REFERENCE_COSINE, DistillationMetric, distillation_scale, loss_weights, weighted_sum
from ezsd.pipeline.config.schema import from_tables, load_preset, preset_names
from ezsd.pipeline.errors import RunError
from ezsd.pipeline.files import write_json
from ezsd.pipeline.inference.predictor import load_trained
from ezsd.pipeline.runs.model import build_detector
from ezsd.pipeline.runs.run import Run
from ezsd.pipeline.training.dataloader import load_batches
from ezsd.pipeline.training.distributed import Distributed
from ezsd.pipeline.training.train import TrainRequest, build_trainer, train, training_samples
from ezsd.pipeline.training.trainer import (
    AverageWeights,
    learning_rate,
    peak_rate,
)

BOUND = torch.tensor(math.log(100.0))
NAME = "head.classifier.log_temperature"
HEADS = {"fast": FastHead, "paper": PaperHead}
HEAD_NAMES = {kind: name for name, kind in HEADS.items()}


def pair(dim, cosine, generator):
    """A student's and a teacher's unit row (1, D) with a cosine between them."""
    student, other = F.normalize(torch.randn(2, dim, generator=generator, dtype=torch.float64), dim=1)
    across = F.normalize(other - (other @ student) * student, dim=0)
    return student[None].float(), (cosine * student + math.sqrt(1 - cosine**2) * across)[None].float()


def pull(preset, dim, cosine=REFERENCE_COSINE, draws=30):
    """Mean norm of what the weighed distillation of a preset's own head sends back to the embedding before unit length.

    Maps of zeros: an embedding is then the projection's bias, and the bias' gradient is the embedding's.
    """
    model = preset.model
    pooling = Pooling(spatial_scale=(1 / 8,), output_size=2, backend=preset.train.backend)
    head = HEADS[model.head](pooling, 4, dim, depth=1, hidden=8, semantic=False, temperature=model.logit_scale)
    generator, norms = torch.Generator().manual_seed(0), []
    boxes, index, weight = torch.tensor([[8.0, 8, 40, 40]]), torch.zeros(1, dtype=torch.int64), torch.ones(1)
    for _ in range(draws):
        student, teacher = pair(dim, cosine, generator)
        head.projection.bias.data.copy_(student[0])
        head.zero_grad()
        maps = head.features([torch.zeros(1, 4, 8, 8)])
        embedding = head.embed(maps, boxes, index).embedding
        distance = losses.distillation_loss(embedding, teacher, weight, preset.loss.metric)
        weighted_sum({"distillation": distance}, loss_weights(preset.loss, dim)).backward()
        norms.append(head.projection.bias.grad.norm().item())
    return sum(norms) / len(norms)


def euclidean(student, teacher):
    return (student - teacher).square().sum(1).sqrt()


@pytest.mark.parametrize("kind", [FastHead, PaperHead])
def test_a_metric_is_one_function_in_the_table_of_the_losses(kind, monkeypatch):
    # At cosine c the distance is sqrt(2 - 2 c) and its gradient across the student has the norm sqrt((1 + c) / 2).
    added = DistillationMetric(euclidean, lambda cosine, _: (1 + cosine) / 2)
    monkeypatch.setattr(losses, "METRICS", losses.METRICS | {"euclidean": added})
    preset = load_preset("shapes")
    loss = dataclasses.replace(preset.loss, distillation=1.0, metric="euclidean")
    named = dataclasses.replace(preset, loss=loss, model=dataclasses.replace(preset.model, head=HEAD_NAMES[kind]))
    by_hand = math.sqrt((1 - (1 - REFERENCE_COSINE) / math.pi) * 64)
    assert pull(named, 64, draws=3) == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.parametrize("dim", [64, 512])
def test_presets_of_equal_weight_distil_equally_hard(dim):
    pulls = {}
    for name in preset_names():
        preset = load_preset(name)
        pulls[name] = pull(preset, dim) / preset.loss.distillation
    assert load_preset("coco").loss.distillation == load_preset("paper").loss.distillation == 1
    assert {load_preset(name).loss.metric for name in pulls} == {"cosine", "l1"}
    # The rows are random: L1's norm is met to a few per cent in 64 dimensions.
    assert max(pulls.values()) <= 1.05 * min(pulls.values()), pulls


def test_an_l1_distance_keeps_its_weight_and_a_cosine_gets_its_factor():
    shapes, coco = load_preset("shapes").loss, load_preset("coco").loss
    assert loss_weights(shapes, 64)["distillation"] == 0.45
    assert distillation_scale("cosine", 512) == pytest.approx(30.1, abs=0.05)
    assert loss_weights(coco, 512)["distillation"] == distillation_scale("cosine", 512)
    part = torch.tensor(0.3, requires_grad=True)
    others = {name: torch.tensor(float(k)) for k, name in enumerate(("classification", "box", "rpn_box"))}
    weighed = weighted_sum(
        {"distillation": part, **others}, loss_weights(dataclasses.replace(coco, distillation=0.5), 64)
    )
    assert weighed.item() == pytest.approx(0.5 * 10.6535 * 0.3 + 0 + 1 + 2, rel=1e-4)


@pytest.fixture
def trained_on(shapes_store, shapes_dataset, with_settings):
    """A trainer whose temperature starts as told, and the batches of its steps."""

    def make(temperature, **changes):
        config = with_settings(model={"logit_scale": temperature}, train={"warmup_steps": 0, "steps": 60} | changes)
        store = Store(shapes_store)
        torch.manual_seed(0)
        detector = build_detector(config, store.embed_dim, None).train()
        base = len(shapes_dataset.split.base)
        trainer = build_trainer(detector, config, torch.from_numpy(store.text[1].copy()), base, Distributed())
        samples = training_samples(store, shapes_dataset, config.train)
        return trainer, (parts for _, parts in load_batches(samples, config.train, first_step=0))

    return make


def temperature(trainer):
    return trainer.detector.head.classifier.log_temperature


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_the_temperature_comes_down_from_the_bound(trained_on, optimiser):
    trainer, batches = trained_on(100.0, optimizer=optimiser, learning_rate=1e-2)
    assert temperature(trainer) == BOUND
    values = []
    for step in range(4):
        trainer.step(next(batches), step)
        values.append(temperature(trainer).item())
    assert values[0] < BOUND
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_a_temperature_that_crosses_the_bound_is_set_back_and_not_caught(trained_on, optimiser):
    trainer, batches = trained_on(99.5, optimizer=optimiser, learning_rate=1e-2, ema_decay=0.9)
    backward = trainer._backward

    def pushed_up(batch, totals):
        found = backward(batch, totals)
        temperature(trainer).grad.fill_(-50.0)
        return found

    trainer._backward = pushed_up
    trainer.step(next(batches), 0)
    assert temperature(trainer) == BOUND
    assert trainer.average.state[NAME] <= BOUND
    trainer._backward = backward
    for step in range(1, 25):
        trainer.step(next(batches), step)
        assert temperature(trainer) <= BOUND
    assert temperature(trainer) < BOUND - 1e-3


def test_an_average_from_beyond_the_bound_is_used_at_the_bound(trained_on):
    trainer, _ = trained_on(100.0, ema_decay=0.9)
    earlier = AverageWeights(trainer.detector, 0.9)
    earlier.state[NAME].fill_(math.log(500))
    trainer.average.restore(earlier.state)
    trainer.detector.load_state_dict(trainer.average.state)
    assert temperature(trainer) == BOUND


def test_a_run_learns_its_temperature_from_the_bound_and_resumes_with_it(shapes_store, with_settings, tmp_path):
    config = with_settings(model={"logit_scale": 100.0}, train={"steps": 4, "checkpoint_every": 2})
    whole = train(TrainRequest(cache=shapes_store, run=tmp_path / "whole", config=config)).finished().trained()
    assert whole[NAME] < BOUND
    run = Run.open(tmp_path / "whole")
    shutil.rmtree(run.folder / "checkpoints/step-00000004")
    again = train(TrainRequest(cache=shapes_store, run=run.folder, config=config)).finished().trained()
    assert torch.equal(again[NAME], whole[NAME])


def as_earlier(run):
    """The run as an earlier version left it, whose spec says nothing of what settings come to."""
    spec = run.spec
    del spec["in_effect"]
    write_json(run.folder / "run.json", spec)


def stopped_at_two(run, steps):
    """The run as if it had been stopped after step 2."""
    shutil.rmtree(run.folder / f"checkpoints/step-{steps:08d}")


@pytest.mark.parametrize("cut", [False, True], ids=["finished", "stopped"])
def test_an_earlier_run_with_a_cosine_is_not_gone_on_with_at_another_strength(
    shapes_store, with_settings, tmp_path, cut
):
    config = with_settings(
        loss={"metric": "cosine", "distillation": 0.5}, train={"steps": 4, "reference_batch_size": 4}
    )
    request = TrainRequest(cache=shapes_store, run=tmp_path / "run", config=config)
    run = train(request)
    as_earlier(run)
    # A finished one can be looked through all the same.
    assert load_trained(run, "cpu").config == from_tables(run.spec["config"], where="spec")
    if cut:
        stopped_at_two(run, 4)
    said = (
        r"earlier version .* otherwise: in_effect.distillation_weight: 0.5 there, 7.53\d* wanted; choose another `run`"
    )
    with pytest.raises(RunError, match=said) as caught:
        train(request)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("loss", "loop"),
    [
        ({}, {"reference_batch_size": 0}),
        ({"metric": "cosine", "distillation": 0.0}, {"reference_batch_size": 0}),
        ({}, {}),
    ],
    ids=["l1", "no distillation", "rate for the images"],
)
def test_an_earlier_run_whose_settings_come_to_the_same_goes_on(shapes_store, with_settings, tmp_path, loss, loop):
    own = with_settings(loss=loss, train={"steps": 4, "reference_batch_size": 4} | loop)
    now = with_settings(loss=loss, train={"steps": 4, "reference_batch_size": 4})
    run = train(TrainRequest(cache=shapes_store, run=tmp_path / "run", config=own))
    as_earlier(run)
    stopped_at_two(run, 4)
    assert train(TrainRequest(cache=shapes_store, run=run.folder, config=now)).finished().step == 4


@pytest.mark.parametrize(("optimiser", "factor"), [("sgd", 4.0), ("adamw", 2.0)])
def test_the_rate_follows_the_images_by_the_optimisers_rule(with_settings, optimiser, factor):
    loop = {
        "learning_rate": 0.01,
        "reference_batch_size": 2,
        "batch_size": 2,
        "optimizer": optimiser,
        "warmup_steps": 0,
    }
    assert peak_rate(with_settings(train=loop).train) == 0.01
    config = with_settings(train=loop | {"batch_size": 8}).train
    assert peak_rate(config) == pytest.approx(0.01 * factor)
    assert learning_rate(0, config) == peak_rate(config)


@pytest.mark.parametrize("name", preset_names())
def test_a_presets_own_rate_is_what_it_says_and_follows_its_images(name):
    preset = load_preset(name).train
    stated = {"paper": 0.02}.get(name, preset.learning_rate)
    assert peak_rate(preset) == stated
    more = load_preset(name, [f"train.batch_size={preset.batch_size * 4}"]).train
    assert peak_rate(more) == pytest.approx(stated * (2 if preset.optimizer == "adamw" else 4))
