"""Commit of a journal to a store: the shard tasks, then the small arrays and metadata, then the commit mark."""

import hashlib
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ezsd.cache.errors import StoreError
from ezsd.cache.files import FileDigest, discard, failpoint, sync, sync_together, write_atomic
from ezsd.cache.format import zarr_bytes as encoding
from ezsd.cache.format.checksums import ChunkSums, checksum_spec
from ezsd.cache.format.commit_mark import COMMIT, LOCK, MANIFEST, CommitMark
from ezsd.cache.format.manifest import Manifest
from ezsd.cache.format.names import empty_folders, files_below, inside
from ezsd.cache.format.schema import CHECKSUM, CHECKSUMS, OFFSET, SCALE, ArraySpec, Schema, array_spec
from ezsd.cache.format.sealed_json import JSON
from ezsd.cache.journal.bad_images import all_bad_images, bad_attributes
from ezsd.cache.journal.entries import Entry, journal_folder, little_endian, raw_bytes, scratch_folder
from ezsd.cache.journal.plan import Plan, read_block, read_plan
from ezsd.cache.journal.shards import Piece, ShardRecord, ShardTask, commit_shard, record_name


@dataclass(frozen=True)
class Committer:
    """Everything a commit derives from a plan and the journal entries of its blocks, in their order."""

    plan: Plan
    entries: Sequence[Entry]

    def rows(self, product: str) -> int:
        """Rows of a per-image product in the store."""
        return self._starts[product][-1]

    @cached_property
    def _starts(self) -> dict[str, list[int]]:
        """First row of each block in the store, and the number of all rows, by per-image product."""
        columns = {name: f"{name}/{product.fields[0].name}" for name, product in self.plan.schema.per_image.items()}
        return {
            product: [0, *accumulate(int(entry.arrays[column]["shape"][0]) for entry in self.entries)]
            for product, column in columns.items()
        }

    @cached_property
    def ragged(self) -> list[ArraySpec]:
        """Geometry of the arrays of per-image products."""
        return [
            self._spec(f"{product}/{field.name}", field.dtype, (rows, *field.trailing))
            for product in self.plan.schema.per_image
            for rows in [self.rows(product)]
            for field in self.plan.schema.stored(product)
        ]

    @cached_property
    def tasks(self) -> list[ShardTask]:
        """Tasks of the commit, one for each shard of each per-image array, finished or not.

        The largest array comes last and in order, so that its finished shards free the blocks they were made from:
        the disk then holds little more than one copy at any time.
        """
        arrays = sorted(self.ragged, key=lambda spec: spec.shape[0] * spec.row_bytes)
        shards = [(spec, shard, tuple(self._pieces(spec, shard))) for spec in arrays for shard in range(spec.shards)]
        records: dict[int, list[str]] = {}
        for spec, shard, pieces in shards:
            name = record_name(spec, shard)
            for piece in pieces:
                records.setdefault(piece.block, []).append(name)
        shared = {block: tuple(names) for block, names in records.items()}
        return [
            ShardTask(spec, shard, self.plan.digest, pieces, tuple(shared[piece.block] for piece in pieces))
            for spec, shard, pieces in shards
        ]

    @cached_property
    def digest(self) -> str:
        """Sha256 of everything that goes into the shards, hexadecimal."""
        return hashlib.sha256("".join(task.sources for task in self.tasks).encode()).hexdigest()

    def _pieces(self, spec: ArraySpec, shard: int) -> Iterator[Piece]:
        (start, stop), starts = spec.shard_range(shard), self._starts[spec.name.partition("/")[0]]
        index = bisect_right(starts, start) - 1
        while index < len(self.entries) and starts[index] < stop:
            first, last = starts[index], starts[index + 1]
            low, high = max(start, first), min(stop, last)
            if low < high:
                yield Piece(index, low - first, high - first, self.entries[index].arrays[spec.name]["crc32"])
            index += 1

    def _spec(self, name: str, dtype: str, shape: tuple[int, ...]) -> ArraySpec:
        return array_spec(name, dtype, shape, shard_bytes=self.plan.shard_bytes)

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
        StoreError: a block was computed again since; see also `commit_shard`.
    """
    committer = _committer(Path(path).absolute(), digest)
    commit_shard(path, committer.tasks[number])


@lru_cache(maxsize=1)
def _committer(store: Path, digest: str) -> Committer:
    plan = read_plan(store)
    committer = Committer(plan, [read_block(plan, block.index) for block in plan.blocks])
    if committer.digest != digest:
        raise StoreError(f"{store}: a block was written anew after the tasks were made; run the build again")
    return committer


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
        sums: list[tuple[ArraySpec, list[int]]] = []
        for spec in self.committer.ragged:
            attributes = array_attributes(spec.name, plan.schema)
            nodes[spec.name] = encoding.array_metadata(spec, attributes)
            shards = range(spec.shards)
            sums.append((spec, [crc for n in shards for crc in self.shards[spec.shard_file(n)].chunk_crc32]))
        for name, rows in self.committer.small_arrays(entries).items():
            spec, found = self._write_array(name, rows)
            nodes[name] = encoding.array_metadata(spec)
            sums.append((spec, found))
        for spec, found in sums:
            of = checksum_spec(spec, shard_bytes=plan.shard_bytes)
            self._write_array(of.name, little_endian(found, CHECKSUM.dtype))
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
        rows = {product: self.committer.rows(product) for product in plan.schema.per_image}
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
        folders = {self._store / above for name in self.files for above in Path(name).parents}
        sync_together(files)
        sync_together(folders)

    def _remove_strays(self) -> None:
        """Remove files that an earlier attempt left and this commit does not list, and folders left empty by that."""
        for group in (*self._groups, CHECKSUMS):
            folder = inside(self._store, group)
            for name in files_below(folder):
                if f"{group}/{name}" not in self.files:
                    discard(folder / name)
            while empty := empty_folders(folder):
                for name in empty:
                    (folder / name).rmdir()


def remove_journal(store: Path) -> None:
    """Take away what only the build needed; safe to repeat after a kill, since the commit mark is there."""
    journal = journal_folder(store)
    if journal.is_dir():
        discard(scratch_folder(store))
        failpoint("journal.half_removed")
        shutil.rmtree(journal)
        failpoint("journal.removed")
    discard(store / LOCK)
    sync(store)
