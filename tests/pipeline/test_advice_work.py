"""Advice of the work on datasets, stores and runs is tested: each row meets a message, does what it says, and gets on.

`tests/advice.toml` lists all advice.
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ezsd.cache import Store
from ezsd.cli import app
from ezsd.data.shapes import SHAPES_SPLIT
from ezsd.errors import EzsdError
from ezsd.pipeline.config.schema import Config
from ezsd.pipeline.console.store_messages import build_lines
from ezsd.pipeline.data.annotation_cache import training_annotations
from ezsd.pipeline.data.check import check_dataset
from ezsd.pipeline.data.datasets import Dataset, find_dataset
from ezsd.pipeline.data.images import read_pixels
from ezsd.pipeline.data.mask_cache import _fill, training_masks
from ezsd.pipeline.extraction.annotation_check import checked_annotations
from ezsd.pipeline.extraction.build import build_cache, build_share
from ezsd.pipeline.extraction.commit import commit_cache
from ezsd.pipeline.extraction.repair import repair_store
from ezsd.pipeline.extraction.request import BuildRequest
from ezsd.pipeline.inference.predictor import load_trained
from ezsd.pipeline.runs.run import Run
from ezsd.pipeline.scheduling.job_array import Share
from ezsd.pipeline.scheduling.pool import Schedule
from ezsd.pipeline.training.dataloader import load_batches
from ezsd.pipeline.training.distributed import Distributed
from ezsd.pipeline.training.train import (
    TrainRequest,
    _check_distributed,
    store_dataset,
    train,
    training_samples,
)
from tests.advicekit import Advice, each_of, follow


class Place:
    """A copy of the shapes, of a store and of a run, to spoil."""

    def __init__(self, request: pytest.FixtureRequest, folder: Path) -> None:
        self.request, self.folder = request, folder
        self.config: Config = dataclasses.replace(
            request.getfixturevalue("quick_config"),
            adapt=dataclasses.replace(request.getfixturevalue("quick_config").adapt, steps=0),
        )
        self.new = folder / "new"

    def copy(self, source: Path) -> Path:
        place = self.folder / "copies" / source.name
        return place if place.exists() else Path(shutil.copytree(source, place))

    @property
    def root(self) -> Path:
        return self.copy(self.request.getfixturevalue("shapes_root"))

    @property
    def store(self) -> Path:
        """What is trained from, not to be changed."""
        return self.request.getfixturevalue("shapes_store")

    @property
    def spoilt(self) -> Path:
        """A store that may be changed."""
        place = self.folder / "stored"
        return place if place.exists() else Path(shutil.copytree(self.store, place))

    @property
    def run(self) -> Run:
        """A run that may be changed."""
        return Run.open(self.copy(self.request.getfixturevalue("shapes_run").folder))

    @property
    def dataset(self) -> Dataset:
        return find_dataset("shapes", self.root)

    @property
    def file(self) -> Path:
        return self.root / "annotations/instances_train.json"

    def edit(self, change: Callable[[dict], object]) -> None:
        document = json.loads(self.file.read_text())
        change(document)
        self.file.write_text(json.dumps(document))

    def keep(self) -> None:
        shutil.copy(self.file, self.folder / "kept.json")

    def put_back(self) -> None:
        shutil.copy(self.folder / "kept.json", self.file)

    def check(self) -> str:
        """All that is said of a dataset."""
        found = check_dataset(self.dataset)
        return "\n".join([*found.problems, *found.warnings])

    def build_request(self, out: str = "built") -> BuildRequest:
        return BuildRequest(dataset=self.dataset, config=self.config, out=self.folder / out, scheduler="sync")

    def build(self, out: str = "built") -> str:
        report = build_cache(self.build_request(out))
        return "\n".join(build_lines(report.path, report))

    def train(self, folder: Path) -> Run:
        """The quick run's own training."""
        config = self.request.getfixturevalue("quick_config")
        return train(TrainRequest(cache=self.store, run=folder, config=config))

    def train_anew(self) -> None:
        load_trained(self.train(self.new), "cpu")

    def batches(self, images: int) -> None:
        config = dataclasses.replace(self.config.train, batch_size=images, num_workers=0)
        store = Store(self.store)
        reading = load_batches(
            training_samples(store, store_dataset(store, None), config),
            config,
            first_step=0,
            distributed=Distributed(0, 2),
        )
        next(reading)
        reading.close()


def two_processes(place: Place, sampling: str) -> None:
    _check_distributed(dataclasses.replace(place.config.train, rng=sampling), Distributed(0, 2))


def near_name(document: dict) -> None:
    document["categories"].append({"id": 900, "name": f"{document['categories'][0]['name']}-", "supercategory": ""})


def rename(document: dict) -> None:
    document["categories"][-1]["name"] = "spiral"


def join(document: dict) -> None:
    document["categories"].pop()


