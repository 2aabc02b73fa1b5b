"""Scores are those of pycocotools and mean what their names say."""

import contextlib
import dataclasses
import io
import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ezsd.data.annotations import load_evaluation
from ezsd.data.masks import decompress, to_run_lengths
from ezsd.errors import AnnotationError, VocabularyError
from ezsd.metrics import Limit, Results, evaluate, evaluate_at, read_truth
from ezsd.vocabulary import Split

SIZES = ("small", "medium", "large")
FIGURES = ("AP50", "AP75", "AP", *(f"AP_{size}" for size in SIZES), "AR", *(f"AR_{size}" for size in SIZES))
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
    """Results of boxes xyxy."""
    box = np.asarray(box, dtype=np.float64).reshape(-1, 4)
    return Results(
        image_id=np.asarray(image_id, dtype=np.int64),
        xywh=np.concatenate([box[:, :2], box[:, 2:] - box[:, :2]], axis=1),
        score=np.asarray(score, dtype=np.float64),
        class_index=np.asarray(class_index, dtype=np.int64),
    )


def xyxy(results):
    """Boxes xyxy of results."""
    return np.concatenate([results.xywh[:, :2], results.xywh[:, :2] + results.xywh[:, 2:]], axis=1)


def noisy(path, count=400, seed=0):
    """Boxes around true ones with random classes and few distinct scores, so that many are equal."""
    rng = np.random.default_rng(seed)
    truth = perfect(path)
    pick = rng.integers(0, len(truth.score), count)
    box = xyxy(truth)[pick] + rng.normal(0, 3, (count, 4))
    box[:, 2:] = np.maximum(box[:, 2:], box[:, :2])
    keep_class = rng.random(count) < 0.7
    class_index = np.where(keep_class, truth.class_index[pick], rng.integers(0, 4, count))
    return detections(truth.image_id[pick], box, rng.integers(0, 20, count) / 20, class_index)


def perfectly(score):
    """Figures of a scene of small objects alone."""
    return {key: None if key.endswith(("medium", "large")) else score for key in FIGURES}


def test_perfect_detections_score_one_in_every_group(tmp_path):
    path = write(tmp_path)
    found = evaluate(path, perfect(path), SPLIT)
    for group, classes in (("base", 2), ("novel", 1), ("all", 3)):
        assert found[group] == perfectly(1) | {"classes": classes, "boxes": 6 * classes}
    assert found["per_class"]["cow"] == perfectly(1) | {"boxes": 6}
    assert found["per_class"]["yak"] == dict.fromkeys(FIGURES) | {"boxes": 0}
    said = {key: found[key] for key in ("rules", "iou_type", "max_detections", "counted_per", "images")}
    assert said == {
        "rules": "coco",
        "iou_type": "bbox",
        "max_detections": 100,
        "counted_per": "image",
        "images": 6,
    }


def test_swapped_names_score_zero(tmp_path):
    path = write(tmp_path)
    right = perfect(path)
    swapped = dataclasses.replace(right, class_index=np.array([1, 2, 0])[right.class_index])
    assert [evaluate(path, swapped, SPLIT)[group]["AP50"] for group in ("base", "novel", "all")] == [0, 0, 0]


def test_no_detections_score_zero_and_not_none(tmp_path):
    found = evaluate(write(tmp_path), detections([], [], [], []), SPLIT)
    assert [found[group]["AP"] for group in ("base", "novel", "all")] == [0, 0, 0]
    assert found["all"]["AR"] == 0


def test_a_group_without_ground_truth_is_none(tmp_path):
    path = write(tmp_path, classes=("cat",))
    found = evaluate(path, perfect(path), SPLIT)
    assert found["novel"] == dict.fromkeys(FIGURES) | {"classes": 0, "boxes": 0}
    assert found["all"] == found["base"]


