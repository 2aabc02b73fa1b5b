"""LVIS figures are those of the official lvis package."""

import importlib.util
import json
import sys
import types

import numpy as np
import pytest
from pycocotools import mask

from ezsd.errors import AnnotationError
from ezsd.metrics import (
    LVIS_LIMITS,
    Limit,
    evaluate,
    evaluate_at,
    read_results,
    read_truth,
)
from ezsd.vocabulary import Split

NAMES = ("ant", "bee", "cod", "doe", "elk", "fox")
FREQUENCY = dict(zip(NAMES, "rfcrfc", strict=True))
IDS = dict(zip(NAMES, (11, 3, 7, 2, 30, 5), strict=True))
SPLIT = Split(base=("fox", "bee", "cod", "elk"), novel=("doe", "ant"))


@pytest.fixture
def official(monkeypatch):
    """`LVISEval`, without the package's drawing module and with the name that numpy took away."""
    found = importlib.util.find_spec("lvis")
    if found is None:
        pytest.skip("the lvis package is not installed; it is in the test extra")
    package = types.ModuleType("lvis")
    package.__path__ = list(found.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "lvis", package)
    monkeypatch.setattr(np, "float", float, raising=False)
    from lvis.eval import LVISEval

    return LVISEval


def write(folder, seed, *, images=8, detections=600):
    """A random federated file and results for it, on a coarse grid so that overlaps tie."""
    rng = np.random.default_rng(seed)

    def box():
        return (10 * rng.integers((0, 0, 1, 1), (6, 6, 5, 5))).tolist()

    annotations = []
    for number in range(60):
        x, y, w, h = box()
        entry = {"id": number + 1, "image_id": int(rng.integers(1, images)), "bbox": [x, y, w, h]}
        # LVIS has no crowds; the official package does not look at the flag.
        entry |= {"iscrowd": int(number % 4 == 0)}
        entry |= {
            "category_id": IDS[NAMES[rng.integers(0, 6)]],
            "area": 0 if number % 20 == 7 else w * h * (1, 1, 3, 8, 17)[number % 5],
        }
        annotations.append(entry | ({"ignore": 1} if number % 20 == 3 else {}))
    lists = [rng.permutation(list(IDS.values())).tolist() for _ in range(images)]
    document = {
        "images": [
            {
                "id": i + 1,
                "file_name": f"{i}.png",
                "width": 100,
                "height": 100,
                "neg_category_ids": lists[i][:2],
                "not_exhaustive_category_ids": lists[i][2:4],
            }
            for i in range(images)
        ],
        "categories": [{"id": IDS[name], "name": name, "frequency": FREQUENCY[name]} for name in NAMES],
        "annotations": annotations,
    }
    results = [
        {
            "image_id": int(rng.integers(1, images + 1)),
            "category_id": IDS[NAMES[rng.integers(0, 6)]],
            "bbox": box(),
            "score": float(rng.integers(0, 30) / 30),
        }
        for _ in range(detections)
    ]
    # Half of them lie on a box, of its class.
    for one in results[::2]:
        box_of = annotations[rng.integers(0, 60)]
        one.update({key: box_of[key] for key in ("image_id", "category_id", "bbox")})
    for name, value in (("truth", document), ("results", results)):
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder / "truth.json", folder / "results.json"


def add_masks(truth_path, results_path, seed):
    """Diamonds and triangles within the boxes; a third of the results' are as run lengths."""
    rng = np.random.default_rng(seed)

    def outline(box):
        x, y, w, h = box
        diamond = [x + w / 2, y, x + w, y + h / 2, x + w / 2, y + h, x, y + h / 2]
        return [diamond[: 8 if rng.random() < 0.6 else 6]]

    truth, results = json.loads(truth_path.read_text()), json.loads(results_path.read_text())
    for one in (*truth["annotations"], *results):
        one["segmentation"] = outline(one["bbox"])
    for one in results:
        runs = mask.merge(mask.frPyObjects(one["segmentation"], 100, 100))
        one["segmentation"] = {"size": [100, 100], "counts": runs["counts"].decode()}
    truth_path.write_text(json.dumps(truth))
    results_path.write_text(json.dumps(results))


