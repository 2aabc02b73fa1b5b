"""Rows straight from memory-mapped shards: no chunk is decoded and no index looked at twice.

Only what can be sliced is: an array whose `zarr.json` is the one this package writes (`encoding.array_metadata`), and
whose shards hold their chunks in file order. Whoever asks is told so when that is not the case, and reads through zarr.
"""

import mmap
import os
import weakref
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.durable import read_bytes
from cache.encoding import (
    array_metadata,
    crc32c,
    index_bytes,
    shard_bytes_on_disk,
    shard_index,
    shard_rows,
    spec_of_metadata,
)
from cache.manifest import parse_json
from cache.schema import ArraySpec, StoreError

_PAGE = mmap.PAGESIZE
# The kernel reads as much around a page fault of its own accord; a hint then costs more than it gains.
_HINTED = 16 * 2**10
# Where a byte goes that nobody looks at.
_PROBE = (bytearray(1),)


def open_mapped(folder: Path) -> "MappedArray | None":
    """The array in `folder`, or None when it must be read through zarr.

    Raises:
        StoreError: a shard is missing, cut short, or its index does not match its checksum.
    """
    file = folder / "zarr.json"
    metadata = parse_json(read_bytes(file), str(file))
    try:
        spec = direct_spec(metadata, folder.name)
    except StoreError as error:
        raise StoreError(f"{folder.parent}/{error}") from error
    if spec is None:
        return None
    array = MappedArray(spec)
    for index in range(spec.shards):
        if not array.map_shard(folder.joinpath(*spec.shard_file(index).split("/")[1:]), index):
            return None
    return array


def direct_spec(metadata: dict[str, Any], name: str) -> ArraySpec | None:
    """Geometry of an array that can be sliced in its files, from its `zarr.json`; None for any other layout.

    Raises:
        StoreError: it is the geometry of no array.
    """
    found = {key: value for key, value in metadata.items() if key != "dimension_names"}
    try:
        spec = spec_of_metadata(name, metadata)
        ours = array_metadata(spec, found.get("attributes"))
    except StoreError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return None
    return spec if found == ours else None


@lru_cache(maxsize=64)
def _index(chunk_rows: int, row_bytes: int, shard_rows: int, rows: int) -> bytes:
    """What `shard_index` gives; its checksum takes milliseconds, and all full shards of an array have the same."""
    return shard_index(ArraySpec("", "|i1", (rows, row_bytes), chunk_rows, shard_rows), rows)


def _in_file_order(mapped: mmap.mmap, spec: ArraySpec, rows: int, file: Path) -> bool:
    """Whether a shard's chunks lie one after another, as its index says."""
    # Compared before it is made: its length is what a file says.
    if len(mapped) < index_bytes(spec):
        raise _too_short(file, len(mapped))
    expected = _index(spec.chunk_rows, spec.row_bytes, spec.shard_rows, rows)
    found = mapped[len(mapped) - len(expected) :]
    if found != expected and crc32c(found[:-4]) != int.from_bytes(found[-4:], "little"):
        raise StoreError(f"{file}: the chunk index does not match its checksum; the store is damaged")
    return found == expected


def _too_short(file: Path, size: int) -> StoreError:
    return StoreError(f"{file}: is {size} bytes long, too short for a shard; the store is damaged")


class MappedArray:
    """One array of a store on a local disk, read-only; safe to use on both sides of a fork."""

    def __init__(self, spec: ArraySpec) -> None:
        """Use `open_mapped`."""
        self.shape = spec.shape
        self.dtype = np.dtype(spec.dtype)
        self._spec = spec
        self._shard_rows = spec.shard_rows
        self._row_bytes = spec.row_bytes
        self._files: list[int] = []
        self._maps: list[mmap.mmap] = []
        self._rows: list[NDArray[Any]] = []
        weakref.finalize(self, _close, self._files)

    def map_shard(self, file: Path, index: int) -> bool:
        """Map the next shard; False when its chunks do not lie in file order."""
        try:
            self._files.append(os.open(file, os.O_RDONLY | os.O_CLOEXEC))
            size = os.fstat(self._files[-1]).st_size
            if not size:
                raise _too_short(file, size)
            mapped = mmap.mmap(self._files[-1], 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise StoreError(f"{file}: cannot be read ({error.strerror}); the store is damaged") from error
        start, stop = self._spec.shard_range(index)
        if not _in_file_order(mapped, self._spec, stop - start, file) or size != shard_bytes_on_disk(self._spec, index):
            return False
        self._maps.append(mapped)
        self._rows.append(shard_rows(self._spec, index, mapped))
        return True

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows `start` to `stop` (exclusive), read-only: a view of the file unless they span two shards."""
        shard, first = divmod(start, self._shard_rows)
        last = first + stop - start
        if last <= self._shard_rows and start < stop:
            return self._rows[shard][first:last]
        parts = [self._rows[at][low:high] for at, low, high in self._pieces(start, stop)]
        return np.concatenate(parts) if parts else np.empty((0, *self.shape[1:]), self.dtype)

    def read_ahead(self, spans: Iterable[tuple[int, int]]) -> None:
        """Ask the system to have these ranges of rows in memory soon, all at once instead of page by page."""
        for start, stop in spans:
            for shard, low, high in self._pieces(start, stop):
                first = low * self._row_bytes // _PAGE * _PAGE
                length = high * self._row_bytes - first
                if length > _HINTED and not self._in_memory(shard, first + length // 2):
                    self._maps[shard].madvise(mmap.MADV_WILLNEED, first, length)

    def _in_memory(self, shard: int, place: int) -> bool:
        """Whether the byte at `place` can be had without the disk; a hint for what is there costs five times as much.

        One byte stands for its range: what is read together mostly stays together, and a hint changes no result.
        A system other than Linux cannot be asked: every range then gets its hint.
        """
        if not hasattr(os, "preadv") or not hasattr(os, "RWF_NOWAIT"):
            return False
        try:
            return os.preadv(self._files[shard], _PROBE, place, os.RWF_NOWAIT) == 1
        except OSError:
            # It would have to wait, or this file system cannot tell.
            return False

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        while start < stop:
            shard, low = divmod(start, self._shard_rows)
            high = min(low + stop - start, self._shard_rows)
            yield shard, low, high
            start += high - low


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)
