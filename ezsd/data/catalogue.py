"""The class table of an annotation file, and what a federated file, as LVIS's are, leaves open.

In a federated file only some classes were looked for in an image. Those which were and are not there stand in the
image's `neg_category_ids`, those of which not all objects have a box in its `not_exhaustive_category_ids`; of a class
in no list and without a box nothing is known.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from ezsd.data.records import unfit
from ezsd.data.stream import FILE_CURE
from ezsd.errors import AnnotationError
from ezsd.vocabulary import canonical

_FEDERATED = "A federated file, as LVIS's are, has these lists in every image and a frequency in every category."
FREQUENCIES = ("r", "c", "f")
"""LVIS's groups: rare, common and frequent classes of its training split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Federated:
    """Class lists per image and ignored annotations of a federated file."""

    negative: dict[int, frozenset[int]] = field(default_factory=dict)
    """Category ids that were looked for and are not there, by image id."""
    not_exhaustive: dict[int, frozenset[int]] = field(default_factory=dict)
    """Category ids whose objects do not all have a box, by image id."""
    ignored: set[int] = field(default_factory=set)
    """Ids of annotations marked `ignore`."""
    empty: set[int] = field(default_factory=set)
    """Ids of annotations whose `area` is not above 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """Class names of a file."""

    ids: Mapping[str, int]
    """Category id by name, in the file's order."""
    frequency: Mapping[str, str]
    """LVIS's "r", "c" or "f" by name; empty unless the file is federated."""
    federated: Federated | None
    """None unless the file is federated."""

    def ids_of(self, names: Sequence[str]) -> list[int]:
        """The category id of each name, in any Unicode form; names that the file lacks get ids that it does not use."""
        known = {canonical(name): number for name, number in self.ids.items()}
        lacking = sorted({canonical(name) for name in names} - known.keys())
        known |= {name: number for number, name in enumerate(lacking, start=max(self.ids.values()) + 1)}
        return [known[canonical(name)] for name in names]

    def frequencies_of(self, names: Sequence[str]) -> list[str]:
        """LVIS's letter of each name, in any Unicode form; "" for names that the file lacks."""
        known = {canonical(name): letter for name, letter in self.frequency.items()}
        return [known.get(canonical(name), "") for name in names]


class CatalogueReader:
    """Makes the catalogue of a file from its entries, while others read them too.

    The rest of an entry is for others to check, and so what is wrong is not raised before the catalogue is asked for.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._categories: list[Mapping[str, object]] = []
        self._lists = Federated()
        self._bare: int | None = None
        self._wrong: AnnotationError | None = None

    def note(self, section: str, position: int, entry: object) -> None:
        """Take in the next entry of the list "images", "annotations" or "categories"."""
        if self._wrong is None:
            try:
                self._note(section, position, entry)
            except AnnotationError as error:
                self._wrong = error

    def _note(self, section: str, position: int, entry: object) -> None:
        if not isinstance(entry, dict):
            raise unfit(self._path, f"{section}[{position}]", "an object", reprlib.repr(entry), FILE_CURE)
        if section == "categories":
            name = entry.get("name")
            if not isinstance(name, str) or type(entry.get("id")) is not int:
                raise unfit(self._path, f"categories[{position}]", "a name and an id", reprlib.repr(entry), FILE_CURE)
            self._categories.append(entry)
        elif section == "annotations":
            _note_annotation(self._lists, entry)
        elif "neg_category_ids" in entry:
            number = entry.get("id")
            if type(number) is not int:
                raise unfit(self._path, f"images[{position}].id", "a whole number", reprlib.repr(number), FILE_CURE)
            self._lists.negative[number] = _numbers(self._path, position, entry, "neg_category_ids")
            self._lists.not_exhaustive[number] = _numbers(self._path, position, entry, "not_exhaustive_category_ids")
        elif self._bare is None:
            self._bare = position

    def catalogue(self) -> Catalogue:
        """The class table and the federated lists of the file.

        Raises:
            AnnotationError: an entry is not an object, or there is no class table; some images have federated lists and
                others none, a list holds something else than ids, or a category of a federated file has no frequency.
        """
        if self._wrong is not None:
            raise self._wrong
        if not self._categories:
            raise unfit(self._path, "categories", "a list of classes", "none", FILE_CURE)
        negative = self._lists.negative
        if negative and self._bare is not None:
            where = f"images[{self._bare}].neg_category_ids"
            raise _wrong(self._path, where, "a list, as other images of the file have", "nothing")
        return Catalogue(
            ids={str(entry["name"]): cast("int", entry["id"]) for entry in self._categories},
            frequency=_frequencies(self._path, self._categories) if negative else {},
            federated=self._lists if negative else None,
        )


def _note_annotation(lists: Federated, entry: Mapping[str, object]) -> None:
    number, area = entry.get("id"), entry.get("area")
    if isinstance(number, int):
        if entry.get("ignore"):
            lists.ignored.add(number)
        if isinstance(area, int | float) and not area > 0:
            lists.empty.add(number)


def _numbers(path: Path, position: int, entry: Mapping[str, object], key: str) -> frozenset[int]:
    value = entry.get(key)
    if not isinstance(value, list) or not all(type(number) is int for number in value):
        found = reprlib.repr(value) if key in entry else "nothing"
        raise _wrong(path, f"images[{position}].{key}", "a list of category ids", found)
    return frozenset(value)


def _frequencies(path: Path, categories: list[Mapping[str, object]]) -> dict[str, str]:
    found = {}
    for position, entry in enumerate(categories):
        frequency = entry.get("frequency")
        if frequency not in FREQUENCIES:
            said = reprlib.repr(frequency) if "frequency" in entry else "nothing"
            raise _wrong(path, f"categories[{position}].frequency", 'one of "r", "c", "f"', said)
        found[str(entry["name"])] = str(frequency)
    return found


def _wrong(path: Path, where: str, expected: str, found: str) -> AnnotationError:
    return unfit(path, where, expected, found, _FEDERATED)
