"""Files of detections in the formats of other tools, written image by image: they take no memory of their own."""

from __future__ import annotations

import csv
import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import TracebackType
from typing import Literal, Protocol, Self, TextIO, TypeAlias, cast

from ezsd.cache import rename
from ezsd.data.masks import decompress, json_run_lengths
from ezsd.pipeline.data.sources import file_name, frame_name
from ezsd.pipeline.errors import ArgumentError
from ezsd.pipeline.files import write_text
from ezsd.pipeline.inference.detections import Detection, ImageDetections

Format: TypeAlias = Literal["coco", "csv", "fiftyone", "yolo", "yolo-scores"]
"""Format of detections.

"coco": a document that `ezsd eval` reads. "csv": one line per object. "fiftyone": a folder with labels.json and
data.json, FiftyOne's FiftyOneImageDetectionDataset. "yolo": a folder with a text file per image, and classes.txt;
"yolo-scores" has the score as a sixth column, which tools read as predictions, not as labels.
"""
COLUMNS = ("image", "frame", "class", "score", "x1", "y1", "x2", "y2")
"""Columns of the CSV format; corners in pixels of the image as it is shown, `frame` empty for images."""
NAMES = "classes.txt"
"""File with the class names in a YOLO folder, in the order of their numbers."""
_KEY_DIGITS = 8
_MEMORY = 2**20
"""Characters of a part that waits for its turn in a document, kept in memory; more of them wait on disk."""


@dataclass(frozen=True, slots=True)
class Output:
    """Request to write detections in a format."""

    format: Format
    place: Path | TextIO
    """File of "coco" and "csv", folder of the others; a stream, for the first two, is written to and left open."""


def outputs_of(saved: Mapping[Path, str], *, printed: bool) -> list[Output]:
    """Outputs of the formats by place; `printed` adds a COCO document on standard output."""
    outputs = [Output(cast(Format, kind), place) for place, kind in saved.items()]
    return [*outputs, Output("coco", sys.stdout)] if printed else outputs


class _Writer(Protocol):
    def write(self, detections: ImageDetections) -> None:
        """Add those of one image."""

    def finish(self) -> None:
        """Put the whole in its place."""

    def discard(self) -> None:
        """Remove what was written, unless it is finished."""


