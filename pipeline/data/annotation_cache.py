"""Annotations parsed once: flat arrays in a cache folder, memory-mapped by every process after that.

What is kept is what a loader of `ezsd.data.annotations` returned, so the arrays of a training record hold base boxes
and nothing of others. A record's key is the content of the JSON, the names asked for and the loader: a changed file is
parsed anew, a moved or copied one is not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ezsd.cache import file_digest
from ezsd.data.annotations import Annotations, ImageTable, load_training, raw_annotations
from ezsd.data.coco_json import Table, category_faults, read_table, used_categories
from ezsd.data.records import refine
from ezsd.errors import AnnotationError
from ezsd.metrics.ground_truth import truth_of
from ezsd.vocabulary import Split, canonical

log = logging.getLogger("ezsd")

LAYOUT = 1
"""Version of the folders' layout; files of another version are not looked for."""
CATEGORY_LAYOUT = 3
"""Version of the layout of the class tables."""

_IMAGES = tuple(field.name for field in fields(ImageTable))
_BOXES = ("image_index", "box", "class_index", "annotation_id", "crowd")


def training_annotations(path: Path, split: Split) -> Annotations:
    """Load training annotations, parsed once per content of the file; see `load_training`."""
    return _remembered(path, ["training", split.base], lambda: load_training(path, split))


def evaluation_annotations(path: Path, split: Split) -> Annotations:
    """Load the annotations of a file that can be used for evaluation, parsed once per content; see `load_evaluation`.

    Raises:
        AnnotationError: see `ezsd.metrics.read_truth`.
    """

    def load() -> Annotations:
        table = read_table(path, catalogue=True)
        raw = raw_annotations(table, split.names, may_lack=split.novel)
        truth_of(table, split, raw)
        return refine(raw, keep_crowd=True)

    return _remembered(path, ["evaluation", split.base, split.novel], load)


@dataclass(frozen=True, slots=True)
class Category:
    """An entry of a file's class table."""

    id: int
    name: str
    frequency: str
    """LVIS's "f", "c" or "r"; "" where the file has none."""
    supercategory: str
    """"" where the file has none."""
    used: bool
    """True if the class has an annotation."""


def sound_categories(path: Path) -> list[Category]:
    """Read the categories of a file that may be faulty; entries without a name are left out.

    Raises:
        AnnotationError: the file cannot be read at all.
    """
    return [category for category in _categories(read_table(path)) if category.name]


def _categories(table: Table) -> list[Category]:
    """Categories of a table, by id."""
    columns, used = table.categories, set(used_categories(table))
    order = sorted(range(len(columns.id)), key=lambda position: (columns.id[position], columns.name[position]))
    return [
        Category(columns.id[at], columns.name[at], columns.frequency[at], columns.supercategory[at], at in used)
        for at in order
    ]


def category_ids(path: Path, names: Iterable[str]) -> set[int]:
    """Category ids of a file that have one of some names. AnnotationError, see `read_categories`."""
    known = set(map(canonical, names))
    return {category.id for category in read_categories(path) if canonical(category.name) in known}


def read_categories(path: Path) -> list[Category]:
    """The class table of a file, by category id, read once per content of the file.

    Raises:
        AnnotationError: the file or its table is not in order.
    """
    content = _content(path)
    kept = parsed_folder() / f"{content[:32]}-categories-{CATEGORY_LAYOUT}.json"
    if kept.is_file():
        try:
            return [Category(**entry) for entry in json.loads(kept.read_text())]
        except (ValueError, TypeError) as error:
            log.warning("%s: damaged (%s), parsing %s again", kept, error, path)
    table = read_table(path)
    for fault in category_faults(table):
        raise fault.error(path)
    found = _categories(table)
    with _writing(kept.parent):
        draft = Path(tempfile.mkdtemp(prefix="draft-", dir=kept.parent))
        (draft / kept.name).write_text(json.dumps([asdict(category) for category in found]))
        (draft / kept.name).replace(kept)
        draft.rmdir()
    return found


def parsed_folder() -> Path:
    """Folder of the parsed annotations: below EZSD_CACHE_DIR, else the user's cache folder."""
    own = os.environ.get("EZSD_CACHE_DIR")
    if own:
        return Path(own) / "annotations"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ezsd" / "annotations"


