"""Galleries of the report: failures, detections, and regions of the store, each beside the ground truth.

A picture is the bare image, once; boxes are numbers that the page draws over it, so that they stay sharp at any size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ezsd.cache import RegionRows, Store
from ezsd.data.annotations import Annotations
from ezsd.data.records import ImageRecord
from ezsd.errors import quantity
from ezsd.pipeline.data.datasets import Dataset
from ezsd.pipeline.inference.outlines import OUTLINE_POINTS, outlines
from ezsd.pipeline.inference.visualize import jpeg_url
from ezsd.pipeline.report.outcomes import Judged

SHOWN_DETECTIONS = 20
"""Most detections drawn per image, best first."""
SHOWN_REGIONS = 10
"""Regions of the store drawn per image, best first."""
PICTURE_SIDE = 640
"""Long side of a picture, pixels; larger images are reduced to it."""
PICTURE_BYTES = 70_000
"""Most characters of a picture on the page: a page with all its pictures stays below 5 MB."""

_QUALITIES = (82, 74, 66, 58, 50)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A box over a picture, in pixels of the image."""

    name: str
    novel: bool
    note: str
    """Words after the name: score, kind of error; "" for none."""
    alarm: bool
    """True for a wrong detection and a missed object."""
    x: float
    """Left edge; likewise `y`, the upper one."""
    y: float
    width: float
    height: float
    outlines: Sequence[str] = ()
    """Outlines of the mask, as points of SVG's polygon."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """The picture with marks over it."""

    title: str
    marks: Sequence[Mark]
    """The most important first."""
    empty: str
    """Sentence for a panel without marks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A picture, and what is drawn over it."""

    file_name: str
    said: str
    """Words after the file's name; "" for none."""
    address: str
    """The picture itself, as a data URL."""
    width: int
    """Width of the image, pixels; marks are in these."""
    height: int
    panels: Sequence[Panel]


def failure_figures(found: Judged, dataset: Dataset, count: int) -> list[Figure]:
    """Objects beside detections, of the `count` validation images with most errors."""
    positions = {image: position for position, image in enumerate(found.truth.image_ids.tolist())}
    return [
        _judged_figure(found, dataset, positions[image], f"{quantity(wrong, 'wrong detection')}, {gone} missed")
        for image, wrong, gone in found.worst_images()[:count]
    ]


def detection_figures(found: Judged, dataset: Dataset, count: int) -> list[Figure]:
    """Objects beside detections, of `count` validation images that are not selected by result."""
    truth = found.truth
    shows_novel = set(truth.image_id[truth.class_index >= found.base_count].tolist())
    chosen = _novel_first(truth.image_ids.tolist(), shows_novel)[:count]
    return [_judged_figure(found, dataset, position, "") for position in chosen]


def _judged_figure(found: Judged, dataset: Dataset, position: int, said: str) -> Figure:
    truth, outcomes = found.truth, found.shown
    record = truth.images[position]
    rows = np.flatnonzero(truth.image_id == record.id)
    objects = [
        object_mark(
            found,
            record,
            row,
            note="group" if truth.crowd[row] else "missed" if outcomes.missed[row] else "",
            alarm=bool(outcomes.missed[row]),
        )
        for row in rows.tolist()
    ]
    panels = (
        Panel(title="ground truth", marks=objects, empty="no object of these classes"),
        Panel(title="detections", marks=detection_marks(found, record), empty="no detection with that score"),
    )
    return make_figure(dataset.images("val").read(record), record, said, panels)


def object_mark(found: Judged, record: ImageRecord, row: int, *, note: str, alarm: bool) -> Mark:
    """An object of the truth, by its row there."""
    return _mark(
        _corners(found.truth.xywh[row]),
        record,
        found.truth.split.names[found.truth.class_index[row]],
        novel=bool(found.truth.class_index[row] >= found.base_count),
        note=note,
        alarm=alarm,
    )


def detection_marks(
    found: Judged, record: ImageRecord, more: Mapping[int, str] = MappingProxyType({}), *, points: int = OUTLINE_POINTS
) -> list[Mark]:
    """The detections of an image that are drawn, the surest first, with score and kind.

    Args:
        found: the detections of a run.
        record: the image.
        more: further words after the kind of right detections, by the row of their object in the truth.
        points: most points of the outlines of a mask, about.
    """
    truth, results, outcomes = found.truth, found.results, found.shown
    marks, size = [], (record.height, record.width)
    # The surest first, as they are sorted.
    for place in np.flatnonzero(results.image_id[outcomes.row] == record.id)[:SHOWN_DETECTIONS].tolist():
        row, kind, matched = int(outcomes.row[place]), str(outcomes.kind[place]), int(outcomes.matched[place])
        on = truth.split.names[truth.class_index[matched]] if matched >= 0 else ""
        words = [f"{results.score[row]:.2f}", f"{kind}: {on}" if kind.startswith("confused") else kind]
        if kind == "right" and matched in more:
            words.append(more[matched])
        marks.append(
            _mark(
                _corners(results.xywh[row]),
                record,
                truth.split.names[results.class_index[row]],
                novel=bool(results.class_index[row] >= found.base_count),
                note=", ".join(words),
                alarm=kind not in ("right", "ignored"),
                rings=() if results.masks is None else outlines(results.masks[row], *size, points=points),
            )
        )
    return marks


