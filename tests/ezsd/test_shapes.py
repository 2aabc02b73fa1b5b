"""The embedded benchmark is a frozen, pure function of its seed, and its boxes are amodal and true."""

import hashlib

import numpy as np
import pytest

from ezsd.data import shapes
from ezsd.data.shapes import (
    DEV_SEED,
    IMAGE_SIZE,
    SHAPES_SPLIT,
    TEST_SEEDS,
    cluttered_picture,
    picture,
    scene,
)

# The freeze. A change of these is another benchmark: every reported figure would have to be measured again.
SCENES_SHA256 = "c4e986cac5836126149e5f5c1df0778eddbae2c61db5b253353e77947e1af60a"
PICTURES_SHA256 = "2c33a1be086af5728ea82011155a28b6af5c4ab8ab136bc2413d8d7ab9974029"
CLUTTERED_SHA256 = "f418756335044d02f3444b3c01b48e925ed8adf47aeeab53d396f7634b0c9f74"


@pytest.fixture(scope="module")
def scenes():
    return [scene(seed=11, split="train", index=i) for i in range(300)]


def rng():
    return np.random.default_rng(5)


def test_scenes_are_frozen():
    digest = hashlib.sha256()
    for seed, split, index in [(0, "train", 0), (0, "val", 1), (1, "train", 2), (3, "val", 3)]:
        drawn = scene(seed=seed, split=split, index=index)
        digest.update(drawn.pixels.tobytes() + drawn.boxes.tobytes())
    assert digest.hexdigest() == SCENES_SHA256


@pytest.mark.parametrize(("draw", "expected"), [(picture, PICTURES_SHA256), (cluttered_picture, CLUTTERED_SHA256)])
def test_pictures_are_frozen(draw, expected):
    digest = hashlib.sha256()
    for index in range(4):
        digest.update(draw(seed=20, index=index)[0].tobytes())
    assert digest.hexdigest() == expected


def test_names_and_seeds_are_frozen():
    assert (len(SHAPES_SPLIT.base), len(SHAPES_SPLIT.novel), len(set(SHAPES_SPLIT.names))) == (13, 7, 20)
    assert SHAPES_SPLIT.novel == ("cross", "ring", "gear", "star", "hourglass", "tee", "chevron")
    assert DEV_SEED not in TEST_SEEDS


def test_a_scene_is_the_same_every_time():
    first, again = scene(seed=3, split="val", index=8), scene(seed=3, split="val", index=8)
    assert np.array_equal(first.pixels, again.pixels)
    assert np.array_equal(first.boxes, again.boxes)
    assert first.names == again.names


@pytest.mark.parametrize("other", [{"seed": 4}, {"split": "train"}, {"index": 9}], ids=["seed", "split", "index"])
def test_another_seed_split_or_index_is_another_scene(other):
    key = {"seed": 3, "split": "val", "index": 8}
    first, second = scene(**key), scene(**(key | other))
    assert not np.array_equal(first.pixels, second.pixels)
    assert not np.array_equal(first.boxes, second.boxes)


def test_training_and_validation_share_no_scene():
    pixels = [scene(seed=0, split=s, index=i).pixels.tobytes() for s in ("train", "val") for i in range(20)]
    assert len(set(pixels)) == 40


def test_a_scene_holds_one_name_per_box(scenes):
    for drawn in scenes:
        assert drawn.pixels.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        assert drawn.pixels.dtype == np.uint8
        assert drawn.boxes.dtype == np.float32
        assert drawn.boxes.shape == (len(drawn.names), 4)
        assert 1 <= len(drawn.names) <= 6


def test_boxes_lie_inside_the_image(scenes):
    boxes = np.concatenate([drawn.boxes for drawn in scenes])
    assert boxes.min() >= 0
    assert boxes.max() <= IMAGE_SIZE
    assert ((boxes[:, 2:] - boxes[:, :2]) > 8).all()


def test_all_names_occur_in_300_scenes(scenes):
    assert {name for drawn in scenes for name in drawn.names} == set(SHAPES_SPLIT.names)


def test_extents_depend_on_the_class(scenes):
    aspects = {name: [] for name in SHAPES_SPLIT.names}
    for drawn in scenes:
        for (x1, y1, x2, y2), name in zip(drawn.boxes, drawn.names, strict=True):
            aspects[name].append((x2 - x1) / (y2 - y1))
    assert min(aspects["bar"]) > 1.5
    assert min(aspects["arrow"]) > 1.2
    assert max(aspects["bolt"]) < 0.9
    assert max(aspects["diamond"]) < 0.9
    assert np.median(aspects["circle"]) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("name", SHAPES_SPLIT.names)
def test_a_box_is_the_extent_of_the_whole_outline(name):
    points, box = shapes._place(rng(), name, [])
    covered = shapes._mask(points, IMAGE_SIZE) > 0
    columns, rows = np.flatnonzero(covered.any(0)), np.flatnonzero(covered.any(1))
    extent = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    # Coverage is counted in whole pixels, the box is not.
    assert np.abs(np.array(extent) - box).max() <= 1.3


def test_an_occluder_hides_part_of_an_object_and_not_its_box(monkeypatch):
    visible = {}

    def occlude_and_look(canvas, generator, box):
        x1, y1, x2, y2 = np.rint(box).astype(int)
        before = canvas[y1:y2, x1:x2].copy()
        occlude(canvas, generator, box)
        visible[tuple(box)] = (canvas[y1:y2, x1:x2] == before).all(2).mean()

    occlude = shapes._occlude
    monkeypatch.setattr(shapes, "_occlude", occlude_and_look)
    drawn = [scene(seed=2, split="train", index=i) for i in range(20)]
    boxes = {tuple(box) for one in drawn for box in one.boxes}
    assert len(visible) > 5
    assert set(visible) <= boxes
    assert all(0.4 < share < 1 for share in visible.values())


def test_objects_hardly_overlap(scenes):
    for drawn in scenes[:100]:
        for i, first in enumerate(drawn.boxes):
            for second in drawn.boxes[i + 1 :]:
                wide, high = np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2])
                smaller = min(np.prod(first[2:] - first[:2]), np.prod(second[2:] - second[:2]))
                assert max(wide, 0) * max(high, 0) <= 0.121 * smaller


@pytest.mark.parametrize("draw", [picture, cluttered_picture])
def test_a_picture_says_what_it_shows(draw):
    labels = [draw(seed=1, index=i) for i in range(400)]
    assert {shape for _, _, _, shape in labels} == {*SHAPES_SPLIT.names, "background"}
    for pixels, colour, texture, shape in labels:
        assert pixels.shape == (32, 32, 3)
        assert pixels.dtype == np.uint8
        if shape == "background":
            assert (colour, texture) == ("", "")
        else:
            assert colour in shapes.COLOURS
            assert texture in shapes.TEXTURES


@pytest.mark.parametrize("draw", [picture, cluttered_picture])
def test_a_picture_is_the_same_every_time(draw):
    first, again, other = (draw(seed=1, index=i)[0] for i in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
