"""Small real datasets, stores and runs, made once per session."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from pipeline.build import BuildRequest, build_cache
from pipeline.config import Config, load_preset
from pipeline.datasets import Dataset, find_dataset
from pipeline.evaluate import evaluate_crops, evaluate_run
from pipeline.runs import Run
from pipeline.shapes import write_shapes
from pipeline.train import TrainRequest, train

# A preset of minutes made one of seconds: fewer anchors, steps and regions, the same code.
QUICK = (
    "adapt.steps=4",
    "adapt.crops=32",
    "proposals.sizes=[40]",
    "proposals.stride=0.5",
    "build.block_images=5",
    "train.steps=6",
    "train.images=4",
    "train.warmup=2",
    "train.checkpoint_every=2",
)


@pytest.fixture(scope="session", autouse=True)
def _own_cache_folder(tmp_path_factory):
    # Parsed annotations must not land in the user's own folder.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EZSD_CACHE_DIR", str(tmp_path_factory.mktemp("parsed")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    # Tests share two cores; contended threads are slower than one.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def quick_config() -> Config:
    return load_preset("shapes", QUICK)


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(root, train=12, val=8, seed=5, workers=1)
    return root


@pytest.fixture(scope="session")
def shapes_dataset(shapes_root) -> Dataset:
    return find_dataset("shapes", shapes_root)


@pytest.fixture(scope="session")
def shapes_store(shapes_dataset, quick_config, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cache") / "shapes"
    build_cache(BuildRequest(dataset=shapes_dataset, config=quick_config, out=out, workers=1))
    return out


@pytest.fixture(scope="session")
def shapes_run(shapes_store, quick_config, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "quick"
    run = train(TrainRequest(cache=shapes_store, run=folder, config=quick_config))
    evaluate_run(run, data_root=None, device="cpu")
    evaluate_crops(run, data_root=None, device="cpu")
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
    folder = os.environ.get("EZSD_PHOTOS")
    if not folder:
        pytest.skip("EZSD_PHOTOS names no folder of COCO photos")
    return Path(folder)


@pytest.fixture(scope="session")
def conse_tools() -> Path:
    folder = os.environ.get("EZSD_CONSE")
    if not folder:
        pytest.skip("EZSD_CONSE names no folder with conse_teacher.py")
    return Path(folder)