def crowded_scene(folder, seed):
    """Random boxes on a coarse grid, so that overlaps tie and meet the thresholds exactly; some are crowds.

    The last image has no box; the last class has crowds alone.
    """
    rng = np.random.default_rng(seed)
    annotations = []
    for number in range(60):
        name = ("cat", "dog", "cow", "kite", "yak")[min(number // 12, 4)]
        x, y, w, h = (10 * rng.integers((0, 0, 1, 1), (6, 6, 5, 5))).tolist()
        entry = {"id": number + 1, "image_id": int(10 * rng.integers(0, 5) + 3), "category_id": CATEGORY[name]}
        crowd = int(name == "yak" or rng.random() < 0.2)
        # What is stated counts, of every size class.
        area = w * h * int(rng.choice([1, 1, 3, 8]))
        annotations.append(entry | {"bbox": [x, y, w, h], "area": area, "iscrowd": crowd})
    document = {
        "images": [{"id": 10 * i + 3, "file_name": f"{i}.png", "width": 100, "height": 100} for i in range(6)],
        "categories": [{"id": number, "name": name} for name, number in CATEGORY.items()],
        "annotations": annotations,
    }
    path = folder / "crowded.json"
    path.write_text(json.dumps(document))
    count = 300
    # Half of them lie on a box, of its class.
    corner, side = 10 * rng.integers(0, 6, (count, 2)), 10 * rng.integers(0, 5, (count, 2))
    box = np.concatenate([corner, corner + side], axis=1)
    image_id, class_index = 10 * rng.integers(0, 6, count) + 3, rng.integers(0, 4, count)
    known = [entry for entry in annotations if entry["category_id"] != CATEGORY["kite"]]
    for one in range(0, count, 2):
        entry = known[rng.integers(0, len(known))]
        x, y, w, h = entry["bbox"]
        box[one], image_id[one] = [x, y, x + w, y + h], entry["image_id"]
        class_index[one] = next(i for i, name in enumerate(SPLIT.names) if CATEGORY[name] == entry["category_id"])
    return path, detections(image_id, box, rng.integers(0, 8, count) / 8, class_index)


def by_pycocotools(path, given, members, count, shape="bbox"):
    """The `FIGURES` of these classes as pycocotools itself has them."""
    rows = [
        {
            "image_id": int(given.image_id[i]),
            "category_id": CATEGORY[SPLIT.names[given.class_index[i]]],
            "bbox": given.xywh[i].tolist(),
            "score": float(given.score[i]),
        }
        for i in range(len(given.score))
    ]
    if shape == "segm":
        for row, counts in zip(rows, given.masks, strict=True):
            del row["bbox"]
            row["segmentation"] = {"size": [100, 100], "counts": counts}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        run = COCOeval(truth, truth.loadRes(rows), shape)
        run.params.catIds = [CATEGORY[name] for name in members]
        run.params.maxDets = [count]
        run.evaluate()
        run.accumulate()
    assert run.params.areaRngLbl == ["all", "small", "medium", "large"]
    precision, recall = run.eval["precision"][..., 0], run.eval["recall"][..., 0]
    curves = [precision[0, ..., 0], precision[5, ..., 0]]
    curves += [values[..., size] for values in (precision, recall) for size in range(4)]
    return [float(values[values > -1].mean()) if (values > -1).any() else None for values in curves]


def masked_scene(folder, seed):
    """`crowded_scene` with an outline for every box: polygons, and run lengths for crowds."""
    path, given = crowded_scene(folder, seed)
    rng = np.random.default_rng(seed)

    def outline(x, y, w, h):
        corners = [[x, y], [x + w, y], [x + w, y + h], [x, y + h]]
        return [np.array(corners[: 3 if rng.random() < 0.5 else 4], dtype=float)]

    document = json.loads(path.read_text())
    for one in document["annotations"]:
        rings = outline(*one["bbox"])
        one["segmentation"] = [ring.ravel().tolist() for ring in rings]
        if one["iscrowd"]:
            counts = decompress(to_run_lengths(rings, 100, 100)).tolist()
            one["segmentation"] = {"size": [100, 100], "counts": counts}
    path.write_text(json.dumps(document))
    # A side of 0 makes a mask of nothing.
    masks = tuple(to_run_lengths(outline(*box), 100, 100) for box in given.xywh)
    return path, dataclasses.replace(given, masks=masks)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [2, 100])
def test_scores_of_masks_are_those_of_pycocotools(tmp_path, seed, count):
    path, given = masked_scene(tmp_path, seed)
    limit = Limit(count, per_class=True)
    truth = read_truth(path, SPLIT, masks=True)
    found = evaluate_at(truth, given, limits=[limit], shape="segm")[limit.label]
    for group, members in (("base", SPLIT.base), ("novel", SPLIT.novel), ("all", SPLIT.names)):
        expected = by_pycocotools(path, given, members, count, "segm")
        assert figures(found[group]) == pytest.approx(expected, abs=1e-12)
    for name in SPLIT.names:
        assert figures(found["per_class"][name]) == by_pycocotools(path, given, [name], count, "segm")
    assert 0 < found["all"]["AP"] < 1
    assert found["all"]["AP"] != evaluate_at(truth, given, limits=[limit])[limit.label]["all"]["AP"]


def test_truth_without_outlines_has_no_masks(tmp_path):
    with pytest.raises(AnnotationError, match=r"annotations\[0\].segmentation: .*found nothing"):
        read_truth(write(tmp_path), SPLIT, masks=True)
    with pytest.raises(ValueError, match="1 need as many masks, got 2"):
        dataclasses.replace(detections([3], [[0, 0, 1, 1]], [1], [0]), masks=(b"", b""))


def figures(scores):
    return [scores[key] for key in FIGURES]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [2, 100])
def test_scores_are_those_of_pycocotools(tmp_path, seed, count):
    path, given = crowded_scene(tmp_path, seed)
    found = evaluate(path, given, SPLIT, limit=Limit(count, per_class=True))
    for group, members in (("base", SPLIT.base), ("novel", SPLIT.novel), ("all", SPLIT.names)):
        expected = by_pycocotools(path, given, members, count)
        # Classes stand in another order there, which the last digit of a mean notices.
        assert figures(found[group]) == pytest.approx(expected, abs=1e-12)
    for name in SPLIT.names:
        assert figures(found["per_class"][name]) == by_pycocotools(path, given, [name], count)
    assert found["per_class"]["yak"]["boxes"] == 0
    assert 0 < found["all"]["AP"] < 1


