"""Detection in images as they are shown: turned ones, several, folders, and as a COCO document."""

import dataclasses
import json
import shutil
from importlib.resources import as_file

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ezsd.data.dataset import pad_images
from ezsd.data.shapes import SHAPES_SPLIT
from ezsd.detector.backbone import normalise
from ezsd.errors import TeacherError, VocabularyError
from ezsd.pipeline.console.arguments import find_sources, picture_places
from ezsd.pipeline.data.images import read_image
from ezsd.pipeline.errors import ArgumentError, ImageError
from ezsd.pipeline.extraction.build import build_cache
from ezsd.pipeline.extraction.request import BuildRequest
from ezsd.pipeline.inference.detect import Model, detect_images, resolve_names
from ezsd.pipeline.inference.detection_files import coco_document
from ezsd.pipeline.inference.detections import detection_lines
from ezsd.pipeline.inference.evaluate import evaluate_crops
from ezsd.pipeline.inference.evaluation_tables import at_limit, evaluate_results
from ezsd.pipeline.inference.predictor import load_trained
from ezsd.pipeline.training.train import TrainRequest, train
from ezsd.teacher.open_clip import shipped_weights

ORIENTATION = 0x0112


@pytest.fixture
def turned(shapes_root, tmp_path):
    """A lying image, and a file that holds it standing with the note that viewers turn it: orientation 6."""
    with Image.open(shapes_root / "val/000001.png") as image:
        shown = image.convert("RGB").crop((0, 0, 120, 80))
    shown.save(tmp_path / "shown.png")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    shown.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    return tmp_path / "shown.png", tmp_path / "turned.png"


def detect(run, images, **options):
    settings = {"threshold": 0.0, "device": "cpu", "drawn": None} | options
    return list(detect_images(images, run, ["ring", "bar"], **settings))


def test_boxes_are_those_of_the_image_as_it_is_shown(shapes_run, turned):
    shown, file = turned
    assert torch.equal(read_image(shown), read_image(file))
    one, other = detect(shapes_run, [shown, file])
    assert (other.width, other.height) == (120, 80)
    assert one.objects == other.objects
    assert one.objects


