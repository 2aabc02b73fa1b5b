"""Detections in the formats of other tools."""

import csv
import importlib.util
import json
import os

import numpy as np
import pytest
import torch

from ezsd.data.shapes import SHAPES_SPLIT
from ezsd.data.yolo import read_yolo
from ezsd.errors import TeacherError, VocabularyError
from ezsd.pipeline.console.arguments import SAVED, parse_class_thresholds, parse_outputs, require_template
from ezsd.pipeline.data.sources import Video
from ezsd.pipeline.data.yolo_names import read_names
from ezsd.pipeline.errors import ArgumentError
from ezsd.pipeline.inference import detect as detect_module
from ezsd.pipeline.inference.detect import Model, detect_images
from ezsd.pipeline.inference.detection_files import COLUMNS, Output, Writers, outputs_of
from ezsd.pipeline.inference.detections import Detection, ImageDetections
from ezsd.pipeline.inference.evaluation_tables import evaluate_results

NAMES = ["ring", "bar"]


def detect(run, sources, **options):
    settings = {"threshold": 0.0, "device": "cpu", "drawn": None} | options
    return list(detect_images(sources, run, NAMES, **settings))


@pytest.fixture(scope="module")
def saved(shapes_run, shapes_root, tmp_path_factory):
    """Folder with all formats of detections in the validation images, and the detections."""
    folder = tmp_path_factory.mktemp("saved")
    sources = sorted((shapes_root / "val").iterdir())
    given = ["coco=found.json", "csv=new/found.csv", "yolo=labels", "yolo-scores=scored", "fiftyone=fiftyone"]
    places = parse_outputs([text.replace("=", f"={folder}/") for text in given], sources)
    return folder, detect(shapes_run, sources, outputs=outputs_of(places, printed=False))


def test_the_coco_document_is_evaluated(saved, shapes_root):
    folder, seen = saved
    document = json.loads((folder / "found.json").read_text())
    assert [image["id"] for image in document["images"]] == list(range(1, len(seen) + 1))
    result = evaluate_results(
        folder / "found.json",
        shapes_root / "annotations/instances_val.json",
        base=None,
        novel=SHAPES_SPLIT.novel,
        split_file=None,
        classes=None,
        max_detections=None,
    )
    assert result["generalised"]["detections"] == sum(map(len, seen)) > 0


def test_csv_has_a_line_for_each_object(saved):
    folder, seen = saved
    with (folder / "new/found.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == COLUMNS
    objects = [(one, thing) for one in seen for thing in one]
    assert len(lines) == len(objects)
    for line, (one, thing) in zip(lines, objects, strict=True):
        assert (line["image"], line["frame"], line["class"]) == (one.source, "", thing.name)
        assert np.float32(line["score"]) == np.float32(thing.score)
        assert [float(line[key]) for key in ("x1", "y1", "x2", "y2")] == pytest.approx(thing.box, abs=0.001)


def test_yolo_labels_are_read_as_labels(saved):
    folder, seen = saved
    assert read_names(folder / "labels/classes.txt") == tuple(NAMES)
    for one in seen:
        stem = one.source.rpartition("/")[2].removesuffix(".png")
        boxes = read_yolo(folder / f"labels/{stem}.txt", len(NAMES))
        assert [NAMES[box.class_index] for box in boxes] == list(one.names)
        for box, thing in zip(boxes, one, strict=True):
            x1, y1, x2, y2 = np.clip(thing.box, 0, 128)
            assert box.xywh(one.width, one.height) == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=0.001)
        scores = [line.split()[5] for line in (folder / f"scored/{stem}.txt").read_text().splitlines()]
        assert [float(score) for score in scores] == pytest.approx(one.scores.tolist(), abs=1e-6)


def test_fiftyone_has_labels_and_the_places_of_the_images(saved):
    folder, seen = saved
    labels = json.loads((folder / "fiftyone/labels.json").read_text())
    data = json.loads((folder / "fiftyone/data.json").read_text())
    assert labels["classes"] == NAMES
    assert list(data.values()) == [one.source for one in seen]
    assert list(labels["labels"]) == list(data)
    for entries, one in zip(labels["labels"].values(), seen, strict=True):
        assert [entry["label"] for entry in entries] == list(one.names)
        for entry, thing in zip(entries, one, strict=True):
            x, y, w, h = entry["bounding_box"]
            size = np.array([one.width, one.height] * 2)
            assert np.array([x, y, x + w, y + h]) * size == pytest.approx(np.clip(thing.box, 0, size), abs=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("fiftyone") is None, reason="FiftyOne is not installed")
def test_fiftyone_opens_the_folder(saved):
    from fiftyone.utils.data import FiftyOneImageDetectionDatasetImporter

    folder, seen = saved
    # Without a database, which not every machine has.
    importer = FiftyOneImageDetectionDatasetImporter(dataset_dir=str(folder / "fiftyone"), data_path="data.json")
    with importer:
        found = [(path, labels.detections) for path, _, labels in importer]
    assert [path for path, _ in found] == [one.source for one in seen]
    for (_, read), one in zip(found, seen, strict=True):
        assert [thing.label for thing in read] == list(one.names)
        boxes = [thing.bounding_box for thing in one.to_fiftyone().detections]
        assert [thing.bounding_box for thing in read] == [pytest.approx(box) for box in boxes]


