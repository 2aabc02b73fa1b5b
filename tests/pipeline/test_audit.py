"""`ezsd audit` and the run card: what entered each stage, and injected novel boxes by their names."""

import json
import re
import shutil
import zlib

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

from ezsd.cache import Store
from ezsd.data.shapes import SHAPES_SPLIT
from ezsd.errors import EzsdError
from ezsd.pipeline.audit import AuditRequest, audit
from ezsd.pipeline.audit.annotation_file import read_annotation_file
from ezsd.pipeline.audit.boxes import objects_on_novel_ones, regions_on_novel_ones, wrong_boxes
from ezsd.pipeline.console.options import as_options
from ezsd.pipeline.errors import RunError
from ezsd.pipeline.extraction.provenance import dataset_inputs
from ezsd.pipeline.files import read_object, write_json
from ezsd.pipeline.report.run_data import collect, run_store
from ezsd.pipeline.runs.card import write_card
from ezsd.pipeline.runs.run import Run
from ezsd.pipeline.runs.training_boxes import StoredBoxes, read_boxes, record_boxes
from tests.advicekit import Place
from tests.cache.storekit import recommit
from tests.commandkit import ezsd

TRAIN = "annotations/instances_train.json"
BOXES = ("re-normalisation", "filters", "cached objects", "ground truth")


@pytest.fixture
def run(shapes_run, tmp_path):
    """A copy of the run, which an audit writes into."""
    return shutil.copytree(shapes_run.folder, tmp_path / "audited")


@pytest.fixture
def store(shapes_store, tmp_path):
    return shutil.copytree(shapes_store, tmp_path / "store")


@pytest.fixture
def truth(shapes_root):
    """The training annotations, and class names by category id."""
    document = json.loads((shapes_root / TRAIN).read_text())
    return document, {one["id"]: one["name"] for one in document["categories"]}


def examine(target, setting="zad", **options):
    return audit(AuditRequest(target=str(target), setting=setting, **options))


def levels(result):
    """Worst level by subject."""
    order = ("ok", "note", "unproven", "violation")
    found = {}
    for one in result.findings:
        found[one.subject] = max(found.get(one.subject, "ok"), one.level, key=order.index)
    return found


def texts(result, subject):
    return " ".join(one.text for one in result.findings if one.subject == subject)


def annotations_of(truth, names):
    document, name_of = truth
    return [one for one in document["annotations"] if name_of[one["category_id"]] in names]


def corners(one):
    x, y, width, height = one["bbox"]
    return np.array([x, y, x + width, y + height], "<f4")


def rewrite(store, array, row, values):
    """Put values into a row of the first chunk of an array, with all checksums made anew, as a forger would."""
    values = np.asarray(values)
    chunk = next(file for file in (store / array / "c").rglob("*") if file.is_file())
    data = bytearray(chunk.read_bytes())
    data[row * values.nbytes : (row + 1) * values.nbytes] = values.tobytes()
    chunk.write_bytes(data)
    rows = json.loads((store / array / "zarr.json").read_text())["codecs"][0]["configuration"]["chunk_shape"][0]
    checksums = next(file for file in (store / "checksums" / array / "c").rglob("*") if file.is_file())
    sums = bytearray(checksums.read_bytes())
    sums[:4] = zlib.crc32(data[: rows * values.nbytes]).to_bytes(4, "little")
    checksums.write_bytes(sums)
    recommit(store)


def change_config(folder, section, key, value):
    """Another setting in run.json and in what its checkpoints say of themselves."""
    for file in (folder / "run.json", *folder.glob("checkpoints/*/state.json")):
        found = read_object(file)
        found["config"][section][key] = value
        write_json(file, found)


