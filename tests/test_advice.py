"""Advice is tested: who does what a message says gets on. Rows of other parts are welcome, see `advicekit`.

`advice.toml` says of every message of the program that advises which test does what it says. A message is a text in
the code; `{}` stands for what is put in.
"""

import ast
import json
import re
import shlex
import shutil
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from ezsd.cache import Store
from ezsd.data.shapes import SHAPES_SPLIT
from ezsd.errors import EzsdError
from ezsd.pipeline.config.relations import load_settings
from ezsd.pipeline.config.schema import load_preset
from ezsd.pipeline.console.arguments import (
    class_names,
    find_sources,
    parse_class_thresholds,
    parse_outputs,
    picture_places,
    require_one_source,
    require_output,
)
from ezsd.pipeline.console.options import COMMANDS
from ezsd.pipeline.data.shapes import write_shapes
from ezsd.pipeline.data.sources import Camera
from ezsd.pipeline.data.split import chosen_split
from ezsd.pipeline.runs.run import Run
from ezsd.teacher.requirements import require_teacher
from ezsd.vocabulary import parse_classes
from tests.advicekit import FAST, Advice, Calls, Place, each_of, follow, follow_call


def other_setting(place: Place) -> None:
    place.set("proposals.nms_iou=0.31")


def half_built(place: Place) -> None:
    place.build_half()
    other_setting(place)


def whole_built(place: Place) -> None:
    place.build()
    other_setting(place)


def take(place: Place, options: str) -> None:
    """Give the options of a command line: --out and --reuse."""
    words = shlex.split(options)
    place.options |= {name.removeprefix("--"): Path(value) for name, value in zip(words[::2], words[1::2], strict=True)}


def move_names(place: Place, change: Callable[[str], str]) -> None:
    place.edit(lambda document: [one.update(file_name=change(one["file_name"])) for one in document["images"]])


def first_categories_again(document: dict) -> None:
    document["categories"] += [dict(one) for one in document["categories"][:3]]


def keep_one_entry(document: dict) -> None:
    document["categories"] = list({one["id"]: one for one in document["categories"]}.values())


def phantom(document: dict) -> None:
    document["categories"].insert(0, {"id": 900, "name": "circle", "supercategory": "none"})
    for one in document["categories"][1:]:
        one["supercategory"] = "circle"


def set_image(key: str, value: Callable[[dict], object]) -> Callable[[Place], None]:
    def change(document: dict) -> None:
        for one in document["images"]:
            one[key] = value(one)

    return lambda place: (place.edit(lambda d: d.update(kept=[dict(one) for one in d["images"]])), place.edit(change))


def write_back(place: Place, _: object) -> None:
    place.edit(lambda document: document.update(images=document.pop("kept")))


def no_region(place: Place) -> None:
    """Every proposal is guessed to be a base name, where there is no other."""
    place.replace(json.dumps(SHAPES_SPLIT.novel), "[]")


