"""Annotation files: what training may see, what the digests cover, and every refusal."""

import contextlib
import copy
import dataclasses
import json
import os
import pickle
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ezsd.data.annotations import load_evaluation, load_training, read_raw, resolve_image_path
from ezsd.errors import AnnotationError
from ezsd.vocabulary import COCO_SPLIT, Split

SPLIT = Split(base=("cat", "dog"), novel=("cow",))
ARRAYS = ("image_index", "box", "class_index", "annotation_id", "crowd")


def small():
    """Three images, ids with gaps, classes in another order than the split's, one class outside it."""
    return {
        "images": [
            {"id": 70, "file_name": "b.png", "width": 40, "height": 30},
            {"id": 9, "file_name": "sub/a.png", "width": 20, "height": 10},
            {"id": 80, "file_name": "empty.png", "width": 8, "height": 8},
        ],
        "categories": [
            {"id": 90, "name": "cow"},
            {"id": 3, "name": "dog"},
            {"id": 44, "name": "kite"},
            {"id": 12, "name": "cat"},
        ],
        "annotations": [
            {"id": 500, "image_id": 70, "category_id": 12, "bbox": [1, 2, 3.5, 4], "iscrowd": 0},
            {"id": 7, "image_id": 70, "category_id": 3, "bbox": [10, 10, 100, 100]},
            {"id": 8, "image_id": 9, "category_id": 90, "bbox": [0, 0, 5, 5], "iscrowd": 0},
            {"id": 600, "image_id": 9, "category_id": 3, "bbox": [0, 0, 5, 5], "iscrowd": 1},
            {"id": 601, "image_id": 9, "category_id": 44, "bbox": [0, 0, 5, 5]},
            {"id": 602, "image_id": 9, "category_id": 12, "bbox": [2, 2, 0, 5]},
            {"id": 603, "image_id": 9, "category_id": 12, "bbox": [20, 2, 4, 5]},
        ],
    }


def write(folder, document, name="instances.json"):
    path = folder / name
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def same(a, b):
    """Whether two records agree in every field and digest."""
    arrays = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ARRAYS)
    return arrays and (list(a.images), a.names, dict(a.dropped), a.digest()) == (
        list(b.images),
        b.names,
        dict(b.dropped),
        b.digest(),
    )


def test_training_keeps_clipped_base_boxes_and_all_images(tmp_path):
    record = load_training(write(tmp_path, small()), SPLIT)
    assert [image.id for image in record.images] == [9, 70, 80]
    assert record.names == ("cat", "dog")
    assert record.image_index.tolist() == [1, 1]
    assert record.annotation_id.tolist() == [7, 500]
    assert record.class_index.tolist() == [1, 0]
    assert record.box.tolist() == [[10, 10, 40, 30], [1, 2, 4.5, 6]]
    assert not record.crowd.any()
    assert record.dropped == {"crowd": 1, "degenerate": 1, "outside": 1}


def test_arrays_have_the_stated_types(tmp_path):
    for load in (load_training, load_evaluation):
        record = load(write(tmp_path, small()), SPLIT)
        assert [getattr(record, name).dtype.str for name in ARRAYS] == ["<i4", "<f4", "<i4", "<i8", "|b1"]


def test_a_file_without_boxes_or_images_is_legal(tmp_path):
    record = load_training(write(tmp_path, {**small(), "annotations": []}), SPLIT)
    assert record.box.shape == (0, 4)
    assert record.rows(2) == slice(0, 0)
    assert load_training(write(tmp_path, {**small(), "annotations": [], "images": []}), SPLIT).images.id.size == 0


def test_rows_are_the_boxes_of_one_image(tmp_path):
    record = load_evaluation(write(tmp_path, small()), SPLIT)
    assert [record.annotation_id[record.rows(position)].tolist() for position in range(3)] == [[8, 600], [7, 500], []]
    for position in (-1, 3):
        with pytest.raises(IndexError):
            record.rows(position)


def test_rows_are_found_without_copying_the_column(tmp_path):
    record = load_evaluation(write(tmp_path, small()), SPLIT)
    record = dataclasses.replace(record, image_index=np.repeat(np.arange(3, dtype=np.int32), 100_000))
    tracemalloc.start()
    try:
        assert record.rows(1) == slice(100_000, 200_000)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_evaluation_has_novel_boxes_and_flags_crowds(tmp_path):
    record = load_evaluation(write(tmp_path, small()), SPLIT)
    assert record.names == ("cat", "dog", "cow")
    assert record.class_index.tolist() == [2, 1, 1, 0]
    assert record.crowd.tolist() == [False, True, False, False]


