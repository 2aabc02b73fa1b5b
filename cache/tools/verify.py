"""Verification of a store against its commit mark; damage is named by file, rows and images."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ezsd.cache.errors import StoreError, StoreUnreadable
from ezsd.cache.files import FileDigest
from ezsd.cache.format.checksums import checksum_spec, damaged_rows
from ezsd.cache.format.commit_mark import (
    ENVIRONMENT,
    LARGEST,
    UNLISTED,
    CommitMark,
    file_problem,
    parse_environment,
    read_incomplete,
    read_mark,
)
from ezsd.cache.format.names import empty_folders, files_below
from ezsd.cache.format.offsets import image_places, of_images
from ezsd.cache.format.schema import CHECKSUMS, ArraySpec
from ezsd.cache.format.sealed_json import parse_json
from ezsd.cache.format.zarr_bytes import consolidated, shard_bytes_on_disk, shard_rows
from ezsd.cache.journal.entries import JOURNAL, Entry, journal_folder
from ezsd.cache.journal.plan import Plan, block_name, per_store_folder
from ezsd.cache.storage.direct import direct_spec
from ezsd.cache.storage.locations import find_place, read_environment, unfinished_plan
from ezsd.cache.storage.remote import RemotePlace


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """A file that is not as it was committed, and what it takes with it."""

    file: Path | str
    """Path or URL of the file."""
    name: str
    """The file inside the store, with forward slashes."""
    kind: Literal["damaged", "unreadable", "stray"]
    """An unreadable file may be sound: the system does not let it be read. Strays do not belong to the store, and take
    nothing from it."""
    reason: str
    array: str | None = None
    rows: tuple[tuple[int, int], ...] = ()
    """Ranges (first, last exclusive) of the array's rows that are lost."""
    images: tuple[int, ...] = ()
    """Ids of the images they belong to."""

    def __str__(self) -> str:
        text = f"{self.file}: {self.reason}"
        if self.rows:
            ranges = ", ".join(f"{start} to {stop - 1}" for start, stop in self.rows)
            text += f"; lost are rows {ranges} of {self.array}"
        return text + of_images(self.images)


def verify(path: str | os.PathLike[str], *, deep: bool = False) -> list[Damage]:
    """List the damaged, missing and foreign files of a store; none if all is well.

    Args:
        path: a store, complete or not; or the URL of a complete one.
        deep: read every byte and compare digests. Without it, sizes and the digests of metadata alone are looked at:
            enough for truncated, missing and foreign files, not for a wrong bit in an array.

    Raises:
        StoreIncomplete: a copy that is not finished.
        StoreError: not a store, another format version, or a damaged commit mark; or the URL cannot be reached.
    """
    place = find_place(path)
    if isinstance(place, RemotePlace):
        return _verify_remote(place, deep=deep)
    store = Path(path).absolute()
    mark = read_mark(store) or read_incomplete(store)
    if mark is None:
        return damaged_entries(unfinished_plan(store), deep=deep)
    return damaged_files(store, mark, deep=deep) + stray_files(store, mark)


def damaged_files(store: Path, mark: CommitMark, *, deep: bool) -> list[Damage]:
    """Files that are missing, not as they were committed or unreadable, see `verify`."""
    locate = Locator(LocalFiles(store), mark)
    found = []
    for name, expected in mark.files.items():
        try:
            reason = file_problem(store / name, expected, deep=deep or name.endswith(".json"))
        except StoreUnreadable as error:
            found.append(_unreadable(store / name, name, error))
            continue
        if reason:
            found.append(locate.damage(name, reason))
    return found + _environment_problems(store)


def _verify_remote(place: RemotePlace, *, deep: bool) -> list[Damage]:
    mark = place.mark()
    files = CopiedFiles(place, mark)
    files.look([name for name in mark.files if deep or name.endswith(".json")])
    locate = Locator(files, mark)
    damaged: dict[str, Damage] = {}
    # To locate the damage of one file, others are looked at, and some of those turn out to be damaged too.
    while new := files.problems.keys() - damaged.keys():
        damaged |= {name: locate.damage(name, files.problems[name]) for name in sorted(new)}
    found = list(damaged.values())
    # A web server has no list of its files.
    there = [] if place.checks_when_read else place.sizes()
    found += [
        Damage(file=place.url_of(name), name=name, kind="stray", reason="does not belong to the store")
        for name in sorted(set(there) - {*mark.files, *UNLISTED, *place.not_ours})
    ]
    environment = place.read_if_there(ENVIRONMENT)
    try:
        parse_environment(environment, place.url_of(ENVIRONMENT))
    except StoreError as error:
        reason = str(error).removeprefix(f"{place.url_of(ENVIRONMENT)}: ")
        found.append(Damage(file=place.url_of(ENVIRONMENT), name=ENVIRONMENT, kind="damaged", reason=reason))
    return found


