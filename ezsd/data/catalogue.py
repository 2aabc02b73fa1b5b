"""The class table of an annotation file, and what a federated file, as LVIS's are, leaves open.

In a federated file only some classes were looked for in an image. Those which were and are not there stand in the
image's `neg_category_ids`, those of which not all objects have a box in its `not_exhaustive_category_ids`; of a class
in no list and without a box nothing is known.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from ezsd.data.records import unfit
from ezsd.data.stream import FILE_CURE, open_json
from ezsd.errors import AnnotationError
from ezsd.vocabulary import canonical

_FEDERATED = "A federated file, as LVIS's are, has these lists in every image and a frequency in every category."
FREQUENCIES = ("r", "c", "f")
"""LVIS's groups: rare, common and frequent classes of its training split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Federated:
    """What the lists of a federated file say."""

    negative: dict[int, frozenset[int]] = field(default_factory=dict)
    """By image id the category ids that were looked for and are not there."""
    not_exhaustive: dict[int, frozenset[int]] = field(default_factory=dict)
    """By image id the category ids of which not all objects have a box."""
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


def read_catalogue(path: Path) -> Catalogue:
    """Read the class table and the federated lists of a file; the rest of it is for `read_raw` to check.

    Raises:
        AnnotationError: the file cannot be read, is not valid JSON or has no class table; some images have federated
            lists and others none, a list holds something else than ids, or a category of a federated file has no
            frequency.
    """
    categories: list[Mapping[str, object]] = []
    lists = Federated()
    bare: int | None = None
    for section, position, entry in _entries(path):
        if section == "categories":
            name = entry.get("name")
            if not isinstance(name, str) or type(entry.get("id")) is not int:
                raise unfit(path, f"categories[{position}]", "a name and an id", reprlib.repr(entry), FILE_CURE)
            categories.append(entry)
        elif section == "annotations":
            _note_annotation(lists, entry)
        elif "neg_category_ids" in entry:
            number = entry.get("id")
            if type(number) is not int:
                raise unfit(path, f"images[{position}].id", "a whole number", reprlib.repr(number), FILE_CURE)
            lists.negative[number] = _numbers(path, position, entry, "neg_category_ids")
            lists.not_exhaustive[number] = _numbers(path, position, entry, "not_exhaustive_category_ids")
        else:
            bare = position if bare is None else bare
    if not categories:
        raise unfit(path, "categories", "a list of classes", "none", FILE_CURE)
    if lists.negative and bare is not None:
        raise _wrong(path, f"images[{bare}].neg_category_ids", "a list, as other images of the file have", "nothing")
    federated = lists if lists.negative else None
    return Catalogue(
        ids={str(entry["name"]): cast("int", entry["id"]) for entry in categories},
        frequency=_frequencies(path, categories) if federated else {},
        federated=federated,
    )


def _entries(path: Path) -> Iterator[tuple[str, int, Mapping[str, object]]]:
    """Section, position and values of each object of the file's three lists."""
    with open_json(path) as reader:
        for section in reader.members():
            if section not in ("images", "annotations", "categories") or reader.peek() != "[":
                reader.value()
                continue
            for position, entry in enumerate(reader.entries()):
                if not isinstance(entry, dict):
                    raise unfit(path, f"{section}[{position}]", "an object", reprlib.repr(entry), FILE_CURE)
                yield section, position, entry


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
