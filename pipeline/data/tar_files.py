"""Tar files whose members are read in place: one pass over the headers of each, and no file taken out."""

from __future__ import annotations

import posixpath
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
    fault: str = ""
    """Reason why it cannot be read in place, and what to do; "" for none."""

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
            # A regular member always has a file; only its type does not say so.
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
            DatasetError: a tar file cannot be read, is damaged, compressed or concatenated; or two members have the
                name, or its member is stored sparse or as a link that is not followed.
        """
        names = tuple(map(posixpath.normpath, names))
        with _one_at_a_time:
            index = _index(self.paths)
            member = index.first_of(names)
            if any(_stamp(tar) != index.stamps[tar] for tar in (self.paths if member is None else (member.tar,))):
                # A worker may live longer than a tar file that it has read.
                _index.cache_clear()
                index = _index(self.paths)
                member = index.first_of(names)
        if member is None:
            return None
        if member.name in index.doubled:
            raise DatasetError(f"{index.doubled[member.name]}; keep one of them")
        if member.fault:
            raise DatasetError(f"{member}: {member.fault}")
        return member

    def folder_of(self, name: str) -> str | None:
        """The first folder, "" or with a slash at its end, that has a member of this name below it."""
        with _one_at_a_time:
            index = _index(self.paths)
        name = posixpath.normpath(name)
        return next((folder for folder in index.folders if folder + name in index.members), None)


@dataclass(frozen=True, slots=True)
class _Index:
    members: dict[str, TarMember]
    """Members by normalised name, which everything here uses."""
    folders: tuple[str, ...]
    """Folders of the members, "" or with a slash at the end."""
    doubled: dict[str, str]
    """Names that occur twice, and what to say of each."""
    stamps: dict[Path, tuple[int, int, int]]
    """Stamps of the tar files, see `_stamp`."""

    def first_of(self, names: tuple[str, ...]) -> TarMember | None:
        return next((self.members[name] for name in names if name in self.members), None)


@lru_cache(maxsize=4)
def _index(paths: tuple[Path, ...]) -> _Index:
    members: dict[str, TarMember] = {}
    doubled: dict[str, str] = {}
    stamps = {path: _stamp(path) for path in paths}
    for path in paths:
        for entry in _entries(path):
            if not (entry.isreg() or entry.islnk() or entry.issym()):
                continue
            found = _member(path, entry, members)
            first = members.get(found.name, found)
            # `tar cf x.tar folder folder/file` stores the file, and then a hard link from its name to itself.
            if (first.tar, first.offset) != (found.tar, found.offset):
                doubled[found.name] = (
                    f"{path}: has {found.name!r} twice"
                    if first.tar == path
                    else f"{path}: has {found.name!r}, as {first.tar} has"
                )
            members[found.name] = found
    above = {name[: end + 1] for name in members for end in range(len(name)) if name[end] == "/"}
    return _Index(members, ("", *sorted(above)), doubled, stamps)


def _member(tar: Path, entry: tarfile.TarInfo, earlier: dict[str, TarMember]) -> TarMember:
    """The member of a header. A hard link is a second name of an earlier member of the same tar file."""
    name, fault = posixpath.normpath(entry.name), ""
    if entry.islnk():
        linked = earlier.get(posixpath.normpath(entry.linkname))
        if linked is not None and linked.tar == tar:
            return replace(linked, name=name)
        fault = f"is a hard link to {entry.linkname!r}, which is not before it in the tar file; pack the file itself"
    elif entry.issym():
        fault = f"is a symbolic link to {entry.linkname!r}; pack it with -h"
    elif entry.issparse():
        fault = "is stored sparse; pack it without -S"
    return TarMember(tar, name, entry.offset_data, entry.size, fault)


def _stamp(tar: Path) -> tuple[int, int, int]:
    """Changes when a file is replaced."""
    try:
        found = tar.stat()
    except OSError as error:
        raise DatasetError(f"{tar}: cannot be read: {error.strerror}") from error
    return found.st_mtime_ns, found.st_size, found.st_ino


def _entries(tar: Path) -> Iterator[tarfile.TarInfo]:
    """Headers of a tar file. DatasetError when it is compressed, damaged, concatenated, or cannot be read."""
    try:
        with tarfile.open(tar, "r:") as archive:
            while (entry := archive.next()) is not None:
                yield entry
                # They are kept otherwise, a kilobyte for each.
                archive.members = []  # type: ignore[attr-defined]
            _require_end(archive)
            archive.ignore_zeros = True
            if archive.next() is not None:
                raise DatasetError(f"{tar}: has more members after its end; keep concatenated tar files apart")
    except OSError as error:
        raise DatasetError(f"{tar}: cannot be read: {error.strerror or error}") from error
    except tarfile.TarError as error:
        raise DatasetError(
            f"{tar}: is not a whole tar file without compression ({error}); unpack a compressed one, copy or pack a "
            "damaged one again"
        ) from error


def _require_end(archive: tarfile.TarFile) -> None:
    """ReadError where headers stop before the block of zeros that ends a tar file: `next` takes both for the end."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    block = archive.fileobj.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0"):
        raise tarfile.ReadError(f"no header at byte {archive.offset}")
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"no end at byte {archive.offset}")
