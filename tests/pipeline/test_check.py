"""`ezsd data check`: one pass, every fault with its place, and none where there is none."""

import json

import numpy as np
import pytest
from PIL import Image

from ezsd.pipeline.data.check import check_dataset, check_table
from ezsd.pipeline.data.datasets import find_dataset
from ezsd.vocabulary import COCO_SPLIT

TOML = """
name = "own"
[train]
images = "photos"
annotations = "train.json"
[val]
images = "photos"
annotations = "val.json"
[classes]
base = ["cat", "dog"]
novel = ["cow"]
"""


def sound():
    return {
        "images": [{"id": k, "file_name": f"{k}.png", "width": 20, "height": 10} for k in range(4)],
        "categories": [{"id": k, "name": name} for k, name in enumerate(["cow", "dog", "cat", "kite"])],
        "annotations": [
            {"id": 5, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]},
            {"id": 6, "image_id": 1, "category_id": 0, "bbox": [1, 2, 3, 4]},
            {"id": 7, "image_id": 2, "category_id": 3, "bbox": [1, 2, 3, 4]},
            {"id": 8, "image_id": 0, "category_id": 2, "bbox": [1, 2, 3, 4], "iscrowd": 1},
        ],
    }


def buildable():
    """A sound training file: with base boxes to learn re-normalisation from, and others to measure it on."""
    document = sound()
    document["annotations"].append({"id": 9, "image_id": 2, "category_id": 2, "bbox": [1, 2, 3, 4]})
    return document


@pytest.fixture
def own(tmp_path):
    """Checks a dataset whose training file is the given document."""
    (tmp_path / "photos").mkdir()
    noise = np.random.default_rng(0)
    for k in range(4):
        Image.fromarray(noise.integers(0, 256, (10, 20, 3), np.uint8)).save(tmp_path / f"photos/{k}.png")
    (tmp_path / "own.toml").write_text(TOML)
    (tmp_path / "val.json").write_text(json.dumps(sound()))

    def check(document, **options):
        text = document if isinstance(document, str) else json.dumps(document)
        (tmp_path / "train.json").write_text(text)
        return check_dataset(find_dataset(str(tmp_path / "own.toml")), **options)

    check.root = tmp_path
    return check


def test_a_sound_dataset_has_no_problems_and_is_counted(own):
    found = own(buildable())
    assert (found.problems, found.warnings) == ([], [])
    counts = [(p.images, p.without_boxes, p.base, p.novel, p.other, p.crowd) for p in found.parts]
    assert counts == [(4, 2, 2, 1, 1, 1), (4, 3, 1, 1, 1, 1)]
    assert "2 base and 1 novel name, nothing wrong" in check_table(found)


def test_everything_wrong_is_told_in_one_pass_with_its_place(own):
    document = sound()
    document["images"] += [
        {"id": 0, "file_name": "0.png", "width": 20, "height": 10},
        {"id": 11, "file_name": "../own.toml", "width": 20, "height": 10},
        {"id": 12, "file_name": "none.png", "width": 20, "height": 10},
        {"id": -1, "file_name": "text.png", "width": 20, "height": 0},
    ]
    (own.root / "photos/text.png").write_text("no picture")
    document["images"][3]["width"] = 21
    document["categories"][1]["name"] = "Dog"
    document["categories"] += [{"id": 9, "name": "ki-te"}, {"id": 9, "name": "cow"}]
    box = {"id": 20, "image_id": 1, "category_id": 0, "bbox": [1, 2, 3, 4]}
    document["annotations"] += [
        box | {"bbox": [1, 2, float("nan"), 4]},
        box | {"id": 21, "bbox": [1, 2, 0, 4]},
        box | {"id": 22, "bbox": [20, 2, 3, 4]},
        box | {"id": 5},
        box | {"id": 23, "image_id": 77},
        box | {"id": 24, "category_id": 78},
        7,
    ]
    found = own(document)
    refused, known = (
        sorted(line.removeprefix(f"{own.root}/train.json: ").split(": ")[0] for line in lines)
        for lines in (found.problems, found.warnings)
    )
    assert refused == sorted(
        ["images[7].id", "images[7].height", "images[4].id", "images[4].file_name"]
        + ["categories[5].id", "categories[5].name", "categories"]
        + ["annotations[9].category_id", "annotations[10]"]
        + ["images[3]", "images[5].file_name", "images[6].file_name", "images[7].file_name"]
    )
    # Training looks at no novel box, and leaves empty ones out: these are only to be known.
    assert known == sorted(
        ["annotations[4].bbox", "annotations[5].bbox", "annotations[6].bbox", "annotations[7].id"]
        + ["annotations[8].image_id", "categories[4].name"]
    )
    problems = found.problems + found.warnings
    for words in ("named 'dog'", "did you mean 'Dog'", "nearly categories[3].name, 'kite'", "21 x 10 pixels"):
        assert any(words in problem for problem in problems), words
    for words in ("without an area", "outside the image of 20 x 10", "no such image", "is not an image", "holds '..'"):
        assert any(words in problem for problem in problems), words
    assert not any("\n" in problem for problem in problems)


