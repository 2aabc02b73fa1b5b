"""Galleries of the report: detections, and regions that the teacher proposed, beside the ground truth."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ezsd.cache import RegionRows, StoreError
from ezsd.data.annotations import Annotations
from ezsd.data.masks import decode, parse_outline, to_run_lengths
from ezsd.errors import AnnotationError
from ezsd.pipeline.console.options import as_options
from ezsd.pipeline.data.annotation_cache import evaluation_annotations
from ezsd.pipeline.data.datasets import Dataset
from ezsd.pipeline.errors import DamagedFile, DatasetError, ImageError, RunError, is_of_a_place
from ezsd.pipeline.extraction.annotation_check import checked_annotations
from ezsd.pipeline.files import read_objects
from ezsd.pipeline.inference.visualize import BASE_COLOUR, NOVEL_COLOUR, draw_boxes, fit_scale, jpeg_url
from ezsd.pipeline.report.run_data import RunData, run_store

log = logging.getLogger("ezsd")

SHOWN_SCORE = 0.3
"""Least score of a detection that is drawn, in [0, 1]."""
SHOWN_DETECTIONS = 20
"""Most detections drawn per image, best first."""
SHOWN_REGIONS = 10
"""Regions of the store drawn per image, best first."""

_PANEL_SIDE = 640


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A drawn image."""

    title: str
    names: Sequence[str]
    """Classes of the boxes drawn."""
    address: str
    """The picture itself, as a data URL."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""


class PanelPair(NamedTuple):
    """Ground truth of an image beside what was made of it."""

    file_name: str
    panels: tuple[Panel, Panel]


class Gallery(NamedTuple):
    """Pairs of panels, or the reason why there are none."""

    figures: Sequence[PanelPair]
    missing: str | None = None


def readable_gallery(make: Callable[[], Sequence[PanelPair]]) -> Gallery:
    """The gallery that `make` draws; without figures where its files are gone or damaged, after a warning."""
    try:
        return Gallery(make())
    except (AnnotationError, DamagedFile, DatasetError, ImageError, RunError, StoreError, OSError) as error:
        if isinstance(error, OSError) and not is_of_a_place(error):
            raise
        log.warning("report: no pictures: %s", error)
        return Gallery((), as_options(str(error)))


def detection_figures(main: RunData, dataset: Dataset, count: int) -> list[PanelPair]:
    """Ground truth beside detections, of `count` validation images."""
    by_image = _detections_by_image(main)
    annotations, source = evaluation_annotations(dataset.annotations("val"), dataset.split), dataset.images("val")
    figures = []
    for position in _choose(annotations, range(len(annotations.images)), main.novel, count):
        record = annotations.images[position]
        pixels = source.read(record)
        best = sorted(by_image.get(record.id, []), key=lambda entry: -entry["score"])[:SHOWN_DETECTIONS]
        xywh = np.array([entry["bbox"] for entry in best], np.float32).reshape(-1, 4)
        boxes = torch.from_numpy(np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1))
        captions = [f"{entry['name']} {entry['score']:.2f}" for entry in best]
        names = [str(entry["name"]) for entry in best]
        try:
            masks = _masks(best, record.height, record.width)
        except ValueError as error:
            where = f"{main.run.folder / 'detections.json'}: image {record.id}"
            raise DamagedFile(f"{where}: has a detection without a mask of its size: {error}") from error
        truth = _truth_panel(pixels, annotations, position, main.novel)
        figures.append(
            PanelPair(
                record.file_name, (truth, _panel("detections", pixels, boxes, names, main.novel, captions, masks))
            )
        )
    return figures


def _detections_by_image(main: RunData) -> dict[int, list[dict[str, Any]]]:
    """Detections that are drawn, by image id, in COCO's form with the class by its name."""
    path = main.run.folder / "detections.json"
    if not path.is_file():
        raise RunError(f"{path}: missing; `{main.command('eval')}` makes it")
    by_image: dict[int, list[dict[str, Any]]] = {}
    for entry in read_objects(path):
        if not {"image_id", "name", "bbox", "score"} <= entry.keys():
            raise DamagedFile(f"{path}: has a detection without image_id, name, bbox or score")
        if entry["score"] >= SHOWN_SCORE:
            by_image.setdefault(entry["image_id"], []).append(entry)
    return by_image


