"""Builds whose proposals come from a network that they train on base boxes."""

import dataclasses
import json
import shutil
import signal

import numpy as np
import pytest
import torch
import torchvision

from ezsd.adapt import flatten
from ezsd.boxes import iou
from ezsd.cache import Store, verify
from ezsd.data.annotations import load_training
from ezsd.data.dataset import resize
from ezsd.data.shapes import SHAPES_SPLIT
from ezsd.detector.proposer import Proposer
from ezsd.pipeline.config.relations import load_settings
from ezsd.pipeline.config.schema import load_preset
from ezsd.pipeline.console.defaults import train_config
from ezsd.pipeline.data.datasets import find_dataset
from ezsd.pipeline.errors import ConfigError, ImageError
from ezsd.pipeline.extraction import build as build_module
from ezsd.pipeline.extraction import proposer as proposer_module
from ezsd.pipeline.extraction.base_images import BaseImages
from ezsd.pipeline.extraction.build import build_cache, build_share
from ezsd.pipeline.extraction.commit import commit_cache
from ezsd.pipeline.extraction.proposer import (
    load_proposer,
    propose,
    proposer_state,
    proposer_weights,
    train_proposer,
)
from ezsd.pipeline.extraction.provenance import as_built, describe
from ezsd.pipeline.extraction.repair import repair_store
from ezsd.pipeline.extraction.request import BuildRequest
from ezsd.pipeline.inference.evaluate import evaluate_crops, evaluate_run
from ezsd.pipeline.scheduling.job_array import Share
from ezsd.pipeline.scheduling.pool import Schedule
from ezsd.pipeline.training.train import TrainRequest, train
from tests.commandkit import ezsd
from tests.conftest import QUICK

LEARNED = (
    *(setting for setting in QUICK if not setting.startswith("proposals.")),
    "proposer.max_proposals=12",
    "proposals.drop_background=false",
    "proposals.drop_base_guesses=false",
    "proposer.steps=3",
    "proposer.batch_size=2",
)


UNCOMMITTED = ("environment.json", "build.log")


@pytest.fixture(scope="module")
def config():
    return load_preset("shapes", LEARNED)


@pytest.fixture(scope="module")
def learned_store(shapes_dataset, config, tmp_path_factory):
    out = tmp_path_factory.mktemp("learned") / "store"
    report = build_cache(BuildRequest(dataset=shapes_dataset, config=config, out=out, workers=1))
    assert report.computed == ("teacher", "text", "proposer", "proposals", "regions", "ground_truth")
    return out


def committed(store):
    """Every committed file's bytes."""
    places = (
        path for path in store.rglob("*") if path.is_file() and path.name not in ("environment.json", "build.log")
    )
    return {str(path.relative_to(store)): path.read_bytes() for path in places}


def never(*_, **__):
    raise AssertionError("the proposer was trained again")


def test_proposals_are_few_boxes_within_the_image_best_first(learned_store):
    store = Store(learned_store)
    for image_id in store.image_ids.tolist():
        rows = store.proposals[image_id]
        assert 1 <= len(rows.box) <= 12
        assert ((rows.box >= 0) & (rows.box <= 128)).all()
        assert (np.diff(rows.score) <= 0).all()


def test_regions_are_proposals_away_from_base_objects(learned_store):
    store = Store(learned_store)
    found = 0
    for image_id in store.image_ids.tolist():
        regions, base = store.regions[image_id], store.ground_truth[image_id]
        proposed = {box.tobytes() for box in store.proposals[image_id].box}
        assert all(box.tobytes() in proposed for box in regions.box)
        if len(regions.box) and len(base.box):
            assert iou(torch.from_numpy(regions.box), torch.from_numpy(base.box)).max() < 0.3
        found += len(regions.box)
    assert found > 0


def test_the_teacher_is_shown_no_more_crops_than_proposals_and_base_objects(shapes_dataset, config, tmp_path):
    report = build_cache(BuildRequest(dataset=shapes_dataset, config=config, out=tmp_path / "store", workers=1))
    objects = sum(
        len(Store(tmp_path / "store").ground_truth[i].box) for i in Store(tmp_path / "store").image_ids.tolist()
    )
    assert report.crops <= 12 * report.images + objects


@pytest.mark.usefixtures("warm_workers")
def test_two_workers_make_the_same_bytes(learned_store, shapes_dataset, config, tmp_path):
    build_cache(BuildRequest(dataset=shapes_dataset, config=config, out=tmp_path / "two", workers=2))
    assert committed(tmp_path / "two") == committed(learned_store)


