"""Who does what a message about files, runs and options says gets on: the rows meet it, do it, and go on.

Like tests/test_advice.py, whose inventory names these tests; `{}` in a message stands for what is put in.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from ezsd.data.table import read_table
from ezsd.metrics import Named, read_results
from ezsd.teacher import load_teacher, shipped_weights
from pipeline.arguments import require_scheduler
from pipeline.command import USER_ERRORS
from pipeline.datasets import find_dataset
from pipeline.figures import evaluate_results
from pipeline.parsed import read_categories
from pipeline.runs import Run
from pipeline.surroundings import require_launcher
from tests.ezsd.test_teacher import WORKING
from tests.pipeline.test_check import TOML, buildable, own

__all__ = ["own"]
ROOT = Path(__file__).resolve().parents[2]
REFUSALS = (*USER_ERRORS, ValueError)


def put(*keys: object) -> Callable[[dict], None]:
    """A change of a document: the value at the end of the keys; `...` removes what is there."""

    def change(document: dict) -> None:
        *inner, last, value = keys
        for key in inner:
            document = document[key]
        if value is ...:
            del document[last]
        else:
            document[last] = value

    return change


def add(section: str, **entry: object) -> Callable[[dict], None]:
    return lambda document: document[section].append(entry)


def drop(section: str) -> Callable[[dict], None]:
    """Remove the last entry, which a row has added."""
    return lambda document: document[section].pop()


def lost(document: dict) -> None:
    add("annotations", id=10, image_id=77, category_id=2, bbox=[1, 2, 3, 4])(document)


def two_cats(document: dict) -> None:
    add("categories", id=9, name="cat")(document)
    add("annotations", id=10, image_id=2, category_id=9, bbox=[1, 2, 3, 4])(document)


def join_cats(document: dict) -> None:
    document["categories"].pop()
    document["annotations"][-1]["category_id"] = 2


LISTS = "A COCO-format file has lists images, annotations and categories; correct "
FILES = [
    (
        "a list that is an object",
        put("annotations", {}),
        f"{LISTS}annotations\\.",
        put("annotations", buildable()["annotations"]),
    ),
    ("an entry that is a number", put("images", 3, 7), f"{LISTS}images\\.", put("images", 3, buildable()["images"][3])),
    (
        "an annotation of no image: add the entry",
        lost,
        "Add the entry to images, correct the id or remove the annotation",
        add("images", id=77, file_name="77.png", width=20, height=10),
    ),
    (
        "an annotation of no image: correct the id",
        lost,
        "correct the id or remove",
        put("annotations", -1, "image_id", 2),
    ),
    ("an annotation of no image: remove it", lost, "or remove the annotation", drop("annotations")),
    (
        "a box of three numbers: correct it",
        put("annotations", 0, "bbox", [1, 2, 3]),
        r"found \[1, 2, 3\]\. Correct or remove the annotation",
        put("annotations", 0, "bbox", [1, 2, 3, 4]),
    ),
    (
        "a box of three numbers: remove the annotation",
        add("annotations", id=10, image_id=1, category_id=2, bbox=[1, 2, 3]),
        r"found \[1, 2, 3\]\. Correct or remove the annotation",
        drop("annotations"),
    ),
    (
        "a height of nothing",
        put("images", 3, "height", 0),
        r"found 0\. Correct the number",
        put("images", 3, "height", 10),
    ),
    (
        "two images of one id",
        put("images", 3, "id", 0),
        "Give every entry an id of its own",
        put("images", 3, "id", 3),
    ),
    (
        "a category without an id",
        put("categories", 3, "id", ...),
        "Give every entry of categories its id",
        put("categories", 3, "id", 3),
    ),
    (
        "a category without a name",
        put("categories", 3, "name", ...),
        "Give every entry of categories its name",
        put("categories", 3, "name", "kite"),
    ),
    (
        "half a character in a name",
        put("categories", 3, "name", "kit\ud800"),
        r"It holds half a character \(a lone surrogate\); rename it",
        put("categories", 3, "name", "kite"),
    ),
    ("two categories of one name: join them", two_cats, "Join the two categories or rename one", join_cats),
    ("two categories of one name: rename one", two_cats, "or rename one", put("categories", -1, "name", "tom")),
]
"""Situation, what is wrong with the training file, what is said, the cure."""


@pytest.mark.parametrize(("wrong", "said", "cure"), [pytest.param(*row[1:], id=row[0]) for row in FILES])
def test_an_annotation_file_mended_as_told_is_accepted(own, wrong, said, cure):
    shutil.copyfile(own.root / "photos/0.png", own.root / "photos/77.png")
    document = buildable()
    wrong(document)
    found = own(document)
    assert re.search(said, "\n".join(found.problems)), found.problems
    cure(document)
    assert own(document).problems == []


def test_a_byte_order_mark_left_out_as_told_is_accepted(own):
    text = json.dumps(buildable())
    (problem,) = own("\ufeff" + text).problems
    assert problem.endswith("Save the file as UTF-8 without one.")
    assert own(text).problems == []


def test_a_novel_name_spelt_as_offered_is_found(own):
    toml = own.root / "own.toml"
    toml.write_text(TOML.replace('"cow"', '"cows"'))
    (said,) = {
        found[1] for line in own(buildable()).warnings if (found := re.search(r"\(did you mean '(\w+)'\?\)", line))
    }
    toml.write_text(TOML.replace('"cow"', f'"{said}"'))
    assert own(buildable()).warnings == []


LAUNCHED = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The variables of two processes that `torchrun` started."""
    folder = tmp_path_factory.mktemp("launched")
    show = "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1] + os.environ['RANK'], 'w'))"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    subprocess.run([*torchrun, sys.executable, "-c", show, f"{folder}/"], check=True, capture_output=True, timeout=200)
    return [json.loads((folder / rank).read_text()) for rank in "01"]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "two"}, "expected the number of processes; start the training with torchrun"),
        ({"WORLD_SIZE": "2"}, "without RANK, MASTER_ADDR, MASTER_PORT: start several processes with `torchrun`, or"),
        (LAUNCHED | {"RANK": "2"}, "expected a rank below the number of processes.*start the training with `torchrun`"),
    ],
)
def test_processes_that_torchrun_starts_as_told_are_taken(variables, said, launched):
    with pytest.raises(REFUSALS, match=said):
        require_launcher(variables)
    assert [require_launcher(one) for one in launched] == [2, 2]
    without = subprocess.run(
        ["env", "-u", "WORLD_SIZE", "env"], env=variables, capture_output=True, text=True, check=True
    )
    assert require_launcher(dict(line.split("=", 1) for line in without.stdout.splitlines())) == 1