def image_twice(document: dict) -> None:
    """An object of an image stands with a second entry of the same file."""
    first = document["images"][0]
    document["images"].append({**first, "id": 9000})
    next(one for one in document["annotations"] if one["image_id"] == first["id"])["image_id"] = 9000


def join_images(document: dict) -> None:
    for one in document["annotations"]:
        if one["image_id"] == 9000:
            one["image_id"] = document["images"][0]["id"]
    document["images"].pop()


def one_image_with_base_boxes(document: dict) -> None:
    base = {one["id"] for one in document["categories"] if one["name"] in SHAPES_SPLIT.base}
    kept = next(one["image_id"] for one in document["annotations"] if one["category_id"] in base)
    document["annotations"] = [
        one for one in document["annotations"] if one["category_id"] not in base or one["image_id"] == kept
    ]


def wide_tiff(place: Place, mode: str) -> Path:
    path = place.folder / "wide.tif"
    Image.linear_gradient("L").convert(mode).save(path)
    return path


def large_image(place: Place) -> None:
    Image.new("1", (18_001, 10_000)).save(place.folder / "large.png")


def scaled_down(place: Place) -> None:
    Image.new("1", (1800, 1000)).save(place.folder / "large.png")


def other_text(place: Place) -> None:
    file = place.run.folder / "tables.safetensors"
    tables = load_file(file)
    save_file(tables | {"text": tables["text"].flip(0).contiguous()}, file)


def other_checkpoint(place: Place) -> None:
    path = place.run.folder / "checkpoints/step-00000006/state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"store_digest": "0" * 64}))


def forget(place: Place, key: str) -> None:
    path = place.run.folder / "environment.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != key}))


def bad_image(place: Place) -> None:
    file = min((place.root / "train").iterdir())
    file.write_bytes(file.read_bytes()[:200])
    place.config = dataclasses.replace(place.config, build=dataclasses.replace(place.config.build, max_bad_images=0.2))


def other_annotations(place: Place) -> None:
    place.edit(lambda document: document["annotations"].reverse())
    place.edit(lambda document: [one["bbox"].__setitem__(0, one["bbox"][0] + 0.5) for one in document["annotations"]])


def train_steps(place: Place, run: str, steps: int) -> str:
    words = ["train", "--cache", str(place.store), "--run", str(place.folder / run), "--device", "cpu"]
    done = CliRunner().invoke(app, [*words, "--set", f"train.steps={steps}", "--set", "train.batch_size=2"])
    assert done.exit_code == 0, done.output
    return done.stdout


def said_by_info(place: Place) -> None:
    said = CliRunner().invoke(app, ["cache", "info", str(place.folder / "built")])
    assert said.exit_code == 0
    assert re.search(r"000001\.\w+: cannot be read", said.stdout), said.stdout


