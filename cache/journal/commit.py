"""Commit of a journal to a store: the shard tasks, then the small arrays and metadata, then the commit mark."""

import contextlib
import os
import posixpath
import shutil
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ezsd.cache.errors import StoreError
from ezsd.cache.files import FileDigest, discard, failpoint, sync, sync_together, write_atomic
from ezsd.cache.format import zarr_bytes as encoding
from ezsd.cache.format.checksums import ChunkSums, checksum_spec
from ezsd.cache.format.commit_mark import COMMIT, LOCK, MANIFEST, CommitMark
from ezsd.cache.format.manifest import Manifest
from ezsd.cache.format.names import all_below, empty_folders, inside
from ezsd.cache.format.packed import packed, unpacked
from ezsd.cache.format.schema import CHECKSUM, CHECKSUMS, OFFSET, SCALE, ArraySpec, Schema, array_spec
from ezsd.cache.format.sealed_json import JSON, compact_json, parse_json
from ezsd.cache.journal.bad_images import all_bad_images, bad_attributes
from ezsd.cache.journal.entries import ENTRY, Entry, journal_folder, little_endian, raw_bytes, read_note, scratch_folder
from ezsd.cache.journal.plan import Plan, read_plan
from ezsd.cache.journal.shards import Piece, ShardRecord, ShardTask, commit_shard, record_name


