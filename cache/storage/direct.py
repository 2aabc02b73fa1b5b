"""Rows straight from memory-mapped shards: no chunk is decoded and no index looked at twice.

Only what can be sliced is: an array whose `zarr.json` is the one this package writes (`encoding.array_metadata`), and
shards that hold their chunks in file order. Everything else is read through zarr.

A shard is mapped when it is first touched. The map needs no descriptor; one is kept beside it, for `read_ahead` alone,
as long as there are plenty.
"""

import mmap
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from ezsd.cache.errors import StoreError
from ezsd.cache.files import MENDED, open_files_limit, open_to_read, read_bytes, unreadable
from ezsd.cache.format.schema import ArraySpec
from ezsd.cache.format.sealed_json import parse_json
from ezsd.cache.format.zarr_bytes import (
    array_metadata,
    index_bytes,
    shard_bytes_on_disk,
    shard_index,
    shard_rows,
    spec_of_metadata,
)
from ezsd.cache.storage.arrays import RowArray
from ezsd.cache.storage.memory_maps import map_file, will_need

_PAGE = mmap.PAGESIZE
# The kernel reads as much around a page fault of its own accord; a hint then costs more than it gains.
_HINTED = 16 * 2**10
# Descriptors up to this one are kept at most, whatever the limit and however many shards there are.
_KEPT = 256
# After so many ranges in a row that were in memory, of so many ranges one is asked about, until one is not there.
_TRUSTED = 256
_SAMPLED = 16
# Where a byte goes that nobody looks at.
_PROBE = (bytearray(1),)


def open_mapped(folder: Path, otherwise: Callable[[], RowArray]) -> "MappedArray | None":
    """The array in `folder`, or None when its layout is not ours.

    Args:
        folder: of the array.
        otherwise: gives the same array for shards whose chunks another writer rearranged.

    Raises:
        StoreError: its metadata cannot be read.
    """
    file = folder / "zarr.json"
    metadata = parse_json(read_bytes(file), str(file))
    try:
        spec = direct_spec(metadata, folder.name)
    except StoreError as error:
        raise StoreError(f"{folder.parent}/{error}") from error
    return None if spec is None else MappedArray(spec, folder, otherwise)


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
    """Cached `shard_index`: its checksum takes milliseconds, and all full shards of an array have the same."""
    return shard_index(ArraySpec("", "|i1", (rows, row_bytes), chunk_rows, shard_rows), rows)


def _in_file_order(mapped: NDArray[np.uint8], spec: ArraySpec, rows: int, file: Path) -> bool:
    """True if a shard's chunks follow one another, by its index."""
    # Compared before it is made: its length is what a file says.
    if len(mapped) < index_bytes(spec):
        raise StoreError(f"{file}: is {len(mapped)} bytes long, too short for a shard; the store is damaged: {MENDED}")
    expected = _index(spec.chunk_rows, spec.row_bytes, spec.shard_rows, rows)
    found = mapped[len(mapped) - len(expected) :].tobytes()
    if found != expected and google_crc32c.value(found[:-4]) != int.from_bytes(found[-4:], "little"):
        raise StoreError(f"{file}: the chunk index does not match its checksum; the store is damaged: {MENDED}")
    return found == expected