def test_novel_boxes_change_no_byte(learned_store, shapes_root, config, tmp_path):
    root = tmp_path / "bare"
    root.mkdir()
    for place in shapes_root.iterdir():
        if place.name != "annotations":
            (root / place.name).symlink_to(place)
    (root / "annotations").mkdir()
    dataset = find_dataset("shapes", shapes_root)
    for name in (dataset.train_annotations, dataset.val_annotations):
        found = json.loads((shapes_root / name).read_text())
        base = {entry["id"] for entry in found["categories"] if entry["name"] in dataset.split.base}
        found["annotations"] = [entry for entry in found["annotations"] if entry["category_id"] in base]
        (root / name).write_text(json.dumps(found))
    bare = find_dataset("shapes", root)
    build_cache(BuildRequest(dataset=bare, config=config, out=tmp_path / "store", workers=1))
    assert committed(tmp_path / "store") == committed(learned_store)


def test_a_build_that_ended_after_the_training_does_not_train_again(
    learned_store, shapes_dataset, config, tmp_path, monkeypatch
):
    request = BuildRequest(dataset=shapes_dataset, config=config, out=tmp_path / "store", workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "_extract", never)
        with pytest.raises(AssertionError):
            build_cache(request)
    monkeypatch.setattr(build_module, "train_proposer", never)
    build_cache(request)
    assert committed(tmp_path / "store") == committed(learned_store)


def test_another_choice_of_regions_takes_the_proposer_over(learned_store, shapes_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(build_module, "train_proposer", never)
    other = load_preset("shapes", (*LEARNED, "proposals.max_regions=2"))
    report = build_cache(
        BuildRequest(dataset=shapes_dataset, config=other, out=tmp_path / "store", reuse=learned_store, workers=1)
    )
    assert report.reused == ("teacher", "text", "proposer", "proposals", "ground_truth")
    assert max(len(Store(tmp_path / "store").regions[i].box) for i in Store(learned_store).image_ids.tolist()) == 2


def test_the_schedule_is_in_the_fingerprint_and_the_grid_is_not(shapes_dataset, config):
    request = BuildRequest(dataset=shapes_dataset, config=config, out=None)
    annotations = build_module.read_annotations(request)

    def fingerprints(*overrides):
        return describe(
            shapes_dataset, annotations, load_preset("shapes", (*LEARNED, *overrides)), {"name": "t"}
        ).fingerprints

    before, grid, schedule = fingerprints(), fingerprints("proposals.sizes=[30]"), fingerprints("proposer.steps=4")
    assert grid == before
    assert {name for name in before if schedule[name] != before[name]} == {"proposer", "proposals", "regions"}
    assert "proposer" not in fingerprints("proposals.search=exhaustive")


def test_a_store_says_how_its_proposer_was_trained(learned_store, config):
    store = Store(learned_store)
    _, attributes = store.read_per_store("proposer")
    assert attributes["steps"] == 3
    assert attributes["held_out_objects"] > 0
    assert 0 <= attributes["held_out_recall_70"] <= attributes["held_out_recall_50"] <= 1
    built = as_built(load_preset("shapes"), store.manifest, {})
    assert built.proposer == config.proposer
    assert built.proposals.search == "learned"
    assert built.max_proposals == 12


def test_a_run_of_such_a_store_is_trained_and_evaluated_with_crops(learned_store, config, tmp_path):
    run = train(TrainRequest(cache=learned_store, run=tmp_path / "run", config=config))
    assert evaluate_run(run, data_root=None, device="cpu")
    evaluate_crops(run, data_root=None, device="cpu")
    assert json.loads((run.folder / "crops.json").read_text())["crops"]["base"] > 0


def test_lost_rows_are_computed_again_from_the_stored_proposer(learned_store, shapes_root, tmp_path, monkeypatch):
    store = shutil.copytree(learned_store, tmp_path / "store")
    shard = next((store / "proposals/box/c").rglob("0"))
    shard.unlink() if shard.is_file() else shutil.rmtree(shard)
    monkeypatch.setattr(build_module, "train_proposer", never)
    repair_store(store, shapes_root, weights=None, device="cpu")
    assert not verify(store)
    assert committed(store) == committed(learned_store)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "proposer.rpn_sizes=[32]",
            r"proposer.rpn_sizes needs one size per level of tiny .*, got 1",
        ),
        ("proposer.weights=nowhere.pth", r"`proposer.weights=nowhere.pth`: no such file"),
        ("proposer.backbone=resnet99", "proposer.backbone 'resnet99' is not one of"),
        ("proposer.min_size=64", "proposer.min_size=64 and proposer.max_size=0 must be 0 together"),
    ],
)
def test_a_setting_that_fits_no_network_is_refused_before_anything_is_written(
    shapes_dataset, tmp_path, setting, message
):
    with pytest.raises(ConfigError, match=message):
        build_cache(
            BuildRequest(
                dataset=shapes_dataset, config=load_preset("shapes", (*LEARNED, setting)), out=tmp_path / "store"
            )
        )
    assert not (tmp_path / "store").exists()