@dataclass(frozen=True)
class Shards:
    """The shards of the per-image arrays, and the rows of blocks that go into each."""

    plan: Plan
    plan_digest: str
    """The plan's, when the tasks were made: a task of another build is refused."""
    counts: Mapping[str, Sequence[int]]
    """Rows of each block, by per-image product."""
    crc32: Mapping[str, Sequence[int]]
    """CRC-32 of the rows of each block, by array."""
    _records: dict[int, tuple[str, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Results of `_records_of`: blocks share their shards."""

    @classmethod
    def of_entries(cls, plan: Plan, entries: Sequence[Entry]) -> "Shards":
        """The shards of blocks, from their journal entries in order."""
        crc32 = {name: [entry.arrays[name]["crc32"] for entry in entries] for name, _, _ in plan.columns}
        # All arrays of a product have as many rows.
        first = {product: name for name, product, _ in reversed(plan.columns)}
        counts = {product: [entry.arrays[name]["shape"][0] for entry in entries] for product, name in first.items()}
        return cls(plan, plan.digest, counts, crc32)

    def to_bytes(self) -> bytes:
        """All that decides what goes into which shard, for `read`."""
        crc32 = {name: packed(sums) for name, sums in self.crc32.items()}
        return compact_json({"plan": self.plan_digest, "counts": self.counts, "crc32": crc32}).encode()

    @classmethod
    def read(cls, store: Path, digest: str) -> "Shards":
        """The shards that the builder left a note of.

        Raises:
            StoreError: the note is not there, or another one.
        """
        where = f"note {digest}"
        found = parse_json(read_note(store, digest), where)
        if not {"plan", "counts", "crc32"} <= found.keys():
            raise StoreError(f"{where}: expected what goes into the shards, found {', '.join(sorted(found))}")
        crc32 = {name: unpacked(sums).tolist() for name, sums in found["crc32"].items()}
        return cls(read_plan(store), found["plan"], found["counts"], crc32)

    def rows(self, product: str) -> int:
        """Rows of a per-image product in the store."""
        return self._starts[product][-1]

    @cached_property
    def _starts(self) -> dict[str, list[int]]:
        """First row of each block in the store, and the number of all rows, by per-image product."""
        return {product: [0, *accumulate(counts)] for product, counts in self.counts.items()}

    @cached_property
    def arrays(self) -> list[ArraySpec]:
        """Geometry of the arrays of per-image products."""
        return [
            array_spec(name, field.dtype, (self.rows(product), *field.trailing), shard_bytes=self.plan.shard_bytes)
            for name, product, field in self.plan.columns
        ]

    @cached_property
    def _places(self) -> list[tuple[ArraySpec, int]]:
        """Array and shard of each task.

        The largest array comes last and in order, so that its finished shards free the blocks they were made from:
        the disk then holds little more than one copy at any time.
        """
        arrays = sorted(self.arrays, key=lambda spec: spec.shape[0] * spec.row_bytes)
        return [(spec, shard) for spec in arrays for shard in range(spec.shards)]

    def task(self, number: int) -> ShardTask:
        """The task that writes a shard."""
        spec, shard = self._places[number]
        pieces = tuple(self._pieces(spec, shard))
        return ShardTask(
            spec, shard, self.plan_digest, pieces, tuple(self._records_of(piece.block) for piece in pieces)
        )

    @cached_property
    def tasks(self) -> list[ShardTask]:
        """Tasks of the commit, one for each shard of each per-image array, finished or not."""
        return [self.task(number) for number in range(len(self._places))]

    def _pieces(self, spec: ArraySpec, shard: int) -> Iterator[Piece]:
        (start, stop), starts = spec.shard_range(shard), self._starts[spec.name.partition("/")[0]]
        sums, index = self.crc32[spec.name], bisect_right(starts, start) - 1
        while index < len(sums) and starts[index] < stop:
            first, last = starts[index], starts[index + 1]
            low, high = max(start, first), min(stop, last)
            if low < high:
                yield Piece(index, low - first, high - first, sums[index])
            index += 1

    def _records_of(self, block: int) -> tuple[str, ...]:
        """Names of the records of all shards that a block goes into."""
        found = self._records.get(block)
        if found is None:
            names = [record_name(spec, shard) for spec in self.arrays for shard in self._shards_of(spec, block)]
            found = self._records[block] = tuple(names)
        return found

    def _shards_of(self, spec: ArraySpec, block: int) -> range:
        starts = self._starts[spec.name.partition("/")[0]]
        first, last = starts[block], starts[block + 1]
        return range(first // spec.shard_rows, -(-last // spec.shard_rows)) if first < last else range(0)


@dataclass(frozen=True)
class Committer:
    """Everything a commit derives from a plan and the journal entries of its blocks, in their order."""

    plan: Plan
    entries: Sequence[Entry]

    @cached_property
    def shards(self) -> Shards:
        """The shards to be written."""
        return Shards.of_entries(self.plan, self.entries)

    @property
    def tasks(self) -> list[ShardTask]:
        """The tasks of all shards, in the order in which they are done."""
        return self.shards.tasks

    def _offsets(self, product: str) -> NDArray[np.int64]:
        """Row at which each image begins, and the total at the end: (n + 1,)."""
        counts = np.concatenate([entry.attributes["counts"][product] for entry in self.entries])
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])

    def small_arrays(self, entries: Mapping[str, Entry]) -> dict[str, NDArray[Any]]:
        """All arrays of data that are not written by tasks, by name; `entries` of the per-store products."""
        arrays: dict[str, NDArray[Any]] = {f"images/{name}": rows for name, rows in self.plan.arrays.items()}
        arrays |= {
            f"{product}/{OFFSET.name}": little_endian(self._offsets(product), OFFSET.dtype)
            for product in self.plan.schema.per_image
        }
        arrays |= {
            f"{name}/{field.name}": entries[name].array(field.name)
            for name, product in self.plan.schema.per_store.items()
            for field in product.fields
        }
        return arrays


def commit_numbered(path: str | os.PathLike[str], digest: str, number: int) -> None:
    """Commit one shard by its number, as of `StoreWriter.commit_numbers`.

    Raises:
        StoreError: the builder left no such note, or a block was computed again since; see also `commit_shard`.
    """
    commit_shard(path, _shards(Path(path).absolute(), digest).task(number))


@lru_cache(maxsize=1)
def _shards(store: Path, digest: str) -> Shards:
    return Shards.read(store, digest)


def root_attributes(
    manifest: Manifest, rows: Mapping[str, int], *, images: int, embed_dim: int | None
) -> dict[str, JSON]:
    """Attributes of the store's root group for any Zarr reader; `rows` of each per-image product."""
    of_regions = {} if manifest.schema else {"embed_dim": embed_dim, "embedding": manifest.embedding}
    return {
        "ezsd_store": {
            "format_version": manifest.format_version,
            "manifest_digest": manifest.digest,
            "fingerprints": manifest.fingerprints,
            **of_regions,
            "images": images,
            "rows": rows,
        }
    }


def array_attributes(name: str, schema: Schema) -> dict[str, JSON]:
    """Attributes of an array for any Zarr reader: the rule from int8 to unit vectors."""
    product, _, column = name.partition("/")
    if any(field.name == column and field.kept == "int8" for field in schema.per_image[product].fields):
        return {"unit_vector": f"{column}[row] * {column}{SCALE}[row]"}
    return {}


@dataclass(frozen=True)
class Finisher:
    """Writes what is left when all shards are there; collects every file's digest for the commit mark."""

    committer: Committer
    shards: Mapping[str, ShardRecord]
    """Digests by file, for every task."""
    files: dict[str, FileDigest]
    """Grows as files are written; begins empty."""

    @property
    def _store(self) -> Path:
        return self.committer.plan.store

    @property
    def _groups(self) -> tuple[str, ...]:
        return self.committer.plan.schema.groups

    def finish(self, entries: Mapping[str, Entry]) -> None:
        """Small arrays, checksums, metadata and manifest, then the commit mark, then the journal goes.

        Args:
            entries: of the per-store products.
        """
        plan, nodes = self.committer.plan, dict[str, JSON]()
        self.files.update({name: record.digest for name, record in self.shards.items()})
        described = {product: whole.attributes["user"] for product, whole in entries.items()}
        described["images"] = bad_attributes(all_bad_images(entry.attributes for entry in self.committer.entries))
        for group in self._groups:
            nodes[group] = encoding.group_metadata(described.get(group, {}))
        for name in (CHECKSUMS, *(f"{CHECKSUMS}/{group}" for group in self._groups)):
            nodes[name] = encoding.group_metadata({})
        sums: list[tuple[ArraySpec, ArrayLike]] = []
        for spec in self.committer.shards.arrays:
            attributes = array_attributes(spec.name, plan.schema)
            nodes[spec.name] = encoding.array_metadata(spec, attributes)
            shards = range(spec.shards)
            found = [self.shards[spec.shard_file(n)].chunk_crc32 for n in shards]
            sums.append((spec, np.concatenate([np.empty(0, CHECKSUM.dtype), *found])))
        for name, rows in self.committer.small_arrays(entries).items():
            spec, small = self._write_array(name, rows)
            nodes[name] = encoding.array_metadata(spec)
            sums.append((spec, small))
        for spec, of_chunks in sums:
            of = checksum_spec(spec, shard_bytes=plan.shard_bytes)
            self._write_array(of.name, little_endian(of_chunks, CHECKSUM.dtype))
            nodes[of.name] = encoding.array_metadata(of)
        self._write_metadata(nodes)
        self._remove_strays()
        self._flush()
        embedding = plan.manifest.embedding
        mark = CommitMark(plan.manifest.digest, plan.embed_dim, embedding, self.files, plan.manifest.schema)
        write_atomic(self._store / COMMIT, mark.to_bytes(), scratch=scratch_folder(self._store), point="commit")
        remove_journal(self._store)

    def _write_metadata(self, nodes: Mapping[str, JSON]) -> None:
        for name, metadata in nodes.items():
            assert isinstance(metadata, dict)
            self._write(f"{name}/zarr.json", encoding.metadata_bytes(metadata))
        plan = self.committer.plan
        rows = {product: self.committer.shards.rows(product) for product in plan.schema.per_image}
        attributes = root_attributes(plan.manifest, rows, images=len(plan.image_ids), embed_dim=plan.embed_dim)
        self._write("zarr.json", encoding.metadata_bytes(encoding.root_metadata(attributes, nodes)))
        self._write(MANIFEST, plan.manifest.to_json().encode())

    def _write_array(self, name: str, rows: NDArray[Any]) -> tuple[ArraySpec, list[int]]:
        """Write a small array; returns its geometry and the checksums of its chunks."""
        spec = array_spec(name, rows.dtype.str, rows.shape, shard_bytes=self.committer.plan.shard_bytes)
        found: list[int] = []
        for shard in range(spec.shards):
            start, stop = spec.shard_range(shard)
            sums = ChunkSums(spec, shard)
            parts = sums.watch(encoding.shard_parts(spec, shard, [raw_bytes(rows[start:stop])]))
            self._write(spec.shard_file(shard), b"".join(parts))
            found += sums.sums
        return spec, found

    def _write(self, name: str, data: bytes) -> None:
        target, scratch = inside(self._store, name), scratch_folder(self._store)
        self.files[name] = write_atomic(target, data, scratch=scratch, point="metadata", flush=False)

    def _flush(self) -> None:
        """Have all that the commit mark is going to list on the disk; shards were flushed when they were written."""
        files = [self._store / name for name in self.files if name not in self.shards]
        sync_together(files)
        # A shard's own folder was flushed before its record was written; those above it may have been made by a worker
        # that was killed before it could flush them.
        names = [posixpath.dirname(name) if name in self.shards else name for name in self.files]
        sync_together(self._store / folder for folder in _folders_above(names))

    def _remove_strays(self) -> None:
        """Remove files that an earlier attempt left and this commit does not list, and folders left empty by that."""
        for group in (*self._groups, CHECKSUMS):
            folder = inside(self._store, group)
            files, empty = all_below(folder)
            strays = [name for name in files if f"{group}/{name}" not in self.files]
            for name in strays:
                discard(folder / name)
            if strays:
                empty = empty_folders(folder)
            while empty:
                for name in empty:
                    (folder / name).rmdir()
                empty = empty_folders(folder)


def _folders_above(names: Iterable[str]) -> set[str]:
    """All folders on the way to files of a store, relative to it; the store's own is the empty text."""
    found: set[str] = set()
    for name in names:
        while name and (name := posixpath.dirname(name)) not in found:
            found.add(name)
    return found


def remove_journal(store: Path) -> None:
    """Take away what only the build needed; safe to repeat after a kill, since the commit mark is there."""
    journal = journal_folder(store)
    if journal.is_dir():
        discard(scratch_folder(store))
        failpoint("journal.half_removed")
        _remove_emptied(journal)
        shutil.rmtree(journal)
        failpoint("journal.removed")
    discard(store / LOCK)
    sync(store)


def _remove_emptied(journal: Path) -> None:
    """Remove blocks whose data are gone, thousands of folders that only have an entry.

    `rmtree`, which is slower, takes all else, also the data of blocks that lose their entry here.
    """
    with os.scandir(journal) as found:
        # Links are not followed, and left to `rmtree`.
        folders = [each.path for each in found if each.name.startswith("block-") and each.is_dir(follow_symlinks=False)]
    for folder in folders:
        with contextlib.suppress(OSError):
            os.unlink(f"{folder}/{ENTRY}")
            os.rmdir(folder)
