"""Folders of images with a label file each: their layout, and which label file belongs to which image."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from ezsd.data.label_file import FILE_CURE
from ezsd.data.pascal_voc import read_voc
from ezsd.data.records import unfit
from ezsd.errors import AnnotationError, quantity
from ezsd.pipeline.data.findings import Findings
from ezsd.pipeline.data.images import image_endings
from ezsd.pipeline.errors import DatasetError

LabelFormat = Literal["voc", "yolo"]
"""Pascal VOC's XML or YOLO's text files."""
PARTS = ("train", "val", "test")
IMAGE_SETS: tuple[tuple[str, ...], ...] = (("train", "val"), ("trainval", "test"), ("trainval",), ("train",))
"""Lists in ImageSets/Main that make a training and a validation part, the first that are there."""

_IMAGES = ("images", "JPEGImages")
_LABELS = ("labels", "Annotations", "annotations")
_ENDINGS: dict[LabelFormat | None, tuple[str, ...]] = {"voc": (".xml",), "yolo": (".txt",), None: (".xml", ".txt")}
_PART = re.compile(r"(train|val|test)(?:id|idation)?(?:\d{4})?", re.IGNORECASE)
_NO_LABELS = ("classes.txt",)
"""Text files among labels that are none."""


@dataclass(frozen=True, slots=True)
class ImageSet:
    """A list of images."""

    path: Path
    stems: tuple[str, ...]
    """Names of the images without their endings, all different."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of a dataset: where its images and label files are."""

    name: str
    """One of `PARTS`."""
    images: Path
    labels: Path
    listed: ImageSet | None = None
    """The list of its images; None for all of the folder."""


@dataclass(frozen=True, slots=True)
class Pair:
    """An image and its label file."""

    file_name: str
    """Path of the image below `Part.images`, with forward slashes."""
    labels: Path | None
    """None for an image without one."""


def find_parts(root: Path, format: LabelFormat | None) -> list[Part]:
    """The parts of a folder, in the order of `PARTS`; docs/datasets.md shows the layouts.

    Args:
        root: the folder.
        format: of the label files; None for one that is not known yet.

    Raises:
        DatasetError: there is no such folder, two folders for one part, none for training, or label files in two.
    """
    if not root.is_dir():
        raise DatasetError(f"{root}: no such folder")
    images, labels = _places(root, format)
    by_name = _named(images)
    listed = image_sets(root, IMAGE_SETS)
    if listed:
        parts = [Part(name=name, images=images, labels=labels, listed=found) for name, found in listed.items()]
    elif by_name and images == root:
        places = {name: _places(folder, format) for name, folder in by_name.items()}
        parts = [Part(name=name, images=place[0], labels=place[1]) for name, place in places.items()]
    elif by_name:
        parts = [Part(name=name, images=one, labels=_twin(labels, name, one)) for name, one in by_name.items()]
    else:
        parts = [Part(name="train", images=images, labels=labels)]
    if parts[0].name != "train":
        raise DatasetError(f"{root}: has a folder {parts[0].name}, expected one named train beside it")
    return parts


def note_unread(parts: Sequence[Part], root: Path, findings: Findings) -> None:
    """Count the images beside the folders of the parts, which nobody reads; images that a list leaves out are not."""
    if any(part.listed is not None for part in parts):
        return
    images = next((root / name for name in _IMAGES if (root / name).is_dir()), root)
    for name in image_names(images):
        if not any((images / name).is_relative_to(part.images) for part in parts):
            findings.note("images outside of the folders of the parts, left out", images / name)


def _places(folder: Path, format: LabelFormat | None) -> tuple[Path, Path]:
    """Folders of images and of labels; the folder itself where it has none for them."""
    # By the names as they are written: where upper and lower case are the same, two of them are one folder.
    there = {place.name for place in folder.iterdir() if place.is_dir()}
    images, labels = ([folder / name for name in names if name in there] for names in (_IMAGES, _LABELS))
    used = [place for place in labels if any(_files(place, _ENDINGS[format]))]
    if len(used) > 1:
        both = f"{folder}: {used[0].name} and {used[1].name} both have label files"
        if format is None:
            raise DatasetError(f"{both}; say which kind to read: `format=voc` or yolo")
        raise DatasetError(f"{both}, expected one folder of them")
    return next(iter(images), folder), next(iter(used or labels), folder)


def _twin(labels: Path, name: str, images: Path) -> Path:
    """The folder of a part's labels: named as that of its images, else after the part."""
    same = labels / images.name
    return same if same.is_dir() or not labels.is_dir() else _named(labels).get(name, same)


def _named(folder: Path) -> dict[str, Path]:
    """Folders below a folder that are named after a part, by part."""
    found: dict[str, Path] = {}
    for place in sorted(folder.iterdir()):
        matched = _PART.fullmatch(place.name)
        if matched and place.is_dir():
            part = matched[1].lower()
            other = found.setdefault(part, place)
            if other != place:
                raise DatasetError(f"{folder}: has {other.name} and {place.name}, expected one folder for {part}")
    return {name: found[name] for name in PARTS if name in found}


