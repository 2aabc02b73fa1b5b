"""Documents of results with ids of their own: images are matched by file name and classes by name."""

from __future__ import annotations

import reprlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from ezsd.vocabulary import canonical, suggest

_CURE = "A document of results has lists images, categories and annotations, as `ezsd detect --json` prints."


class DocumentError(ValueError):
    """A document of results is not in order, or does not fit the annotation file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """File names and class names of an annotation file."""

    file_names: Mapping[int, str]
    """File name by image id."""
    categories: Mapping[str, int]
    """Category id by name."""


def renumbered(
    document: Mapping[str, object], named: Named, sizes: Mapping[int, tuple[int, int]], *, classes: bool
) -> tuple[list[object], frozenset[int]]:
    """Give the `annotations` of a document of results the ids that an annotation file has for images and classes.

    Also returns the category ids of the file that the document has a class of: the classes that were searched.

    A file name fits another that is the same or its end, folder by folder: "photos/a/1.jpg" fits "a/1.jpg" and
    "1.jpg". The longest fit counts. Names of classes are compared as `ezsd.vocabulary` does.

    Args:
        document: as JSON has it.
        named: file names and class names of the annotation file.
        sizes: height and width of each of its images, by id.
        classes: True to convert category ids too.

    Raises:
        DocumentError: a list is missing or not in order; an image fits none or several of the file's, or has
            another size than there; a detection is of an image or class that the document or the file does not have.
    """
    images = _image_ids(document, named, sizes)
    labels = _names(document) if classes else {}
    known = {canonical(name): number for name, number in named.categories.items()}
    entries: list[object] = []
    for position, entry in enumerate(_list(document, "annotations")):
        if not isinstance(entry, dict):
            entries.append(entry)
            continue
        place = f"annotations[{position}]"
        ids = {"image_id": images[_listed_id(entry, "image_id", images, f"{place}.image_id", "images")]}
        if classes:
            label = labels[_listed_id(entry, "category_id", labels, f"{place}.category_id", "categories")]
            if canonical(label) not in known:
                near = suggest(label, list(named.categories))
                raise DocumentError(f"{place}: is of class {label!r}, which the annotation file does not have; {near}")
            ids["category_id"] = known[canonical(label)]
        entries.append(entry | ids)
    return entries, frozenset(known[canonical(label)] for label in labels.values() if canonical(label) in known)


def _image_ids(document: Mapping[str, object], named: Named, sizes: Mapping[int, tuple[int, int]]) -> dict[int, int]:
    """Ids of images in the annotation file by their ids in the document."""
    by_last: defaultdict[str, list[tuple[tuple[str, ...], int]]] = defaultdict(list)
    for number, file_name in named.file_names.items():
        parts = _parts(file_name)
        by_last[parts[-1] if parts else ""].append((parts, number))
    found: dict[int, int] = {}
    taken: dict[int, str] = {}
    for position, entry in enumerate(_list(document, "images")):
        place = f"images[{position}]"
        image = _object(entry, place)
        document_id, name = _id(image, place, found), _text(image, "file_name", place)
        number = _fit(name, place, by_last)
        if number in taken:
            raise DocumentError(
                f"{place}.file_name: {name!r} and {taken[number]!r} are both {named.file_names[number]!r} of the "
                "annotation file; expected one result for each of its images"
            )
        _require_size(image, place, sizes[number])
        taken[number] = name
        found[document_id] = number
    return found


def _fit(name: str, place: str, by_last: Mapping[str, list[tuple[tuple[str, ...], int]]]) -> int:
    """Id of the image whose file name fits best."""
    wanted = _parts(name)
    fits = [
        (parts, number) for parts, number in by_last.get(wanted[-1] if wanted else "", []) if _ends_alike(wanted, parts)
    ]
    # Those that are the document's name or its end, else those of which it is the end.
    inner = [(len(parts), number) for parts, number in fits if len(parts) <= len(wanted)]
    longest = max((length for length, _ in inner), default=0)
    best = [number for length, number in inner if length == longest] or [number for _, number in fits]
    if len(best) != 1:
        what = f"{len(best)} images" if best else "no image"
        raise DocumentError(
            f"{place}.file_name: {name!r} fits {what} of the annotation file; expected one with the same file name, "
            "or the same end of its path"
        )
    return best[0]


def _ends_alike(first: tuple[str, ...], second: tuple[str, ...]) -> bool:
    length = min(len(first), len(second))
    return first[-length:] == second[-length:]


def _parts(file_name: str) -> tuple[str, ...]:
    return tuple(part for part in canonical(file_name).split("/") if part not in ("", "."))


def _require_size(entry: Mapping[str, object], place: str, size: tuple[int, int]) -> None:
    """Refuse an image of another size: its boxes are in another frame, such as that of an image not turned."""
    stated = (entry.get("height", size[0]), entry.get("width", size[1]))
    if stated != size:
        raise DocumentError(
            f"{place}: is {stated[1]} x {stated[0]} pixels, in the annotation file {size[1]} x {size[0]}; boxes of "
            "another frame cannot be compared"
        )


def _names(document: Mapping[str, object]) -> dict[int, str]:
    found: dict[int, str] = {}
    for position, entry in enumerate(_list(document, "categories")):
        place = f"categories[{position}]"
        category = _object(entry, place)
        found[_id(category, place, found)] = _text(category, "name", place)
    return found


def _list(document: Mapping[str, object], key: str) -> list[object]:
    value = document.get(key)
    if not isinstance(value, list):
        raise DocumentError(f"{key}: expected a list, found {_shown(document, key)}. {_CURE}")
    return value


def _object(entry: object, place: str) -> Mapping[str, object]:
    if not isinstance(entry, dict):
        raise DocumentError(f"{place}: expected an object, found {reprlib.repr(entry)}. {_CURE}")
    return entry


def _id(entry: Mapping[str, object], place: str, taken: Mapping[int, object]) -> int:
    number = entry.get("id")
    if type(number) is not int or number in taken:
        raise DocumentError(f"{place}.id: expected a whole number of its own, found {_shown(entry, 'id')}")
    return number


def _text(entry: Mapping[str, object], key: str, place: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        raise DocumentError(f"{place}.{key}: expected a name, found {_shown(entry, key)}. {_CURE}")
    return value


def _listed_id(entry: Mapping[str, object], key: str, listed: Mapping[int, object], place: str, section: str) -> int:
    number = entry.get(key)
    if type(number) is not int or number not in listed:
        raise DocumentError(
            f"{place}: expected the id of one of the {section} of this file, found {_shown(entry, key)}"
        )
    return number


def _shown(entry: Mapping[str, object], key: str) -> str:
    return reprlib.repr(entry[key]) if key in entry else "nothing"
