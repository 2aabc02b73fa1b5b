"""CRC-32 of every chunk: taken while a shard is written, and used to say which rows of a damaged one are lost."""

import zlib
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from ezsd.cache.format.schema import CHECKSUM, CHECKSUMS, ArraySpec, array_spec
from ezsd.cache.format.zarr_bytes import shard_bytes_on_disk, shard_chunks, shard_index


class ChunkSums:
    """Checksums of a shard's chunks, taken from its bytes as they pass by."""

    def __init__(self, spec: ArraySpec, index: int) -> None:
        self._chunk_bytes = spec.chunk_rows * spec.row_bytes
        self._chunks = shard_chunks(spec, index)
        self._room = self._chunk_bytes
        self._sum = 0
        self.sums: list[int] = []
        """CRC-32 of each chunk so far, padding included."""

    def watch(self, parts: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
        """Hand the parts on unchanged."""
        for part in parts:
            self._take(memoryview(part))
            yield part

    def _take(self, data: memoryview) -> None:
        while len(data) and len(self.sums) < self._chunks:
            piece = data[: self._room]
            self._sum = zlib.crc32(piece, self._sum)
            self._room -= len(piece)
            data = data[len(piece) :]
            if not self._room:
                self.sums.append(self._sum)
                self._room, self._sum = self._chunk_bytes, 0


def checksum_spec(spec: ArraySpec, *, shard_bytes: int) -> ArraySpec:
    """Geometry of the array that holds another array's checksums."""
    chunks = -(-spec.shape[0] // spec.chunk_rows)
    return array_spec(f"{CHECKSUMS}/{spec.name}", CHECKSUM.dtype, (chunks,), shard_bytes=shard_bytes)


def bad_chunks(spec: ArraySpec, index: int, data: bytes, sums: NDArray[np.uint32]) -> list[int]:
    """Chunks of a shard, counted within it, whose bytes do not match their checksums.

    Args:
        spec: the array.
        index: which of its shards.
        data: the shard file's bytes, of any length; a chunk that they do not reach to is bad.
        sums: what `ChunkSums` found, for all chunks of the array.
    """
    size, first, view = (
        spec.chunk_rows * spec.row_bytes,
        spec.shard_range(index)[0] // spec.chunk_rows,
        memoryview(data),
    )
    return [
        chunk
        for chunk in range(shard_chunks(spec, index))
        if len(view) < (chunk + 1) * size or zlib.crc32(view[chunk * size : (chunk + 1) * size]) != sums[first + chunk]
    ]


def damaged_rows(spec: ArraySpec, index: int, data: bytes, sums: NDArray[np.uint32]) -> list[tuple[int, int]]:
    """Ranges of the array's rows (first, last exclusive) that a shard's bytes no longer hold as they were written.

    Args:
        spec: the array.
        index: which of its shards.
        data: the shard file's bytes, of any length.
        sums: what `ChunkSums` found, for all chunks of the array.

    Returns:
        Ranges in order, neighbours joined; all of the shard where its chunk index is not as it must be.
    """
    start, stop = spec.shard_range(index)
    chunk_bytes, chunks = spec.chunk_rows * spec.row_bytes, shard_chunks(spec, index)
    # The length first: an index as long as the metadata say is not made for a file that has none.
    if len(data) != shard_bytes_on_disk(spec, index) or data[chunks * chunk_bytes :] != shard_index(spec, stop - start):
        return [(start, stop)]
    return rows_of_chunks(spec, index, bad_chunks(spec, index, data, sums))


def rows_of_chunks(spec: ArraySpec, index: int, chunks: Iterable[int]) -> list[tuple[int, int]]:
    """Ranges of the array's rows (first, last exclusive) in chunks of a shard; in order, neighbours joined."""
    start, stop = spec.shard_range(index)
    found: list[tuple[int, int]] = []
    for chunk in chunks:
        low = start + chunk * spec.chunk_rows
        high = min(low + spec.chunk_rows, stop)
        if found and found[-1][1] == low:
            low = found.pop()[0]
        found.append((low, high))
    return found