def image_sets(folder: Path, choices: Sequence[Sequence[str]]) -> dict[str, ImageSet]:
    """Images by part, from the lists in ImageSets/Main; empty where none of the choices is there.

    Args:
        folder: of the layout of VOC.
        choices: names of lists for training and validation; the first choice whose lists all exist is taken.

    Raises:
        DatasetError: a list is not as it must be, or an image is in both.
    """
    place = folder / "ImageSets/Main"
    chosen = next((names for names in choices if all((place / f"{name}.txt").is_file() for name in names)), ())
    listed = {part: _read_list(place / f"{name}.txt") for part, name in zip(PARTS, chosen, strict=False)}
    if len(listed) == 2:
        both = set(listed["train"].stems) & set(listed["val"].stems)
        if both:
            doubled = quantity(len(both), "image is", "images are")
            raise DatasetError(f"{listed['val'].path}: {min(both)!r} is in {chosen[0]}.txt too ({doubled} in both)")
    return listed


def _read_list(path: Path) -> ImageSet:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: is not UTF-8 text: {error}") from error
    first: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        name = line.strip()
        if "/" in name or "\\" in name or "\0" in name or name in (".", ".."):
            expected = "the name of an image without its ending"
            raise DatasetError(f"{path}: line {number}: expected {expected}, found {name!r}")
        if name and first.setdefault(name, number) != number:
            raise DatasetError(f"{path}: line {number}: {name!r} stands in line {first[name]} too")
    if not first:
        raise DatasetError(f"{path}: names no image")
    return ImageSet(path, tuple(first))


def find_format(root: Path, parts: Sequence[Part]) -> LabelFormat:
    """The format of the label files of a folder. DatasetError for none, and for both."""
    voc = any(True for part in parts for _ in _files(part.labels, (".xml",)))
    yolo = any(_label_of(part, name).is_file() for part in parts for name in image_names(part.images))
    if voc and yolo:
        raise DatasetError(f"{root}: has labels of both kinds, .xml and .txt; say which to read: `format=voc` or yolo")
    if not voc and not yolo:
        places = ", ".join(str(part.labels) for part in parts)
        raise DatasetError(f"{root}: no label file: expected .xml, or .txt named as the images of {places}")
    return "voc" if voc else "yolo"


def image_names(folder: Path) -> list[str]:
    """Images below a folder, by name, as paths with forward slashes."""
    return list(_files(folder, image_endings()))


def _files(folder: Path, endings: tuple[str, ...]) -> Iterator[str]:
    """Files below a folder with one of some endings, in lower or upper case; hidden ones are left out."""
    found: list[str] = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(place).relative_to(folder)
        found += [
            (below / name).as_posix()
            for name in files
            if name.lower().endswith(endings) and not name.startswith(".") and name not in _NO_LABELS
        ]
    return iter(sorted(found))


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()


def _label_of(part: Part, name: str) -> Path:
    return part.labels / f"{_stem(name)}.txt"


def _by_stem(part: Part) -> dict[str, str]:
    """The images of a part by name without ending."""
    found: dict[str, str] = {}
    for name in image_names(part.images):
        other = found.setdefault(_stem(name), name)
        if other != name:
            raise DatasetError(f"{part.images}: {other} and {name} differ in their ending alone; rename one of them")
    return found


def yolo_pairs(part: Part, findings: Findings) -> list[Pair]:
    """Every image of a part with its text file, by name of the image.

    Raises:
        DatasetError: two images differ in their ending alone.
    """
    images = _by_stem(part)
    if part.listed is not None:
        for stem in part.listed.stems:
            if stem not in images:
                findings.refuse(
                    DatasetError(f"{part.listed.path}: names {stem!r}, and {part.images} has no such image")
                )
        images = {stem: images[stem] for stem in part.listed.stems if stem in images}
    pairs = []
    for name in sorted(images.values()):
        labels = _label_of(part, name)
        if not labels.is_file():
            findings.note("images without a label file, taken as background", part.images / name)
        pairs.append(Pair(name, labels if labels.is_file() else None))
    for label in _files(part.labels, (".txt",)):
        if part.listed is None and _stem(label) not in images:
            findings.note("label files without an image, left out", part.labels / label)
    return pairs


def voc_pairs(part: Part, findings: Findings) -> list[Pair]:
    """Every XML file of a part with its image, by name of the image.

    The image has the name of the XML file, else the one that stands in it.

    Raises:
        DatasetError: two images differ in their ending alone.
    """
    images = _by_stem(part)
    listed = None if part.listed is None else [f"{stem}.xml" for stem in part.listed.stems]
    labels = list(_files(part.labels, (".xml",))) if listed is None else listed
    taken: dict[str, Path] = {}
    for label in labels:
        path = part.labels / label
        try:
            name = images.get(_stem(label)) or _named_inside(path, part)
        except AnnotationError as error:
            findings.refuse(error)
            continue
        if name is None:
            findings.note("label files without an image, left out", path)
        elif taken.setdefault(name, path) != path:
            findings.refuse(DatasetError(f"{path}: its image {name} is that of {taken[name]} too; remove one of them"))
    for name in images.values():
        if part.listed is None and name not in taken:
            findings.note("images without a label file, left out", part.images / name)
    return [Pair(name, taken[name]) for name in sorted(taken)]


def _named_inside(path: Path, part: Part) -> str | None:
    """The image that an XML file names, in the folder in which it would be by its own name; None if it is not there."""
    name = read_voc(path).file_name.replace("\\", "/").rpartition("/")[2]
    below = path.parent.relative_to(part.labels)
    try:
        found = bool(name) and (part.images / below / name).is_file()
    except OSError as error:
        what = f"{reprlib.repr(name)} ({error.strerror})"
        raise unfit(path, "filename", "the name of an image", what, FILE_CURE) from error
    return (below / name).as_posix() if found else None
