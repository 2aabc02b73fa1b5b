"""Shard tasks: each writes one whole shard once, from checksummed rows of the journal, and records it."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ezsd.cache.errors import StoreError, StoreUnreadable
from ezsd.cache.files import (
    ABSENT,
    FileDigest,
    discard,
    disk_room,
    file_state,
    make_folders,
    read_if_there,
    rename,
    scratch_name,
    unreadable,
    write_atomic,
    write_new,
)
from ezsd.cache.format import zarr_bytes as encoding
from ezsd.cache.format.checksums import ChunkSums
from ezsd.cache.format.commit_mark import is_sha256
from ezsd.cache.format.names import inside
from ezsd.cache.format.packed import packed, unpacked
from ezsd.cache.format.schema import ArraySpec
from ezsd.cache.format.sealed_json import JSON, compact_json, seal, unseal
from ezsd.cache.journal.entries import drop_data, journal_folder, scratch_folder, set_aside
from ezsd.cache.journal.plan import Plan, block_name, read_block, read_plan


class Piece(NamedTuple):
    """Rows `start` to `stop` (exclusive) of one array of one block; `crc32` is of the block's whole array."""

    block: int
    start: int
    stop: int
    crc32: int


@dataclass(frozen=True, slots=True)
class ShardTask:
    """Write one shard of one array, from pieces of journaled blocks in order."""

    array: ArraySpec
    shard: int
    plan: str
    pieces: tuple[Piece, ...]
    shared: tuple[tuple[str, ...], ...]
    """For each piece, the records of all shards that its block goes into: when all are there, its data may go."""

    @property
    def file(self) -> str:
        """The shard's path inside the store."""
        return self.array.shard_file(self.shard)

    @property
    def sources(self) -> str:
        """Digest of all that goes into the shard; a shard made from anything else is not this one."""
        shape, shard_rows = self.array.shape, self.array.shard_rows
        text = compact_json([self.plan, self.array.name, shape, shard_rows, self.shard, self.pieces])
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class ShardRecord:
    """A finished shard: its digest, and the CRC-32 of each of its chunks."""

    digest: FileDigest
    chunk_crc32: NDArray[np.uint32]


def commit_shard(path: str | os.PathLike[str], task: ShardTask) -> None:
    """Write one whole shard and record it; does nothing when the record is there already.

    Blocks all of whose rows are then in durable shards give their disk space back.

    Raises:
        StoreError: a journaled block is damaged. It is set aside: the next run computes it again. Or the disk is full.
    """
    store = Path(path).absolute()
    if recorded(store, task) is None:
        with disk_room(store, encoding.shard_bytes_on_disk(task.array, task.shard)):
            _write_shard(store, task)
    journal, records = journal_folder(store), _records_folder(store)
    # Blocks share most of their shards: each record is looked for once.
    there = cache(lambda name: file_state(f"{records}/{name}") is not None)
    for piece, names in zip(task.pieces, task.shared, strict=True):
        if all(map(there, names)):
            drop_data(f"{journal}/{block_name(piece.block)}")


def _write_shard(store: Path, task: ShardTask) -> None:
    temporary = scratch_name(scratch_folder(store), task.array.name.replace("/", "."))
    target = inside(store, task.file)
    make_folders(target.parent)
    sums = ChunkSums(task.array, task.shard)
    try:
        plan = read_plan(store)
        if plan.digest != task.plan:
            raise StoreError(f"{store}: the task belongs to another build; take tasks from StoreWriter.commit_tasks()")
        parts = encoding.shard_parts(task.array, task.shard, _piece_rows(plan, task))
        digest = write_new(temporary, sums.watch(parts), point="shard")
        rename(temporary, target, point="shard")
    finally:
        discard(temporary)
    record: dict[str, JSON] = {
        "file": task.file,
        "size": digest.size,
        "digest": digest.sha256,
        "sources": task.sources,
        "chunk_crc32": packed(sums.sums),
    }
    target = _records_folder(store) / record_name(task.array, task.shard)
    write_atomic(target, seal(record), scratch=scratch_folder(store), point="record")


def _piece_rows(plan: Plan, task: ShardTask) -> Iterator[memoryview]:
    for piece in task.pieces:
        try:
            entry = read_block(plan, piece.block)
            if entry.arrays[task.array.name]["crc32"] == piece.crc32:
                yield from entry.stream(task.array.name, piece.start, piece.stop)
                continue
        except StoreUnreadable:
            raise
        except StoreError as error:
            set_aside(plan.store, block_name(piece.block))
            raise StoreError(f"{error}; block {piece.block} was set aside, run the build again to redo it") from error
        raise StoreError(f"{entry.folder}: was written anew after the tasks were made; run the build again")


def _records_folder(store: Path) -> Path:
    return journal_folder(store) / "shards"


def record_name(array: ArraySpec, shard: int) -> str:
    """Name of the file that records a finished shard."""
    return f"{array.name.replace('/', '.')}.{shard}.json"


def recorded(store: Path, task: ShardTask) -> ShardRecord | None:
    """The record of a finished shard, or None when it must be written (again)."""
    file = _records_folder(store) / record_name(task.array, task.shard)
    try:
        data = read_if_there(file)
        record = {} if data is None else unseal(data, str(file))
        size = (store / task.file).stat().st_size
    except StoreUnreadable:
        raise
    except (*ABSENT, StoreError):
        return None
    except OSError as error:
        raise unreadable(store / task.file, error) from error
    digest = record.get("digest")
    if not is_sha256(digest) or record.get("sources") != task.sources or record.get("size") != size:
        return None
    # The digest of what it was made from does not cover these: a record of a stranger's may say anything.
    try:
        sums = unpacked(record.get("chunk_crc32"))
    except ValueError:
        return None
    sound = len(sums) == encoding.shard_chunks(task.array, task.shard)
    return ShardRecord(FileDigest(size, str(digest)), sums) if sound else None


def forget_record(store: Path, task: ShardTask) -> None:
    """Remove the record of a shard that must be written again: it no longer vouches for the rows of its blocks."""
    (_records_folder(store) / record_name(task.array, task.shard)).unlink(missing_ok=True)