def _remembered(path: Path, asked: Sequence[object], load: Callable[[], Annotations]) -> Annotations:
    def fill(draft: Path) -> Mapping[str, object]:
        record = load()
        for name, values in _arrays(record).items():
            np.save(draft / f"{name}.npy", values, allow_pickle=False)
        return {"names": record.names, "dropped": dict(record.dropped), "absent": record.absent}

    _, meta, arrays = kept_arrays(path, asked, fill)
    return Annotations(
        images=ImageTable(**{name: arrays[f"images_{name}"] for name in _IMAGES}),
        names=tuple(meta["names"]),
        dropped=meta["dropped"],
        # Records of training that earlier versions kept have none.
        absent=tuple(meta.get("absent", ())),
        **{name: arrays[name] for name in _BOXES},
    )


def kept_arrays(
    path: Path, asked: Sequence[object], fill: Callable[[Path], Mapping[str, object]]
) -> tuple[Path, dict[str, Any], dict[str, NDArray[Any]]]:
    """Arrays made once per content of a file, memory-mapped.

    Args:
        path: the file.
        asked: what they depend on beside it, for JSON.
        fill: makes them: writes .npy files into the folder given and returns what else there is to know, for JSON.

    Returns:
        Folder of the arrays, the other values for JSON, and the arrays by name.

    Raises:
        AnnotationError: the file cannot be read, or the arrays cannot be kept.
    """
    content = _content(path)
    key = hashlib.sha256(json.dumps([LAYOUT, *asked]).encode()).hexdigest()
    folder = parsed_folder() / f"{content[:32]}-{key[:16]}"
    if folder.is_dir():
        try:
            return folder, *_open(folder)
        except (OSError, ValueError, KeyError) as error:
            log.warning("%s: damaged (%s), parsing %s again", folder, error, path)
            shutil.rmtree(folder, ignore_errors=True)
    _write(folder, fill)
    return folder, *_open(folder)


def _content(path: Path) -> str:
    try:
        return file_digest(path).sha256
    except OSError as error:
        cure = "Give the path of a COCO-format annotation file."
        raise AnnotationError(
            f"{path}: the file: expected a readable file, found {error.strerror or error}. {cure}"
        ) from error


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Makes the folder; whatever cannot be written in it is told with the way out."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise AnnotationError(
            f"{folder}: parsed annotations cannot be kept there ({error.strerror or error}); "
            f"set EZSD_CACHE_DIR to a folder that can be written"
        ) from error


def _checksum(values: NDArray[np.generic]) -> int:
    return zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)


def _arrays(record: Annotations) -> dict[str, NDArray[np.generic]]:
    own = {name: getattr(record, name) for name in _BOXES}
    return own | {f"images_{name}": getattr(record.images, name) for name in _IMAGES}


def _write(folder: Path, fill: Callable[[Path], Mapping[str, object]]) -> None:
    """All arrays, then a rename: a folder is whole or not there."""
    with _writing(folder.parent), tempfile.TemporaryDirectory(prefix="draft-", dir=folder.parent) as made:
        draft = Path(made) / "record"
        draft.mkdir()
        meta = dict(fill(draft))
        meta["crc32"] = {
            file.stem: _checksum(np.load(file, mmap_mode="r", allow_pickle=False))
            for file in sorted(draft.glob("*.npy"))
        }
        (draft / "record.json").write_text(json.dumps(meta))
        try:
            draft.rename(folder)
        except OSError:
            # Another process may have been quicker with the same content.
            if not folder.is_dir():
                raise


def _open(folder: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    meta = json.loads((folder / "record.json").read_text())
    arrays = {}
    for name, checksum in meta["crc32"].items():
        # Copy on write: torch takes no read-only array without a warning, and the file stays as it is.
        values = np.load(folder / f"{name}.npy", mmap_mode="c", allow_pickle=False)
        # No fsync was made: after a power cut a folder may be there without all its bytes.
        if _checksum(values) != checksum:
            raise ValueError(f"{name}.npy has another checksum")
        arrays[name] = values
    return meta, arrays