NOVEL = st.fixed_dictionaries(
    {"category_id": st.sampled_from([90, 44])},
    optional={
        "id": st.sampled_from([7, 8, 1000, "x", None]),
        "image_id": st.sampled_from([9, 70, 80, 12345, None]),
        "bbox": st.one_of(st.lists(st.floats(), max_size=5), st.just("everywhere")),
        "iscrowd": st.integers(0, 3),
        "area": st.floats(),
    },
)


@settings(max_examples=40, deadline=None)
@given(novel=st.lists(NOVEL, max_size=4), seed=st.integers(0, 9))
def test_nothing_about_novel_boxes_reaches_training(tmp_path_factory, novel, seed):
    folder = tmp_path_factory.mktemp("leak")
    document = small()
    document["annotations"] = [a for a in document["annotations"] if a["category_id"] not in (90, 44)]
    without = load_training(write(folder, document), SPLIT)
    document["annotations"] += novel
    random.Random(seed).shuffle(document["annotations"])
    assert same(load_training(write(folder, document), SPLIT), without)


def test_a_novel_name_that_the_file_does_not_list_has_no_box(tmp_path):
    document = small()
    document["categories"] = [c for c in document["categories"] if c["name"] in SPLIT.base]
    document["annotations"] = document["annotations"][:2]
    path = write(tmp_path, document)
    training, evaluation = load_training(path, SPLIT), load_evaluation(path, SPLIT)
    assert len(training.box) == 2
    assert training.absent == ()
    assert evaluation.absent == SPLIT.novel
    assert evaluation.names == SPLIT.names
    assert set(evaluation.class_index.tolist()) <= set(range(len(SPLIT.base)))
    with pytest.raises(AnnotationError, match="named 'cow'"):
        load_training(path, Split(base=(*SPLIT.base, *SPLIT.novel), novel=()))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), indent=st.sampled_from([None, 0, 3]))
def test_the_digest_ignores_order_formatting_and_path(tmp_path_factory, seed, indent):
    folder = tmp_path_factory.mktemp("digest")
    plain = load_training(write(folder, small()), SPLIT)
    shuffle = random.Random(seed).shuffle
    document = {key: [dict(reversed(list(entry.items()))) for entry in part] for key, part in small().items()}
    for part in document.values():
        shuffle(part)
    document["info"] = {"year": seed}
    moved = write(folder, json.dumps(document, indent=indent), name=f"other{seed}.json")
    assert same(load_training(moved, SPLIT), plain)


def test_the_digest_knows_classes_by_name(tmp_path):
    path = write(tmp_path, small())
    before = load_training(path, SPLIT).digest()
    assert load_training(path, Split(base=("dog", "cat"), novel=("cow",))).digest() == before
    # Renaming a class is a change though every number stays.
    document = small()
    document["categories"][1]["name"], document["categories"][3]["name"] = "cat", "dog"
    after = load_training(write(tmp_path, document), SPLIT).digest()
    assert after["images"] == before["images"]
    assert after["boxes"] != before["boxes"]


@pytest.mark.parametrize(
    ("section", "position", "key", "value", "part"),
    [
        ("images", 2, "width", 9, "images"),
        ("images", 2, "file_name", "c.png", "images"),
        ("annotations", 0, "bbox", [1, 2, 3.5, 4.01], "boxes"),
        ("annotations", 0, "category_id", 3, "boxes"),
        ("annotations", 0, "id", 501, "boxes"),
    ],
)
def test_the_digest_notices_each_change_in_its_part(tmp_path, section, position, key, value, part):
    before = load_training(write(tmp_path, small()), SPLIT).digest()
    document = small()
    document[section][position][key] = value
    after = load_training(write(tmp_path, document), SPLIT).digest()
    assert [name for name in before if before[name] != after[name]] == [part]


