"""One annotation file as a dataset: divided by `ezsd data split`, or taken as it is."""

import json
import shutil

import pytest

from ezsd.data.shapes import SHAPES_SPLIT
from ezsd.errors import AnnotationError, EzsdError, VocabularyError
from ezsd.pipeline.console.arguments import require_novel
from ezsd.pipeline.console.data_messages import parse_val
from ezsd.pipeline.console.options import as_options
from ezsd.pipeline.data.annotation_cache import training_annotations
from ezsd.pipeline.data.check import check_dataset
from ezsd.pipeline.data.datasets import find_dataset, from_definition
from ezsd.pipeline.data.split_images import split_images, validation_ids
from ezsd.pipeline.errors import ArgumentError, ConfigError, DatasetError
from ezsd.pipeline.extraction.build import build_cache
from ezsd.pipeline.extraction.request import BuildRequest
from ezsd.pipeline.inference.detect import detect_images, resolve_names
from ezsd.pipeline.inference.detection_files import coco_document
from ezsd.pipeline.inference.evaluate import evaluate_run
from ezsd.pipeline.inference.evaluation_tables import evaluate_results
from ezsd.pipeline.runs.run import Run
from ezsd.pipeline.training.train import TrainRequest, train

NOVEL = SHAPES_SPLIT.novel
JSON = "annotations/instances_train.json"


@pytest.fixture(scope="module")
def one(shapes_root, tmp_path_factory):
    """A folder with one annotation file and its images, as COCO lays them out."""
    root = tmp_path_factory.mktemp("one") / "data"
    shutil.copytree(shapes_root / "train", root / "train")
    (root / "annotations").mkdir()
    shutil.copyfile(shapes_root / JSON, root / JSON)
    return root


def read(out, part):
    return json.loads((out / f"{part}.json").read_text())


def test_what_is_no_annotation_file_is_named_as_it_was_given(one, tmp_path):
    toml = tmp_path / "farm.toml"
    toml.write_text("")
    for path, fault in (
        (one, "is a folder"),
        (tmp_path / "gone.json", "no such file"),
        (toml, "does not end in .json"),
    ):
        with pytest.raises(ArgumentError, match=rf"^{path}: {fault}; give a COCO-format JSON file$"):
            split_images(path, tmp_path / "out")
    with pytest.raises(DatasetError, match=rf"annotations`: is a folder; give a file in it: {one / JSON}$"):
        find_dataset(str(one / "annotations"))
    with pytest.raises(DatasetError, match=r"train`: is a folder; give a file that ends in .toml or .json$"):
        find_dataset(str(one / "train"))
    find_dataset(str(one / JSON))
    split_images(one / JSON, tmp_path / "out")


@pytest.mark.parametrize("table", [{}, {"categories": []}])
def test_a_file_without_classes_is_said_to_have_none(table, tmp_path):
    (tmp_path / "few.json").write_text(json.dumps({"images": [], "annotations": [], **table}))
    with pytest.raises(DatasetError, match=r"few.json: categories: expected at least one with a name, found none; add"):
        find_dataset(str(tmp_path / "few.json"), strict=False)
    classes = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cow"}]}
    (tmp_path / "few.json").write_text(json.dumps(classes))
    assert find_dataset(str(tmp_path / "few.json"), strict=False).split.base == ("cow",)