def test_boxes_of_a_file_need_no_proposer(learned_store, shapes_dataset, tmp_path):
    store = Store(learned_store)
    rows = [(i, box, score) for i in store.image_ids.tolist() for box, score in zip(*boxes_of(store, i), strict=True)]
    results = [
        {"image_id": i, "bbox": [*map(float, box[:2]), *map(float, box[2:] - box[:2])], "score": float(score)}
        for i, box, score in rows
    ]
    (tmp_path / "boxes.json").write_text(json.dumps(results))
    config = load_preset("shapes", (*LEARNED, f"proposals.boxes={tmp_path / 'boxes.json'}"))
    report = build_cache(BuildRequest(dataset=shapes_dataset, config=config, out=tmp_path / "store", workers=1))
    assert "proposer" not in report.computed


def boxes_of(store, image_id):
    return store.proposals[image_id].box, store.proposals[image_id].score


def pale(shapes_root, root, positions):
    """A copy of a dataset of which the training images at these positions cannot be read."""
    shutil.copytree(shapes_root, root)
    dataset = find_dataset("shapes", root)
    listed = json.loads((root / dataset.train_annotations).read_text())["images"]
    for position in positions:
        (root / dataset.train_images / listed[position]["file_name"]).write_bytes(b"no image")
    return dataset


def base_images(dataset, most_bad):
    annotations = load_training(dataset.annotations("train"), dataset.split)
    return BaseImages(annotations=annotations, source=dataset.images("train"), reader="a test", most_bad=most_bad)


def trained(images, config, unfinished=None, **changes):
    settings = dataclasses.replace(config.proposer, **changes)
    device = torch.device("cpu")
    return train_proposer(images, settings, held_out=0.2, device=device, seed=0, unfinished=unfinished)


def test_images_that_cannot_be_read_are_left_out_and_recorded(shapes_root, config, tmp_path):
    images = base_images(pale(shapes_root, tmp_path / "pale", [0, 1]), most_bad=2)
    _, attributes = trained(images, config, steps=12)
    assert attributes["left_out_images"] == sorted(images.bad)
    assert len(images.bad) == 2
    with pytest.raises(ImageError):
        trained(base_images(find_dataset("shapes", tmp_path / "pale"), most_bad=0), config, steps=12)


def test_no_image_that_can_be_read_is_one_line_and_no_endless_loop(shapes_root, config, tmp_path):
    dataset = pale(shapes_root, tmp_path / "pale", range(12))
    with pytest.raises(ConfigError, match="found none to hold out"):
        trained(base_images(dataset, most_bad=99), config)


def test_a_loss_that_is_not_finite_names_the_learning_rate(shapes_dataset, config):
    images = base_images(shapes_dataset, most_bad=0)
    with pytest.raises(ConfigError, match=r"not finite at step \d+; lower `proposer.learning_rate`, now 1e\+30"):
        trained(images, config, steps=20, learning_rate=1e30)
    assert trained(images, config, steps=20, learning_rate=1e-3)[1]["steps"] == 20


def test_a_step_that_does_not_fit_in_memory_is_halved(shapes_dataset, config, monkeypatch):
    loss = Proposer.forward

    def small(proposer, images, *rest):
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(proposer, images, *rest)

    monkeypatch.setattr(Proposer, "forward", small)
    images = base_images(shapes_dataset, most_bad=0)
    with pytest.raises(ConfigError, match=r"proposer.batch_size=2: .* use `proposer.batch_size=1`"):
        trained(images, config)
    assert trained(images, config, batch_size=1)[1]["steps"] == 3


def test_threads_change_no_weight(shapes_dataset, config):
    weights = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        weights.append(trained(base_images(shapes_dataset, most_bad=0), config)[0])
    torch.set_num_threads(1)
    assert np.array_equal(*weights)


