"""The recipe for LVIS on a small generated set: its lists, masks and long tail, and training that counts objects."""

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from ezsd.cache import Store
from ezsd.data.shapes import SHAPES_SPLIT
from ezsd.pipeline.config.schema import load_preset
from ezsd.pipeline.console.defaults import train_config
from ezsd.pipeline.data.check import check_dataset
from ezsd.pipeline.data.datasets import find_dataset
from ezsd.pipeline.extraction.build import build_cache
from ezsd.pipeline.extraction.request import BuildRequest
from ezsd.pipeline.inference.evaluate import evaluate_run
from ezsd.pipeline.inference.evaluation_tables import at_limit
from ezsd.pipeline.training.dataloader import load_batches
from ezsd.pipeline.training.train import TrainRequest, train, training_samples

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# The recipe stays; the machine, the images and the schedule are small.
SMALL = (
    "adapt.steps=2",
    "adapt.batch_size=16",
    "proposals.grid=sliding",
    "proposals.search=exhaustive",
    "proposals.sizes=[40]",
    "proposals.ratios=[1.0]",
    "proposals.stride=0.5",
    "model.backbone=tiny",
    "model.fpn_channels=16",
    "model.rpn_sizes=[32, 48]",
    "model.canonical_size=48",
    "model.box_hidden=32",
    "model.rpn_proposals=60",
    "model.box_batch_size_per_image=32",
    "train.steps=6",
    "train.batch_size=4",
    "train.min_size=128",
    "train.max_size=128",
    "train.multiscale_min_size=96",
    "train.warmup_steps=2",
    "train.checkpoint_every=2",
    "train.validate_every=0",
    "train.num_workers=0",
    # Of twelve images none shows a class less often than in a thousandth.
    "train.repeat_threshold=0.3",
)


@pytest.fixture(scope="module")
def long_tail():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield __import__("long_tail")


@pytest.fixture(scope="module")
def root(long_tail, tmp_path_factory):
    root = tmp_path_factory.mktemp("long-tail") / "data"
    long_tail.write_long_tail(root, train=12, val=4, seed=3)
    return root


@pytest.fixture(scope="module")
def config():
    config = load_preset("lvis", SMALL)
    return dataclasses.replace(config, teacher=load_preset("shapes").teacher)


@pytest.fixture(scope="module")
def store(root, config, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "lvis"
    build_cache(BuildRequest(dataset=find_dataset("lvis", root), config=config, out=out, preset="lvis", workers=1))
    return out


@pytest.fixture(scope="module")
def run(store, config, tmp_path_factory):
    return train(TrainRequest(cache=store, run=tmp_path_factory.mktemp("runs") / "lvis", config=config))


def curve(run):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in run.read_metrics()]


def test_the_generated_set_is_in_order_and_its_tail_is_as_long_as_it_says(long_tail, tmp_path):
    root = tmp_path / "data"
    long_tail.write_long_tail(root, train=60, val=4, seed=3)
    assert not list(check_dataset(find_dataset("lvis", root), masks=True).problems)
    document = json.loads((root / "annotations/lvis_v1_train.json").read_text())
    name = {one["id"]: one["name"] for one in document["categories"]}
    boxes = {(one["image_id"], name[one["category_id"]]) for one in document["annotations"]}
    images, groups = Counter(label for _, label in boxes), long_tail.groups(3)
    tail = [*groups["common"], *groups["scarce"]]
    assert all(images[label] <= most for label, most in zip(tail, long_tail.AT_MOST, strict=True))
    assert images.total() > 2 * sum(images[label] for label in tail)
    letters = {one["name"]: one["frequency"] for one in document["categories"]}
    assert letters == {label: "f" for label in groups["frequent"]} | {label: "c" for label in tail} | {
        label: "r" for label in groups["novel"]
    }
    assert sorted(sum(groups.values(), ())) == sorted(SHAPES_SPLIT.names)
    for one in document["images"]:
        present = {label for image, label in boxes if image == one["id"]}
        assert not present & {name[number] for number in one["neg_category_ids"]}
        assert {name[number] for number in one["not_exhaustive_category_ids"]} <= present


def test_lvis_starts_from_its_own_recipe(store):
    config, preset = train_config(store, None, [])
    assert (config, preset) == (load_preset("lvis"), "lvis")
    assert (config.loss.classification_loss, config.train.repeat_threshold) == ("seesaw", 1e-3)
    assert (config.adapt.towers, config.proposals.drop_base_guesses, config.model.masks) == ("vision", False, True)


def test_the_recipe_trains_and_is_evaluated_by_lvis_rules(run, root):
    lines = curve(run)
    assert len(lines) == 6
    assert all(np.isfinite(line["loss"]) for line in lines)
    first = lines[0]
    expected = 2 * (first["rpn_box"] + first["box"]) + 0.5 * first["distillation"]
    expected += sum(first[name] for name in ("rpn_objectness", "classification", "mask"))
    assert first["loss"] == pytest.approx(expected, rel=1e-5)
    found = evaluate_run(run, data_root=None, device="cpu")
    assert at_limit(found, "generalised")["rules"] == "lvis"
    assert "masks_at" in found["generalised"]


def test_objects_are_counted_as_often_as_they_are_shown(run, store, config, root):
    read = Store(store)
    samples = training_samples(read, find_dataset("lvis", root), config.train)
    assert samples.repeats.max() > 1
    shown = torch.zeros(len(SHAPES_SPLIT.base), dtype=torch.int64)
    for _, batches in load_batches(samples, config.train, first_step=0):
        for batch in batches:
            shown += torch.cat(batch.labels).bincount(minlength=len(shown))
    assert torch.equal(run.finished().class_counts(), shown)


def test_a_validation_waits_for_an_epoch_with_its_repeats(store, config, root, tmp_path):
    looking = dataclasses.replace(config.train, validate_every=1, validate_images=2, repeat_threshold=1.0, steps=8)
    images = training_samples(Store(store), find_dataset("lvis", root), looking).epoch_images
    assert images > 16
    settings = dataclasses.replace(config, train=looking)
    run = train(TrainRequest(cache=store, run=tmp_path / "run", config=settings))
    assert [line["step"] for line in run.read_validation()] == [-(-images // 4)]


def test_a_run_that_counts_resumes_bit_for_bit(run, store, config, tmp_path):
    folder = tmp_path / "stopped"
    shutil.copytree(run.folder, folder)
    shutil.rmtree(folder / "checkpoints/step-00000006")
    resumed = train(TrainRequest(cache=store, run=folder, config=config))
    assert curve(resumed) == curve(run)
    assert torch.equal(resumed.finished().class_counts(), run.finished().class_counts())


def test_a_checkpoint_with_damaged_numbers_is_passed_over(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    shutil.rmtree(folder / "checkpoints/step-00000006")
    path = folder / "checkpoints/step-00000004/class_counts.safetensors"
    damaged = path.read_bytes()
    path.write_bytes(damaged[:-1] + bytes([damaged[-1] ^ 1]))
    assert type(run).open(folder).latest() is None
