"""The report: right numbers, nothing from outside, nobody's text becomes markup, the same bytes twice."""

import base64
import copy
import csv
import hashlib
import io
import json
import os
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from jinja2 import UndefinedError
from PIL import Image

from ezsd.cache import RaggedRows, Store, StoreWriter, commit_shard, file_digest, write_block
from ezsd.data.annotations import load_training
from ezsd.data.catalogue import Catalogue, Federated
from ezsd.data.shapes import SHAPES_SPLIT, scene
from ezsd.metrics import Results, Truth
from ezsd.pipeline.config.schema import STAGE_ONE, load_preset, to_tables
from ezsd.pipeline.data.datasets import find_dataset
from ezsd.pipeline.errors import DamagedFile, DatasetError, RunError
from ezsd.pipeline.extraction.provenance import describe
from ezsd.pipeline.files import write_json
from ezsd.pipeline.inference.visualize import BASE_COLOUR, NOVEL_COLOUR, draw_boxes, fit_scale
from ezsd.pipeline.report import write_report
from ezsd.pipeline.report.differences import paired, unpaired
from ezsd.pipeline.report.embedding_map import embedding_map
from ezsd.pipeline.report.galleries import PICTURE_BYTES, picture_address
from ezsd.pipeline.report.outcomes import Judged
from ezsd.pipeline.report.readable import readable
from ezsd.pipeline.report.run_data import dataset_label
from ezsd.pipeline.report.tables import Table, _drawn_options, csv_address
from ezsd.pipeline.runs.run import Run
from ezsd.vocabulary import Split

NASTY = """</td><script>alert("x&y")</script><img src=http://evil.example/'>"""
NASTY_FILE = '"><b onclick=x>&amp;.png'
# The run's own table has a hostile name in the place of the last novel one.
NAMES = (*SHAPES_SPLIT.names[:-1], NASTY)
BASE = len(SHAPES_SPLIT.base)
FILES = ("1.png", NASTY_FILE, "3.png", "4.png")
IMAGES = len(FILES)
CATEGORY = {name: number for number, name in enumerate(SHAPES_SPLIT.names, start=5)}


