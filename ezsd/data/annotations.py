"""COCO- and LVIS-format annotation files -> flat records; the door where novel boxes stay outside.

The records and their conventions are those of `ezsd.data.records`. Of annotations whose class is
not asked for, only `category_id` is looked at. `load_training` asks for base classes alone, so no
property of a novel box, not even a malformed one, can reach training.

Ids: an image's is a whole number from 0 on, a category's and an annotation's any of 64 bits; gaps
and order mean nothing. Boxes marked `iscrowd` are left out of training. Images without a box stay.
"""

import reprlib
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PureWindowsPath

import numpy as np

from ezsd.data.coco_json import (
    Fault,
    Table,
    annotation_faults,
    category_faults,
    image_faults,
    read_table,
)
from ezsd.data.records import Annotations, ImageRecord, ImageTable, RawAnnotations, refine
from ezsd.errors import AnnotationError
from ezsd.vocabulary import Split, canonical, suggest

__all__ = [
    "AnnotationError",
    "Annotations",
    "ImageRecord",
    "ImageTable",
    "RawAnnotations",
    "load_evaluation",
    "load_training",
    "raw_annotations",
    "read_raw",
    "refusals",
    "require_image_name",
    "resolve_image_path",
]


def load_training(path: Path, split: Split) -> Annotations:
    """Read the base boxes of a file; all that training and the store may ever see.

    Novel boxes and boxes of classes outside the split are skipped. Crowd boxes are dropped: they
    outline groups, not objects. All images stay, also those without a base box.

    Args:
        path: a COCO-format JSON file.
        split: which classes are base; its novel classes need not be in the file.

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
        split: the classes. A novel class that the file's table lacks has no box; a base class must be there.

    Returns:
        The record, with class indices into `split.names`; crowd boxes are kept and flagged.

    Raises:
        AnnotationError: see `read_raw`.
    """
    return refine(read_raw(path, split.names, may_lack=split.novel), keep_crowd=True)


def read_raw(path: Path, names: Sequence[str], *, may_lack: Sequence[str] = ()) -> RawAnnotations:
    """Read and check the boxes of the given classes, and the table of all images.

    Args:
        path: a COCO-format JSON file.
        names: the classes, which become the record's table.
        may_lack: those of them that the file need not know; they have no box then.

    Returns:
        The record, in the file's order and numbers.

    Raises:
        AnnotationError: the file cannot be read, is not UTF-8 JSON without a byte order mark, lacks
            a key, holds a value of the wrong kind, an id twice, a name twice or a reference to
            nothing, or does not know one of `names` that it must.
    """
    return raw_annotations(read_table(path), names, may_lack=may_lack)


def raw_annotations(table: Table, names: Sequence[str], *, may_lack: Sequence[str] = ()) -> RawAnnotations:
    """Read the boxes of the named classes from a file that was read into columns; see `read_raw`."""
    for fault in refusals(table, names, may_lack=may_lack):
        raise fault.error(table.path)
    id_of = category_ids(table, names)
    classes = np.array(list(id_of.values()), dtype=np.int64)
    place = np.array([position for position, name in enumerate(names) if name in id_of], dtype=np.int64)
    columns = table.annotations
    category = np.array(columns.category_id, dtype=np.int64)
    rows = np.flatnonzero(np.isin(category, classes))
    order = np.argsort(classes)
    xywh = np.array(columns.xywh, dtype=np.float64).reshape(-1, 4)[rows]
    stated = np.array(columns.area, dtype=np.float64)[rows]
    # Boxes of absurd sides have an infinite area.
    with np.errstate(over="ignore"):
        area = np.where(np.isnan(stated), xywh[:, 2] * xywh[:, 3], stated)
    return RawAnnotations(
        images=ImageTable.build(table.images.id, table.images.file_name, table.images.width, table.images.height),
        names=tuple(names),
        image_id=np.array(columns.image_id, dtype=np.int64)[rows],
        xywh=xywh,
        area=area,
        class_index=place[order[np.searchsorted(classes, category[rows], sorter=order)]].astype(np.int32),
        annotation_id=np.array(columns.id, dtype=np.int64)[rows],
        crowd=np.array(columns.crowd, dtype=np.bool_)[rows],
        absent=absent_names(names, table.categories.name),
    )