def test_boxes_are_in_the_pixels_of_the_image_whatever_the_input_size(shapes_dataset, config):
    images = base_images(shapes_dataset, most_bad=0)
    values, attributes = trained(images, config, min_size=64, max_size=64)
    settings = dataclasses.replace(config.proposer, min_size=64, max_size=64)
    weights = proposer_weights({"values": values}, attributes)
    proposer = load_proposer(settings, weights, proposals=5, device="cpu")
    pixels = images.read(0)
    small, sx, sy = resize(pixels, short_side=64, long_side=64)
    assert (sx, sy) == (0.5, 0.5)
    found, at_input = propose(proposer, pixels, settings), propose(proposer, small, settings)
    np.testing.assert_allclose(found["box"], at_input["box"] * 2, atol=1e-3)
    np.testing.assert_array_equal(found["score"], at_input["score"])
    assert len(found["box"]) == 5


def test_parts_of_a_build_share_the_proposer_and_make_the_same_store(learned_store, shapes_dataset, config, tmp_path):
    request = BuildRequest(dataset=shapes_dataset, config=config, out=tmp_path / "store", workers=1)
    for number in (1, 2):
        build_share(request, Share(number, 2))
    commit_cache(tmp_path / "store", Schedule(workers=1))
    assert committed(tmp_path / "store") == committed(learned_store)


def test_a_resnet_with_weights_is_trained_and_made_again_without_their_file(shapes_dataset, config, tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    changes = {"backbone": "resnet18", "rpn_sizes": (8, 16, 32, 64, 128), "weights": str(tmp_path / "resnet18.pth")}
    images = base_images(shapes_dataset, most_bad=0)
    values, attributes = trained(images, config, steps=2, **changes)
    (tmp_path / "resnet18.pth").unlink()
    settings = dataclasses.replace(config.proposer, **changes)
    proposer = load_proposer(settings, proposer_weights({"values": values}, attributes), proposals=5, device="cpu")
    assert np.array_equal(flatten(proposer_state(proposer))[0], values)
    assert len(propose(proposer, images.read(0), settings)["box"])


def curve(run):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in run.read_metrics()]


PSEUDO = ("train.pseudo_confidence=0.02", "train.pseudo_objectness=0.01")


@pytest.fixture(scope="module")
def pseudo_config():
    return load_preset("shapes", (*LEARNED, *PSEUDO))


@pytest.fixture(scope="module")
def pseudo_run(learned_store, pseudo_config, tmp_path_factory):
    return train(TrainRequest(cache=learned_store, run=tmp_path_factory.mktemp("pseudo") / "run", config=pseudo_config))


def test_pseudo_labels_change_the_training(pseudo_run, learned_store, config, tmp_path):
    plain = train(TrainRequest(cache=learned_store, run=tmp_path / "plain", config=config))
    # The first step whose images have one.
    mine, theirs = next(
        pair for pair in zip(curve(pseudo_run), curve(plain), strict=True) if pair[0]["loss"] != pair[1]["loss"]
    )
    assert mine["classification"] != theirs["classification"]
    assert mine["rpn_objectness"] != theirs["rpn_objectness"]