TABLE = [
    Advice(
        situation="an unfinished store of other settings: another folder",
        prepare=half_built,
        meet=Place.build,
        message=r"it is not finished: .*build into another folder: (--out \S+)$",
        cure=lambda place, found: take(place, found[1]),
    ),
    Advice(
        situation="an unfinished store of other settings: remove it",
        prepare=half_built,
        meet=Place.build,
        message=r"remove the folder (\S+),",
        cure=lambda place, found: shutil.rmtree(found[1]),
    ),
    Advice(
        situation="an unfinished store of other settings: its own settings",
        prepare=half_built,
        meet=Place.build,
        message=r"go on with the settings that it was begun with",
        cure=lambda place, found: place.set("proposals.nms_iou=" + str(load_preset("shapes", FAST).proposals.nms_iou)),
    ),
    Advice(
        situation="a finished store of other settings",
        prepare=whole_built,
        meet=Place.build,
        message=r"build into another folder: (--out \S+ --reuse \S+) takes over",
        cure=lambda place, found: take(place, found[1]),
    ),
    Advice(
        situation="a dataset with the name of a built-in one",
        prepare=lambda place: place.replace('name = "own"', 'name = "coco"'),
        meet=Place.check,
        message=r"name: 'coco' is a built-in dataset; choose another$",
        cure=lambda place, found: place.replace('name = "coco"', 'name = "mine"'),
    ),
    Advice(
        situation="images named from the folder above",
        prepare=lambda place: (move_names(place, lambda name: name), place.edit(_prefixed)),
        meet=Place.check,
        message=r'no such image \(12 like this, .*Try images = "(\S+)" in \[train\]',
        cure=lambda place, found: [
            place.replace(f'images = "{p}"', f'images = "{found[1]}"') for p in ("train", "val")
        ],
    ),
    Advice(
        situation="file names with backslashes of a Windows tool",
        prepare=lambda place: move_names(place, lambda name: f"C:\\photos\\{name}"),
        meet=Place.check,
        message=r"holds a backslash.*\(12 like this.*Write file_name as '[^\\/]+': that is there",
        cure=lambda place, found: move_names(place, lambda name: name.rpartition("\\")[2]),
    ),
    Advice(
        situation="file names that are URLs",
        prepare=lambda place: move_names(place, lambda name: f"https://example.com/data/{name}"),
        meet=Place.check,
        message=r"\(12 like this.*Write file_name as '[^\\/]+': that is there",
        cure=lambda place, found: move_names(place, lambda name: name.rpartition("/")[2]),
    ),
    Advice(
        situation="an image folder that is not there",
        prepare=lambda place: place.replace('images = "train"', 'images = "trian"'),
        meet=Place.build,
        message=r"no trian in it; \[train\] images says so; did you mean '(\w+)'\?",
        cure=lambda place, found: place.replace('images = "trian"', f'images = "{found[1]}"'),
    ),
    Advice(
        situation="one categories entry for each region",
        prepare=lambda place: place.edit(first_categories_again),
        meet=Place.check,
        message=r"(?m)the same category again: keep one entry. \(3 like this",
        cure=lambda place, found: place.edit(keep_one_entry),
    ),
    Advice(
        situation="a root category with the name of a class",
        prepare=lambda place: place.edit(phantom),
        meet=Place.check,
        message=r"categories\[0\] has no box and is only the supercategory of others: remove that entry",
        cure=lambda place, found: place.edit(lambda document: document["categories"].pop(0)),
    ),
    Advice(
        situation="a base name that the files do not know",
        prepare=lambda place: place.replace('"circle"', '"circel"'),
        meet=Place.check,
        message=r"found no such name; did you mean '(\w+)'\? Correct",
        cure=lambda place, found: place.replace('"circel"', f'"{found[1]}"'),
    ),
    *(
        Advice(
            situation=f"images with {words}",
            prepare=set_image("width", value),
            meet=Place.check,
            message=rf"found {found}\. {cure} \(12 like this",
            cure=write_back,
        )
        for words, value, found, cure in (
            ("sizes as fractions", lambda one: float(one["width"]), r"\d+\.0", "Write it without a decimal point."),
            ("sizes as texts", lambda one: str(one["width"]), r"'\d+'", "Write it as a plain number, without quotes."),
            ("no sizes", lambda one: None, "null", "Write the image's width in pixels."),
        )
    ),
    Advice(
        situation="a limit that leaves too few images with base boxes",
        prepare=lambda place: place.options.update(limit=1),
        meet=Place.build,
        message=r"base boxes in at least 2 images, found them in \d; raise --limit 1",
        cure=lambda place, found: place.options.update(limit=4),
    ),
    Advice(
        situation="a store without regions",
        prepare=no_region,
        meet=Place.build,
        message=r"no region was kept.*of [\d,]+ proposals \d.*(--set )?(proposals.drop_base_guesses=false)",
        cure=lambda place, found: (
            place.set(found[2]),
            take(place, f"--out {place.root}/b --reuse {place.root}/store"),
        ),
        works=lambda place: (place.build(), _require_regions(place), place.train()),
    ),
    Advice(
        situation="training from a store without regions",
        prepare=lambda place: (no_region(place), place.build()),
        meet=Place.train,
        message=r"no region to distil from.*--set (loss.distillation=0)$",
        cure=lambda place, found: place.set(found[1]),
    ),
]


def _prefixed(document: dict) -> None:
    # Both parts' files have as many images as the other has not.
    part = "train" if len(document["images"]) == 12 else "val"
    for one in document["images"]:
        one["file_name"] = f"{part}/{one['file_name']}"


def _require_regions(place: Place) -> None:
    store = Store(place.request().out)
    assert sum(len(store.regions[image].box) for image in store.image_ids.tolist())


@each_of(TABLE)
def test_who_does_what_a_message_says_gets_on(row, shapes_root, tmp_path):
    follow(row, Place(shapes_root, tmp_path / "own"))


SPEC = {"names": ["cat"], "text_sha256": "ab", "store": {"digest": "cd"}, "config": {"train": {"steps": 9}}}


def begin(folder: Path) -> Run:
    return Run.create_or_resume(folder, SPEC, {"text": torch.eye(2)})


def written(path: Path, text: str = "cat\n") -> Path:
    path.write_text(text)
    return path


def drawn(path: Path) -> Path:
    Image.new("RGB", (8, 8)).save(path)
    return path


