"""Results files in COCO's format: what is read, and what is refused in one clear line."""

import json

import numpy as np
import pytest

from ezsd.data.masks import encode
from ezsd.errors import ResultsError
from ezsd.metrics import Named, read_results

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
    assert found.most_per_image() == 2
    assert read(tmp_path, []).most_per_image() == 0


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


NAMED = Named(file_names={7: "a/1.png", 8: "b/1.png", 9: "1.png", 10: "2.png"}, categories={"cat": 3, "cafe\u0301": 90})
DETECTION = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}


def read_document(folder, file_names=("x/a/1.png",), names=("caf\u00e9",), **parts):
    """A document with its own ids, 1 to n, as `ezsd detect --json` counts."""
    document = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(file_names, 1)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)],
        "annotations": [DETECTION],
    } | parts
    path = folder / "results.json"
    path.write_text(json.dumps(document))
    sizes = dict.fromkeys(NAMED.file_names, (20, 30))
    return read_results(path, images=sizes, categories={3: 0, 90: 1}, named=NAMED)


def test_a_document_is_read_by_file_names_and_class_names(tmp_path):
    found = read_document(tmp_path)
    assert (found.image_id.tolist(), found.class_index.tolist(), found.searched) == ([7], [1], {1})
    found = read_document(tmp_path, names=("cat", "dog"))
    assert (found.class_index.tolist(), found.searched) == ([0], {0})


@pytest.mark.parametrize(
    ("file_name", "number"),
    [("a/1.png", 7), ("./a//1.png", 7), ("/data/b/1.png", 8), ("/data/c/1.png", 9), ("1.png", 9), ("c/2.png", 10)],
)
def test_the_longest_end_of_a_path_says_which_image_it_is(tmp_path, file_name, number):
    assert read_document(tmp_path, [file_name]).image_id.tolist() == [number]


def test_the_document_may_have_the_shorter_path(tmp_path):
    (tmp_path / "results.json").write_text(
        json.dumps({"images": [{"id": 1, "file_name": "1.png"}], "annotations": [DETECTION]})
    )
    for names, fits in ((["a/1.png", "a/2.png"], True), (["a/1.png", "b/1.png"], False)):
        named = Named(file_names=dict(enumerate(names)), categories={})
        options = {"images": {0: (20, 30), 1: (20, 30)}, "categories": None, "named": named}
        if fits:
            assert read_results(tmp_path / "results.json", **options).image_id.tolist() == [0]
        else:
            with pytest.raises(ResultsError, match=r"'1.png' fits 2 images of the annotation file"):
                read_results(tmp_path / "results.json", **options)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"file_names": ["3.png"]}, r"images\[0\].file_name: '3.png' fits no image"),
        ({"file_names": ["a/1.png", "x/a/1.png"]}, r"'x/a/1.png' and 'a/1.png' are both 'a/1.png'"),
        ({"names": ["cta"]}, r"annotations\[0\]: is of class 'cta', .* did you mean 'cat'"),
        ({"images": None}, "images: expected a list, found None"),
        ({"categories": 5}, "categories: expected a list, found 5"),
        ({"annotations": {}}, "annotations: expected a list"),
        ({"images": [5]}, r"images\[0\]: expected an object, found 5"),
        ({"images": [{"id": 1}]}, r"images\[0\].file_name: expected a name, found nothing"),
        ({"images": [{"id": "1", "file_name": "2.png"}]}, r"images\[0\].id: expected a whole number"),
        (
            {"images": [{"id": 1, "file_name": "2.png", "width": 20, "height": 30}]},
            r"is 20 x 30 pixels, in the annotation file 30 x 20",
        ),
        ({"annotations": [DETECTION | {"image_id": 2}]}, r"annotations\[0\].image_id: .* images of this file, found 2"),
        ({"annotations": [DETECTION | {"category_id": 2}]}, r"annotations\[0\].category_id: .* found 2"),
        ({"annotations": [DETECTION, 5]}, r"annotations\[1\]: expected an object, found 5"),
        ({"annotations": [DETECTION | {"score": None}]}, r"annotations\[0\].score: expected a finite number"),
    ],
)
def test_a_document_that_does_not_fit_is_refused_with_its_place(tmp_path, parts, words):
    with pytest.raises(ResultsError, match=words) as caught:
        read_document(tmp_path, **parts)
    assert "results.json: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ResultsError, match="none.json: the file: expected a readable file"):
        read_results(tmp_path / "none.json", images={}, categories={})