FINITE = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=60, deadline=None)
@given(boxes=st.lists(st.tuples(FINITE, FINITE, FINITE, FINITE) | st.tuples(*[st.floats(-9, 30)] * 4), max_size=6))
def test_every_kept_box_obeys_the_convention_and_the_rest_is_counted(tmp_path_factory, boxes):
    document = small()
    document["annotations"] = [
        {"id": number, "image_id": 9, "category_id": 3, "bbox": list(box)} for number, box in enumerate(boxes)
    ]
    record = load_training(write(tmp_path_factory.mktemp("boxes"), document), SPLIT)
    x1, y1, x2, y2 = record.box.T
    assert ((x1 >= 0) & (x1 < x2) & (x2 <= 20) & (y1 >= 0) & (y1 < y2) & (y2 <= 10)).all()
    assert len(record.box) + sum(record.dropped.values()) == len(boxes)


def test_a_tiny_box_survives(tmp_path):
    document = small()
    document["annotations"][0]["bbox"] = [1, 2, 0.3, 0.3]
    assert 500 in load_training(write(tmp_path, document), SPLIT).annotation_id


def test_raw_boxes_are_the_files_own(tmp_path):
    raw = read_raw(write(tmp_path, small()), ("dog",))
    assert raw.xywh.tolist() == [[10, 10, 100, 100], [0, 0, 5, 5]]
    assert raw.image_id.tolist() == [70, 9]


def test_a_record_survives_pickling(tmp_path):
    record = load_training(write(tmp_path, small()), SPLIT)
    assert same(pickle.loads(pickle.dumps(record)), record)


MISSING = object()

WRONG_VALUES = [
    ("images", 1, "id", "9"),
    ("images", 1, "id", 9.0),
    ("images", 1, "id", True),
    ("images", 1, "id", 2**70),
    ("images", 1, "id", 70),
    ("images", 1, "id", MISSING),
    ("images", 1, "width", 0),
    ("images", 1, "height", MISSING),
    ("images", 1, "file_name", ""),
    ("images", 1, "file_name", None),
    ("categories", 1, "id", 90),
    ("categories", 1, "id", None),
    ("categories", 1, "name", "cow"),
    ("categories", 1, "name", 4),
    ("annotations", 1, "id", 500),
    ("annotations", 1, "id", "7"),
    ("annotations", 1, "id", MISSING),
    ("annotations", 1, "image_id", 71),
    ("annotations", 1, "image_id", "70"),
    ("annotations", 1, "category_id", 4),
    ("annotations", 1, "category_id", "3"),
    ("annotations", 1, "category_id", MISSING),
    ("annotations", 1, "bbox", [1, 2, 3]),
    ("annotations", 1, "bbox", [1, 2, 3, "4"]),
    ("annotations", 1, "bbox", [1, 2, float("nan"), 4]),
    ("annotations", 1, "bbox", [1, 2, float("inf"), 4]),
    ("annotations", 1, "bbox", [1, 2, 10**400, 4]),
    ("annotations", 1, "bbox", [1, 2, True, 4]),
    ("annotations", 1, "bbox", {"left": 1}),
    ("annotations", 1, "bbox", MISSING),
    ("annotations", 1, "iscrowd", 2),
    ("annotations", 1, "iscrowd", "0"),
]


@pytest.mark.parametrize("load", [load_training, load_evaluation])
@pytest.mark.parametrize(("section", "position", "key", "value"), WRONG_VALUES)
def test_a_wrong_value_is_refused_with_its_place(tmp_path, load, section, position, key, value):
    document = small()
    if value is MISSING:
        del document[section][position][key]
    else:
        document[section][position][key] = value
    with pytest.raises(AnnotationError) as caught:
        load(write(tmp_path, document), SPLIT)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'instances.json'}: {section}[{position}].{key}: expected ")
    assert ", found " in message
    assert "\n" not in message
    assert len(message) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("load", [load_training, load_evaluation])
@pytest.mark.parametrize("section", ["images", "categories", "annotations"])
@pytest.mark.parametrize("value", [MISSING, {}, None, "none"])
def test_a_missing_or_wrong_list_is_refused(tmp_path, load, section, value):
    document = small()
    del document[section]
    if value is not MISSING:
        document[section] = value
    with pytest.raises(AnnotationError, match=rf"json: {section}: expected a list"):
        load(write(tmp_path, document), SPLIT)


