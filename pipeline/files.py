"""JSON and text files, written atomically, and JSON read back. Loads no torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ezsd.cache import rename, write_atomic
from ezsd.errors import EzsdError
from ezsd.pipeline.errors import ArgumentError, DamagedFile


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object. DamagedFile when it holds something else."""
    return parse_object(path.read_bytes(), str(path))


def read_objects(path: Path) -> list[dict[str, Any]]:
    """Read a JSON file that holds a list of objects. DamagedFile when it holds something else."""
    found = _parse(path.read_bytes(), str(path))
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise DamagedFile(f"{path}: is damaged, expected a JSON list of objects")
    return found


def parse_object(text: bytes | str, where: str) -> dict[str, Any]:
    """Parse JSON that is an object; DamagedFile names `where` it was read."""
    found = _parse(text, where)
    if not isinstance(found, dict):
        raise DamagedFile(f"{where}: is damaged, expected a JSON object, found {type(found).__name__}")
    return found


@contextmanager
def reading(path: Path, cure: str) -> Iterator[None]:
    """Raise DamagedFile for values of a record that are not of the types that the context takes them for.

    Args:
        path: file of the record.
        cure: what to do about it, the end of the message.
    """
    try:
        yield
    except EzsdError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DamagedFile(f"{path}: is damaged, a value is not what it must be ({reason}); {cure}") from error


DEEPEST = 64
"""Most levels of JSON in JSON in a record of ezsd."""


def require_shallow(value: object, where: str) -> None:
    """DamagedFile for JSON that is nested deeper than any record: whatever walks through it would end in no good."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for one in level
            for inner in (one.values() if isinstance(one, dict) else one if isinstance(one, list) else ())
        ]
    if level:
        raise DamagedFile(f"{where}: is damaged, JSON nested deeper than {DEEPEST} levels")


def as_json(table: Mapping[str, object]) -> dict[str, Any]:
    """A table as it comes back from a JSON file: tuples become lists."""
    return parse_object(json.dumps(table), "table")


def _parse(text: bytes | str, where: str) -> object:
    try:
        found: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{where}: is damaged, not valid JSON: {error}") from error
    return found


def write_json(path: Path, value: object) -> None:
    """Write JSON: all of it or nothing."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file: all of it or nothing."""
    write_atomic(path, text.encode())


def require_new_folder(out: Path) -> None:
    """ArgumentError for a place where there is something already, or no folder can be; an empty folder is nothing."""
    above = next(place for place in out.absolute().parents if place.exists())
    wrong = {
        # Renaming a folder puts it in the place of another folder alone, not of a link to one.
        "is a link": out.is_symlink(),
        "is a file": out.is_file(),
        f"{above} is a file": not above.is_dir(),
        "is the folder you are in": out.exists() and out.samefile(Path.cwd()),
    }
    for what in (what for what, found in wrong.items() if found):
        raise ArgumentError(f"`out={out}`: {what}; choose another place")
    if out.exists() and any(out.iterdir()):
        raise ArgumentError(f"`out={out}`: is not empty; choose a new folder, or empty it")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which appears at `out` when it is whole, or not at all.

    What a killed process leaves is beside it, as `.NAME.partial`, and goes with the next start.
    """
    draft = out.absolute().with_name(f".{out.absolute().name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        rename(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