def _masks(entries: Sequence[dict[str, Any]], height: int, width: int) -> list[NDArray[np.bool_]] | None:
    """Masks (H, W) of detections, None where none has one. ValueError when one lacks it or it has another size."""
    if not any("segmentation" in entry for entry in entries):
        return None
    outlines = [parse_outline(entry.get("segmentation"), height, width) for entry in entries]
    return [decode(to_run_lengths(outline, height, width), height, width) for outline in outlines]


def region_figures(main: RunData, dataset: Dataset, count: int) -> list[PanelPair]:
    """Ground truth beside the store's surest regions, of `count` training images."""
    store = run_store(main)
    checked_annotations(store, dataset)
    annotations, source = evaluation_annotations(dataset.annotations("train"), dataset.split), dataset.images("train")
    regions, (table, _) = store.regions, store.text
    positions = [position for position, image_id in enumerate(annotations.images.id.tolist()) if image_id in regions]
    figures = []
    for position in _choose(annotations, positions, main.novel, count):
        record = annotations.images[position]
        pixels = source.read(record)
        boxes, names = _best_regions(regions[record.id], table)
        truth = _truth_panel(pixels, annotations, position, main.novel)
        figures.append(
            PanelPair(record.file_name, (truth, _panel("teacher's regions", pixels, boxes, names, main.novel)))
        )
    return figures


def _best_regions(rows: RegionRows, table: Sequence[str]) -> tuple[Tensor, list[str]]:
    """Boxes (n, 4) of the regions with the highest confidence, best first, and their predicted classes."""
    order = np.argsort(-rows.score, kind="stable")[:SHOWN_REGIONS]
    return torch.from_numpy(rows.box[order]), [table[index] for index in rows.class_index[order]]


def _choose(annotations: Annotations, positions: Iterable[int], novel: frozenset[str], count: int) -> list[int]:
    """The first images that show a novel object; the first others where those are too few."""
    novel_boxes = np.array([name in novel for name in annotations.names])[annotations.class_index]
    shows_novel = set(annotations.image_index[novel_boxes].tolist())
    return sorted(positions, key=lambda position: (position not in shows_novel, position))[:count]


def _truth_panel(pixels: Tensor, annotations: Annotations, position: int, novel: frozenset[str]) -> Panel:
    rows = annotations.rows(position)
    names = [annotations.names[index] for index in annotations.class_index[rows]]
    pairs = zip(names, annotations.crowd[rows], strict=True)
    captions = [f"{name} (group)" if crowd else name for name, crowd in pairs]
    return _panel("ground truth", pixels, torch.tensor(annotations.box[rows]), names, novel, captions)


def _panel(
    title: str,
    pixels: Tensor,
    boxes: Tensor,
    names: Sequence[str],
    novel: frozenset[str],
    captions: Sequence[str] | None = None,
    masks: Sequence[NDArray[np.bool_]] | None = None,
) -> Panel:
    """Draw boxes coloured by base and novel; captions are the names unless given."""
    height, width = pixels.shape[1:]
    scale = min(fit_scale(width, height), _PANEL_SIDE / max(width, height))
    colours = [NOVEL_COLOUR if name in novel else BASE_COLOUR for name in names]
    picture = draw_boxes(pixels, boxes, names if captions is None else captions, colours, scale=scale, masks=masks)
    # Full colour resolution: thin coloured lines would smear.
    address = jpeg_url(picture, quality=85, subsampling=0)
    return Panel(title=title, names=names, address=address, width=picture.width, height=picture.height)