def _unreadable(file: Path, name: str, error: StoreUnreadable) -> Damage:
    return Damage(file=file, name=name, kind="unreadable", reason=str(error).removeprefix(f"{file}: "))


def stray_files(store: Path, mark: CommitMark) -> list[Damage]:
    """Foreign files, links (none is followed) and empty folders in a store's folder."""
    own = {*mark.files, *UNLISTED}
    # A folder whose files are lost is still the store's.
    own.update(f"{above.as_posix()}/" for name in mark.files for above in PurePosixPath(name).parents)
    return [
        Damage(file=store / name, name=name, kind="stray", reason=_foreign(store / name))
        for name in (*files_below(store), *empty_folders(store))
        if name not in own and not name.startswith(f"{JOURNAL}/")
    ]


def _foreign(path: Path) -> str:
    if path.is_symlink():
        return "is a link that does not belong to the store"
    return "is an empty folder" if path.is_dir() else "does not belong to the store"


def _environment_problems(store: Path) -> list[Damage]:
    file = store / ENVIRONMENT
    try:
        read_environment(store)
    except StoreUnreadable as error:
        return [_unreadable(file, ENVIRONMENT, error)]
    except StoreError as error:
        reason = str(error).removeprefix(f"{file}: ")
        return [Damage(file=file, name=ENVIRONMENT, kind="damaged", reason=reason)]
    return []


class StoreFiles(Protocol):
    """Files of a store as they are now, damaged or not."""

    def where(self, name: str) -> Path | str:
        """Path or URL of a file."""
        ...

    def intact(self, name: str, expected: FileDigest) -> bool:
        """True if a file is known to be as it was committed."""
        ...

    def size(self, name: str) -> int | None:
        """Size of a file in bytes; None where there is none."""
        ...

    def held(self, name: str) -> bytes | None:
        """The bytes of a file; None where there is none."""
        ...


@dataclass(frozen=True)
class LocalFiles:
    """Files of a store in a folder."""

    store: Path

    def __str__(self) -> str:
        return str(self.store)

    def where(self, name: str) -> Path:
        """Path of a file."""
        return self.store / name

    def intact(self, name: str, expected: FileDigest) -> bool:
        """True if a file is known to be as it was committed."""
        try:
            return file_problem(self.store / name, expected, deep=True) is None
        except StoreUnreadable:
            return False

    def size(self, name: str) -> int | None:
        """Size of a file in bytes; None where there is none."""
        file = self.store / name
        return file.stat().st_size if file.is_file() else None

    def held(self, name: str) -> bytes | None:
        """The bytes of a file; None where there is none."""
        file = self.store / name
        return file.read_bytes() if file.is_file() else None


class CopiedFiles:
    """Files of a store behind a URL; each is fetched and compared once."""

    def __init__(self, place: RemotePlace, mark: CommitMark) -> None:
        self._place, self._mark = place, mark
        self._sizes = sizes = place.sizes(mark.files)
        self.problems: dict[str, str] = {}
        """Faults of the files that were found not to be as they were committed, by name."""
        for name, expected in mark.files.items():
            if name not in sizes:
                self.problems[name] = "is missing"
            elif sizes[name] != expected.size:
                self.problems[name] = f"is {sizes[name]} bytes long, expected {expected.size}"
        self._seen = set(self.problems)

    def __str__(self) -> str:
        return str(self._place)

    def look(self, names: Sequence[str]) -> None:
        """Compare these files with their digests, many at once."""
        for name, found in self._place.digests([name for name in names if name not in self._seen]):
            self._seen.add(name)
            if found != self._mark.files[name]:
                self.problems[name] = "its bytes are not those that were committed (sha256 differs)"

    def where(self, name: str) -> str:
        """URL of a file."""
        return self._place.url_of(name)

    def intact(self, name: str, expected: FileDigest) -> bool:
        """True if a file is known to be as it was committed."""
        self.look([name])
        return name not in self.problems

    def size(self, name: str) -> int | None:
        """Size of a file in bytes; None where there is none."""
        return self._sizes.get(name)

    def held(self, name: str) -> bytes | None:
        """The bytes of a file; None where there is none, or one that is longer than the mark states."""
        return (
            self._place.read_if_there(name) if self._sizes.get(name, LARGEST) <= self._mark.files[name].size else None
        )


