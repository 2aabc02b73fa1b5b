"""Comparison of two stores: fingerprints by name, then content file by file."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ezsd.cache.files import FileDigest
from ezsd.cache.format.manifest import Manifest
from ezsd.cache.format.sealed_json import Difference
from ezsd.cache.storage.locations import find_place, read_manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two complete stores compared, from what they say about themselves: no array is read."""

    settings: tuple[Difference, ...]
    """The values of their manifests in which they differ, by dotted name."""
    same_fingerprint: tuple[str, ...]
    """Products made from the same things in the same way."""
    content: tuple[str, ...]
    """Arrays and other files that differ or that only one of the stores has, one line each."""


def compare(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> Comparison:
    """Compare two complete stores, each a folder or a URL.

    Raises:
        StoreError: one of them is not a store, is not finished, cannot be reached, or its manifest is damaged.
    """
    (left, left_files), (right, right_files) = _read(first), _read(second)
    return Comparison(
        settings=tuple(left.differences(right)),
        same_fingerprint=left.same_products(right),
        content=tuple(_content(left_files, right_files)),
    )


def _read(path: str | os.PathLike[str]) -> tuple[Manifest, Mapping[str, FileDigest]]:
    place = find_place(path)
    mark = place.mark()
    return read_manifest(place, mark), mark.files


def _content(left: Mapping[str, FileDigest], right: Mapping[str, FileDigest]) -> list[str]:
    lines: dict[str, list[str]] = {}
    for name in sorted(left.keys() | right.keys()):
        if left.get(name) == right.get(name):
            continue
        array, is_shard, place = name.partition("/c/")
        only = "" if name in left and name in right else f" (only in the {'first' if name in left else 'second'})"
        lines.setdefault(array, []).append(f"shard {place.partition('/')[0]}{only}" if is_shard else f"differs{only}")
    return [f"{name}: {', '.join(parts)}" for name, parts in lines.items()]
