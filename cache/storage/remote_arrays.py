"""Rows straight from shards behind a URL: the chunk index of a shard is asked for once, and chunks many at once.

Like `direct`, for arrays whose `zarr.json` is the one this package writes. Chunks that were fetched are kept for a
while, since the checks of a reader and the rows of neighbouring images need the same ones.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from ezsd.cache.errors import StoreError
from ezsd.cache.files import PUSHED
from ezsd.cache.format.schema import ArraySpec
from ezsd.cache.format.zarr_bytes import index_bytes, shard_bytes_on_disk, shard_chunks, shard_index
from ezsd.cache.storage.arrays import RowArray

_DAMAGED = f"the store is damaged: {PUSHED}"
_KEPT_BYTES = 32 * 2**20
"""Fetched chunks of an array are kept up to this size, and those of the last batch however large they are."""


class RemoteFiles(Protocol):
    """Files behind a URL, as `RemotePlace` has them."""

    def url_of(self, name: str) -> str:
        """The URL of a file."""
        ...

    def stated_size(self, name: str) -> int | None:
        """The size that the commit mark states; None for a file that it does not list."""
        ...

    def fetch(self, name: str, start: int, stop: int) -> bytes | None:
        """Bytes `start` to `stop` (exclusive) of a file; None where there is no such file."""
        ...

    def read_file(self, name: str) -> bytes:
        """A file, once it has its digest; StoreError if it cannot be read."""
        ...

    def workers(self) -> Executor:
        """The threads that fetch."""
        ...


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring chunks of one shard, on their way; None where another writer rearranged the shard."""

    first: int
    """Number of the first of them in the array."""
    data: "Future[bytes | None]"


def _has_failed(data: "Future[bytes | None]") -> bool:
    return data.done() and data.exception() is not None


