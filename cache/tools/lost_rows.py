"""Lost rows of damaged shards: the chunks that still hold what was written, and new files made around them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from ezsd.cache.files import FileDigest, discard, file_digest, sync, write_unhashed
from ezsd.cache.format import zarr_bytes as encoding
from ezsd.cache.format.checksums import rows_of_chunks
from ezsd.cache.format.schema import OFFSET, ArraySpec, Block
from ezsd.cache.journal.entries import raw_bytes

BLOCK_IMAGES = 64
"""Images computed at once."""


@dataclass(frozen=True)
class LostShard:
    """A damaged shard of a per-image product."""

    name: str
    spec: ArraySpec
    shard: int
    chunks: tuple[int, ...]
    """Chunks that do not match their checksums, counted within the shard."""

    @property
    def product(self) -> str:
        """The per-image product."""
        return self.spec.name.partition("/")[0]

    @property
    def field(self) -> str:
        """The column of the product."""
        return self.spec.name.partition("/")[2]

    @property
    def is_offset(self) -> bool:
        """True if it says which rows are an image's, and holds none."""
        return self.field == OFFSET.name

    @cached_property
    def rows(self) -> list[tuple[int, int]]:
        """Ranges (first, last exclusive) of the array's rows that are lost, see `rows_of_chunks`."""
        return rows_of_chunks(self.spec, self.shard, self.chunks)


class Offsets:
    """Offsets of a per-image product with lost entries, which are found again as rows of images come in their order.

    Args:
        values: row at which each image begins, and their number at the end, (n + 1,) int64; lost entries hold anything.
        known: True for each entry that is not lost, (n + 1,); the first and the last one are known.
    """

    def __init__(self, values: NDArray[np.int64], known: NDArray[np.bool_]) -> None:
        self.values, self._known = values, known
        self.unknown_images = np.flatnonzero(~known[1:])
        """Places of the images whose number of rows has to be found for the lost entries."""
        self._places = np.flatnonzero(known)

    def owners(self, rows: Iterable[tuple[int, int]]) -> NDArray[np.int64]:
        """Places of the images that own rows of these ranges, in order, and of those that may, for lost entries."""
        values, last_image = self.values[self._places], len(self.values) - 1
        found = [np.zeros(0, np.int64)]
        for start, stop in rows:
            first = max(int(np.searchsorted(values, start, side="right")) - 1, 0)
            last = min(int(np.searchsorted(values, stop, side="left")), len(values) - 1)
            places = np.arange(self._places[first], min(self._places[last], last_image))
            empty = self._known[places] & self._known[places + 1] & (self.values[places] == self.values[places + 1])
            found.append(places[~empty])
        return np.unique(np.concatenate(found))

    def fill(self, block: Block, counts: NDArray[np.int32]) -> int:
        """Take the number of rows of each image of a block; returns the first row of the block."""
        first = int(self.values[block.start])
        ends = first + np.cumsum(counts, dtype=np.int64)
        lost = ~self._known[block.start + 1 : block.stop + 1]
        self.values[block.start + 1 : block.stop + 1][lost] = ends[lost]
        return first


class Patch:
    """New file of a damaged shard: its good chunks, and room for the rows of the others; made when it is needed.

    Args:
        lost: the shard.
        damaged: its file, if there is one.
        path: the new file.
        images: places of the images that its lost rows belong to, in order.
    """

    def __init__(self, lost: LostShard, damaged: Path, path: Path, images: NDArray[np.int64]) -> None:
        self.lost, self.path, self._damaged = lost, path, damaged
        self.images = images
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        discard(self.path)

    def has_rows_of(self, block: Block) -> bool:
        """True if some of the lost rows may be those of images of a block."""
        return bool(len(self.images)) and self.images[0] < block.stop and block.start <= self.images[-1]

    def ends_in(self, block: Block) -> bool:
        """True if a block holds the last of the images."""
        return bool(len(self.images)) and block.start <= self.images[-1] < block.stop

    def fill(self, first: int, rows: NDArray[Any]) -> None:
        """Write those of some rows that are lost; `first` is the array's number of the first of them."""
        spec, file = self.lost.spec, self._opened()
        start, _ = spec.shard_range(self.lost.shard)
        for begin, end in self.lost.rows:
            low, high = max(begin, first), min(end, first + len(rows))
            if low < high:
                file.seek((low - start) * spec.row_bytes)
                file.write(raw_bytes(rows[low - first : high - first]))

    def finish(self) -> FileDigest:
        """Flush the file; its size and sha256."""
        self._opened().close()
        sync(self.path)
        return file_digest(self.path)

    def _opened(self) -> BinaryIO:
        if self._file is None:
            write_unhashed(self.path, _kept_chunks(self.lost, self._damaged), flush=False)
            self._file = self.path.open("r+b")
        return self._file


def _kept_chunks(lost: LostShard, damaged: Path) -> Iterator[bytes]:
    """The bytes of a shard, with padding in the place of lost chunks."""
    spec, (start, stop) = lost.spec, lost.spec.shard_range(lost.shard)
    size, bad = spec.chunk_rows * spec.row_bytes, set(lost.chunks)
    filler = np.full((spec.chunk_rows, *spec.shape[1:]), encoding.fill_value(spec.dtype), spec.dtype).tobytes()
    chunks = range(encoding.shard_chunks(spec, lost.shard))
    if bad >= set(chunks):
        yield from (filler for _ in chunks)
    else:
        with damaged.open("rb") as file:
            for chunk in chunks:
                data = file.read(size)
                yield filler if chunk in bad else data
    yield encoding.shard_index(spec, stop - start)


def runs(places: Sequence[NDArray[np.int64]]) -> list[Block]:
    """Neighbouring places of images, each once and in order, as blocks of at most `BLOCK_IMAGES` images."""
    wanted = np.unique(np.concatenate([np.zeros(0, np.int64), *places]))
    parts = np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1)
    bounds = [(int(part[0]), int(part[-1]) + 1) for part in parts if len(part)]
    cuts = [(low, min(low + BLOCK_IMAGES, stop)) for start, stop in bounds for low in range(start, stop, BLOCK_IMAGES)]
    return [Block(index, start, stop) for index, (start, stop) in enumerate(cuts)]
