"""Folders in COCO's format: annotations, images or links to them, and a dataset's TOML files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ezsd.data.coco_document import LabelledImage, coco_document
from ezsd.pipeline.data.dataset_toml import Places, dataset_toml
from ezsd.pipeline.data.findings import Findings
from ezsd.pipeline.data.labelled_folder import Part
from ezsd.pipeline.files import new_folder, write_text
from ezsd.pipeline.progress import Progress
from ezsd.vocabulary import Split


class PartCount(NamedTuple):
    """Numbers of a part."""

    name: str
    images: int
    boxes: int
    """Boxes, crowds left out."""
    crowd: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """A folder that was written, and what was odd about the files that were read."""

    out: Path
    parts: list[PartCount]
    splits: Mapping[str, Split]
    """Classes by dataset; NAME.toml is in the folder."""
    sources: list[str]
    """Files that decided parts and names."""
    oddities: list[str]
    """Remarks, one line each."""


def write_coco_folder(
    out: Path,
    parts: Sequence[Part],
    images: Mapping[str, Sequence[LabelledImage]],
    names: Sequence[str],
    splits: Mapping[str, Split],
    *,
    sources: list[str],
    findings: Findings,
    copy: bool,
) -> Conversion:
    """Write PART.json and PART/ for each part, and NAME.toml for each dataset.

    Args:
        out: the folder to make; it appears when it is whole.
        parts: of the folder that was read.
        images: by part.
        names: class names; their ids are 1, 2, ... in this order.
        splits: by name of dataset.
        sources: see `Conversion`.
        findings: likewise.
        copy: True copies the images, False makes PART a link to their folder.
    """
    categories = {name: number for number, name in enumerate(names, start=1)}
    # A dataset has two parts: images for tests serve where there are none for validation.
    second = next((name for name in ("val", "test") if name in images), None)
    chosen = {"train": "train"} | ({} if second is None else {"val": second})
    places = {part: Places(name, f"{name}.json") for part, name in chosen.items()}
    with new_folder(out) as draft:
        for part in parts:
            listed = images[part.name]
            write_text(draft / f"{part.name}.json", json.dumps(coco_document(listed, categories)))
            if copy:
                _copy(part, listed, draft / part.name)
            else:
                (draft / part.name).symlink_to(part.images.resolve(), target_is_directory=True)
        for name, split in splits.items():
            write_text(draft / f"{name}.toml", dataset_toml(name, places, split))
    return Conversion(
        out=out,
        parts=[_count(part.name, images[part.name]) for part in parts],
        splits=splits,
        sources=sources,
        oddities=findings.lines(),
    )


def _copy(part: Part, images: Sequence[LabelledImage], target: Path) -> None:
    with Progress(f"copy {part.name}", len(images), unit="image") as progress:
        for image in images:
            (target / image.file_name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(part.images / image.file_name, target / image.file_name)
            progress.advance()


def _count(name: str, images: Sequence[LabelledImage]) -> PartCount:
    crowd = sum(box.crowd for image in images for box in image.boxes)
    return PartCount(name, len(images), sum(len(image.boxes) for image in images) - crowd, crowd)