@pytest.mark.parametrize("seed", range(4))
def test_figures_of_masks_are_those_of_the_official_package(tmp_path, official, seed):
    truth_path, results_path = write(tmp_path, seed)
    add_masks(truth_path, results_path, seed)
    truth = read_truth(truth_path, SPLIT, masks=True)
    given = read_results(results_path, images=truth.sizes(), categories=truth.category_positions())
    found = evaluate_at(truth, given, limits=[Limit(300)], shape="segm")["300"]
    from lvis.lvis import LVIS
    from lvis.results import LVISResults

    table = LVIS(str(truth_path))
    run = official(table, LVISResults(table, str(results_path), max_dets=300), "segm")
    run.run()
    expected = run.get_results()
    figures = {key: found["all"][key] for key in ("AP", "AP50", "AP75")} | {"AR@300": found["all"]["AR"]}
    figures |= {f"AP{group[0]}": found[group]["AP"] for group in ("rare", "common", "frequent")}
    assert figures == pytest.approx({key: expected[key] for key in figures}, abs=1e-12)
    assert found["iou_type"] == "segm"
    assert 0 < expected["AP"] < 1


def ours(truth_path, results_path, **options):
    truth = read_truth(truth_path, SPLIT)
    found = read_results(results_path, images=truth.sizes(), categories=truth.category_positions())
    return evaluate(truth_path, found, SPLIT, **options)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [300, 25])
def test_figures_are_those_of_the_official_package(tmp_path, official, seed, count):
    truth, results = write(tmp_path, seed)
    found = ours(truth, results, limit=Limit(count))
    from lvis.lvis import LVIS
    from lvis.results import LVISResults

    table = LVIS(str(truth))
    run = official(table, LVISResults(table, str(results), max_dets=count), "bbox")
    run.run()
    expected = run.get_results()
    figures = {key: found["all"][key] for key in ("AP", "AP50", "AP75")} | {"AR@300": found["all"]["AR"]}
    figures |= {f"AP{group[0]}": found[group]["AP"] for group in ("rare", "common", "frequent")}
    for size in ("small", "medium", "large"):
        figures |= {f"AP{size[0]}": found["all"][f"AP_{size}"], f"AR{size[0]}@300": found["all"][f"AR_{size}"]}
    # Classes stand in another order there, which the last digit of a mean notices.
    assert figures == pytest.approx({key: expected[key] for key in figures}, abs=1e-12)
    assert 0 < expected["AP"] < 1


def test_a_federated_file_is_evaluated_by_lvis_rules_at_300(tmp_path):
    found = ours(*write(tmp_path, 0))
    assert (found["rules"], found["max_detections"], found["counted_per"]) == ("lvis", 300, "image")
    assert Limit(300) in LVIS_LIMITS
    assert found["novel"] == found["rare"]


def test_what_nobody_looked_for_is_not_wrong(tmp_path):
    """One box and its detection; a surer one elsewhere is wrong only if the class's boxes are exhaustive."""
    image = {"id": 1, "file_name": "a.png", "width": 100, "height": 100, "neg_category_ids": []}
    image["not_exhaustive_category_ids"] = [IDS["ant"]]
    box = {"id": 1, "image_id": 1, "category_id": IDS["ant"], "bbox": [0, 0, 20, 20], "area": 400}
    truth, results = write(tmp_path, 0)
    document = json.loads(truth.read_text()) | {"images": [image], "annotations": [box]}
    truth.write_text(json.dumps(document))
    right = {"image_id": 1, "category_id": IDS["ant"], "bbox": [0, 0, 20, 20], "score": 0.5}
    elsewhere = {**right, "bbox": [50, 50, 20, 20], "score": 0.9}
    results.write_text(json.dumps([right, elsewhere]))
    assert ours(truth, results)["per_class"]["ant"]["AP"] == pytest.approx(1)
    image["not_exhaustive_category_ids"] = []
    truth.write_text(json.dumps(document | {"images": [image]}))
    assert ours(truth, results)["per_class"]["ant"]["AP"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["images"][2].pop("neg_category_ids"), r"images\[2\]\.neg_category_ids"),
        (lambda d: d["images"][2].pop("not_exhaustive_category_ids"), r"images\[2\]\.not_exhaustive"),
        (lambda d: d["images"][2].update(neg_category_ids=["3"]), r"images\[2\]\.neg_category_ids: .*'3'"),
        (lambda d: d["categories"][1].pop("frequency"), r"categories\[1\]\.frequency: .*nothing"),
        (lambda d: d["categories"][1].update(frequency="often"), "often"),
    ],
)
def test_half_a_federated_file_is_refused(tmp_path, change, words):
    truth, _ = write(tmp_path, 0)
    document = json.loads(truth.read_text())
    change(document)
    truth.write_text(json.dumps(document))
    with pytest.raises(AnnotationError, match=words):
        read_truth(truth, SPLIT)