NAMED = Named(file_names={1: "1.png"}, categories={"cat": 1, "cow": 2})
BOXES = [{"image_id": 1, "category_id": k, "bbox": [10 * k, 10, 20, 20], "score": 0.5} for k in (1, 2)]
IMAGES = [{"id": 1, "file_name": "1.png", "width": 99, "height": 99}]
CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 2, "name": "cow"}]


def written(path: Path, document: object) -> Path:
    path.write_text(json.dumps(document))
    return path


def results(folder: Path, document: object) -> None:
    path = written(folder / "found.json", document)
    found = read_results(path, images={1: (99, 99)}, categories={1: 0, 2: 1}, named=NAMED)
    assert found.class_index.tolist() == [0, 1]


def evaluated(folder: Path, detections: list, classes: str | None) -> None:
    truth = [{**box, "id": k, "area": 400, "iscrowd": 0} for k, box in enumerate(BOXES)]
    annotations = {"images": IMAGES, "categories": CATEGORIES, "annotations": truth}
    choices = {"base": ("cat",), "novel": ("cow",), "split_file": None, "max_detections": None}
    places = written(folder / "found.json", detections), written(folder / "truth.json", annotations)
    assert evaluate_results(*places, classes=classes, **choices)


def plugin(folder: Path, **options: object) -> None:
    (folder / "plugin_of_advice.py").write_text(WORKING)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        load_teacher("plugin:plugin_of_advice:factory", None, template="a {}", **options)


def own_card(**changed: object) -> dict[str, object]:
    config = {"train": {"steps": 9, "learning_rate": 0.1, "images": 2, "rate_images": 1}, "loss": {"distillation": 1.0}}
    return {"names": ["cat"], "text_sha256": "ab", "store": {"digest": "cd"}, "config": config} | changed


