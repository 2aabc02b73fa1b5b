"""`ezsd data check`: everything that is wrong with a dataset, in one pass, with its place."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ezsd.data.annotations import AnnotationError, resolve_image_path, unknown_names
from ezsd.data.records import clip_boxes
from ezsd.data.segmentations import outline_faults
from ezsd.data.table import Table, annotation_faults, category_faults, image_faults, read_table
from ezsd.vocabulary import Split
from pipeline.datasets import Dataset, read_image
from pipeline.images import ImageError, opened_image
from pipeline.progress import Progress

# Reading is waiting, mostly for a disk or a network.
_READERS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one of the two annotation files holds."""

    name: str
    """"train" or "val"."""
    images: int
    without_boxes: int
    """Images without a base or novel object."""
    base: int
    """Boxes, crowds left out."""
    novel: int
    """See there."""
    other: int
    """Boxes of classes outside the split."""
    crowd: int
    """Boxes around groups, of all classes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What was found."""

    dataset: Dataset
    problems: list[str]
    """One line each: file, place, what is wrong, what to do."""
    parts: list[Part]
    """Of files that could be read."""


def check_dataset(dataset: Dataset, *, decode: bool = False, masks: bool = False) -> Check:
    """Look at both annotation files and at every image they name.

    Reads novel boxes: nothing of what is found goes anywhere but into the answer.

    Args:
        dataset: its four places must exist.
        decode: read every pixel; otherwise only what stands at the start of an image file.
        masks: look at the outlines that masks are learned from, which are those of base objects, and evaluated by.
    """
    problems: list[str] = []
    parts: list[Part] = []
    sides = (
        ("train", dataset.train_annotations, dataset.train_images),
        ("val", dataset.val_annotations, dataset.val_images),
    )
    for name, file, images in sides:
        path = dataset.root / file
        try:
            table = read_table(path)
        except AnnotationError as error:
            problems.append(str(error))
            continue
        problems += [f"{path}: {problem}" for problem in _file_problems(table, dataset.split)]
        if masks:
            problems += [f"{path}: {problem}" for problem in _mask_problems(table, dataset.split, name)]
        problems += [f"{path}: {problem}" for problem in _image_problems(table, dataset.root / images, name, decode)]
        parts.append(_count(table, dataset.split, name))
    return Check(dataset=dataset, problems=problems, parts=parts)


def check_table(check: Check) -> str:
    """What a sound dataset holds."""
    split = check.dataset.split
    lines = [f"{check.dataset.name}: {len(split.base)} base and {len(split.novel)} novel names, nothing wrong"]
    columns = ("images", "without_boxes", "base", "novel", "other", "crowd")
    lines.append("       " + "".join(f"{column.replace('_', ' '):>15}" for column in columns))
    lines += [
        f"{part.name:<7}" + "".join(f"{getattr(part, column):>15,}" for column in columns) for part in check.parts
    ]
    return "\n".join(lines)


def _file_problems(table: Table, split: Split) -> Iterator[str]:
    """What the file says of itself that cannot be."""
    faults = chain(
        image_faults(table), category_faults(table), unknown_names(table, split.names), annotation_faults(table, None)
    )
    yield from (f"{fault.place}: {fault}" for fault in faults)
    yield from _near_names(table)
    yield from _repeated_files(table)
    yield from _empty_boxes(table)


def _near_names(table: Table) -> Iterator[str]:
    """Names that differ in nothing but case, blanks and signs."""
    like: dict[str, int] = {}
    for position, name in enumerate(table.categories.name):
        bare = re.sub(r"[\W_]+", "", name.casefold())
        first = like.setdefault(bare, position)
        other = table.categories.name[first]
        if name and other != name:
            yield (
                f"categories[{position}].name: {name!r} is nearly categories[{first}].name, {other!r}. Join the two "
                f"categories or rename one."
            )


def _repeated_files(table: Table) -> Iterator[str]:
    """Two images with one file: its objects would be background in one of them."""
    first: dict[str, int] = {}
    for position, name in enumerate(table.images.file_name):
        if name and first.setdefault(name, position) != position:
            yield f"images[{position}].file_name: {name!r} is images[{first[name]}].file_name too. Join the two images."


def _empty_boxes(table: Table) -> Iterator[str]:
    """Boxes of which nothing is left within their image."""
    height, width = _image_sizes(table).T
    known = (height > 0) & table.sound("annotations", "bbox")
    xywh = np.array(table.annotations.xywh, dtype=np.float64).reshape(-1, 4)
    _, empty, outside = clip_boxes(xywh, width, height)
    for position in np.flatnonzero(known & empty):
        box = ", ".join(f"{value:g}" for value in xywh[position])
        wrong = (
            f"outside the image of {width[position]} x {height[position]}" if outside[position] else "without an area"
        )
        yield f"annotations[{position}].bbox: [{box}] is {wrong}. Correct or remove the annotation."


