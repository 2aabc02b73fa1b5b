"""One list of refusals: `data check` says "nothing wrong" if and only if build, training and evaluation accept."""

import json
import os
import shutil
import unicodedata
from dataclasses import dataclass

import pytest

from ezsd.cache import StoreError
from ezsd.data.shapes import SHAPES_SPLIT
from ezsd.errors import EzsdError, VocabularyError
from ezsd.pipeline.console.defaults import build_config
from ezsd.pipeline.data.check import check_dataset
from ezsd.pipeline.data.datasets import find_dataset
from ezsd.pipeline.extraction.build import build_cache
from ezsd.pipeline.extraction.request import BuildRequest
from ezsd.pipeline.inference.evaluate import evaluate_run
from ezsd.pipeline.runs.run import Run
from ezsd.pipeline.training.train import TrainRequest, train

SETTINGS = (
    "adapt.steps=1",
    "adapt.batch_size=16",
    "proposals.search=exhaustive",
    "proposals.sizes=[60]",
    "proposals.stride=1.0",
    "build.block_images=8",
    "train.pseudo_confidence=0",
    "train.steps=1",
    "train.batch_size=2",
    "train.warmup_steps=0",
)


@dataclass
class Files:
    """A dataset of one's own that a case breaks."""

    root: object
    train: dict
    val: dict
    base: list
    novel: object
    prompts: str = ""

    def write(self):
        for part in ("train", "val"):
            if (document := getattr(self, part)) is not None:
                text = document if isinstance(document, str) else json.dumps(document)
                (self.root / f"{part}.json").write_text(text)
        self.toml.write_text(
            'name = "own"\n'
            + "".join(f'[{p}]\nimages = "{p}"\nannotations = "{p}.json"\n' for p in ("train", "val"))
            + f"[classes]\nbase = {json.dumps(self.base)}\nnovel = {json.dumps(self.novel)}\n"
            + f"[prompts]\n{self.prompts}\n"
        )
        return str(self.toml)

    @property
    def toml(self):
        return self.root / "own.toml"

    def of(self, part, names):
        """The first annotation of one of some names."""
        document = getattr(self, part)
        ids = [one["id"] for one in document["categories"] if one["name"] in names]
        return next(one for one in document["annotations"] if one["category_id"] in ids)

    def category(self, part, name):
        return next(one for one in getattr(self, part)["categories"] if one["name"] == name)


@pytest.fixture
def files(shapes_root, tmp_path):
    root = tmp_path / "own"
    for part in ("train", "val"):
        shutil.copytree(shapes_root / part, root / part)
    documents = {p: json.loads((shapes_root / f"annotations/instances_{p}.json").read_text()) for p in ("train", "val")}
    return Files(root, **documents, base=list(SHAPES_SPLIT.base), novel=list(SHAPES_SPLIT.novel))


def link(files, part):
    """The second image's file becomes a link to the first's."""
    first, second = (files.root / part / one["file_name"] for one in getattr(files, part)["images"][:2])
    second.unlink()
    second.symlink_to(first)


def another_spelling(files, part):
    images = getattr(files, part)["images"]
    images[1]["file_name"] = "./" + images[0]["file_name"]


def without_a_name(files, part, name):
    document = getattr(files, part)
    gone = files.category(part, name)
    document["categories"].remove(gone)
    document["annotations"] = [one for one in document["annotations"] if one["category_id"] != gone["id"]]


def boxes_in_one_image(files):
    first = files.of("train", files.base)["image_id"]
    base = [one["id"] for one in files.train["categories"] if one["name"] in files.base]
    files.train["annotations"] = [
        one for one in files.train["annotations"] if one["category_id"] not in base or one["image_id"] == first
    ]


def half_a_federation(files):
    files.val["images"][0] |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}


def decomposed_class(files):
    """The TOML has the name composed, the annotations decomposed."""
    name = files.novel[0]
    for part in ("train", "val"):
        files.category(part, name)["name"] = unicodedata.normalize("NFD", "é")
    files.novel[0] = unicodedata.normalize("NFC", "é")


def decomposed_file(files):
    image = files.val["images"][0]
    old = files.root / "val" / image["file_name"]
    old.rename(old.with_name(unicodedata.normalize("NFD", "é.png")))
    image["file_name"] = unicodedata.normalize("NFC", "é.png")


REFUSED = {
    "no validation file": lambda f: setattr(f, "val", None),
    "validation file that is not valid JSON": lambda f: setattr(f, "val", '{"images": ['),
    "no validation images": lambda f: shutil.rmtree(f.root / "val"),
    "base name that validation lacks": lambda f: without_a_name(f, "val", f.base[0]),
    "base name that training lacks": lambda f: without_a_name(f, "train", f.base[0]),
    "novel validation box without corners": lambda f: f.of("val", f.novel).pop("bbox"),
    "validation image id twice": lambda f: f.val["images"][1].update(id=f.val["images"][0]["id"]),
    "category twice": lambda f: f.val["categories"].append(dict(f.val["categories"][0])),
    "validation image gone": lambda f: (f.root / "val" / f.val["images"][0]["file_name"]).unlink(),
    "validation image by two spellings": lambda f: another_spelling(f, "val"),
    "validation image by a link": lambda f: link(f, "val"),
    "training image by two spellings": lambda f: another_spelling(f, "train"),
    "training image by a link": lambda f: link(f, "train"),
    "training image gone": lambda f: (f.root / "train" / f.train["images"][0]["file_name"]).unlink(),
    "backslash in a training name": lambda f: f.train["images"][0].update(file_name="a\\b.png"),
    "half a character in a name": lambda f: f.train["categories"].append({"id": 999, "name": "x\ud800"}),
    "template without a place": lambda f: setattr(f, "prompts", 'template = "a photo"'),
    "names said alike": lambda f: (f.novel.append("circle_(x)"), setattr(f, "prompts", 'names = "clean"')),
    "names said in an unknown way": lambda f: setattr(f, "prompts", 'names = "cleen"'),
    "one name in two Unicode forms": lambda f: f.novel.extend(["é", unicodedata.normalize("NFD", "é")]),
    "base boxes in one image": boxes_in_one_image,
    "half a federation": half_a_federation,
    "no validation image listed": lambda f: f.val.update(images=[], annotations=[]),
}
ACCEPTED = {
    "nothing": lambda f: None,
    "novel name that no file lists": lambda f: [without_a_name(f, part, f.novel[0]) for part in ("train", "val")],
    "only things nobody reads": lambda f: (
        f.of("train", f.novel).pop("bbox"),
        f.train["categories"].append({"id": 999, "name": "Circle"}),
        f.of("train", f.base)["bbox"].__setitem__(2, 0),
    ),
    "decomposed file name": decomposed_file,
}


