"""`ezsd eval` of runs and of anybody's results: the same figures, and one clear line for what is not in order."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ezsd.data.shapes import SHAPES_SPLIT
from ezsd.errors import AnnotationError, VocabularyError
from ezsd.pipeline.console.arguments import class_names
from ezsd.pipeline.console.defaults import score_table
from ezsd.pipeline.data.annotation_cache import evaluation_annotations
from ezsd.pipeline.errors import ArgumentError
from ezsd.pipeline.inference.evaluate import detect_split, evaluate_run, run_dataset
from ezsd.pipeline.inference.evaluation_tables import (
    aligned,
    at_limit,
    evaluate_results,
    evaluation_tables,
    headline,
)
from ezsd.pipeline.inference.predictor import load_trained
from tests.commandkit import ezsd

ROOT = Path(__file__).resolve().parents[2]
NOVEL = ",".join(SHAPES_SPLIT.novel)


def evaluated(detections, annotations, **options):
    choices = {"base": None, "novel": None, "split_file": None, "classes": None, "max_detections": None}
    for part in options.keys() & {"base", "novel"}:
        options[part] = class_names(f"--{part}", lists=[options[part]])
    return evaluate_results(detections, annotations, **(choices | options))


@pytest.fixture
def truth(shapes_root):
    return shapes_root / "annotations/instances_val.json"


@pytest.fixture
def scene(tmp_path):
    """One image with a cat and a cow, both found."""
    boxes = [{"image_id": 1, "category_id": k, "bbox": [10 * k, 10, 20, 20]} for k in (1, 2)]
    document = {
        "images": [{"id": 1, "file_name": "1.png", "width": 99, "height": 99}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "cow"}, {"id": 3, "name": "yak"}],
        "annotations": [{**box, "id": i, "area": 400, "iscrowd": 0} for i, box in enumerate(boxes)],
    }
    (tmp_path / "gt.json").write_text(json.dumps(document))
    (tmp_path / "found.json").write_text(json.dumps([{**box, "score": 0.5} for box in boxes]))
    return tmp_path / "found.json", tmp_path / "gt.json"


def assert_equal_figures(found, wanted):
    """But for the last bit of a mean."""
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key] == (value if value is None else pytest.approx(value, rel=1e-12, abs=0)), key


def test_a_runs_detections_file_gives_the_runs_figures(shapes_run, truth):
    result = json.loads((shapes_run.folder / "eval.json").read_text())
    again = evaluated(shapes_run.folder / "detections.json", truth, novel=NOVEL)
    ours, theirs = at_limit(result, "generalised"), at_limit(again, "generalised")
    assert ours["all"]["boxes"] > 0
    assert theirs["per_class"].items() >= ours["per_class"].items()
    for group in ("base", "novel", "all"):
        # The file lists its classes in another order, and a mean over them may differ in its last bit.
        assert_equal_figures(theirs[group], ours[group])
    assert again["annotations"] == result["annotations"]


def test_every_limit_is_there_and_the_detector_is_asked_for_enough(shapes_run):
    result = json.loads((shapes_run.folder / "eval.json").read_text())
    found = result["generalised"]["at"]
    assert {(v["max_detections"], v["counted_per"]) for v in found.values()} == {
        (100, "image"),
        (300, "image"),
        (100, "image and class"),
    }
    assert 100 < result["generalised"]["most_per_image"] <= 300
    assert found["100"]["all"]["AR"] <= found["300"]["all"]["AR"]


def test_another_split_or_label_space_has_files_of_its_own(shapes_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(shapes_run.folder, folder)
    run = type(shapes_run).open(folder)
    before = (folder / "eval.json").read_bytes()
    result = evaluate_run(run, data_root=None, device="cpu", split="train", classes="novel", max_detections=300)
    assert (folder / "eval.json").read_bytes() == before
    assert json.loads((folder / "eval-train-novel.json").read_text()) == json.loads(json.dumps(result))
    assert set(result) == {"annotations", "limit", "novel_asked"}
    found = at_limit(result, "novel_asked")
    assert (found["images"], found["max_detections"]) == (12, 300)
    assert headline(result).keys() == {"novel_asked"}
    names = {one["name"] for one in json.loads((folder / "detections-train-novel.json").read_text())}
    assert names <= set(SHAPES_SPLIT.novel)


def test_names_asked_for_have_the_figures_that_they_have_among_all(shapes_run, tmp_path):
    run = type(shapes_run).open(shutil.copytree(shapes_run.folder, tmp_path / "run"))
    every = json.loads((run.folder / "eval.json").read_text())
    for classes in ("base", "novel"):
        space = f"{classes}_asked"
        result = evaluate_run(run, data_root=None, device="cpu", classes=classes)
        # At 100 an image and class no name takes another's place, but for the 300 an image that are looked at.
        ours, theirs = (table[name]["at"]["100 per class"] for table, name in ((result, space), (every, "generalised")))
        assert ours[classes]["AP50"] == pytest.approx(theirs[classes]["AP50"], abs=0.02)
        assert ours["names"] == list(getattr(SHAPES_SPLIT, classes))


def test_alone_is_a_search_without_any_other_name_under_a_name_of_its_own(shapes_run, tmp_path):
    run = type(shapes_run).open(shutil.copytree(shapes_run.folder, tmp_path / "run"))
    before = (run.folder / "eval.json").read_bytes()
    alone = evaluate_run(run, data_root=None, device="cpu", classes="novel", alone=True)
    asked = evaluate_run(run, data_root=None, device="cpu", classes="novel")
    assert (run.folder / "eval.json").read_bytes() == before
    assert json.loads((run.folder / "eval-novel-alone.json").read_text()) == json.loads(json.dumps(alone))
    assert json.loads((run.folder / "eval-novel.json").read_text()) == json.loads(json.dumps(asked))
    both = evaluate_run(run, data_root=None, device="cpu", alone=True)
    assert both == json.loads(before) | {"novel_alone": alone["novel_alone"]}
    assert list(headline(both)) == ["base", "novel", "all", "novel_alone"]
    # As before there were competitors: a detector that knows no other names.
    trained = load_trained(run, "cpu")
    first = trained.base_count
    bare = dataclasses.replace(trained, names=trained.names[first:], text=trained.text[first:])
    dataset = run_dataset(run, None)
    annotations = evaluation_annotations(dataset.annotations("val"), dataset.split)
    (found,) = detect_split(bare, annotations, dataset.images("val"), [bare.search(bare.text)], "detect")
    assert alone["novel_alone"]["detections"] == len(found.score)
    assert alone["novel_alone"]["at"]["100"]["novel"] != asked["novel_asked"]["at"]["100"]["novel"]
    stored = json.loads((run.folder / "detections-novel-alone.json").read_text())
    assert [one["score"] for one in stored] == [float(f"{score:.9g}") for score in found.score]


def test_what_earlier_versions_call_novel_only_is_novel_alone(shapes_run, tmp_path):
    run = type(shapes_run).open(shutil.copytree(shapes_run.folder, tmp_path / "run"))
    both = evaluate_run(run, data_root=None, device="cpu", alone=True)
    former = {key: value for key, value in both.items() if key != "novel_alone"} | {"novel_only": both["novel_alone"]}
    assert headline(former) == headline(both)
    assert evaluation_tables(former, per_class=True) == evaluation_tables(both, per_class=True)
    assert score_table({"run": headline(former)}).splitlines()[0].split() == [
        *("AP50", "base", "novel", "all"),
        *("novel,", "alone"),
    ]


def test_an_empty_validation_list_is_one_clear_error(shapes_run, shapes_root, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(shapes_root, root)
    path = root / "annotations/instances_val.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"images": [], "annotations": []}))
    with pytest.raises(AnnotationError, match=r"instances_val.json: images: expected at least one"):
        evaluate_run(shapes_run, data_root=root, device="cpu")


@pytest.fixture
def drawn_results(scene):
    """The results with a square as the mask of each detection; its box is that of the square."""
    found = json.loads(scene[0].read_text())
    for one in found:
        x, y, w, h = one["bbox"]
        one["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    scene[0].write_text(json.dumps(found))
    return scene[0]


@pytest.mark.parametrize("nothing", [None, []])
def test_masks_without_any_to_compare_with_are_left_out_in_one_line(scene, drawn_results, nothing, caplog):
    truth = json.loads(scene[1].read_text())
    for one in truth["annotations"]:
        one["segmentation"] = nothing
    scene[1].write_text(json.dumps(truth))
    result = evaluated(*scene, novel="cow")
    assert headline(result)["all"] == pytest.approx(1)
    assert "masks_at" not in result["generalised"]
    assert [record.message for record in caplog.records] == [
        f"{drawn_results} has masks, but not every object of {scene[1]} has a segmentation: boxes alone are evaluated"
    ]


def test_a_segmentation_that_is_none_is_refused_with_a_cure_for_results(scene, drawn_results):
    truth = json.loads(scene[1].read_text())
    for one in truth["annotations"]:
        one["segmentation"] = [[1, 2]]
    scene[1].write_text(json.dumps(truth))
    with pytest.raises(AnnotationError, match=r"annotations\[0\].segmentation: .*results without segmentations"):
        evaluated(*scene, novel="cow")


def test_classes_not_named_novel_are_base_and_the_reverse(scene):
    for options in ({"novel": "cow"}, {"base": "yak, cat"}, {"base": "cat,yak", "novel": "cow"}):
        found = at_limit(evaluated(*scene, **options), "generalised")
        assert (found["base"]["classes"], found["novel"]["classes"]) == (1, 1)
        assert found["novel"]["AP50"] == pytest.approx(1)


def test_a_novel_name_that_the_file_lacks_is_said_and_has_no_figures(scene, tmp_path, caplog):
    (tmp_path / "split.toml").write_text('base = ["cat"]\nnovel = ["cow", "cowe"]\n')
    for options in ({"novel": "cow,cowe"}, {"split_file": tmp_path / "split.toml"}):
        caplog.clear()
        found = at_limit(evaluated(*scene, **options), "generalised")
        assert found["novel"]["AP50"] == pytest.approx(1)
        assert found["per_class"]["cowe"]["AP50"] is None
        assert [record.message for record in caplog.records] == [
            f"{scene[1]}: no entry in categories named 'cowe' (did you mean 'cow'?): without ground truth, "
            "figures of it are '-'"
        ]


def test_a_split_file_is_a_dataset_file_or_two_lists(scene, tmp_path):
    lists = 'base = ["cat"]\nnovel = ["cow"]\n'
    for text in (lists, f'name = "mine"\n[classes]\n{lists}'):
        (tmp_path / "split.toml").write_text(text)
        found = at_limit(evaluated(*scene, split_file=tmp_path / "split.toml"), "generalised")
        assert found["names"] == ["cat", "cow"]
    for text, words in (("base = 5", "base: expected a list"), ("=", "is not valid TOML")):
        (tmp_path / "split.toml").write_text(text)
        with pytest.raises(ArgumentError, match=words):
            evaluated(*scene, split_file=tmp_path / "split.toml")


def test_results_of_a_search_for_more_names_are_not_those_of_novel_ones(scene):
    with pytest.raises(ArgumentError, match="`classes=novel`: .*'cat'"):
        evaluated(*scene, novel="cow", classes="novel")
    found, _ = scene
    found.write_text(json.dumps([one for one in json.loads(found.read_text()) if one["category_id"] == 2]))
    result = evaluated(*scene, novel="cow", classes="novel")
    assert headline(result) == {"novel_asked": pytest.approx(1)}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, ArgumentError, "which of its 3 classes are novel"),
        ({"base": "cows"}, VocabularyError, "did you mean 'cow'"),
        ({"novel": "cow", "max_detections": 50}, ArgumentError, "reported at 100, 300"),
        ({"novel": "cow", "split_file": Path("x.toml")}, ArgumentError, "already says"),
        ({"split_file": Path("x.toml")}, ArgumentError, "cannot be read"),
        ({"base": "cat", "novel": "cat"}, VocabularyError, "base and novel at once"),
    ],
)
def test_choices_that_make_no_sense_are_refused(scene, options, error, words):
    with pytest.raises(error, match=words):
        evaluated(*scene, **options)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"images": []}', '{"categories": [5]}', '{"categories": [{"id": 1}]}']
)
def test_what_is_no_annotation_file_is_refused(scene, text):
    found, truth = scene
    truth.write_text(text)
    with pytest.raises(AnnotationError, match="gt.json"):
        evaluated(found, truth, novel="cow")


def test_tables_say_their_limit_and_show_classes_when_asked(scene):
    result = evaluated(*scene, novel="cow")
    text = evaluation_tables(result, per_class=False)
    title = "COCO rules, boxes, 1 image, at most 100 detections per image (up to 2 detections in one image)"
    assert title in text
    assert "\nyak" not in text
    lines = evaluation_tables(result, per_class=True).splitlines()
    assert next(line for line in lines if line.startswith("cow")).split() == [
        "cow",
        *["100.0"] * 4,
        "-",
        "-",
        *["100.0"] * 2,
        "-",
        "-",
        "1",
    ]
    assert next(line for line in lines if line.startswith("yak")).split() == ["yak", *["-"] * 10, "0"]


def test_limits_with_the_same_figures_share_a_table(scene):
    found, truth = scene
    lines = evaluation_tables(evaluated(found, truth, novel="cow"), per_class=False).splitlines()
    assert len(lines) == 6
    same = "at most 300 detections per image and at most 100 detections per image and class"
    assert lines[-1] == f"the same figures: {same}"
    # 150 surer detections of a yak: 100 per image leave neither cat nor cow, 300 do, 100 per class as well.
    yak = {"image_id": 1, "category_id": 3, "bbox": [50, 50, 5, 5], "score": 0.9}
    found.write_text(json.dumps(json.loads(found.read_text()) + [yak] * 150))
    text = evaluation_tables(evaluated(found, truth, novel="cow"), per_class=False)
    first, second = text.split("\n\n")
    assert "at most 100 detections per image (up to 152" in first
    assert "same" not in first
    assert "at most 300 detections per image (up to 152" in second
    assert second.endswith("the same figures: at most 100 detections per image and class")


def columns_end(line):
    return [match.end() for match in re.finditer(r"\S+", line)][1:]


@pytest.mark.parametrize("fixture", ["shapes_run", "masked_run"])
def test_the_columns_of_every_table_are_aligned(fixture, request):
    result = json.loads((request.getfixturevalue(fixture).folder / "eval.json").read_text())
    blocks = evaluation_tables(result, per_class=True).split("\n\n")
    # One label space: a table or more of limits, and the classes.
    assert len(blocks) >= 2
    for block in blocks:
        _, head, *rows = block.splitlines()
        titles = [match.end() for match in re.finditer(r"\S+", head)]
        titles = titles[1:] if head.startswith("class") else titles
        rows = [row for row in rows if not row.startswith("the same figures")]
        assert len(rows) >= 3
        for row in rows:
            assert columns_end(row) == titles, block


def test_a_column_is_as_wide_as_its_widest_cell():
    lines = aligned(["", "AR", "classes"], [["圆形", "100.0", "12345678"], ["cat", "-", "1"]])
    assert lines == ["         AR   classes", "圆形  100.0  12345678", "cat       -         1"]


def test_a_name_with_a_comma_is_novel_by_quotes_and_by_a_file(scene, tmp_path):
    truth = json.loads(scene[1].read_text())
    truth["categories"][1]["name"] = "tench, Tinca tinca"
    scene[1].write_text(json.dumps(truth))
    (tmp_path / "novel.txt").write_text("tench, Tinca tinca\n")
    quoted = evaluated(*scene, novel='"tench, Tinca tinca"')
    assert at_limit(quoted, "generalised")["names"] == ["cat", "yak", "tench, Tinca tinca"]
    words = ["--novel-file", tmp_path / "novel.txt", "--out", tmp_path / "out.json"]
    done = ezsd("eval", "--detections", scene[0], "--annotations", scene[1], *words)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(json.dumps(quoted))


def test_names_that_a_document_did_not_look_for_are_named(scene, caplog):
    found, truth = scene
    document = json.loads(truth.read_text()) | {"annotations": json.loads(found.read_text())}
    document["categories"] = document["categories"][:2]
    found.write_text(json.dumps(document))
    assert headline(evaluated(found, truth, novel="cow"))["all"] == pytest.approx(1)
    assert [record.message for record in caplog.records] == [
        f"{found}: 1 of the 3 names was not looked for, such as 'yak'; their objects count as missed"
    ]


def test_the_command_needs_no_torch_for_results(scene, tmp_path):
    arguments = ["eval", "--detections", scene[0], "--annotations", scene[1], "--novel", "cow"]
    code = "import sys, ezsd.cli as c; c.app(sys.argv[1:], standalone_mode=False); assert 'torch' not in sys.modules"
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "novel" in result.stdout
