"""A trained run looked through with other settings than its own."""

import json
import shutil

import pytest

from ezsd.pipeline.config.schema import TEST_TIME, at_test_time
from ezsd.pipeline.errors import ConfigError
from ezsd.pipeline.inference.detect import detect_images
from ezsd.pipeline.inference.evaluate import evaluate_run


def found(run, shapes_root, *overrides):
    image = sorted((shapes_root / "val").iterdir())[0]
    seen = detect_images([image], run, ["ring", "bar"], threshold=0.0, device="cpu", drawn=None, overrides=overrides)
    return next(iter(seen)).objects


def test_boxes_are_those_of_the_names_asked_for(shapes_run, shapes_root):
    # More than there are names: all have a box of their own.
    every = "model.box_top_k=99"
    own = found(shapes_run, shapes_root)
    assert found(shapes_run, shapes_root, every) == own
    assert found(shapes_run, shapes_root, every, "model.box_class=topk") != own


def test_the_floor_and_the_count_are_those_asked_for(shapes_run, shapes_root):
    assert len(found(shapes_run, shapes_root, "eval.max_detections=3")) == 3
    assert found(shapes_run, shapes_root, "eval.score_threshold=0.999") == ()


def test_an_evaluation_with_other_settings_names_them_in_a_file_of_its_own(shapes_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(shapes_run.folder, folder)
    before = (folder / "eval.json").read_bytes()
    run = type(shapes_run).open(folder)
    result = evaluate_run(run, data_root=None, device="cpu", classes="novel", overrides=["model.box_class=reference"])
    assert result["settings"] == {"model.box_class": "reference"}
    assert json.loads((folder / "eval-novel-set.json").read_text())["settings"] == result["settings"]
    assert (folder / "eval.json").read_bytes() == before
    assert "settings" not in json.loads(before)


@pytest.mark.parametrize("override", ["eval.max_detections=3", " eval.max_detections = 300"])
def test_an_evaluation_refuses_a_count_that_it_does_not_use(shapes_run, override):
    before = sorted(shapes_run.folder.iterdir())
    with pytest.raises(ConfigError, match=rf"`overrides` {override}: .* 300 detections per image.*`max_detections`"):
        evaluate_run(shapes_run, data_root=None, device="cpu", overrides=[override])
    assert sorted(shapes_run.folder.iterdir()) == before


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.pool_size=3", "model.pool_size cannot be changed .*model.box_class"),
        ("train.steps=3", "train.steps cannot be changed"),
        ("model.box_class=nearest", "expected one of foreground, reference, topk"),
        ("model.box_top_k=0", "model.box_top_k must be > 0"),
        ("eval.max_detections", "expected section.key=value"),
        ("eval.max_detections=3\neval.nms_iou=0.9", "has a line break"),
    ],
)
def test_what_training_has_used_or_what_does_not_fit_is_refused(quick_config, override, words):
    with pytest.raises(ConfigError, match=words):
        at_test_time(quick_config, [override])


def test_every_setting_that_is_offered_is_one(quick_config):
    values = {
        "model.box_class": "topk",
        "model.box_top_k": 2,
        "eval.max_detections": 7,
        "model.masks": "true",
        "eval.class_agnostic_nms": "true",
        "train.backend": "eager",
    }
    changed = at_test_time(quick_config, [f"{key}={values.get(key, 0.25)}" for key in TEST_TIME])
    assert (changed.model.box_class, changed.model.box_top_k) == ("topk", 2)
    assert changed.train.backend == "eager"
    assert (changed.eval.score_threshold, changed.eval.nms_iou, changed.eval.max_detections) == (0.25, 0.25, 7)