def test_a_clean_run_passes_and_says_what_entered_each_stage(run, shapes_store, truth):
    before = sorted(shapes_store.rglob("*"))
    result = examine(run)
    assert result.verdict == "passed"
    assert {level for level in levels(result).values()} == {"ok", "note"}
    base, novel = (annotations_of(truth, names) for names in (SHAPES_SPLIT.base, SHAPES_SPLIT.novel))
    digest = dataset_inputs(Store(shapes_store).manifest)["base_boxes_sha256"]
    stages = {one.subject: one for one in result.findings if one.subject in (*BOXES, "training")}
    assert {(one.boxes, one.digest, one.level) for one in stages.values()} == {(len(base), digest, "ok")}
    assert len(stages) == 5
    assert sum(result.unlabelled["novel"].values()) == len(novel)
    assert result.unlabelled["images"] == len({one["image_id"] for one in novel})
    assert "cross" in texts(result, "names in filters")
    assert "proposals.drop_base_guesses=true" in texts(result, "names in filters")
    assert texts(result, "names in evaluation").endswith(": eval.json")
    assert "22 base and 8 novel boxes" in texts(result, "evaluation")
    assert read_object(run / "audit.json") == json.loads(json.dumps(result.document()))
    assert examine(shapes_store).verdict == "passed"
    assert sorted(shapes_store.rglob("*")) == before


def test_a_novel_object_with_a_base_label_in_the_store_is_found_and_named(run, truth, tmp_path):
    document, name_of = truth
    star = next(number for number, name in name_of.items() if name == "star")
    injected = annotations_of(truth, SHAPES_SPLIT.base)[3]
    stored_as = name_of[injected["category_id"]]
    # What the store was built from said a base class; what it is was a novel one all along.
    injected["category_id"] = star
    published = tmp_path / "published.json"
    published.write_text(json.dumps(document))
    result = examine(run, annotations=published)
    found = levels(result)
    assert {subject for subject, level in found.items() if level == "violation"} == {*BOXES, "training"}
    (named,) = next(one for one in result.findings if one.subject == "ground truth").named
    assert (named.annotation_id, named.image_id, named.stored_class) == (
        injected["id"],
        injected["image_id"],
        stored_as,
    )
    assert named.novel == {"annotation_id": injected["id"], "class": "star", "iou": 1.0}
    done = ezsd("audit", run, "--annotations", published)
    assert (done.returncode, done.stderr) == (1, "")
    image = f"annotation {injected['id']} in image {injected['image_id']} ({named.image}), stored as {stored_as!r}"
    assert f"{image}: the annotation file has novel class 'star'" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("audited, zad: violation: 5 violations")
    assert "`zad`: violation: 5 violations" in (run / "card.md").read_text()


def test_a_row_that_was_put_on_a_novel_box_is_found_and_named(run, store, truth):
    novel = annotations_of(truth, SHAPES_SPLIT.novel)[0]
    rows = Store(store).ground_truth.column("annotation_id", Store(store).image_ids.tolist())
    owner = np.repeat(Store(store).image_ids, rows[1])
    row = int(np.flatnonzero(owner == novel["image_id"])[0])
    rewrite(store, "ground_truth/box", row, corners(novel))
    result = examine(run, cache=store)
    (named,) = next(one for one in result.findings if one.subject == "ground truth").named
    assert named.annotation_id == rows[0][row]
    assert named.reason == "the annotation file has another box for it"
    name = truth[1][novel["category_id"]]
    assert named.novel == {"annotation_id": novel["id"], "class": name, "iou": 1.0}
    # The run was trained before, on the bytes that it has recorded.
    found = levels(result)
    assert (found["ground truth"], found["training"], found["store"]) == ("violation", "ok", "unproven")
    assert result.verdict == "violation"


def test_a_row_with_another_class_is_named(store):
    rewrite(store, "ground_truth/class_index", 2, np.array(14, "<i4"))
    result = examine(store)
    (named,) = next(one for one in result.findings if one.subject == "ground truth").named
    known = Store(store).ground_truth.column("annotation_id", Store(store).image_ids.tolist())[0]
    assert named.annotation_id == known[2]
    assert named.reason == "the annotation file has another class for it"
    # It lies on no novel box.
    assert (levels(result)["ground truth"], result.verdict) == ("unproven", "not proven")


