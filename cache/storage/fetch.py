"""Zarr's view of a store behind a URL: the files of the commit mark, and no byte more than it states."""

import asyncio
from collections.abc import Callable, Iterable, Mapping

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import MemoryStore, WrapperStore

from ezsd.cache.files import FileDigest


class Listed(WrapperStore[MemoryStore]):
    """The files of a commit mark; all else is answered by an empty store.

    Args:
        fetch: gives bytes `start` to `stop` (exclusive) of a file, or None where there is no such file.
        stated: the files that there are.
    """

    def __init__(self, fetch: Callable[[str, int, int], bytes | None], stated: Mapping[str, FileDigest]) -> None:
        super().__init__(MemoryStore(read_only=True))
        self._fetch, self._stated = fetch, stated

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Bytes of a file; None for one that the mark does not list."""
        if key not in self._stated:
            return None
        start, stop = _range(byte_range, self._stated[key].size)
        data = await asyncio.to_thread(self._fetch, key, start, stop)
        return None if data is None else prototype.buffer.from_bytes(data)

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