TABLE = [
    Advice(
        situation="a step that cannot be shared out",
        meet=lambda place: place.batches(3),
        message="to 2 processes with train.grad_accumulation=1; choose a multiple of 2$",
        works=lambda place: place.batches(4),
    ),
    Advice(
        situation="several processes that sample boxes",
        meet=lambda place: two_processes(place, "batch"),
        message="2 processes need --set train.rng=image: ",
        works=lambda place: two_processes(place, "image"),
    ),
    Advice(
        situation="two names that are nearly equal: rename one",
        prepare=lambda place: place.edit(near_name),
        meet=Place.check,
        message="is nearly categories.*Join the two categories or rename one",
        cure=lambda place, _: place.edit(rename),
    ),
    Advice(
        situation="two names that are nearly equal: join them",
        prepare=lambda place: place.edit(near_name),
        meet=Place.check,
        message="is nearly categories.*Join the two categories or",
        cure=lambda place, _: place.edit(join),
    ),
    Advice(
        situation="an image file that is listed twice",
        prepare=lambda place: place.edit(image_twice),
        meet=Place.check,
        message="is the file of another image of the list too.* Join the two images",
        cure=lambda place, _: place.edit(join_images),
    ),
    Advice(
        situation="base boxes in one image",
        prepare=lambda place: (place.keep(), place.edit(one_image_with_base_boxes)),
        meet=Place.check,
        message="base boxes in at least 2 images, found them in 1. Add boxes of base names",
        cure=lambda place, _: place.put_back(),
    ),
    Advice(
        situation="a mode without a range",
        prepare=lambda place: wide_tiff(place, "F"),
        meet=lambda place: read_pixels(place.folder / "wide.tif"),
        message="Scale them to 0..255 and save the image as 8-bit grey or RGB$",
        cure=lambda place, _: wide_tiff(place, "L"),
    ),
    Advice(
        situation="an image that is too large",
        prepare=large_image,
        meet=lambda place: read_pixels(place.folder / "large.png"),
        message="at most 180,000,000 are read. Scale it down or cut it into tiles, and its boxes with it$",
        cure=lambda place, _: scaled_down(place),
    ),
    Advice(
        situation="a store that does not say where its images lie",
        prepare=lambda place: (place.spoilt / "environment.json").unlink(),
        meet=lambda place: store_dataset(Store(place.spoilt), None),
        message="does not say where its images lie; give --data-root DIR$",
        works=lambda place: checked_annotations(
            Store(place.spoilt), store_dataset(Store(place.spoilt), place.request.getfixturevalue("shapes_root"))
        ),
    ),
    Advice(
        situation="other annotations than the store's: the root it was made from",
        prepare=other_annotations,
        meet=lambda place: checked_annotations(Store(place.store), place.dataset),
        message="or give the --data-root it was made from$",
        works=lambda place: checked_annotations(Store(place.store), place.request.getfixturevalue("shapes_dataset")),
    ),
    Advice(
        situation="other annotations than the store's: a new store",
        prepare=other_annotations,
        meet=lambda place: checked_annotations(Store(place.store), place.dataset),
        message="; build a new store, or",
        cure=lambda place, _: place.build(),
        works=lambda place: checked_annotations(Store(place.folder / "built"), place.dataset),
    ),
    Advice(
        situation="a store that does not say how it was built",
        prepare=lambda place: (place.spoilt / "environment.json").unlink(),
        meet=lambda place: repair_store(place.spoilt, place.root, weights=None, device="cpu"),
        message="environment.json does not say how it was built; build it anew in another folder$",
        cure=lambda place, _: place.build("anew"),
        works=lambda place: repair_store(place.folder / "anew", place.root, weights=None, device="cpu"),
    ),
    Advice(
        situation="a commit that knows no shares",
        prepare=lambda place: (
            build_share(place.build_request(), Share(1, 2)),
            (place.folder / "built/environment.json").unlink(),
        ),
        meet=lambda place: commit_cache(place.folder / "built", Schedule(scheduler="sync")),
        message="1 of 3 blocks is missing .*; run the same `ezsd cache build` command again$",
        cure=lambda place, _: place.build(),
        works=lambda place: (commit_cache(place.folder / "built", Schedule()), Store(place.folder / "built")),
    ),
    Advice(
        situation="images that were left out",
        prepare=bad_image,
        meet=Place.build,
        message="1 image cannot be read and was left out; `ezsd cache info \\S+` says which and why",
        works=said_by_info,
    ),
    Advice(
        situation="a run with other text rows",
        prepare=other_text,
        meet=lambda place: load_trained(place.run, "cpu"),
        message="holds other text rows than run.json says; train again in another --run folder$",
        works=Place.train_anew,
    ),
    Advice(
        situation="a run whose tables are gone",
        prepare=lambda place: (place.run.folder / "tables.safetensors").unlink(),
        meet=lambda place: load_trained(place.run, "cpu"),
        message="is damaged or gone .*; train again in another --run folder$",
        works=Place.train_anew,
    ),
    Advice(
        situation="a run that is trained already",
        prepare=lambda place: train_steps(place, "first", 1),
        meet=lambda place: train_steps(place, "first", 1),
        message="or train longer: the same command with more train.steps goes on",
        # One step is within the warm-up, whose rates do not depend on the number of steps.
        works=lambda place: train_steps(place, "first", 2),
    ),
    Advice(
        situation="a checkpoint of another run",
        prepare=other_checkpoint,
        meet=lambda place: place.run.latest(),
        message="step-00000006: is another run's: .*; remove it$",
        cure=lambda place, _: shutil.rmtree(place.run.folder / "checkpoints/step-00000006"),
        works=lambda place: place.train(place.run.folder),
    ),
    Advice(
        situation="a run that does not say where its store is",
        prepare=lambda place: forget(place, "cache"),
        meet=lambda place: place.run.environment,
        message="does not say cache; run the same `ezsd train` again to write it$",
        cure=lambda place, _: place.train(place.run.folder),
    ),
]


@each_of(TABLE)
def test_who_does_what_the_work_says_gets_on(row, request, tmp_path):
    follow(row, Place(request, tmp_path), EzsdError)


def test_a_file_of_outlines_that_changed_while_it_was_read_is_read_again(outlined_root, tmp_path):
    root = Path(shutil.copytree(outlined_root, tmp_path / "shapes"))
    path, split = root / "annotations/instances_train.json", find_dataset("shapes", root).split
    annotations = training_annotations(path, split)
    document = json.loads(path.read_text())
    document["annotations"] = [one for one in document["annotations"] if one["id"] != int(annotations.annotation_id[0])]
    path.write_text(json.dumps(document))
    (tmp_path / "draft").mkdir()
    with pytest.raises(EzsdError, match="changed while it was read; run the same command again$"):
        _fill(path, annotations, tmp_path / "draft")
    assert training_masks(find_dataset("shapes", root))