class MappedArray:
    """An array of a store on a local disk, read-only; safe to use on both sides of a fork."""

    renewed = 0
    """Always: a file that is mapped stays so."""

    def __init__(self, spec: ArraySpec, folder: Path, otherwise: Callable[[], RowArray]) -> None:
        """Use `open_mapped`."""
        self.shape = spec.shape
        self.dtype = np.dtype(spec.dtype)
        self._spec = spec
        self._folder = folder
        self._otherwise = otherwise
        self._shard_rows = spec.shard_rows
        self._row_bytes = spec.row_bytes
        self._shards: list[_Shard | None] = [None] * spec.shards
        self._rows: list[NDArray[Any] | _Rearranged | None] = [None] * spec.shards
        # Ranges in a row that were in memory when they were asked about, and ranges that were not asked about since.
        self._there = self._unasked = 0

    def file(self, row: int) -> str:
        """Place of a row for errors: its file, or the array's folder."""
        return str(self._shard_file(row // self._shard_rows))

    def shard_files(self) -> Iterator[str]:
        """Every file that rows are read from, below the array's folder."""
        return map(self._below_folder, range(self._spec.shards))

    def _below_folder(self, index: int) -> str:
        return self._spec.shard_file(index).partition("/")[2]

    def _shard_file(self, index: int) -> Path:
        return self._folder / self._below_folder(index)

    def _open(self, index: int) -> "NDArray[Any] | _Rearranged":
        """The rows of a shard that is touched for the first time; two threads may both do so, to the same effect.

        Raises:
            StoreError: it is missing, cut short, cannot be read, or its index does not match its checksum.
        """
        file = self._shard_file(index)
        try:
            shard = _Shard(file)
        except OSError as error:
            raise unreadable(file, error) from error
        start, stop = self._spec.shard_range(index)
        rows: NDArray[Any] | _Rearranged
        ordered = _in_file_order(shard.data, self._spec, stop - start, file)
        if ordered and len(shard.data) == shard_bytes_on_disk(self._spec, index):
            rows = shard_rows(self._spec, index, shard.data)
            self._shards[index] = shard
        else:
            rows = _Rearranged(self._otherwise(), start)
        self._rows[index] = rows
        return rows

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows `start` to `stop` (exclusive), read-only: a view of the file unless they span two shards."""
        shard, first = divmod(start, self._shard_rows)
        last = first + stop - start
        if last <= self._shard_rows and start < stop:
            rows = self._rows[shard]
            return (self._open(shard) if rows is None else rows)[first:last]
        parts = []
        for at, low, high in self._pieces(start, stop):
            rows = self._rows[at]
            parts.append((self._open(at) if rows is None else rows)[low:high])
        return np.concatenate(parts) if parts else np.empty((0, *self.shape[1:]), self.dtype)

    def read_ahead(self, spans: Sequence[tuple[int, int]]) -> None:
        """Ask the system to have these ranges of rows in memory soon, all at once instead of page by page.

        Where all was in memory for long, few ranges are asked about: each question takes a tenth of the read.
        """
        if self._there >= _TRUSTED:
            self._unasked += len(spans)
            if self._unasked < _SAMPLED:
                return
            self._unasked = 0
            sample = next((span for span in spans if self._is_long(*span)), None)
            if sample is None:
                return
            self._ask([sample])
            if self._there >= _TRUSTED:
                return
            spans = [span for span in spans if span is not sample]
        self._ask(spans)

    def _is_long(self, start: int, stop: int) -> bool:
        """True for a range that a hint may be worth while for."""
        return (stop - start) * self._row_bytes + _PAGE > _HINTED

    def _ask(self, spans: Sequence[tuple[int, int]]) -> None:
        for start, stop in spans:
            if not self._is_long(start, stop):
                continue
            shard, low = divmod(start, self._shard_rows)
            high = low + stop - start
            if start < stop and high <= self._shard_rows:
                self._hint(shard, low, high)
            else:
                for piece in self._pieces(start, stop):
                    self._hint(*piece)

    def _hint(self, shard: int, low: int, high: int) -> None:
        first = low * self._row_bytes // _PAGE * _PAGE
        length = high * self._row_bytes - first
        if length <= _HINTED:
            return
        if self._in_memory(shard, first + length // 2):
            self._there += 1
            return
        self._there = 0
        found = self._shards[shard]
        if found is not None:
            will_need(found.data, first, length)

    def _in_memory(self, shard: int, place: int) -> bool:
        """True if the byte at `place` can be had without the disk; a hint for what is there costs five times as much.

        One byte stands for its range: what is read together mostly stays together, and a hint changes no result.
        A system other than Linux cannot be asked: every range then gets its hint.
        """
        if self._rows[shard] is None:
            self._open(shard)
        found = self._shards[shard]
        if found is None or found.descriptor is None:
            return False
        try:
            return os.preadv(found.descriptor, _PROBE, place, os.RWF_NOWAIT) == 1
        except OSError:
            # It would have to wait, or this file system cannot tell.
            return False

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        while start < stop:
            shard, low = divmod(start, self._shard_rows)
            high = min(low + stop - start, self._shard_rows)
            yield shard, low, high
            start += high - low


class _Shard:
    """A mapped file, and a descriptor to ask what of it is in memory, where one could be kept."""

    def __init__(self, file: Path) -> None:
        descriptor = open_to_read(file)
        self.descriptor: int | None = None
        try:
            self.data = map_file(descriptor, os.fstat(descriptor).st_size)
            if _can_be_asked() and _plenty(descriptor):
                self.descriptor = descriptor
                weakref.finalize(self, os.close, descriptor)
        finally:
            if self.descriptor is None:
                os.close(descriptor)


def _can_be_asked() -> bool:
    return hasattr(os, "preadv") and hasattr(os, "RWF_NOWAIT")


def _plenty(descriptor: int) -> bool:
    """True if descriptors up to this one may be kept: a quarter of all, the rest is for others, and 256 at most.

    A shard without one is read all the same, and its hints are given without a question.
    """
    limit = open_files_limit()
    most = _KEPT if limit is None else min(limit // 4, _KEPT)
    return descriptor < most


class _Rearranged:
    """Rows of one shard, sliced out of an array that is read through zarr."""

    def __init__(self, array: RowArray, first: int) -> None:
        self._array, self._first = array, first

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        return self._array.read(self._first + rows.start, self._first + rows.stop)
