"""`ezsd data check`: everything that is wrong with a dataset, in one pass, with its place."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ezsd.data.annotations import category_ids, raw_annotations, refusals
from ezsd.data.coco_json import Fault, Table, annotation_faults, read_table
from ezsd.data.masks import outline_faults
from ezsd.data.records import clip_boxes, refine
from ezsd.errors import AnnotationError, VocabularyError, quantity
from ezsd.metrics import truth_of
from ezsd.pipeline.config.schema import BuildConfig
from ezsd.pipeline.data.datasets import Dataset, require_prompts
from ezsd.pipeline.data.image_source import ImageSource
from ezsd.pipeline.data.images import Exif, Reading, look, most_bad_images, read_pixels
from ezsd.pipeline.data.requirements import (
    fitting,
    image_file_faults,
    too_few_to_hold_out,
    unmeasured,
)
from ezsd.pipeline.errors import ConfigError, DatasetError, ImageError
from ezsd.pipeline.progress import Progress
from ezsd.vocabulary import Split, canonical

# Reading is waiting, mostly for a disk or a network.
_READERS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Numbers of images and boxes of one of the two annotation files."""

    name: str
    """"train" or "val"."""
    images: int
    without_boxes: int
    """Images without a base or novel object."""
    base: int
    """Boxes, crowds left out."""
    novel: int
    """Boxes of novel classes, crowds left out."""
    other: int
    """Boxes of classes outside the split."""
    crowd: int
    """Boxes around groups, of all classes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Result of a check."""

    dataset: Dataset
    problems: list[str]
    """Faults that build, training or evaluation refuse. One line for each kind: file, first place, what is wrong, what
    to do, how many there are."""
    warnings: list[str]
    """Oddities that are accepted but worth knowing; in the same form."""
    parts: list[Part]
    """Numbers of the files that could be read."""
    notes: list[str]
    """Remarks on how images are read, one line each; none of them is a fault."""


def check_dataset(dataset: Dataset, *, decode: bool = False, masks: bool = False) -> Check:
    """Look at both annotation files and at every image they name.

    Reads novel boxes: nothing of what is found goes anywhere but into the answer. What is refused is decided by the
    code that refuses it elsewhere, see `ezsd.pipeline.data.requirements` and `ezsd.data.annotations.refusals`.

    Args:
        dataset: may be one that was found with `strict=False`.
        decode: read every pixel; otherwise only the start of an image file.
        masks: look at the outlines that masks are learned from, which are those of base objects, and evaluated by.
    """
    problems, warnings = [f"{dataset.root}: {line}" for line in dataset.missing()], list[str]()
    parts: list[Part] = []
    notes: list[str] = []
    try:
        require_prompts(dataset.split, dataset.prompt_settings())
    except (ConfigError, VocabularyError) as error:
        problems.append(f"{dataset.name}: {error}")
    for name in dataset.parts:
        path, source = dataset.annotations(name), dataset.images(name)
        if not path.exists():
            continue
        try:
            table = read_table(path, catalogue=True)
        except AnnotationError as error:
            problems.append(str(error))
            continue
        refused, known = _file_findings(table, dataset.split, name)
        if masks:
            refused += _mask_findings(table, dataset.split, name)
        if not refused:
            refused, more = _record_findings(table, dataset.split, name, masks)
            known += more
        if source.exists:
            try:
                found, readings = _image_findings(table, dataset, name, decode)
            except DatasetError as error:
                problems.append(str(error))
            else:
                for finding, is_refused in found:
                    (refused if is_refused else known).append(finding)
                notes += [f"{path}: {note}" for note in _reading_notes(readings, dataset.exif)]
        problems += [f"{path}: {line}" for line in _folded(refused)]
        warnings += [f"{path}: {line}" for line in _folded(known)]
        parts.append(_count(table, dataset.split, name))
    return Check(dataset=dataset, problems=problems, warnings=warnings, parts=parts, notes=notes)


@dataclass(frozen=True, slots=True)
class _Finding:
    """A remark on an annotation file."""

    place: str
    """JSON path; "" for the whole file."""
    text: str
    kind: Hashable
    """Value that is equal for remarks with the same cause."""
    cure: str = ""
    """Advice, given once for all of a kind, after their number."""


def _of_fault(fault: Fault) -> _Finding:
    return _Finding(fault.place, str(fault), fault.like)