def split_of(file: Path, base: tuple[str, ...] | None) -> None:
    chosen_split(["cat", "ox"], {}, where=file, base=base, novel=None, split_file=file)


SPOKEN: Calls = {
    "no preset 'voc'; choose one of coco,": (lambda _: load_preset("voc"), lambda _: load_preset("coco")),
    "unknown key 'stepz'; did you mean 'steps'\\?": (
        lambda _: load_preset("shapes", ["train.stepz=3"]),
        lambda _: load_preset("shapes", ["train.steps=3"]),
    ),
    "has a line break; give each setting by itself, in one line": (
        lambda _: load_preset("shapes", ["train.steps=3\nimages=2"]),
        lambda _: load_preset("shapes", ["train.steps=3", "train.batch_size=2"]),
    ),
    "proposals.max_proposals=100; set max_proposals to at least as many": (
        lambda _: load_settings("paper", ["proposals.max_proposals=100"]),
        lambda _: load_settings("paper", ["proposals.max_proposals=300"]),
    ),
    "leaves no region on an object; raise one of them": (
        lambda _: load_settings("shapes", ["model.box_batch_size_per_image=3"]),
        lambda _: load_settings("shapes", ["model.box_batch_size_per_image=4"]),
    ),
    "; set proposals.search=exhaustive": (
        lambda _: load_settings("shapes", ["proposals.search=coarse-to-fine"]),
        lambda _: load_settings("shapes", ["proposals.search=exhaustive"]),
    ),
    "leave --base and --novel out": (
        lambda root: split_of(written(root / "s.toml", 'base = ["cat"]\nnovel = ["ox"]\n'), ("cat",)),
        lambda root: split_of(root / "s.toml", None),
    ),
    "is a folder; give the name of a file": (require_output, lambda root: require_output(root / "new.json")),
    "there is no folder \\S+; make it first": (
        lambda root: require_output(root / "deep/new.json"),
        lambda root: ((root / "deep").mkdir(), require_output(root / "deep/new.json")),
    ),
    "give --run RUN, or --detections RESULTS.json": (
        lambda _: require_one_source(run=None, of_run={}, detections=None, of_file={"--annotations": None}),
        lambda root: require_one_source(run=root, of_run={}, detections=None, of_file={"--annotations": None}),
    ),
    "names.txt: is a file; give it to --classes-file": (
        lambda root: class_names("--classes", lists=[str(written(root / "names.txt"))]),
        lambda root: class_names("--classes", files=[root / "names.txt"]),
    ),
    "names.txt' is a file; give it to --classes-file": (
        lambda root: class_names("--classes", lists=[f"dog,{written(root / 'names.txt')}"]),
        lambda root: class_names("--classes", lists=["dog"], files=[root / "names.txt"]),
    ),
    "put commas between names, or": (lambda _: parse_classes("cat;ox"), lambda _: parse_classes("cat,ox")),
    "or double quotes around this one": (lambda _: parse_classes("cat;ox"), lambda _: parse_classes('"cat;ox"')),
    "a video behind a URL, .*download it and give its path": (
        lambda _: find_sources(["https://example.com/a.mp4"]),
        lambda root: find_sources([written(root / "a.mp4")]),
    ),
    "no video format; give it one such as .mp4": (
        lambda root: picture_places([Camera(0)], root / "found.png", alone=True),
        lambda root: picture_places([Camera(0)], root / "found.mp4", alone=True),
    ),
    "has two thresholds; leave one of them out": (
        lambda _: parse_class_thresholds(["cat=0.1", "cat=0.2"]),
        lambda _: parse_class_thresholds(["cat=0.1"]),
    ),
    "no format 'coc'; did you mean 'coco'": (
        lambda root: parse_outputs([f"coc={root}/a"], []),
        lambda root: parse_outputs([f"coco={root}/a.json"], []),
    ),
    "is a folder; give the name of a file$": (
        lambda root: parse_outputs([f"csv={root}"], []),
        lambda root: parse_outputs([f"csv={root}/a.csv"], []),
    ),
    "csv goes to the same place; choose another one": (
        lambda root: parse_outputs([f"csv={root}/a.csv", f"csv={root}/a.csv"], []),
        lambda root: parse_outputs([f"csv={root}/a.csv", f"coco={root}/b.json"], []),
    ),
    "a frame has no file; save the others as coco or csv": (
        lambda root: parse_outputs([f"fiftyone={root}"], [Camera(0)]),
        lambda root: parse_outputs([f"coco={root}/a.json", f"csv={root}/b.csv"], [Camera(0)]),
    ),
    "would be one file; detect them one by one": (
        lambda root: parse_outputs([f"yolo={root}"], [root / "a/x.png", root / "b/x.png"]),
        lambda root: [parse_outputs([f"yolo={root}"], [root / f"{one}/x.png"]) for one in "ab"],
    ),
    "no picture format; give it one such as .png": (
        lambda root: picture_places([drawn(root / "a.png")], root / "b.txt", alone=True),
        lambda root: picture_places([root / "a.png"], root / "b.png", alone=True),
    ),
    "is the image itself; choose another place": (
        lambda root: picture_places([drawn(root / "a.png")], root / "a.png", alone=True),
        lambda root: picture_places([root / "a.png"], root / "b.png", alone=True),
    ),
    "have the same name; detect them one by one": (
        lambda root: picture_places([root / "a/x.png", root / "b/x.png"], root / "new", alone=False),
        lambda root: [picture_places([root / f"{one}/x.png"], root / f"{one}.png", alone=True) for one in "ab"],
    ),
    "is not this very dataset; choose another folder or remove it": (
        lambda root: write_shapes(root, train=1, val=1, seed=0, workers=1),
        lambda root: write_shapes(root / "new", train=1, val=1, seed=0, workers=1),
    ),
    "is not empty and holds no run; choose another --run folder": (
        lambda root: begin(written(root / "thesis.tex").parent),
        lambda root: begin(root / "new"),
    ),
}