def test_an_entry_that_is_no_object_is_refused(tmp_path):
    document = small()
    document["annotations"][3] = [1, 2]
    with pytest.raises(AnnotationError, match=r"annotations\[3\]: expected an object, found \[1, 2\]"):
        load_training(write(tmp_path, document), SPLIT)


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"", "the file: expected JSON"),
        (b"not json", "the file: expected JSON"),
        (b'{"images": [', "the file: expected JSON"),
        (b"\xff\xfe{\x00}\x00", "the file: expected JSON"),
        (b"[" * 100_000, "the file: expected JSON"),
        (b'{"images": [{"id": ' + b"7" * 5000 + b"}]}", r"the file: .* more than 4300 digits at character 19\)"),
        (b"\xef\xbb\xbf{}", "byte 0: expected JSON, found a UTF-8 byte order mark"),
        (b"[]", r"\$: expected an object, found \[\]"),
    ],
)
def test_a_file_that_is_no_json_object_is_refused(tmp_path, content, place):
    path = tmp_path / "wrong.json"
    path.write_bytes(content)
    with pytest.raises(AnnotationError, match=f"wrong.json: {place}"):
        load_training(path, SPLIT)


def test_a_missing_file_or_a_folder_is_refused(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(AnnotationError, match="expected a readable file"):
            load_training(path, SPLIT)


def test_a_base_name_the_file_does_not_know_offers_the_nearest(tmp_path):
    split = Split(base=("cat", "dogs"), novel=())
    with pytest.raises(AnnotationError, match="categories: expected an entry named 'dogs'.* did you mean 'dog'"):
        load_training(write(tmp_path, small()), split)
    with pytest.raises(AnnotationError, match="found an empty list"):
        load_training(write(tmp_path, {**small(), "categories": []}), split)


def test_an_image_path_inside_the_folder_is_found(tmp_path):
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(root)
    assert resolve_image_path(root, "sub/a.png") == (root / "sub" / "a.png").resolve()
    assert resolve_image_path(link, "a..b.png") == (root / "a..b.png").resolve()
    (root / "inside.png").symlink_to(root / "sub" / "a.png")
    assert resolve_image_path(root, "inside.png") == (root / "sub" / "a.png").resolve()


@pytest.mark.parametrize(
    "name",
    ["", ".", "../x.png", "sub/../../x.png", "sub/../x.png", "/etc/passwd", "..\\x.png", "sub\\x.png", "C:/x.png"]
    + ["C:x.png", "//host/x.png", "x\0.png", "\ud800.png", "out.png", "away/x.png"],
)
def test_an_image_path_out_of_the_folder_is_refused(tmp_path, name):
    root = tmp_path / "images"
    root.mkdir()
    (tmp_path / "images_too").mkdir()
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "away").symlink_to(tmp_path / "images_too")
    with pytest.raises(AnnotationError, match="image file name"):
        resolve_image_path(root, name)


@pytest.mark.parametrize("name", ["loop", "x" * 5000])
def test_a_path_the_system_cannot_follow_is_refused_or_stays_inside(tmp_path, name):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    # Pythons differ in when they notice; the reader then meets a file it cannot open.
    with contextlib.suppress(AnnotationError):
        assert resolve_image_path(tmp_path, name).is_relative_to(tmp_path.resolve())


@pytest.mark.skipif("EZSD_PHOTOS" not in os.environ, reason="EZSD_PHOTOS does not name a folder of COCO photos")
@pytest.mark.parametrize("part", ["train2017", "val2017"])
def test_real_coco_annotations_load(tmp_path, part):
    path = Path(os.environ["EZSD_PHOTOS"]) / "annotations" / f"instances_{part}.json"
    training, evaluation = load_training(path, COCO_SPLIT), load_evaluation(path, COCO_SPLIT)
    assert 0 < len(training.box) < len(evaluation.box)
    is_base = (evaluation.class_index < len(COCO_SPLIT.base)) & ~evaluation.crowd
    assert np.array_equal(training.box, evaluation.box[is_base])
    document = json.loads(path.read_text())
    ids = {c["id"] for c in document["categories"] if c["name"] in COCO_SPLIT.base}
    stripped = copy.copy(document)
    stripped["annotations"] = [a for a in document["annotations"] if a["category_id"] in ids]
    assert same(load_training(write(tmp_path, stripped), COCO_SPLIT), training)
    for image in training.images:
        assert resolve_image_path(path.parent.parent / part, image.file_name).is_file()
