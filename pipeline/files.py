"""Files written whole or not at all, JSON read back, and digests. Loads no torch."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ezsd.pipeline.errors import DamagedFile


def read_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. DamagedFile when it holds something else."""
    return parse_object(path.read_bytes(), str(path))


def read_objects(path: Path) -> list[dict[str, Any]]:
    """The objects that a JSON file lists. DamagedFile when it holds something else."""
    found = _parse(path.read_bytes(), str(path))
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise DamagedFile(f"{path}: is damaged, expected a JSON list of objects")
    return found


def parse_object(text: bytes | str, where: str) -> dict[str, Any]:
    """The object that JSON says; DamagedFile names `where` it should have been."""
    found = _parse(text, where)
    if not isinstance(found, dict):
        raise DamagedFile(f"{where}: is damaged, expected a JSON object, found {type(found).__name__}")
    return found


def _parse(text: bytes | str, where: str) -> object:
    try:
        found: object = json.loads(text)
    except ValueError as error:
        raise DamagedFile(f"{where}: is damaged, not valid JSON: {error}") from error
    return found


def write_json(path: Path, value: object) -> None:
    """Write JSON: all of it or nothing."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file: all of it or nothing."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file: all of it or nothing. OSError names it, where the system's does not."""
    scratch = path.with_name(f".{path.name}.partial")
    try:
        scratch.write_bytes(content)
        fsync(scratch)
        scratch.rename(path)
    except OSError as error:
        if scratch.is_file():
            scratch.unlink()
        if error.filename is None:
            error.filename = str(path)
        raise


def fsync(path: Path) -> None:
    """Return once a file, or a folder's table of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
