"""Array access, the same for folders and URLs, and the two checks on the way."""

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ezsd.cache.errors import StoreError
from ezsd.cache.files import ABSENT, system_error, unreadable
from ezsd.cache.format.schema import SHARD_BYTES, array_spec
from ezsd.cache.format.zarr_bytes import fill_value

if TYPE_CHECKING:
    import zarr

_KEPT_BYTES = 32 * 2**20
"""Arrays up to this size are read once through zarr and kept: there a slice costs a millisecond, or a round trip."""

_INDEX_ENTRY = 16
"""Bytes of a chunk's entry in the index of its shard."""

_LARGE = np.uint64(0x4000_4000_4000_4000)
"""The highest bit of the exponent of four float16: set in numbers from 2 on, infinite ones and NaN."""


class RowArray(Protocol):
    """Rows of one array, in slices of axis 0."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def renewed(self) -> int:
        """A number that changes whenever rows that were read before may have to be fetched again: a new read."""
        ...

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows `start` to `stop` (exclusive); not to be written to."""
        ...

    def read_ahead(self, spans: Sequence[tuple[int, int]]) -> None:
        """Hint that these ranges of rows are read next."""
        ...

    def file(self, row: int) -> str:
        """Place of a row for errors: its file, or the array's folder."""
        ...

    def shard_files(self) -> Iterator[str]:
        """Every file that rows are read from, below the array's folder."""
        ...