def test_a_file_with_other_ids_has_the_same_objects(shapes_store, truth, tmp_path):
    document, _ = truth
    for one in document["annotations"]:
        one["id"] += 10**6
    (tmp_path / "published.json").write_text(json.dumps(document))
    result = examine(shapes_store, annotations=tmp_path / "published.json")
    assert (levels(result)["ground truth"], levels(result)["cached objects"]) == ("ok", "ok")


def test_a_row_of_no_class_is_refused(store):
    rewrite(store, "ground_truth/class_index", 2, np.array(99, "<i4"))
    assert refused(lambda: examine(store)).endswith("ground_truth has a class_index beyond its 20 class names")


def test_an_object_with_two_labels_is_named_and_no_violation(shapes_store, truth, tmp_path):
    document, name_of = truth
    one = annotations_of(truth, SHAPES_SPLIT.base)[0]
    star = next(number for number, name in name_of.items() if name == "star")
    document["annotations"].append({**one, "id": 10**6, "category_id": star})
    (tmp_path / "double.json").write_text(json.dumps(document))
    result = examine(shapes_store, annotations=tmp_path / "double.json")
    assert result.verdict == "passed"
    (named,) = [named for finding in result.findings for named in finding.named]
    assert (named.annotation_id, named.novel["annotation_id"]) == (one["id"], 10**6)


@pytest.mark.parametrize(
    ("source", "at", "levels_of"),
    [
        # A window, and a region that no vote has moved; a region that no window is; a file's boxes; a network's.
        ("windows", ([10, 20, 30, 40], [10, 20, 30, 40]), (0, 2)),
        ("windows", (None, [10.5, 20, 30, 40]), (1, 0)),
        ("file", ([10, 20, 30, 40], [10.5, 20, 30, 40]), (1, 1)),
        ("network", ([10, 20, 30, 40], None), (1, 0)),
    ],
)
def test_equal_boxes_are_a_violation_only_where_chance_makes_none(source, at, levels_of, store, truth, tmp_path):
    document, name_of = truth
    star = next(number for number, name in name_of.items() if name == "star")
    image = document["images"][0]["id"]
    for number, (product, box) in enumerate(zip(("proposals", "regions"), at, strict=True)):
        if box is None:
            continue
        rewrite(store, f"{product}/box", 0, np.array(box, "<f4"))
        novel = {"id": 10**6 + number, "image_id": image, "category_id": star, "iscrowd": 0}
        x1, y1, x2, y2 = box
        document["annotations"].append({**novel, "bbox": [x1, y1, x2 - x1, y2 - y1]})
    (tmp_path / "more.json").write_text(json.dumps(document))
    file = read_annotation_file(tmp_path / "more.json", SHAPES_SPLIT)
    _, certain, chance = regions_on_novel_ones(Store(store), file, source)
    assert (certain.count, chance.count) == levels_of


def test_regions_are_compared_with_crowds_and_boxes_without_an_id_too(store, truth, tmp_path):
    document, name_of = truth
    star = next(number for number, name in name_of.items() if name == "star")
    image = document["images"][0]["id"]
    rewrite(store, "proposals/box", 0, np.array([10, 20, 30, 40], "<f4"))
    rewrite(store, "proposals/box", 1, np.array([11, 20, 30, 40], "<f4"))
    novel = {"image_id": image, "category_id": star}
    document["annotations"] += [
        {**novel, "id": 10**6, "bbox": [10, 20, 20, 20], "iscrowd": 1},
        {**novel, "id": "x", "bbox": [11, 20, 19, 20], "iscrowd": 0},
        {**novel, "id": 10**6 + 1, "bbox": "x", "iscrowd": 0},
    ]
    (tmp_path / "more.json").write_text(json.dumps(document))
    result = examine(store, annotations=tmp_path / "more.json")
    (found,) = [one for one in result.findings if one.subject == "regions"]
    assert len(found.named) == 2
    assert "1 that may be novel have no image, class or box" in texts(result, "annotations")
    clean = examine(store)
    assert "that may be novel" not in texts(clean, "annotations")
    assert texts(result, "unlabelled") == texts(clean, "unlabelled")