@pytest.mark.parametrize("swapped", [False, True])
def test_of_two_equal_overlaps_the_last_box_is_taken(tmp_path, swapped):
    """The surer detection lies between two boxes; the other one fits the right box alone at IoU 0.75."""
    path = write(tmp_path)
    document = json.loads(path.read_text())
    boxes = [[0, 0, 20, 20], [4, 0, 20, 20]][:: -1 if swapped else 1]
    document["annotations"] = [
        {"id": i, "image_id": 3, "category_id": CATEGORY["cat"], "bbox": box, "area": 400, "iscrowd": 0}
        for i, box in enumerate(boxes, start=1)
    ]
    path.write_text(json.dumps(document))
    given = detections([3, 3], [[2, 0, 22, 20], [6, 0, 26, 20]], [0.9, 0.8], [0, 0])
    found = figures(evaluate(path, given, SPLIT)["per_class"]["cat"])
    assert found == by_pycocotools(path, given, ["cat"], 100)
    assert (found[FIGURES.index("AP75")] > 0.9) is swapped


def test_a_limit_per_image_is_pycocotools_on_each_images_best(tmp_path):
    path, given = crowded_scene(tmp_path, 0)
    order = np.argsort(-given.score, kind="stable")
    best = np.sort(np.concatenate([order[given.image_id[order] == image][:20] for image in np.unique(given.image_id)]))
    kept = detections(given.image_id[best], xyxy(given)[best], given.score[best], given.class_index[best])
    found = evaluate(path, given, SPLIT, limit=Limit(20))
    assert figures(found["all"]) == pytest.approx(by_pycocotools(path, kept, SPLIT.names, 20), abs=1e-12)
    assert found["all"] != evaluate(path, given, SPLIT, limit=Limit(20, per_class=True))["all"]


def test_several_limits_at_once_are_each_by_itself(tmp_path):
    path, given = crowded_scene(tmp_path, 1)
    limits = [Limit(5), Limit(30), Limit(5, per_class=True)]
    found = evaluate_at(read_truth(path, SPLIT), given, limits=limits)
    assert found == {limit.label: evaluate(path, given, SPLIT, limit=limit) for limit in limits}
    assert list(found) == ["5", "30", "5 per class"]
    with pytest.raises(ValueError, match="at least 1"):
        Limit(0)


def test_names_restrict_the_classes_evaluated(tmp_path):
    path = write(tmp_path)
    found = evaluate(path, perfect(path), SPLIT, names=("yak", "cow"))
    assert found["names"] == ["cow", "yak"]
    assert found["base"]["AP50"] is None
    assert found["novel"] == found["all"]
    ap50 = {name: scores["AP50"] for name, scores in found["per_class"].items()}
    assert ap50 == {"cat": None, "dog": None, "cow": 1, "yak": None}
    with pytest.raises(VocabularyError, match="did you mean 'cow'"):
        evaluate(path, perfect(path), SPLIT, names=("cows",))


def test_only_the_best_hundred_of_an_image_count(tmp_path):
    path = write(tmp_path, classes=("cat",))
    right = perfect(path)
    # One hundred surer misses in the first image push its only hit out, and only there.
    image_id = np.concatenate([np.full(100, 3), right.image_id])
    box = np.concatenate([np.full((100, 4), [80, 80, 90, 90]), xyxy(right)])
    score = np.concatenate([np.full(100, 0.9), right.score])
    found = evaluate(path, detections(image_id, box, score, np.zeros(106)), SPLIT)
    assert found["all"]["AR"] == pytest.approx(5 / 6)


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
    for index in (-2, 4):
        with pytest.raises(ValueError, match=f"class index {index}"):
            evaluate(path, detections([3], box, [1], [index]), SPLIT)
    with pytest.raises(AnnotationError, match="readable file"):
        evaluate(tmp_path / "none.json", perfect(path), SPLIT)


def test_a_file_without_images_is_refused(tmp_path):
    path = write(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"images": [], "annotations": []}))
    with pytest.raises(AnnotationError, match="at least one image"):
        evaluate(path, detections([], [], [], []), SPLIT)


@pytest.mark.parametrize(
    ("box", "score", "message"),
    [
        ([[0, 0, 1, float("nan")]], [1], "finite"),
        ([[0, 0, 1, 1]], [float("inf")], "finite"),
        ([[5, 0, 1, 1]], [1], "negative"),
        ([[0, 0, 1, 1]], [1, 2], "score must have shape"),
        ([[0, 0, 1, 1], [0, 0, 1, 1]], [1], "xywh must have shape"),
    ],
)
def test_malformed_detections_are_refused(box, score, message):
    with pytest.raises(ValueError, match=message):
        detections([3], box, score, [0])
