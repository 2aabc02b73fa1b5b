"""A COCO- or LVIS-format file as flat columns, and everything that is wrong with it.

The file is read once, entry by entry. A value that is not what it must be leaves a fault with its
place and stands as a zero in its column; nothing is raised before the whole file is read, so that
`ezsd data check` can list all faults, and loaders can ask for those of the classes they read.
"""

from __future__ import annotations

import math
import reprlib
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from ezsd.data.catalogue import Catalogue, CatalogueReader
from ezsd.data.records import unfit
from ezsd.data.stream import FILE_CURE, JsonError, JsonReader, is_finite, open_json
from ezsd.errors import AnnotationError
from ezsd.vocabulary import canonical, is_writable

Section = Literal["images", "annotations", "categories"]
SECTIONS: tuple[Section, ...] = ("images", "categories", "annotations")
"""The lists that are read, in the order in which their faults are told."""
Positions: TypeAlias = npt.NDArray[np.int64]

_INT64_MAX = 2**63 - 1
# Larger whole numbers are not exact in float32, and a box could then reach outside its image.
_EXTENT_MAX = 2**24


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A fault of an annotation file."""

    section: Section
    position: int
    """Position in its list; -1 for the list itself."""
    key: str
    """Key of the value; "" for the entry itself."""
    expected: str
    found: str
    cure: str
    kind: str = ""
    """Cause that faults of one key have in common; "" where the cure tells them apart."""

    @property
    def like(self) -> tuple[str, str, str]:
        """Value that is equal for faults with the same cause."""
        return self.section, self.key, self.kind or self.cure

    @property
    def place(self) -> str:
        """JSON path of the fault, such as annotations[17].bbox."""
        place = self.section if self.position < 0 else f"{self.section}[{self.position}]"
        return f"{place}.{self.key}" if self.key else place

    def error(self, file: Path) -> AnnotationError:
        """The fault as the one error of a loader; a plain exception, which pickles."""
        return AnnotationError(f"{file}: {self.place}: {self}")

    def __str__(self) -> str:
        stop = "" if self.found.endswith("?") else "."
        return f"expected {self.expected}, found {self.found}{stop} {self.cure}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageColumns:
    """The list `images` in the file's order, N of them."""

    id: array[int] = field(default_factory=lambda: array("q"))
    width: array[int] = field(default_factory=lambda: array("i"))
    height: array[int] = field(default_factory=lambda: array("i"))
    file_name: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class CategoryColumns:
    """The list `categories` in the file's order."""

    id: array[int] = field(default_factory=lambda: array("q"))
    name: list[str] = field(default_factory=list)
    frequency: list[str] = field(default_factory=list)
    """LVIS's "f", "c" or "r"; "" where the file has none."""
    supercategory: list[str] = field(default_factory=list)
    """"" where the file has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotationColumns:
    """The list `annotations` in the file's order."""

    id: array[int] = field(default_factory=lambda: array("q"))
    image_id: array[int] = field(default_factory=lambda: array("q"))
    category_id: array[int] = field(default_factory=lambda: array("q"))
    xywh: array[float] = field(default_factory=lambda: array("d"))
    """Four for each."""
    area: array[float] = field(default_factory=lambda: array("d"))
    """Pixels, as stated; NaN where no finite number from 0 on is."""
    crowd: array[int] = field(default_factory=lambda: array("b"))
    segmentation: list[object] = field(default_factory=list)
    """Part of each segmentation that `read_table` was told to keep; empty where it was told to keep none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """An annotation file as columns, with the faults of its single values."""

    path: Path
    images: ImageColumns = field(default_factory=ImageColumns)
    categories: CategoryColumns = field(default_factory=CategoryColumns)
    annotations: AnnotationColumns = field(default_factory=AnnotationColumns)
    faults: list[Fault] = field(default_factory=list)
    federated: CatalogueReader | None = None
    """Reader that has collected the catalogue; None unless the catalogue was asked for."""

    def catalogue(self) -> Catalogue:
        """The class table with the federated lists. AnnotationError, see `CatalogueReader.catalogue`."""
        assert self.federated is not None, "read_table was not asked for the catalogue"
        return self.federated.catalogue()

    def sound(self, section: Section, key: str) -> npt.NDArray[np.bool_]:
        """Mask of the entries of a list that have no fault in this key or as a whole."""
        sound = np.ones(len(getattr(self, section).id), dtype=np.bool_)
        for fault in self.faults:
            if fault.section == section and fault.position >= 0 and fault.key in ("", key):
                sound[fault.position] = False
        return sound


def read_table(path: Path, *, catalogue: bool = False, segmentation: Callable[[object], object] | None = None) -> Table:
    """Read a file into columns, in one pass for everything that is asked of it.

    Args:
        path: a COCO-format JSON file.
        catalogue: whether `Table.catalogue` is going to be asked for.
        segmentation: what to keep of the segmentation of an annotation, which is None where it has none; None keeps
            nothing.

    Raises:
        AnnotationError: the file cannot be read or is not an object in UTF-8 JSON without a byte order mark. Whatever
            else is wrong is among the table's faults.
    """
    table = Table(path=path, federated=CatalogueReader(path) if catalogue else None)
    seen: set[str] = set()
    with open_json(path) as reader:
        _read_document(reader, table, seen, segmentation)
    for section in SECTIONS:
        if section not in seen:
            table.faults.append(_list_fault(section, "nothing"))
    return table


def _read_document(
    reader: JsonReader, table: Table, seen: set[str], segmentation: Callable[[object], object] | None
) -> None:
    if reader.peek() not in ("{", ""):
        raise unfit(table.path, "$", "an object", reprlib.repr(reader.value()), FILE_CURE)
    for key in reader.members():
        _read_section(reader, key, table, seen, segmentation)
    if reader.peek():
        raise JsonError("something follows the outermost object")


def _read_section(
    reader: JsonReader, key: str, table: Table, seen: set[str], segmentation: Callable[[object], object] | None
) -> None:
    readers: dict[Section, Callable[[Table, _Entry], None]] = {
        "images": _read_image,
        "categories": _read_category,
        "annotations": _read_annotation,
    }
    if key in seen:
        raise JsonError(f"{key} stands there twice")
    section: Section | None = next((name for name in SECTIONS if name == key), None)
    if section is not None:
        seen.add(section)
    if reader.peek() != "[":
        value = reader.value()
        if section is not None:
            table.faults.append(_list_fault(section, reprlib.repr(value)))
        return
    # Lists that nobody asked for are walked over too, not held.
    for position, values in enumerate(reader.entries()):
        if section is None:
            continue
        readers[section](table, _Entry(table.faults, section, position, values))
        if table.federated is not None:
            table.federated.note(section, position, values)
        if segmentation is not None and section == "annotations":
            kept = segmentation(values.get("segmentation") if isinstance(values, dict) else None)
            table.annotations.segmentation.append(kept)


def _shown(value: object) -> str:
    """A value as it stands in the file, cut short."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else reprlib.repr(value)


