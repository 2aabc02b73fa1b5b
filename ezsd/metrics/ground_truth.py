"""Ground truth of an evaluation: the boxes of an annotation file and, for a federated file, its unchecked classes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ezsd.data.annotations import RawAnnotations, raw_annotations
from ezsd.data.catalogue import Catalogue
from ezsd.data.coco_json import Table, read_table
from ezsd.data.masks import early_outline, late_outline, to_run_lengths
from ezsd.data.records import ImageTable
from ezsd.errors import AnnotationError
from ezsd.metrics.named import Named
from ezsd.vocabulary import Split


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Truth:
    """Boxes of the classes of a split as a file states them, N in all, and the rules that go with the file."""

    path: Path
    split: Split
    image_ids: npt.NDArray[np.int64]
    """All images of the file, ascending."""
    image_id: npt.NDArray[np.int64]
    """(N,), each one in `image_ids`."""
    class_index: npt.NDArray[np.int64]
    """Position in `split.names`, (N,)."""
    xywh: npt.NDArray[np.float64]
    """Left, top, width, height in pixels, (N, 4)."""
    area: npt.NDArray[np.float64]
    """Area of the object as the file states it, else of its box, pixels, (N,)."""
    crowd: npt.NDArray[np.bool_]
    """True where any number of detections may match the box, (N,); never true in a federated file."""
    ignore: npt.NDArray[np.bool_]
    """True where the box counts neither as found nor as missed, (N,)."""
    annotation_id: npt.NDArray[np.int64]
    """(N,), unique."""
    catalogue: Catalogue
    """Category ids and, of a federated file, its lists."""
    image_size: npt.NDArray[np.int64]
    """Height and width of each image, pixels, (I, 2)."""
    images: ImageTable
    """All images of the file, in the order of `image_ids`."""
    masks: tuple[bytes, ...] | None = None
    """Run lengths of each box's object; None until `with_masks` has read them."""

    @property
    def federated(self) -> bool:
        """True if LVIS's rules apply instead of COCO's."""
        return self.catalogue.federated is not None

    def sizes(self) -> dict[int, tuple[int, int]]:
        """Height and width of each image by its id."""
        pairs = zip(self.image_ids.tolist(), self.image_size.tolist(), strict=True)
        return {number: (height, width) for number, (height, width) in pairs}

    def category_ids(self) -> list[int]:
        """A category id for each name of the split, (C,), see `Catalogue.ids_of`."""
        return self.catalogue.ids_of(self.split.names)

    def category_positions(self) -> dict[int, int]:
        """Position in `split.names` of each category id of the file; -1 outside the split."""
        asked = {number: index for index, number in enumerate(self.category_ids())}
        return dict.fromkeys(self.catalogue.ids.values(), -1) | asked

    def named(self) -> Named:
        """Ids and names of the file's images and classes."""
        return Named(file_names={one.id: one.file_name for one in self.images}, categories=self.catalogue.ids)


def read_truth(path: Path, split: Split, *, masks: bool = False) -> Truth:
    """Read what an evaluation needs of an annotation file, in one pass.

    Args:
        path: a COCO- or LVIS-format file that knows all base names of the split; a novel name that it lacks has no
            box, and its figures are None.
        split: the classes.
        masks: whether the objects' masks are needed too.

    Raises:
        MissingOutline: masks are needed, and an object of a class of the split has no segmentation.
        AnnotationError: the file is not in order, or has no image.
    """
    table = read_truth_table(path, masks=masks)
    truth = truth_of(table, split)
    return with_masks(truth, table) if masks else truth


def read_truth_table(path: Path, *, masks: bool) -> Table:
    """Read the columns that `truth_of` needs and, for masks, `with_masks`. AnnotationError, see `read_table`."""
    return read_table(path, catalogue=True, segmentation=early_outline if masks else None)


def truth_of(table: Table, split: Split, raw: RawAnnotations | None = None) -> Truth:
    """Make the ground truth of an evaluation from a file that was read into columns, with its catalogue.

    A file whose images have `neg_category_ids` is a federated one, as LVIS's are; its `iscrowd` then has no meaning,
    and boxes without area are left out, as in the official lvis package.

    Args:
        table: see `read_truth_table`.
        split: see `read_truth`.
        raw: the boxes of the split, where they were taken from the table before.

    Raises:
        AnnotationError: see `read_truth`.
    """
    path = table.path
    raw = raw_annotations(table, split.names, may_lack=split.novel) if raw is None else raw
    catalogue = table.catalogue()
    if not len(raw.images):
        raise AnnotationError(f"{path}: images: expected at least one image to evaluate, found none")
    crowd, ignore, kept = raw.crowd, raw.crowd, np.ones(len(raw.crowd), dtype=np.bool_)
    if catalogue.federated is not None:
        crowd = np.zeros_like(crowd)
        ignore = np.isin(raw.annotation_id, sorted(catalogue.federated.ignored))
        kept = ~np.isin(raw.annotation_id, sorted(catalogue.federated.empty))
    return Truth(
        path=path,
        split=split,
        image_ids=raw.images.id,
        image_id=raw.image_id[kept],
        class_index=raw.class_index[kept].astype(np.int64),
        xywh=raw.xywh[kept],
        area=raw.area[kept],
        crowd=crowd[kept],
        ignore=ignore[kept],
        annotation_id=raw.annotation_id[kept],
        catalogue=catalogue,
        image_size=np.stack([raw.images.height, raw.images.width], axis=1).astype(np.int64),
        images=raw.images,
    )


def with_masks(truth: Truth, table: Table) -> Truth:
    """Add the objects' masks to ground truth, from the columns it was made of, which must have the segmentations.

    Raises:
        MissingOutline: an object of a class of the split has no segmentation.
        AnnotationError: it has one that is not in order.
    """
    size, ids = truth.sizes(), truth.annotation_id.tolist()
    wanted = {number: size[image] for number, image in zip(ids, truth.image_id.tolist(), strict=True)}
    categories, columns, drawn = set(truth.category_ids()), table.annotations, dict[int, bytes]()
    pairs = zip(columns.id, columns.category_id, columns.segmentation, strict=True)
    for position, (number, category, kept) in enumerate(pairs):
        # An annotation of a class outside the split may have the id of one within.
        if number in wanted and category in categories:
            outline = late_outline(table.path, position, kept, *wanted[number])
            drawn[number] = to_run_lengths(outline, *wanted[number])
    return dataclasses.replace(truth, masks=tuple(drawn[number] for number in ids))
