"""Who does what a message about files, runs and options says gets on: the rows meet it, do it, and go on.

The inventory of `tests/test_advice.py` names these tests.
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

from ezsd.cache import file_digest
from ezsd.data.coco_json import read_table
from ezsd.metrics import Named, read_results
from ezsd.pipeline.config.schema import load_preset
from ezsd.pipeline.console.arguments import require_scheduler
from ezsd.pipeline.console.defaults import train_config
from ezsd.pipeline.data.annotation_cache import read_categories
from ezsd.pipeline.data.datasets import find_dataset
from ezsd.pipeline.data.requirements import require_evaluation
from ezsd.pipeline.extraction.build import build_cache
from ezsd.pipeline.extraction.request import BuildRequest
from ezsd.pipeline.files import write_json
from ezsd.pipeline.inference.evaluate import evaluate_run, run_dataset
from ezsd.pipeline.inference.evaluation_tables import evaluate_results
from ezsd.pipeline.inference.predictor import load_trained
from ezsd.pipeline.process_environment import require_launcher
from ezsd.pipeline.report import write_report
from ezsd.pipeline.report.outcomes import judged
from ezsd.pipeline.report.run_data import collect
from ezsd.pipeline.runs.run import Run
from ezsd.pipeline.training.train import TrainRequest, train
from ezsd.pipeline.training.validation import require_validation
from ezsd.teacher.open_clip import load_teacher, shipped_weights
from tests.advicekit import FAST, REFUSALS, Advice, Calls, each_of, follow, follow_call
from tests.conftest import QUICK
from tests.ezsd.test_teacher import WORKING
from tests.pipeline.test_check import TOML, buildable, own

__all__ = ["own"]


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
        load_teacher("plugin:plugin_of_advice:factory", None, **({"template": "a {}"} | options))


def own_card(**changed: object) -> dict[str, object]:
    config = {
        "train": {"steps": 9, "learning_rate": 0.1, "batch_size": 2, "reference_batch_size": 1},
        "loss": {"distillation": 1.0},
    }
    return {"names": ["cat"], "text_sha256": "ab", "store": {"digest": "cd"}, "config": config} | changed


def begin(folder: Path, **changed: object) -> None:
    run = Run.create_or_resume(folder, own_card(**changed), {"text": torch.eye(2)})
    (run.folder / "checkpoints/step-00000001").mkdir(exist_ok=True)


EFFECT = {"distillation_weight": 2.0, "peak_rate": 0.2}
RESULTS = {"images": IMAGES, "categories": CATEGORIES, "annotations": BOXES}
CALLS: Calls = {
    "--dataset cocoo: unknown; choose one of shapes, .*, coco": (
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
    "a plug-in makes its own prompts; leave teacher.descriptions out": (
        lambda root: plugin(root, descriptions=[("cat", "a cat")]),
        lambda root: plugin(root),
    ),
    "a plug-in makes its own prompts; leave the list of teacher.template out": (
        lambda root: plugin(root, template=["a {}", "the {}"]),
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
    r"holds another run: names\[0\]: \"cat\" there, \"ox\" wanted; choose another --run folder": (
        lambda root: (begin(root / "a"), begin(root / "a", names=["ox"])),
        lambda root: begin(root / "b", names=["ox"]),
    ),
    "an earlier version of ezsd understood the same settings otherwise: .*; choose another --run folder": (
        lambda root: (begin(root / "a"), begin(root / "a", in_effect=EFFECT)),
        lambda root: begin(root / "b", in_effect=EFFECT),
    ),
}


@pytest.mark.parametrize("said", CALLS)
def test_what_a_call_advises_is_accepted(said, tmp_path):
    follow_call(CALLS, said, tmp_path)


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


class Runs:
    """A store, a copy of its trained and evaluated run, and what rows make beside them."""

    def __init__(self, folder: Path, request: pytest.FixtureRequest) -> None:
        self.store, self.data = (request.getfixturevalue(f"shapes_{what}") for what in ("store", "root"))
        self.folder, self._request = folder, request
        self.run = self.copy("run")

    def copy(self, name: str) -> Run:
        place = self.folder / name
        shutil.copytree(self._request.getfixturevalue("shapes_run").folder, place)
        return Run(place)

    def train(self, run: str, *overrides: str, data: Path | None = None, **options: object) -> Run:
        config = load_preset("shapes", [*QUICK, *overrides])
        request = TrainRequest(cache=self.store, run=self.folder / run, config=config, data_root=data, **options)
        return train(request)

    def one_step(self, run: str, *overrides: str, **options: object) -> Run:
        return self.train(run, "train.steps=1", *overrides, **options)

    def edit(self, name: str, change: Callable[[dict], None]) -> None:
        """Change a JSON file of the run."""
        path = self.run.folder / name
        document = json.loads(path.read_text())
        change(document)
        write_json(path, document)

    def evaluate(self, run: Run | None = None, **options: object) -> None:
        evaluate_run(run or self.run, **{"data_root": None, "device": "cpu"} | options)

    def report(self, *compare: Run) -> None:
        write_report(self.run, images=0, data_root=None, compare=list(compare))

    def judge(self) -> None:
        judged(collect([self.run])[0], run_dataset(self.run, None))

    def load(self, run: str = "run", *overrides: str) -> None:
        load_trained(Run.open(self.folder / run), "cpu", overrides)

    def rename_a_weight(self) -> None:
        """As if another version had called it so."""
        newest = self.run.finished()
        state = newest.model()
        state["old"] = state.pop(next(iter(state)))
        path = newest.folder / "model.safetensors"
        save_file(state, path)
        place = str((newest.folder / "state.json").relative_to(self.run.folder))
        self.edit(place, put("sha256", "model.safetensors", file_digest(path).sha256))

    def outlined(self) -> Path:
        return self._request.getfixturevalue("outlined_root")

    def build(self, name: str, *overrides: str) -> None:
        dataset, config = find_dataset("shapes", self.data), load_preset("shapes", [*QUICK, *FAST, *overrides])
        out = self.folder / name
        build_cache(BuildRequest(dataset=dataset, config=config, out=out, scheduler="sync"))


TABLE = [
    Advice(
        situation="no run in a folder",
        meet=lambda runs: Run.open(runs.folder / "new"),
        message=r"no run here \(run.json is missing\); `ezsd train --cache ... --run` makes one$",
        cure=lambda runs, _: runs.one_step("new"),
    ),
    Advice(
        situation="a run whose images have moved",
        prepare=lambda runs: runs.edit("environment.json", put("data_root", "/gone/away")),
        meet=lambda runs: run_dataset(runs.run, None),
        message="its images lay in /gone/away, which is gone; give --data-root DIR$",
        works=lambda runs: run_dataset(runs.run, runs.data),
    ),
    Advice(
        situation="a run that is not evaluated",
        prepare=lambda runs: (runs.run.folder / "eval.json").unlink(),
        meet=Runs.report,
        message=r"not evaluated yet; run `ezsd eval --run \S+run` first$",
        cure=lambda runs, _: runs.evaluate(),
    ),
    Advice(
        situation="a run that another version evaluated",
        prepare=lambda runs: runs.edit("eval.json", put("annotations", ...)),
        meet=Runs.report,
        message="was evaluated by another version of ezsd; run `ezsd eval` again$",
        cure=lambda runs, _: runs.evaluate(),
    ),
    Advice(
        situation="runs that were evaluated on two ground truths",
        prepare=lambda runs: (runs.copy("other"), runs.edit("eval.json", put("annotations", "sha256", "a1" * 32))),
        meet=lambda runs: runs.report(Run(runs.folder / "other")),
        message="figures of two ground truths cannot stand side by side: run `ezsd eval` again, both with the same",
        cure=lambda runs, _: [runs.evaluate(Run(runs.folder / name), data_root=runs.data) for name in ("run", "other")],
    ),
    Advice(
        situation="a run whose annotations have changed since its evaluation",
        prepare=lambda runs: runs.edit("eval.json", put("annotations", "sha256", "a1" * 32)),
        meet=Runs.judge,
        message=r"instances_val.json: has changed since the evaluation; run `ezsd eval --run \S+run` again$",
        cure=lambda runs, _: runs.evaluate(),
    ),
    Advice(
        situation="a run that has not come to its end",
        prepare=lambda runs: shutil.rmtree(runs.run.finished().folder),
        meet=lambda runs: runs.load(),
        message=r"training is not finished \(at step 4 of 6\); run `ezsd train` again$",
        cure=lambda runs, _: runs.train("run"),
    ),
    Advice(
        situation="a run whose spec another version wrote",
        prepare=lambda runs: runs.edit("run.json", put("embed_dim", ...)),
        meet=lambda runs: runs.load(),
        message="run.json has no embed_dim; another version made it, train it again in another --run folder$",
        cure=lambda runs, _: runs.one_step("new"),
        works=lambda runs: runs.load("new"),
    ),
    Advice(
        situation="a run whose weights another version named",
        prepare=Runs.rename_a_weight,
        meet=lambda runs: runs.load(),
        message=r"was trained by another version of ezsd \(.*\); train it again in another --run folder$",
        cure=lambda runs, _: runs.one_step("new"),
        works=lambda runs: runs.load("new"),
    ),
    Advice(
        situation="a run whose weights another version named is gone on with",
        prepare=Runs.rename_a_weight,
        meet=lambda runs: runs.train("run"),
        message=r"was trained by another version of ezsd \(.*\); train it again in another --run folder$",
        works=lambda runs: runs.one_step("new"),
    ),
    Advice(
        situation="masks of a run without",
        meet=lambda runs: runs.load("run", "model.masks=true"),
        message="was trained without masks; train another one with --set model.masks=true$",
        cure=lambda runs, _: runs.one_step("new", "model.masks=true", data=runs.outlined()),
        works=lambda runs: runs.load("new", "model.masks=true"),
    ),
    Advice(
        situation="an evaluation of fewer detections: by the limit",
        meet=lambda runs: runs.evaluate(overrides=["eval.max_detections=5"]),
        message="eval.max_detections is for `ezsd detect` alone; leave it out, --max-detections says how many count",
        works=lambda runs: runs.evaluate(max_detections=300),
    ),
    Advice(
        situation="an evaluation of fewer detections: of `ezsd detect`",
        meet=lambda runs: runs.evaluate(overrides=["eval.max_detections=5"]),
        message="eval.max_detections is for `ezsd detect` alone",
        works=lambda runs: runs.load("run", "eval.max_detections=5"),
    ),
    Advice(
        situation="a training with another setting of stage one",
        meet=lambda runs: train_config(runs.store, None, ["proposals.max_regions=7"]),
        message="build another store with it: ezsd cache build --set proposals.max_regions=7 --out STORE$",
        cure=lambda runs, _: runs.build("new", "proposals.max_regions=7"),
        works=lambda runs: train_config(runs.folder / "new", None, []),
    ),
]


@each_of(TABLE)
def test_who_does_what_a_message_about_a_run_says_gets_on(row, request, tmp_path):
    follow(row, Runs(tmp_path, request))


def test_validation_files_put_there_as_told_are_evaluated_on(shapes_root, quick_config, tmp_path, caplog):
    root = shutil.copytree(shapes_root, tmp_path / "data")
    away = shutil.move(root / "annotations/instances_val.json", tmp_path / "away.json")
    dataset = find_dataset("shapes", root)
    require_validation(dataset, quick_config)
    assert "`ezsd eval` will need it" in caplog.text
    caplog.clear()
    shutil.move(away, root / "annotations/instances_val.json")
    require_validation(dataset, quick_config)
    assert "will need it" not in caplog.text
    require_evaluation(dataset)
