"""The ablation runs from the first byte to its tables, at a size of seconds."""

import dataclasses
import importlib
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ezsd.cache import Store
from ezsd.metrics.results import Results
from ezsd.pipeline.config.schema import load_preset, to_tables
from ezsd.pipeline.data.datasets import find_dataset
from ezsd.pipeline.extraction.provenance import dataset_inputs
from tests.commandkit import ezsd

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DATASET = "clutter-split2"
SPLIT = find_dataset(DATASET).split
# Two steps of everything, two blocks of images: the same code in seconds.
QUICK = ("adapt.steps=2", "adapt.batch_size=32", "proposer.steps=2", "build.block_images=4", "train.batch_size=4")
# One of each kind: another store, given boxes of every source, other random numbers, another evaluation, the oracle,
# another length.
FEW = (
    "ours",
    "boxes from a run",
    "random boxes",
    "half the steps",
    "oracle",
    "oracle, distilled",
    "permuted novel names",
    "ours, again",
)


@pytest.fixture(scope="module")
def ablation():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("ablation")


def at_once(*words, plan):
    """Run the command as `_ezsd` does, without the seconds in which it loads torch."""
    done = ezsd(*words, *(word for override in plan.overrides for word in ("--set", override)))
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    words = ["--work", str(folder / "work"), "--results", str(folder / "results"), "--steps", "2"]
    words += ["--datasets", DATASET, "--images", "8", "2", *(word for quick in QUICK for word in ("--set", quick))]
    return [*words, "--arms", *FEW]


