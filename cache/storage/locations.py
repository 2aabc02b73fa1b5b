"""Location of a store: a folder, or a URL (`ezsd.cache.storage.remote`)."""

import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ezsd.cache.errors import StoreError, StoreIncomplete
from ezsd.cache.files import MENDED, PUSHED, FileDigest, file_digest, read_bytes, read_if_there, unreadable
from ezsd.cache.format.commit_mark import (
    ENVIRONMENT,
    MANIFEST,
    TRANSFER,
    CommitMark,
    parse_environment,
    read_mark,
    require_not_set_aside,
    size_problems,
)
from ezsd.cache.format.manifest import Manifest
from ezsd.cache.journal.plan import Plan, block_done, plan_folder, read_plan
from ezsd.cache.storage.arrays import RowArray, ZarrArray, zarr_errors
from ezsd.cache.storage.direct import open_mapped
from ezsd.errors import inflected


class Place(Protocol):
    """A store's files; printed as its path or URL."""

    @property
    def checks_when_read(self) -> bool:
        """True if opening a store reads its mark alone: `read_file` and `open_array` then compare what they read."""
        ...

    def mark(self) -> CommitMark:
        """The commit mark; StoreIncomplete or StoreError where there is none."""
        ...

    def size_problems(self, mark: CommitMark) -> list[str]:
        """Describe each file that is missing or not as long as it was, one line each."""
        ...

    def read_file(self, name: str) -> bytes:
        """A small file; StoreError if it cannot be read."""
        ...

    def read_if_there(self, name: str) -> bytes | None:
        """A small file, or None where there is none."""
        ...

    def digest(self, name: str) -> FileDigest:
        """Size and sha256 of a file as it is now."""
        ...

    def digests(self, names: Iterable[str]) -> Iterator[tuple[str, FileDigest]]:
        """Size and sha256 of many small files, by name."""
        ...

    def open_array(self, name: str) -> RowArray:
        """An array of the store, by its path."""
        ...


class LocalPlace:
    """A folder."""

    checks_when_read = False

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def mark(self) -> CommitMark:
        """The commit mark; StoreIncomplete or StoreError where there is none."""
        return require_mark(self.path)

    def size_problems(self, mark: CommitMark) -> list[str]:
        """Describe each file that is missing or not as long as it was, one line each."""
        return size_problems(self.path, mark)

    def read_file(self, name: str) -> bytes:
        """A small file; StoreError if it cannot be read."""
        return read_bytes(self.path / name)

    def read_if_there(self, name: str) -> bytes | None:
        """A small file, or None where there is none."""
        return read_if_there(self.path / name)

    def digest(self, name: str) -> FileDigest:
        """Size and sha256 of a file as it is now."""
        try:
            return file_digest(self.path / name)
        except OSError as error:
            raise unreadable(self.path / name, error) from error

    def digests(self, names: Iterable[str]) -> Iterator[tuple[str, FileDigest]]:
        """Size and sha256 of many small files, by name."""
        return ((name, self.digest(name)) for name in names)

    def open_array(self, name: str) -> RowArray:
        """An array of the store, by its path; memory-mapped where its layout allows, else through zarr."""
        folder = self.path / name
        return open_mapped(folder, partial(_through_zarr, folder)) or _through_zarr(folder)


def _through_zarr(folder: Path) -> ZarrArray:
    # Half a second to import: a worker that reads mapped shards never pays it.
    import zarr

    errors = partial(zarr_errors, str(folder), MENDED)
    with errors():
        return ZarrArray(zarr.open_array(folder, mode="r", zarr_format=3), str(folder), errors)


def find_place(where: str | os.PathLike[str]) -> Place:
    """The place that a path or URL names."""
    if isinstance(where, str) and "://" in where:
        from ezsd.cache.storage.remote import RemotePlace

        return RemotePlace(where)
    return LocalPlace(Path(where).absolute())


def read_environment(store: str | os.PathLike[str] | Place) -> dict[str, Any]:
    """A build's record of host, versions, settings and places; empty without one. StoreError for a damaged one."""
    place = find_place(store) if isinstance(store, str | os.PathLike) else store
    return parse_environment(place.read_if_there(ENVIRONMENT), f"{place}/{ENVIRONMENT}")


def read_manifest(place: Place, mark: CommitMark) -> Manifest:
    """The manifest of a complete store; StoreError where it is not the one that the mark was made with."""
    where = f"{place}/{MANIFEST}"
    manifest = Manifest.from_json(place.read_file(MANIFEST), where)
    if manifest.digest != mark.manifest_digest:
        cure = MENDED if isinstance(place, LocalPlace) else PUSHED
        raise StoreError(f"{where}: is not the manifest this store was committed with; the store is damaged: {cure}")
    if manifest.schema != mark.recorded:
        raise StoreError(f"{where}: has another schema than the commit mark; ezsd wrote no such store: do not use it")
    return manifest


def require_mark(store: Path) -> CommitMark:
    """The commit mark of a complete store in a folder.

    Raises:
        StoreIncomplete: a build or copy that is not finished, or a damaged store; says how far it is.
        StoreError: no store at all.
    """
    mark = read_mark(store)
    if mark is not None:
        return mark
    plan = unfinished_plan(store)
    done = sum(block_done(plan, block.index) for block in plan.blocks)
    raise StoreIncomplete(
        f"{store}: the store is not finished, {done} of {len(plan.blocks)} blocks {inflected(done, 'is', 'are')} done; "
        "run the same `StoreWriter.open(...)` again to go on"
    )


def unfinished_plan(store: Path) -> Plan:
    """The plan of the build that a folder without a commit mark holds.

    Raises:
        StoreIncomplete: no build, but a copy that is not finished, or a damaged store that `repair` set aside.
        StoreError: no store at all, or a damaged plan.
    """
    require_not_set_aside(store)
    if (store / TRANSFER).exists():
        raise StoreIncomplete(f"{store}: not all files were copied here; run the same `pull(...)` again to go on")
    if not plan_folder(store).is_dir():
        if (store / MANIFEST).is_file():
            raise StoreError(
                f"{store}: COMMIT.json is lost; where all else is whole, `repair({store})` makes one again"
            )
        raise StoreError(f"{store}: is not a store (no COMMIT.json, no journal); `StoreWriter.open(...)` makes one")
    return read_plan(store)