class _Entry:
    """Reader of one entry of a list: a malformed value is recorded as a fault and replaced by zero."""

    __slots__ = ("faults", "position", "section", "values")

    def __init__(self, faults: list[Fault], section: Section, position: int, values: object) -> None:
        self.faults, self.section, self.position = faults, section, position
        if isinstance(values, dict):
            self.values: Mapping[str, object] = values
        else:
            self.values = {}
            cure = f"A COCO-format file has lists images, annotations and categories; correct {section}."
            self._fault("", "an object", reprlib.repr(values), cure)

    def _fault(self, key: str, expected: str, found: str, cure: str) -> None:
        last = self.faults[-1] if self.faults else None
        # An entry that is no object has nothing; what it lacks goes without saying.
        if last is not None and (last.section, last.position, last.key) == (self.section, self.position, ""):
            return
        self.faults.append(
            Fault(section=self.section, position=self.position, key=key, expected=expected, found=found, cure=cure)
        )

    def _wrong(self, key: str, expected: str, cure: str) -> None:
        found = _shown(self.values[key]) if key in self.values else "nothing"
        self._fault(key, expected, found, cure)

    def integer(self, key: str, low: int = -_INT64_MAX, high: int = _INT64_MAX) -> int:
        """A whole number; texts, fractions and truth values are faults, not converted."""
        value = self.values.get(key)
        if type(value) is int and low <= value <= high:
            return value
        limits = " of at most 64 bits" if high == _INT64_MAX else f" from {low} to {high}"
        limits = " from 0 on, of at most 64 bits" if low == 0 and high == _INT64_MAX else limits
        self._wrong(key, f"a whole number{limits}", self._number_cure(key))
        return 0

    def _number_cure(self, key: str) -> str:
        """Advice about a value that is not a whole number within its limits, by the kind of value found."""
        value = self.values.get(key)
        if value is None and key in ("width", "height"):
            return f"Write the image's {key} in pixels."
        if value is None:
            return f"Give every entry of {self.section} its {key}."
        if isinstance(value, str):
            return "Write it as a plain number, without quotes."
        if isinstance(value, float) and value.is_integer():
            return "Write it without a decimal point."
        if type(value) is int:
            return "Correct the number."
        return "Write a whole number."

    def text(self, key: str) -> str:
        """A text that is not blank."""
        value = self.values.get(key)
        if isinstance(value, str) and value.strip():
            return value
        number = isinstance(value, int | float)
        cure = "Write it in quotes." if number else f"Give every entry of {self.section} its {key}."
        self._wrong(key, "a text that is not empty", cure)
        return ""

    def name(self) -> str:
        """The name of a class."""
        name = self.text("name")
        if is_writable(name):
            return name
        self._wrong("name", "a text of whole characters", "It holds half a character (a lone surrogate); rename it.")
        return ""

    def file_name(self) -> str:
        """COCO's file_name; LVIS has an address instead, whose last two parts are folder and file."""
        address = self.values.get("coco_url")
        if "file_name" not in self.values and isinstance(address, str) and address.count("/") >= 2:
            return "/".join(address.rsplit("/", 2)[1:])
        return self.text("file_name")

    def flag(self, key: str) -> bool:
        """A 0 or 1; a missing one is 0, since many tools leave it out."""
        value = self.values.get(key, 0)
        if isinstance(value, int) and value in (0, 1):
            return bool(value)
        self._wrong(key, "0 or 1", "Write 1 for a box around a group, else 0.")
        return False

    def area(self) -> float:
        """The stated area; NaN where there is none, or none that an area can be."""
        value = self.values.get("area")
        return float(value) if is_finite(value) and value >= 0 else math.nan

    def box(self, key: str) -> tuple[float, float, float, float]:
        """Four finite numbers."""
        value = self.values.get(key)
        if isinstance(value, list) and len(value) == 4 and all(map(is_finite, value)):
            left, top, width, height = value
            return float(left), float(top), float(width), float(height)
        self._wrong(key, "four finite numbers: left, top, width, height", "Correct or remove the annotation.")
        return 0.0, 0.0, 0.0, 0.0


