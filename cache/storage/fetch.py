"""Zarr's view of a store behind a URL: the files of the commit mark, and no byte more than it states.

A file that holds no rows is taken whole, once it has its digest: of those nothing else is compared later.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from threading import Lock

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import MemoryStore, WrapperStore

from ezsd.cache.files import FileDigest


class Listed(WrapperStore[MemoryStore]):
    """The files of a commit mark; all else is answered by an empty store.

    Args:
        fetch: gives bytes `start` to `stop` (exclusive) of a file, or None where there is no such file.
        read_file: gives a whole file, once it has its digest.
        stated: the files that there are.
        holds_rows: tells arrays with rows of images, by name, from small ones.
    """

    def __init__(
        self,
        fetch: Callable[[str, int, int], bytes | None],
        read_file: Callable[[str], bytes],
        stated: Mapping[str, FileDigest],
        holds_rows: Callable[[str], bool],
    ) -> None:
        super().__init__(MemoryStore(read_only=True))
        self._holds_rows = holds_rows
        self._fetch, self._read_file, self._stated = fetch, read_file, stated
        self._last: tuple[str, bytes] = "", b""
        self._lock = Lock()

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Bytes of a file; None for one that the mark does not list."""
        if key not in self._stated:
            return None
        start, stop = _range(byte_range, self._stated[key].size)
        array, is_shard, _ = key.partition("/c/")
        read = self._fetch if is_shard and self._holds_rows(array) else self._cut
        data = await asyncio.to_thread(read, key, start, stop)
        return None if data is None else prototype.buffer.from_bytes(data)

    def _cut(self, key: str, start: int, stop: int) -> bytes:
        """Bytes of a file that holds no rows; the last one is kept, since zarr asks for its chunks one by one."""
        with self._lock:
            if self._last[0] != key:
                self._last = key, self._read_file(key)
            return self._last[1][start:stop]

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Several at once."""
        return list(await asyncio.gather(*(self.get(key, prototype, at) for key, at in key_ranges)))


def _range(asked: ByteRequest | None, size: int) -> tuple[int, int]:
    """First and last (exclusive) byte of what zarr asks for, in a file of `size` bytes."""
    if isinstance(asked, RangeByteRequest):
        return min(asked.start, size), min(asked.end, size)
    if isinstance(asked, SuffixByteRequest):
        return max(size - asked.suffix, 0), size
    return (min(asked.offset, size) if isinstance(asked, OffsetByteRequest) else 0), size
