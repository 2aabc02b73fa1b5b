"""Small real datasets, stores and runs, made once per session.

Torch and what needs it are loaded by the fixtures that use them: pytest loads this file also in the process that only
hands out tests, before any other process starts.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ezsd.pipeline.config.schema import Config
    from ezsd.pipeline.data.datasets import Dataset
    from ezsd.pipeline.runs.run import Run

# A preset of minutes made one of seconds: fewer anchors, steps and regions, the same code.
QUICK = (
    "adapt.steps=4",
    "adapt.batch_size=32",
    "proposals.search=exhaustive",
    "proposals.sizes=[40]",
    "proposals.stride=0.5",
    "build.block_images=5",
    "model.semantic_boxes=true",
    # Windows of a grid have no objectness, which pseudo-labels need.
    "train.pseudo_confidence=0",
    "train.steps=6",
    "train.batch_size=4",
    "train.reference_batch_size=4",
    "train.warmup_steps=2",
    "train.checkpoint_every=2",
)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Load torch and all tests without looking for garbage, and never look through them later.

    The first takes seconds of each process, and every later look a fifth of a second.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _own_cache_folder(tmp_path_factory):
    # Parsed annotations must not land in the user's own folder.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EZSD_CACHE_DIR", str(tmp_path_factory.mktemp("parsed")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    # Tests share two cores; contended threads are slower than one.
    import torch

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="session", autouse=True)
def _warm_readers(_one_thread):
    # Reading processes are forks of a server: each would load for seconds what it need not if the server has it.
    multiprocessing.set_forkserver_preload(
        ["ezsd.pipeline.training.train", "ezsd.pipeline.extraction.worker", "distributed", "open_clip"]
    )


@pytest.fixture
def warm_workers():
    """Dask's worker processes are forks of that server too, instead of loading all anew.

    For tests of what workers make; how they are started is that of test_building_doc.py and test_schedule.py.
    """
    import dask

    # Its defaults must be there first: what is set without them is taken away together with them.
    import_module("distributed")
    # Before Dask has the server load a list of its own.
    multiprocessing.forkserver.ensure_running()
    with dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        yield


@pytest.fixture(scope="session")
def quick_config() -> Config:
    from ezsd.pipeline.config.schema import load_preset

    return load_preset("shapes", QUICK)


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory) -> Path:
    from ezsd.pipeline.data.shapes import write_shapes

    root = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(root, train=12, val=8, seed=5, workers=1)
    return root


@pytest.fixture(scope="session")
def shapes_dataset(shapes_root) -> Dataset:
    from ezsd.pipeline.data.datasets import find_dataset

    return find_dataset("shapes", shapes_root)


@pytest.fixture(scope="session")
def shapes_store(shapes_dataset, quick_config, tmp_path_factory) -> Path:
    from ezsd.pipeline.extraction.build import build_cache
    from ezsd.pipeline.extraction.request import BuildRequest

    out = tmp_path_factory.mktemp("cache") / "shapes"
    build_cache(BuildRequest(dataset=shapes_dataset, config=quick_config, out=out, workers=1))
    return out


@pytest.fixture(scope="session")
def shapes_run(shapes_store, quick_config, tmp_path_factory) -> Run:
    from ezsd.pipeline.inference.evaluate import evaluate_crops, evaluate_run
    from ezsd.pipeline.training.train import TrainRequest, train

    folder = tmp_path_factory.mktemp("runs") / "quick"
    run = train(TrainRequest(cache=shapes_store, run=folder, config=quick_config))
    evaluate_run(run, data_root=None, device="cpu")
    evaluate_crops(run, data_root=None, device="cpu")
    return run


@pytest.fixture(scope="session")
def outlined_root(shapes_root, tmp_path_factory) -> Path:
    """The shapes with outlines: each object's is the diamond within its box, every third one's as run lengths.

    Outlines of novel training objects, and of a crowd of base ones, are no outlines: nobody may look at them.
    """
    from pycocotools import mask

    from ezsd.data.shapes import SHAPES_SPLIT

    root = tmp_path_factory.mktemp("outlined") / "shapes"
    shutil.copytree(shapes_root, root)
    for part in ("train", "val"):
        path = root / f"annotations/instances_{part}.json"
        document = json.loads(path.read_text())
        names = {one["id"]: one["name"] for one in document["categories"]}
        size = {one["id"]: (one["height"], one["width"]) for one in document["images"]}
        for one in document["annotations"]:
            x, y, w, h = one["bbox"]
            diamond = [x + w / 2, y, x + w, y + h / 2, x + w / 2, y + h, x, y + h / 2]
            one["segmentation"] = [diamond]
            if one["id"] % 3 == 0:
                height, width = size[one["image_id"]]
                runs = mask.merge(mask.frPyObjects([diamond], height, width))
                one["segmentation"] = {"size": [height, width], "counts": runs["counts"].decode()}
            if part == "train" and names[one["category_id"]] in SHAPES_SPLIT.novel:
                one["segmentation"] = "novel"
        if part == "train":
            first = document["annotations"][0]
            base = next(number for number, name in names.items() if name in SHAPES_SPLIT.base)
            crowd = {"id": 10**6, "category_id": base, "iscrowd": 1, "segmentation": "crowd"}
            document["annotations"].append({**first, **crowd})
        path.write_text(json.dumps(document))
    return root


@pytest.fixture(scope="session")
def masked_run(shapes_store, outlined_root, tmp_path_factory) -> Run:
    """A quick run with masks from the same store."""
    from ezsd.pipeline.config.schema import load_preset
    from ezsd.pipeline.inference.evaluate import evaluate_run
    from ezsd.pipeline.training.train import TrainRequest, train

    folder = tmp_path_factory.mktemp("runs") / "masked"
    config = load_preset("shapes", [*QUICK, "model.masks=true"])
    run = train(TrainRequest(cache=shapes_store, run=folder, config=config, data_root=outlined_root))
    evaluate_run(run, data_root=None, device="cpu")
    return run


@pytest.fixture
def with_settings(quick_config):
    """The quick configuration with some sections' values replaced: with_settings(loss={"distillation": 0.0})."""

    def replace(**sections) -> Config:
        changed = {
            name: dataclasses.replace(getattr(quick_config, name), **values) for name, values in sections.items()
        }
        return dataclasses.replace(quick_config, **changed)

    return replace


@pytest.fixture(scope="session")
def photos() -> Path:
    return _named_folder("EZSD_PHOTOS", "of COCO photos")


@pytest.fixture(scope="session")
def voc_photos() -> Path:
    return _named_folder("EZSD_VOC", "of photos of Pascal VOC 2007")


@pytest.fixture(scope="session")
def conse_tools() -> Path:
    return _named_folder("EZSD_CONSE", "with conse_teacher.py")


def _named_folder(variable: str, what: str) -> Path:
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} names no folder {what}")
    return Path(folder)