def _folded(findings: Iterable[_Finding]) -> list[str]:
    """Fold the remarks into one line for each kind: the first place, their number, and the next place."""
    kinds: dict[Hashable, list[_Finding]] = {}
    for finding in findings:
        kinds.setdefault(finding.kind, []).append(finding)
    lines = []
    for alike in kinds.values():
        first = alike[0]
        line = f"{first.place}: {first.text}" if first.place else first.text
        if len(alike) > 1:
            line += f" ({len(alike)} like this, the next is {alike[1].place})"
        lines.append(f"{line} {first.cure}".rstrip())
    return lines


def check_table(check: Check) -> str:
    """Table of the numbers of images and boxes of a sound dataset."""
    split = check.dataset.split
    lines = [
        f"{check.dataset.name}: {len(split.base)} base and {quantity(len(split.novel), 'novel name')}, nothing wrong"
    ]
    columns = ("images", "without_boxes", "base", "novel", "other", "crowd")
    lines.append("       " + "".join(f"{column.replace('_', ' '):>15}" for column in columns))
    lines += [
        f"{part.name:<7}" + "".join(f"{getattr(part, column):>15,}" for column in columns) for part in check.parts
    ]
    return "\n".join(lines)


def _file_findings(table: Table, split: Split, part: str) -> tuple[list[_Finding], list[_Finding]]:
    """Remarks on the file itself: faults that are refused, and impossible values that are never read."""
    names, may_lack = (split.base, ()) if part == "train" else (split.names, split.novel)
    faults = list(refusals(table, names, may_lack=may_lack))
    told = {(fault.place, fault.like) for fault in faults}
    others = [fault for fault in annotation_faults(table, None) if (fault.place, fault.like) not in told]
    known = [_of_fault(fault) for fault in others]
    return [_of_fault(fault) for fault in faults], [*known, *_near_names(table), *_empty_boxes(table)]


def _record_findings(table: Table, split: Split, part: str, masks: bool) -> tuple[list[_Finding], list[_Finding]]:
    """Remarks on a file whose entries are in order: those that are refused, and those only worth knowing."""
    refused: list[_Finding] = []
    known: list[_Finding] = []
    if part == "train":
        raw = raw_annotations(table, split.base)
        images = len(np.unique(refine(raw, keep_crowd=False).image_index))
        if too_few_to_hold_out(images):
            text = f"re-normalisation needs base boxes in at least 2 images, found them in {images}"
            refused.append(_Finding("annotations", f"{text}. Add boxes of base names.", "base boxes"))
    else:
        raw = raw_annotations(table, split.names, may_lack=split.novel)
        lines = unmeasured(refine(raw, keep_crowd=True), split, table.categories.name)
        known += [_Finding("", line, line) for line in lines]
    try:
        if part == "val":
            truth_of(table, split, raw)
        elif masks:
            table.catalogue()
    except AnnotationError as error:
        text = str(error).removeprefix(f"{table.path}: ")
        refused.append(_Finding("", text, text))
    return refused, known


def _near_names(table: Table) -> Iterator[_Finding]:
    """Names that differ only in case, blanks and signs."""
    like: dict[str, int] = {}
    for position, name in enumerate(table.categories.name):
        bare = re.sub(r"[\W_]+", "", name.casefold())
        first = like.setdefault(bare, position)
        other = table.categories.name[first]
        if name and canonical(other) != canonical(name):
            text = f"{name!r} is nearly categories[{first}].name, {other!r}. Join the two categories or rename one."
            yield _Finding(f"categories[{position}].name", text, "near names")


def _empty_boxes(table: Table) -> Iterator[_Finding]:
    """Boxes without any area within their image."""
    height, width = _image_sizes(table).T
    known = (height > 0) & table.sound("annotations", "bbox")
    xywh = np.array(table.annotations.xywh, dtype=np.float64).reshape(-1, 4)
    _, empty, outside = clip_boxes(xywh, width, height)
    for position in np.flatnonzero(known & empty):
        box = ", ".join(f"{value:g}" for value in xywh[position])
        wrong = (
            f"outside the image of {width[position]} x {height[position]}" if outside[position] else "without an area"
        )
        text = f"[{box}] is {wrong} and left out. Correct or remove the annotation."
        yield _Finding(f"annotations[{position}].bbox", text, ("empty box", bool(outside[position])))


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


def _mask_findings(table: Table, split: Split, part: str) -> list[_Finding]:
    """Outlines that are missing or not in order: of base objects to learn from, of all in the split to evaluate by."""
    columns, training = table.annotations, part == "train"
    names = split.base if training else split.names
    wanted = list(category_ids(table, names).values())
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
        text = f"all {count} outlines needed are missing or wrong, like {faults[0].place}: {faults[0]}"
        return [_Finding("annotations", text, "outlines")]
    return [_of_fault(fault) for fault in faults]


