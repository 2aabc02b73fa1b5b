"""Detection in images as they are shown: turned ones, several, folders, and as a COCO document."""

import json
import shutil
from importlib.resources import as_file

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ezsd.teacher import TeacherError, shipped_weights
from pipeline.arguments import ArgumentError, find_images, picture_places
from pipeline.build import build_cache
from pipeline.datasets import read_image
from pipeline.detect import class_text, coco_document, detect_images, found_lines
from pipeline.evaluate import evaluate_crops
from pipeline.images import ImageError
from pipeline.request import BuildRequest
from pipeline.train import TrainRequest, train
from pipeline.trained import load_trained

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
    (alone,) = trained.find([small], trained.text)
    together = trained.find([large, small, large], trained.text)
    assert len(alone.scores)
    np.testing.assert_allclose(together[1].boxes, alone.boxes, atol=1e-3)
    np.testing.assert_allclose(together[1].scores, alone.scores, atol=1e-5)
    np.testing.assert_array_equal(together[0].boxes, together[2].boxes)


def test_a_folder_gives_one_document_that_is_also_a_results_file(shapes_run, shapes_root):
    images = find_images([shapes_root / "val"])
    assert [image.name for image in images] == sorted(p.name for p in (shapes_root / "val").iterdir())
    seen = detect(shapes_run, images)
    document = json.loads(coco_document(seen, ["ring", "bar"]))
    assert [image["file_name"] for image in document["images"]] == [str(image) for image in images]
    assert document["categories"] == [{"id": 1, "name": "ring"}, {"id": 2, "name": "bar"}]
    assert len(document["annotations"]) == sum(len(one.objects) for one in seen) > 0
    first, found = document["annotations"][0], seen[0].objects[0]
    x1, y1, x2, y2 = found.box
    assert first["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=0.01)
    assert first["score"] == pytest.approx(found.score, abs=1e-5)
    assert {"id", "image_id", "category_id", "area", "iscrowd"} < set(first)


def test_each_image_is_found_alone_as_among_others(shapes_run, shapes_root):
    images = find_images([shapes_root / "val"])[:2]
    together = detect(shapes_run, images)
    for image, seen in zip(images, together, strict=True):
        (alone,) = detect(shapes_run, [image])
        assert [found_line.split() for found_line in found_lines(alone, with_path=False)] == [
            found_line.split() for found_line in found_lines(seen, with_path=False)
        ]


def test_pictures_of_several_images_go_into_a_folder(shapes_run, shapes_root, tmp_path):
    images = find_images([shapes_root / "val"])[:2]
    drawn = picture_places(images, tmp_path / "new", alone=False)
    detect(shapes_run, images, drawn=drawn)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [image.name for image in images]


def test_what_cannot_be_detected_or_drawn_is_refused_before_it_starts(turned, tmp_path):
    shown, file = turned
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.png").write_text("no image")
    for places, words in (
        ([tmp_path / "none.png"], "no such image"),
        ([shown, tmp_path / "notes.png"], "notes.png: is no image"),
        ([tmp_path / "empty"], "no images in this folder"),
    ):
        with pytest.raises((ArgumentError, ImageError), match=words):
            find_images(places)
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
        find_images([shown])


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
    return class_text(load_trained(run, "cpu"), run, ["red ring", "bar"], "cpu", **options)


def test_a_teacher_is_found_again_from_another_folder(own_weights, shapes_run, tmp_path):
    assert own_weights.environment["teacher"]["weights"] == str(tmp_path / "there/w.safetensors")
    assert torch.equal(embedded(own_weights), embedded(shapes_run))


def test_a_teacher_that_has_moved_is_found_by_its_file_and_no_other(own_weights, shapes_run, tmp_path):
    moved = (tmp_path / "there/w.safetensors").rename(tmp_path / "moved.safetensors")
    for start in (lambda: embedded(own_weights), lambda: evaluate_crops(own_weights, data_root=None, device="cpu")):
        with pytest.raises(TeacherError, match=r"there/w.safetensors, which is gone; give --weights FILE"):
            start()
    assert torch.equal(embedded(own_weights, weights=moved), embedded(shapes_run))
    crops = evaluate_crops(own_weights, data_root=None, device="cpu", weights=moved)
    assert crops == json.loads((shapes_run.folder / "crops.json").read_text())
    state = load_file(moved)
    state["visual.ln_post.weight"] = state["visual.ln_post.weight"] + 1
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(TeacherError, match="the teacher is another now: .*weights_sha256"):
        embedded(own_weights, weights=tmp_path / "other.safetensors")
