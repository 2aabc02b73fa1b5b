"""Scores agree with pycocotools run by hand, and mean what their names say."""

import contextlib
import io
import json
import random

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ezsd.data.annotations import AnnotationError, load_evaluation
from ezsd.metrics import Detections, evaluate, recall_at
from ezsd.vocabulary import Split, VocabularyError

SPLIT = Split(base=("cat", "dog"), novel=("cow", "yak"))
# Ids far from positions, in another order than the split's; "kite" is outside it.
CATEGORY = {"cow": 5, "cat": 90, "kite": 7, "dog": 31, "yak": 2}


def write(folder, *, crowd=False, classes=("cat", "dog", "cow")):
    """Six images of 100 x 100 with one box of every class each, ids with gaps and a 0."""
    annotations = []
    for image in range(6):
        for position, name in enumerate(classes):
            entry = {"id": len(annotations), "image_id": 10 * image + 3, "category_id": CATEGORY[name]}
            box = [10 + 3 * image, 25 * position, 20 + 5 * image, 20 + position]
            annotations.append(entry | {"bbox": box, "area": box[2] * box[3], "iscrowd": int(crowd and image == 0)})
    document = {
        "images": [{"id": 10 * i + 3, "file_name": f"{i}.png", "width": 100, "height": 100} for i in range(6)],
        "categories": [{"id": number, "name": name} for name, number in CATEGORY.items()],
        "annotations": annotations,
    }
    path = folder / "instances.json"
    path.write_text(json.dumps(document))
    return path


def perfect(path):
    truth = load_evaluation(path, SPLIT)
    ids = np.array([image.id for image in truth.images])
    return detections(ids[truth.image_index], truth.box, np.full(len(truth.box), 0.5), truth.class_index)


def detections(image_id, box, score, class_index):
    return Detections(
        image_id=np.asarray(image_id, dtype=np.int64),
        box=np.asarray(box, dtype=np.float32).reshape(-1, 4),
        score=np.asarray(score, dtype=np.float32),
        class_index=np.asarray(class_index, dtype=np.int64),
    )


def noisy(path, count=400, seed=0):
    """Boxes around true ones with random classes and few distinct scores, so that many are equal."""
    rng = np.random.default_rng(seed)
    truth = perfect(path)
    pick = rng.integers(0, len(truth.box), count)
    box = truth.box[pick] + rng.normal(0, 3, (count, 4))
    box[:, 2:] = np.maximum(box[:, 2:], box[:, :2])
    keep_class = rng.random(count) < 0.7
    class_index = np.where(keep_class, truth.class_index[pick], rng.integers(0, 4, count))
    return detections(truth.image_id[pick], box, rng.integers(0, 20, count) / 20, class_index)


def test_perfect_detections_score_one_in_every_group(tmp_path):
    path = write(tmp_path)
    found = evaluate(path, perfect(path), SPLIT)
    for group, classes in (("base", 2), ("novel", 1), ("all", 3)):
        assert found[group] == {"AP": 1, "AP50": 1, "AP75": 1, "AR100": 1, "classes": classes, "boxes": 6 * classes}
    assert found["AP50_per_class"] == {"cat": 1, "dog": 1, "cow": 1, "yak": None}
    assert (found["iou_type"], found["max_detections"], found["images"]) == ("bbox", 100, 6)


def test_swapped_names_score_zero(tmp_path):
    path = write(tmp_path)
    right = perfect(path)
    swapped = detections(right.image_id, right.box, right.score, np.array([1, 2, 0])[right.class_index])
    assert [evaluate(path, swapped, SPLIT)[group]["AP50"] for group in ("base", "novel", "all")] == [0, 0, 0]


def test_no_detections_score_zero_and_not_none(tmp_path):
    found = evaluate(write(tmp_path), detections([], [], [], []), SPLIT)
    assert [found[group]["AP"] for group in ("base", "novel", "all")] == [0, 0, 0]
    assert found["all"]["AR100"] == 0


def test_a_group_without_ground_truth_is_none(tmp_path):
    path = write(tmp_path, classes=("cat",))
    found = evaluate(path, perfect(path), SPLIT)
    assert found["novel"] == {"AP": None, "AP50": None, "AP75": None, "AR100": None, "classes": 0, "boxes": 0}
    assert found["all"] == found["base"]


def test_scores_agree_with_pycocotools_by_hand(tmp_path):
    path = write(tmp_path, crowd=True)
    given = noisy(path)
    found = evaluate(path, given, SPLIT)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        # Its own id 0 would count as no match.
        for entry in truth.dataset["annotations"]:
            entry["id"] += 1
        truth.createIndex()
        xywh = np.concatenate([given.box[:, :2], given.box[:, 2:] - given.box[:, :2]], axis=1).astype(float)
        order = np.lexsort((*xywh.T, given.class_index, -given.score, given.image_id))
        names = [SPLIT.names[index] for index in given.class_index]
        rows = [
            {
                "image_id": int(given.image_id[i]),
                "category_id": CATEGORY[names[i]],
                "bbox": xywh[i].tolist(),
                "score": float(given.score[i]),
            }
            for i in order
        ]
        for group, members in (("base", SPLIT.base), ("novel", SPLIT.novel), ("all", SPLIT.names)):
            run = COCOeval(truth, truth.loadRes([dict(row) for row in rows]), "bbox")
            run.params.catIds = [CATEGORY[name] for name in members]
            run.evaluate()
            run.accumulate()
            run.summarize()
            scores = [found[group][key] for key in ("AP", "AP50", "AP75", "AR100")]
            assert scores == pytest.approx(list(run.stats[[0, 1, 2, 8]]), abs=1e-9)
            assert 0 < scores[0] < scores[1] < 1


