"""Datasets by name and by file: names decide the split, and a store can find its data again."""

import json
import random
from pathlib import Path

import pytest

from ezsd.data.shapes import SPLITS
from ezsd.errors import VocabularyError
from ezsd.pipeline.data.datasets import find_dataset, from_definition, recorded_dataset, require_known
from ezsd.pipeline.errors import DatasetError

FREQUENCIES = {"bow_(weapon)": "f", "apple": "c", "aerosol_can": "r", "zebra": "f", "mug": "c"}


def write_json(path, names, **extra):
    path.parent.mkdir(parents=True, exist_ok=True)
    categories = [{"id": 3 * k + 5, "name": name, **{key: f(name) for key, f in extra.items()}} for k, name in names]
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))


@pytest.fixture
def lvis(tmp_path):
    """Categories in an order and with ids that mean nothing."""
    order = list(enumerate(FREQUENCIES))
    random.Random(3).shuffle(order)
    for part in ("train", "val"):
        write_json(tmp_path / f"annotations/lvis_v1_{part}.json", order, frequency=FREQUENCIES.get)
    return tmp_path


def test_lvis_is_split_by_the_frequency_of_each_name(lvis):
    split = find_dataset("lvis", lvis).split
    assert (split.base, split.novel) == (("apple", "bow_(weapon)", "mug", "zebra"), ("aerosol_can",))
    few = find_dataset("lvis-frequent", lvis).split
    assert (few.base, few.novel) == (("bow_(weapon)", "zebra"), ("aerosol_can", "apple", "mug"))


def test_lvis_finds_its_images_in_cocos_folders_and_says_names_plainly(lvis):
    dataset = find_dataset("lvis", lvis).require()
    assert (dataset.train_images, dataset.val_images, dataset.preset) == (".", ".", "lvis")
    assert dataset.prompts == {"names": "clean"}


def test_lvis_without_frequencies_is_refused(lvis):
    write_json(lvis / "annotations/lvis_v1_train.json", [(0, "cat")])
    with pytest.raises(DatasetError, match=r"category 'cat': expected a frequency.*LVIS v1"):
        find_dataset("lvis", lvis)


def test_lvis_without_its_file_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="no annotations/lvis_v1_train.json"):
        find_dataset("lvis", tmp_path)


def test_the_full_size_of_lvis_splits(conse_tools, tmp_path):
    known = json.loads((conse_tools.parent / "data/conse/lvis_v1_train_cat_info.json").read_text())
    path = tmp_path / "annotations/lvis_v1_train.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": known}))
    sizes = [
        (len(find_dataset(n, tmp_path).split.base), len(find_dataset(n, tmp_path).split.novel))
        for n in ("lvis", "lvis-frequent")
    ]
    assert sizes == [(866, 337), (405, 461 + 337)]


def test_a_folder_with_the_name_of_a_dataset_is_in_nobodys_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("coco").mkdir()
    require_known("coco")
    Path("cocoa").mkdir()
    with pytest.raises(DatasetError, match="`dataset=cocoa`: is a folder; give a file"):
        require_known("cocoa")


