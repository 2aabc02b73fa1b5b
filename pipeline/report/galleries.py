"""Galleries: what the detector sees, what the teacher proposed."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ezsd.cache import RegionRows, StoreError
from ezsd.data.annotations import Annotations
from ezsd.data.masks import decode, parse_outline, to_run_lengths
from ezsd.errors import AnnotationError
from ezsd.pipeline.console.options import as_options
from ezsd.pipeline.data.annotation_cache import evaluation_annotations
from ezsd.pipeline.data.datasets import Dataset
from ezsd.pipeline.data.images import read_dataset_image
from ezsd.pipeline.errors import DamagedFile, DatasetError, ImageError, RunError, is_of_a_place
from ezsd.pipeline.extraction.annotation_check import checked_annotations
from ezsd.pipeline.files import read_objects
from ezsd.pipeline.inference.visualize import BASE_COLOUR, NOVEL_COLOUR, draw_boxes, fit_scale
from ezsd.pipeline.report.html import Html, element, note, section
from ezsd.pipeline.report.run_data import Facts, run_store

log = logging.getLogger("ezsd")

SHOWN_SCORE = 0.3
"""Detections below it are not drawn."""
SHOWN_DETECTIONS = 20
"""At most so many are drawn per image, best first."""
SHOWN_REGIONS = 10
"""Regions of the store drawn per image, best first."""

_UNFOLDED = 6
_PANEL_SIDE = 640


@dataclass(frozen=True, slots=True)
class _Panel:
    """One drawn image and what it shows."""

    title: str
    picture: Image.Image
    names: Sequence[str]


def pictures_section(title: str, lead: str, make: Callable[[], Html]) -> Html:
    """A gallery, or the reason why there is none."""
    try:
        body = make()
    except (AnnotationError, DamagedFile, DatasetError, ImageError, RunError, StoreError, OSError) as error:
        if isinstance(error, OSError) and not is_of_a_place(error):
            raise
        log.warning("report: no pictures: %s", error)
        body = note(f"No pictures: {as_options(str(error))}")
    return section(title, lead, body)


def detection_gallery(main: Facts, dataset: Dataset, count: int) -> Html:
    """Ground truth beside detections."""
    found = _detections_by_image(main)
    annotations = evaluation_annotations(dataset.root / dataset.val_annotations, dataset.split)
    figures = []
    for position in _choose(annotations, range(len(annotations.images)), main.novel, count):
        record = annotations.images[position]
        pixels = read_dataset_image(dataset.root / dataset.val_images, record, dataset.exif)
        best = sorted(found.get(record.id, []), key=lambda one: -one["score"])[:SHOWN_DETECTIONS]
        xywh = np.array([one["bbox"] for one in best], np.float32).reshape(-1, 4)
        boxes = torch.from_numpy(np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1))
        captions = [f"{one['name']} {one['score']:.2f}" for one in best]
        names = [str(one["name"]) for one in best]
        try:
            masks = _masks(best, record.height, record.width)
        except ValueError as error:
            where = f"{main.run.folder / 'detections.json'}: image {record.id}"
            raise DamagedFile(f"{where}: has a detection without a mask of its size: {error}") from error
        detected = _panel("detections", pixels, boxes, names, main.novel, captions, masks)
        figures.append(_figure(record.file_name, _truth_panel(pixels, annotations, position, main.novel), detected))
    return _gallery(figures)


def _detections_by_image(main: Facts) -> dict[int, list[dict[str, Any]]]:
    """What is drawn, by image id, in COCO's form with the class by its name."""
    path = main.run.folder / "detections.json"
    if not path.is_file():
        raise RunError(f"{path}: missing; `{main.command('eval')}` makes it")
    by_image: dict[int, list[dict[str, Any]]] = {}
    for one in read_objects(path):
        if not {"image_id", "name", "bbox", "score"} <= one.keys():
            raise DamagedFile(f"{path}: has a detection without image_id, name, bbox or score")
        if one["score"] >= SHOWN_SCORE:
            by_image.setdefault(one["image_id"], []).append(one)
    return by_image


