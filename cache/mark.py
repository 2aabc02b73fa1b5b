"""The commit mark: the last file a build writes, which says that the store is complete and what it consists of."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.durable import ABSENT, FileDigest, file_digest, unreadable
from cache.manifest import JSON, parse_json, seal, unseal
from cache.schema import FORMAT_VERSION, EmbeddingType, StoreError, StoreIncomplete, require_supported

COMMIT = "COMMIT.json"
INCOMPLETE = "INCOMPLETE.json"
"""What `repair` renames the commit mark to when a store is damaged beyond it; renamed back once it is whole."""
TRANSFER = "TRANSFER.json"
"""The commit mark of a store that is still being copied to where this file lies; becomes COMMIT.json at the end."""
MANIFEST = "manifest.json"
ENVIRONMENT = "environment.json"
LOG = "build.log"
LOCK = ".lock"
UNLISTED = (COMMIT, INCOMPLETE, ENVIRONMENT, LOG, LOCK)
"""Files that the commit mark does not list: itself, and what may differ between equal stores."""


@dataclass(frozen=True)
class CommitMark:
    """What `COMMIT.json` says: the store is complete, and consists of exactly these files."""

    manifest_digest: str
    embed_dim: int
    embedding: EmbeddingType
    files: Mapping[str, FileDigest]

    @property
    def digest(self) -> str:
        """The sha256 that the mark carries, hexadecimal: equal for stores of equal bytes, and for no others."""
        return str(json.loads(self.to_bytes())["sha256"])

    def to_bytes(self) -> bytes:
        """The mark as it lies on disk."""
        files: JSON = {name: {"size": at.size, "sha256": at.sha256} for name, at in self.files.items()}
        return seal(
            {
                "format_version": FORMAT_VERSION,
                "manifest_digest": self.manifest_digest,
                "embed_dim": self.embed_dim,
                "embedding": self.embedding,
                "files": files,
            }
        )


def read_mark(store: Path) -> CommitMark | None:
    """The commit mark of a store, or None when it has none.

    Raises:
        StoreError: the mark is damaged, or of another format version.
    """
    return _read(store / COMMIT)


def read_incomplete(store: Path) -> CommitMark | None:
    """The mark of a store that `repair` found damaged and took out of use, or None."""
    return _read(store / INCOMPLETE)


def _read(file: Path) -> CommitMark | None:
    try:
        data = file.read_bytes()
    except ABSENT:
        return None
    except OSError as error:
        raise unreadable(file, error) from error
    return parse_mark(data, str(file))


def parse_mark(data: bytes, where: str) -> CommitMark:
    """The commit mark in the bytes of a file; `where` names it in errors.

    Raises:
        StoreError: the mark is damaged, or of another format version.
    """
    # A future format may seal itself otherwise: the version is looked at first.
    version = parse_json(data, where)
    require_supported(version.get("format_version"), where)
    record = unseal(data, where)
    files = {name: FileDigest(at["size"], at["sha256"]) for name, at in record["files"].items()}
    return CommitMark(record["manifest_digest"], record["embed_dim"], record["embedding"], files)


def parse_environment(data: bytes | None, where: str) -> dict[str, Any]:
    """What a build recorded of itself (host, versions, times, settings, places); empty when there is no record.

    Raises:
        StoreError: the record is damaged; says what to do.
    """
    if data is None:
        return {}
    try:
        return unseal(data, where)
    except StoreError as error:
        cure = "nothing but this record is lost: `ezsd cache repair` or you may remove it"
        raise StoreError(f"{error}; {cure}") from error


def require_not_set_aside(store: Path) -> None:
    """Refuse a store that `repair` found damaged and could not make whole.

    Raises:
        StoreIncomplete: it is one; says what mends it.
    """
    if (store / INCOMPLETE).exists():
        raise StoreIncomplete(
            f"{store}: this store is damaged and was marked incomplete; "
            f"`ezsd cache repair {store} --data-root DIR` rebuilds what is lost from the images in DIR"
        )


def relative_files(folder: Path) -> list[str]:
    """Every file below a folder, relative to it, with forward slashes, sorted."""
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir())


def file_problem(file: Path, expected: FileDigest, *, whole: bool) -> str | None:
    """Why a file is not as it was committed, or None; by its size alone, or with `whole` by its bytes too.

    Raises:
        StoreUnreadable: the system does not let it be read, so nobody knows.
    """
    try:
        size = file.stat().st_size
        if size != expected.size:
            return f"is {size} bytes long, expected {expected.size}"
        if whole and file_digest(file) != expected:
            return "its bytes are not those that were committed (sha256 differs)"
    except ABSENT:
        return "is missing"
    except OSError as error:
        raise unreadable(file, error) from error
    return None


def size_problems(store: Path, mark: CommitMark) -> list[str]:
    """The quick check: one line for each listed file that is missing or not as long as it was.

    Raises:
        StoreUnreadable: the system does not let a file be looked at.
    """
    found = ((name, file_problem(store / name, expected, whole=False)) for name, expected in mark.files.items())
    return [f"{store / name}: {reason}" for name, reason in found if reason is not None]
