"""The commit mark: the last file a build writes, which says that the store is complete and what it consists of."""

import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ezsd.cache.errors import StoreError, StoreIncomplete
from ezsd.cache.files import ABSENT, FileDigest, file_digest, read_if_there, unreadable
from ezsd.cache.format.names import MANIFEST_FILE, is_store_file, needed_files, require_inside
from ezsd.cache.format.regions import (
    EMBEDDING_TYPES,
    EmbeddingType,
    format_version,
    products_of_files,
    region_schema,
)
from ezsd.cache.format.schema import SCHEMA_VERSION, Schema, require_supported
from ezsd.cache.format.sealed_json import JSON, is_sealed, parse_json, seal, unseal

COMMIT = "COMMIT.json"
INCOMPLETE = "INCOMPLETE.json"
"""The commit mark of a store that `repair` could not mend; renamed back once the store is mended."""
TRANSFER = "TRANSFER.json"
"""The commit mark of a store that is still being copied to the folder of this file; becomes COMMIT.json at the end."""
ARRIVING = ".transfer"
"""Folder of the files of a copy until they are whole."""
MANIFEST = MANIFEST_FILE
ENVIRONMENT = "environment.json"
LOG = "build.log"
LOCK = ".lock"
UNLISTED = (COMMIT, INCOMPLETE, ENVIRONMENT, LOG, LOCK)
"""Files that the commit mark does not list: itself, and what may differ between equal stores."""


@dataclass(frozen=True)
class CommitMark:
    """Contents of `COMMIT.json`: the store is complete and consists of exactly these files."""

    manifest_digest: str
    embed_dim: int | None
    """D of a store of regions; None where the store records its schema."""
    embedding: EmbeddingType | None
    files: Mapping[str, FileDigest]
    recorded: Schema | None = None
    """The schema, where the store records it."""

    @cached_property
    def schema(self) -> Schema:
        """Schema of the store."""
        if self.recorded is not None:
            return self.recorded
        assert self.embed_dim is not None
        assert self.embedding is not None
        return region_schema(self.embed_dim, self.embedding, products_of_files(self.files))

    @property
    def products(self) -> tuple[str, ...]:
        """Names of the store's products, in the order in which they are made."""
        return self.schema.names

    @property
    def digest(self) -> str:
        """The sha256 that the mark carries, hexadecimal: equal for stores of equal bytes, and for no others."""
        return str(parse_json(self.to_bytes(), COMMIT)["sha256"])

    def to_bytes(self) -> bytes:
        """The mark as it is on disk."""
        files: JSON = {name: {"size": at.size, "sha256": at.sha256} for name, at in self.files.items()}
        described: dict[str, JSON] = {"manifest_digest": self.manifest_digest, "files": files}
        if self.recorded is not None:
            return seal({**described, "format_version": SCHEMA_VERSION, "schema": self.recorded.to_json()})
        version = format_version(products_of_files(self.files))
        return seal({**described, "format_version": version, "embed_dim": self.embed_dim, "embedding": self.embedding})


def is_committed(store: Path) -> bool:
    """True if a store has a commit mark; the mark is not read."""
    return (store / COMMIT).is_file()


def read_mark(store: Path) -> CommitMark | None:
    """The commit mark of a store, or None when it has none.

    Raises:
        StoreError: the mark is damaged, of another format version or not one that ezsd writes; or a link leads from
            one of the files that it lists, or from what lies beside them, out of the store.
    """
    return _read(store, COMMIT)


def read_incomplete(store: Path) -> CommitMark | None:
    """The mark of a store that `repair` found damaged and took out of use, or None."""
    return _read(store, INCOMPLETE)


def _read(store: Path, name: str) -> CommitMark | None:
    file = store / name
    data = read_if_there(file)
    if data is None:
        return None
    try:
        mark = parse_mark(data, str(file))
    except StoreError as error:
        if is_sealed(data):
            raise
        raise StoreError(f"{error}; where all else is whole, `repair({store})` makes it again") from error
    require_inside(store, [name, ENVIRONMENT, LOG, *mark.files])
    return mark


def is_mark_lost(store: Path) -> bool:
    """True if a store has no commit mark, or a damaged one; not for a mark that says what none does.

    Raises:
        StoreUnreadable: the system does not let it be read.
    """
    found = [data for name in (COMMIT, INCOMPLETE) if (data := read_if_there(store / name)) is not None]
    return not any(map(is_sealed, found))


