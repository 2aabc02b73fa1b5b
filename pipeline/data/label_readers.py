"""Images of a part with the boxes of their label files, checked against the images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeAlias

from ezsd.data.coco_document import LabelledBox, LabelledImage
from ezsd.data.pascal_voc import Corners, read_voc
from ezsd.data.records import unfit
from ezsd.data.yolo import read_yolo
from ezsd.errors import AnnotationError
from ezsd.pipeline.data.findings import Findings
from ezsd.pipeline.data.images import Reading, look
from ezsd.pipeline.data.labelled_folder import Pair, Part
from ezsd.pipeline.errors import ImageError
from ezsd.pipeline.progress import Progress
from ezsd.vocabulary import suggest

# Reading is waiting, mostly for a disk or a network.
_READERS = 8
_REACH = 0.5
"""Pixels by which a box may end outside its image unnoticed: less than half a pixel is rounding."""
_TURNED = "images turned by EXIF whose label files have no size, which would say if boxes are of the turned image"
_BELOW_ONE = "corners below 1, where VOC counts pixels from 1"
_EDGES = ": if your tool wrote distances from the edges, take `corners=edges`"


@dataclass(frozen=True, slots=True)
class Labels:
    """Boxes of an image."""

    size: tuple[int, int]
    """Width and height of the image, pixels."""
    boxes: list[LabelledBox] = field(default_factory=list)
    oddities: list[tuple[str, str]] = field(default_factory=list)
    """Remarks on what is accepted but worth counting, each with its place."""

    def add(self, box: LabelledBox, place: str) -> None:
        """Take in a box as it is, if something of it lies within the image."""
        x, y, w, h = box.xywh
        width, height = self.size
        if w <= 0 or h <= 0:
            self.oddities.append(("boxes without an area, left out", place))
        elif x >= width or y >= height or x + w <= 0 or y + h <= 0:
            self.oddities.append(("boxes outside their image, left out", place))
        else:
            if min(x, y) < -_REACH or x + w > width + _REACH or y + h > height + _REACH:
                self.oddities.append(("boxes that reach beyond their image, which will clip them", place))
            self.boxes.append(box)


LabelReader: TypeAlias = Callable[[Path, Path | None], Labels]
"""Reads the start of an image, and its label file, which may be missing."""


def read_part(
    part: Part, pairs: Sequence[Pair], ids: Iterable[int], reader: LabelReader, findings: Findings, *, copied: bool
) -> list[LabelledImage]:
    """Read the labels and the start of the image of each pair; those that are refused are left out.

    Unless the images will be copied, links to images elsewhere are refused, which no reader of datasets follows.
    """
    images: list[LabelledImage] = []
    read = partial(_read, part.images, reader, copied)
    with ThreadPoolExecutor(_READERS) as pool, Progress(f"read {part.name}", len(pairs), unit="image") as progress:
        try:
            for number, pair, found in zip(ids, pairs, pool.map(read, pairs), strict=True):
                if isinstance(found, Labels):
                    width, height = found.size
                    images.append(
                        LabelledImage(
                            id=number, file_name=pair.file_name, width=width, height=height, boxes=found.boxes
                        )
                    )
                    for oddity, place in found.oddities:
                        findings.note(oddity, place)
                else:
                    findings.refuse(found)
                progress.advance()
        except BaseException:
            # Leaving the pool would wait until all are read.
            pool.shutdown(cancel_futures=True)
            raise
    return images


def _read(folder: Path, reader: LabelReader, copied: bool, pair: Pair) -> Labels | AnnotationError | ImageError:
    image = folder / pair.file_name
    try:
        if not copied:
            _require_inside(image, folder)
        return reader(image, pair.labels)
    except (AnnotationError, ImageError) as error:
        return error


def _require_inside(image: Path, folder: Path) -> None:
    if image.is_symlink() and not image.resolve().is_relative_to(folder.resolve()):
        raise ImageError(f"{image}: is a link to an image outside of its folder; take `copy` to copy the images")


def read_yolo_labels(names: Sequence[str], image: Path, labels: Path | None) -> Labels:
    """The boxes of a YOLO label file, in pixels of the image as viewers show it; none for an image without one."""
    found = Labels(look(image).size)
    for box in read_yolo(labels, len(names)) if labels is not None else ():
        named = LabelledBox(name=names[box.class_index], xywh=box.xywh(*found.size))
        found.add(named, f"{labels}: line {box.line}")
    return found


def read_voc_labels(corners: Corners, classes: Mapping[str, str] | None, image: Path, labels: Path | None) -> Labels:
    """The objects of a Pascal-VOC file, difficult ones as crowds.

    Args:
        corners: meaning of their corners.
        classes: new name of each class, and no others are read; None takes all as they are.
        image: the image.
        labels: the file.
    """
    assert labels is not None
    document = read_voc(labels)
    reading = _read_start(image, document.size)
    found = Labels(reading.size)
    if document.size is None and reading.turned:
        found.oddities.append((_TURNED, str(image)))
    if document.size not in (None, found.size):
        found.oddities.append(("label files that swap width and height, which the image decides", str(labels)))
    for number, one in enumerate(document.objects, start=1):
        where = f"object[{number}]"
        if classes is not None and one.name not in classes:
            expected = f"one of the {len(classes)} classes of VOC"
            raise unfit(labels, f"{where}/name", expected, repr(one.name), suggest(one.name, list(classes)))
        if corners == "inclusive" and min(one.corners) < 1:
            # VOC's own files have no other meaning.
            advice = _EDGES if classes is None else ""
            found.oddities.append((f"{_BELOW_ONE}{advice}", f"{labels}: {where}"))
        name = one.name if classes is None else classes[one.name]
        box = LabelledBox(name=name, xywh=one.xywh(corners), crowd=one.difficult)
        found.add(box, f"{labels}: {where}")
    return found


def _read_start(image: Path, stated: tuple[int, int] | None) -> Reading:
    """Read the start of an image.

    Raises:
        ImageError: it has neither the stated size nor that with its sides swapped, a known slip.
    """
    reading = look(image, stated)
    if stated is not None and reading.size != stated[::-1]:
        reading.require_size(image, stated, "turn")
    return reading
