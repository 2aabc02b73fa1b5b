"""All annotations of a training file, sorted into base, novel and other ones.

Not read by the loader of training (`ezsd.data.annotations.load_training`), whose work an audit examines: which
annotations are base is worked out here once more, from the columns of the file.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ezsd.cache import file_digest
from ezsd.data.annotations import refusals
from ezsd.data.coco_json import Table, read_table
from ezsd.data.records import ImageTable, boxes_digest, clip_boxes
from ezsd.vocabulary import Split, canonical

BASE, NOVEL, OTHER = 0, 1, 2
"""Kinds of a class: with boxes, with a name alone, and outside of the split."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AnnotationFile:
    """M annotations of a file, sorted by image and then id; those without a sound image, class or box are absent."""

    path: Path
    sha256: str
    split: Split
    images: ImageTable
    names: tuple[str, ...]
    """Class names, spelt as in the split where it has them."""
    kind_of_name: NDArray[np.int8]
    """`BASE`, `NOVEL` or `OTHER` of each class."""
    image_index: NDArray[np.int64]
    """Position in `images`, (M,)."""
    annotation_id: NDArray[np.int64]
    """(M,)."""
    name_index: NDArray[np.int64]
    """Position in `names`, (M,)."""
    box: NDArray[np.float32]
    """xyxy, clipped to the image, pixels, (M, 4)."""
    left_out: NDArray[np.bool_]
    """True for what no training takes: crowd boxes, boxes without area and ones without a sound id, (M,)."""
    unread: int
    """Number of annotations without a sound image, class or box that are not known to be of another class."""

    @property
    def image_id(self) -> NDArray[np.int64]:
        """(M,)."""
        return self.images.id[self.image_index]

    @property
    def kind(self) -> NDArray[np.int8]:
        """`BASE`, `NOVEL` or `OTHER`, (M,)."""
        return self.kind_of_name[self.name_index]

    def rows(self, kind: int, image_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions of the annotations of a kind in some images, without those that no training takes."""
        return np.flatnonzero((self.kind == kind) & ~self.left_out & np.isin(self.image_id, image_ids))

    def base_digest(self, image_ids: NDArray[np.int64]) -> str:
        """Sha256 of the base boxes of some images, as manifests and runs have it."""
        rows = self.rows(BASE, image_ids)
        place = {name: position for position, name in enumerate(self.split.base)}
        class_index = np.array([place.get(name, -1) for name in self.names], np.int32)[self.name_index[rows]]
        return boxes_digest(
            self.split.base,
            image_id=self.image_id[rows],
            annotation_id=self.annotation_id[rows],
            class_index=class_index,
            box=self.box[rows],
            crowd=np.zeros(len(rows), np.bool_),
        )

    def counted(self, rows: NDArray[np.int64]) -> dict[str, int]:
        """Number of annotations by class name, most first."""
        return dict(Counter(self.names[index] for index in self.name_index[rows].tolist()).most_common())

    def file_name(self, image_id: int) -> str:
        """File name of an image; empty for an image that the file has not."""
        place = int(np.searchsorted(self.images.id, image_id))
        known = place < len(self.images) and int(self.images.id[place]) == image_id
        return self.images[place].file_name if known else ""


def read_annotation_file(path: Path, split: Split) -> AnnotationFile:
    """Read all annotations of a file.

    Raises:
        AnnotationError: the file cannot be read, or training could not take its images, classes and base annotations.
    """
    digest, table = file_digest(path).sha256, read_table(path)
    for fault in refusals(table, split.base):
        raise fault.error(path)
    images = ImageTable.build(table.images.id, table.images.file_name, table.images.width, table.images.height)
    names, kinds = _classes(table, split)
    columns = table.annotations
    image_id, category = np.array(columns.image_id, np.int64), np.array(columns.category_id, np.int64)
    sound = np.isin(image_id, images.id)
    # What is wrong with a novel annotation nobody but an evaluation has to know: a box without an id is one to find.
    for key in ("image_id", "category_id", "bbox"):
        sound &= table.sound("annotations", key)
    rows = np.flatnonzero(sound)
    ids = np.array(table.categories.id, np.int64)
    elsewhere = table.sound("annotations", "category_id") & np.isin(category, ids[kinds != NOVEL])
    image_index = np.searchsorted(images.id, image_id[rows])
    xywh = np.array(columns.xywh, np.float64).reshape(-1, 4)[rows]
    box, empty, _ = clip_boxes(xywh, images.width[image_index], images.height[image_index])
    annotation_id = np.array(columns.id, np.int64)[rows]
    without_id = ~table.sound("annotations", "id")[rows]
    by_id = np.argsort(ids)
    order = np.lexsort((annotation_id, image_index))
    return AnnotationFile(
        path=path,
        sha256=digest,
        split=split,
        images=images,
        names=names,
        kind_of_name=kinds,
        image_index=image_index[order],
        annotation_id=annotation_id[order],
        name_index=by_id[np.searchsorted(ids, category[rows], sorter=by_id)][order],
        box=box[order],
        left_out=(np.array(columns.crowd, np.bool_)[rows] | empty | without_id)[order],
        unread=int((~sound & ~elsewhere).sum()),
    )


def _classes(table: Table, split: Split) -> tuple[tuple[str, ...], NDArray[np.int8]]:
    """Names of a file's classes, and their kinds."""
    base, novel = ({canonical(name): name for name in names} for names in (split.base, split.novel))
    found = [canonical(name) for name in table.categories.name]
    kinds = [BASE if name in base else NOVEL if name in novel else OTHER for name in found]
    return tuple({**base, **novel}.get(name, name) for name in found), np.array(kinds, np.int8)