@pytest.mark.parametrize("fixture", ["shapes_run", "masked_run"])
def test_supervision_has_boxes_names_and_masks(fixture, request, shapes_root):
    supervision = pytest.importorskip("supervision")
    run = request.getfixturevalue(fixture)
    (one,) = detect(run, [shapes_root / "val/000001.png"])
    found = one.to_supervision()
    assert isinstance(found, supervision.Detections)
    assert len(found) == len(one) > 0
    np.testing.assert_array_equal(found.xyxy, one.boxes)
    np.testing.assert_array_equal(found.confidence, one.scores)
    assert [NAMES[number] for number in found.class_id] == found.data["class_name"].tolist() == list(one.names)
    assert (found.mask is None) == (fixture == "shapes_run")
    assert found.mask is None or found.mask.shape == (len(one), one.height, one.width)
    # One that has none is no special case.
    (none,) = detect(run, [shapes_root / "val/000001.png"], threshold=1.0)
    assert len(none.to_supervision()) == 0


def test_frames_have_their_numbers(shapes_run, shapes_root, tmp_path):
    from ezsd.pipeline.data.images import read_pixels
    from ezsd.pipeline.data.video import VideoFile

    video = VideoFile(tmp_path / "clip.avi", 5.0)
    for image in sorted((shapes_root / "val").iterdir())[:2]:
        video.write(read_pixels(image))
    video.finish()
    sources = [Video(tmp_path / "clip.avi")]
    places = parse_outputs(
        [f"{kind}={tmp_path}/{place}" for kind, place in SAVED.items() if kind in ("coco", "csv", "yolo")], sources
    )
    detect(shapes_run, sources, outputs=outputs_of(places, printed=False))
    document = json.loads((tmp_path / "found.json").read_text())
    assert [(image["file_name"], image["frame"]) for image in document["images"]] == [
        (f"{tmp_path}/clip.avi#{frame:06d}", frame) for frame in (0, 1)
    ]
    with (tmp_path / "found.csv").open(newline="") as file:
        assert {line["frame"] for line in csv.DictReader(file)} == {"0", "1"}
    assert sorted(file.name for file in (tmp_path / "labels").iterdir()) == [
        "classes.txt",
        "clip_000000.txt",
        "clip_000001.txt",
    ]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["coc=a"], "no format 'coc'; did you mean 'coco'"),
        (["xml=a"], "no format 'xml'; known are coco, csv"),
        (["coco"], "expected FORMAT=PLACE, as in coco=found.json"),
        (["csv=a.csv", "csv=a.csv"], "csv goes to the same place"),
        (["csv=folder"], "is a folder; give the name of a file"),
        (["yolo=file"], "is a file; yolo needs a folder"),
        (["fiftyone=new"], "a frame has no file; save the others as coco or csv"),
        (["yolo=new"], r"x/a.png and \S+y/a.jpg would be one file; detect them one by one"),
    ],
)
def test_what_cannot_be_written_is_refused_before_it_starts(given, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    sources = [tmp_path / "x/a.png", tmp_path / "y/a.jpg", Video(tmp_path / "b.mp4")]
    with pytest.raises(ArgumentError, match=words):
        parse_outputs(given, sources)


def test_the_ending_of_a_file_says_its_format(tmp_path):
    photo = tmp_path / "photo.jpg"
    for kind in ("csv", "coco"):
        with pytest.raises(
            ArgumentError, match=rf"photo.jpg: is no place of {kind}; give a file that ends in "
        ) as said:
            parse_outputs([f"{kind}={photo}"], [photo])
        place = photo.with_suffix(str(said.value).rpartition(" ")[2])
        assert parse_outputs([f"{kind}={place}"], [photo]) == {place: kind}


def test_a_place_that_cannot_be_written_to_is_one_line_and_another_one_takes_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match=r"file: cannot be written to \(.*\); choose another place"):
        Writers([Output("coco", tmp_path / "a.json"), Output("csv", tmp_path / "file/found.csv")], NAMES)
    # The first one has left nothing.
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    Writers([Output("csv", tmp_path / "found.csv")], NAMES).finish()
    assert (tmp_path / "found.csv").read_text() == ",".join(COLUMNS) + "\n"