@pytest.mark.parametrize("said", SPOKEN)
def test_what_one_call_advises_is_accepted(said, tmp_path):
    follow_call(SPOKEN, said, tmp_path)


ROOT = Path(__file__).parents[1]
INVENTORY = tomllib.loads(Path(__file__).with_name("advice.toml").read_text())
VERBS = (
    "accept|add|ask|begin|bring|build|change|choose|convert|copy|correct|detect|download|end|evaluate|give|go on|have|"
    "install|join|keep|leave|lower|make|mend|mount|move|name|pip install|pull|push|put|raise|remove|rename|run|save|"
    "say|scale|set|start|take|train|try|use|wait|write"
)
_CALLS = "|".join(map(re.escape, COMMANDS))
ADVICE = re.compile(
    rf"`ezsd |`(?:{_CALLS})\(|`[a-z]+\.[\w{{}}]+=|did you mean"
    rf"|(?:^|[;.:,] |\b(?:or|and|then|next:) )(?:{VERBS})\b(?![.,(]| must be\b)",
    re.IGNORECASE,
)


def messages() -> Iterator[str]:
    """Texts of the program, but for docstrings and the help of options, that advise."""
    for file in (
        ROOT / "cli.py",
        *(path for part in ("cache", "ezsd", "pipeline") for path in (ROOT / part).rglob("*.py")),
    ):
        tree = ast.parse(file.read_text())
        skipped: set[ast.expr] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr):
                skipped.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                skipped |= set(node.values)
            elif isinstance(node, ast.keyword) and node.arg in ("help", "epilog"):
                skipped.add(node.value)
        for node in ast.walk(tree):
            text = "" if node in skipped else _text(node)
            if (" " in text or text.startswith("`")) and ADVICE.search(text):
                yield text


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def fragments(section: str) -> list[str]:
    return [fragment for listed in INVENTORY[section].values() for fragment in listed]


def test_every_message_that_advises_is_in_the_inventory_and_in_no_two_places():
    assert set(INVENTORY) == {"tried", "elsewhere", "plain"}
    advising = set(messages())
    listed = [fragment for section in INVENTORY for fragment in fragments(section)]
    assert [fragment for fragment, count in Counter(listed).items() if count > 1] == []
    fits = {one: [one] if one in advising else [text for text in advising if one in text] for one in listed}
    # A fragment that fits two texts would vouch for a message that nobody has looked at.
    assert {fragment: texts for fragment, texts in fits.items() if len(texts) != 1} == {}
    assert advising - {text for texts in fits.values() for text in texts} == set()


@pytest.mark.parametrize("test", INVENTORY["tried"])
def test_the_tests_that_the_inventory_names_are_there(test):
    file, _, name = test.partition("::")
    if file == "row":
        assert name in {row.situation for row in TABLE}
    else:
        body = ast.parse((ROOT / file).read_text()).body
        assert name in {node.name for node in body if isinstance(node, ast.FunctionDef)}


def test_a_misspelt_teacher_is_said_before_anything_is_drawn_or_loaded():
    with pytest.raises(
        EzsdError, match=r"`teacher=ViT-B-23`: no such open_clip model; did you mean '([\w-]+)'"
    ) as said:
        require_teacher("ViT-B-23", "openai")
    require_teacher(re.search(r"did you mean '([\w-]+)'", str(said.value))[1], "openai")