class Page(HTMLParser):
    """Tags, texts and attributes of a page; fails where tags do not match."""

    VOID = frozenset({"meta", "input"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.images = [], set(), [], []
        self.panels, self.headings, self.links, self.script = [], [], [], ""
        self.text, self.commands, self.cells, self.titles, self.said = "", "", [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        # As a browser shows it.
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag == "svg" and self.open[-1:] == ["div"] and " in " in dict(attrs)["aria-label"]:
            self.panels.append(dict(attrs)["aria-label"])
        if tag == "th":
            self.headings.append(dict(attrs))
        if tag == "a":
            self.links.append(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
            self.cells += [[]] if tag == "tr" else []

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag == "image":
            self.images.append(dict(attrs))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.script += data
            return
        self.text += data
        if self.open[-1:] in (["td"], ["th"]):
            self.cells[-1].append(data)
        if self.open[-2:] == ["pre", "code"]:
            self.commands += data
        if self.open[-1:] == ["figcaption"]:
            self.titles.append(data)
        if self.open[-3:] == ["figure", "div", "span"]:
            self.said.append(data)

    def row(self, *first):
        """Texts of the table row that begins with these."""
        return next(cells for cells in self.cells if cells[: len(first)] == list(first))[len(first) :]


def write_split(root, split, files):
    """Images 1 .. n; the first shows no novel object and all others do, so that a gallery must prefer those."""
    (root / split).mkdir(parents=True)
    images, annotations = [], []
    for index, file in enumerate(files):
        drawn = scene(seed=9, split=split, index=index)
        Image.fromarray(drawn.pixels).save(root / split / file, format="PNG")
        images.append({"id": index + 1, "file_name": file, "width": 128, "height": 128})
        names = drawn.names if index == 0 else ("ring", *drawn.names[1:])
        for (x1, y1, x2, y2), name in zip(drawn.boxes.tolist(), names, strict=True):
            if index > 0 or name in SHAPES_SPLIT.base:
                bbox = [x1, y1, x2 - x1, y2 - y1]
                entry = {"id": len(annotations) + 1, "image_id": index + 1, "category_id": CATEGORY[name], "bbox": bbox}
                annotations.append(entry)
    categories = [{"id": number, "name": name} for name, number in CATEGORY.items()]
    (root / "annotations").mkdir(exist_ok=True)
    document = {"images": images, "annotations": annotations, "categories": categories}
    (root / f"annotations/instances_{split}.json").write_text(json.dumps(document))


def manifest_of(root, **changes):
    annotations = load_training(root / "annotations/instances_train.json", SHAPES_SPLIT)
    config = load_preset("shapes", ["proposals.search=exhaustive", "proposals.max_regions=7"])
    dataset = find_dataset("shapes", root)
    return describe(dataset, annotations, config, {"name": "stand-in", **changes})


def write_store(path, manifest, *, regions=12):
    """Twelve regions per image, guessed to be novel, or none; the hostile name is the surest."""
    width = len(NAMES)
    box = np.tile(np.array([[10, 10, 60, 60]], "f4"), (12 * IMAGES, 1)) + np.arange(12 * IMAGES, dtype="f4")[:, None]
    guess = np.tile(np.array([width - 1] + [BASE + 1] * 11, "i4"), IMAGES)
    score = np.tile(np.linspace(2, 1, 12, dtype="f4"), IMAGES)
    embedding = np.eye(width, dtype="f2")[guess]
    kept = {"box": box, "score": score, "confidence": score / 3, "class_index": guess, "embedding": embedding}
    kept = {name: values[: regions * IMAGES] for name, values in kept.items()}
    counts, none = np.full(IMAGES, 12, "i4"), np.zeros(IMAGES, "i4")
    nothing = {"box": box[:0], "class_index": guess[:0], "annotation_id": np.zeros(0, "i8"), "embedding": embedding[:0]}
    size = [128] * IMAGES
    ids = list(range(1, IMAGES + 1))
    with StoreWriter.open(
        path, manifest, image_ids=ids, widths=size, heights=size, embed_dim=width, block_images=IMAGES
    ) as writer:
        writer.write_environment({"limit": None, "data_root": "elsewhere"})
        writer.write_per_store("teacher", {"values": np.ones(3, "f4")}, {"parameters": []})
        writer.write_per_store("text", {"embedding": np.eye(width, dtype="f4")}, {"names": list(NAMES)})
        products = {
            "proposals": RaggedRows(counts=counts, fields={"box": box, "score": score}),
            "regions": RaggedRows(counts=np.full(IMAGES, regions, "i4"), fields=kept),
            "ground_truth": RaggedRows(counts=none, fields=nothing),
        }
        write_block(path, writer.pending()[0], products)
        for task in writer.commit_tasks():
            commit_shard(path, task)
        writer.finish()


def evaluation(names, base, novel):
    """One label space of an evaluation's document, with figures of our choosing."""

    def scores(value, boxes=33):
        # None of large objects, as earlier versions had of no size.
        sizes = {"AP_small": 0.02, "AP_medium": 0.2, "AR_small": 0.03, "AR_medium": 0.3}
        return {"AP": 0.1, "AP50": value, "AP75": 0.1, "AR": 0.234, **sizes, "boxes": boxes}

    per_class = {
        name: scores((novel if name in NAMES[BASE:] else base) if name in names else None, 7) for name in NAMES
    }
    groups = {"base": base, "novel": novel, "all": (base or 0) / 2 + novel / 2}
    found = {
        "rules": "coco",
        "iou_type": "bbox",
        "max_detections": 100,
        "counted_per": "image",
        "images": IMAGES,
        "names": list(names),
        **{group: {**scores(value), "classes": 6} for group, value in groups.items()},
        "per_class": per_class,
    }
    return {"detections": 2, "most_per_image": 2, "at": {"100": found}}


def detection(image, name, bbox, score):
    """A detection as `ezsd eval` writes it; the annotation file lacks the hostile name."""
    number = CATEGORY.get(name, max(CATEGORY.values()) + 1)
    return {"image_id": image, "category_id": number, "name": name, "bbox": bbox, "score": score}


def write_run(folder, root, store, manifest, *, novel=0.361, steps=6, **loss):
    """A run folder as `ezsd train` and `ezsd eval` leave it."""
    settings = [
        "proposals.max_regions=7",
        f"train.steps={steps}",
        "train.seed=3",
        *(f"loss.{key}={value}" for key, value in loss.items()),
    ]
    spec = {
        "config": to_tables(load_preset("shapes", settings)),
        "store": {"digest": manifest.digest, "manifest": dict(manifest.fields)},
        "dataset": "shapes",
        "names": list(NAMES),
        "base_count": BASE,
        "re_normalisation": {"base_accuracy_before": 0.4567, "base_accuracy_after": 0.7891, "held_out_crops": 123},
        "backbone_weights": None,
        "embed_dim": 3,
        "layer_norms": [],
    }
    run = Run.create_or_resume(folder, spec, {"text": torch.eye(3)})
    teacher = {"name": "tiny-shapes", "weights": None, "template": "a {}", "background": "background"}
    versions = {"ezsd": "0.1.0", "torch": "2.11.0"}
    places = {"data_root": str(root), "cache": str(store)}
    run.write_environment({**places, "teacher": teacher, "device": "cpu", "versions": versions})
    lines = [{"step": s + 1, "loss": 9.0 - s, "box": 0.5, "learning_rate": 0.1, "seconds": 2.0} for s in range(steps)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    digest = file_digest(root / "annotations/instances_val.json").sha256
    scores = {"generalised": evaluation(NAMES, 0.577, novel)}
    scores |= {"limit": "100", "annotations": {"file": "instances_val.json", "sha256": digest}}
    write_json(folder / "eval.json", scores)
    found = [detection(2, NASTY, [20, 20, 40, 40], 0.9), detection(2, "gear", [70, 70, 30, 30], 0.29)]
    write_json(folder / "detections.json", found)
    run.record_seconds("train", 13)
    run.record_seconds("eval", 75.25)
    return run


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """A dataset, a store and two evaluated runs, for tests that change nothing."""
    folder = tmp_path_factory.mktemp("report")
    root = folder / "data"
    for split in ("train", "val"):
        write_split(root, split, FILES)
    write_json(root / "shapes.json", {"dataset": "shapes", "version": 1, "train": 4, "val": 4, "seed": 9})
    manifest = manifest_of(root)
    write_store(folder / "store", manifest)
    write_run(folder / "run", root, folder / "store", manifest)
    write_run(folder / "plain", root, folder / "store", manifest, novel=0.051, distillation=0)
    return at(folder)


def at(folder):
    """What lies in a folder that `untouched` filled."""
    runs = {name: Run.open(folder / name) for name in ("run", "plain")}
    return SimpleNamespace(folder=folder, root=folder / "data", store=folder / "store", **runs)


@pytest.fixture
def home(untouched, tmp_path):
    """A copy that may be damaged."""
    copied = at(shutil.copytree(untouched.folder, tmp_path / "home"))
    for run in (copied.run, copied.plain):
        run.write_environment(run.environment | {"data_root": str(copied.root), "cache": str(copied.store)})
    return copied


def report(home, *, images=0, **options):
    path = write_report(home.run, images=images, **{"data_root": None, "compare": [home.plain], **options})
    assert path == home.run.folder / "report.html"
    return path.read_text()


@pytest.fixture(scope="module")
def text(untouched):
    """The whole page of the untouched run."""
    return report(untouched, images=IMAGES)


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_the_results_table_says_what_the_evaluation_says(page):
    assert page.row("run", "base") == ["novel", "all"]
    assert page.row("run", "57.7") == ["36.1", "46.9"]
    assert page.row("plain") == ["57.7", "5.1", "31.4"]
    assert f"All {len(NAMES)} names are looked for at once. At most" in page.text
    assert "loss.distillation = 0.0" in page.text
    assert "shapes benchmark, synthetic; not COCO" in page.text
    assert "At most 100 detections per image count." in page.text


def test_novel_names_alone_have_a_column_of_their_own_from_any_version(home):
    """An earlier version calls them novel_only, and was always asked for them: like stands beside like."""
    for name, run in (("novel_alone", home.run), ("novel_only", home.plain)):
        table = json.loads((run.folder / "eval.json").read_text())
        write_json(run.folder / "eval.json", table | {name: evaluation(NAMES[BASE:], None, 0.444)})
        page = Page(report(home))
        assert page.row("run", "base") == ["novel", "all", "novel, alone"]
        assert page.row("run", "57.7") == ["36.1", "46.9", "44.4"]
        assert page.row("plain")[3:] == ["44.4" if run is home.plain else "–"]
        assert "in the last column the novel names, and no base name competes" in page.text
    (home.run.folder / "eval.json").write_text((home.plain.folder / "eval.json").read_text())
    assert "novel alone, boxes, at most 100" in Page(report(home)).text


def test_every_class_and_group_has_its_figures(page):
    assert page.row("novel", "10.0") == ["36.1", "10.0", "2.0", "20.0", "–", "23.4", "3.0", "30.0", "–", "33"]
    assert page.row(NASTY) == ["novel", "10.0", "36.1", "10.0", "2.0", "20.0", "–", "23.4", "3.0", "30.0", "–", "7"]
    assert page.row("circle", "base") == ["10.0", "57.7", "10.0", "2.0", "20.0", "–", "23.4", "3.0", "30.0", "–", "7"]


def test_tables_of_classes_can_be_had_as_csv_with_the_numbers_shown(failing):
    page = Page(report(failing.home))
    files = {
        dict(attributes)["download"]: base64.b64decode(dict(attributes)["href"].partition("base64,")[2]).decode()
        for attributes in page.links
        if "download" in dict(attributes)
    }
    assert files.keys() == {"classes.csv", "thresholds.csv"}
    for name, first in (("classes.csv", "group"), ("thresholds.csv", "threshold")):
        head, *rows = csv.reader(io.StringIO(files[name]))
        assert head == ["class", first, *page.row("class", first)]
        for title, *values in rows:
            assert page.row(title, values[0] or "\u2013") == [value or "\u2013" for value in values[1:]]
    assert [row[0] for row in csv.reader(io.StringIO(files["classes.csv"]))][1:] == list(NAMES)
    address = csv_address(Table(["class", "objects, all"], [["cup, red", "1,234"], ["mug", "\u2013"], ["=1+1", "2"]]))
    text = base64.b64decode(address.partition("base64,")[2]).decode()
    assert text.splitlines() == ['class,"objects, all"', '"cup, red",1234', "mug,", "'=1+1,2"]


def test_stage_times_and_accuracies_are_told(home):
    write_json(
        home.run.folder / "crops.json",
        {
            "raw": {"base": 0.561, "novel": None},
            "re_normalised": {"base": 0.802, "novel": None},
            "crops": {"base": 21, "novel": 0},
        },
    )
    home.run.write_environment(home.run.environment | {"build_seconds": {"extract": 61.0}})
    page = Page(report(home))
    assert page.row("base, held out of the tuning") == ["45.7", "78.9", "123"]
    assert page.row("base, validation") == ["56.1", "80.2", "21"]
    assert page.row("novel, validation") == ["–", "–", "0"]
    assert page.row("cache: extract") == ["61.0 s", "–"]
    assert page.row("train") == ["13.0 s", "13.0 s"]
    assert page.row("eval") == ["75.2 s", "75.2 s"]


def test_what_is_missing_is_a_dash_and_the_command_that_makes_it(home):
    (home.plain.folder / "eval.json").unlink()
    page = Page(report(home))
    assert page.row("plain") == ["–"] * 3
    assert f"ezsd eval --run {home.plain.folder}" in page.text
    assert page.row("novel, validation") == ["–"] * 3
    assert f"ezsd eval --run {home.run.folder} --crops" in page.text


def test_a_run_that_is_not_evaluated_is_refused_with_the_command(home):
    (home.run.folder / "eval.json").unlink()
    with pytest.raises(RunError, match=r"ezsd eval --run \S+run"):
        report(home)


def test_a_run_that_another_version_evaluated_is_refused(home):
    for table in ({"generalised": {"base": {"AP50": 0.5}}}, {"limit": "100"}):
        write_json(home.run.folder / "eval.json", table)
        with pytest.raises(RunError, match="another version"):
            report(home)


@pytest.mark.parametrize("name", ["run.json", "environment.json", "eval.json", "crops.json", "seconds.json"])
def test_a_damaged_file_of_a_run_is_named(home, name):
    file = home.plain.folder / name
    for content in ("{", "[]"):
        file.write_text(content)
        with pytest.raises(DamagedFile, match=rf"plain/{name}: is damaged"):
            report(home)


def test_a_torn_line_of_metrics_is_named(home):
    with (home.run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    with pytest.raises(DamagedFile, match=r"metrics.jsonl, line 7: is damaged"):
        report(home)


def test_a_run_of_another_version_is_refused(home):
    spec = home.run.spec
    for key, value in (("config", None), ("names", "ring"), ("base_count", None)):
        write_json(home.run.folder / "run.json", spec | {key: value})
        with pytest.raises(RunError, match=rf"run.json has no {key}; another version"):
            Run.open(home.run.folder)


def test_a_run_that_does_not_say_where_its_images_are_is_refused(home):
    write_json(home.run.folder / "environment.json", {"cache": str(home.store)})
    with pytest.raises(RunError, match=r"environment.json: does not say data_root"):
        report(home)


def test_detections_without_a_score_are_said_and_no_more(home):
    write_json(home.run.folder / "detections.json", [{"image_id": 1}])
    page = Page(report(home, images=1))
    assert "detections.json: [0].category_id: expected the id of a category" in page.text
    assert len(page.images) == 1


def test_runs_of_two_datasets_are_not_compared(home):
    write_json(home.plain.folder / "run.json", home.plain.spec | {"dataset": "coco"})
    with pytest.raises(RunError, match="plain.*coco, not on shapes"):
        report(home)


def test_runs_evaluated_on_two_ground_truths_are_not_compared(home):
    table = json.loads((home.plain.folder / "eval.json").read_text())
    write_json(home.plain.folder / "eval.json", table | {"annotations": {"file": "other.json", "sha256": "a1" * 32}})
    with pytest.raises(RunError, match=r"plain`: evaluated on other.json \(sha256 a1a1\w*\), not on .*again"):
        report(home)


def test_compared_runs_are_read_at_the_limit_of_the_main_one(home):
    table = json.loads((home.plain.folder / "eval.json").read_text())
    for space in ("generalised",):
        found = copy.deepcopy(table[space]["at"]["100"])
        found["max_detections"] = 300
        for group in ("base", "novel", "all"):
            found[group]["AP50"] = 0.99
        table[space]["at"]["300"] = found
    write_json(home.plain.folder / "eval.json", table | {"limit": "300"})
    page = Page(report(home))
    assert "At most 100 detections per image count." in page.text
    assert page.row("plain") == ["57.7", "5.1", "31.4"]


def test_the_page_needs_nothing_from_outside(text, page):
    assert not page.tags & {"link", "iframe", "object", "embed", "base", "img"}
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href"):
            assert value.startswith(("data:image/jpeg;base64,", "data:text/csv;charset=utf-8;base64,", "#"))
    (policy,) = [value for name, value in page.attributes if name == "content" and "src" in value]
    # The one script that may run is the page's own, by its bytes.
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert policy.split(";")[0] == "default-src 'none'"
    assert policy.split(";")[-1].split() == ["script-src", f"'sha256-{digest}'"]
    assert text.count("<script") == 1
    # The hostile class name is the only text with an address in it.
    assert "://" not in text.replace("http://evil.example/", "")
    assert text.isascii()


def test_ids_are_unique_and_references_find_them(page):
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 10
    named = {value for name, value in page.attributes if name == "href" and not value.startswith("data:")}
    named |= {f"#{value}" for name, value in page.attributes if name == "aria-labelledby"}
    assert {value[1:] for value in named} <= set(ids)
    assert "#failures" in named


def test_tables_say_what_their_headings_are_of(page):
    assert len(page.headings) > 100
    assert all(heading.get("scope") in ("col", "row") for heading in page.headings)


def test_names_of_classes_and_files_stay_text(text, page):
    assert NASTY not in text
    assert NASTY in page.text
    assert NASTY_FILE in page.titles
    assert "b" not in page.tags
    assert any(NASTY in panel and NASTY_FILE in panel for panel in page.panels)


def test_what_the_template_does_not_know_is_an_error(untouched, monkeypatch):
    monkeypatch.setattr("ezsd.pipeline.report.tables.results", lambda runs: {"columns": {}})
    with pytest.raises(UndefinedError, match="rows"):
        report(untouched)


def test_pictures_that_are_not_selected_prefer_novel_objects(page):
    shown = [title for title in page.titles if title.endswith(".png")]
    assert shown[-2 * IMAGES :] == [*FILES[1:], FILES[0]] * 2


def test_pictures_are_the_bare_images_and_each_is_there_once_for_both_panels(page):
    shown = [panel.split(" in ")[0] for panel in page.panels]
    assert shown == ["ground truth", "detections"] * 2 * IMAGES + ["ground truth", "teacher's regions"] * IMAGES
    assert len(page.images) == 3 * IMAGES
    for image in page.images:
        data = base64.b64decode(image["href"].partition(",")[2])
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.size == (128, 128) == (int(image["width"]), int(image["height"]))


def test_only_sure_detections_and_the_best_regions_are_drawn(page):
    drawn = {panel.split(":")[0]: panel.partition(": ")[2] for panel in page.panels}
    assert drawn[f"detections in {NASTY_FILE}"] == NASTY
    assert drawn["detections in 3.png"] == "nothing"
    assert drawn["teacher's regions in 3.png"] == ", ".join([NASTY] + ["ring"] * 9)
    # The fixture's confidence is two thirds for the surest.
    assert f"{NASTY} 0.67" in page.text
    assert "no detection with that score" in page.text


def test_the_same_run_gives_the_same_bytes(untouched, text):
    assert report(untouched, images=IMAGES) == text


@pytest.mark.parametrize("damage", ["gone", "unfinished", "another"])
def test_a_store_that_is_not_there_is_said_and_no_more(home, damage):
    if damage == "unfinished":
        (home.store / "COMMIT.json").unlink()
    else:
        shutil.rmtree(home.store)
    if damage == "another":
        write_store(home.store, manifest_of(home.root, more=1))
    page = Page(report(home, images=1))
    assert "No pictures: " in page.text
    assert "No figures of the store: " in page.text
    assert "No map: " in page.text
    assert str(home.store) in page.text
    assert len(page.images) == 2
    assert page.row("plain")[0] == "57.7"


def test_no_picture_is_left_out_for_a_bug():
    with pytest.raises(OSError, match="Bad file descriptor"):
        readable(lambda: os.close(-1))
    part = readable(lambda: Path("nowhere/image").read_bytes())
    assert part.content is None
    assert "nowhere/image" in part.missing
    assert part.then(len) == part


def test_images_that_are_gone_are_said_and_no_more(home):
    home.root.rename(home.root.with_name("moved"))
    page = Page(report(home, images=1))
    # Kinds of errors, three galleries, thresholds; regions and figures of the store.
    assert page.text.count("which is gone; give --data-root DIR") == 7
    assert page.images == []


def test_moved_images_are_found_by_data_root(home):
    moved = home.root.with_name("moved")
    home.root.rename(moved)
    assert len(Page(report(home, images=1, data_root=moved)).images) == 3
    with pytest.raises(DatasetError, match="gone"):
        report(home, data_root=home.root)


def test_another_dataset_in_the_same_place_shows_no_regions(home):
    path = home.root / "annotations/instances_train.json"
    document = json.loads(path.read_text())
    for entry in document["annotations"]:
        entry["bbox"][0] += 1
    path.write_text(json.dumps(document))
    page = Page(report(home, images=1))
    assert "made from other annotations" in page.text
    assert len(page.images) == 2
    assert "component 1" in page.text


def test_the_commands_make_the_same_settings(untouched, page):
    lines = [shlex.split(line) for line in page.commands.splitlines()]
    assert [line[1] for line in lines] == ["data", "cache", "train", "eval", "train", "eval", "report"]
    trainings = [line for line in lines if line[1] == "train"]
    for line, run in zip(trainings, (untouched.run, untouched.plain), strict=True):
        settings = [line[i + 1] for i, word in enumerate(line) if word == "--set"]
        made, recorded = to_tables(load_preset(after(line, "--preset"), settings)), run.spec["config"]
        assert {k: v for k, v in made.items() if k not in STAGE_ONE} == {
            k: v for k, v in recorded.items() if k not in STAGE_ONE
        }
        # What the store was built with is not trained with.
        assert not [word for word in settings if word.partition(".")[0] in STAGE_ONE]
    assert "proposals.max_regions=7" in lines[1]
    assert lines[0][-2:] == ["--seed", "9"]
    assert after(lines[1], "--dataset") == "shapes"
    assert after(lines[1], "--preset") == "shapes"


def test_a_run_on_clutter_is_drawn_again_by_its_own_command(tmp_path):
    options = {"dataset": "clutter", "version": 1, "train": 4, "val": 4, "seed": 9}
    write_json(tmp_path / "clutter.json", options)
    run = SimpleNamespace(spec={"dataset": "clutter-split2"}, environment={"data_root": str(tmp_path)})
    assert _drawn_options(run, None) == options
    assert dataset_label(run) == "clutter-split2 benchmark, synthetic; not COCO"


def after(line, option):
    """The value of an option on a command line."""
    return line[line.index(option) + 1]


def test_a_dataset_of_ones_own_is_asked_for_as_a_file(home):
    for run in (home.run, home.plain):
        write_json(run.folder / "run.json", run.spec | {"dataset": "farm"})
    lines = [shlex.split(line) for line in Page(report(home)).commands.splitlines()]
    assert [line[1] for line in lines] == ["cache", "train", "eval", "train", "eval", "report"]
    assert after(lines[0], "--dataset") == "farm.toml"


def test_a_run_without_metrics_and_pictures_still_has_a_page(home):
    (home.run.folder / "metrics.jsonl").unlink()
    page = Page(report(home, compare=[]))
    assert "No metrics were recorded." in page.text
    assert page.images == []


# Why


def boxes_of(home, image):
    """Names and boxes of a validation image."""
    document = json.loads((home.root / "annotations/instances_val.json").read_text())
    name = {number: name for name, number in CATEGORY.items()}
    return [(name[one["category_id"]], one["bbox"]) for one in document["annotations"] if one["image_id"] == image]


def detect(home, found, run=None):
    """Give the run, or another one, these detections."""
    folder = (run or home.run).folder
    write_json(folder / "detections.json", found)
    table = json.loads((folder / "eval.json").read_text())
    table["generalised"]["detections"] = len(found)
    write_json(folder / "eval.json", table)


@pytest.fixture
def failing(home):
    """Image 1 is right, each object of image 4 is called a star, image 2 has a right one twice, image 3 is missed."""
    first, fourth, second = (boxes_of(home, image) for image in (1, 4, 2))
    found = [detection(1, name, box, 0.9) for name, box in first]
    found += [detection(4, "star", box, 0.6) for _, box in fourth]
    found += [detection(2, second[0][0], second[0][1], score) for score in (0.8, 0.7)]
    found += [detection(3, "circle", [0, 0, 4, 4], 0.95), detection(3, "circle", [0, 0, 4, 4], 0.2)]
    detect(home, found)
    return SimpleNamespace(first=first, second=second, third=boxes_of(home, 3), fourth=fourth, home=home)


def test_kinds_of_errors_are_counted_by_group(failing):
    page = Page(report(failing.home))
    assert "star" in NAMES[BASE:]
    right, confused = len(failing.first) + 1, len(failing.fourth)
    counted = right + confused + 2
    every = sum(map(len, (failing.first, failing.second, failing.third, failing.fourth)))
    missed = len(failing.third) + len(failing.second) - 1
    assert page.row("right")[2] == f"{right} ({100 * right / counted:.1f})"
    assert page.row("confused")[1:] == [
        f"{confused} ({100 * confused / (confused + 2):.1f})",
        f"{confused} ({100 * confused / counted:.1f})",
    ]
    assert page.row("doubled")[2] == f"1 ({100 / counted:.1f})"
    assert page.row("background")[0] == f"1 ({100 / (len(failing.first) + 1):.1f})"
    assert page.row("missed objects")[2] == f"{missed} ({100 * missed / every:.1f})"
    # At 0.1 one more detection counts, at 0.5 as many as at 0.3.
    assert page.row("background", "2") == ["1", "1"]


def test_errors_in_a_federated_file_are_those_of_its_ap50():
    """An ignored object forgives one detection, a class without all its boxes every one."""
    names, box = ("cup", "cat"), [0.0, 0.0, 10.0, 10.0]
    truth = Truth(
        path=Path("no.json"),
        split=Split(base=names, novel=()),
        image_ids=np.array([1]),
        image_id=np.array([1, 1]),
        class_index=np.array([0, 1]),
        xywh=np.array([box, [50.0, 50.0, 10.0, 10.0]]),
        area=np.array([100.0, 100.0]),
        crowd=np.array([False, False]),
        ignore=np.array([True, False]),
        annotation_id=np.arange(2),
        catalogue=Catalogue(
            ids={"cup": 0, "cat": 1},
            frequency={},
            federated=Federated(negative={1: frozenset()}, not_exhaustive={1: frozenset({1})}),
        ),
        image_size=np.array([[100, 100]]),
        images=None,
    )
    far = [80.0, 80.0, 5.0, 5.0]
    results = Results(
        image_id=np.ones(5, np.int64),
        class_index=np.array([0, 0, 1, 1, 0]),
        xywh=np.array([box, box, [50.0, 50.0, 10.0, 10.0], far, [0.0, 0.0, 100.0, 100.0]]),
        score=np.array([0.9, 0.8, 0.7, 0.6, 0.5]),
        masks=None,
    )
    outcomes = Judged(truth, results, "", 2).shown
    assert outcomes.kind.tolist() == ["ignored", "background", "right", "ignored", "background"]
    assert outcomes.missed.tolist() == [False, False]


def test_confused_classes_are_named_with_their_numbers(failing):
    page = Page(report(failing.home))
    taken = [name for name, _ in failing.fourth]
    for name in taken:
        assert page.row(name, "star")[0] == str(taken.count(name))
    matrix = next(cells for cells in page.cells if cells[0].startswith("object is"))
    column = matrix.index("star")
    assert page.row("no object (background)")[column - 1] == "\u00b7"
    rows = [cells for cells in page.cells if len(cells) == len(matrix) and cells[0] == taken[0]]
    assert rows[0][column] == str(taken.count(taken[0]))


def test_failures_come_first_and_the_page_says_how_they_were_selected(failing):
    page = Page(report(failing.home, images=IMAGES))
    errors = {4: len(failing.fourth), 3: len(failing.third) + 1, 2: len(failing.second)}
    worst = sorted(errors, key=lambda image: (-errors[image], image))
    shown = [title for title in page.titles if title.endswith(".png")]
    assert shown[:3] == [FILES[image - 1] for image in worst]
    assert "selected by result, to show failures; the next section is not. 3 of 4 images have an error." in page.text
    assert f"0 wrong detections, {len(failing.third)} missed" not in page.text
    assert f"1 wrong detection, {len(failing.third)} missed" in page.text
    assert f"star 0.60, confused: {failing.fourth[0][0]}" in page.text


@pytest.fixture
def differing(home):
    """Both runs are right on image 1; on image 2 the run alone on all objects, on image 3 plain on the first.

    Of image 2 plain calls the first object a star, and misses the others. In image 4 the run has a wrong detection.
    """
    second, third = boxes_of(home, 2), boxes_of(home, 3)
    common = [detection(1, name, box, 0.9) for name, box in boxes_of(home, 1)]
    wrong = detection(4, "circle", [0, 0, 4, 4], 0.95)
    # Below the score that is drawn.
    unsure = [detection(3, name, box, 0.2) for name, box in third]
    detect(home, [*common, *(detection(2, name, box, 0.8) for name, box in second), *unsure, wrong])
    detect(home, [*common, detection(2, "star", second[0][1], 0.7), detection(3, *third[0], 0.6)], home.plain)
    return SimpleNamespace(second=second, third=third, home=home)


def compared_panels(page):
    """Panels of the gallery of compared runs, whose titles are those of the runs."""
    return [one for one in page.panels if one.startswith(("run in ", "plain in "))]


def test_where_two_runs_differ_most_they_stand_side_by_side_with_the_difference_in_words(differing):
    (first, *others), third = [name for name, _ in differing.second], differing.third[0][0]
    assert first == "ring"
    assert len(set(others)) == len(others) > 0
    page = Page(report(differing.home, images=IMAGES))
    missed = ", ".join(sorted(others))
    assert [(one.partition(":")[0], sorted(one.partition(": ")[2].split(", "))) for one in compared_panels(page)] == [
        (f"run in {FILES[1]}", sorted([first, *others])),
        # Objects that it misses are drawn where the other is right.
        (f"plain in {FILES[1]}", sorted(["star", *others])),
        (f"run in {FILES[2]}", [third]),
        (f"plain in {FILES[2]}", [third]),
        (f"run in {FILES[3]}", ["circle"]),
        (f"plain in {FILES[3]}", ["nothing"]),
    ]
    assert "3 of 4 images differ." in page.text
    said = [words for words in page.said if words.startswith("right in")]
    assert said[0].startswith("right in run alone: ring (confused in plain), ")
    listed = said[0].partition("plain), ")[2].partition(" (missed in plain); ")
    assert ", ".join(sorted(listed[0].split(", "))) == missed
    assert listed[2] == "wrong detections: 0 in run, 1 in plain"
    assert said[1] == f"right in plain alone: {third} (missed in run); wrong detections: 0 in run, 0 in plain"
    assert "the same objects are right; wrong detections: 1 in run, 0 in plain" in page.said
    assert f"{first} 0.80, right, here alone" in page.text
    assert f"{third} 0.60, right, here alone" in page.text


def test_compared_runs_share_the_pictures_of_one_gallery(differing):
    home = differing.home
    other = another_seed(home, "plain4", home.plain, 4, 0.051)
    titles = [one.partition(" in ")[0] for one in Page(report(home, images=3, compare=[home.plain, other])).panels]
    assert [titles.count(label) for label in ("run", "plain", "plain4")] == [3, 2, 1]
    page = Page(report(home, images=1, compare=[home.plain, other]))
    assert len(compared_panels(page)) == 2
    assert "The other compared runs have no pictures" in page.text
    page = Page(report(home, compare=[]))
    assert "Where the runs differ" not in page.text


def test_a_compared_run_without_detections_that_fit_says_so_and_no_more(differing):
    home = differing.home
    (home.plain.folder / "detections.json").unlink()
    said = f"detections.json: missing; `ezsd eval --run {home.plain.folder}` makes it"
    page = Page(report(home, images=IMAGES))
    assert said in page.text
    assert compared_panels(page) == []
    spec = home.plain.spec
    write_json(home.plain.folder / "run.json", spec | {"base_count": BASE + 1})
    assert "plain: has other classes than the main run" in Page(report(home, images=1)).text
    (home.plain.folder / "eval.json").unlink()
    assert "plain: not evaluated yet; " in Page(report(home, images=1)).text


def test_a_threshold_of_each_class_is_proposed(failing):
    page = Page(report(failing.home))
    name = failing.second[0][0]
    count = sum(one == name for _, each in vars(failing).items() if isinstance(each, list) for one, _ in each)
    row = page.row(name, "0.80")
    assert row[:2] == ["100.0", f"{100 / count:.1f}"]
    assert row[-1] == str(count)
    assert f"precision over recall of {name}" in {v for n, v in page.attributes if n == "aria-label"}


def test_a_class_with_low_scores_alone_has_a_curve_and_no_histogram(home):
    (name, box), *_ = boxes_of(home, 1)
    detect(home, [detection(1, name, box, 0.03)])
    labels = {value for key, value in Page(report(home)).attributes if key == "aria-label"}
    assert f"precision over recall of {name}" in labels
    assert f"right and wrong detections of {name} by score" not in labels


def test_annotations_and_detections_of_another_evaluation_are_not_judged(home):
    write_json(home.run.folder / "detections.json", [detection(1, "star", [0, 0, 9, 9], 0.9)])
    page = Page(report(home))
    assert "has 1 detection, and 2 were evaluated; run ezsd eval --run" in page.text.replace("`", "")
    place = home.root / "annotations/instances_val.json"
    place.write_text(place.read_text() + " ")
    assert "instances_val.json: has changed since the evaluation" in Page(report(home)).text


def another_seed(home, name, source, seed, novel):
    """A copy of a run that was trained with another seed, and has another novel AP50."""
    shutil.copytree(source.folder, home.folder / name)
    spec = source.spec
    spec["config"]["train"]["seed"] = seed
    write_json(home.folder / name / "run.json", spec)
    table = json.loads((source.folder / "eval.json").read_text())
    table["generalised"]["at"]["100"]["novel"]["AP50"] = novel
    write_json(home.folder / name / "eval.json", table)
    return Run.open(home.folder / name)


def test_runs_of_several_seeds_are_compared_in_pairs_with_an_interval(home):
    others = [
        another_seed(home, "run4", home.run, 4, 0.401),
        another_seed(home, "plain4", home.plain, 4, 0.071),
        another_seed(home, "run5", home.run, 5, 0.5),
    ]
    page = Page(report(home, compare=[home.plain, *others]))
    # Of novel classes +31.0 and +33.0 points: 32 +- 12.706 * 1.
    label = "run, run4, run5 minus plain, plain4"
    assert page.row(label) == [
        "+0.0 [+0.0, +0.0]",
        "+32.0 [+19.3, +44.7]",
        "+15.5 [+15.5, +15.5]",
        "3, 4, paired; without 5",
    ]
    assert page.row("run, run4, run5")[1] == "42.1 (36.1 to 50.0)"


def test_one_pair_has_no_interval_and_no_common_seed_is_said(home):
    assert Page(report(home)).row("run minus plain") == ["+0.0", "+31.0", "+15.5", "3; one seed, no interval"]
    apart = another_seed(home, "plain4", home.plain, 4, 0.051)
    row = Page(report(home, compare=[apart])).row("run minus plain4")
    assert row[1:] == ["+31.0", "+15.5", "3 against 4, not paired; no interval"]


def test_intervals_are_those_of_student_and_welch():
    one = paired([1.0, 2.0, 4.0])
    assert (one.mean, one.half) == (pytest.approx(7 / 3), pytest.approx(4.303 * np.std([1, 2, 4], ddof=1) / 3**0.5))
    two = unpaired([1.0, 2.0, 3.0], [5.0, 7.0])
    # Welch's degrees of freedom are 1.45: rounded down to 1.
    assert (two.mean, two.half) == (-4, pytest.approx(12.706 * (1 / 3 + 1) ** 0.5))
    assert paired([]) is None
    assert unpaired([1.0], []) is None
    assert unpaired([1.0], [2.0]).half is None


def test_ap_over_the_steps_is_drawn_where_it_was_recorded(home, page):
    assert "Not recorded: no run here has validated while it was trained" in page.text
    lines = [{"step": step, "base": 0.5, "novel": None if step == 2 else 0.25, "all": 0.4} for step in (2, 4, 6)]
    (home.run.folder / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn = Page(report(home))
    assert "Not recorded: no run here has validated" not in drawn.text
    for group in ("base", "novel", "all"):
        assert ("aria-label", f"AP50 of {group} classes in percent over training steps") in drawn.attributes


def test_the_store_says_what_its_filters_dropped_and_what_it_does_not_record(page):
    # 12 proposals in each of 4 images, no base box in the store, and as many regions as proposals.
    assert page.row("proposals in the store") == ["48"]
    assert page.row("on a base object (IoU 0.3 or more)") == ["0"]
    assert page.row("taken for a base class by the teacher") == ["not recorded"]
    assert page.row("kept as regions") == ["48"]
    assert "48 regions of 4 training images; 0 images have none." in page.text
    assert "component 1, " in page.text


def test_an_image_without_a_region_says_so(home):
    shutil.rmtree(home.store)
    write_store(home.store, manifest_of(home.root), regions=0)
    for run in (home.run, home.plain):
        (run.folder / "stores.json").unlink(missing_ok=True)
    page = Page(report(home, images=1))
    assert "no region of this image was kept by the filters" in page.text
    assert "4 images have none" in page.text
    assert "The store has too few regions for a map." in page.text
    assert page.row("by one of these two guesses") == ["48"]


def test_recall_of_the_store_is_that_of_its_boxes(home):
    document = json.loads((home.root / "annotations/instances_train.json").read_text())
    base = sum(one["category_id"] - 5 < BASE for one in document["annotations"])
    hit = {0.3: 0, 0.5: 0, 0.7: 0}
    for one in document["annotations"]:
        if one["category_id"] - 5 >= BASE:
            x, y, w, h = one["bbox"]
            # As `write_store` lays them out.
            box = 12 * (one["image_id"] - 1) + np.arange(12)[:, None] + np.array([10, 10, 60, 60])
            sides = np.minimum(box[:, 2:], [x + w, y + h]) - np.maximum(box[:, :2], [x, y])
            inside = sides.clip(0).prod(1)
            best = (inside / (2500 + w * h - inside)).max()
            hit = {least: count + (best >= least) for least, count in hit.items()}
    novel = len(document["annotations"]) - base
    wanted = [*(f"{100 * count / novel:.1f}" for count in hit.values()), str(novel)]
    page = Page(report(home))
    assert page.row("novel objects, by regions") == wanted == page.row("novel objects, by proposals")
    assert page.row("base objects, by proposals")[-1] == str(base)


def test_the_map_tells_clusters_apart_and_is_drawn_alike_twice(untouched):
    store = Store(untouched.store)
    one, two = (embedding_map(store, frozenset(NAMES[BASE:])) for _ in range(2))
    assert one.chart == two.chart
    assert one.regions == 48
    # Two guesses, each with one embedding: one component holds everything.
    assert one.explained == (pytest.approx(1), pytest.approx(0, abs=1e-9))
    assert [name for _, name, novel in one.labelled if novel] == list(NAMES[BASE:])


def test_a_picture_of_any_image_stays_below_its_bound():
    noise = torch.randint(0, 256, (3, 700, 900), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert len(picture_address(noise)) <= PICTURE_BYTES
    # Four galleries of twelve, and more than a megabyte for all else.
    assert 48 * PICTURE_BYTES < 3.5e6


# The page in a browser


@pytest.fixture
def uneven(home):
    """A run whose classes have AP50 of 1, 2, ... percent in the order of their names, but for the first without one."""
    file = home.run.folder / "eval.json"
    table = json.loads(file.read_text())
    for place, name in enumerate(sorted(NAMES)):
        table["generalised"]["at"]["100"]["per_class"][name]["AP50"] = place / 100 if place else None
    write_json(file, table)
    return home


def shown_classes(page):
    return page.eval_on_selector_all(
        "#classes .searchable tbody tr", "all => all.filter(one => !one.hidden).map(one => one.cells[0].textContent)"
    )


def test_classes_are_searched_sorted_and_downloaded(uneven, opened):
    report(uneven)
    page = opened((uneven.run.folder / "report.html").as_uri())
    page.click("#classes summary")
    assert shown_classes(page) == list(NAMES)
    # Numbers: the highest first, by a click; the lowest by a key. Without a number is last.
    by_number = sorted(NAMES)[1:]
    head = page.locator("#classes th", has_text="AP50, %")
    head.locator("button").click()
    assert shown_classes(page) == [*by_number[::-1], sorted(NAMES)[0]]
    assert head.get_attribute("aria-sort") == "descending"
    page.keyboard.press("Enter")
    assert shown_classes(page) == [*by_number, sorted(NAMES)[0]]
    assert head.get_attribute("aria-sort") == "ascending"
    # Texts: of equal ones the order stays.
    page.get_by_role("button", name="group").click()
    assert shown_classes(page)[:BASE] == [name for name in shown_classes(page) if name in NAMES[:BASE]]
    assert page.eval_on_selector_all("#classes th[aria-sort]", "all => all.map(one => one.textContent)") == ["group"]
    # Part of a name, in any case.
    field = page.get_by_role("searchbox", name="Class", exact=True).first
    field.fill("AR")
    assert sorted(shown_classes(page)) == sorted(name for name in NAMES if "ar" in name.lower())
    assert page.locator("#classes output").text_content() == f"{len(shown_classes(page))} of {len(NAMES)} classes"
    field.fill("")
    assert len(shown_classes(page)) == len(NAMES)
    with page.expect_download() as downloaded:
        page.click("#classes [download]")
    assert downloaded.value.suggested_filename == "classes.csv"
    rows = list(csv.reader(downloaded.value.path().read_text().splitlines()))
    assert len(rows) == 1 + len(NAMES)


def test_without_script_the_page_has_all_classes_and_no_field(uneven, opened):
    report(uneven)
    page = opened((uneven.run.folder / "report.html").as_uri(), java_script_enabled=False)
    page.click("#classes summary")
    assert page.locator("#classes .searchable tbody tr:visible").count() == len(NAMES)
    assert page.locator("input:visible").count() == page.locator("button").count() == 0
    assert page.locator("#classes [download]:visible").count() == 1


# Drawing


def grey(height, width):
    return torch.full((3, height, width), 128, dtype=torch.uint8)


def colours_of(picture):
    return {f"#{r:02x}{g:02x}{b:02x}" for _, (r, g, b) in picture.getcolors(picture.width * picture.height)}


def test_small_images_are_enlarged_and_large_ones_are_not():
    assert draw_boxes(grey(128, 128), torch.zeros(0, 4), []).size == (384, 384)
    assert draw_boxes(grey(480, 640), torch.zeros(0, 4), []).size == (640, 480)
    assert draw_boxes(grey(100, 50), torch.zeros(0, 4), [], scale=1.5).size == (75, 150)
    assert fit_scale(1, 1, side=8) == 8


def test_boxes_have_their_colours_where_they_are():
    picture = draw_boxes(
        grey(64, 64),
        torch.tensor([[8.0, 20, 30, 40], [34, 20, 60, 60]]),
        ["", ""],
        [BASE_COLOUR, NOVEL_COLOUR],
        scale=2,
    )
    assert colours_of(picture.crop((10, 30, 60, 90))) >= {BASE_COLOUR}
    assert NOVEL_COLOUR not in colours_of(picture.crop((0, 0, 64, 128)))
    assert NOVEL_COLOUR in colours_of(picture.crop((64, 0, 128, 128)))
    assert picture.getpixel((40, 60)) == (128, 128, 128)


def test_captions_do_not_cover_each_other():
    boxes = torch.tensor([[40.0, 40, 90, 90]]).repeat(2, 1)
    one = draw_boxes(grey(128, 128), boxes[:1], ["circle"], BASE_COLOUR)
    two = draw_boxes(grey(128, 128), boxes, ["circle", "ring"], [BASE_COLOUR, NOVEL_COLOUR])
    strip = (126, 90, 150, 114)
    assert colours_of(one.crop(strip)) == colours_of(two.crop(strip))
    assert NOVEL_COLOUR in colours_of(two)


@pytest.mark.parametrize(
    "box", [[-50, -50, 500, 500], [0, 0, 0, 0], [127, 127, 128, 128], [-9, -9, -1, -1], [5, 5, 5, 90]]
)
def test_awkward_boxes_and_captions_stay_inside_the_picture(box):
    caption = "a very long name \n of a class 中文 " * 20
    picture = draw_boxes(grey(128, 128), torch.tensor([box], dtype=torch.float32), [caption])
    assert picture.size == (384, 384)
    assert BASE_COLOUR in colours_of(picture)


def test_wrong_arguments_are_refused():
    boxes = torch.zeros(2, 4)
    for image in (grey(8, 8).float(), grey(8, 8)[0], grey(0, 8)):
        with pytest.raises(ValueError, match="image must be"):
            draw_boxes(image, boxes, ["a", "b"])
    with pytest.raises(ValueError, match="boxes must be"):
        draw_boxes(grey(8, 8), torch.zeros(4), ["a"])
    with pytest.raises(ValueError, match="2 boxes need as many captions, got 1"):
        draw_boxes(grey(8, 8), boxes, ["a"])
    with pytest.raises(ValueError, match="2 boxes need one colour, or as many, got 3"):
        draw_boxes(grey(8, 8), boxes, ["a", "b"], ["red"] * 3)


@pytest.mark.parametrize("value", [{}, 3, {"bbox": []}])
def test_an_evaluation_that_no_page_can_show_is_made_again(home, value):
    file = home.run.folder / "eval.json"
    good = json.loads(file.read_text())
    write_json(file, {**good, "generalised": value})
    with pytest.raises(
        RunError, match=r"the records of a run do not say what a page shows .*run `ezsd eval .*` again$"
    ):
        report(home)
    write_json(file, good)
    assert report(home)