def begin(folder: Path, **changed: object) -> None:
    run = Run.create_or_resume(folder, own_card(**changed), {"text": torch.eye(2)})
    (run.folder / "checkpoints/step-00000001").mkdir(exist_ok=True)


EFFECT = {"distillation_weight": 2.0, "peak_rate": 0.2}
RESULTS = {"images": IMAGES, "categories": CATEGORIES, "annotations": BOXES}
CALLS: dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]] = {
    "--dataset cocoo: unknown; choose one of shapes, coco": (
        lambda root: find_dataset("cocoo", root),
        lambda root: find_dataset("coco", root),
    ),
    "--dataset own: unknown; .*, or a file that ends in .toml": (
        lambda root: find_dataset("own", root),
        lambda root: ((root / "own.toml").write_text(TOML), find_dataset(str(root / "own.toml"), strict=False)),
    ),
    "--blocks is for jobs without a scheduler; leave --scheduler out": (
        lambda _: require_scheduler("tcp://a:1", workers=0, dashboard=False, share=(1, 2)),
        lambda _: require_scheduler("local", workers=0, dashboard=False, share=(1, 2)),
    ),
    "leave --scheduler out, or --blocks": (
        lambda _: require_scheduler("tcp://a:1", workers=0, dashboard=False, share=(1, 2)),
        lambda _: require_scheduler("tcp://a:1", workers=0, dashboard=False, share=None),
    ),
    "so more than the novel names was looked for; leave --classes out": (
        lambda root: evaluated(root, BOXES, "novel"),
        lambda root: evaluated(root, BOXES, None),
    ),
    "or give the detections of the novel names": (
        lambda root: evaluated(root, BOXES, "novel"),
        lambda root: evaluated(root, BOXES[1:], "novel"),
    ),
    "images: expected a list, found nothing. A document of results has lists images, categories and annotations": (
        lambda root: results(root, {"annotations": BOXES}),
        lambda root: results(root, RESULTS),
    ),
    "a plug-in chooses its own precision; leave teacher.precision out": (
        lambda root: plugin(root, precision="bf16"),
        lambda root: plugin(root),
    ),
    "for a local file of an open_clip model; leave it out": (
        lambda _: load_teacher("tiny-shapes", None, template="a {}", normalisation="openai"),
        lambda _: load_teacher("tiny-shapes", None, template="a {}"),
    ),
    "found Is a directory. Give the path of a COCO-format annotation file": (
        read_categories,
        lambda root: read_categories(written(root / "a.json", buildable())),
    ),
    "found something else .*Give the path of a COCO-format annotation file": (
        lambda root: ((root / "own.toml").write_text(TOML), read_table(root / "own.toml")),
        lambda root: read_table(written(root / "a.json", buildable())),
    ),
    "holds another run: names: .*; choose another --run folder": (
        lambda root: (begin(root / "a"), begin(root / "a", names=["ox"])),
        lambda root: begin(root / "b", names=["ox"]),
    ),
    "an earlier version of ezsd understood the same settings otherwise: .*; choose another --run folder": (
        lambda root: (begin(root / "a"), begin(root / "a", in_effect=EFFECT)),
        lambda root: begin(root / "b", in_effect=EFFECT),
    ),
}
"""Advice of one call: what is said, what it is said to, what it says to do."""


@pytest.mark.parametrize("said", CALLS)
def test_what_a_call_advises_is_accepted(said, tmp_path):
    asked, advised = CALLS[said]
    with pytest.raises(REFUSALS, match=said):
        asked(tmp_path)
    advised(tmp_path)


@pytest.fixture
def hub_model(tmp_path):
    """A folder that holds a model and its weights as a hub does."""
    config = json.loads(Path(str(shipped_weights())).with_suffix(".json").read_text())
    written(tmp_path / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": {}})
    model = open_clip.create_model(f"local-dir:{tmp_path}", load_weights=False)
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    return tmp_path


def test_a_hub_model_with_a_local_file_or_none_as_told_is_loaded(hub_model):
    with pytest.raises(REFUSALS, match="a hub model brings its weights; give a local file or none$"):
        load_teacher(f"local-dir:{hub_model}", "openai", template="a {}")
    for weights in (None, str(hub_model / "open_clip_model.safetensors")):
        load_teacher(f"local-dir:{hub_model}", weights, template="a {}", activation="gelu")