def test_outlines_are_looked_at_where_masks_need_them(own):
    """Of base objects to learn from, of all in the split to evaluate by; crowds are never learned."""
    document = sound()
    triangle = [[1, 2, 4, 2, 4, 6]]
    document["annotations"][0]["segmentation"] = [[1, 2, 4, 2]]
    document["annotations"] += [
        {"id": 9, "image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 4], "segmentation": triangle},
        {"id": 10, "image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 4]},
        {"id": 11, "image_id": 78, "category_id": 2, "bbox": [1, 2, 3, 4]},
    ]
    assert len(own(document).problems) == 1
    problems = own(document, masks=True).problems
    places = [
        problem.removeprefix(f"{own.root}/").split(": expected ")[0]
        for problem in problems
        if ".segmentation" in problem
    ]
    assert places[:2] == [f"train.json: annotations[{k}].segmentation" for k in (0, 5)]
    # The other file has none at all.
    assert places[2:] == [
        "val.json: annotations: all 3 outlines needed are missing or wrong, like annotations[0].segmentation"
    ]
    assert len(problems) == 1 + len(places)


def test_a_fault_that_repeats_is_one_line_with_its_number(own):
    """As via-export writes: ids in quotes, one categories entry for each region."""
    document = buildable()
    document["categories"] += [dict(document["categories"][2]) for _ in range(5)]
    for one in document["annotations"]:
        one["image_id"] = str(one["image_id"])
    problems = [line.removeprefix(f"{own.root}/train.json: ") for line in own(document).problems]
    assert problems == [
        "categories[4].name: expected a name different from categories[2].name, found 'cat'. It is the same category "
        "again: keep one entry. (5 like this, the next is categories[5].name)",
        "annotations[0].image_id: expected a whole number of at most 64 bits, found '1'. Write it as a plain number, "
        "without quotes. (3 like this, the next is annotations[3].image_id)",
    ]


def test_others_do_not_stop_the_list_of_faults(own):
    toml = own.root / "own.toml"
    toml.write_text(TOML.replace('["cow"]', '"others"'))
    document = buildable()
    document["categories"] += [{"id": 9}, {"id": 7, "name": "cat"}]
    document["annotations"][0]["bbox"] = "none"
    (own.root / "train.json").write_text(json.dumps(document))
    found = check_dataset(find_dataset(str(toml), strict=False))
    places = [line.removeprefix(f"{own.root}/train.json: ").split(": ")[0] for line in found.problems]
    assert places == ["categories[4].name", "categories[5].name", "annotations[0].bbox"]
    assert found.dataset.split.novel == ("cow", "kite")


def test_a_file_that_is_no_json_is_one_problem_and_the_other_is_still_read(own):
    found = own('{"images": [')
    assert len(found.problems) == 1
    assert "train.json: the file: expected JSON" in found.problems[0]
    assert [part.name for part in found.parts] == ["val"]


def test_a_cut_image_is_found_when_every_pixel_is_read(own):
    path = own.root / "photos/2.png"
    path.write_bytes(path.read_bytes()[:-300])
    assert own(buildable()).problems == []
    problems = own(buildable(), decode=True).problems
    # Both files name it.
    assert len(problems) == 2
    assert all("images[2].file_name" in problem and "cannot be read" in problem for problem in problems)


def test_real_photos_are_sound(photos):
    found = check_dataset(find_dataset("coco", photos), decode=True, masks=True)
    assert found.problems == []
    assert [(part.name, part.images) for part in found.parts] == [("train", 80), ("val", 57)]
    assert found.dataset.split == COCO_SPLIT
