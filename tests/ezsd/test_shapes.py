"""The embedded benchmark is a frozen, pure function of its seed, and its boxes are amodal and true."""

import hashlib

import numpy as np
import pytest

from ezsd.data import shapes
from ezsd.data.shapes import (
    DEV_SEED,
    IMAGE_SIZE,
    SHAPES_SPLIT,
    SPLITS,
    TEST_SEEDS,
    cluttered_picture,
    picture,
    scene,
)

# The freeze. A change of these is another benchmark: every reported figure would have to be measured again.
SCENES_SHA256 = "c4e986cac5836126149e5f5c1df0778eddbae2c61db5b253353e77947e1af60a"
CLUTTER_SHA256 = "ab821aeebc4c056402b0c1e473631c4ebe5cd82e6efa267804b20a9acd913bef"
PICTURES_SHA256 = "2c33a1be086af5728ea82011155a28b6af5c4ab8ab136bc2413d8d7ab9974029"
CLUTTERED_SHA256 = "f418756335044d02f3444b3c01b48e925ed8adf47aeeab53d396f7634b0c9f74"


@pytest.fixture(scope="module")
def scenes():
    return [scene(seed=11, split="train", index=i) for i in range(300)]


@pytest.fixture(scope="module")
def cluttered():
    return [scene(seed=11, split="train", index=i, benchmark="clutter") for i in range(100)]


def rng():
    return np.random.default_rng(5)


@pytest.mark.parametrize(("benchmark", "expected"), [("shapes", SCENES_SHA256), ("clutter", CLUTTER_SHA256)])
def test_scenes_are_frozen(benchmark, expected):
    digest = hashlib.sha256()
    for seed, split, index in [(0, "train", 0), (0, "val", 1), (1, "train", 2), (3, "val", 3)]:
        drawn = scene(seed=seed, split=split, index=index, benchmark=benchmark)
        digest.update(drawn.pixels.tobytes() + drawn.boxes.tobytes())
    assert digest.hexdigest() == expected


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


def test_every_name_is_novel_in_one_or_two_of_four_splits():
    assert SPLITS[0] == SHAPES_SPLIT
    assert SPLITS[1].novel == ("circle", "square", "triangle", "hexagon", "diamond", "arrow", "bar")
    assert SPLITS[2].novel == ("ellipse", "trapezoid", "heart", "moon", "drop", "bolt", "cross")
    assert SPLITS[3].novel == ("ring", "hourglass", "circle", "hexagon", "bar", "heart", "bolt")
    for split in SPLITS:
        assert sorted(split.names) == sorted(SHAPES_SPLIT.names)
        assert (len(split.base), len(split.novel)) == (13, 7)
        assert max(len({*split.novel} & {*other.novel}) for other in SPLITS if other != split) <= 3
    counts = [sum(name in split.novel for split in SPLITS) for name in SHAPES_SPLIT.names]
    assert {*counts} == {1, 2}


def test_clutter_holds_three_to_six_distractors_beside_its_objects(scenes, cluttered):
    assert all(len(drawn.distractors) == 0 for drawn in scenes)
    assert {len(drawn.distractors) for drawn in cluttered} == {3, 4, 5, 6}
    assert sum(len(drawn.boxes) == 0 for drawn in cluttered) < 5
    for drawn in cluttered:
        assert {*drawn.names} <= {*SHAPES_SPLIT.names}
        assert drawn.boxes.shape == (len(drawn.names), 4)
        assert drawn.distractors.dtype == np.float32
        boxes = np.concatenate([drawn.distractors, drawn.boxes])
        assert (boxes >= 0).all()
        assert (boxes <= IMAGE_SIZE).all()


def test_distractors_are_painted_as_objects_are(monkeypatch):
    """The same calls, so that neither colour, texture, contrast nor occluders tell them apart."""
    painted, hidden = [], []
    paint, occlude = shapes._paint, shapes._occlude
    monkeypatch.setattr(shapes, "_paint", lambda *given, **key: painted.append(key) or paint(*given, **key))
    monkeypatch.setattr(shapes, "_occlude", lambda *given: hidden.append(tuple(given[2])) or occlude(*given))
    drawn = [scene(seed=11, split="val", index=i, benchmark="clutter") for i in range(40)]
    assert len(painted) == sum(len(one.boxes) + len(one.distractors) for one in drawn)
    assert all(0.7 <= one["contrast"] <= 1 for one in painted)
    assert {tuple(box) for one in drawn for box in one.distractors} & {*hidden}
    assert {tuple(box) for one in drawn for box in one.boxes} & {*hidden}


def test_no_two_distractors_have_one_outline_and_all_have_a_notch():
    outlines = [shapes._blob(np.random.default_rng(i)) for i in range(100)]
    assert len({one.tobytes() for one in outlines}) == 100
    for one in outlines:
        ahead, turn = np.roll(one, -1, 0) - one, np.roll(one, -2, 0) - np.roll(one, -1, 0)
        # A convex outline turns one way alone.
        assert len({*np.sign(ahead[:, 0] * turn[:, 1] - ahead[:, 1] * turn[:, 0])}) > 1


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


def test_training_and_validation_of_both_benchmarks_share_no_scene():
    pixels = [
        scene(seed=0, split=split, index=i, benchmark=benchmark).pixels.tobytes()
        for benchmark in ("shapes", "clutter")
        for split in ("train", "val")
        for i in range(20)
    ]
    assert len(set(pixels)) == 80


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


def test_objects_hardly_overlap(scenes, cluttered):
    for drawn in (*scenes[:100], *cluttered):
        boxes = np.concatenate([drawn.distractors, drawn.boxes])
        for i, first in enumerate(boxes):
            for second in boxes[i + 1 :]:
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
