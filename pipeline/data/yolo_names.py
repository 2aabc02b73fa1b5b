"""Class names of YOLO labels, which have numbers: from data.yaml, or from a text file."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from pathlib import Path

import yaml

from ezsd.data.label_file import read_label_file
from ezsd.data.records import unfit
from ezsd.errors import VocabularyError
from ezsd.pipeline.data.labelled_folder import Part
from ezsd.pipeline.errors import DatasetError
from ezsd.vocabulary import require_characters, require_different

_YAML = (".yaml", ".yml")
_FILES = ("data.yaml", "data.yml", "dataset.yaml", "classes.txt", "obj.names")
"""Files that name the classes, in the order in which they are looked for."""
_CURE = "Write the names in the order of their numbers, in UTF-8."


def find_names(root: Path, parts: Sequence[Part]) -> Path:
    """The file with the class names: beside the folders of images and labels, or among the labels.

    Raises:
        DatasetError: there is none.
    """
    places = [root, *(part.labels for part in parts)]
    found = next((place / name for name in _FILES for place in places if (place / name).is_file()), None)
    if found is None:
        raise DatasetError(f"{root}: no class names: expected one of {', '.join(_FILES)} in it; give `names=FILE`")
    return found


def read_names(path: Path) -> tuple[str, ...]:
    """Class names by number.

    Args:
        path: YAML with a list or a numbered table `names`, as ultralytics has it, or text with one name a line.

    Raises:
        AnnotationError: the file cannot be read, or is not as it must be.
    """
    data = read_label_file(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise unfit(path, "the file", "text in UTF-8", f"something else ({error})", _CURE) from error
    if path.suffix.lower() in _YAML:
        names = _from_yaml(path, text)
    else:
        # A blank line would move all names behind it.
        names = [line.strip() for line in text.rstrip().splitlines()]
    if not names:
        raise unfit(path, "names", "class names", "none", _CURE)
    try:
        require_different(names)
        for name in names:
            require_characters(name)
    except VocabularyError as error:
        raise unfit(path, "names", "different names", f"others ({error})", _CURE) from error
    return tuple(names)


def _from_yaml(path: Path, text: str) -> list[str]:
    try:
        document = yaml.safe_load(text)
    # ValueError: a date that is none.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise unfit(path, "the file", "YAML", f"something else ({reason})", _CURE) from error
    names = document.get("names") if isinstance(document, dict) else None
    if isinstance(names, dict) and set(names) == set(range(len(names))):
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list):
        expected = "a list of names, or a table of them numbered from 0"
        raise unfit(path, "names", expected, reprlib.repr(names), _CURE)
    for number, name in enumerate(names):
        if not isinstance(name, str):
            raise unfit(path, f"names[{number}]", "a text", repr(name)[:40], "Write it in quotes.")
    count = document.get("nc", len(names))
    if count != len(names):
        raise unfit(path, "nc", f"{len(names)}, the number of names", reprlib.repr(count), _CURE)
    return names