def checked(toml):
    """Whether `data check` finds nothing wrong."""
    try:
        return not check_dataset(find_dataset(toml, strict=False), decode=True).problems
    except EzsdError:
        return False


def built(toml, out):
    dataset = find_dataset(toml)
    config = build_config("shapes", SETTINGS, teacher=None, weights=None, prompts=dataset.prompts)
    build_cache(BuildRequest(dataset=dataset, config=config, out=out, scheduler="sync"))
    return config


@pytest.mark.parametrize("case", REFUSED)
def test_what_check_finds_wrong_is_refused_before_the_first_crop(case, files, tmp_path):
    REFUSED[case](files)
    toml = files.write()
    assert not checked(toml)
    with pytest.raises(EzsdError) as caught:
        built(toml, tmp_path / "store")
    assert "\n" not in str(caught.value)
    # A training image may be found unreadable when it is read; all else shows before there is a store.
    assert case == "training image gone" or not (tmp_path / "store").exists()


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_check_accepts_is_built_trained_and_evaluated(case, files, tmp_path):
    ACCEPTED[case](files)
    toml = files.write()
    assert checked(toml)
    config = built(toml, tmp_path / "store")
    train(TrainRequest(cache=tmp_path / "store", run=tmp_path / "run", config=config))
    result = evaluate_run(Run.open(tmp_path / "run"), data_root=None, device="cpu")
    assert result["generalised"]["at"]["100"]["images"] == len(files.val["images"])


def test_a_validation_file_that_went_bad_is_refused_before_the_first_step(files, tmp_path):
    config = built(files.write(), tmp_path / "store")
    files.of("val", files.novel).pop("bbox")
    files.write()
    with pytest.raises(EzsdError, match=r"val.json: annotations\[\d+\].bbox"):
        train(TrainRequest(cache=tmp_path / "store", run=tmp_path / "run", config=config))
    assert not (tmp_path / "run").exists()


def test_a_novel_name_without_an_entry_is_a_warning_with_the_nearest_name(files):
    files.novel[0] = files.novel[0] + "s"
    found = check_dataset(find_dataset(files.write()))
    assert found.problems == []
    line = next(line for line in found.warnings if "no entry" in line)
    assert f"no entry in categories named {files.novel[0]!r} (did you mean {files.novel[0][:-1]!r}?)" in line


def test_novel_names_without_a_validation_box_are_listed(files):
    for name in files.novel[:2]:
        number = files.category("val", name)["id"]
        files.val["annotations"] = [one for one in files.val["annotations"] if one["category_id"] != number]
    (line,) = check_dataset(find_dataset(files.write())).warnings
    assert f"no box of novel {files.novel[0]!r}, {files.novel[1]!r}" in line


def test_a_validation_split_without_novel_boxes_or_boxes_at_all_says_so(files):
    novel = [files.category("val", name)["id"] for name in files.novel]
    files.val["annotations"] = [one for one in files.val["annotations"] if one["category_id"] not in novel]
    (line,) = check_dataset(find_dataset(files.write())).warnings
    assert "no box of any novel name" in line
    files.val["annotations"] = []
    (line,) = check_dataset(find_dataset(files.write())).warnings
    assert "no box of any name of the split" in line


def test_names_compare_in_one_unicode_form(files):
    before = check_dataset(find_dataset(files.write())).parts
    decomposed_class(files)
    found = check_dataset(find_dataset(files.write()))
    assert found.problems == []
    assert not any("no entry" in line for line in found.warnings)
    assert found.parts == before


def test_links_within_the_folder_to_other_files_are_no_doubles(files):
    first = files.root / "train" / files.train["images"][0]["file_name"]
    shutil.move(first, files.root / "train/elsewhere.png")
    os.symlink("elsewhere.png", first)
    assert check_dataset(find_dataset(files.write())).problems == []


def test_reuse_of_what_is_no_store_is_said_before_the_teacher_is_loaded(files, tmp_path):
    dataset = find_dataset(files.write())
    config = build_config("shapes", SETTINGS, teacher="plugin:no.module:x", weights=None)
    request = BuildRequest(dataset=dataset, config=config, out=tmp_path / "s", reuse=tmp_path / "none")
    with pytest.raises(StoreError):
        build_cache(request)


@pytest.mark.parametrize("template", ["a photo", "{} and {}"])
def test_a_prompt_that_cannot_be_made_is_refused_by_the_dataset(files, template):
    files.prompts = f'template = "{template}"'
    with pytest.raises(VocabularyError, match="needs '{}' once"):
        find_dataset(files.write())