def test_images_are_divided_and_nothing_is_lost(one, tmp_path):
    out = tmp_path / "farm"
    made = split_images(one / JSON, out, val=0.25, novel=NOVEL)
    whole = json.loads((one / JSON).read_text())
    train_part, val_part = read(out, "train"), read(out, "val")
    assert (len(train_part["images"]), len(val_part["images"])) == (9, 3)
    for key in ("images", "annotations"):
        both = train_part[key] + val_part[key]
        assert sorted(both, key=lambda entry: entry["id"]) == whole[key]
    ids = {entry["id"] for entry in val_part["images"]}
    assert {entry["image_id"] for entry in val_part["annotations"]} <= ids
    assert train_part["categories"] == val_part["categories"] == whole["categories"]
    assert [tuple(part) for part in made.parts] == [
        (name, len(part["images"]), len(part["annotations"]), 0)
        for name, part in (("train", train_part), ("val", val_part))
    ]
    dataset = find_dataset(str(out / "farm.toml"))
    assert (set(dataset.split.base), dataset.split.novel) == (set(SHAPES_SPLIT.base), NOVEL)
    assert check_dataset(dataset).problems == []
    # What training reads has no novel box, although the file does.
    record = training_annotations(dataset.annotations("train"), dataset.split)
    assert {record.names[index] for index in record.class_index} <= set(SHAPES_SPLIT.base)


def test_the_choice_depends_on_seed_and_ids_alone():
    ids = list(range(1, 101))
    assert validation_ids(ids[::-1], 10, 0) == validation_ids(ids, 10, 0)
    # Known for good: sha256 is the same everywhere.
    assert validation_ids(ids, 5, 0) == {15, 44, 46, 87, 99}
    assert validation_ids(ids, 10, 1) != validation_ids(ids, 10, 0)
    more = validation_ids([*ids, 500], 10, 0)
    assert len(more & validation_ids(ids, 10, 0)) >= 9


@pytest.mark.parametrize(("text", "value"), [("500", 500), ("0.2", 0.2), (".2", 0.2), ("20%", 0.2), ("1", 1)])
def test_a_number_or_a_fraction_of_images_is_held_out(text, value):
    assert parse_val(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["0", "0.0", "1.5", "-3", "half", "0%", "100%", "1e3", ""])
def test_other_numbers_of_images_are_refused(text):
    with pytest.raises(ArgumentError, match=f"--val {text}: expected a number of images, such as 500, or a fraction"):
        parse_val(text)


@pytest.mark.parametrize("val", [12, 0.999, 0.01])
def test_both_parts_have_an_image(one, tmp_path, val):
    with pytest.raises(ArgumentError, match="expected at least 1, and at least 1 left to train on"):
        split_images(one / JSON, tmp_path / "farm", val=val)
    assert list(tmp_path.iterdir()) == []
    split_images(one / JSON, tmp_path / "farm", val=11)


def test_names_alone_make_a_dataset_without_validation(one, tmp_path):
    out = tmp_path / "farm"
    (split,) = split_images(one / JSON, out, base=SHAPES_SPLIT.base[:3]).splits.values()
    assert split.base == SHAPES_SPLIT.base[:3]
    assert set(split.names) == set(SHAPES_SPLIT.names)
    dataset = find_dataset(str(out / "farm.toml"))
    assert (dataset.parts, dataset.split) == (("train",), split)
    assert read(out, "train") == json.loads((one / JSON).read_text())
    assert sorted(path.name for path in out.iterdir()) == ["farm.toml", "images", "train.json"]


