"""Shard tasks: each writes one whole shard once, from checksummed rows of the journal, and records it."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cache import encoding
from cache.durable import FileDigest, discard, make_folders, rename, scratch_name, write_atomic, write_new
from cache.journal import journal_folder, raw_bytes, scratch_folder, set_aside
from cache.manifest import JSON, canonical_json, seal, unseal
from cache.plan import Plan, block_name, read_block, read_plan
from cache.schema import ArraySpec, StoreError


@dataclass(frozen=True, slots=True)
class Piece:
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

    @property
    def file(self) -> str:
        """The shard's path inside the store."""
        return self.array.shard_file(self.shard)

    @property
    def sources(self) -> str:
        """Digest of all that goes into the shard; a shard made from anything else is not this one."""
        pieces: list[JSON] = [[piece.block, piece.start, piece.stop, piece.crc32] for piece in self.pieces]
        shape, shard_rows = list(self.array.shape), self.array.shard_rows
        text = canonical_json([self.plan, self.array.name, shape, shard_rows, self.shard, pieces])
        return hashlib.sha256(text.encode()).hexdigest()


def commit_shard(path: str | os.PathLike[str], task: ShardTask) -> None:
    """Write one whole shard and record it; does nothing when the record is there already.

    Raises:
        StoreError: a journaled block is damaged. It is set aside: the next run computes it again.
    """
    store = Path(path).absolute()
    if recorded(store, task) is not None:
        return
    temporary = scratch_name(scratch_folder(store), task.array.name.replace("/", "."))
    target = store / task.file
    make_folders(target.parent)
    try:
        plan = read_plan(store)
        if plan.digest != task.plan:
            raise StoreError(f"{store}: the task belongs to another build; take tasks from StoreWriter.commit_tasks()")
        parts = encoding.shard_parts(task.array, task.shard, _piece_rows(plan, task))
        digest = write_new(temporary, parts, point="shard")
        rename(temporary, target, point="shard")
    finally:
        discard(temporary)
    record = seal({"file": task.file, "size": digest.size, "digest": digest.sha256, "sources": task.sources})
    write_atomic(_record_file(store, task), record, scratch=scratch_folder(store), point="record")


def _piece_rows(plan: Plan, task: ShardTask) -> Iterator[memoryview]:
    for piece in task.pieces:
        try:
            entry = read_block(plan, piece.block)
            rows = entry.array(task.array.name)
        except StoreError as error:
            set_aside(plan.store, block_name(piece.block))
            raise StoreError(f"{error}; block {piece.block} was set aside, run the build again to redo it") from error
        if entry.arrays[task.array.name]["crc32"] != piece.crc32:
            raise StoreError(f"{entry.folder}: was written anew after the tasks were made; run the build again")
        yield raw_bytes(rows[piece.start : piece.stop])


def _record_file(store: Path, task: ShardTask) -> Path:
    return journal_folder(store) / "shards" / f"{task.array.name.replace('/', '.')}.{task.shard}.json"


def recorded(store: Path, task: ShardTask) -> FileDigest | None:
    """The digest of a finished shard, or None when it must be written (again)."""
    file = _record_file(store, task)
    try:
        record = unseal(file.read_bytes(), str(file))
        size = (store / task.file).stat().st_size
    except (OSError, StoreError):
        return None
    if record["sources"] != task.sources or record["size"] != size:
        return None
    return FileDigest(size, record["digest"])
