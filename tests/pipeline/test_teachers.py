"""Rounded weights are compared with float32 before anything is embedded, and own data is found again by a store."""

import dataclasses
import json
import logging

import pytest

from ezsd.adapt import flatten
from ezsd.cache import Store
from ezsd.data.annotations import load_training
from ezsd.data.shapes import SHAPES_SPLIT
from ezsd.errors import TeacherError
from ezsd.pipeline.data.datasets import find_dataset
from ezsd.pipeline.extraction import teacher as teachers
from ezsd.pipeline.extraction.build import build_cache
from ezsd.pipeline.extraction.request import BuildRequest
from ezsd.pipeline.training.train import store_dataset


def compare(dataset, config):
    """Runs the comparison for the published teacher."""
    teacher = teachers.configured_teacher(config.teacher, "cpu")
    annotations = load_training(dataset.root / dataset.train_annotations, dataset.split)
    teachers.check_precision(teacher, config, dataset, annotations, flatten(teacher.layer_norms()), "cpu")


def test_rounded_weights_are_compared_with_exact_ones(shapes_dataset, with_settings, caplog, monkeypatch):
    rounded = with_settings(teacher={"precision": "bf16"})
    with caplog.at_level(logging.INFO):
        compare(shapes_dataset, rounded)
    assert "bf16 against fp32 on" in caplog.text
    monkeypatch.setattr(teachers, "LEAST_COSINE", 1.1)
    with pytest.raises(TeacherError, match="in bf16 a crop's embedding has cosine 0.99.*teacher.precision=fp32"):
        compare(shapes_dataset, rounded)


def test_exact_weights_are_compared_with_nothing(shapes_dataset, quick_config, monkeypatch):
    monkeypatch.setattr(teachers, "LEAST_COSINE", 1.1)
    compare(shapes_dataset, quick_config)


def test_a_store_of_own_data_finds_it_again(shapes_root, quick_config, tmp_path):
    names = ", ".join(json.dumps(name) for name in SHAPES_SPLIT.base)
    (tmp_path / "own.toml").write_text(
        f'name = "own"\n[train]\nimages = "train"\nannotations = "annotations/instances_train.json"\n'
        f'[val]\nimages = "val"\nannotations = "annotations/instances_val.json"\n'
        f'[classes]\nbase = [{names}]\nnovel = "others"\n'
    )
    dataset = find_dataset(str(tmp_path / "own.toml"), shapes_root)
    config = dataclasses.replace(quick_config, adapt=dataclasses.replace(quick_config.adapt, steps=0))
    build_cache(BuildRequest(dataset=dataset, config=config, out=tmp_path / "store", limit=5, workers=1))
    store = Store(tmp_path / "store")
    assert store.text[0] == SHAPES_SPLIT.base + tuple(sorted(SHAPES_SPLIT.novel))
    assert store_dataset(store, None) == dataclasses.replace(dataset, root=shapes_root.absolute())
