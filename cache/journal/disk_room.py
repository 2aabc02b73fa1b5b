"""Bytes of a store, finished and at the height of its build."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ezsd.cache.format.schema import SHARD_BYTES, Schema, array_spec
from ezsd.cache.format.zarr_bytes import shard_bytes_on_disk
from ezsd.cache.journal.commit import Committer
from ezsd.cache.journal.entries import Entry
from ezsd.cache.journal.shards import ShardTask

_METADATA = 2**21
"""Bytes of every store besides its rows: thirty small arrays, padded to full chunks, per-store products, metadata."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Bytes of a store's files, when finished and at the height of its build (journal included)."""

    final: int
    peak: int


def forecast(
    rows: Mapping[str, int],
    *,
    images: int,
    schema: Schema,
    shard_bytes: int = SHARD_BYTES,
) -> Forecast:
    """Bytes of a store with this many rows of each per-image product.

    At the peak all narrow arrays are on the disk twice, once in the journal, and of the largest array two shards:
    its blocks go as soon as the shards that hold their rows are there.
    """
    columns = [(product, field) for product in schema.per_image for field in schema.stored(product)]
    shapes = [(field.dtype, (rows[product], *field.trailing)) for product, field in columns]
    arrays = [array_spec("", dtype, shape, shard_bytes=shard_bytes) for dtype, shape in shapes]
    sizes = [[shard_bytes_on_disk(spec, shard) for shard in range(spec.shards)] for spec in arrays]
    largest = max(sizes, key=sum)
    final = sum(map(sum, sizes)) + images * (16 + 8 * len(schema.per_image)) + _METADATA
    return Forecast(final, 2 * final - sum(largest) + 2 * max(largest, default=0))


def room_to_commit(committer: Committer, tasks: Iterable[ShardTask]) -> int:
    """Bytes that the disk must have free for these tasks, one after another, while finished blocks are dropped."""
    tasks = list(tasks)
    left: dict[int, int] = {}
    for task in tasks:
        for piece in task.pieces:
            left[piece.block] = left.get(piece.block, 0) + 1
    used = most = 0
    for task in tasks:
        used += shard_bytes_on_disk(task.array, task.shard)
        most = max(most, used)
        for piece in task.pieces:
            left[piece.block] -= 1
            if not left[piece.block] and committer.entries[piece.block].sized:
                used -= committer.entries[piece.block].bytes_
    return most


def small_bytes(committer: Committer, entries: Mapping[str, Entry]) -> int:
    """Bytes that the end of a commit writes: offsets, images, per-store products (their `entries`), metadata."""
    images = len(committer.plan.image_ids)
    offsets = 8 * len(committer.plan.schema.per_image)
    return images * (16 + offsets) + sum(entry.bytes_ for entry in entries.values()) + _METADATA
