"""The teacher takes part in the scores of detections, whose crops it is shown."""

import json
import shutil

import numpy as np
import pytest
import torch

from ezsd.crops import crop_boxes
from ezsd.pipeline.console.arguments import require_weights, shows_teacher
from ezsd.pipeline.data.images import read_image
from ezsd.pipeline.errors import ArgumentError
from ezsd.pipeline.inference import predictor
from ezsd.pipeline.inference.detect import Model, detect_images
from ezsd.pipeline.inference.evaluate import evaluate_run
from ezsd.pipeline.inference.predictor import load_trained, run_teacher

OPEN = ("eval.score_threshold=0", "eval.max_detections=40")
BOTH = (*OPEN, "eval.teacher_weight_base=0.3", "eval.teacher_weight_novel=0.6")


@pytest.fixture
def image(shapes_root):
    return shapes_root / "val/000001.png"


def key(detection):
    return detection.name, *(round(value, 3) for value in detection.box)


def by_place(detections):
    return {key(one): one.score for one in detections}


def teachers_probability(run, image, detections, names):
    """The teacher's probability of each detection's name among all, and of no background, computed apart."""
    teacher, pixels = run_teacher(run, "cpu", adapted=True), read_image(image)
    boxes = torch.from_numpy(detections.boxes)
    crops = crop_boxes(pixels, boxes, size=teacher.input_size, ratio=1.2, surround="context").float() / 255
    with torch.no_grad():
        rows = teacher.encode_text([*names, "background"])
        every = (teacher.logit_scale * teacher.encode_image(crops) @ rows.T).softmax(1)
    return every[torch.arange(len(boxes)), [names.index(one.name) for one in detections]].numpy()


def test_a_score_is_the_product_of_both_with_the_weights_of_base_and_novel(shapes_run, image):
    # The best hundred of so short a run may all have names of one kind.
    many = "eval.max_detections=2000"
    plain = Model(shapes_run, overrides=[*OPEN, many])(image, threshold=0)
    model = Model(shapes_run, overrides=[*BOTH, many])
    found = model(image, threshold=0)
    before = by_place(plain)
    assert before.keys() == by_place(found).keys()
    weight = np.array([0.3 if one.name in model.base_names else 0.6 for one in found])
    assert set(weight) == {0.3, 0.6}
    detector = np.array([before[key(one)] for one in found])
    teacher = teachers_probability(shapes_run, image, found, list(model.names))
    np.testing.assert_allclose(found.scores, detector ** (1 - weight) * teacher**weight, rtol=1e-3)
    assert (np.diff(found.scores) <= 0).all()
    assert not np.array_equal(found.boxes, plain.boxes)


def test_a_name_from_outside_the_run_has_the_weight_of_novel_ones(shapes_run, image):
    names = ["red ring", "red bar"]
    (plain, found, same) = (
        Model(shapes_run, overrides=[*OPEN, *more])(image, names, threshold=0, alone=True)
        for more in (
            [],
            ["eval.teacher_weight_novel=0.5"],
            ["eval.teacher_weight_novel=0.5", "eval.teacher_weight_base=0.9"],
        )
    )
    assert by_place(same) == by_place(found)
    teacher = teachers_probability(shapes_run, image, found, names)
    detector = np.array([by_place(plain)[key(one)] for one in found])
    np.testing.assert_allclose(found.scores, (detector * teacher) ** 0.5, rtol=1e-3)


def test_classes_of_weight_zero_are_not_shown_and_keep_their_scores(shapes_run, image):
    plain = Model(shapes_run, overrides=OPEN)(image, threshold=0)
    model = Model(shapes_run, overrides=[*OPEN, "eval.teacher_weight_novel=0.5"])
    found = by_place(model(image, threshold=0))
    novel = {place for place in found if place[0] not in model.base_names}
    assert 0 < model.ensemble.crops <= len(novel)
    for place, score in by_place(plain).items():
        assert (found[place] == score) == (place not in novel)