def test_an_image_is_looked_at_as_if_it_were_alone(shapes_run, shapes_root):
    trained = load_trained(shapes_run, "cpu")
    small = read_image(shapes_root / "val/000001.png")[:, :100, :90]
    large = torch.randint(0, 256, (3, 170, 150), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    search = trained.search(trained.text)
    (alone,) = trained.detect([small], search)
    together = trained.detect([large, small, large], search)
    assert len(alone.scores)
    np.testing.assert_allclose(together[1].boxes, alone.boxes, atol=1e-3)
    np.testing.assert_allclose(together[1].scores, alone.scores, atol=1e-5)
    np.testing.assert_array_equal(together[0].boxes, together[2].boxes)


def found_by(trained, search, image, label):
    """Scores and boxes of one of the names looked for, best first."""
    (one,) = trained.detect([read_image(image)], search, keep=10_000)
    return one.scores[one.labels == label].numpy(), one.boxes[one.labels == label].numpy()


def test_a_name_asked_for_by_itself_is_found_as_among_all_of_the_run(shapes_run, shapes_root):
    trained = load_trained(shapes_run, "cpu", ["eval.score_threshold=0.0"])
    image = shapes_root / "val/000001.png"
    ring = trained.names.index("ring")
    row = trained.text[ring : ring + 1]
    among = found_by(trained, trained.search(trained.text), image, ring)
    asked = found_by(trained, trained.search(row), image, 0)
    assert len(asked[0])
    for ours, theirs in zip(asked, among, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert len(trained.search(row).competing) == len(trained.names) - 1
    # Alone, every object is one.
    alone = found_by(trained, trained.search(row, alone=True), image, 0)
    assert alone[0].max() > 3 * asked[0].max()


def test_base_objects_are_not_called_by_the_name_that_is_asked_for(shapes_run, shapes_root):
    trained, image = load_trained(shapes_run, "cpu"), shapes_root / "val/000001.png"
    # The first base row is what the detector sees all over the image.
    batch, sizes = pad_images([read_image(image)])
    boxes = torch.tensor([[x, y, x + 48.0, y + 48] for x in range(0, 80, 8) for y in range(0, 80, 8)])
    with torch.no_grad():
        features = trained.detector.head.features(trained.detector.backbone(normalise(batch, sizes)))
        seen = trained.detector.head.embed(features, boxes, torch.zeros(len(boxes), dtype=torch.int64)).embedding
    base = torch.nn.functional.normalize(seen.mean(0, keepdim=True), dim=1)
    planted = dataclasses.replace(trained, text=torch.cat([base, trained.text[1:]]))
    row = trained.text[-1:]
    alone, asked = (found_by(planted, planted.search(row, alone=alone), image, 0)[0] for alone in (True, False))
    assert (alone > 0.3).any()
    assert not (asked > 0.3).any()


def test_a_name_of_the_run_that_means_the_same_steps_aside(shapes_run, shapes_root):
    trained = load_trained(shapes_run, "cpu", ["eval.score_threshold=0.0"])
    image = shapes_root / "val/000001.png"
    ring = trained.names.index("ring")
    noise = torch.randn(trained.text.shape[1], generator=torch.Generator().manual_seed(0))
    synonym = torch.nn.functional.normalize(trained.text[ring : ring + 1] + 0.001 * noise, dim=1)
    search = trained.search(synonym)
    assert search.excluded == ("ring",)
    assert len(search.competing) == len(trained.names) - 1
    asked = found_by(trained, trained.search(trained.text[ring : ring + 1]), image, 0)
    assert found_by(trained, search, image, 0)[0].max() == pytest.approx(asked[0].max(), rel=0.2)


def test_names_that_step_aside_are_said(shapes_run, turned, caplog):
    caplog.set_level("INFO", logger="ezsd")
    options = {"threshold": 0.0, "device": "cpu", "drawn": None}
    found = list(detect_images([turned[0]], shapes_run, ["red ring", "bar"], **options))
    said = "these names of the run mean nearly what is asked for and do not compete: "
    assert [one.message for one in caplog.records if one.message.startswith(said)] == [f"{said}ring"]
    caplog.clear()
    alone = list(detect_images([turned[0]], shapes_run, ["red ring", "bar"], **options, alone=True))
    assert not any(one.message.startswith(said) for one in caplog.records)
    assert max(one.score for one in alone[0].objects) > 2 * max(one.score for one in found[0].objects)


def test_a_folder_gives_one_document_that_is_also_a_results_file(shapes_run, shapes_root):
    images = find_sources([shapes_root / "val"])
    assert [image.name for image in images] == sorted(p.name for p in (shapes_root / "val").iterdir())
    seen = detect(shapes_run, images)
    document = json.loads(coco_document(seen, ["ring", "bar"]))
    assert [image["file_name"] for image in document["images"]] == [str(image) for image in images]
    assert document["categories"] == [{"id": 1, "name": "ring"}, {"id": 2, "name": "bar"}]
    assert len(document["annotations"]) == sum(len(one.objects) for one in seen) > 0
    first, found = document["annotations"][0], seen[0].objects[0]
    x1, y1, x2, y2 = found.box
    assert first["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=0.001)
    assert np.float32(first["score"]) == np.float32(found.score)
    assert {"id", "image_id", "category_id", "area", "iscrowd"} < set(first)


@pytest.mark.parametrize("fixture", ["shapes_run", "masked_run"])
def test_a_printed_document_gives_the_figures_of_the_run(fixture, request, shapes_root, outlined_root, tmp_path):
    run = request.getfixturevalue(fixture)
    root = outlined_root if fixture == "masked_run" else shapes_root
    names = resolve_names(run, None)
    seen = detect_images(
        find_sources([root / "val"]),
        run,
        names,
        threshold=0,
        device="cpu",
        drawn=None,
        overrides=["eval.max_detections=300"],
    )
    (tmp_path / "found.json").write_text(coco_document(list(seen), names))
    again = evaluate_results(
        tmp_path / "found.json",
        root / "annotations/instances_val.json",
        base=None,
        novel=SHAPES_SPLIT.novel,
        split_file=None,
        classes=None,
        max_detections=None,
    )
    result = json.loads((run.folder / "eval.json").read_text())
    assert at_limit(result, "generalised")["all"]["boxes"] > 0
    for figures in result["generalised"].keys() & {"at", "masks_at"}:
        for label, ours in result["generalised"][figures].items():
            theirs = again["generalised"][figures][label]
            assert theirs["per_class"].items() >= ours["per_class"].items()


def test_names_are_the_runs_own_by_default_and_in_its_spelling(shapes_run, tmp_path):
    assert resolve_names(shapes_run, None) == SHAPES_SPLIT.names
    folder = shutil.copytree(shapes_run.folder, tmp_path / "run")
    spec = json.loads((folder / "run.json").read_text())
    spec["names"][0] = "cafe\u0301"
    (folder / "run.json").write_text(json.dumps(spec))
    run = type(shapes_run).open(folder)
    assert resolve_names(run, ["ring", "caf\u00e9"]) == ("ring", "cafe\u0301")


def test_names_that_the_teacher_cannot_tell_apart_are_refused(shapes_run, shapes_root):
    image = shapes_root / "val/000001.png"
    with pytest.raises(VocabularyError, match="cannot tell 'circle' from 'Circle': .* leave one of them out"):
        list(detect_images([image], shapes_run, ["circle", "Circle"], threshold=0, device="cpu", drawn=None))


def test_each_image_is_found_alone_as_among_others(shapes_run, shapes_root):
    images = find_sources([shapes_root / "val"])[:2]
    together = detect(shapes_run, images)
    for image, seen in zip(images, together, strict=True):
        (alone,) = detect(shapes_run, [image])
        assert [found_line.split() for found_line in detection_lines(alone, with_path=False)] == [
            found_line.split() for found_line in detection_lines(seen, with_path=False)
        ]


def test_pictures_of_several_images_go_into_a_folder(shapes_run, shapes_root, tmp_path):
    images = find_sources([shapes_root / "val"])[:2]
    drawn = picture_places(images, tmp_path / "new", alone=False)
    detect(shapes_run, images, drawn=drawn)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [image.name for image in images]


def test_what_cannot_be_detected_or_drawn_is_refused_before_it_starts(turned, tmp_path):
    shown, file = turned
    (tmp_path / "empty").mkdir()
    for places, words in (
        ([tmp_path / "none.png"], "no such image"),
        ([tmp_path / "empty"], "no images in this folder"),
    ):
        with pytest.raises((ArgumentError, ImageError), match=words):
            find_sources(places)
    for images, out, alone, words in (
        ([shown], tmp_path / "drawn.txt", True, "no picture format"),
        ([shown], shown, True, "is the image itself"),
        ([shown, file], shown, False, "several images need a folder"),
        ([shown, tmp_path / "sub" / shown.name], tmp_path / "out", False, "the same name"),
    ):
        with pytest.raises(ArgumentError, match=words):
            picture_places(images, out, alone=alone)


def test_a_truncated_image_is_named(shapes_run, turned):
    shown, _ = turned
    shown.write_bytes(shown.read_bytes()[:200])
    with pytest.raises(ImageError, match=r"shown.png: cannot be read"):
        detect(shapes_run, [shown])


def test_a_damaged_table_of_exif_is_named(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "broken.png", exif=b"Exif\0\0MM no table")
    with pytest.raises(ImageError, match=r"broken.png: cannot be read: not a TIFF"):
        read_image(tmp_path / "broken.png")


def test_a_damaged_head_of_a_png_is_named(turned):
    shown, _ = turned
    content = bytearray(shown.read_bytes())
    # The length of the first chunk.
    content[11] = 3
    shown.write_bytes(content)
    with pytest.raises(ImageError, match=r"shown.png: "):
        read_image(shown)


@pytest.fixture
def own_weights(shapes_store, shapes_dataset, with_settings, tmp_path, monkeypatch):
    """A run whose teacher came from a file that was named relative to the working folder, in another folder now."""
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    with as_file(shipped_weights()) as shipped:
        shutil.copy(shipped, "w.safetensors")
    config = with_settings(teacher={"weights": "w.safetensors"}, train={"steps": 1})
    store = tmp_path / "store"
    build_cache(BuildRequest(dataset=shapes_dataset, config=config, out=store, workers=1, reuse=shapes_store))
    run = train(TrainRequest(cache=store, run=tmp_path / "run", config=config))
    monkeypatch.chdir(tmp_path)
    return run


def embedded(run, **options):
    return Model(run, device="cpu", **options).search(["red ring", "bar"]).text


def test_a_teacher_is_found_again_from_another_folder(own_weights, shapes_run, tmp_path):
    assert own_weights.environment["teacher"]["weights"] == str(tmp_path / "there/w.safetensors")
    assert torch.equal(embedded(own_weights), embedded(shapes_run))


def test_a_teacher_that_has_moved_is_found_by_its_file_and_no_other(own_weights, shapes_run, tmp_path):
    moved = (tmp_path / "there/w.safetensors").rename(tmp_path / "moved.safetensors")
    for start in (lambda: embedded(own_weights), lambda: evaluate_crops(own_weights, data_root=None, device="cpu")):
        with pytest.raises(TeacherError, match=r"there/w.safetensors, which is gone; give `weights=FILE`"):
            start()
    assert torch.equal(embedded(own_weights, weights=moved), embedded(shapes_run))
    crops = evaluate_crops(own_weights, data_root=None, device="cpu", weights=moved)
    assert crops == json.loads((shapes_run.folder / "crops.json").read_text())
    ensemble = ["eval.teacher_weight_novel=0.5"]
    with pytest.raises(TeacherError, match=r"there/w.safetensors, which is gone; give `weights=FILE`"):
        Model(own_weights, device="cpu", overrides=ensemble)
    assert Model(own_weights, device="cpu", overrides=ensemble, weights=moved).ensemble
    state = load_file(moved)
    state["visual.ln_post.weight"] = state["visual.ln_post.weight"] + 1
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(TeacherError, match="the teacher is another now: .*weights_sha256"):
        embedded(own_weights, weights=tmp_path / "other.safetensors")
