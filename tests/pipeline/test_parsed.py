"""Parsed once: the same record again, anew for another content, and never a novel box in the folder."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from ezsd.data import coco_json as columns
from ezsd.data import masks
from ezsd.data.annotations import load_training
from ezsd.errors import AnnotationError
from ezsd.metrics import read_truth
from ezsd.pipeline.data import annotation_cache as parsed
from ezsd.pipeline.inference.evaluation_tables import evaluate_results
from ezsd.vocabulary import Split

SPLIT = Split(base=("cat", "dog"), novel=("cow",))


def document():
    return {
        "images": [{"id": 7 - k, "file_name": f"ä{k}.png", "width": 40, "height": 30} for k in range(3)],
        "categories": [{"id": k, "name": name} for k, name in enumerate(["cow", "dog", "cat"])],
        "annotations": [
            {"id": 5, "image_id": 6, "category_id": 1, "bbox": [1, 2, 3, 4]},
            {"id": 4, "image_id": 6, "category_id": 0, "bbox": [11.5, 12.5, 13.5, 14.5]},
            {"id": 3, "image_id": 5, "category_id": 2, "bbox": [5, 6, 7, 8]},
        ],
    }


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("EZSD_CACHE_DIR", str(tmp_path / "own"))
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document()))
    return path


@pytest.fixture
def parses(monkeypatch):
    """The files that are walked over, as often as they are."""
    opened = []
    for module in (columns, masks):
        real = module.open_json
        monkeypatch.setattr(module, "open_json", lambda path, real=real: opened.append(path) or real(path))
    return opened


def same(a, b):
    names = ("image_index", "box", "class_index", "annotation_id", "crowd")
    assert all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)
    assert (list(a.images), a.names, a.dropped, a.digest()) == (list(b.images), b.names, b.dropped, b.digest())


def test_a_record_is_parsed_once_and_mapped_after_that(file, parses):
    first = parsed.training_annotations(file, SPLIT)
    moved = file.rename(file.with_name("b.json"))
    again = parsed.training_annotations(moved, SPLIT)
    assert len(parses) == 1
    assert isinstance(again.box, np.memmap)
    same(first, again)
    same(again, load_training(moved, SPLIT))
    same(pickle.loads(pickle.dumps(again)), again)


def test_another_content_or_another_split_is_parsed_anew(file, parses):
    parsed.training_annotations(file, SPLIT)
    changed = document()
    changed["annotations"][0]["bbox"][0] = 2
    file.write_text(json.dumps(changed))
    assert parsed.training_annotations(file, SPLIT).box[1, 0] == 2
    assert parsed.training_annotations(file, Split(base=("dog",), novel=())).names == ("dog",)
    assert len(parsed.evaluation_annotations(file, SPLIT).box) == 3
    assert len(parses) == 4


def test_no_number_of_a_novel_box_is_kept_by_training(file):
    parsed.training_annotations(file, SPLIT)
    values = np.concatenate([np.load(p).ravel() for p in parsed.parsed_folder().rglob("*.npy")])
    assert 5.0 in values
    assert not {11.5, 12.5} & set(values.tolist())


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "record"])
def test_a_damaged_folder_is_made_again(file, parses, damage):
    parsed.training_annotations(file, SPLIT)
    (folder,) = parsed.parsed_folder().iterdir()
    target = folder / ("record.json" if damage == "record" else "box.npy")
    content = target.read_bytes()
    if damage == "missing":
        target.unlink()
    else:
        target.write_bytes(content[:-1] + b"\7" if damage == "changed" else content[:-9])
    found = parsed.training_annotations(file, SPLIT)
    assert len(parses) == 2
    same(found, load_training(file, SPLIT))


def test_a_file_without_boxes_or_images_is_kept_too(file):
    for part in ("annotations", "images"):
        file.write_text(json.dumps({**document(), "annotations": [], part: []}))
        same(parsed.training_annotations(file, SPLIT), load_training(file, SPLIT))


def test_a_folder_that_cannot_be_written_is_told_with_the_way_out(file, tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setenv("EZSD_CACHE_DIR", str(tmp_path / "taken"))
    with pytest.raises(AnnotationError, match="set EZSD_CACHE_DIR"):
        parsed.training_annotations(file, SPLIT)
    monkeypatch.setenv("EZSD_CACHE_DIR", str(tmp_path / "free"))
    parsed.training_annotations(file, SPLIT)


def test_a_wrong_file_is_refused_as_ever_and_leaves_nothing(file):
    file.write_text("{}")
    with pytest.raises(AnnotationError, match="images: expected a list"):
        parsed.training_annotations(file, SPLIT)
    with pytest.raises(AnnotationError, match="expected a readable file"):
        parsed.training_annotations(file.with_name("none.json"), SPLIT)
    assert not list(parsed.parsed_folder().glob("*"))


def test_categories_are_read_once_by_id(file):
    names = enumerate(("cow", "dog", "cat"))
    wanted = [parsed.Category(number, name, "", "", used=True) for number, name in names]
    assert parsed.read_categories(file) == wanted
    (kept,) = parsed.parsed_folder().glob("*categories*")
    assert parsed.read_categories(file) == wanted
    kept.write_text("damaged")
    assert parsed.read_categories(file) == wanted


def outlined(document: dict) -> dict:
    for one in document["annotations"]:
        one["segmentation"] = [[1, 1, 9, 1, 9, 9]]
    return document


def evaluated(file: Path, *, masks: bool) -> dict[str, object]:
    results = [{"image_id": 6, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]
    if masks:
        results = [{"image_id": 6, "category_id": 1, "segmentation": RUNS, "score": 0.5}]
    (file.parent / "results.json").write_text(json.dumps(results))
    choice = {"base": SPLIT.base, "novel": None, "split_file": None, "classes": None, "max_detections": None}
    return evaluate_results(file.parent / "results.json", file, **choice)


RUNS = {"size": [30, 40], "counts": [31, 8, 1161]}


@pytest.mark.parametrize(
    "read",
    [
        lambda file: read_truth(file, SPLIT),
        lambda file: read_truth(file, SPLIT, masks=True),
        lambda file: parsed.evaluation_annotations(file, SPLIT),
        lambda file: parsed.training_annotations(file, SPLIT),
        lambda file: evaluated(file, masks=False),
        lambda file: evaluated(file, masks=True),
    ],
    ids=["truth", "truth with masks", "record", "training record", "results", "results with masks"],
)
def test_all_that_is_asked_of_a_file_is_read_in_one_pass(read, file, parses):
    file.write_text(json.dumps(outlined(document())))
    read(file)
    assert parses == [file]


def _shapes(document: dict[str, object]) -> set[str]:
    return set(re.findall(r'"iou_type": "(\w+)"', json.dumps(document)))


def test_results_with_masks_are_evaluated_by_masks(file):
    file.write_text(json.dumps(outlined(document())))
    assert _shapes(evaluated(file, masks=True)) == {"bbox", "segm"}
    assert _shapes(evaluated(file, masks=False)) == {"bbox"}