def test_a_yolo_folder_of_other_classes_is_refused_and_another_one_is_taken(shapes_run, shapes_root, tmp_path):
    image = shapes_root / "val/000001.png"
    for name, text in (("classes.txt", "bar\nring\n"), ("old.txt", "0 0.5 0.5 0.1 0.1\n")):
        folder = tmp_path / name.removesuffix(".txt")
        folder.mkdir()
        (folder / name).write_text(text)
        with pytest.raises(ArgumentError, match=r"(has other classes than|has text files and no classes.txt).*another"):
            Writers([Output("csv", tmp_path / "a.csv"), Output("yolo", folder)], NAMES)
        assert [(file.name, file.read_text()) for file in folder.iterdir()] == [(name, text)]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["classes", "old"]
    for _ in range(2):
        detect(shapes_run, [image], outputs=[Output("yolo", tmp_path / "new")])
        assert read_names(tmp_path / "new/classes.txt") == tuple(NAMES)


def test_a_name_that_is_no_unicode_is_written_as_it_is(tmp_path):
    source = os.fsdecode(b"caf\xe9.png")
    one = Detection(name="ring", score=0.5, box=(0, 0, 4, 4), mask=None)
    found = ImageDetections(source=source, width=8, height=8, objects=(one,), classes=tuple(NAMES), has_masks=False)
    with Writers([Output("csv", tmp_path / "a.csv")], NAMES) as writers:
        writers.write(found)
        writers.finish()
    assert (tmp_path / "a.csv").read_bytes().splitlines()[1].startswith(b"caf\xe9.png,,ring,0.5,")


# Thresholds and prompts


def test_a_class_has_the_threshold_that_is_given_for_it(shapes_run, shapes_root):
    image = [shapes_root / "val/000001.png"]
    (everything,) = detect(shapes_run, image, alone=True)
    scores = sorted(one.score for one in everything if one.name == "ring")
    least = scores[len(scores) // 2]
    assert scores[0] < least
    (some,) = detect(shapes_run, image, alone=True, class_thresholds={"ring": least})
    assert some.objects == tuple(one for one in everything if one.name == "bar" or one.score >= least)
    assert {"ring", "bar"} == set(some.names)
    with pytest.raises(
        VocabularyError, match="`class_threshold`: 'rung' is not among the classes to detect; did you mean"
    ):
        detect(shapes_run, image, class_thresholds={"rung": 0.5})
    model = Model(shapes_run, device="cpu")
    assert model(image[0], NAMES, threshold=0.0, alone=True, class_thresholds={"ring": least}).objects == some.objects
    with pytest.raises(ArgumentError, match=r"threshold of 'ring' must lie in \[0, 1\], got 2"):
        model(image[0], NAMES, class_thresholds={"ring": 2})


def test_thresholds_of_classes_are_read_by_the_last_sign():
    assert parse_class_thresholds(["dog=0.5", "a=b=1", " traffic light =0"]) == {
        "dog": 0.5,
        "a=b": 1,
        "traffic light": 0,
    }
    for text in ("dog", "dog=", "=0.5", "dog=2", "dog=nan", "dog=x"):
        with pytest.raises(ArgumentError, match="expected NAME=SCORE with a score from 0 to 1, as in dog=0.5"):
            parse_class_thresholds([text])
    with pytest.raises(ArgumentError, match="'dog' has two thresholds; leave one of them out"):
        parse_class_thresholds(["dog=0.5", "dog=0.6"])


def test_a_template_takes_the_place_of_the_runs_prompts(shapes_run, shapes_root):
    own = Model(shapes_run, device="cpu")
    other = Model(shapes_run, device="cpu", template="a red {}")
    same = Model(shapes_run, device="cpu", template=shapes_run.config.teacher.template)
    image = shapes_root / "val/000001.png"
    assert same(image, NAMES, threshold=0.0).objects == own(image, NAMES, threshold=0.0).objects
    assert other(image, NAMES, threshold=0.0).objects != own(image, NAMES, threshold=0.0).objects
    # The names of the run are asked for by their new rows, and none of them competes with itself.
    assert len(other.search(NAMES).competing) == len(own.search(NAMES).competing) == len(own.names) - len(NAMES)
    assert other.search(NAMES).base.tolist() == own.search(NAMES).base.tolist()
    with pytest.raises(VocabularyError, match="--template: a prompt template needs '{}' once"):
        require_template("a photo")
    require_template("imagenet")


class OwnPrompts:
    """A plug-in's teacher."""

    name = "own"

    def encode_text(self, names):
        return torch.nn.functional.normalize(torch.ones(len(names), 64) + torch.eye(len(names), 64), dim=1)


def test_a_teacher_that_makes_its_own_prompts_takes_no_template(shapes_run, monkeypatch):
    monkeypatch.setattr(detect_module, "run_teacher", lambda *_, **__: OwnPrompts())
    with pytest.raises(TeacherError, match="`template`: the teacher own makes its own prompts; leave it out"):
        Model(shapes_run, device="cpu", template="a {}")
    assert Model(shapes_run, device="cpu").names


def test_batches_change_no_detection(shapes_run, shapes_root):
    sources = sorted((shapes_root / "val").iterdir())[:3]
    one, three = (detect(shapes_run, sources, batch_size=size) for size in (1, 3))
    for first, second in zip(one, three, strict=True):
        assert first.names == second.names
        np.testing.assert_allclose(first.boxes, second.boxes, atol=1e-3)
