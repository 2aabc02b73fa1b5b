"""Advice about what goes in is tested: each row meets a message, does what it says, and must get on.

`tests/advice.toml` lists all advice.
"""

import json
import shutil
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from ezsd.cache import Store
from ezsd.data.annotations import resolve_image_path
from ezsd.data.shapes import SHAPES_SPLIT
from ezsd.detector.backbone import build_backbone
from ezsd.errors import EzsdError
from ezsd.kernels.backend import require_backend
from ezsd.pipeline.config.schema import load_preset
from ezsd.pipeline.data.check import check_dataset
from ezsd.pipeline.extraction.teacher import require_words
from ezsd.pipeline.process_environment import require_launcher
from ezsd.teacher.open_clip import load_teacher
from ezsd.vocabulary import require_different
from tests.advicekit import Advice, Calls, Place, each_of, follow, follow_call


def each(section: str, key: str, value: object) -> Callable[[Place], None]:
    """Give the first entry of a section of both annotation files another value."""

    def change(document: dict) -> None:
        document[section][0] = {**document[section][0], key: value}

    return lambda place: place.edit(change)


def category(name: object) -> Callable[[Place], None]:
    """Add a category of that name, or rename the one that was added."""

    def change(document: dict) -> None:
        document["categories"] = [one for one in document["categories"] if one["id"] != 900]
        document["categories"].append({"id": 900, "name": name})

    return lambda place: place.edit(change)


def restate(change: Callable[[int], object]) -> Callable[[Place], None]:
    """State another width of the first image."""

    def restated(document: dict) -> None:
        document["images"][0]["width"] = change(document["images"][0]["width"])

    return lambda place: place.edit(restated)


def drop_first_annotation(place: Place, _: object) -> None:
    place.edit(lambda document: document["annotations"].pop(0))


def upside_down(place: Place) -> None:
    """Say of the first training image that it lies upside down."""
    first = json.loads((place.root / "train.json").read_text())["images"][0]["file_name"]
    path = place.root / "train" / first
    with Image.open(path) as image:
        image.load()
        exif = image.getexif()
        exif[0x0112] = 3
        image.save(path, exif=exif)


def notes(place: Place) -> str:
    return "\n".join(check_dataset(place.dataset).notes)


def without_base_boxes(place: Place) -> None:
    path = place.root / "train.json"
    shutil.copyfile(path, place.root / "boxes.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": []}))


def crowded(place: Place) -> None:
    """A base object as large as its image in each, and no proposal may touch one."""

    def change(document: dict) -> None:
        base = next(one["id"] for one in document["categories"] if one["name"] in SHAPES_SPLIT.base)
        for number, one in enumerate(document["images"], start=10**6):
            whole = {"bbox": [0, 0, one["width"], one["height"]], "area": one["width"] * one["height"], "iscrowd": 0}
            document["annotations"].append({"id": number, "image_id": one["id"], "category_id": base, **whole})

    place.edit(change)
    for setting in ("drop_base_guesses=false", "drop_background=false", "base_iou=1e-9"):
        place.set(f"proposals.{setting}")


def look_at(place: Place, *settings: str) -> None:
    for setting in (*settings, "drop_base_guesses=false", "drop_background=false"):
        place.set(f"proposals.{setting}")


def boxes(place: Place, name: str, *corners: list[int]) -> str:
    """A file of proposals: the same in each training image."""
    found = json.loads((place.root / "train.json").read_text())["images"]
    entries = [{"image_id": one["id"], "category_id": 1, "bbox": box, "score": 0.5} for one in found for box in corners]
    (place.root / name).write_text(json.dumps(entries))
    return f"boxes={json.dumps(str(place.root / name))}"


def elsewhere(place: Place, *overrides: str) -> None:
    """Build another store as the message says: from the first."""
    for override in overrides:
        place.set(override)
    place.options |= {"reuse": place.request().out, "out": place.root / "other"}


def build_with_regions(place: Place) -> None:
    place.build()
    store = Store(place.request().out)
    assert sum(len(store.regions[image].box) for image in store.image_ids.tolist())