def _image_sizes(table: Table) -> NDArray[np.int32]:
    """Height and width of the image of each annotation, (A, 2); zeros where the file does not say."""
    ids = np.array(table.images.id, dtype=np.int64)
    image_id = np.array(table.annotations.image_id, dtype=np.int64)
    if not len(ids):
        return np.zeros((len(image_id), 2), dtype=np.int32)
    order = np.argsort(ids, kind="stable")
    place = order[np.minimum(np.searchsorted(ids, image_id, sorter=order), len(ids) - 1)]
    known = (ids[place] == image_id) & table.sound("annotations", "image_id")
    known &= (table.sound("images", "width") & table.sound("images", "height"))[place]
    size = np.stack([np.array(table.images.height, np.int32), np.array(table.images.width, np.int32)], axis=1)
    return np.where(known[:, None], size[place], 0).astype(np.int32)


def _mask_problems(table: Table, split: Split, part: str) -> Iterator[str]:
    """Outlines that are missing or not in order: of base objects to learn from, of all in the split to evaluate by."""
    columns, training = table.annotations, part == "train"
    names = split.base if training else split.names
    wanted = [id_ for id_, name in zip(table.categories.id, table.categories.name, strict=True) if name in names]
    asked = np.isin(np.array(columns.category_id, dtype=np.int64), wanted) & table.sound("annotations", "category_id")
    if training:
        asked &= np.array(columns.crowd, dtype=np.int8) == 0
    size = np.where(asked[:, None], _image_sizes(table), 0).astype(np.int32)
    count = int(size.all(1).sum())
    faults = []
    with Progress(f"outlines of {part}", count, unit="outline") as progress:
        for fault in outline_faults(table.path, size):
            if fault is not None:
                faults.append(fault)
            progress.advance()
    if len(faults) == count > 1:
        # A file without outlines is one problem, not as many as it has objects.
        yield f"annotations: all {count} outlines needed are missing or wrong, like {faults[0].place}: {faults[0]}"
        return
    yield from (f"{fault.place}: {fault}" for fault in faults)


def _image_problems(table: Table, folder: Path, part: str, decode: bool) -> list[str]:
    columns = table.images
    entries = [
        entry
        for entry in zip(range(len(columns.id)), columns.file_name, columns.width, columns.height, strict=True)
        if entry[1]
    ]
    found: list[str] = []
    with ThreadPoolExecutor(_READERS) as pool, Progress(f"check {part}", len(entries), unit="image") as progress:
        try:
            for problem in pool.map(partial(_image_problem, folder, decode), entries):
                if problem is not None:
                    found.append(problem)
                progress.advance()
        except BaseException:
            # Leaving the pool would wait until all are read.
            pool.shutdown(cancel_futures=True)
            raise
    return found


def _image_problem(folder: Path, decode: bool, entry: tuple[int, str, int, int]) -> str | None:
    position, file_name, width, height = entry
    try:
        path = resolve_image_path(folder, file_name)
        size = _decoded_size(path) if decode else _stated_size(path)
    except (AnnotationError, ImageError) as error:
        return f"images[{position}].file_name: {error}"
    if width and height and size != (width, height):
        return (
            f"images[{position}]: the file says {width} x {height} pixels, {path} has {size[0]} x {size[1]}. Correct "
            f"width and height, and the boxes if they go by them."
        )
    return None


def _stated_size(path: Path) -> tuple[int, int]:
    with opened_image(path) as image:
        return image.size


def _decoded_size(path: Path) -> tuple[int, int]:
    _, height, width = read_image(path).shape
    return width, height


def _count(table: Table, split: Split, name: str) -> Part:
    named: Sequence[str] = table.categories.name
    group = {id_: _group(split, label) for id_, label in zip(table.categories.id, named, strict=True)}
    columns = table.annotations
    counts: Counter[str] = Counter()
    objects: defaultdict[int, int] = defaultdict(int)
    for category, image, crowd in zip(columns.category_id, columns.image_id, columns.crowd, strict=True):
        kind = group.get(category, "other")
        counts["crowd" if crowd else kind] += 1
        objects[image] += not crowd and kind != "other"
    return Part(
        name=name,
        images=len(table.images.id),
        without_boxes=sum(not objects.get(id_) for id_ in table.images.id),
        base=counts["base"],
        novel=counts["novel"],
        other=counts["other"],
        crowd=counts["crowd"],
    )


def _group(split: Split, name: str) -> str:
    if name in split.base:
        return "base"
    return "novel" if name in split.novel else "other"
