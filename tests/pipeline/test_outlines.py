"""Masks in a run: from base objects alone, read once, and the same however a step is shared out."""

import dataclasses
import json
import pickle
import shutil

import numpy as np
import pytest
import torch

from ezsd.cache import Store
from ezsd.data.masks import decode, encode, parse_outline
from ezsd.data.shapes import SHAPES_SPLIT
from ezsd.detector.masks import GRID
from ezsd.errors import AnnotationError
from ezsd.pipeline.data import mask_cache as outlines
from ezsd.pipeline.data.annotation_cache import parsed_folder
from ezsd.pipeline.data.datasets import find_dataset
from ezsd.pipeline.data.mask_cache import training_masks
from ezsd.pipeline.errors import RunError
from ezsd.pipeline.inference.detect import detect_images
from ezsd.pipeline.inference.detection_files import coco_document
from ezsd.pipeline.inference.evaluate import evaluate_run
from ezsd.pipeline.inference.evaluation_tables import evaluate_results, evaluation_tables
from ezsd.pipeline.inference.outlines import outlines as svg_outlines
from ezsd.pipeline.inference.visualize import draw_boxes
from ezsd.pipeline.report import write_report
from ezsd.pipeline.training.train import TrainRequest, train
from tests.pipeline.test_figures import assert_equal_figures


def curve(run):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in run.read_metrics()]


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("EZSD_CACHE_DIR", str(tmp_path / "own"))


@pytest.fixture
def dataset(outlined_root):
    return find_dataset("shapes", outlined_root)


def test_masks_are_those_of_the_stores_ground_truth_in_its_order(dataset, shapes_store):
    masks, store = training_masks(dataset), Store(shapes_store)
    diamond = (np.abs(np.arange(GRID) - (GRID - 1) / 2)[:, None] + np.abs(np.arange(GRID) - (GRID - 1) / 2)) < GRID / 2
    seen = 0
    for image_id in store.image_ids:
        truth, found = store.ground_truth[int(image_id)], masks[int(image_id)]
        assert len(found) == len(truth.box)
        # Run lengths are of whole pixels, and a diamond's tip is thinner than one.
        assert np.abs(found.frame.numpy() - truth.box).max(initial=0) <= 2
        for grid in found.grid.numpy():
            # A whole box would have one half.
            assert (grid & diamond).sum() / (grid | diamond).sum() > 0.8
            seen += 1
    assert seen > 10


def test_nothing_of_a_novel_outline_is_kept_and_it_changes_nothing(dataset, outlined_root, tmp_path, own_folder):
    """The novel outlines of the fixture are no outlines; here they are real ones, far from all others."""
    plain = training_masks(dataset)
    root = tmp_path / "data"
    shutil.copytree(outlined_root, root)
    path = root / "annotations/instances_train.json"
    document = json.loads(path.read_text())
    names = {one["id"]: one["name"] for one in document["categories"]}
    novel = [one for one in document["annotations"] if names[one["category_id"]] in SHAPES_SPLIT.novel]
    assert novel
    for one in novel:
        one["segmentation"] = [[777.5, 777.5, 778.5, 777.5, 778.5, 778.5]]
    path.write_text(json.dumps(document))
    other = training_masks(dataclasses.replace(dataset, root=root))
    folders = [folder for folder in parsed_folder().iterdir() if (folder / "packed.npy").is_file()]
    assert len(folders) == 2
    first, second = (np.load(folder / "packed.npy") for folder in folders)
    assert np.array_equal(first, second)
    assert np.float32(777.5).tobytes() not in second.tobytes()
    image_id = int(plain._arrays["image_id"][0])
    assert torch.equal(plain[image_id].grid, other[image_id].grid)


def test_outlines_are_read_once_and_sent_as_a_folder(dataset, own_folder, monkeypatch):
    calls, read = [], outlines.read_outlines
    monkeypatch.setattr(outlines, "read_outlines", lambda *a: calls.append(a) or read(*a))
    first, again = training_masks(dataset), training_masks(dataset)
    assert len(calls) == 1
    sent = pickle.dumps(again)
    assert len(sent) < 500
    image_id = int(first._arrays["image_id"][0])
    assert torch.equal(pickle.loads(sent)[image_id].frame, first[image_id].frame)
    assert len(first[10**9]) == 0


