"""`ezsd data voc`: an edition of Pascal VOC as a COCO-format folder with the splits of `VOC_SPLITS`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

from ezsd.data.coco_document import LabelledImage
from ezsd.data.pascal_voc import VOC_CLASSES, VOC_SPLITS
from ezsd.pipeline.data.coco_folder import Conversion, write_coco_folder
from ezsd.pipeline.data.findings import Findings
from ezsd.pipeline.data.label_readers import read_part, read_voc_labels
from ezsd.pipeline.data.labelled_folder import ImageSet, Pair, Part, image_sets
from ezsd.pipeline.errors import DatasetError
from ezsd.pipeline.files import require_new_folder

Year = Literal["2007", "2012"]
"""Editions of VOC."""

_SETS: Mapping[Year, tuple[tuple[str, str], ...]] = {
    # The annotations of 2012's test images were never published.
    "2007": (("trainval", "test"), ("train", "val")),
    "2012": (("train", "val"),),
}
"""Lists for training and validation by edition; the first two that are both there are taken."""


def convert_voc(root: Path, year: Year, out: Path, *, copy: bool = False) -> Conversion:
    """Write an edition of Pascal VOC as a COCO-format folder.

    2007: trainval to train on and test as validation; train and val where test is not there. 2012: train and val. The
    id of an image is the digits of its name, classes have COCO's names, and difficult objects are crowds.

    Args:
        root: VOCdevkit, or the folder of the edition in it.
        year: the edition.
        out: the folder to make; it appears when it is whole.
        copy: True copies the images, False links to their folder.

    Raises:
        ArgumentError: `out` holds something.
        DatasetError: the edition is not there, or a file of it is refused.
    """
    require_new_folder(out)
    folder = _edition(root, year)
    listed = image_sets(folder, _SETS[year])
    if not listed:
        wanted = " or ".join(f"{train}.txt and {val}.txt" for train, val in _SETS[year])
        raise DatasetError(f"{folder / 'ImageSets/Main'}: expected the lists {wanted}")
    findings, parts = Findings(), list[Part]()
    reader = partial(read_voc_labels, "inclusive", VOC_CLASSES)
    read: dict[str, list[LabelledImage]] = {}
    for name, found in listed.items():
        part = Part(name=name, images=folder / "JPEGImages", labels=folder / "Annotations", listed=found)
        pairs = [Pair(f"{stem}.jpg", part.labels / f"{stem}.xml") for stem in found.stems]
        read[name] = read_part(part, pairs, _ids(found), reader, findings, copied=copy)
        parts.append(part)
    findings.require_sound()
    sources = [f"{name}: {found.path}" for name, found in listed.items()]
    names = tuple(VOC_CLASSES.values())
    return write_coco_folder(out, parts, read, names, VOC_SPLITS, sources=sources, findings=findings, copy=copy)


def _edition(root: Path, year: Year) -> Path:
    """The folder of an edition."""
    inside = root / f"VOC{year}"
    if inside.is_dir():
        return inside
    other = re.fullmatch(r"VOC\d{4}", root.resolve().name)
    if (root / "Annotations").is_dir() and (other is None or other[0] == inside.name):
        return root
    if not root.is_dir():
        raise DatasetError(f"`root={root}`: expected VOCdevkit with a folder {inside.name} in it, found no such folder")
    there = sorted(place.name for place in root.glob("VOC*"))
    found = f"found {', '.join(there)}" if there else "found no edition of VOC"
    raise DatasetError(f"`root={root}`: expected VOCdevkit with a folder {inside.name} in it, {found}")


def _ids(listed: ImageSet) -> list[int]:
    """Image ids: the digits of the names, so that 2008_000032 is 2008000032."""
    ids: dict[int, str] = {}
    for stem in listed.stems:
        if not re.fullmatch(r"(\d{4}_)?\d{6}", stem):
            raise DatasetError(f"{listed.path}: expected names such as 000005 or 2008_000032, found {stem!r}")
        ids[int(stem.replace("_", ""))] = stem
    return list(ids)