def test_all_boxes_are_counted_and_a_hundred_named(truth, tmp_path):
    document, name_of = truth
    star = next(number for number, name in name_of.items() if name == "star")
    image = document["images"][0]
    boxes = [[x, 3, 5.5, 5] for x in range(150)]
    image["width"] = 400
    document["annotations"] = [
        {"id": number, "image_id": image["id"], "category_id": star, "bbox": box, "iscrowd": 0}
        for number, box in enumerate(boxes, start=1)
    ]
    (tmp_path / "many.json").write_text(json.dumps(document))
    file = read_annotation_file(tmp_path / "many.json", SHAPES_SPLIT)
    stored = StoredBoxes(
        image_id=np.full(150, image["id"]),
        annotation_id=np.arange(1, 151),
        class_index=np.zeros(150, np.int32),
        box=np.array([[x, y, x + width, y + height] for x, y, width, height in boxes], np.float32),
    )
    names = SHAPES_SPLIT.base
    wrong, named = wrong_boxes(stored, names, file)
    assert (len(wrong), len(named)) == (150, 100)
    count, named = objects_on_novel_ones(stored, names, file, but=np.array([], np.int64))
    assert (count, len(named)) == (150, 100)
    assert objects_on_novel_ones(stored, names, file, but=wrong) == (0, [])


def test_proposals_from_outside_are_flagged_and_true_boxes_among_them_named(shapes_root, truth, tmp_path):
    place = Place(shapes_root, tmp_path)
    novel = annotations_of(truth, SHAPES_SPLIT.novel)
    leaked, inside = novel[0], {one["id"]: one for one in truth[0]["images"]}
    boxes = [{"image_id": leaked["image_id"], "bbox": leaked["bbox"], "score": 0.9}]
    boxes += [{"image_id": image, "bbox": [10.5, 20.25, 30, 30], "score": 0.5} for image in inside]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    for override in (f"proposals.boxes={tmp_path / 'boxes.json'}", "proposals.drop_base_guesses=false"):
        place.set(override)
    place.build()
    result = examine(tmp_path / "store")
    found = levels(result)
    assert (found["proposals"], found["regions"]) == ("unproven", "violation")
    assert "not recorded what its maker had learned from" in texts(result, "proposals")
    named = next(one for one in result.findings if one.subject == "regions").named
    assert {(one.image_id, one.novel["annotation_id"]) for one in named} == {(leaked["image_id"], leaked["id"])}


def test_in_the_strict_setting_names_are_named_with_the_settings_that_used_them(run):
    change_config(run, "train", "pseudo_confidence", 0.8)
    result = examine(run, "ovd-strict")
    violations = {one.subject: one.text for one in result.findings if one.level == "violation"}
    assert violations.keys() == {"names in filters", "names in training"}
    assert "proposals.score=entropy, proposals.drop_base_guesses=true" in violations["names in filters"]
    assert violations["names in training"].endswith("by loss.novel_names=true, train.pseudo_confidence=0.8")
    assert levels(result)["unlabelled"] == "note"
    assert examine(run).verdict == "passed"
    audits = re.findall(r"- `([\w-]+)`: (\w+)", (run / "card.md").read_text())
    assert audits == [("zad", "passed"), ("ovd-strict", "violation")]


def test_who_gives_no_novel_name_passes_the_strict_setting(shapes_root, truth, tmp_path):
    place = Place(shapes_root, tmp_path)
    place.replace(f"novel = {json.dumps(SHAPES_SPLIT.novel)}", "novel = []")
    place.set("proposals.drop_base_guesses=false")
    place.build()
    place.train()
    result = examine(tmp_path / "run", "ovd-strict")
    assert result.verdict == "passed"
    assert texts(result, "names") == "no novel name is known to the store"
    assert sum(result.unlabelled["other"].values()) == len(annotations_of(truth, SHAPES_SPLIT.novel))
    assert "objects of other classes" in texts(result, "unlabelled")


