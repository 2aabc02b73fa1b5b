"""Tar files whose members are read in place: one pass over the headers of each, and no file taken out."""

from __future__ import annotations

import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Literal

from ezsd.pipeline.errors import DatasetError

_one_at_a_time = threading.Lock()
"""Held where the index is used: threads that read images would else make it several times at once."""


@dataclass(frozen=True, slots=True)
class TarMember:
    """An image in a tar file, which opens like a `Path`."""

    tar: Path
    name: str
    offset: int | None
    """Offset of its first byte in the tar file; None where the member does not exist."""
    size: int = 0
    """Bytes."""

    def __str__(self) -> str:
        return f"{self.tar}/{self.name}"

    def is_file(self) -> bool:
        """Test whether the tar file has the member."""
        return self.offset is not None

    @contextmanager
    def open(self, mode: Literal["rb"]) -> Iterator[IO[bytes]]:
        """Open the member for reading, without reading anything yet. OSError when its bytes cannot be read."""
        if self.offset is None:
            raise FileNotFoundError(str(self))
        entry = tarfile.TarInfo(self.name)
        entry.offset_data, entry.size = self.offset, self.size
        try:
            with tarfile.open(self.tar, "r:") as archive, archive.extractfile(entry) as file:  # type: ignore[union-attr]
                yield file
        except tarfile.TarError as error:
            raise OSError(str(error)) from error


@dataclass(frozen=True, slots=True)
class TarFiles:
    """The regular files in one or several tar files, by name; an index of them is made once in each process."""

    paths: tuple[Path, ...]

    def find(self, *names: str) -> TarMember | None:
        """The member that has the first of some names that is there.

        Raises:
            DatasetError: a tar file cannot be read, is damaged or compressed, or two members have the name.
        """
        with _one_at_a_time:
            index = _index(self.paths)
            name = next((name for name in names if name in index.members), None)
            asked = range(len(self.paths)) if name is None else [index.members[name][0]]
            if any(_stamp(self.paths[number]) != index.stamps[number] for number in asked):
                # A worker may live longer than a tar file that it has read.
                _index.cache_clear()
                index = _index(self.paths)
                name = next((name for name in names if name in index.members), None)
        if name is None:
            return None
        if name in index.doubled:
            raise DatasetError(f"{index.doubled[name]}; keep one of them")
        number, offset, size = index.members[name]
        return TarMember(self.paths[number], name, offset, size)

    def folder_of(self, name: str) -> str | None:
        """The first folder, "" or with a slash at its end, that has a member of this name below it."""
        with _one_at_a_time:
            index = _index(self.paths)
        return next((folder for folder in index.folders if folder + name in index.members), None)


@dataclass(frozen=True, slots=True)
class _Index:
    members: dict[str, tuple[int, int, int]]
    """Number of the tar file, offset of the first byte in it, and bytes, by name."""
    folders: tuple[str, ...]
    """Folders of the members, "" or with a slash at the end."""
    doubled: dict[str, str]
    """Names that occur twice, and what to say of each."""
    stamps: tuple[tuple[int, int], ...]
    """Stamps of the tar files, see `_stamp`."""


@lru_cache(maxsize=4)
def _index(paths: tuple[Path, ...]) -> _Index:
    members: dict[str, tuple[int, int, int]] = {}
    doubled: dict[str, str] = {}
    stamps = tuple(map(_stamp, paths))
    for number, path in enumerate(paths):
        for entry in _entries(path):
            name = entry.name.removeprefix("./")
            # A link within a tar file is a second name of one file.
            linked = members.get(entry.linkname.removeprefix("./")) if entry.islnk() else None
            found = (number, entry.offset_data, entry.size) if entry.isreg() else linked
            if found is None:
                continue
            if name in members:
                first = paths[members[name][0]]
                doubled[name] = (
                    f"{path}: has {name!r} twice" if first == path else f"{path}: has {name!r}, as {first} has"
                )
            members[name] = found
    above = {name[: end + 1] for name in members for end in range(len(name)) if name[end] == "/"}
    return _Index(members, ("", *sorted(above)), doubled, stamps)


def _stamp(tar: Path) -> tuple[int, int]:
    """Changes when a file is replaced."""
    try:
        found = tar.stat()
    except OSError as error:
        raise DatasetError(f"{tar}: cannot be read: {error.strerror}") from error
    return found.st_mtime_ns, found.st_size


def _entries(tar: Path) -> Iterator[tarfile.TarInfo]:
    """Headers of a tar file. DatasetError when it is compressed, damaged, or cannot be read."""
    try:
        with tarfile.open(tar, "r:") as archive:
            while (entry := archive.next()) is not None:
                yield entry
                # They are kept otherwise, a kilobyte for each.
                archive.members = []  # type: ignore[attr-defined]
            _require_end(archive)
    except OSError as error:
        raise DatasetError(f"{tar}: cannot be read: {error.strerror or error}") from error
    except tarfile.TarError as error:
        raise DatasetError(
            f"{tar}: is not a whole tar file without compression ({error}); unpack a compressed one, copy or pack a "
            "damaged one again"
        ) from error


def _require_end(archive: tarfile.TarFile) -> None:
    """ReadError where something other than the end of a tar file stands: `next` takes a damaged header for it."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"no header at byte {archive.offset}")