OWN = """
name = "farm"
[train]
images = "photos"
annotations = "train.json"
[val]
images = "photos"
annotations = "val.json"
[classes]
base = ["zebra", "cat"]
novel = "others"
[prompts]
template = "a drawing of a {}"
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "photos").mkdir()
    for part in ("train", "val"):
        write_json(tmp_path / f"{part}.json", list(enumerate(["cat", "dog", "ant", "zebra"])))
    path = tmp_path / "farm.toml"
    path.write_text(OWN)
    return path


def test_a_dataset_of_ones_own_lies_beside_its_file(own):
    dataset = find_dataset(str(own)).require()
    assert (dataset.name, dataset.root) == ("farm", own.parent)
    assert (dataset.split.base, dataset.split.novel) == (("zebra", "cat"), ("ant", "dog"))
    assert dataset.prompts == {"template": "a drawing of a {}"}
    own.write_text(OWN + 'background = ["sky", "grass"]\n')
    assert find_dataset(str(own)).prompts["background"] == ["sky", "grass"]


def test_a_dataset_is_found_again_from_its_record(own):
    dataset = find_dataset(str(own))
    record = json.loads(json.dumps(dataset.definition()))
    assert "root" not in record
    assert from_definition(record, Path("elsewhere")).split == dataset.split
    assert recorded_dataset(record, "farm", dataset.root) == dataset
    with pytest.raises(DatasetError, match="`dataset=farm`: unknown"):
        recorded_dataset(None, "farm", dataset.root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('name = "farm"', ""), "name is missing"),
        (('name = "farm"', 'name = "../farm"'), "name: expected letters"),
        (('name = "farm"', 'name = "coco"'), "built-in dataset"),
        (('name = "farm"', 'name = "voc-16-4"'), "built-in dataset"),
        (("[val]", "[vall]"), "unknown key 'vall'; did you mean 'val'"),
        (('images = "photos"', "images = 3"), r"\[train\] expected texts"),
        (("novel =", "nowel ="), r"\[classes\] unknown key 'nowel'; did you mean 'novel'"),
        (('"others"', '"the rest"'), r"\[classes\] novel: expected a list of names or \"others\", found 'the rest'"),
        (('["zebra", "cat"]', '"cat"'), r"\[classes\] base: expected a list"),
        (("[train]", "[train"), "is not valid TOML"),
        (('"a drawing of a {}"', '["a {}", 3]'), r"\[prompts\] expected texts"),
        (('images = "photos"', 'images = ["photos"]'), r"\[train\] expected texts"),
        (("[prompts]\ntemplate", "[prompts]\ntemplates"), "did you mean 'template'"),
        (('"train.json"', '"none.json"'), "no none.json in it"),
    ],
)
def test_a_wrong_file_is_refused_by_its_place(own, change, message):
    assert change[0] in OWN
    own.write_text(OWN.replace(*change, 1))
    with pytest.raises(DatasetError, match=message):
        find_dataset(str(own))


def roboflow(root, *, box):
    """An export whose first category is the whole tree's root."""
    for part in ("train", "val"):
        categories = [{"id": 0, "name": "farm", "supercategory": "none"}]
        categories += [{"id": k, "name": n, "supercategory": "farm"} for k, n in enumerate(["cat", "dog", "zebra"], 1)]
        boxes = [{"id": 1, "image_id": 1, "category_id": 0, "bbox": [1, 1, 2, 2]}] if box == part else []
        document = {"images": [], "annotations": boxes, "categories": categories}
        (root / f"{part}.json").write_text(json.dumps(document))


@pytest.mark.parametrize("box", [None, "train", "val"])
def test_what_is_only_a_supercategory_is_no_novel_class(own, box, caplog):
    caplog.set_level("INFO", logger="ezsd")
    roboflow(own.parent, box=box)
    novel = find_dataset(str(own)).split.novel
    assert novel == (("dog",) if box is None else ("dog", "farm"))
    assert ("leaves out 'farm'" in caplog.text) == (box is None)


def test_a_place_that_is_not_there_is_named_once_with_what_is(own):
    own.write_text(OWN.replace('images = "photos"', 'images = "foto"'))
    with pytest.raises(DatasetError) as caught:
        find_dataset(str(own)).require()
    assert str(caught.value) == (
        f"`data_root={own.parent}`: no foto in it; [train] images and [val] images say so; did you mean 'photos'?"
    )


def test_two_names_that_are_said_alike_are_refused_at_once(own):
    own.write_text(OWN.replace('"others"', '["cat_(pet)"]') + 'names = "clean"\n')
    with pytest.raises(VocabularyError, match="'cat' and 'cat_\\(pet\\)' are both said 'cat'; rename one, or use the"):
        find_dataset(str(own))
    for cured in (own.read_text().replace('"clean"', '"raw"'), own.read_text().replace("cat_(pet)", "kitten")):
        own.write_text(cured)
        find_dataset(str(own))


@pytest.mark.parametrize("name", ["cocoa", "none.toml"])
def test_an_unknown_dataset_is_refused(name):
    with pytest.raises(DatasetError, match=name):
        find_dataset(name)


@pytest.mark.parametrize("benchmark", ["shapes", "clutter"])
def test_splits_of_a_drawn_benchmark_share_its_folder_and_preset(benchmark):
    for suffix, split in zip(("", "-split2", "-split3", "-split4"), SPLITS, strict=True):
        dataset = find_dataset(benchmark + suffix)
        assert (dataset.name, dataset.root, dataset.preset) == (benchmark + suffix, Path("data", benchmark), "shapes")
        assert dataset.split == split
        assert find_dataset(dataset.name, Path("elsewhere")).root == Path("elsewhere")