def _image_findings(
    table: Table, dataset: Dataset, part: str, decode: bool
) -> tuple[list[tuple[_Finding, bool]], dict[str, Reading]]:
    """Faults of the image files, True with those that are refused, and readings of the sound ones by file name.

    A few training images may be left out.
    """
    columns, source = table.images, dataset.images(part)
    found: list[tuple[_Finding, bool]] = []
    unreadable: list[_Finding] = []
    strange: set[int] = set()
    for fault in image_file_faults(columns.file_name, source):
        strange.add(fault.row)
        cure = "" if fault.kind == "double" else fitting(dataset, part, columns.file_name[fault.row])
        kind = _words(fault.text, columns.file_name[fault.row])
        finding = _Finding(f"images[{fault.row}].file_name", fault.text, kind, cure)
        if fault.kind == "missing":
            unreadable.append(finding)
        else:
            found.append((finding, True))
    entries = [
        entry
        for entry in zip(range(len(columns.id)), columns.file_name, columns.width, columns.height, strict=True)
        if entry[1] and entry[0] not in strange
    ]
    readings: dict[str, Reading] = {}
    look_at = partial(_image_problem, source, decode)
    with ThreadPoolExecutor(_READERS) as pool, Progress(f"check {part}", len(entries), unit="image") as progress:
        try:
            for entry, seen in zip(entries, pool.map(look_at, entries), strict=True):
                if isinstance(seen, Reading):
                    readings[entry[1]] = seen
                else:
                    place, _, text = seen.partition(": ")
                    unreadable.append(_Finding(place, text, _words(text, entry[1])))
                progress.advance()
        except BaseException:
            # Leaving the pool would wait until all are read.
            pool.shutdown(cancel_futures=True)
            raise
    allowed = most_bad_images(BuildConfig().max_bad_images, len(columns.id)) if part == "train" else 0
    return found + [(finding, len(unreadable) > allowed) for finding in unreadable], readings


def _words(text: str, file_name: str) -> str:
    """A message without the file and the numbers in it: the same for what has one cause."""
    return re.sub(r"\d+", "0", re.sub(rf"\S*{re.escape(file_name)}|'[^']*'", "", text))


def _image_problem(source: ImageSource, decode: bool, entry: tuple[int, str, int, int]) -> str | Reading:
    """Describe what is wrong with an image, or how it is read."""
    position, file_name, width, height = entry
    stated = (width, height) if width and height else None
    try:
        path = source.find(file_name)
        reading = look(path, stated, source.exif)
        if decode:
            read_pixels(path, None, source.exif)
    except (AnnotationError, ImageError) as error:
        return f"images[{position}].file_name: {error}"
    if stated:
        try:
            reading.require_size(path, stated, source.exif)
        except ImageError as error:
            return f"images[{position}]: {error}. Correct width and height, and the boxes if they go by them."
    return reading


def _reading_notes(readings: dict[str, Reading], exif: Exif) -> Iterator[str]:
    """Describe each way in which images are not read as they are stored, one line each with their number."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name, reading in readings.items():
        if reading.conversion:
            groups[f"have {reading.conversion}"].append(name)
        if reading.orientation > 1:
            groups[_orientation_note(reading, exif)].append(name)
    for text, names in groups.items():
        verb, _, rest = text.partition(" ")
        verb = _OF_ONE[verb] if len(names) == 1 else verb
        yield f"note: {len(names)} of {len(readings)} images {verb} {rest}; the first is {names[0]}"


_OF_ONE = {"have": "has", "are": "is"}
"""Verbs of a note about a single image."""


def _orientation_note(reading: Reading, exif: Exif) -> str:
    if exif == "ignore":
        return "have an EXIF orientation, which the dataset ignores"
    if not reading.turned:
        return "are not turned by the EXIF orientation, since only the stored size is the stated one"
    if reading.size != reading.stored:
        return "are turned by the EXIF orientation, as the stated size says"
    return (
        "are turned by the EXIF orientation, as viewers show them, and the stated size fits either way. If boxes go "
        'by the stored pixels, write exif = "ignore" at the top of the dataset\'s TOML file'
    )


def _count(table: Table, split: Split, name: str) -> Part:
    group = dict.fromkeys(category_ids(table, split.novel).values(), "novel")
    group |= dict.fromkeys(category_ids(table, split.base).values(), "base")
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