def test_a_run_without_records_is_not_proven_and_says_what_is_missing(run):
    (run / "training_boxes.json").unlink()
    (run / "stores.json").unlink()
    done = ezsd("audit", run, "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["verdict"]) == (1, "not proven")
    unproven = {one["subject"]: one["text"] for one in found["findings"] if one["level"] == "unproven"}
    assert unproven == {
        "store": "not recorded: which bytes the run was trained on",
        "training": "not recorded: which boxes entered",
    }
    assert "| boxes | not recorded |" in (run / "card.md").read_text()


def test_boxes_of_the_very_file_that_are_not_its_base_boxes_are_a_violation(run):
    known = read_boxes(Run.open(run))
    write_json(run / "training_boxes.json", [{**known[0], "sha256": "ab" * 32}])
    result = examine(run)
    assert levels(result)["training"] == "violation"
    assert "others than the base boxes of the very file" in texts(result, "training")
    write_json(run / "training_boxes.json", [{**known[0], "sha256": "ab" * 32, "annotations_sha256": "cd" * 32}])
    assert levels(examine(run))["training"] == "unproven"
    # An earlier version began it.
    write_json(run / "training_boxes.json", [{**known[0], "step": 4}])
    result = examine(run)
    assert levels(result)["training"] == "unproven"
    assert texts(result, "training").startswith("not recorded: which boxes entered before step 4 ")


def test_masks_need_the_file_that_they_were_read_from(run):
    change_config(run, "model", "masks", True)
    assert levels(examine(run))["masks"] == "ok"
    known = read_boxes(Run.open(run))
    write_json(run / "training_boxes.json", [{**known[0], "annotations_sha256": "cd" * 32}])
    assert levels(examine(run))["masks"] == "unproven"


def test_a_run_records_the_boxes_of_each_start_that_draws_others(run, shapes_store, shapes_root):
    opened, store = Run.open(run), Store(shapes_store)
    ids, file = store.image_ids.tolist(), shapes_root / TRAIN
    (first,) = read_boxes(opened)
    assert first["sha256"] == dataset_inputs(store.manifest)["base_boxes_sha256"]
    record_boxes(opened, store, ids, file, 4)
    assert read_boxes(opened) == [first]
    record_boxes(opened, store, ids[:6], file, 4)
    assert [(one["step"], one["images"]) for one in read_boxes(opened)] == [(0, 12), (4, 6)]
    record_boxes(opened, store, ids, file, 2)
    assert read_boxes(opened) == [first]


def test_a_card_is_a_model_card_without_places_of_its_machine(run, shapes_root, shapes_store):
    change_config(run, "teacher", "weights", "/data/models/clip.safetensors")
    environment = read_object(run / "environment.json")
    assert environment["machine"]["processor"]
    write_json(run / "environment.json", {**environment, "preset": "shapes"})
    text = write_card(Run.open(run)).read_text()
    for place in (run.parent, shapes_root, shapes_store.parent, "/data/models"):
        assert str(place) not in text
    assert '| `teacher.weights` | `"clip.safetensors"` | `null` |' in text
    assert "| `train.steps` | `6` | `800` |" in text
    assert "`train.seed`" not in text
    evaluation = read_object(run / "eval.json")
    novel = evaluation["generalised"]["at"][evaluation["limit"]]["novel"]["AP50"]
    card = ModelCard(text)
    assert card.data.pipeline_tag == "zero-shot-object-detection"
    figures = {one.metric_name: one.metric_value for one in card.data.eval_results}
    assert figures["AP50, novel classes"] == round(100 * novel, 1)
    assert f"| novel | {100 * evaluation['generalised']['at'][evaluation['limit']]['novel']['AP']:.1f} |" in text
    assert yaml.safe_load(text.split("---")[1])["library_name"] == "ezsd"
    assert "None yet: `ezsd audit`" in text


@pytest.mark.parametrize(
    ("section", "key", "place"),
    [
        ("teacher", "weights", "../../home/me/x.pt"),
        ("proposer", "weights", "~/secret/x.pt"),
        ("proposer", "run", "secret\\x.pt"),
        ("teacher", "background", "C:\\secret\\x.pt"),
    ],
)
def test_of_a_place_a_card_has_the_last_part(run, section, key, place):
    change_config(run, section, key, place)
    environment = read_object(run / "environment.json")
    write_json(run / "environment.json", {**environment, "preset": "shapes"})
    text = write_card(Run.open(run)).read_text()
    assert f'| `{section}.{key}` | `"x.pt"` |' in text


def test_a_card_says_what_an_audit_compared_and_whether_the_run_has_changed_since(run, truth, tmp_path):
    document, name_of = truth
    injected = annotations_of(truth, SHAPES_SPLIT.base)[3]
    injected["category_id"] = next(number for number, name in name_of.items() if name == "star")
    (tmp_path / "published.json").write_text(json.dumps(document))
    result = examine(run, annotations=tmp_path / "published.json")
    card = (run / "card.md").read_text()
    assert f"compared with `published.json`, sha256 {result.facts['annotations']['sha256'][:12]})" in card
    assert "is not claimed, for an audit found a violation" in card
    assert ("names alone" in card, "by name alone" in card, "outdated" in card) == (False, False, False)
    # Names are none of its boxes.
    assert examine(run, "ovd-strict").verdict == "violation"
    examine(run)
    card = (run / "card.md").read_text()
    assert "compared with `instances_train.json`" in card
    assert ("names alone" in card, "outdated" in card) == (True, False)
    write_json(run / "audit.json", {**read_object(run / "audit.json"), "step": 2})
    assert "; outdated: the run has changed since" in write_card(Run.open(run)).read_text()
    write_json(run / "stores.json", [{"step": 0, "sha256": "ab" * 32}])
    assert write_card(Run.open(run)).read_text().count("outdated") == 2


@pytest.mark.parametrize("figures", [True, False])
def test_a_card_says_whether_anything_was_measured(run, figures):
    if not figures:
        (run / "eval.json").unlink()
    text = write_card(Run.open(run)).read_text()
    assert ("Nothing was measured" in text, "model-index" in text) == (not figures, figures)


def test_a_damaged_audit_is_removed_and_made_again(run):
    examine(run, "ovd-strict")
    (run / "audit-ovd-strict.json").write_text("{}")
    said = refused(lambda: examine(run))
    assert "audit-ovd-strict.json: is damaged" in said
    assert said.endswith("; remove it and run `ezsd audit` again")
    (run / "audit-ovd-strict.json").unlink()
    assert examine(run).verdict == "passed"


@pytest.mark.parametrize(
    ("name", "changes", "cure"),
    [
        ("eval.json", {"generalised": 3, "limit": "x", "annotations": {}}, "remove it and run `ezsd eval` again"),
        (
            "eval.json",
            {"generalised": {"at": {"x": {"base": {}}}}, "limit": "x", "annotations": {}},
            "remove it and run `ezsd eval` again",
        ),
        ("crops.json", {"raw": 3, "re_normalised": []}, "remove it and run `ezsd eval --crops` again"),
        ("audit.json", {"step": "x"}, "remove it and run `ezsd audit` again"),
        ("audit.json", {"date": 3}, "remove it and run `ezsd audit` again"),
        ("environment.json", {"build_seconds": {"a": "b"}}, "run the same `ezsd train` again to write it"),
        ("environment.json", {"machine": {}}, "run the same `ezsd train` again to write it"),
        ("seconds.json", {"train": []}, "remove it"),
    ],
)
def test_an_odd_record_is_one_line_of_the_card(run, name, changes, cure):
    examine(run)
    before = (run / "card.md").read_text()
    old = read_object(run / name) if (run / name).is_file() else {}
    write_json(run / name, {**old, **changes})
    said = refused(lambda: write_card(Run.open(run)))
    assert said.startswith(f"{run / name}: is damaged")
    assert said.endswith(cure)
    assert "\n" not in said
    assert (run / "card.md").read_text() == before
    if cure.startswith("remove it"):
        (run / name).unlink()
        assert write_card(Run.open(run)).is_file()


def test_half_a_surrogate_pair_in_a_record_is_no_end_of_a_card(run):
    environment = read_object(run / "environment.json")
    write_json(run / "environment.json", {**environment, "machine": {"python": "3", "gpu": "\ud800"}})
    assert "ud800" in write_card(Run.open(run)).read_text()


@pytest.mark.parametrize("definition", [{}, {"split": 3}, {"split": {"base": ["a"], "novel": []}, "name": "x"}])
def test_an_odd_definition_of_a_dataset_is_one_line(run, definition):
    environment = read_object(run / "environment.json")
    write_json(run / "environment.json", {**environment, "dataset": definition})
    assert refused(lambda: examine(run)).startswith(f"{run / 'environment.json'}: is damaged")


def refused(call):
    with pytest.raises(EzsdError) as error:
        call()
    return as_options(str(error.value))


def test_who_gives_what_is_asked_for_gets_a_verdict(run, store, shapes_root, shapes_store, tmp_path):
    assert refused(lambda: examine(tmp_path / "nowhere")).endswith("no such folder; give that of a run or a store")
    environment = read_object(run / "environment.json")
    write_json(run / "environment.json", {**environment, "cache": str(tmp_path / "gone")})
    assert refused(lambda: examine(run)).endswith(f"its store is not in {tmp_path / 'gone'}; give --cache STORE")
    assert examine(run, cache=shapes_store).verdict == "passed"
    said = refused(lambda: examine(run, cache=shapes_store, data_root=tmp_path))
    assert said.endswith("are not there; give --data-root DIR or --annotations FILE")
    assert examine(run, cache=shapes_store, data_root=shapes_root).verdict == "passed"
    assert examine(run, cache=shapes_store, annotations=shapes_root / TRAIN).verdict == "passed"
    document = json.loads((shapes_root / TRAIN).read_text())
    others = {**document, "images": [{**document["images"][0], "id": 10**6}], "annotations": []}
    (tmp_path / "others.json").write_text(json.dumps(others))
    said = refused(lambda: examine(shapes_store, annotations=tmp_path / "others.json"))
    assert said.endswith("give the annotations of its training images")
    assert "goes with a run" in refused(lambda: examine(shapes_store, cache=store))
    spec = read_object(run / "run.json")
    for file in (run / "run.json", *run.glob("checkpoints/*/state.json")):
        found = read_object(file)
        found |= {"store": {**spec["store"], "digest": "ab" * 32}} if file.name == "run.json" else {}
        write_json(file, found)
    said = refused(lambda: examine(run, cache=shapes_store))
    assert said.endswith(f"another store than the run {run} was trained from; give --cache STORE of that one")


def test_an_address_in_a_record_is_not_asked(run, shapes_store):
    environment = read_object(run / "environment.json")
    # A place that would answer.
    address = f"file://{shapes_store}"
    write_json(run / "environment.json", {**environment, "cache": address})
    said = refused(lambda: examine(run))
    assert said.endswith(
        f"at {address}, and addresses are asked only where you give them; give --cache URL, or a folder"
    )
    (main,) = collect([Run.open(run)])
    with pytest.raises(RunError, match="which is no folder"):
        run_store(main)
    assert examine(run, cache=address).verdict == "passed"
    assert ezsd("audit", run, "--cache", address).returncode == 0


def test_a_store_that_does_not_know_its_data_asks_for_them(store, shapes_root):
    (store / "environment.json").unlink()
    assert refused(lambda: examine(store)).endswith("does not say where its annotations lie; give --data-root DIR")
    result = examine(store, data_root=shapes_root)
    assert "not recorded" in texts(result, "annotations")
    assert levels(result)["annotations"] == "note"
