"""`ezsd data convert`: a folder of images with Pascal-VOC or YOLO labels as a COCO-format folder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ezsd.data.coco_document import LabelledImage
from ezsd.data.pascal_voc import Corners
from ezsd.errors import quantity
from ezsd.pipeline.data.coco_folder import Conversion, write_coco_folder
from ezsd.pipeline.data.datasets import dataset_name
from ezsd.pipeline.data.findings import Findings
from ezsd.pipeline.data.label_readers import LabelReader, read_part, read_voc_labels, read_yolo_labels
from ezsd.pipeline.data.labelled_folder import (
    LabelFormat,
    Part,
    find_format,
    find_parts,
    note_unread,
    voc_pairs,
    yolo_pairs,
)
from ezsd.pipeline.data.split import named_split
from ezsd.pipeline.data.yolo_names import find_names, read_names
from ezsd.pipeline.errors import ArgumentError, DatasetError
from ezsd.pipeline.files import require_new_folder


def convert_folder(
    root: Path,
    out: Path,
    *,
    format: LabelFormat | None = None,
    corners: Corners = "inclusive",
    names: Path | None = None,
    base: Sequence[str] | None = None,
    novel: Sequence[str] | None = None,
    copy: bool = False,
) -> Conversion:
    """Write a folder of images with label files as a COCO-format folder, with a dataset's TOML file.

    Images are numbered from 1 in the order of the parts and, within a part, of their file names.

    Args:
        root: the folder; docs/datasets.md shows the layouts.
        out: the folder to make; it appears when it is whole. The dataset has its name.
        format: of the label files; None finds it.
        corners: meaning of the corners in XML.
        names: file with the names of YOLO's classes; None looks for one.
        base: base classes; alone, all others are novel.
        novel: novel classes; alone, all others are base. Without both, all are base.
        copy: True copies the images, False links to their folders.

    Raises:
        ArgumentError: `out` holds something, or is below `root`.
        DatasetError: images, labels or names are missing, or a file is refused.
        AnnotationError: the file with the names is not in order.
        VocabularyError: the names do not make a split.
    """
    require_new_folder(out)
    if out.resolve().is_relative_to(root.resolve()):
        # The next conversion would find its images.
        raise ArgumentError(f"`out={out}`: is below {root}, which is read; choose a folder outside of it")
    findings, parts = Findings(), find_parts(root, format)
    note_unread(parts, root, findings)
    table: tuple[str, ...] = ()
    sources = [f"{part.name}: {part.listed.path}" for part in parts if part.listed is not None]
    reader: LabelReader = partial(read_voc_labels, corners, None)
    pairing = voc_pairs
    if (format or find_format(root, parts)) == "yolo":
        listed = find_names(root, parts) if names is None else names
        table = read_names(listed)
        sources, reader, pairing = [*sources, f"names: {listed}"], partial(read_yolo_labels, table), yolo_pairs
    read: dict[str, list[LabelledImage]] = {}
    seen = 0
    for part in parts:
        pairs = pairing(part, findings)
        read[part.name] = read_part(part, pairs, range(seen + 1, seen + len(pairs) + 1), reader, findings, copied=copy)
        seen += len(pairs)
    findings.require_sound()
    if not read["train"]:
        raise _without_pairs(root, parts[0], ".txt" if pairing is yolo_pairs else ".xml")
    trained = {box.name for image in read["train"] for box in image.boxes if not box.crowd}
    _require_boxes(parts[0], len(read["train"]), trained, "box")
    table = table or tuple(sorted({box.name for images in read.values() for image in images for box in image.boxes}))
    split = named_split(table, where=root, base=base, novel=novel)
    _require_boxes(parts[0], len(read["train"]), trained & set(split.base), "box of a base class")
    for name in split.base:
        if name not in trained:
            findings.note("base classes without a training box", repr(name))
    splits = {dataset_name(out.absolute().name): split}
    return write_coco_folder(out, parts, read, table, splits, sources=sources, findings=findings, copy=copy)


def _without_pairs(root: Path, part: Part, ending: str) -> DatasetError:
    """Error about a part in which no label file has an image; names the folder that was meant, if it can be told."""
    inside = next((place for place in sorted(root.iterdir()) if (place / "JPEGImages").is_dir()), None)
    meant = f"did you mean {inside}?" if inside else "give the folder that images and labels are both in"
    return DatasetError(f"{part.labels}: no {ending} file in it has an image of its name in {part.images}; {meant}")


def _require_boxes(part: Part, images: int, classes: set[str], kind: str) -> None:
    """DatasetError without a class that has a box to train on."""
    if not classes:
        raise DatasetError(
            f"{part.labels}: {quantity(images, 'image')} with labels, and not one {kind} in them to train on"
        )