def test_the_order_of_detections_does_not_matter(tmp_path):
    path = write(tmp_path)
    given = noisy(path)
    first = evaluate(path, given, SPLIT)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(given.box))
        shuffled = detections(given.image_id[order], given.box[order], given.score[order], given.class_index[order])
        assert evaluate(path, shuffled, SPLIT) == first


def test_names_restrict_the_classes_evaluated(tmp_path):
    path = write(tmp_path)
    found = evaluate(path, perfect(path), SPLIT, names=("yak", "cow"))
    assert found["names"] == ["cow", "yak"]
    assert found["base"]["AP50"] is None
    assert found["novel"] == found["all"]
    assert found["AP50_per_class"] == {"cat": None, "dog": None, "cow": 1, "yak": None}
    with pytest.raises(VocabularyError, match="did you mean 'cow'"):
        evaluate(path, perfect(path), SPLIT, names=("cows",))


def test_only_the_best_hundred_of_an_image_and_class_count(tmp_path):
    path = write(tmp_path, classes=("cat",))
    right = perfect(path)
    # One hundred surer misses in the first image push its only hit out, and only there.
    image_id = np.concatenate([np.full(100, 3), right.image_id])
    box = np.concatenate([np.full((100, 4), [80, 80, 90, 90]), right.box])
    score = np.concatenate([np.full(100, 0.9), right.score])
    found = evaluate(path, detections(image_id, box, score, np.zeros(106)), SPLIT)
    assert found["all"]["AR100"] == pytest.approx(5 / 6)


def test_the_result_goes_into_json_and_nothing_is_printed(tmp_path, capsys):
    path = write(tmp_path)
    found = evaluate(path, noisy(path), SPLIT)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert capsys.readouterr() == ("", "")


def test_detections_pointing_at_nothing_are_refused(tmp_path):
    path = write(tmp_path)
    box = [[0, 0, 1, 1]]
    with pytest.raises(ValueError, match="image 4,"):
        evaluate(path, detections([4], box, [1], [0]), SPLIT)
    for index in (-1, 4):
        with pytest.raises(ValueError, match=f"class index {index}"):
            evaluate(path, detections([3], box, [1], [index]), SPLIT)
    with pytest.raises(ValueError, match="iou_type"):
        evaluate(path, perfect(path), SPLIT, iou_type="segm")
    with pytest.raises(AnnotationError, match="readable file"):
        evaluate(tmp_path / "none.json", perfect(path), SPLIT)


@pytest.mark.parametrize(
    ("box", "score", "message"),
    [
        ([[0, 0, 1, float("nan")]], [1], "finite"),
        ([[0, 0, 1, 1]], [float("inf")], "finite"),
        ([[5, 0, 1, 1]], [1], "x1 <= x2"),
        ([[0, 0, 1, 1]], [1, 2], "score must have shape"),
        ([[0, 0, 1, 1], [0, 0, 1, 1]], [1], "box must have shape"),
    ],
)
def test_malformed_detections_are_refused(box, score, message):
    with pytest.raises(ValueError, match=message):
        detections([3], box, score, [0])


def test_recall_counts_objects_covered_by_the_first_boxes():
    truth = [np.array([[0, 0, 10, 10], [50, 50, 60, 60]], np.float32), np.zeros((0, 4), np.float32)]
    proposals = [np.array([[90, 90, 99, 99], [0, 0, 10, 5], [50, 50, 60, 61]], np.float32), truth[0]]
    assert recall_at(proposals, truth, top=(1, 2, 3)) == {1: 0, 2: 0.5, 3: 1}
    assert recall_at(proposals, truth, iou=0.6, top=(2, 3)) == {2: 0, 3: 0.5}


def test_recall_takes_tensors_and_read_only_arrays_and_any_count():
    boxes = np.array([[0, 0, 10, 10]], np.float32)
    boxes.setflags(write=False)
    assert recall_at([torch.tensor([[0.0, 0.0, 10.0, 10.0]])], [boxes]) == {100: 1, 300: 1}
    assert recall_at([np.zeros((0, 4), np.float32)], [boxes]) == {100: 0, 300: 0}
    assert recall_at([boxes], [np.zeros((0, 4), np.float32)]) == {100: None, 300: None}


@pytest.mark.parametrize(("extra", "message"), [({"iou": 0}, "iou"), ({"top": (0,)}, "every k")])
def test_recall_refuses_senseless_numbers(extra, message):
    boxes = [np.zeros((1, 4), np.float32)]
    with pytest.raises(ValueError, match=message):
        recall_at(boxes, boxes, **extra)
    with pytest.raises(ValueError, match="images"):
        recall_at(boxes, [])


def test_recall_does_not_depend_on_the_order_within_the_first_k():
    rng = random.Random(0)
    corners = [(rng.uniform(0, 80), rng.uniform(0, 80)) for _ in range(30)]
    boxes = np.array([[x, y, x + 15, y + 15] for x, y in corners], np.float32)
    assert recall_at([boxes], [boxes[:5]], top=(30,)) == recall_at([boxes[::-1]], [boxes[:5]], top=(30,)) == {30: 1}
