"""Requirements of a dataset: the refusals that `ezsd data check`, build, training and evaluation share.

Everything that an evaluation will need is checked before the first crop and the first step, by the code that evaluates.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ezsd.data.annotations import Annotations
from ezsd.errors import AnnotationError
from ezsd.metrics import read_truth
from ezsd.pipeline.data.annotation_cache import evaluation_annotations, kept_arrays, read_categories
from ezsd.pipeline.data.datasets import DATASETS, Dataset
from ezsd.pipeline.data.image_source import ImageSource
from ezsd.pipeline.data.split import NAMED, no_ground_truth
from ezsd.pipeline.errors import DatasetError, ImageError
from ezsd.vocabulary import Split, first_few

log = logging.getLogger("ezsd")


@dataclass(frozen=True, slots=True)
class FileFault:
    """A fault of the file of one image."""

    row: int
    """Position of the image in the list given."""
    kind: str
    """"name", "missing" or "double"."""
    text: str


def image_file_faults(file_names: Sequence[str], source: ImageSource) -> Iterator[FileFault]:
    """Names that lead to no file, out of the folder, or to the file of an earlier image; no image is opened.

    Args:
        file_names: as annotations state them, one for each image; empty ones are left out.
        source: where the images are.

    Raises:
        DatasetError: see `ImageSource.find`.
    """
    first: dict[Hashable, int] = {}
    for row, file_name in enumerate(file_names):
        if not file_name:
            continue
        try:
            found = source.identity(file_name)
        except AnnotationError as error:
            yield FileFault(row, "name", str(error))
            continue
        except ImageError as error:
            yield FileFault(row, "missing", str(error))
            continue
        if found is not None:
            earlier = first.setdefault(found, row)
            if earlier != row:
                other = "" if file_names[earlier] == file_name else f", by the name {file_names[earlier]!r}"
                text = f"{file_name!r} is the file of another image of the list too{other}. Join the two images."
                yield FileFault(row, "double", text)


def fitting(dataset: Dataset, part: str, file_name: str) -> str:
    """Advice for finding a missing image: change the place, or all file names; "" if neither fits."""
    source = dataset.images(part)
    place = None if dataset.name in DATASETS else source.elsewhere(file_name, dataset.root)
    if place is not None:
        return f'Try images = "{place}" in [{part}].'
    parts = re.split(r"[/\\?=&]+", file_name)
    for start in range(len(parts)):
        rest = "/".join(parts[start:])
        if rest and rest != file_name and source.has(rest):
            return f"Write file_name as {rest!r}: that is there; the others likewise."
    return ""


def require_image_files(dataset: Dataset, part: str, annotations: Annotations, *, all_there: bool) -> None:
    """Refuse images whose names lead out of the folder or to one file, and unless told otherwise missing ones.

    Raises:
        DatasetError: names the first one of a kind, and how many there are.
    """
    file, source = dataset.annotations(part), dataset.images(part)
    images = annotations.images
    names = [image.file_name for image in images]
    faults = [one for one in image_file_faults(names, source) if all_there or one.kind != "missing"]
    if faults:
        first, count = faults[0], sum(one.kind == faults[0].kind for one in faults)
        more = f" ({count} of {len(images)} images are like this)" if count > 1 else ""
        cure = "" if first.kind == "double" else fitting(dataset, part, names[first.row])
        raise DatasetError(f"{file}: image {images.id[first.row]}: {first.text}{more} {cure}".rstrip())


def require_evaluation(dataset: Dataset, *, part: str = "val", masks: bool = False) -> Annotations:
    """Refuse what `ezsd eval` would refuse, and say what it cannot measure.

    Args:
        dataset: the dataset.
        part: "val" or "train".
        masks: whether masks are evaluated too.

    Returns:
        The record to evaluate by.

    Raises:
        DatasetError: files are missing, or one is listed twice.
        AnnotationError: the annotations are not in order, or do not know a base name.
    """
    dataset.require(part)
    path = dataset.annotations(part)
    annotations = evaluation_annotations(path, dataset.split)
    require_image_files(dataset, part, annotations, all_there=True)
    if masks:
        _require_outlines(path, dataset.split)
    offered = [category.name for category in read_categories(path)] if annotations.absent else []
    for line in unmeasured(annotations, dataset.split, offered):
        log.warning("%s: %s", path, line)
    return annotations


def _require_outlines(path: Path, split: Split) -> None:
    """AnnotationError for an outline that an evaluation of masks would refuse; looked at once per content of a file."""

    def look(_: Path) -> dict[str, object]:
        read_truth(path, split, masks=True)
        return {}

    kept_arrays(path, ["evaluated outlines", split.base, split.novel], look)


def unmeasured(annotations: Annotations, split: Split, offered: Iterable[str] = ()) -> list[str]:
    """Reasons why figures of an evaluation will be empty, one line each.

    Args:
        annotations: the record to evaluate by.
        split: its classes.
        offered: names of the file's class table, near ones of which are offered.
    """
    seen = {split.names[index] for index in np.unique(annotations.class_index[~annotations.crowd]).tolist()}
    if not seen:
        return ["has no box of any name of the split: every figure will be '-'"]
    lines = []
    if annotations.absent:
        lines.append(no_ground_truth(annotations.absent, offered))
    boxless = [name for name in split.novel if name not in seen and name not in annotations.absent]
    if split.novel and not seen & set(split.novel):
        lines.append("has no box of any novel name: the novel figures will be '-'")
    elif boxless:
        lines.append(f"no box of novel {first_few([repr(name) for name in boxless], NAMED)}: figures of it are '-'")
    return lines


def too_few_to_hold_out(images: int, share: float = 0.0) -> bool:
    """Test whether so many images with base boxes are too few to hold out a fraction and to tune on the others."""
    return images <= held_out_images(images, share)


def held_out_images(images: int, share: float) -> int:
    """Number of images with base boxes that re-normalisation is measured on."""
    return max(1, round(images * share))
