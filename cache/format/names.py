"""Names of a store's files, and their allowed places.

Their names are written by whoever made the store, and are not trusted: only the names that the format knows are taken,
and no link on the way to a file may lead out of the store's folder.
"""

import errno
import os
import re
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path

from ezsd.cache.errors import StoreError
from ezsd.cache.files import unreadable
from ezsd.cache.format.schema import CHECKSUMS, Schema

MANIFEST_FILE = "manifest.json"
ROOT = "zarr.json"


# Few digits: the number is made into one.
_NUMBER = re.compile("0|[1-9][0-9]{0,8}")


def is_store_file(name: str, schema: Schema) -> bool:
    """True if a commit mark may list this name: root, manifest, and the metadata and shards of the schema's arrays.

    All of these are relative, of lower case, and without `..`, `.` or empty parts; none is the folder of another.
    """
    if name in (ROOT, MANIFEST_FILE, f"{CHECKSUMS}/{ROOT}"):
        return True
    data = name.removeprefix(f"{CHECKSUMS}/")
    if data.endswith(f"/{ROOT}"):
        node = data.removesuffix(f"/{ROOT}")
        return node in schema.arrays or node in schema.groups
    array, _, place = data.partition("/c/")
    if array not in schema.arrays:
        return False
    # A shard's name has a number for each axis, and only the first axis is cut.
    number, *others = place.split("/")
    axes = len(schema.arrays[array].trailing) if data == name else 0
    return _NUMBER.fullmatch(number) is not None and others == ["0"] * axes


def needed_files(schema: Schema) -> list[str]:
    """Files that every store of a schema has: its manifest, the metadata of its groups and arrays of data."""
    return [MANIFEST_FILE, ROOT, *(f"{node}/{ROOT}" for node in (*schema.groups, *schema.arrays))]


def inside(store: Path, name: str) -> Path:
    """The path of a file or folder of a store, which no link on the way takes out of the store's own folder.

    Raises:
        StoreError: one does.
    """
    path = store / name
    for part in accumulate(name.split("/"), "{}/{}".format):
        if os.path.islink(store / part):
            _require_inside(store, part)
    return path


def require_inside(store: Path, names: Iterable[str]) -> None:
    """Refuse a store with a link that leads out of its folder on the way to any of these files.

    Raises:
        StoreError: names the link.
    """
    prefix = str(store)
    parts = {part for name in names for part in accumulate(name.split("/"), "{}/{}".format)}
    for part in sorted(parts):
        if os.path.islink(f"{prefix}/{part}"):
            _require_inside(store, part)


def _require_inside(store: Path, link: str) -> None:
    try:
        target = (store / link).resolve()
        if target.is_relative_to(store.resolve()):
            return
        where = f"to {target}"
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno != errno.ELOOP:
            raise unreadable(store / link, error) from error
        where = f"and cannot be followed ({error})"
    raise StoreError(
        f"{store / link}: is a link that leads out of the store, {where}; all of a store lies in its own folder: "
        "remove the link, or put what it leads to in its place"
    )


def files_below(folder: Path) -> list[str]:
    """Every file and link below a folder, relative to it, with forward slashes, sorted; no link below is followed."""
    return all_below(folder)[0]


def empty_folders(folder: Path) -> list[str]:
    """Every folder below a folder that holds nothing, like `files_below`; with a slash at the end."""
    return all_below(folder)[1]


def all_below(folder: Path) -> tuple[list[str], list[str]]:
    """The results of `files_below` and `empty_folders`, after one walk."""
    found, empty, above = [], [], len(os.path.join(folder, ""))
    for place, folders, files in os.walk(folder):
        within = place[above:].replace(os.sep, "/")
        prefix = f"{within}/" if within else ""
        found += [f"{prefix}{name}" for name in files]
        found += [f"{prefix}{name}" for name in folders if os.path.islink(os.path.join(place, name))]
        if within and not folders and not files:
            empty.append(prefix)
    return sorted(found), sorted(empty)


def size_of(path: Path) -> int:
    """Bytes of a file, or of a link's own text, that is there."""
    return path.lstat().st_size