def region_figures(
    store: Store, annotations: Annotations, dataset: Dataset, novel: frozenset[str], count: int
) -> list[Figure]:
    """Ground truth beside the store's most confident regions, of `count` training images not selected by result."""
    (names, _), ids = store.text, store.image_ids.tolist()
    position = {number: index for index, number in enumerate(annotations.images.id.tolist())}
    novel_boxes = np.array([name in novel for name in annotations.names], np.bool_)[annotations.class_index]
    shows_novel = set(annotations.images.id[annotations.image_index[novel_boxes]].tolist())
    figures = []
    for place in _novel_first(ids, shows_novel)[:count]:
        record = annotations.images[position[ids[place]]]
        panels = (
            Panel(
                title="ground truth",
                marks=_annotated(annotations, position[record.id], record, novel),
                empty="no object of these classes",
            ),
            Panel(
                title="teacher's regions",
                marks=_regions(store.regions[record.id], names, record, novel),
                empty="no region of this image was kept by the filters",
            ),
        )
        figures.append(make_figure(dataset.images("train").read(record), record, "", panels))
    return figures


def _annotated(annotations: Annotations, position: int, record: ImageRecord, novel: frozenset[str]) -> list[Mark]:
    rows = annotations.rows(position)
    names = [annotations.names[index] for index in annotations.class_index[rows]]
    return [
        _mark(box, record, name, novel=name in novel, note="group" if crowd else "", alarm=False)
        for box, name, crowd in zip(annotations.box[rows].tolist(), names, annotations.crowd[rows], strict=True)
    ]


def _regions(rows: RegionRows, names: Sequence[str], record: ImageRecord, novel: frozenset[str]) -> list[Mark]:
    """The regions with the highest score, with the teacher's guess and its confidence."""
    order = np.argsort(-rows.score, kind="stable")[:SHOWN_REGIONS].tolist()
    guesses = [names[rows.class_index[row]] for row in order]
    return [
        _mark(
            rows.box[row].tolist(),
            record,
            name,
            novel=name in novel,
            note=f"{rows.confidence[row]:.2f}",
            alarm=False,
        )
        for row, name in zip(order, guesses, strict=True)
    ]


def _novel_first(ids: Iterable[int], shows_novel: set[int]) -> list[int]:
    """Positions of images in their order, those with a novel object first."""
    each = list(ids)
    return sorted(range(len(each)), key=lambda position: (each[position] not in shows_novel, position))


def make_figure(pixels: Tensor, record: ImageRecord, said: str, panels: Sequence[Panel]) -> Figure:
    """A picture of an image (3, H, W) uint8 with panels over it, and words after the file's name."""
    return Figure(
        file_name=record.file_name,
        said=said,
        address=picture_address(pixels),
        width=record.width,
        height=record.height,
        panels=panels,
    )


def picture_address(pixels: Tensor) -> str:
    """An image (3, H, W) uint8 as the data URL of a JPEG, of at most `PICTURE_BYTES` characters.

    Busy images are compressed further, and then reduced.
    """
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    while True:
        for quality in _QUALITIES:
            address = jpeg_url(picture, quality=quality)
            if len(address) <= PICTURE_BYTES:
                return address
        picture = picture.resize(
            (max(picture.width * 3 // 4, 1), max(picture.height * 3 // 4, 1)), Image.Resampling.LANCZOS
        )


def _mark(
    corners: Sequence[float],
    record: ImageRecord,
    name: str,
    *,
    novel: bool,
    note: str,
    alarm: bool,
    rings: Sequence[str] = (),
) -> Mark:
    """A box, given as xyxy and cut to the image."""
    x1, y1, x2, y2 = corners
    x1, x2 = (min(max(x, 0.0), float(record.width)) for x in (x1, x2))
    y1, y2 = (min(max(y, 0.0), float(record.height)) for y in (y1, y2))
    return Mark(
        name=name,
        novel=novel,
        note=note,
        alarm=alarm,
        x=round(x1, 1),
        y=round(y1, 1),
        width=round(x2 - x1, 1),
        height=round(y2 - y1, 1),
        outlines=rings,
    )


def _corners(xywh: NDArray[np.float64]) -> list[float]:
    x, y, width, height = xywh.tolist()
    return [x, y, x + width, y + height]
