"""The ablation runs from the first byte to its tables, at a size of seconds."""

import dataclasses
import importlib
import json
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from ezsd.cache import Store
from ezsd.data.shapes import SHAPES_SPLIT
from ezsd.losses import loss_weights
from ezsd.pipeline.config.schema import load_preset, to_tables
from ezsd.pipeline.extraction.provenance import dataset_inputs

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# Few windows, two blocks of images, two steps: the same code in seconds.
QUICK = (
    "adapt.steps=2",
    "adapt.batch_size=32",
    "proposals.search=exhaustive",
    "proposals.sizes=[40]",
    "build.block_images=4",
    "train.batch_size=4",
)
# One of each kind: another store, given boxes of every source, another evaluation, the oracle, another length.
FEW = ("baseline", "raw features", "random", "rpn", "permuted novel names", "oracle", "no class in box regression x 2")


@pytest.fixture(scope="module")
def ablation():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("ablation")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    words = ["--work", str(folder / "work"), "--results", str(folder / "results"), "--steps", "2"]
    return [*words, "--images", "8", "2", *(word for quick in QUICK for word in ("--set", quick)), "--arms", *FEW]


@pytest.fixture(scope="module")
def place(ablation, words):
    """The folder in which the few arms have run."""
    ablation.main(words)
    return Path(words[1]).parent


@pytest.fixture
def found(place):
    lines = (place / "results/ablation.jsonl").read_text().splitlines()
    return {row["arm"]: row for row in map(json.loads, lines)}


def test_every_arm_has_a_row_and_a_second_call_makes_none_again(ablation, words, place, found):
    assert found.keys() == set(FEW)
    for row in found.values():
        assert {"base", "novel", "all", "novel_only", "commit", "torch", "date"} <= row.keys()
    assert found["no class in box regression x 2"]["steps"] == 4
    before = (place / "results/ablation.jsonl").read_bytes()
    ablation.main(words)
    assert (place / "results/ablation.jsonl").read_bytes() == before


def test_the_command_line_has_the_baselines_store_and_losses(place, found):
    # `gate` compares; here it is what it says it compared.
    gate = json.loads((place / "work/seed-0/gate.json").read_text())
    assert gate["store"] == found["baseline"]["store"]
    assert [line["step"] for line in gate["losses"]] == [1, 2, 3, 4, 5, 6]


def test_the_gate_stops_a_baseline_that_is_not_the_command_lines(ablation, place, monkeypatch):
    plan = plan_of(ablation, place)
    (place / "work/seed-0/gate.json").rename(place / "gate.json")
    other = dataclasses.replace(ablation.ARMS["baseline"], train=("loss.distillation=0.1",), name="other")
    monkeypatch.setitem(ablation.ARMS, "baseline", other)
    with pytest.raises(SystemExit, match="has other losses"):
        ablation.gate(plan)
    (place / "gate.json").rename(place / "work/seed-0/gate.json")


def plan_of(ablation, place):
    return ablation.Plan(
        work=place / "work",
        results=place / "results",
        tag="preset",
        seed=0,
        steps=2,
        images=(8, 2),
        overrides=QUICK,
        jobs=1,
    )


def test_random_and_network_boxes_are_as_many_as_clip_proposals(place):
    stores = place / "work/seed-0/stores"
    baseline, others = Store(stores / "baseline"), [Store(stores / name) for name in ("random", "rpn of 2 steps")]
    counts = [len(baseline.regions[i].box) for i in baseline.image_ids.tolist()]
    assert sum(counts) > 0
    for other in others:
        assert [len(other.regions[i].box) for i in other.image_ids.tolist()] == counts
        assert other.manifest.fingerprints["teacher"] == baseline.manifest.fingerprints["teacher"]


def test_raw_features_lie_on_the_baselines_proposals(place):
    stores = place / "work/seed-0/stores"
    baseline, raw, mixed = (Store(stores / name) for name in ("baseline", "raw", "raw features"))
    for i in baseline.image_ids.tolist():
        np.testing.assert_array_equal(mixed.proposals[i].box, baseline.proposals[i].box)
        np.testing.assert_array_equal(mixed.ground_truth[i].embedding, raw.ground_truth[i].embedding)
    np.testing.assert_array_equal(mixed.text[1], raw.text[1])


def test_only_the_oracle_trains_on_novel_boxes(place):
    stores = place / "work/seed-0/stores"
    base = len(SHAPES_SPLIT.base)
    for folder in stores.iterdir():
        store, oracle = Store(folder), folder.name == "oracle"
        seen = np.concatenate([store.ground_truth[i].class_index for i in store.image_ids.tolist()])
        assert store.text[0] == SHAPES_SPLIT.names
        assert bool((seen >= base).any()) == oracle
        assert tuple(dataset_inputs(store.manifest)["base_names"]) == (
            SHAPES_SPLIT.names if oracle else SHAPES_SPLIT.base
        )