def test_a_dataset_without_segmentations_is_one_line_before_anything_is_written(
    shapes_store, shapes_root, with_settings, tmp_path
):
    request = TrainRequest(cache=shapes_store, run=tmp_path / "run", config=with_settings(model={"masks": True}))
    with pytest.raises(
        AnnotationError, match=r"annotations\[\d+\].segmentation: .*nothing.*model.masks=false"
    ) as found:
        train(request)
    assert "\n" not in str(found.value)
    assert not (tmp_path / "run").exists()


def test_masks_change_no_other_loss_of_the_first_step(masked_run, shapes_run):
    with_, without = curve(masked_run)[0], curve(shapes_run)[0]
    assert set(with_) - set(without) == {"mask"}
    assert {key for key in without if with_[key] != without[key]} == {"loss"}
    assert with_["loss"] == pytest.approx(without["loss"] + with_["mask"])


def test_readers_of_its_own_change_nothing(masked_run, shapes_store, outlined_root, with_settings, tmp_path):
    config = with_settings(model={"masks": True}, train={"num_workers": 1})
    request = TrainRequest(cache=shapes_store, run=tmp_path / "run", config=config, data_root=outlined_root)
    assert curve(train(request)) == curve(masked_run)


def test_the_weight_of_the_masks_is_theirs_alone(shapes_store, outlined_root, with_settings, tmp_path, masked_run):
    config = with_settings(model={"masks": True}, loss={"mask": 0.5}, train={"steps": 1})
    request = TrainRequest(cache=shapes_store, run=tmp_path / "run", config=config, data_root=outlined_root)
    half, whole = curve(train(request))[0], curve(masked_run)[0]
    assert half["mask"] == whole["mask"]
    assert whole["loss"] - half["loss"] == pytest.approx(whole["mask"] / 2, rel=1e-5)


# Looking: the run of the session has hardly learned anything, so what counts is that files and figures agree.


def test_an_evaluation_has_figures_of_masks_beside_those_of_boxes(masked_run, shapes_run, outlined_root, tmp_path):
    result = json.loads((masked_run.folder / "eval.json").read_text())
    for space in ("generalised",):
        boxes, masks = result[space]["at"], result[space]["masks_at"]
        assert boxes.keys() == masks.keys()
        for label, found in masks.items():
            assert (found["iou_type"], boxes[label]["iou_type"]) == ("segm", "bbox")
            assert found["all"]["boxes"] == boxes[label]["all"]["boxes"] > 0
            assert found["all"]["AP50"] != boxes[label]["all"]["AP50"]
    assert "masks_at" not in json.loads((shapes_run.folder / "eval.json").read_text())["generalised"]
    tables = evaluation_tables(result, per_class=False)
    assert "COCO rules, masks, 8 images, at most 100 detections per image (" in tables
    assert "COCO rules, boxes, 8 images, at most 100 detections per image (" in tables


def test_the_detections_file_gives_the_figures_of_masks_too(masked_run, outlined_root):
    result = json.loads((masked_run.folder / "eval.json").read_text())
    again = evaluate_results(
        masked_run.folder / "detections.json",
        outlined_root / "annotations/instances_val.json",
        base=None,
        novel=SHAPES_SPLIT.novel,
        split_file=None,
        classes=None,
        max_detections=None,
    )
    for group in ("base", "novel", "all"):
        for label, found in result["generalised"]["masks_at"].items():
            theirs = again["generalised"]["masks_at"][label][group]
            assert_equal_figures(theirs, found[group])


def looked_at(run, root, **options):
    images = sorted((root / "val").iterdir())[:2]
    settings = {"threshold": 0.0, "device": "cpu", "drawn": None} | options
    return list(detect_images(images, run, ["ring", "bar"], **settings))


def test_a_document_of_detections_has_their_masks(masked_run, shapes_run, outlined_root):
    seen = looked_at(masked_run, outlined_root)
    document = json.loads(coco_document(seen, ["ring", "bar"]))
    assert document["annotations"]
    filled = 0
    for one in document["annotations"]:
        size = document["images"][one["image_id"] - 1]
        outline = parse_outline(one["segmentation"], size["height"], size["width"])
        pixels = decode(outline, size["height"], size["width"])
        assert one["area"] == pixels.sum()
        x, y, w, h = one["bbox"]
        box = np.zeros_like(pixels)
        box[int(y) : int(y + h) + 1, int(x) : int(x + w) + 1] = True
        assert not (pixels & ~box).any()
        filled += pixels.any()
    assert filled
    plain = json.loads(coco_document(looked_at(shapes_run, outlined_root), ["ring", "bar"]))
    assert not any("segmentation" in one for one in plain["annotations"])