def _read_image(table: Table, entry: _Entry) -> None:
    columns = table.images
    columns.id.append(entry.integer("id", low=0))
    columns.file_name.append(entry.file_name())
    columns.width.append(entry.integer("width", low=1, high=_EXTENT_MAX))
    columns.height.append(entry.integer("height", low=1, high=_EXTENT_MAX))


def _read_category(table: Table, entry: _Entry) -> None:
    columns = table.categories
    columns.id.append(entry.integer("id"))
    columns.name.append(entry.name())
    for values, key in ((columns.frequency, "frequency"), (columns.supercategory, "supercategory")):
        value = entry.values.get(key, "")
        values.append(value if isinstance(value, str) else "")


def _read_annotation(table: Table, entry: _Entry) -> None:
    columns = table.annotations
    columns.category_id.append(entry.integer("category_id"))
    columns.id.append(entry.integer("id"))
    columns.image_id.append(entry.integer("image_id"))
    columns.xywh.extend(entry.box("bbox"))
    columns.area.append(entry.area())
    columns.crowd.append(entry.flag("iscrowd"))


def image_faults(table: Table) -> Iterator[Fault]:
    """Find the faults of the list `images`."""
    yield from _of(table, "images")
    yield from _doubles(table, "images", np.arange(len(table.images.id)))