class ZarrArray:
    """An array read through zarr-python: any codec chain, any place.

    Args:
        array: the array.
        where: its folder or URL.
        errors: makes one line of what reading raises, see `RemotePlace.errors`.

    Raises:
        StoreError: its chunks, or the index of a shard, are larger than any that fit the format.
    """

    def __init__(
        self, array: "zarr.Array[Any]", where: str, errors: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        _require_small_chunks(array, where)
        self._where = where
        self.shape = array.shape
        self.dtype = array.dtype
        self._array = array
        self._errors = errors
        self.renewed = 0
        """Reads of an array that is too large to be kept, see `RowArray`."""
        self._kept: NDArray[Any] | None = None

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows `start` to `stop` (exclusive); not to be written to."""
        if self._array.nbytes > _KEPT_BYTES:
            self.renewed += 1
            with self._errors():
                return np.asarray(self._array[start:stop])
        if self._kept is None:
            with self._errors():
                self._kept = np.asarray(self._array[:])
            self._kept.flags.writeable = False
        return self._kept[start:stop]

    def read_ahead(self, spans: Sequence[tuple[int, int]]) -> None:
        """Nothing to do: zarr has no such hint."""

    def file(self, row: int) -> str:
        """Place of a row for errors: its file, or the array's folder."""
        return self._where

    def shard_files(self) -> Iterator[str]:
        """Every file that rows are read from, below the array's folder; each is named only when asked for."""
        shards = self._array.shards or self._array.chunks
        counts = [-(-length // rows) for length, rows in zip(self.shape, shards, strict=True)]
        return map(self._array.metadata.encode_chunk_key, _places(counts))


def _require_small_chunks(array: "zarr.Array[Any]", where: str) -> None:
    """Refuse what zarr would allocate as a whole, whatever its file holds."""
    chunk = math.prod(array.chunks)
    index = 0 if array.shards is None else _INDEX_ENTRY * math.prod(array.shards) // chunk
    for part, size in (("chunks", chunk * array.dtype.itemsize), ("index of a shard", index)):
        if size > SHARD_BYTES:
            raise StoreError(
                f"{where}: {part}: expected at most {SHARD_BYTES:,} bytes, found {size:,} in its zarr.json; write the "
                "array again in smaller chunks"
            )


def _places(counts: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every place of a grid; `itertools.product` would first make all numbers of each axis."""
    if not counts:
        yield ()
        return
    for first in range(counts[0]):
        for rest in _places(counts[1:]):
            yield (first, *rest)


@contextmanager
def zarr_errors(where: str, cure: str) -> Iterator[None]:
    """Make one line of whatever zarr raises about an array; `cure` says what mends damage.

    Raises:
        StoreUnreadable: the system let zarr down.
        StoreError: the array is not what its metadata say; what is a StoreError already stays as it is.
    """
    try:
        yield
    except StoreError:
        raise
    # Codecs have exceptions of their own.
    except Exception as error:
        refused = system_error(error)
        if isinstance(refused, ABSENT):
            raise StoreError(f"{refused.filename or where}: is missing; the store is damaged: {cure}") from error
        if refused is not None:
            raise unreadable(refused.filename or where, refused) from error
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise StoreError(
            f"{where}: zarr cannot read this array as its zarr.json describes it ({reason}); "
            f"the store is damaged: {cure}"
        ) from error


class VerifiedArray:
    """Another array whose chunks are compared with their checksums when they are first touched, or fetched again.

    Args:
        array: the array.
        sums: CRC-32 of each of its chunks, padding included, (chunks,) uint32.
        damage: makes the error for rows (first, last exclusive) that are not what was written.
    """

    def __init__(self, array: RowArray, sums: NDArray[np.uint32], damage: Callable[[int, int], StoreError]) -> None:
        # The checksums follow the layout that the store was committed with, whatever the array looks like now.
        spec = array_spec("", array.dtype.str, array.shape, shard_bytes=1)
        chunks = -(-array.shape[0] // spec.chunk_rows)
        if len(sums) != chunks:
            raise damage(0, array.shape[0])
        self.shape, self.dtype, self._chunk_rows = array.shape, array.dtype, spec.chunk_rows
        self._sums, self._damage = sums, damage
        self.plain = array
        """Unchecked rows: the same, compared with nothing."""
        self._good = bytearray(chunks)
        self._renewed = array.renewed
        self.read_ahead = array.read_ahead
        self.file = array.file
        self.shard_files = array.shard_files

    @property
    def renewed(self) -> int:
        """Number of the array below, see `RowArray`."""
        return self.plain.renewed

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows `start` to `stop` (exclusive); not to be written to.

        Raises:
            StoreError: a chunk that holds some of these rows is damaged.
        """
        if start >= stop:
            return self.plain.read(start, stop)
        before = self.plain.renewed
        if before != self._renewed:
            # What was let go comes from afar again, and may be something else there by now.
            self._good, self._renewed = bytearray(len(self._good)), before
        good = self._good
        first, last = start // self._chunk_rows, -(-stop // self._chunk_rows)
        if good.count(1, first, last) == last - first:
            rows = self.plain.read(start, stop)
            if self.plain.renewed == before:
                return rows
        # Whole chunks are read once, and what was asked for is cut out: from far away a second read costs as much.
        low = first * self._chunk_rows
        rows = self.plain.read(low, min(last * self._chunk_rows, self.shape[0]))
        kept = self.plain.renewed == before
        for chunk in range(first, last):
            at = chunk * self._chunk_rows - low
            if not (kept and good[chunk]):
                self._check(chunk, rows[at : at + self._chunk_rows])
                good[chunk] = kept
        return rows[start - low : stop - low]

    def _check(self, chunk: int, rows: NDArray[Any]) -> None:
        start = chunk * self._chunk_rows
        stop = start + len(rows)
        found = zlib.crc32(np.ascontiguousarray(rows).data)
        missing = start + self._chunk_rows - stop
        if missing:
            padding = np.full((missing, *self.shape[1:]), fill_value(self.dtype.str), self.dtype)
            found = zlib.crc32(padding.tobytes(), found)
        if found != self._sums[chunk]:
            raise self._damage(start, stop)


def all_finite(values: NDArray[Any]) -> bool:
    """True if all values are finite; embeddings in float16 are looked at four numbers at a time."""
    if values.dtype.kind != "f":
        return True
    if values.dtype == np.float16 and values.flags.c_contiguous and values.size % 4 == 0 and values.size:
        together = np.bitwise_or.reduce(values.reshape(-1).view(np.uint64))
        if not together & _LARGE:
            return True
    return bool(np.isfinite(values).all())