def test_arms_side_by_side_give_the_rows_of_one_after_the_other(words, place, found):
    results = place / "beside"
    few = [*words[: words.index("--arms")], "--results", str(results), "--jobs", "2", "--arms", "baseline", "random"]
    subprocess.run([sys.executable, str(BENCHMARKS / "ablation.py"), *few], check=True, cwd=BENCHMARKS.parent)
    beside = {row["arm"]: row for row in map(json.loads, (results / "ablation.jsonl").read_text().splitlines())}
    assert beside.keys() == {"baseline", "random"}
    assert all(beside[arm]["AP"] == found[arm]["AP"] for arm in beside)


def test_evaluations_make_the_run_again_that_they_share(words, place, found):
    """On another machine rows may be there and runs gone."""
    moved, results = place / "moved", place / "again"
    shutil.copytree(place / "work", moved)
    shutil.rmtree(moved / "seed-0/runs/baseline of 2 steps")
    few = ["--work", str(moved), *words[2 : words.index("--arms")], "--results", str(results), "--jobs", "2"]
    few += ["--arms", "permuted novel names", "reference box class"]
    subprocess.run([sys.executable, str(BENCHMARKS / "ablation.py"), *few], check=True, cwd=BENCHMARKS.parent)
    rows = {row["arm"]: row for row in map(json.loads, (results / "ablation.jsonl").read_text().splitlines())}
    assert rows.keys() == {"permuted novel names", "reference box class"}
    assert rows["permuted novel names"]["AP"] == found["permuted novel names"]["AP"]


def test_every_arm_has_settings_of_its_own_that_exist(ablation):
    seen = {}
    for arm in ablation.ARMS.values():
        assert arm.against in ablation.ARMS
        spec = ablation.STORES[arm.store]
        config = to_tables(load_preset("shapes", [*arm.train, *spec.overrides]))
        key = json.dumps([config, spec.boxes, spec.oracle, arm.length, arm.evaluation])
        assert key not in seen, f"{arm.name} is {seen[key]}"
        seen[key] = arm.name


@pytest.mark.parametrize("factor", [2.0, 4.0, 8.0])
def test_a_cosine_arm_multiplies_the_distance_by_what_its_rows_were_trained_with(ablation, factor):
    config = load_preset("shapes", ablation.ARMS[f"cosine, weight {factor}"].train)
    with (files("ezsd.weights") / "tiny-shapes.json").open() as teacher:
        dim = json.load(teacher)["embed_dim"]
    assert loss_weights(config.loss, dim)["distillation"] == pytest.approx(factor, rel=1e-12)


def test_an_unknown_arm_is_refused_with_the_known_ones(ablation, capsys):
    with pytest.raises(SystemExit, match="2"):
        ablation.main(["--work", "nowhere", "--arms", "bassline"])
    assert "'bassline': expected one of" in capsys.readouterr().err


def test_three_seeds_give_the_range_and_say_when_all_agree(ablation):
    difference = importlib.import_module("driver").difference
    found = difference({1: 5.0, 2: 7.0, 3: 6.5, 4: 9.0}, {1: 4.0, 2: 4.0, 3: 6.0})
    assert found.values == (1.0, 3.0, 0.5)
    assert (found.mean, found.low, found.high) == (pytest.approx(1.5), 0.5, 3.0)
    assert found.excluded
    assert not difference({1: 5.0, 2: 3.0, 3: 6.0}, {1: 4.0, 2: 4.0, 3: 4.0}).excluded
    assert not difference({1: 5.0}, {1: 4.0}).excluded
    assert difference({1: 5.0}, {2: 4.0}) is None


def test_tables_pair_seeds_and_read_the_share_of_the_oracle(ablation):
    arms, tables = ablation.ARMS, importlib.import_module("ablation_table").tables

    def row(arm, seed, novel):
        figures = {"base": 0.8, "novel": novel, "all": 0.7, "novel_only": None}
        return {"arm": arm, "seed": seed, "steps": 800, "curve": [], **figures, "AP75": figures}

    found = [row("baseline", s, 0.5 + s / 100) for s in (1, 2, 3)] + [row("none", s, 0.04) for s in (1, 2, 3)]
    text = tables([*found, row("oracle", 2, 0.65)], list(arms.values()))
    assert "| baseline | 80.0 (80.0 to 80.0) | 52.0 (51.0 to 53.0) |" in text
    assert "| -48.0 (" not in text
    assert "**-48.0 [-49.0, -47.0]** |" in text
    assert "percent: 80.0." in text
    assert "| baseline | +0.0 [+0.0, +0.0] |" in text
