"""Boxes that trainings drew from: training_boxes.json in a run's folder, an entry for each first step of other ones.

`ezsd audit` compares them with an annotation file, whatever has become of the store since.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ezsd.cache import Store, StoreError, file_digest
from ezsd.data.records import boxes_digest
from ezsd.pipeline.errors import DamagedFile
from ezsd.pipeline.files import read_objects, write_json
from ezsd.pipeline.runs.run import Run

_FILE = "training_boxes.json"
_TYPES = {"step": int, "images": int, "boxes": int, "sha256": str, "annotations_sha256": str}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredBoxes:
    """Base objects of a store, N of them, sorted by image and then annotation id."""

    image_id: NDArray[np.int64]
    """(N,)."""
    annotation_id: NDArray[np.int64]
    """(N,)."""
    class_index: NDArray[np.int32]
    """Position among the store's class names, (N,)."""
    box: NDArray[np.float32]
    """xyxy, pixels of the original image, (N, 4)."""

    def digest(self, names: Sequence[str]) -> str:
        """Sha256 of ids, classes and boxes, as `Annotations.digest` has it; `names` are the store's."""
        return boxes_digest(
            names,
            image_id=self.image_id,
            annotation_id=self.annotation_id,
            class_index=self.class_index,
            box=self.box,
            crowd=np.zeros(len(self.box), np.bool_),
        )


def stored_boxes(store: Store, image_ids: Sequence[int]) -> StoredBoxes:
    """Read the base objects of images of a store, in the order of the ids.

    Raises:
        StoreError: an object has a class that the store has no name for, or a value is damaged.
    """
    annotation_id, counts = store.ground_truth.column("annotation_id", image_ids)
    class_index, _ = store.ground_truth.column("class_index", image_ids)
    box, _ = store.ground_truth.column("box", image_ids)
    classes = len(store.text[0])
    if np.any((class_index < 0) | (class_index >= classes)):
        raise StoreError(f"{store}: ground_truth has a class_index beyond its {classes} class names")
    return StoredBoxes(
        image_id=np.repeat(np.array(image_ids, np.int64), counts),
        annotation_id=annotation_id,
        class_index=class_index,
        box=box,
    )


def record_boxes(run: Run, store: Store, image_ids: Sequence[int], annotations: Path, step: int) -> None:
    """Note which boxes the run is trained on from a step on; what is trained anew is forgotten.

    Args:
        run: its folder is written to.
        store: the boxes' source.
        image_ids: the images that are trained on.
        annotations: the file that the store was compared with.
        step: number of steps done before.
    """
    boxes = stored_boxes(store, image_ids)
    entry = {
        "images": len(image_ids),
        "boxes": len(boxes.box),
        "sha256": boxes.digest(store.text[0]),
        "annotations_sha256": file_digest(annotations).sha256,
    }
    known = read_boxes(run)
    entries = [one for one in known if one["step"] < step]
    if not entries or {**entries[-1], "step": step} != {**entry, "step": step}:
        entries.append({"step": step, **entry})
    if entries != known:
        write_json(run.folder / _FILE, entries)


def read_boxes(run: Run) -> list[dict[str, Any]]:
    """Entries of `step`, `images`, `boxes`, their `sha256`, and the annotation file's `annotations_sha256`.

    A run of an earlier version has none.

    Raises:
        DamagedFile: the file holds something else.
    """
    path = run.folder / _FILE
    entries = read_objects(path) if path.exists() else []
    for entry in entries:
        if not all(isinstance(entry.get(key), kind) for key, kind in _TYPES.items()):
            raise DamagedFile(f"{path}: is damaged, expected {', '.join(_TYPES)} in each entry, found {entry}")
    return entries
