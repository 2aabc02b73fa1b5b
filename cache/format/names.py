"""Names of a store's files, and their allowed places.

Their names are written by whoever made the store, and are not trusted: only the names that the format knows are taken,
and no link on the way to a file may lead out of the store's folder.
"""

import errno
import os
import re
from collections.abc import Collection, Iterable, Iterator
from itertools import accumulate
from pathlib import Path

from ezsd.cache.errors import StoreError
from ezsd.cache.files import unreadable
from ezsd.cache.format.schema import (
    CHECKSUMS,
    EMBEDDING_TYPES,
    IMAGES,
    OFFSET,
    OPTIONAL,
    PER_IMAGE,
    PRODUCTS,
    EmbeddingType,
    per_store,
    stored_fields,
)

MANIFEST_FILE = "manifest.json"
ROOT = "zarr.json"


def groups(products: Collection[str]) -> tuple[str, ...]:
    """Groups of data of a store with these products; each has its like below `checksums`."""
    return ("images", *PER_IMAGE, *per_store(products))


def _arrays(embedding: EmbeddingType, products: Collection[str]) -> dict[str, int]:
    """The arrays of data by name, and how many dimensions each has."""
    columns = [("images", field) for field in IMAGES]
    columns += [(product, field) for product in PER_IMAGE for field in (OFFSET, *stored_fields(product, embedding))]
    columns += per_store(products).items()
    return {f"{product}/{field.name}": 1 + len(field.trailing) for product, field in columns}


def _pattern() -> str:
    found = {name: axes for embedding in EMBEDDING_TYPES for name, axes in _arrays(embedding, PRODUCTS).items()}
    arrays, root = "|".join(sorted(found)), re.escape(ROOT)
    tables = "|".join(name for name in sorted(found) if found[name] == 2)
    number = "(?:0|[1-9][0-9]{0,8})"
    return (
        rf"{root}|{re.escape(MANIFEST_FILE)}|{CHECKSUMS}/{root}"
        rf"|(?:{CHECKSUMS}/)?(?:{'|'.join(groups(PRODUCTS))}|{arrays})/{root}"
        rf"|(?:{tables})/c/{number}/{number}|(?!(?:{tables})/)(?:{CHECKSUMS}/)?(?:{arrays})/c/{number}"
    )


_FILE = re.compile(_pattern())


def is_store_file(name: str) -> bool:
    """True if a commit mark may list this name: root, manifest, and the metadata and shards of the known arrays.

    All of these are relative, of lower case, and without `..`, `.` or empty parts; none is the folder of another.
    """
    return _FILE.fullmatch(name) is not None


def needed_files(embedding: EmbeddingType, products: Collection[str]) -> list[str]:
    """Files that every store with these products has: its manifest, the metadata of its groups and arrays of data."""
    return [MANIFEST_FILE, ROOT, *(f"{node}/{ROOT}" for node in (*groups(products), *_arrays(embedding, products)))]


def products_of_files(names: Iterable[str]) -> tuple[str, ...]:
    """The products of a store that lists these files, in the order in which they are made."""
    found = {name.removeprefix(f"{CHECKSUMS}/").partition("/")[0] for name in names}
    return tuple(product for product in PRODUCTS if product not in OPTIONAL or product in found)


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
    return sorted(name for name in _below(folder) if not name.endswith("/"))


def empty_folders(folder: Path) -> list[str]:
    """Every folder below a folder that holds nothing, like `files_below`; with a slash at the end."""
    return sorted(name for name in _below(folder) if name.endswith("/"))


def _below(folder: Path) -> Iterator[str]:
    for place, folders, files in os.walk(folder):
        within = Path(place).relative_to(folder)
        yield from ((within / name).as_posix() for name in files)
        yield from ((within / name).as_posix() for name in folders if os.path.islink(os.path.join(place, name)))
        if not folders and not files and place != str(folder):
            yield f"{within.as_posix()}/"


def size_of(path: Path) -> int:
    """Bytes of a file, or of a link's own text, that is there."""
    return path.lstat().st_size