CHECKED = [
    Advice(
        situation="a crowd that is neither 0 nor 1",
        prepare=each("annotations", "iscrowd", 2),
        meet=Place.check,
        message=r"Write 1 for a box around a group, else 0\.",
        cure=lambda place, _: each("annotations", "iscrowd", 0)(place),
    ),
    Advice(
        situation="a size with a fraction",
        prepare=restate(lambda width: width + 0.5),
        meet=Place.check,
        message=r"Write a whole number\.",
        cure=lambda place, _: restate(int)(place),
    ),
    Advice(
        situation="a name that is a number",
        prepare=category(7),
        meet=Place.check,
        message=r"found 7\. Write it in quotes\.",
        cure=lambda place, _: category("7")(place),
    ),
    Advice(
        situation="half a character in a category's name",
        prepare=category("x\ud800"),
        meet=Place.check,
        message=r"It holds half a character \(a lone surrogate\); rename it",
        cure=lambda place, _: category("x")(place),
    ),
    Advice(
        situation="a box outside its image: remove it",
        prepare=each("annotations", "bbox", [9000.0, 9000.0, 5.0, 5.0]),
        meet=Place.check,
        message=r"and left out\. Correct or remove the annotation\.",
        cure=drop_first_annotation,
    ),
    Advice(
        situation="a box outside its image: correct it",
        prepare=each("annotations", "bbox", [9000.0, 9000.0, 5.0, 5.0]),
        meet=Place.check,
        message=r"and left out\. Correct or remove the annotation\.",
        cure=lambda place, _: each("annotations", "bbox", [2.0, 2.0, 9.0, 9.0])(place),
    ),
    Advice(
        situation="another width than the image has",
        prepare=restate(lambda width: width + 1),
        meet=Place.check,
        message=r"\. Correct width and height, and the boxes if they go by them\.",
        cure=lambda place, _: restate(lambda width: width - 1)(place),
    ),
    Advice(
        situation="an EXIF orientation that the stated size fits either way",
        prepare=upside_down,
        meet=notes,
        message=r'turned by the EXIF orientation, as viewers show them, .* write (exif = "ignore") at the top',
        cure=lambda place, found: place.replace('name = "own"', f'{found[1]}\nname = "own"'),
    ),
    Advice(
        situation="no base boxes",
        prepare=without_base_boxes,
        meet=Place.build,
        message=r"found them in 0; add boxes of base names$",
        cure=lambda place, _: shutil.copyfile(place.root / "boxes.json", place.root / "train.json"),
    ),
    Advice(
        situation="every proposal lies on a base object",
        prepare=crowded,
        meet=Place.build,
        message=r"no region was kept.*: raise proposals\.base_iou above 1e-09; or train",
        cure=lambda place, _: elsewhere(place, "proposals.base_iou=0.9"),
        works=build_with_regions,
    ),
    Advice(
        situation="no proposal: a finer grid",
        prepare=lambda place: look_at(place, 'grid="paper"', "stride=800.0", "sizes=[8]", "ratios=[1.0]"),
        meet=Place.build,
        message=r"no region was kept.*of 0 proposals .*: lower proposals\.stride, or",
        cure=lambda place, _: elsewhere(place, "proposals.stride=300.0"),
        works=build_with_regions,
    ),
    Advice(
        situation="no proposal: more sizes",
        prepare=lambda place: look_at(place, "sizes=[1]", "ratios=[2.0]", "stride=90.0"),
        meet=Place.build,
        message=r"no region was kept.*of 0 proposals .*, or add proposals\.sizes; or train",
        cure=lambda place, _: elsewhere(place, "proposals.sizes=[1, 12]"),
        works=build_with_regions,
    ),
    Advice(
        situation="a file of proposals that holds none",
        prepare=lambda place: look_at(place, boxes(place, "none.json")),
        meet=Place.build,
        message=r"no region was kept.*of 0 proposals .*: give it other proposals\.boxes; or train",
        cure=lambda place, _: elsewhere(place, f"proposals.{boxes(place, 'some.json', [2, 2, 9, 9], [90, 90, 9, 9])}"),
        works=build_with_regions,
    ),
]


@each_of(CHECKED)
def test_who_mends_a_dataset_as_told_gets_on(row, shapes_root, tmp_path):
    follow(row, Place(shapes_root, tmp_path / "own"))


class Wordlist:
    """A plug-in that knows some words."""

    name = "plugin:mine:words"

    def encode_text(self, names: list[str]) -> torch.Tensor:
        table = {"cat": [1.0, 0.0], "ox": [0.0, 1.0]}
        return torch.tensor([table[name] for name in names])


def shapes_words(*names: str) -> object:
    settings = load_preset("shapes").teacher
    teacher = load_teacher("tiny-shapes", None, template=settings.template, names=settings.names)
    return require_words(teacher, names, ())


def launched(**variables: str) -> int:
    return require_launcher(variables)


CALLS: Calls = {
    r"WORLD_SIZE=two: expected the number of processes; start the training with torchrun": (
        lambda _: launched(WORLD_SIZE="two"),
        # What torchrun sets.
        lambda _: launched(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="29500"),
    ),
    r'backend="triton" cannot run here: .*\. Use backend="auto" or "eager"\.': (
        lambda _: require_backend("triton", torch.device("cpu")),
        lambda _: [require_backend(one, torch.device("cpu")) for one in ("auto", "eager")],
    ),
    r"holds half a character \(a lone surrogate\); rename it": (
        lambda _: require_different(["cat", "x\ud800"]),
        lambda _: require_different(["cat", "x"]),
    ),
    r"expected a path below \S+\. Correct file_name in the annotation file\.": (
        lambda root: resolve_image_path(root, "../a.png"),
        lambda root: resolve_image_path(root, "a.png"),
    ),
    r"model\.backbone 'resnet19' is unknown; choose one of tiny, resnet18": (
        lambda _: build_backbone("resnet19", channels=8, weights=None),
        lambda _: build_backbone("tiny", channels=8, weights=None),
    ),
    r"has no embedding for 'cow'; rename the class": (
        lambda _: require_words(Wordlist(), ["cat", "cow"], ()),
        lambda _: require_words(Wordlist(), ["cat", "ox"], ()),
    ),
    r"it ships with the words of the shapes benchmark only; use those names": (
        lambda _: shapes_words("ring", "zebra"),
        lambda _: shapes_words("ring", "circle"),
    ),
}


@pytest.mark.parametrize("said", CALLS)
def test_what_one_call_advises_about_its_input_is_accepted(said, tmp_path):
    follow_call(CALLS, said, tmp_path)


def test_an_unreadable_file_of_a_store_that_is_mended_is_read(shapes_store, tmp_path):
    copy = tmp_path / "store"
    shutil.copytree(shapes_store, copy)
    file = copy / "COMMIT.json"
    file.rename(tmp_path / "kept")
    # A loop of links: an error of the system that nothing else is said about.
    file.symlink_to(file)
    with pytest.raises(EzsdError, match="COMMIT.json: cannot be read .*; nothing is known to be damaged: mend that"):
        Store(copy)
    file.unlink()
    (tmp_path / "kept").rename(file)
    assert np.array_equal(Store(copy).image_ids, Store(shapes_store).image_ids)