class Writers:
    """Writers of all outputs of a detection. Nothing is in its place before `finish`, but for lines of streams.

    Args:
        outputs: formats and places.
        classes: names that are searched, in the order of their numbers.

    Raises:
        ArgumentError: a place cannot be written to, or a YOLO folder has labels of other classes.
    """

    def __init__(self, outputs: Sequence[Output], classes: Sequence[str]) -> None:
        self._writers: list[_Writer] = []
        try:
            for output in outputs:
                self._writers.append(_writer(output, classes))
        except ArgumentError:
            self.discard()
            raise
        except OSError as error:
            self.discard()
            raise ArgumentError(
                f"{error.filename}: cannot be written to ({error.strerror}); choose another place"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def write(self, detections: ImageDetections) -> None:
        """Add the detections of one image."""
        for writer in self._writers:
            writer.write(detections)

    def finish(self) -> None:
        """Put all files in their places."""
        for writer in self._writers:
            writer.finish()

    def discard(self) -> None:
        """Remove what was written, unless it is finished."""
        for writer in self._writers:
            writer.discard()


def _writer(output: Output, classes: Sequence[str]) -> _Writer:
    if output.format == "coco":
        return _CocoWriter(output.place, classes)
    if output.format == "csv":
        return _CsvWriter(output.place)
    assert isinstance(output.place, Path)
    if output.format == "fiftyone":
        return _FiftyOneWriter(output.place, classes)
    return _YoloWriter(output.place, classes, scores=output.format == "yolo-scores")


class _Draft:
    """A text file that appears when it is whole; a stream is written to at once.

    Args:
        place: path or stream; the folder of a path is made.
    """

    def __init__(self, place: Path | TextIO) -> None:
        self._place = place if isinstance(place, Path) else None
        if isinstance(place, Path):
            place.parent.mkdir(parents=True, exist_ok=True)
            # Names of files may be any bytes, and are written as they are.
            self._draft = place.with_name(f".{place.name}.partial")
            self.file: TextIO = self._draft.open("w", encoding="utf-8", errors="surrogateescape", newline="")
        else:
            self.file = place

    def finish(self) -> None:
        if self._place is None:
            self.file.flush()
            return
        self.file.close()
        rename(self._draft, self._place)

    def discard(self) -> None:
        if self._place is not None:
            self.file.close()
            self._draft.unlink(missing_ok=True)


class _List:
    """Entries of a JSON list or object, one a line."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write, self._begun = write, False

    def add(self, entry: str) -> None:
        self._write(f",\n  {entry}" if self._begun else f"\n  {entry}")
        self._begun = True


class _CocoWriter:
    """COCO-format document with scores. Images are identified by `file_name`, classes by name; ids count from 1.

    Numbers are as exact as an evaluation of the run takes them. Where an object has a mask, `area` is that of the mask.
    """

    def __init__(self, place: Path | TextIO, classes: Sequence[str]) -> None:
        self._draft = _Draft(place)
        self._objects = self._images = 0
        # Two lists grow at once, and the second one waits.
        self._waiting = tempfile.SpooledTemporaryFile(_MEMORY, "w+", encoding="utf-8")  # noqa: SIM115 - closed below
        categories = [{"id": number, "name": name} for number, name in enumerate(classes, start=1)]
        self._head = f'{{\n "categories": {json.dumps(categories)},\n "annotations": ['
        self._annotation_list = _List(self._draft.file.write)
        self._image_list = _List(self._waiting.write)

    def write(self, detections: ImageDetections) -> None:
        self._begin()
        self._images += 1
        image: dict[str, object] = {"id": self._images, "file_name": detections.label}
        image |= {"width": detections.width, "height": detections.height}
        if detections.frame is not None:
            image["frame"] = detections.frame
        self._image_list.add(json.dumps(image))
        for one, number in zip(detections, detections.class_ids.tolist(), strict=True):
            self._objects += 1
            ids = {"id": self._objects, "image_id": self._images, "category_id": number + 1}
            self._annotation_list.add(json.dumps(ids | _coco_object(one, detections)))

    def _begin(self) -> None:
        # Not earlier: where no image can be read, nothing is printed.
        self._draft.file.write(self._head)
        self._head = ""

    def finish(self) -> None:
        self._begin()
        self._draft.file.write('\n ],\n "images": [')
        self._waiting.seek(0)
        while piece := self._waiting.read(_MEMORY):
            self._draft.file.write(piece)
        self._waiting.close()
        self._draft.file.write("\n ]\n}\n")
        self._draft.finish()

    def discard(self) -> None:
        self._waiting.close()
        self._draft.discard()


def _coco_object(one: Detection, detections: ImageDetections) -> dict[str, object]:
    x1, y1, x2, y2 = one.box
    entry: dict[str, object] = {
        "bbox": [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)],
        "area": round((x2 - x1) * (y2 - y1), 3),
        "iscrowd": 0,
        "score": _exact(one.score),
    }
    if one.mask is not None:
        entry["segmentation"] = json_run_lengths(one.mask, (detections.height, detections.width))
        entry["area"] = int(decompress(one.mask)[1::2].sum())
    return entry


def _exact(score: float) -> float:
    # Nine digits tell all float32 apart.
    return float(f"{score:.9g}")


class _CsvWriter:
    """One line per object, see `COLUMNS`."""

    def __init__(self, place: Path | TextIO) -> None:
        self._draft = _Draft(place)
        self._lines = csv.writer(self._draft.file, lineterminator="\n")
        self._lines.writerow(COLUMNS)

    def write(self, detections: ImageDetections) -> None:
        frame = "" if detections.frame is None else detections.frame
        for one in detections:
            corners = [round(value, 3) for value in one.box]
            self._lines.writerow([detections.source, frame, one.name, _exact(one.score), *corners])

    def finish(self) -> None:
        self._draft.finish()

    def discard(self) -> None:
        self._draft.discard()


class _YoloWriter:
    """A folder with one text file per image, "class cx cy width height" in fractions of the image, and classes.txt."""

    def __init__(self, place: Path, classes: Sequence[str], *, scores: bool) -> None:
        self._place, self._scores = place, scores
        self._names: str | None = yolo_names(classes)
        place.mkdir(parents=True, exist_ok=True)
        require_own_folder(place, classes)

    def write(self, detections: ImageDetections) -> None:
        self._begin()
        lines = []
        for one, number in zip(detections, detections.class_ids.tolist(), strict=True):
            x, y, w, h = detections.relative(one)
            values = [x + w / 2, y + h / 2, w, h, *([one.score] if self._scores else [])]
            lines.append(" ".join([str(number), *(f"{value:.6f}" for value in values)]) + "\n")
        write_text(self._place / f"{stem_of(detections)}.txt", "".join(lines))

    def _begin(self) -> None:
        # Not earlier: where no image can be read, no file is written.
        if self._names is not None:
            write_text(self._place / NAMES, self._names)
            self._names = None

    def finish(self) -> None:
        self._begin()

    def discard(self) -> None:
        # What is there is whole: one file for each image.
        pass


def yolo_names(classes: Sequence[str]) -> str:
    """Text of a YOLO folder's file of class names."""
    return "".join(f"{name}\n" for name in classes)


def require_own_folder(folder: Path, classes: Sequence[str]) -> None:
    """Raise ArgumentError for a YOLO folder whose label files number other classes, or some that nobody can tell."""
    names = folder / NAMES
    if names.is_file():
        if names.read_bytes() != yolo_names(classes).encode():
            raise ArgumentError(f"{names}: has other classes than are detected; choose another folder")
    elif any(folder.glob("*.txt")):
        raise ArgumentError(f"{folder}: has text files and no {NAMES} that says their classes; choose another folder")


class _FiftyOneWriter:
    """A folder that FiftyOne opens as its FiftyOneImageDetectionDataset; images stay where they are."""

    def __init__(self, place: Path, classes: Sequence[str]) -> None:
        place.mkdir(parents=True, exist_ok=True)
        self._images = 0
        self._drafts = [_Draft(place / "labels.json"), _Draft(place / "data.json")]
        labels, data = (draft.file for draft in self._drafts)
        labels.write(f'{{\n "classes": {json.dumps(list(classes))},\n "labels": {{')
        data.write("{")
        self._labels, self._data = _List(labels.write), _List(data.write)

    def write(self, detections: ImageDetections) -> None:
        self._images += 1
        key = f"{self._images:0{_KEY_DIGITS}d}"
        path = detections.source if "://" in detections.source else str(Path(detections.source).absolute())
        objects = [
            {"label": one.name, "bounding_box": detections.relative(one), "confidence": _exact(one.score)}
            for one in detections
        ]
        self._labels.add(f"{json.dumps(key)}: {json.dumps(objects)}")
        self._data.add(f"{json.dumps(key)}: {json.dumps(path)}")

    def finish(self) -> None:
        labels, data = (draft.file for draft in self._drafts)
        labels.write("\n }\n}\n")
        data.write("\n}\n")
        for draft in self._drafts:
            draft.finish()

    def discard(self) -> None:
        for draft in self._drafts:
            draft.discard()


def stem_of(detections: ImageDetections) -> str:
    """Name of an image's own files, without an ending: that of its file, of a frame with its number."""
    return frame_name(PurePath(file_name(detections.source)).stem, detections.frame)


def coco_document(detections: Iterable[ImageDetections], classes: Sequence[str]) -> str:
    """The COCO-format document of detections, as `Output("coco", FILE)` writes it."""
    text = io.StringIO()
    writers = Writers([Output("coco", text)], classes)
    for one in detections:
        writers.write(one)
    writers.finish()
    return text.getvalue()