@dataclass(frozen=True)
class Locator:
    """Says which rows and images a damaged file of a store takes with it, as far as its other files still tell."""

    files: StoreFiles
    mark: CommitMark

    def damage(self, name: str, reason: str) -> Damage:
        """The damage of one listed file."""
        spec, shard = self._shard(name)
        if spec is None:
            return Damage(file=self.files.where(name), name=name, kind="damaged", reason=reason)
        rows = tuple(self._rows(spec, shard, name))
        return Damage(
            file=self.files.where(name),
            name=name,
            kind="damaged",
            reason=reason,
            array=spec.name,
            rows=rows,
            images=tuple(self._images(spec, rows)),
        )

    def intact(self, name: str) -> bool:
        """True if a listed file is known to be as it was committed."""
        expected = self.mark.files.get(name)
        return expected is not None and self.files.intact(name, expected)

    def spec(self, array: str) -> ArraySpec | None:
        """Geometry of an array, from its own metadata or the copy in the root.

        None where both are damaged, and for a layout that another writer chose.

        Raises:
            StoreError: it is the geometry of no array.
        """
        for name, of in ((f"{array}/zarr.json", None), ("zarr.json", array)):
            if self.intact(name):
                metadata = parse_json(self.files.held(name) or b"", str(self.files.where(name)))
                try:
                    return direct_spec(metadata if of is None else consolidated(metadata, of), array)
                except StoreError as error:
                    raise StoreError(f"{self.files}/{error}") from error
        return None

    def values(self, array: str) -> NDArray[Any] | None:
        """A whole array, or None where any of it is damaged, or another writer arranged it."""
        spec = self.spec(array)
        if spec is None or not all(self.intact(spec.shard_file(shard)) for shard in range(spec.shards)):
            return None
        return self.doubtful(array)

    def doubtful(self, array: str) -> NDArray[Any] | None:
        """An array as its files are now, damaged or not; None where one is missing, unlisted or of another length."""
        spec = self.spec(array)
        if spec is None:
            return None
        files = [(shard, spec.shard_file(shard)) for shard in range(spec.shards)]
        # What the mark does not list is not looked at: it may be a link to anywhere.
        if any(file not in self.mark.files for _, file in files):
            return None
        if any(self.files.size(file) != shard_bytes_on_disk(spec, shard) for shard, file in files):
            return None
        parts = [shard_rows(spec, shard, self.files.held(file) or b"") for shard, file in files]
        return np.concatenate([np.empty((0, *spec.shape[1:]), spec.dtype), *parts])

    def _shard(self, name: str) -> tuple[ArraySpec | None, int]:
        array, is_shard, place = name.partition("/c/")
        return (self.spec(array), int(place.partition("/")[0])) if is_shard else (None, 0)

    def _rows(self, spec: ArraySpec, shard: int, name: str) -> list[tuple[int, int]]:
        whole = [spec.shard_range(shard)]
        if spec.name.startswith(f"{CHECKSUMS}/"):
            return whole
        sums = self.values(checksum_spec(spec, shard_bytes=1).name)
        data = self.files.held(name)
        if sums is None or data is None:
            return whole
        # Where all checksums agree and the digest does not, everything is in doubt.
        return damaged_rows(spec, shard, data, sums) or whole

    def _images(self, spec: ArraySpec, rows: Sequence[tuple[int, int]]) -> list[int]:
        product, _, field = spec.name.partition("/")
        ids = self.values("images/id")
        if ids is None or ids.ndim != 1:
            return []
        if product == "images":
            return [int(ids[place]) for start, stop in rows for place in range(start, min(stop, len(ids)))]
        if product not in self.mark.schema.per_image:
            return []
        if field == "offset":
            # Entry k ends image k - 1 and begins image k.
            places = {at for start, stop in rows for at in range(start - 1, stop) if 0 <= at < len(ids)}
            return [int(ids[place]) for place in sorted(places)]
        offset = self.values(f"{product}/offset")
        if offset is None or offset.shape != (len(ids) + 1,):
            return []
        return [int(ids[place]) for place in image_places(offset, rows)]


def damaged_entries(plan: Plan, *, deep: bool) -> list[Damage]:
    """Pieces of an unfinished build that are not as they were journaled."""
    folders = [journal_folder(plan.store) / block_name(block.index) for block in plan.blocks]
    folders += [per_store_folder(plan, product) for product in plan.schema.per_store]
    return [
        damage for folder in folders if folder.exists() for damage in _entry_problems(plan.store, folder, deep=deep)
    ]


def _entry_problems(store: Path, folder: Path, *, deep: bool) -> Iterator[Damage]:
    try:
        entry = Entry.read(folder)
        sized = entry.sized
        for name in entry.arrays if deep and sized else ():
            entry.array(name)
    except StoreError as error:
        place, _, reason = str(error).partition(": ")
        kind: Literal["damaged", "unreadable"] = "unreadable" if isinstance(error, StoreUnreadable) else "damaged"
        yield Damage(file=Path(place), name=Path(place).relative_to(store).as_posix(), kind=kind, reason=reason)
        return
    if not sized and not entry.dropped:
        reason = f"data.raw is not {entry.bytes_} bytes long"
        yield Damage(file=folder, name=folder.relative_to(store).as_posix(), kind="damaged", reason=reason)