@pytest.fixture(scope="module")
def place(ablation, words):
    """The folder in which the few arms have run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "_ezsd", at_once)
        ablation.main(words)
    return Path(words[1]).parent


@pytest.fixture(scope="module")
def seed(place):
    """The folder of what was built and trained."""
    return place / "work" / DATASET / "seed-0"


@pytest.fixture
def found(place):
    lines = (place / "results/ablation.jsonl").read_text().splitlines()
    return {row["arm"]: row for row in map(json.loads, lines)}


def test_every_arm_has_a_row_and_a_second_call_makes_none_again(ablation, words, place, found):
    assert found.keys() == set(FEW)
    for row in found.values():
        assert {"AP50", "AP75", "AP", "IoU", "commit", "torch", "date"} <= row.keys()
        assert row["AP50"].keys() == {"base", "novel", "all"}
        assert row["dataset"] == DATASET
    assert found["half the steps"]["steps"] == 1
    assert 0 < found["ours"]["crops"]["raw"]["base"] <= 1
    before = (place / "results/ablation.jsonl").read_bytes()
    ablation.main(words)
    assert (place / "results/ablation.jsonl").read_bytes() == before


def test_the_command_line_has_the_store_and_the_losses_of_ours(seed, found):
    # `gate` compares; here it is what it says it compared.
    gate = json.loads((seed / "gate.json").read_text())
    assert gate["store"] == found["ours"]["store"]
    assert [line["step"] for line in gate["losses"]] == [1, 2, 3, 4, 5, 6]


def test_the_gate_stops_an_arm_that_is_not_the_command_lines(ablation, place, seed, monkeypatch):
    plan = plan_of(ablation, place)
    (seed / "gate.json").rename(place / "gate.json")
    other = dataclasses.replace(ablation.ARMS["ours"], train=("loss.distillation=0.1",), name="other")
    monkeypatch.setitem(ablation.ARMS, "ours", other)
    monkeypatch.setattr(ablation, "_ezsd", at_once)
    with pytest.raises(SystemExit, match="has other losses"):
        ablation.gate(plan)
    (place / "gate.json").rename(seed / "gate.json")


def test_a_command_that_fails_stops_the_gate(ablation):
    plan = SimpleNamespace(overrides=())
    assert ablation._ezsd("--version", plan=plan).startswith("ezsd ")
    with pytest.raises(SystemExit, match=r"gate: nothing: (?s:.)*No such command"):
        ablation._ezsd("nothing", plan=plan)


def plan_of(ablation, place):
    return ablation.Plan(
        work=place / "work",
        results=place / "results",
        tag="arms",
        name=DATASET,
        seed=0,
        steps=2,
        images=(8, 2),
        overrides=QUICK,
        jobs=1,
    )


def test_random_boxes_are_as_many_as_the_regions_of_ours(seed):
    ours, random = (Store(seed / "stores" / name) for name in ("ours", "random"))
    counts = [len(ours.regions[i].box) for i in ours.image_ids.tolist()]
    assert sum(counts) > 0
    assert [len(random.regions[i].box) for i in random.image_ids.tolist()] == counts
    assert random.manifest.fingerprints["teacher"] == ours.manifest.fingerprints["teacher"]


def test_the_distilled_oracle_has_the_regions_of_ours(seed):
    ours, oracle = (Store(seed / "stores" / name) for name in ("ours", "oracle-distilled"))
    for i in ours.image_ids.tolist():
        np.testing.assert_array_equal(oracle.regions[i].box, ours.regions[i].box)


def test_boxes_from_a_run_are_filtered(seed):
    store = Store(seed / "stores/run of 2 steps")
    classes = np.concatenate([store.regions[i].class_index for i in store.image_ids.tolist()])
    assert (classes >= len(SPLIT.base)).all()


def test_ours_again_has_other_random_numbers_in_the_build_and_in_the_training(seed, found):
    ours, again = (Store(seed / "stores" / name) for name in ("ours", "again"))
    assert ours.manifest.fingerprints["teacher"] != again.manifest.fingerprints["teacher"]
    of = {name: json.loads((seed / f"runs/{name} of 2 steps/run.json").read_text()) for name in ("ours", "ours-again")}
    assert [run["config"]["train"]["seed"] for run in of.values()] == [0, 1000]
    assert found["ours, again"]["store"] != found["ours"]["store"]


def test_only_the_oracle_trains_on_novel_boxes(seed):
    base = len(SPLIT.base)
    for folder in (seed / "stores").iterdir():
        store, oracle = Store(folder), folder.name.startswith("oracle")
        seen = np.concatenate([store.ground_truth[i].class_index for i in store.image_ids.tolist()])
        assert store.text[0] == SPLIT.names
        assert bool((seen >= base).any()) == oracle
        assert tuple(dataset_inputs(store.manifest)["base_names"]) == (SPLIT.names if oracle else SPLIT.base)


def test_arms_side_by_side_give_the_rows_of_one_after_the_other(ablation, words, place, found):
    results = place / "beside"
    few = [*words[: words.index("--arms")], "--results", str(results), "--jobs", "2", "--arms", "ours", "random boxes"]
    ablation.main(few)
    beside = {row["arm"]: row for row in map(json.loads, (results / "ablation.jsonl").read_text().splitlines())}
    assert beside.keys() == {"ours", "random boxes"}
    assert all(beside[arm]["AP"] == found[arm]["AP"] for arm in beside)


def test_an_evaluation_makes_the_run_again_that_it_needs(ablation, words, place, found):
    """On another machine rows may be there and runs gone."""
    moved, results = place / "moved", place / "again"
    shutil.copytree(place / "work", moved)
    shutil.rmtree(moved / DATASET / "seed-0/runs/ours of 2 steps")
    few = ["--work", str(moved), *words[2 : words.index("--arms")], "--results", str(results), "--jobs", "2"]
    few += ["--arms", "permuted novel names"]
    ablation.main(few)
    (row,) = map(json.loads, (results / "ablation.jsonl").read_text().splitlines())
    assert row["AP"] == found["permuted novel names"]["AP"]


def test_every_arm_has_settings_of_its_own_that_exist(ablation):
    seen = {}
    for arm in ablation.ARMS.values():
        assert arm.against in ablation.ARMS
        spec = ablation.STORES[arm.store]
        config = to_tables(load_preset("shapes", [*arm.train, *spec.overrides]))
        key = json.dumps([config, spec.boxes, spec.background, spec.oracle, arm.length, arm.again, arm.permuted])
        assert key not in seen, f"{arm.name} is {seen[key]}"
        seen[key] = arm.name


def test_the_authors_arm_has_no_background_prompt_and_black_beside_its_crops(ablation, seed, monkeypatch, place):
    asked = []
    monkeypatch.setattr(ablation, "build_cache", asked.append)
    ablation.prepared_store(plan_of(ablation, place), "authors")
    (request,) = asked
    assert (request.config.teacher.background, request.config.proposals.padding) == (None, "black")
    assert (request.config.adapt.loss, request.config.proposals.grid) == ("bce", "paper")


def test_an_unknown_arm_is_refused_with_the_known_ones(ablation, capsys):
    with pytest.raises(SystemExit, match="2"):
        ablation.main(["--work", "nowhere", "--arms", "outs"])
    assert "'outs': expected one of ours, none" in capsys.readouterr().err


def test_an_object_is_placed_by_the_surest_detection_of_its_name_that_is_nearest_to_it(ablation):
    truth = SimpleNamespace(
        image_id=np.array([1, 1, 1, 2]),
        class_index=np.array([0, 0, 5, 5]),
        xywh=np.array([[0, 0, 10, 10], [20, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10.0]]),
    )
    found = [
        (1, 0, 0.9, [2, 0, 10, 10]),  # of the first object: 8 of 12
        (1, 0, 0.5, [0, 0, 10, 10]),  # of the same, and better placed, but less sure
        (1, 0, 0.8, [19, 0, 10, 10]),  # of the second: 9 of 11
        (1, 0, 1.0, [60, 60, 10, 10]),  # of none
        (1, 5, 0.9, [9.5, 0, 10, 10]),  # too far
        (2, 0, 0.9, [0, 0, 10, 10]),  # of another name
    ]
    image_id, class_index, score, xywh = map(np.array, zip(*found, strict=True))
    results = Results(image_id=image_id, class_index=class_index, score=score, xywh=xywh.astype(float))
    placing = importlib.import_module("scoring").placing
    np.testing.assert_allclose(placing(truth, results), [8 / 12, 9 / 11, np.nan, np.nan])


@pytest.fixture
def driver(ablation):
    return importlib.import_module("driver")


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (19, 2.0930)])
def test_the_t_distribution_is_students(driver, degrees, quantile):
    assert driver.t_quantile(0.05, degrees) == pytest.approx(quantile, abs=1e-4)
    assert driver.t_tail(quantile, degrees) == pytest.approx(0.05, abs=1e-5)


def test_a_difference_is_paired_and_has_students_interval(driver):
    found = driver.difference({1: 5.0, 2: 7.0, 3: 6.5, 4: 9.0}, {1: 4.0, 2: 4.0, 3: 6.0})
    assert found.values == (1.0, 3.0, 0.5)
    assert found.mean == pytest.approx(1.5)
    assert found.half_width == pytest.approx(4.3027 * np.std(found.values, ddof=1) / 3**0.5, abs=1e-3)
    # The interval leaves out zero just where p is below 0.05.
    assert found.p == pytest.approx(0.1885, abs=1e-4)
    one = driver.difference({1: 5.0}, {1: 4.0})
    assert (one.mean, one.half_width, one.p) == (1.0, math.inf, 1.0)
    assert driver.difference({1: 5.0}, {2: 4.0}) is None
    same = driver.difference({1: 5.0, 2: 6.0}, {1: 5.0, 2: 6.0})
    assert (same.mean, same.half_width, same.p) == (0.0, 0.0, 1.0)


def test_holms_correction_steps_down_and_never_falls(driver):
    corrected = driver.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert corrected == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert driver.holm({"a": 0.7, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert driver.holm({}) == {}


def row(arm, dataset, seed, novel):
    figures = {"base": 0.8, "novel": novel, "all": 0.7}
    figures = {metric: figures for metric in ("AP50", "AP75", "AP", "IoU")}
    return {"arm": arm, "dataset": dataset, "seed": seed, "crops": None, **figures}


def test_tables_pool_splits_pair_seeds_and_correct_for_the_number_of_comparisons(ablation):
    tables = importlib.import_module("ablation_table").tables
    found = [
        row(arm, dataset, seed, novel + jitter * seed)
        for dataset in ("shapes", "shapes-split2")
        for seed in (1, 2, 3)
        for arm, novel, jitter in (
            ("ours", 0.5, 0.01),
            ("none", 0.04, 0),
            ("oracle", 0.65, 0),
            ("ours, again", 0.51, 0.01),
            ("semantic regression", 0.53, 0),
        )
    ]
    text = tables([*found, row("ours", "clutter", 1, 0.3)], list(ablation.ARMS.values()))
    shapes, clutter = text.split("### clutter")
    assert "`shapes` with seeds 1, 2, 3; `shapes-split2` with seeds 1, 2, 3." in shapes
    lines = {line.split("|")[1].strip(): line for line in shapes.splitlines() if line.count("|") == 8}
    cells = "| none | ours | 6 | +0.0 [+0.0, +0.0], 0 of 6 so | **-48.0 [-48.9, -47.1]**, 6 of 6 so |"
    assert lines["none"].startswith(cells)
    # p is 0.04, and 12 differences were looked at.
    assert "| +1.0 [+0.1, +1.9], 4 of 6 so |" in lines["semantic regression"]
    assert "of an oracle, percent: AP50 of *oracle* 80.0" in shapes
    assert "12 of them tested" in shapes
    assert "points: AP50, base 0.0; AP50, novel 0.7;" in shapes
    assert "| none | ours | -48.0 | -48.0 |" in shapes
    assert "| ours | 80.0 |" in clutter