def test_masks_may_be_left_out_of_a_search_but_not_added(masked_run, shapes_run, outlined_root):
    with_ = looked_at(masked_run, outlined_root)
    without = looked_at(masked_run, outlined_root, overrides=["model.masks=false"])
    for one, other in zip(with_, without, strict=True):
        assert [found.box for found in one.objects] == [found.box for found in other.objects]
        assert all(found.mask is not None for found in one.objects)
        assert all(found.mask is None for found in other.objects)
    with pytest.raises(RunError, match="was trained without masks"):
        looked_at(shapes_run, outlined_root, overrides=["model.masks=true"])


def test_a_picture_shows_the_outline_of_a_mask():
    image = torch.full((3, 50, 80), 128, dtype=torch.uint8)
    boxes, pixels = torch.tensor([[10.0, 10, 60, 40]]), np.zeros((50, 80), dtype=np.bool_)
    pixels[15:35, 20:50] = True
    plain = np.asarray(draw_boxes(image, boxes, [""], "#ff0000", scale=2.0))
    drawn = np.asarray(draw_boxes(image, boxes, [""], "#ff0000", scale=2.0, masks=[pixels]))
    changed = (plain != drawn).any(2)
    inner = np.zeros_like(changed)
    inner[30:70, 40:100] = True
    assert changed[inner].any()
    assert not changed[~inner].any()
    assert not changed[38:62, 48:92].any()
    assert drawn[30, 70].tolist() == [255, 0, 0]
    with pytest.raises(ValueError, match="as many masks"):
        draw_boxes(image, boxes, [""], masks=[pixels[1:]])


def test_a_report_has_the_figures_of_masks_and_draws_them(masked_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(masked_run.folder, folder)
    place, pages = folder / "detections.json", {}
    # A quick run is sure of nothing.
    found = [one | {"score": 0.9} for one in json.loads(place.read_text())]
    assert all("segmentation" in one for one in found)
    without = [{key: value for key, value in one.items() if key != "segmentation"} for one in found]
    for name, written in (("with", found), ("without", without)):
        place.write_text(json.dumps(written))
        pages[name] = write_report(type(masked_run).open(folder), data_root=None, images=1).read_text()
    assert "generalised, masks, at most 100 detections per image" in pages["with"]
    assert "generalised, boxes, at most 100 detections per image" in pages["with"]
    assert "<polygon" in pages["with"]
    assert "<polygon" not in pages["without"]


def test_an_outline_lies_around_the_mask_and_closes_at_the_border():
    pixels = np.zeros((40, 60), bool)
    pixels[10:20, 50:60] = True
    (points,) = svg_outlines(encode(pixels), *pixels.shape)
    corners = np.array([point.split(",") for point in points.split()], float)
    assert corners.min(0).tolist() == [50, 10]
    assert corners.max(0).tolist() == [60, 20]
    # Scattered pixels leave their longest outlines alone, and no outline has hundreds of points.
    rng = np.random.default_rng(0)
    noisy = svg_outlines(encode(rng.random((200, 200)) > 0.5), 200, 200)
    assert len(noisy) == 8
    assert sum(len(one.split()) for one in noisy) <= 120 + 8 * 4
    assert svg_outlines(encode(np.zeros((4, 4), bool)), 4, 4) == []


def test_an_evaluation_on_files_without_segmentations_is_one_clear_line(masked_run, shapes_root, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(masked_run.folder, folder)
    run = type(masked_run).open(folder)
    with pytest.raises(AnnotationError, match=r"instances_val.json: annotations\[0\].segmentation.*model.masks=false"):
        evaluate_run(run, data_root=shapes_root, device="cpu")
    result = evaluate_run(run, data_root=shapes_root, device="cpu", overrides=["model.masks=false"])
    assert "masks_at" not in result["generalised"]
