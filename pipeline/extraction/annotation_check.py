"""Comparison of the present annotations with those that a store was made from."""

from __future__ import annotations

from ezsd.cache import Store, StoreMismatch
from ezsd.data.annotations import Annotations
from ezsd.pipeline.data.annotation_cache import training_annotations
from ezsd.pipeline.data.datasets import Dataset
from ezsd.pipeline.extraction.provenance import dataset_inputs
from ezsd.pipeline.extraction.request import take_first


def checked_annotations(store: Store, dataset: Dataset) -> Annotations:
    """The images and base boxes that a store was made from. StoreMismatch when they are others now."""
    path = dataset.root / dataset.train_annotations
    annotations = take_first(training_annotations(path, dataset.split), len(store.image_ids))
    fields, digest = dataset_inputs(store.manifest), annotations.digest()
    now = {"image_list_sha256": digest["images"], "base_boxes_sha256": digest["boxes"]}
    changed = [
        f"dataset.{key}: store has {fields[key]}, now {value}" for key, value in now.items() if fields[key] != value
    ]
    if changed:
        raise StoreMismatch(
            f"{store.path}: made from other annotations than {path}: {'; '.join(changed)}; build a new store, or give "
            "the `data_root` it was made from"
        )
    return annotations