def parse_mark(data: bytes, where: str) -> CommitMark:
    """The commit mark in the bytes of a file; `where` names it in errors.

    The seal tells damage, not malice: whoever makes a store makes its seal. So everything that others rely on is looked
    at here, once: what the mark lists are files that a store has, and each has a size and a digest.

    Raises:
        StoreError: the mark is damaged, of another format version, or says what no mark of ezsd does.
    """
    # A future format may seal itself otherwise: the version is looked at first.
    version = parse_json(data, where)
    require_supported(version.get("format_version"), where)
    record = unseal(data, where)
    try:
        problem = _mark_problem(record)
    except StoreError as error:
        # Of the schema, which another version may have written.
        raise StoreError(f"{where}: {error}") from error
    if problem is not None:
        raise StoreError(f"{where}: {problem}; ezsd wrote no such mark: do not use this store")
    files = {name: FileDigest(at["size"], at["sha256"]) for name, at in record["files"].items()}
    if record["format_version"] == SCHEMA_VERSION:
        return CommitMark(record["manifest_digest"], None, None, files, Schema.from_json(record["schema"], where))
    return CommitMark(record["manifest_digest"], record["embed_dim"], record["embedding"], files)


LARGEST = 2**62
"""No store has as many bytes."""


def _mark_problem(record: Mapping[str, Any]) -> str | None:
    """The fault of a commit mark; None for a sound one. StoreError for a schema that this version does not know."""
    files = record.get("files")
    if not is_sha256(record.get("manifest_digest")):
        return "manifest_digest: expected 64 hexadecimal digits"
    problem = None if record["format_version"] == SCHEMA_VERSION else _region_problem(record)
    if problem is not None:
        return problem
    if not isinstance(files, dict):
        return f"files: expected an object, found {_shown(files)}"
    schema = _schema_of(record, files)
    for name, at in files.items():
        if not is_store_file(name, schema):
            return f"files: {_shown(name)} is not a file of a store"
        if not isinstance(at, dict) or not is_count(at.get("size")) or not is_sha256(at.get("sha256")):
            return f"files: {name}: expected a size from 0 and a sha256, found {_shown(at)}"
    if sum(at["size"] for at in files.values()) > LARGEST:
        return "files: more bytes than any disk holds"
    missing = [name for name in needed_files(schema) if name not in files]
    if missing:
        return f"files: {missing[0]} is not listed, and every store has it"
    if record["format_version"] not in (SCHEMA_VERSION, format_version(schema.names)):
        return f"format_version: {record['format_version']}, and its files are those of {format_version(schema.names)}"
    return None


def _region_problem(record: Mapping[str, Any]) -> str | None:
    """The fault of the mark of a store of regions in what shapes its arrays; None for a sound one."""
    embedding = record.get("embedding")
    if not is_count(record.get("embed_dim"), least=1):
        return f"embed_dim: expected a whole number from 1, found {_shown(record.get('embed_dim'))}"
    if not isinstance(embedding, str) or embedding not in EMBEDDING_TYPES:
        return f"embedding: expected {' or '.join(EMBEDDING_TYPES)}, found {_shown(embedding)}"
    return None


def _schema_of(record: Mapping[str, Any], files: Mapping[str, Any]) -> Schema:
    if record["format_version"] == SCHEMA_VERSION:
        return Schema.from_json(record.get("schema"), "mark")
    return region_schema(record["embed_dim"], record["embedding"], products_of_files(files))


def is_count(value: object, *, least: int = 0) -> bool:
    """True if a value from JSON is a whole number that something can be counted by."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST


def are_counts(values: object) -> bool:
    """True if a value from JSON is a list of `is_count`; the types of a long one are told fastest all at once."""
    if not isinstance(values, list):
        return False
    return not values or ({int} == set(map(type, values)) and min(values) >= 0 and max(values) <= LARGEST)


def is_sha256(value: object) -> bool:
    """True if a value from JSON is a sha256 as ezsd writes it: 64 hexadecimal digits of lower case."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _shown(value: object) -> str:
    # What a stranger wrote is shown by its repr, so that one line stays one, and cut.
    return reprlib.repr(value)


def parse_environment(data: bytes | None, where: str) -> dict[str, Any]:
    """A build's record of host, versions, times, settings and places; empty without one.

    Raises:
        StoreError: the record is damaged; says what to do.
    """
    if data is None:
        return {}
    try:
        return unseal(data, where)
    except StoreError as error:
        cure = "nothing but this record is lost: `repair()` or you may remove it"
        raise StoreError(f"{error}; {cure}") from error


def require_not_set_aside(store: Path) -> None:
    """Refuse a store that `repair` found damaged and could not make whole.

    Raises:
        StoreIncomplete: it is one; says what mends it.
    """
    if (store / INCOMPLETE).exists():
        raise StoreIncomplete(
            f"{store}: this store is damaged and was marked incomplete; "
            f"`repair({store}, source)` computes again what is lost"
        )


def file_problem(file: Path, expected: FileDigest, *, deep: bool) -> str | None:
    """The damage of a committed file, or None; by its size alone, or with `deep` by its bytes too.

    Raises:
        StoreUnreadable: the system does not let it be read, so nobody knows.
    """
    try:
        size = file.stat().st_size
        if size != expected.size:
            return f"is {size} bytes long, expected {expected.size}"
        if deep and file_digest(file) != expected:
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
    found = ((name, file_problem(store / name, expected, deep=False)) for name, expected in mark.files.items())
    return [f"{store / name}: {reason}" for name, reason in found if reason is not None]