def refusals(table: Table, names: Sequence[str], *, may_lack: Sequence[str] = ()) -> Iterator[Fault]:
    """Everything for which a loader of the boxes of some classes refuses a file; see `read_raw`."""
    yield from image_faults(table)
    yield from category_faults(table)
    free = {canonical(name) for name in may_lack}
    yield from unknown_names(table, [name for name in names if canonical(name) not in free])
    classes = np.array(list(category_ids(table, names).values()), dtype=np.int64)
    yield from sorted(annotation_faults(table, classes), key=lambda fault: fault.position)


def category_ids(table: Table, names: Sequence[str]) -> dict[str, int]:
    """The file's category id of each name that it knows."""
    id_of = {canonical(name): number for name, number in zip(table.categories.name, table.categories.id, strict=True)}
    return {name: id_of[canonical(name)] for name in names if canonical(name) in id_of}


def absent_names(names: Sequence[str], offered: Iterable[str]) -> tuple[str, ...]:
    """Find the names that are not among a file's categories."""
    known = {canonical(name) for name in offered}
    return tuple(name for name in names if canonical(name) not in known)


def unknown_names(table: Table, names: Sequence[str]) -> list[Fault]:
    """A fault for each name that the file's categories do not have."""
    offered = [name for name in table.categories.name if name]
    return [
        Fault(
            section="categories",
            position=-1,
            key="",
            expected=f"an entry named {name!r}",
            found=f"no such name; {suggest(name, offered)}" if offered else "an empty list",
            cure="Correct the name in the file or in the split.",
        )
        for name in absent_names(names, offered)
    ]


def resolve_image_path(root: Path, file_name: str) -> Path:
    """Find an image named by a file below the image folder, and nowhere else.

    Where no file has the name as it stands, one that has it in another Unicode form (NFC, NFD) is taken.

    Args:
        root: the image folder; may itself be reached through links.
        file_name: a relative path with forward slashes, from an annotation file.

    Returns:
        The absolute path without links. Whether the file exists is for the reader to find out.

    Raises:
        AnnotationError: the name is empty, absolute, holds "..", a backslash or a NUL, or leads
            out of `root` through a symbolic link.
    """
    require_image_name(root, file_name)
    try:
        base, found = root.resolve(), _in_a_form_that_is_there(root, file_name).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        # Link loops, names too long for the system, characters it cannot encode.
        raise _wrong_name(root, file_name, f"cannot be followed ({error})") from error
    if found != base and found.is_relative_to(base):
        return found
    raise _wrong_name(root, file_name, "leads out of the folder or to the folder itself")


def require_image_name(root: Path, file_name: str) -> None:
    """Refuse a name that is not a path below an image folder, whatever is there; see `resolve_image_path`."""
    reason = _refusal(file_name)
    if reason is not None:
        raise _wrong_name(root, file_name, reason)


def _wrong_name(root: Path, file_name: str, reason: str) -> AnnotationError:
    return AnnotationError(
        f"image file name {reprlib.repr(file_name)} {reason}: expected a path below {root}. "
        "Correct file_name in the annotation file."
    )


def _in_a_form_that_is_there(root: Path, file_name: str) -> Path:
    """A path with the name in the Unicode form in which a file has it; as it stands where there is none."""
    path = root / file_name
    if file_name.isascii() or path.exists():
        return path
    others = (root / unicodedata.normalize(form, file_name) for form in ("NFC", "NFD"))
    return next((other for other in others if other.exists()), path)


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
