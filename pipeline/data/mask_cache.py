"""Outlines of base objects read once, kept beside the parsed boxes, and drawn as masks when an image is trained on."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from ezsd.data.annotations import Annotations
from ezsd.data.masks import draw_in_frame, pack, read_outlines, unpack
from ezsd.detector.masks import GRID, ObjectMasks
from ezsd.errors import AnnotationError
from ezsd.pipeline.data.annotation_cache import category_ids, kept_arrays, training_annotations
from ezsd.pipeline.data.datasets import Dataset


class StoredMasks:
    """Masks of base objects by image id, in the order of the training record; see `ezsd.data.dataset.MaskSource`.

    Sent to other processes as the folder's name: they map the same bytes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._arrays: dict[str, NDArray[Any]] = {
            # Copy on write: torch takes no read-only array without a warning, and the file stays as it is.
            file.stem: np.load(file, mmap_mode="c", allow_pickle=False)
            for file in folder.glob("*.npy")
        }

    def __reduce__(self) -> tuple[type[StoredMasks], tuple[Path]]:
        return StoredMasks, (self._folder,)

    def __getitem__(self, image_id: int) -> ObjectMasks:
        known = self._arrays["image_id"]
        rows = range(*np.searchsorted(known, [image_id, image_id + 1]).tolist())
        frame = np.zeros((len(rows), 4), dtype=np.float32)
        grid = np.zeros((len(rows), GRID, GRID), dtype=np.bool_)
        for place, row in enumerate(rows):
            packed = self._arrays["packed"][self._arrays["start"][row] : self._arrays["stop"][row]].tobytes()
            height, width = self._arrays["image_size"][row].tolist()
            frame[place], grid[place] = draw_in_frame(unpack(packed), height, width, GRID)
        return ObjectMasks(torch.from_numpy(frame), torch.from_numpy(grid))


def training_masks(dataset: Dataset) -> StoredMasks:
    """Masks of a dataset's base objects.

    The annotation file is read a second time, entry by entry; once per content of the file.

    Raises:
        AnnotationError: a base object has no segmentation, or one that is not in order.
    """
    path, names = dataset.root / dataset.train_annotations, dataset.split.base
    annotations = training_annotations(path, dataset.split)
    return StoredMasks(kept_arrays(path, ["outlines", names], partial(_fill, path, annotations))[0])


def _fill(path: Path, annotations: Annotations, draft: Path) -> Mapping[str, object]:
    """Write the outlines of a record as they are read, and the offset of each row's."""
    images, categories = annotations.images, category_ids(path, annotations.names)
    size = np.stack([images.height, images.width], axis=1)[annotations.image_index]
    # One pair for all images of a size: a large file has few sizes and very many objects.
    pairs = {(height, width): (height, width) for height, width in np.unique(size, axis=0).tolist()}
    numbers = annotations.annotation_id.tolist()
    wanted = {number: pairs[height, width] for number, (height, width) in zip(numbers, size.tolist(), strict=True)}
    found, length = array("q"), array("q")
    with (draft / "packed.npy").open("w+b") as file:
        _write_header(file, 0)
        for number, outline in read_outlines(path, wanted, categories):
            found.append(number)
            length.append(file.write(pack(outline)))
        file.seek(0)
        _write_header(file, sum(length))
    order = np.argsort(annotations.annotation_id)
    if not np.array_equal(np.sort(np.array(found, dtype=np.int64)), annotations.annotation_id[order]):
        raise AnnotationError(f"{path}: changed while it was read; run the same command again")
    # Rows in the order in which they were found.
    rows = order[np.argsort(np.argsort(np.array(found, dtype=np.int64)))]
    stop = np.zeros(len(rows), dtype=np.int64)
    stop[rows] = np.cumsum(np.array(length, dtype=np.int64))
    start = stop.copy()
    start[rows] -= np.array(length, dtype=np.int64)
    arrays: dict[str, NDArray[Any]] = {
        "start": start,
        "stop": stop,
        "image_size": size,
        "image_id": images.id[annotations.image_index],
    }
    for name, values in arrays.items():
        np.save(draft / f"{name}.npy", values, allow_pickle=False)
    return {}


def _write_header(file: BinaryIO, length: int) -> None:
    """Write the header of an array of `length` bytes; numpy leaves room to write a larger number over it."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)