def _masks(found: Sequence[dict[str, Any]], height: int, width: int) -> list[NDArray[np.bool_]] | None:
    """Masks (H, W) of detections, None where none has one. ValueError when one lacks it or it has another size."""
    if not any("segmentation" in one for one in found):
        return None
    outlines = [parse_outline(one.get("segmentation"), height, width) for one in found]
    return [decode(to_run_lengths(outline, height, width), height, width) for outline in outlines]


def region_gallery(main: Facts, dataset: Dataset, count: int) -> Html:
    """Ground truth beside the store's surest regions."""
    store = run_store(main)
    checked_annotations(store, dataset)
    annotations = evaluation_annotations(dataset.root / dataset.train_annotations, dataset.split)
    regions, (table, _) = store.regions, store.text
    positions = [position for position, image_id in enumerate(annotations.images.id.tolist()) if image_id in regions]
    figures = []
    for position in _choose(annotations, positions, main.novel, count):
        record = annotations.images[position]
        pixels = read_dataset_image(dataset.root / dataset.train_images, record, dataset.exif)
        boxes, names = _best_regions(regions[record.id], table)
        proposed = _panel("teacher's regions", pixels, boxes, names, main.novel)
        figures.append(_figure(record.file_name, _truth_panel(pixels, annotations, position, main.novel), proposed))
    return _gallery(figures)


def _best_regions(rows: RegionRows, table: Sequence[str]) -> tuple[Tensor, list[str]]:
    """Boxes (n, 4) of the surest regions, best first, and their guessed names."""
    order = np.argsort(-rows.score, kind="stable")[:SHOWN_REGIONS]
    return torch.from_numpy(rows.box[order]), [table[index] for index in rows.class_index[order]]


def _choose(annotations: Annotations, positions: Iterable[int], novel: frozenset[str], count: int) -> list[int]:
    """The first images that show a novel object; the first others where those are too few."""
    novel_boxes = np.array([name in novel for name in annotations.names])[annotations.class_index]
    shows_novel = set(annotations.image_index[novel_boxes].tolist())
    return sorted(positions, key=lambda position: (position not in shows_novel, position))[:count]


def _truth_panel(pixels: Tensor, annotations: Annotations, position: int, novel: frozenset[str]) -> _Panel:
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
) -> _Panel:
    """Draw boxes coloured by base and novel; captions are the names unless given."""
    height, width = pixels.shape[1:]
    scale = min(fit_scale(width, height), _PANEL_SIDE / max(width, height))
    colours = [NOVEL_COLOUR if name in novel else BASE_COLOUR for name in names]
    picture = draw_boxes(pixels, boxes, names if captions is None else captions, colours, scale=scale, masks=masks)
    return _Panel(title, picture, names)


def _figure(file_name: str, *panels: _Panel) -> Html:
    shown = [
        element(
            "div",
            element("img", src=_data_address(panel.picture), alt=_describe(panel, file_name), **_size(panel.picture)),
            element("p", panel.title),
        )
        for panel in panels
    ]
    return element("figure", element("figcaption", file_name), element("div", *shown, class_="panels"), class_="pair")


def _describe(panel: _Panel, file_name: str) -> str:
    return f"{panel.title} in {file_name}: {', '.join(panel.names) or 'nothing'}"


def _size(picture: Image.Image) -> dict[str, str]:
    return {"width": str(picture.width), "height": str(picture.height)}


def _data_address(picture: Image.Image) -> str:
    data = io.BytesIO()
    # Full colour resolution: thin coloured lines would smear.
    picture.save(data, "JPEG", quality=85, subsampling=0, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def _gallery(figures: Sequence[Html]) -> Html:
    """All figures, those after the first few folded away."""
    if not figures:
        return note("No pictures were asked for.")
    shown = element("div", *figures[:_UNFOLDED], class_="gallery")
    rest = figures[_UNFOLDED:]
    if not rest:
        return shown
    summary = element("summary", f"{len(rest)} more")
    return Html(shown + element("details", summary, element("div", *rest, class_="gallery")))
