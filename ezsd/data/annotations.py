"""COCO- and LVIS-format annotation files -> flat records; the door where novel boxes stay outside.

The records and their conventions are those of `ezsd.data.records`. Of annotations whose class is
not asked for, only `category_id` is looked at. `load_training` asks for base classes alone, so no
property of a novel box, not even a malformed one, can reach training.

Ids: an image's is a whole number from 0 on, a category's and an annotation's any of 64 bits; gaps
and order mean nothing. Boxes marked `iscrowd` are left out of training. Images without a box stay.
"""

import reprlib
from collections.abc import Sequence
from itertools import chain
from pathlib import Path, PureWindowsPath

import numpy as np

from ezsd.data.records import AnnotationError, Annotations, ImageRecord, ImageTable, RawAnnotations, refine
from ezsd.data.table import Fault, Table, annotation_faults, category_faults, image_faults, read_table
from ezsd.vocabulary import Split, suggest

__all__ = [
    "AnnotationError",
    "Annotations",
    "ImageRecord",
    "ImageTable",
    "RawAnnotations",
    "load_evaluation",
    "load_training",
    "read_raw",
    "resolve_image_path",
]


def load_training(path: Path, split: Split) -> Annotations:
    """Read the base boxes of a file; all that training and the store may ever see.

    Novel boxes and boxes of classes outside the split are skipped. Crowd boxes are dropped: they
    outline groups, not objects. All images stay, also those without a base box.

    Args:
        path: a COCO-format JSON file.
        split: which classes are base; its novel names need not be in the file.

    Returns:
        The record, with class indices into `split.base`.

    Raises:
        AnnotationError: see `read_raw`.
    """
    return refine(read_raw(path, split.base), keep_crowd=False)


def load_evaluation(path: Path, split: Split) -> Annotations:
    """Read base and novel boxes, for evaluation and pictures only: never for training or a store.

    Args:
        path: a COCO-format JSON file.
        split: the classes; all its names must be in the file's table.

    Returns:
        The record, with class indices into `split.names`; crowd boxes are kept and flagged.

    Raises:
        AnnotationError: see `read_raw`.
    """
    return refine(read_raw(path, split.names), keep_crowd=True)


def read_raw(path: Path, names: Sequence[str]) -> RawAnnotations:
    """Read and check the boxes of the given classes, and the table of all images.

    Args:
        path: a COCO-format JSON file.
        names: the classes, which become the record's table.

    Returns:
        The record, in the file's order and numbers.

    Raises:
        AnnotationError: the file cannot be read, is not UTF-8 JSON without a byte order mark, lacks
            a key, holds a value of the wrong kind, an id twice, a name twice or a reference to
            nothing, or does not know one of `names`.
    """
    table = read_table(path)
    for fault in chain(image_faults(table), category_faults(table), unknown_names(table, names)):
        raise fault.error(path)
    id_of = dict(zip(table.categories.name, table.categories.id, strict=True))
    classes = np.array([id_of[name] for name in names], dtype=np.int64)
    for fault in sorted(annotation_faults(table, classes), key=lambda fault: fault.position):
        raise fault.error(path)
    columns = table.annotations
    category = np.array(columns.category_id, dtype=np.int64)
    rows = np.flatnonzero(np.isin(category, classes))
    order = np.argsort(classes)
    return RawAnnotations(
        images=ImageTable.build(table.images.id, table.images.file_name, table.images.width, table.images.height),
        names=tuple(names),
        image_id=np.array(columns.image_id, dtype=np.int64)[rows],
        xywh=np.array(columns.xywh, dtype=np.float64).reshape(-1, 4)[rows],
        class_index=order[np.searchsorted(classes, category[rows], sorter=order)].astype(np.int32),
        annotation_id=np.array(columns.id, dtype=np.int64)[rows],
        crowd=np.array(columns.crowd, dtype=np.bool_)[rows],
    )


def unknown_names(table: Table, names: Sequence[str]) -> list[Fault]:
    """A fault for each name that the file's categories do not have."""
    offered = [name for name in table.categories.name if name]
    known = set(offered)
    return [
        Fault(
            section="categories",
            position=-1,
            key="",
            expected=f"an entry named {name!r}",
            found=f"no such name; {suggest(name, offered)}" if offered else "an empty list",
            cure="Correct the name in the file or in the split.",
        )
        for name in names
        if name not in known
    ]


def resolve_image_path(root: Path, file_name: str) -> Path:
    """Find an image named by a file below the image folder, and nowhere else.

    Args:
        root: the image folder; may itself be reached through links.
        file_name: a relative path with forward slashes, from an annotation file.

    Returns:
        The absolute path without links. Whether the file exists is for the reader to find out.

    Raises:
        AnnotationError: the name is empty, absolute, holds "..", a backslash or a NUL, or leads
            out of `root` through a symbolic link.
    """
    reason = _refusal(file_name)
    if reason is None:
        try:
            base, found = root.resolve(), (root / file_name).resolve()
        except (OSError, RuntimeError, ValueError) as error:
            # Link loops, names too long for the system, characters it cannot encode.
            reason = f"cannot be followed ({error})"
        else:
            if found != base and found.is_relative_to(base):
                return found
            reason = "leads out of the folder or to the folder itself"
    raise AnnotationError(
        f"image file name {reprlib.repr(file_name)} {reason}: expected a path below {root}. "
        "Correct file_name in the annotation file."
    )


def _refusal(file_name: str) -> str | None:
    """Say why a name is refused before the disk is asked; None if it is not."""
    if not file_name or "\0" in file_name:
        return "is empty or holds a NUL"
    if "\\" in file_name:
        return "holds a backslash"
    # A drive or a leading slash would make the joined path forget the root.
    if file_name.startswith("/") or PureWindowsPath(file_name).drive:
        return "is absolute"
    return "holds '..'" if ".." in file_name.split("/") else None