def category_faults(table: Table) -> Iterator[Fault]:
    """Find the faults of the list `categories`: an id or a name that is repeated."""
    yield from _of(table, "categories")
    columns, first = table.categories, dict[str, int]()
    names = [canonical(name) for name in columns.name]
    double = [position for position, name in enumerate(names) if name and first.setdefault(name, position) != position]
    again = [position for position in double if columns.id[position] == columns.id[first[names[position]]]]
    yield from _doubles(table, "categories", np.setdiff1d(np.arange(len(names)), again))
    unused = set(range(len(names))) - set(used_categories(table))
    for position in double:
        earlier = first[names[position]]
        where, cure, kind = f"categories[{earlier}]", "Join the two categories or rename one.", ""
        if position in again:
            cure = kind = "It is the same category again: keep one entry."
        elif unused & {position, earlier}:
            one = min(unused & {position, earlier})
            root = ""
            if any(canonical(other) == names[one] for other in columns.supercategory):
                root = " and is only the supercategory of others"
            cure, kind = f"categories[{one}] has no box{root}: remove that entry.", "unused"
        yield Fault(
            section="categories",
            position=position,
            key="name",
            expected=f"a name different from {where}.name",
            found=repr(columns.name[position]),
            cure=cure,
            kind=kind,
        )


def used_categories(table: Table) -> list[int]:
    """Positions in `categories` of those that an annotation is of."""
    stated = np.array(table.annotations.category_id, dtype=np.int64)
    used = set(stated[table.sound("annotations", "category_id")].tolist())
    return [position for position, number in enumerate(table.categories.id) if number in used]


def annotation_faults(table: Table, classes: Positions | None) -> Iterator[Fault]:
    """Find the faults of the annotations of some classes.

    Args:
        table: the file.
        classes: category ids; None for all. Of annotations of other classes only `category_id` is checked, so that
            training cannot notice anything about novel boxes, right or wrong.
    """
    columns = table.annotations
    category = np.array(columns.category_id)
    known = table.sound("annotations", "category_id")
    asked = known if classes is None else known & np.isin(category, classes)
    for fault in _of(table, "annotations"):
        if fault.position < 0 or fault.key in ("", "category_id") or asked[fault.position]:
            yield fault
    yield from _dangling(table, "category_id", "categories", np.flatnonzero(known))
    rows = np.flatnonzero(asked)
    yield from _doubles(table, "annotations", rows)
    yield from _dangling(table, "image_id", "images", rows)


def _of(table: Table, section: Section) -> Iterator[Fault]:
    return (fault for fault in table.faults if fault.section == section)


def _doubles(table: Table, section: Section, rows: Positions) -> Iterator[Fault]:
    """Ids that an earlier one of the rows has."""
    rows = rows[table.sound(section, "id")[rows]]
    ids = np.array(getattr(table, section).id, dtype=np.int64)[rows]
    unique, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    for again in np.flatnonzero(first[inverse] != np.arange(len(ids))):
        where = f"{section}[{rows[first[inverse[again]]]}].id"
        yield Fault(
            section=section,
            position=int(rows[again]),
            key="id",
            expected=f"an id different from {where}",
            found=str(unique[inverse[again]]),
            cure="Give every entry an id of its own.",
        )


def _dangling(
    table: Table, key: Literal["category_id", "image_id"], section: Section, rows: Positions
) -> Iterator[Fault]:
    """References of annotations to entries that are not there."""
    if any(fault.position < 0 for fault in _of(table, section)):
        return
    rows = rows[table.sound("annotations", key)[rows]]
    values = np.array(getattr(table.annotations, key), dtype=np.int64)[rows]
    for wrong in np.flatnonzero(~np.isin(values, np.array(getattr(table, section).id, dtype=np.int64))):
        yield Fault(
            section="annotations",
            position=int(rows[wrong]),
            key=key,
            expected=f"the id of an entry of {section}",
            found=str(values[wrong]),
            cure=f"Add the entry to {section}, correct the id or remove the annotation.",
        )


def _list_fault(section: Section, found: str) -> Fault:
    cure = f"A COCO-format file has lists images, annotations and categories; correct {section}."
    return Fault(section=section, position=-1, key="", expected="a list of objects", found=found, cure=cure)
