"""Bytes of a store, finished and at the height of its build."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ezsd.cache.errors import StoreError
from ezsd.cache.format.schema import SHARD_BYTES, Field, Schema, array_spec
from ezsd.cache.format.zarr_bytes import shard_bytes_on_disk
from ezsd.cache.journal.commit import Committer
from ezsd.cache.journal.entries import Entry
from ezsd.cache.journal.shards import ShardTask

_METADATA = 2**21
"""Bytes of every store besides its rows: thirty small arrays, padded to full chunks, and metadata."""


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
    """Bytes of a store with this many rows.

    At the peak all narrow arrays and per-store products are on the disk twice, once in the journal, and of the largest
    array of rows of images two shards: its blocks go as soon as the shards that hold their rows are there.

    Args:
        rows: number of rows of each per-image product by its name, and of each array of a per-store product by its
            path in the store, such as `text/embedding`.
        images: number of images.
        schema: of the store.
        shard_bytes: about how large a shard may be.

    Raises:
        StoreError: a number of rows is missing, or is that of no product or array.
    """
    whole = [f"{product}/{field.name}" for product in schema.per_store for field in schema.stored(product)]
    if rows.keys() != {*schema.per_image, *whole}:
        expected, found = ", ".join([*schema.per_image, *whole]), ", ".join(map(str, rows))
        raise StoreError(f"rows: expected a number for each of {expected}; found {found or 'none'}")
    columns = [(product, field) for product in schema.per_image for field in schema.stored(product)]

    def sizes(number: int, field: Field) -> list[int]:
        spec = array_spec("", field.dtype, (number, *field.trailing), shard_bytes=shard_bytes)
        return [shard_bytes_on_disk(spec, shard) for shard in range(spec.shards)]

    of_images = [sizes(rows[product], field) for product, field in columns]
    of_store = [sizes(rows[array], schema.arrays[array]) for array in whole]
    largest = max(of_images, key=sum)
    final = sum(map(sum, [*of_images, *of_store])) + images * (16 + 8 * len(schema.per_image)) + _METADATA
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
