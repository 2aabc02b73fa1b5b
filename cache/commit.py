"""From journal to store: the shard tasks, then the small arrays and metadata, then the commit mark."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache import encoding
from cache.durable import FileDigest, discard, failpoint, sync_folder, write_atomic
from cache.journal import Entry, journal_folder, little_endian, raw_bytes, scratch_folder
from cache.manifest import JSON
from cache.mark import COMMIT, LOCK, MANIFEST, CommitMark, relative_files
from cache.plan import Plan
from cache.schema import FORMAT_VERSION, OFFSET, RAGGED, WHOLE, ArraySpec, array_spec
from cache.shards import Piece, ShardTask


@dataclass(frozen=True)
class Committer:
    """Everything a commit derives from a plan and the journal entries of its blocks, in their order."""

    plan: Plan
    entries: Sequence[Entry]

    def rows(self, product: str) -> int:
        """Rows of a ragged product in the whole store."""
        column = f"{product}/{RAGGED[product][0].name}"
        return sum(int(entry.arrays[column]["shape"][0]) for entry in self.entries)

    @cached_property
    def ragged(self) -> list[ArraySpec]:
        """Geometry of the arrays that hold ragged rows."""
        return [
            self._spec(f"{product}/{field.name}", field.dtype, (rows, *field.row_shape(self.plan.embed_dim)))
            for product, fields in RAGGED.items()
            for rows in [self.rows(product)]
            for field in fields
        ]

    def tasks(self) -> list[ShardTask]:
        """One task for each shard of each ragged array, finished or not."""
        return [
            ShardTask(spec, shard, self.plan.digest, tuple(self._pieces(spec, shard)))
            for spec in self.ragged
            for shard in range(spec.shards)
        ]

    def _pieces(self, spec: ArraySpec, shard: int) -> Iterator[Piece]:
        start, stop = spec.shard_range(shard)
        first = 0
        for index, entry in enumerate(self.entries):
            place = entry.arrays[spec.name]
            last = first + int(place["shape"][0])
            low, high = max(start, first), min(stop, last)
            if low < high:
                yield Piece(index, low - first, high - first, place["crc32"])
            first = last

    def _spec(self, name: str, dtype: str, shape: tuple[int, ...]) -> ArraySpec:
        return array_spec(name, dtype, shape, shard_bytes=self.plan.shard_bytes)

    def _offsets(self, product: str) -> NDArray[np.int64]:
        """Row at which each image begins, and the total at the end: (n + 1,)."""
        counts = np.concatenate([entry.array(f"{product}/count") for entry in self.entries])
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])

    def small_arrays(self, wholes: Mapping[str, Entry]) -> dict[str, NDArray[Any]]:
        """All arrays that are not written by tasks, by name."""
        arrays: dict[str, NDArray[Any]] = {f"images/{name}": rows for name, rows in self.plan.arrays.items()}
        arrays |= {
            f"{product}/{OFFSET.name}": little_endian(self._offsets(product), OFFSET.dtype) for product in RAGGED
        }
        arrays |= {f"{product}/{field.name}": wholes[product].array(field.name) for product, field in WHOLE.items()}
        return arrays

    def root_attributes(self) -> dict[str, JSON]:
        """What the store says about itself to any Zarr reader."""
        return {
            "ezsd_store": {
                "format_version": FORMAT_VERSION,
                "manifest_digest": self.plan.manifest.digest,
                "embed_dim": self.plan.embed_dim,
                "images": len(self.plan.image_ids),
                "rows": {product: self.rows(product) for product in RAGGED},
            }
        }


@dataclass(frozen=True)
class Finisher:
    """Writes what is left when all shards are there; collects every file's digest for the commit mark."""

    committer: Committer
    files: dict[str, FileDigest]

    @property
    def _store(self) -> Path:
        return self.committer.plan.store

    def finish(self, wholes: Mapping[str, Entry]) -> None:
        """Small arrays, metadata and manifest, then the commit mark, then the journal goes."""
        plan, nodes = self.committer.plan, dict[str, JSON]()
        for product in ("images", *RAGGED, *WHOLE):
            nodes[product] = encoding.group_metadata(wholes[product].attributes["user"] if product in WHOLE else {})
        for spec in self.committer.ragged:
            nodes[spec.name] = encoding.array_metadata(spec)
        for name, rows in self.committer.small_arrays(wholes).items():
            nodes[name] = encoding.array_metadata(self._write_array(name, rows))
        for name, metadata in nodes.items():
            assert isinstance(metadata, dict)
            self._write(f"{name}/zarr.json", encoding.metadata_bytes(metadata))
        root = encoding.root_metadata(self.committer.root_attributes(), nodes)
        self._write("zarr.json", encoding.metadata_bytes(root))
        self._write(MANIFEST, plan.manifest.to_json().encode())
        self._remove_strays()
        for folder in {(self._store / name).parent for name in self.files}:
            sync_folder(folder)
        mark = CommitMark(plan.manifest.digest, plan.images_digest, plan.embed_dim, self.files)
        write_atomic(self._store / COMMIT, mark.to_bytes(), scratch=scratch_folder(self._store), point="commit")
        remove_journal(self._store)

    def _write_array(self, name: str, rows: NDArray[Any]) -> ArraySpec:
        shard_bytes = self.committer.plan.shard_bytes
        spec = array_spec(name, rows.dtype.str, rows.shape, shard_bytes=shard_bytes)
        for shard in range(spec.shards):
            start, stop = spec.shard_range(shard)
            parts = encoding.shard_parts(spec, shard, [raw_bytes(rows[start:stop])])
            self._write(spec.shard_file(shard), b"".join(parts))
        return spec

    def _write(self, name: str, data: bytes) -> None:
        target, scratch = self._store / name, scratch_folder(self._store)
        self.files[name] = write_atomic(target, data, scratch=scratch, point="metadata", sync=False)

    def _remove_strays(self) -> None:
        """Remove files that an earlier attempt left and this commit does not list."""
        for product in ("images", *RAGGED, *WHOLE):
            for name in relative_files(self._store / product):
                if f"{product}/{name}" not in self.files:
                    discard(self._store / product / name)


def remove_journal(store: Path) -> None:
    """Take away what only the build needed; safe to repeat after a kill, since the commit mark is there."""
    journal = journal_folder(store)
    if journal.is_dir():
        discard(scratch_folder(store))
        failpoint("journal.half_removed")
        shutil.rmtree(journal)
        failpoint("journal.removed")
    discard(store / LOCK)
    sync_folder(store)
