"""Results files in COCO's format: what is read, and what is refused in one clear line."""

import json

import numpy as np
import pytest

from ezsd.data.segmentations import encode
from ezsd.metrics import ResultsError, read_results

GOOD = {"image_id": 7, "category_id": 3, "bbox": [1, 2, 3.5, 0], "score": 0.25, "area": "unread"}


def read(folder, content):
    path = folder / "results.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_results(path, images={7: (20, 30), 8: (20, 30)}, categories={3: 0, 90: -1})


def test_numbers_are_kept_as_they_stand(tmp_path):
    found = read(tmp_path, [GOOD, GOOD | {"category_id": 90, "score": 0.1 + 0.2, "bbox": [0.1, 0, 0.2, 5]}])
    assert found.xywh.tolist() == [[1, 2, 3.5, 0], [0.1, 0, 0.2, 5]]
    assert found.score.tolist() == [0.25, 0.1 + 0.2]
    assert found.class_index.tolist() == [0, -1]
    assert found.fullest() == 2
    assert read(tmp_path, []).fullest() == 0


def test_masks_are_read_where_all_have_one(tmp_path):
    square = [[2, 3, 12, 3, 12, 9, 2, 9]]
    pixels = np.zeros((20, 30), dtype=np.bool_)
    pixels[3:9, 2:12] = True
    counts = encode(pixels)
    runs = {"size": [20, 30], "counts": counts.decode()}
    bare = {key: GOOD[key] for key in ("image_id", "category_id", "score")}
    found = read(tmp_path, [GOOD | {"segmentation": square}, bare | {"segmentation": runs}])
    assert found.masks == (counts, counts)
    # A mask's own box, where none is given.
    assert found.xywh.tolist() == [GOOD["bbox"], [2, 3, 10, 6]]
    for empty in ({}, {"segmentation": []}):
        assert read(tmp_path, [GOOD | {"segmentation": runs}, GOOD | empty]).masks is None
    with pytest.raises(ResultsError, match=r"\[1\]\.segmentation: expected polygons or run lengths .* found size"):
        read(tmp_path, [GOOD, GOOD | {"segmentation": runs | {"size": [30, 20]}}])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "the file: expected JSON"),
        ('{"annotations": []}', r"\$: expected a list"),
        ([GOOD, 5], r"\[1\]: expected an object, found 5"),
        ([{"image_id": 7}], r"\[0\]\.category_id: .* found nothing"),
        ([GOOD | {"image_id": 9}], r"image_id: .* found 9"),
        ([GOOD | {"image_id": "7"}], r"image_id: .* found '7'"),
        ([GOOD | {"image_id": True}], "image_id"),
        ([GOOD | {"category_id": 4}], r"category_id: .* found 4"),
        ([GOOD | {"category_id": [3]}], "category_id"),
        (json.dumps([GOOD | {"score": float("nan")}]), "score: expected a finite number, found nan"),
        (json.dumps([GOOD | {"score": float("inf")}]), "score"),
        ([GOOD | {"score": None}], "score"),
        ([GOOD | {"score": 10**400}], "score"),
        ([GOOD | {"bbox": [1, 2, 3]}], "bbox: expected four"),
        ([GOOD | {"bbox": [1, 2, 3, 4, 5]}], "bbox"),
        ([GOOD | {"bbox": [1, 2, -3, 4]}], "not negative"),
        (json.dumps([GOOD | {"bbox": [1, 2, float("nan"), 4]}]), "bbox"),
        ([{k: v for k, v in GOOD.items() if k != "bbox"}], r"bbox: .* found nothing"),
    ],
)
def test_what_is_no_results_file_is_refused_with_its_place(tmp_path, content, words):
    with pytest.raises(ResultsError, match=words):
        read(tmp_path, content)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ResultsError, match="none.json: the file: expected a readable file"):
        read_results(tmp_path / "none.json", images={}, categories={})
