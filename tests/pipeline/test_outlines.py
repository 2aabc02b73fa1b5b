"""Masks in a run: from base objects alone, read once, and the same however a step is shared out."""

import dataclasses
import json
import pickle
import shutil

import numpy as np
import pytest
import torch

from cache import Store
from ezsd.data.annotations import AnnotationError
from ezsd.data.shapes import SHAPES_SPLIT
from ezsd.detector.masks import GRID
from pipeline import outlines
from pipeline.datasets import find_dataset
from pipeline.outlines import training_masks
from pipeline.parsed import parsed_folder
from pipeline.train import TrainRequest, train


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
    config = with_settings(model={"masks": True}, train={"loader_workers": 1})
    request = TrainRequest(cache=shapes_store, run=tmp_path / "run", config=config, data_root=outlined_root)
    assert curve(train(request)) == curve(masked_run)


def test_the_weight_of_the_masks_is_theirs_alone(shapes_store, outlined_root, with_settings, tmp_path, masked_run):
    config = with_settings(model={"masks": True}, loss={"mask": 0.5}, train={"steps": 1})
    request = TrainRequest(cache=shapes_store, run=tmp_path / "run", config=config, data_root=outlined_root)
    half, whole = curve(train(request))[0], curve(masked_run)[0]
    assert half["mask"] == whole["mask"]
    assert whole["loss"] - half["loss"] == pytest.approx(whole["mask"] / 2, rel=1e-5)