class RemoteArray:
    """An array of a store behind a URL, read-only; belongs to one process.

    Args:
        spec: the array.
        files: source of its shards.
        otherwise: gives the same array for shards whose chunks another writer rearranged.
        whole: take each shard as a whole, once it has the digest that the commit mark states; for small arrays.
    """

    def __init__(self, spec: ArraySpec, files: RemoteFiles, otherwise: Callable[[], RowArray], *, whole: bool) -> None:
        self.shape, self.dtype = spec.shape, np.dtype(spec.dtype)
        self._spec, self._files, self._through, self._whole = spec, files, otherwise, whole
        self._chunk_bytes = spec.chunk_rows * spec.row_bytes
        self._shard_chunks = spec.shard_rows // spec.chunk_rows
        self.renewed = 0
        """Number of times that chunks were let go, see `RowArray`."""
        self._runs: dict[int, _Run] = {}
        self._ordered: dict[int, bool] = {}
        self._lock = Lock()
        self._index_locks: defaultdict[int, Lock] = defaultdict(Lock)

    def file(self, row: int) -> str:
        """Place of a row for errors: the URL of its file."""
        return self._files.url_of(self._spec.shard_file(row // self._spec.shard_rows))

    def shard_files(self) -> Iterator[str]:
        """Every file that rows are read from, below the array's folder."""
        prefix = f"{self._spec.name}/"
        return (self._spec.shard_file(shard).removeprefix(prefix) for shard in range(self._spec.shards))

    def read_ahead(self, spans: Sequence[tuple[int, int]]) -> None:
        """Have the chunks of these ranges of rows fetched, all at once."""
        self._begin(sorted({chunk for start, stop in spans for chunk in self._chunks(start, stop)}))

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows `start` to `stop` (exclusive), read-only.

        Raises:
            StoreError: a shard is missing, damaged, or cannot be reached.
        """
        chunks = self._chunks(start, stop)
        if not chunks:
            return np.empty((0, *self.shape[1:]), self.dtype)
        runs = self._begin(chunks)
        try:
            parts = [self._chunk_of(run, chunk) for run, chunk in zip(runs, chunks, strict=True)]
        except BaseException:
            # Not kept: the next read asks again.
            self._forget(chunks)
            raise
        if any(part is None for part in parts):
            return self._otherwise().read(start, stop)
        data = b"".join(part for part in parts if part is not None)
        rows = np.frombuffer(data, self.dtype).reshape(-1, *self.shape[1:])
        low = start - chunks[0] * self._spec.chunk_rows
        return rows[low : low + stop - start]

    def _chunks(self, start: int, stop: int) -> range:
        """Numbers in the array of the chunks that hold these rows."""
        return range(start // self._spec.chunk_rows, -(-stop // self._spec.chunk_rows) if start < stop else 0)

    def _chunk_of(self, run: _Run, chunk: int) -> memoryview | None:
        data, low = run.data.result(), (chunk - run.first) * self._chunk_bytes
        return None if data is None else memoryview(data)[low : low + self._chunk_bytes]

    def _begin(self, chunks: Sequence[int]) -> list[_Run]:
        """The runs of these chunks, of which those that are not on their way are sent for now."""
        with self._lock:
            for chunk in chunks:
                if chunk in self._runs and _has_failed(self._runs[chunk].data):
                    # Read ahead, and never read since: asked for again.
                    del self._runs[chunk]
            missing = [chunk for chunk in chunks if chunk not in self._runs]
            # What was read ahead is kept until more is wanted than that.
            if missing and len(self._runs) * self._chunk_bytes > _KEPT_BYTES:
                self.renewed += 1
                self._runs = {chunk: self._runs[chunk] for chunk in chunks if chunk in self._runs}
            for shard, first, last in self._together(missing):
                run = _Run(first, self._files.workers().submit(self._fetch, shard, first, last))
                self._runs |= dict.fromkeys(range(first, last), run)
            return [self._runs[chunk] for chunk in chunks]

    def _otherwise(self) -> RowArray:
        """Array through zarr, which fetches its rows anew."""
        self.renewed += 1
        return self._through()

    def _forget(self, chunks: Iterable[int]) -> None:
        with self._lock:
            self.renewed += 1
            for chunk in chunks:
                self._runs.pop(chunk, None)

    def _together(self, chunks: Sequence[int]) -> list[tuple[int, int, int]]:
        """Shard, first and last (exclusive) chunk of each request for these chunks, which are in order."""
        found: list[tuple[int, int, int]] = []
        for chunk in chunks:
            shard = chunk // self._shard_chunks
            first, last = chunk, chunk + 1
            if self._whole:
                first = shard * self._shard_chunks
                last = first + shard_chunks(self._spec, shard)
            if found and found[-1][0] == shard and found[-1][2] >= first:
                first = found.pop()[1]
            found.append((shard, first, last))
        return found

    def _fetch(self, shard: int, first: int, last: int) -> bytes | None:
        """The bytes of some chunks of a shard; None where they are not where this package puts them."""
        name, before = self._spec.shard_file(shard), shard * self._shard_chunks
        size = shard_bytes_on_disk(self._spec, shard)
        if self._files.stated_size(name) != size:
            return None
        if self._whole or last - first == shard_chunks(self._spec, shard):
            data = self._files.read_file(name) if self._whole else self._range(name, 0, size)
            return data if self._is_ordered(shard, lambda: data[-index_bytes(self._spec) :]) else None
        if not self._is_ordered(shard, lambda: self._range(name, size - index_bytes(self._spec), size)):
            return None
        return self._range(name, (first - before) * self._chunk_bytes, (last - before) * self._chunk_bytes)

    def _range(self, name: str, start: int, stop: int) -> bytes:
        data = self._files.fetch(name, start, stop)
        if data is None:
            raise StoreError(f"{self._files.url_of(name)}: is not there; {_DAMAGED}")
        if len(data) != stop - start:
            raise StoreError(f"{self._files.url_of(name)}: is too short for its rows; {_DAMAGED}")
        return data

    def _is_ordered(self, shard: int, index: Callable[[], bytes]) -> bool:
        """True if a shard's chunks follow one another, by its index, which is asked for once."""
        with self._lock:
            lock = self._index_locks[shard]
        with lock:
            if shard not in self._ordered:
                start, stop = self._spec.shard_range(shard)
                found, expected = index(), shard_index(self._spec, stop - start)
                if found != expected and google_crc32c.value(found[:-4]) != int.from_bytes(found[-4:], "little"):
                    where = self._files.url_of(self._spec.shard_file(shard))
                    raise StoreError(f"{where}: the chunk index does not match its checksum; {_DAMAGED}")
                self._ordered[shard] = found == expected
            return self._ordered[shard]