WRONG = {
    "image id twice": (lambda d: d["images"][1].update(id=d["images"][0]["id"]), r"images\[1\].id: expected an id"),
    "no such image": (
        lambda d: d["annotations"][0].update(image_id=999),
        r"annotations\[0\].image_id: expected the id",
    ),
    "category twice": (lambda d: d["categories"].append(d["categories"][0]), r"categories\[20\].name"),
    "no image": (lambda d: d.update(images=[]), r"annotations\[0\].image_id"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_whose_entries_have_no_place_is_refused(case, one, tmp_path):
    change, words = WRONG[case]
    root = tmp_path / "data"
    shutil.copytree(one, root)
    document = json.loads((root / JSON).read_text())
    change(document)
    (root / JSON).write_text(json.dumps(document))
    with pytest.raises(AnnotationError, match=words):
        split_images(root / JSON, tmp_path / "farm", val=2)
    assert not (tmp_path / "farm").exists()


# One file as it is


def test_the_images_of_a_file_are_looked_for_around_it(one, tmp_path):
    for root, place in ((None, "../train"), (one, "train"), (one / "train", ".")):
        dataset = find_dataset(str(one / JSON), root, novel=NOVEL).require()
        assert (dataset.train_images, dataset.name, dataset.parts) == (place, "instances_train", ("train",))
        assert dataset.images("train").has("000001.png")
        assert dataset.annotations("train").samefile(one / JSON)
    with pytest.raises(DatasetError, match="its first image 000001.png is neither in .* nor in a folder of it") as said:
        find_dataset(str(one / JSON), tmp_path)
    assert as_options(str(said.value)).endswith("give --data-root DIR")
    for twin in ("a", "b"):
        shutil.copytree(one / "train", tmp_path / twin)
    with pytest.raises(DatasetError, match="both have its first image 000001.png; give the right one as") as said:
        find_dataset(str(one / JSON), tmp_path)
    assert find_dataset(str(one / JSON), tmp_path / "b").train_images == "."
    shutil.copyfile(one / JSON, tmp_path / "labels_b.json")
    assert find_dataset(str(tmp_path / "labels_b.json")).train_images == "b"


def test_a_link_to_the_folder_leads_to_the_files_beside_it(one, tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far/link").symlink_to(one / "train")
    shutil.copyfile(one / JSON, tmp_path / "own.json")
    # Of names alone, this is where ../own.json would be.
    (one / "own.json").write_text("{}")
    dataset = find_dataset(str(tmp_path / "own.json"), tmp_path / "far/link").require()
    (one / "own.json").unlink()
    assert dataset.annotations("train").samefile(tmp_path / "own.json")
    # The folder of the annotations is a link itself, and the images are beside it.
    (tmp_path / "near").mkdir()
    (tmp_path / "near/annotations").symlink_to(one / "annotations")
    shutil.copytree(one / "train", tmp_path / "near/photos")
    dataset = find_dataset(str(tmp_path / "near" / JSON)).require()
    assert (dataset.root / dataset.train_images).samefile(tmp_path / "near/photos")


def test_the_ending_of_a_file_may_be_in_upper_case(one, tmp_path):
    shutil.copyfile(one / JSON, tmp_path / "OWN.JSON")
    assert find_dataset(str(tmp_path / "OWN.JSON"), one, novel=NOVEL).name == "OWN"
    with pytest.raises(ArgumentError, match="give --novel NAMES"):
        require_novel("OWN.JSON", None)


def test_all_classes_of_a_file_are_base_ones_but_those_named_novel(one, caplog):
    assert set(find_dataset(str(one / JSON)).split.base) == set(SHAPES_SPLIT.names)
    split = find_dataset(str(one / JSON), novel=["ring", "unicorn"]).split
    assert split.novel == ("ring", "unicorn")
    assert set(split.base) == set(SHAPES_SPLIT.names) - {"ring"}
    assert [line.partition(": without")[0] for line in caplog.messages] == [
        f"{one / JSON}: no entry in categories named 'unicorn'"
    ]
    with pytest.raises(VocabularyError, match="has no class 'Ring', but 'ring'; spell the novel name as it does"):
        find_dataset(str(one / JSON), novel=["Ring"])
    with pytest.raises(ArgumentError, match="`novel` goes with a JSON file as `dataset`; shapes says itself"):
        find_dataset("shapes", novel=["ring"])
    with pytest.raises(ArgumentError, match="give --novel NAMES, the classes to find without boxes"):
        require_novel("own.json", None)
    require_novel("own.json", ("ring",))
    require_novel("own.toml", None)


def test_a_category_that_is_only_above_others_is_no_class(one, tmp_path):
    document = json.loads((one / JSON).read_text())
    for entry in document["categories"]:
        entry["supercategory"] = "shape"
    document["categories"].append({"id": 0, "name": "shape", "supercategory": "none"})
    (tmp_path / "own.json").write_text(json.dumps(document))
    assert "shape" not in find_dataset(str(tmp_path / "own.json"), one).split.base


def test_a_file_whose_image_names_lead_elsewhere_is_refused(one, tmp_path):
    document = json.loads((one / JSON).read_text())
    document["images"][0]["file_name"] = "../../secret.png"
    (tmp_path / "own.json").write_text(json.dumps(document))
    with pytest.raises(AnnotationError, match=r"holds '\.\.'"):
        find_dataset(str(tmp_path / "own.json"), one)


def test_a_file_that_is_named_as_a_dataset_of_ours_has_another_name(one, tmp_path):
    shutil.copyfile(one / JSON, tmp_path / "coco.json")
    assert find_dataset(str(tmp_path / "coco.json"), one).name == "own-coco"
    shutil.copyfile(one / JSON, tmp_path / "my photos!.json")
    assert find_dataset(str(tmp_path / "my photos!.json"), one).name == "my-photos"


def test_without_validation_a_store_is_built_and_trained_on_but_not_evaluated(one, tmp_path, with_settings):
    dataset = find_dataset(str(one / JSON), novel=NOVEL)
    assert [part.name for part in check_dataset(dataset).parts] == ["train"]
    assert from_definition(json.loads(json.dumps(dataset.definition())), dataset.root) == dataset
    config = with_settings(adapt={"steps": 1}, train={"steps": 2, "warmup_steps": 0, "batch_size": 2})
    store = tmp_path / "store"
    build_cache(BuildRequest(dataset=dataset, config=config, out=store, scheduler="sync"))
    watched = with_settings(
        adapt={"steps": 1}, train={"steps": 2, "warmup_steps": 0, "batch_size": 2, "validate_every": 1}
    )
    with pytest.raises(ConfigError, match="has no validation part; take `train.validate_every=0`, or build a store"):
        train(TrainRequest(cache=store, run=tmp_path / "run", config=watched))
    train(TrainRequest(cache=store, run=tmp_path / "run", config=config))
    with pytest.raises(EzsdError, match="dataset instances_train has no validation part to evaluate on") as said:
        evaluate_run(Run.open(tmp_path / "run"), data_root=None, device="cpu")
    words = (
        "take --split train, or give --detections (the output of `ezsd detect --json`) and the --annotations of other"
    )
    assert words in as_options(str(said.value))
    run = Run.open(tmp_path / "run")
    result = evaluate_run(run, data_root=None, device="cpu", split="train")
    assert result["generalised"]["at"]["100"]["images"] == 12
    names = resolve_names(run, None)
    seen = detect_images(sorted((one / "train").iterdir()), run, names, threshold=0, device="cpu", drawn=None)
    (tmp_path / "found.json").write_text(coco_document(list(seen), names))
    choice = {"base": None, "novel": NOVEL, "split_file": None, "classes": None, "max_detections": None}
    assert evaluate_results(tmp_path / "found.json", one / JSON, **choice)["generalised"]["at"]["100"]["images"] == 12
    # The other way to figures of a validation part.
    split_images(one / JSON, tmp_path / "whole", val=3, novel=NOVEL)
    whole = find_dataset(str(tmp_path / "whole/whole.toml"))
    build_cache(BuildRequest(dataset=whole, config=config, out=tmp_path / "again", scheduler="sync"))
    train(TrainRequest(cache=tmp_path / "again", run=tmp_path / "watched", config=watched))


def test_a_dataset_file_may_leave_validation_out(one, tmp_path):
    toml = one / "own.toml"
    toml.write_text(
        f'name = "own"\n[train]\nimages = "train"\nannotations = "{JSON}"\n'
        '[classes]\nbase = ["ring"]\nnovel = "others"\n'
    )
    dataset = find_dataset(str(toml)).require()
    assert dataset.parts == ("train",)
    assert set(dataset.split.novel) == set(SHAPES_SPLIT.names) - {"ring"}
    assert dataset.missing("val") == ["no validation part"]
    with pytest.raises(DatasetError, match="no validation part"):
        dataset.require("val")