def test_a_threshold_spares_crops_and_changes_nothing(shapes_run, image):
    light = [*OPEN, "eval.teacher_weight_base=0.01", "eval.teacher_weight_novel=0.01"]
    every, few = Model(shapes_run, overrides=light), Model(shapes_run, overrides=light)
    found = every(image, threshold=0)
    least = found.scores[5]
    # A power is rounded by its place among the others, of which there are fewer.
    spared = few(image, threshold=float(least) * (1 - 1e-6))
    assert [(one.name, one.box) for one in spared] == [(one.name, one.box) for one in found.objects[:6]]
    np.testing.assert_allclose(spared.scores, found.scores[:6], rtol=1e-6)
    assert few.ensemble.crops < every.ensemble.crops


def test_crops_are_shown_in_the_batches_of_the_build(shapes_run, quick_config):
    ensemble = load_trained(shapes_run, "cpu", BOTH).ensemble
    assert ensemble.encoder.batch == quick_config.build.batch_size


def test_masks_go_with_their_boxes(masked_run, outlined_root):
    image = outlined_root / "val/000001.png"
    plain, found = (Model(masked_run, overrides=overrides)(image, threshold=0) for overrides in (OPEN, BOTH))
    masks = {key(one): one.mask for one in plain}
    assert [one.mask for one in found] == [masks[key(one)] for one in found]
    assert [key(one) for one in found] != [key(one) for one in plain]


def test_an_evaluation_says_what_the_teacher_costs_and_writes_its_settings(shapes_run, tmp_path, caplog):
    caplog.set_level("INFO", logger="ezsd")
    run = type(shapes_run).open(shutil.copytree(shapes_run.folder, tmp_path / "run"))
    weight = {"eval.teacher_weight_novel": 0.5}
    result = evaluate_run(run, data_root=None, device="cpu", overrides=["eval.teacher_weight_novel=0.5"])
    plain = json.loads((run.folder / "eval.json").read_text())
    assert json.loads((run.folder / "eval-set.json").read_text())["settings"] == result["settings"] == weight
    assert result["generalised"]["detections"] == plain["generalised"]["detections"]
    said = [record.getMessage() for record in caplog.records]
    assert sum("takes part in scores with weight 0 for base and 0.5 for novel classes" in line for line in said) == 1
    (cost,) = [line for line in said if "crops of detections in 8 images" in line]
    assert float(cost.partition("images: ")[2].split()[0]) > 0


def test_a_detection_says_what_the_teacher_costs(shapes_run, image, caplog):
    caplog.set_level("INFO", logger="ezsd")
    list(detect_images([image], shapes_run, ["ring"], threshold=0, device="cpu", drawn=None, overrides=BOTH))
    assert sum("crops of detections in 1 image:" in record.getMessage() for record in caplog.records) == 1


def test_no_teacher_is_loaded_where_it_has_no_weight(shapes_run, monkeypatch):
    monkeypatch.setattr(predictor, "run_teacher", None)
    assert load_trained(shapes_run, "cpu").ensemble is None


def test_weights_of_the_teacher_go_with_an_evaluation_that_asks_it(shapes_run, tmp_path):
    folder, asks = shutil.copytree(shapes_run.folder, tmp_path / "run"), ["eval.teacher_weight_base=0.1"]
    assert not shows_teacher(folder, [])
    assert not shows_teacher(tmp_path, asks)
    assert shows_teacher(folder, asks)
    record = json.loads((folder / "run.json").read_text())
    record["config"]["eval"]["teacher_weight_novel"] = 0.5
    (folder / "run.json").write_text(json.dumps(record))
    assert shows_teacher(folder, [])
    assert not shows_teacher(folder, ["eval.teacher_weight_novel=0"])
    with pytest.raises(ArgumentError, match=r"goes with --crops, or with --set eval.teacher_weight_base or"):
        require_weights(folder / "run.json", used=shows_teacher(shapes_run.folder, []))
    require_weights(folder / "run.json", used=shows_teacher(folder, []))