def test_a_run_with_pseudo_labels_resumes_bit_for_bit(pseudo_run, learned_store, pseudo_config, tmp_path):
    shutil.copytree(pseudo_run.folder, tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped/checkpoints/step-00000006")
    resumed = train(TrainRequest(cache=learned_store, run=tmp_path / "stopped", config=pseudo_config))
    assert curve(resumed) == curve(pseudo_run)
    for name, value in resumed.finished().model().items():
        assert torch.equal(value, pseudo_run.finished().model()[name]), name


def test_pseudo_labels_come_from_the_store_alone(pseudo_run, learned_store, shapes_root, pseudo_config, tmp_path):
    """The same curve from annotations without boxes of novel classes."""
    blind = shutil.copytree(shapes_root, tmp_path / "blind")
    for path in (blind / "annotations").iterdir():
        document = json.loads(path.read_text())
        novel = {c["id"] for c in document["categories"] if c["name"] in SHAPES_SPLIT.novel}
        document["annotations"] = [a for a in document["annotations"] if a["category_id"] not in novel]
        path.write_text(json.dumps(document))
    request = TrainRequest(cache=learned_store, run=tmp_path / "run", config=pseudo_config, data_root=blind)
    assert curve(train(request)) == curve(pseudo_run)


def test_pseudo_labels_need_objectness(shapes_store, learned_store, shapes_dataset, pseudo_config, tmp_path):
    """A grid's scores are the teacher's, and so is a part of those of a ranking that weighs both."""
    ranked = load_preset("shapes", (*LEARNED, "proposals.objectness_weight=0.5"))
    build_cache(
        BuildRequest(dataset=shapes_dataset, config=ranked, out=tmp_path / "ranked", workers=1, reuse=learned_store)
    )
    for store in (shapes_store, tmp_path / "ranked"):
        with pytest.raises(
            ConfigError, match=r"pseudo_confidence=0\.02 .* build one with `proposals\.search=learned` and"
        ):
            train(TrainRequest(cache=store, run=tmp_path / "run", config=pseudo_config))
    # As advised: the other store, or no such setting.
    train(TrainRequest(cache=learned_store, run=tmp_path / "run", config=pseudo_config))
    train(TrainRequest(cache=tmp_path / "ranked", run=tmp_path / "plain", config=ranked))


def test_pseudo_labels_of_a_preset_are_left_out_where_regions_have_no_objectness(shapes_store, learned_store, caplog):
    caplog.set_level("INFO", logger="ezsd")
    assert train_config(learned_store, "shapes", [])[0].train.pseudo_confidence == 0.7
    assert "pseudo" not in caplog.text
    assert train_config(shapes_store, "shapes", [])[0].train.pseudo_confidence == 0
    assert f"no pseudo-labels: the regions of {shapes_store} have no objectness" in caplog.text
    # What is asked for is not left out: training refuses it.
    assert train_config(shapes_store, "shapes", ["train.pseudo_confidence=0.5"])[0].train.pseudo_confidence == 0.5


def test_pseudo_labels_without_novel_names_in_the_loss_are_refused():
    without = ["loss.novel_names=false"]
    with pytest.raises(ConfigError, match=r"or train\.pseudo_confidence=0$"):
        load_settings("shapes", without)
    with pytest.raises(ConfigError, match=r"pseudo_confidence=0\.7 .* set loss\.novel_names=true, or train\.pseudo"):
        load_settings("shapes", ["train.pseudo_confidence=0.7", *without])
    assert not load_settings("shapes", [*without, "train.pseudo_confidence=0"]).loss.novel_names
    assert load_settings("shapes", ["train.pseudo_confidence=0.9"]).loss.novel_names


def test_seesaw_counts_and_repeat_factors_know_no_pseudo_label(learned_store, tmp_path):
    seesaw = ("loss.classification_loss=seesaw", "train.repeat_threshold=0.5")
    counts = []
    for name, settings in (("plain", ()), ("pseudo", PSEUDO)):
        config = load_preset("shapes", (*LEARNED, *seesaw, *settings))
        run = train(TrainRequest(cache=learned_store, run=tmp_path / name, config=config))
        counts.append(run.finished().class_counts())
    assert counts[0].any()
    assert torch.equal(*counts)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_training_killed_between_steps_goes_on_to_the_same_bytes(
    damaged, learned_store, shapes_dataset, config, tmp_path, caplog
):
    out = tmp_path / "store"
    words = ["cache", "build", "--dataset", "shapes", "--data-root", shapes_dataset.root, "--out", out]
    words += [word for setting in LEARNED for word in ("--set", setting)]
    faults = [["save_the_proposer_at_every_step"]]
    killed = ezsd(*words, cwd=tmp_path, faults=faults, EZSD_FAILPOINT="unfinished.before_rename:3")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (state,) = out.glob("journal/unfinished-proposer-*")
    assert state.name == "unfinished-proposer-00000002"
    if damaged:
        (state / "data.raw").write_bytes(b"\1" + (state / "data.raw").read_bytes()[1:])
    caplog.set_level("INFO")
    build_cache(BuildRequest(dataset=shapes_dataset, config=config, out=out, workers=1))
    assert ("goes on after step 2 of 3" in caplog.text) != damaged
    assert committed(out) == committed(learned_store)


@pytest.mark.parametrize("until", [10, 12])
def test_a_training_that_goes_on_remembers_which_images_it_left_out(until, shapes_root, config, tmp_path, monkeypatch):
    monkeypatch.setattr(proposer_module, "SAVE_SECONDS", 0)
    dataset = pale(shapes_root, tmp_path / "pale", [0, 1])
    whole = trained(base_images(dataset, most_bad=2), config, steps=12)
    kept = Kept(until=until)
    with pytest.raises(KeyboardInterrupt):
        trained(base_images(dataset, most_bad=2), config, steps=12, unfinished=kept)
    kept.until = 13
    values, attributes = trained(base_images(dataset, most_bad=2), config, steps=12, unfinished=kept)
    assert np.array_equal(values, whole[0])
    assert attributes == whole[1]


class Kept:
    """Keeps a training's state, and stops it after a step."""

    def __init__(self, until):
        self.until, self.state = until, None

    def read(self):
        return self.state

    def write(self, step, arrays, attributes):
        assert step <= self.until
        self.state = {name: values.copy() for name, values in arrays.items()}, json.loads(json.dumps(attributes))
        if step == self.until:
            raise KeyboardInterrupt
