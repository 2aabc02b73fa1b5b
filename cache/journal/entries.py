"""The build's journal: finished pieces of work, each a folder that is whole or absent.

An entry is `data.raw` (arrays one after another, little-endian, C order, each on a 64-byte boundary) and `entry.json`
(their names, shapes and CRC-32, some attributes, sealed with a checksum of itself). Entries are prepared in
`journal/tmp`, flushed and renamed: what a killed process leaves behind is in `journal/tmp` and nowhere else.
"""

import hashlib
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ezsd.cache.errors import StoreBusy, StoreError, StoreUnreadable
from ezsd.cache.files import (
    ABSENT,
    FileLock,
    discard,
    failpoint,
    make_folders,
    read_if_there,
    rename,
    scratch_name,
    sync,
    unreadable,
    write_atomic,
    write_unhashed,
)
from ezsd.cache.format.commit_mark import LOCK, are_counts
from ezsd.cache.format.names import inside
from ezsd.cache.format.schema import DTYPES
from ezsd.cache.format.sealed_json import JSON, seal, unseal

_ALIGNMENT = 64
_PIECE_BYTES = 2**19

_ITEM_BYTES = {name: np.dtype(name).itemsize for name in DTYPES}
"""Bytes of one value of each type that an entry may hold."""

JOURNAL = "journal"
DATA = "data.raw"
ENTRY = "entry.json"


def journal_folder(store: Path) -> Path:
    """Folder of a store's journal.

    Raises:
        StoreError: it is a link that leads out of the store's folder.
    """
    return inside(store, JOURNAL)


def scratch_folder(store: Path) -> Path:
    """Folder of unfinished work; its contents at the start of a build are leftovers."""
    return inside(store, f"{JOURNAL}/tmp")


def clear_scratch(store: Path) -> None:
    """Remove all unfinished work, and leave an empty place for more.

    It is moved away first: a worker that outlived its builder then finds its work gone, and never half of it.
    """
    scratch = scratch_folder(store)
    if scratch.is_dir():
        rename(scratch, scratch_name(journal_folder(store), "tmp"), flush=False)
    for stale in journal_folder(store).glob("tmp-*"):
        discard(stale)
    make_folders(scratch)


def lock_store(
    store: Path,
    *,
    shared: bool = False,
    busy: str = "another process is building this store, or a share of it; wait for it to end, or choose another "
    "folder: `path=NEW`",
) -> FileLock:
    """Lock a store's folder against other builders and repairs; with `shared`, beside those that share it.

    Raises:
        StoreBusy: another process holds the lock; says `busy`.
    """
    return FileLock(store / LOCK, shared=shared, busy=lambda _: StoreBusy(f"{store}: {busy}"))


def write_note(store: Path, data: bytes) -> str:
    """Leave bytes for the workers of a build, until it is finished; returns their sha256, by which they are read."""
    name = hashlib.sha256(data).hexdigest()
    write_atomic(_note(store, name), data, scratch=scratch_folder(store), point="metadata")
    return name


def read_note(store: Path, name: str) -> bytes:
    """The bytes that `write_note` left.

    Raises:
        StoreError: they are not there, or not those that were left.
    """
    file = _note(store, name)
    try:
        data = file.read_bytes()
    except ABSENT as error:
        raise StoreError(f"{file}: is missing; run the build again") from error
    except OSError as error:
        raise unreadable(file, error) from error
    if hashlib.sha256(data).hexdigest() != name:
        raise StoreError(f"{file}: is damaged; run the build again")
    return data


def _note(store: Path, name: str) -> Path:
    return journal_folder(store) / "notes" / name


@dataclass(frozen=True)
class Entry:
    """A finished piece of work, as its `entry.json` describes it."""

    folder: Path
    arrays: Mapping[str, Mapping[str, Any]]
    attributes: Mapping[str, Any]
    bytes_: int

    @classmethod
    def read(cls, folder: Path) -> "Entry":
        """Read the description of an entry, not its data.

        Raises:
            StoreError: there is no such entry, or its description is damaged.
            StoreUnreadable: the system does not let it be read.
        """
        file = folder / ENTRY
        data = read_if_there(file)
        if data is None:
            raise StoreError(f"{folder}: no finished journal entry here; run the build again")
        record = unseal(data, str(file))
        _require_described(record, file)
        return cls(folder, record["arrays"], record["attributes"], record["bytes"])

    @property
    def sized(self) -> bool:
        """True if the data file has the size it was written with; the cheap check."""
        return self._data_bytes == self.bytes_

    @property
    def dropped(self) -> bool:
        """True if the data were removed, as they are once every shard they went into is durable."""
        return self._data_bytes is None

    @property
    def finished(self) -> bool:
        """True if the entry is `sized` or `dropped`; asks the system once."""
        return self._data_bytes in (self.bytes_, None)

    @property
    def _data_bytes(self) -> int | None:
        """Bytes of the data file; None for a missing one."""
        # Texts, not paths: putting a path together takes longer than the system's answer.
        file = f"{self.folder}/{DATA}"
        try:
            return os.stat(file).st_size
        except ABSENT:
            return None
        except OSError as error:
            raise unreadable(file, error) from error

    def array(self, name: str) -> NDArray[Any]:
        """Array of that name, memory-mapped and read-only, after its checksum was compared.

        Raises:
            StoreError: the data are not those that were written.
        """
        rows = self._mapped(name)
        self._require_crc32(name, zlib.crc32(raw_bytes(rows)))
        return rows

    def stream(self, name: str, start: int, stop: int) -> Iterator[memoryview]:
        """The bytes of rows `start` to `stop` (exclusive) of one array in pieces; the whole array is checked meanwhile.

        Pieces are small, so that what is done to each finds it in the processor's cache.

        Raises:
            StoreError: at the end, when the data are not those that were written: what was given out is then void.
        """
        rows = self._mapped(name)
        row_bytes = rows.nbytes // max(1, len(rows))
        data, first, last, crc = raw_bytes(rows), start * row_bytes, stop * row_bytes, 0
        for low in range(0, len(data), _PIECE_BYTES):
            piece = data[low : low + _PIECE_BYTES]
            crc = zlib.crc32(piece, crc)
            part = piece[max(first - low, 0) : max(last - low, 0)]
            if len(part):
                yield part
        self._require_crc32(name, crc)

    def _mapped(self, name: str) -> NDArray[Any]:
        place = self.arrays[name]
        shape, dtype = tuple(place["shape"]), np.dtype(place["dtype"])
        if not self.sized:
            raise StoreError(f"{self.folder}: data.raw is missing or not {self.bytes_} bytes long; run the build again")
        if 0 in shape:
            return np.empty(shape, dtype)
        try:
            return np.memmap(self.folder / DATA, dtype, "r", place["offset"], shape)
        except OSError as error:
            raise unreadable(self.folder / DATA, error) from error

    def _require_crc32(self, name: str, found: int) -> None:
        if found != self.arrays[name]["crc32"]:
            raise StoreError(f"{self.folder}: the array {name} does not match its checksum; the file is damaged")


def _require_described(record: Mapping[str, Any], file: Path) -> None:
    """Refuse a description that this package did not write: its seal tells damage, not malice."""
    arrays, size = record.get("arrays"), record.get("bytes")
    sound = (
        isinstance(arrays, dict)
        and isinstance(record.get("attributes"), dict)
        and isinstance(size, int)
        and _are_places(arrays.values(), size)
    )
    if not sound:
        raise StoreError(f"{file}: does not describe a journal entry; ezsd wrote no such file: do not use this store")


def _are_places(places: Iterable[object], size: int) -> bool:
    """True if descriptions of arrays are some, of rows within the first `size` bytes."""
    numbers: list[object] = []
    described: list[tuple[Any, list[Any], int, Any]] = []
    for place in places:
        if not isinstance(place, dict):
            return False
        shape, offset, dtype, crc = place.get("shape"), place.get("offset"), place.get("dtype"), place.get("crc32")
        if not isinstance(shape, list) or not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
            return False
        # Looked at together, in a fraction of the time.
        numbers += (*shape, offset, crc)
        described.append((offset, shape, _ITEM_BYTES[dtype], crc))
    return are_counts(numbers) and all(
        offset + math.prod(shape) * item <= size and crc < 2**32 for offset, shape, item, crc in described
    )


def raw_bytes(rows: NDArray[Any]) -> memoryview:
    """The bytes of a C-ordered array, without a copy."""
    return rows.reshape(-1).view(np.uint8).data


def _layout(arrays: Mapping[str, NDArray[Any]]) -> tuple[dict[str, dict[str, Any]], int]:
    """The place of each array in data.raw, and the length of the file in bytes."""
    places: dict[str, dict[str, Any]] = {}
    end = 0
    for name, rows in arrays.items():
        offset = -(-end // _ALIGNMENT) * _ALIGNMENT
        places[name] = {"dtype": rows.dtype.str, "shape": list(rows.shape), "offset": offset}
        end = offset + rows.nbytes
    return places, end


def _parts(arrays: Mapping[str, NDArray[Any]], places: Mapping[str, Any]) -> Iterator[bytes | memoryview]:
    end = 0
    for name, rows in arrays.items():
        yield bytes(places[name]["offset"] - end)
        yield raw_bytes(rows)
        end = places[name]["offset"] + rows.nbytes


def write_entry(
    store: Path, name: str, arrays: Mapping[str, NDArray[Any]], attributes: Mapping[str, JSON], *, point: str
) -> None:
    """Write one entry, all of it or nothing. Where two workers write the same entry, the first one counts.

    Args:
        store: the store's folder.
        name: the entry's folder name.
        arrays: little-endian and C-ordered, see `little_endian`.
        attributes: JSON that describes the entry.
        point: prefix of the failpoints passed on the way.
    """
    target, temporary = journal_folder(store) / name, scratch_name(scratch_folder(store), name)
    # It need not outlive the machine's power until it is renamed.
    temporary.mkdir(parents=True)
    try:
        places, end = _layout(arrays)
        # The checksums are computed, and then described, while the disk is at work.
        with ThreadPoolExecutor(1) as beside:
            data = beside.submit(write_unhashed, temporary / DATA, _parts(arrays, places), point=point)
            described = {
                name: {**place, "crc32": zlib.crc32(raw_bytes(arrays[name]))} for name, place in places.items()
            }
            record = seal({"arrays": described, "attributes": attributes, "bytes": end})
            write_unhashed(temporary / ENTRY, [record])
            data.result()
        sync(temporary)
        _rename_entry(temporary, target, point)
    finally:
        discard(temporary)


def _rename_entry(temporary: Path, target: Path, point: str) -> None:
    try:
        rename(temporary, target, point=point)
    except OSError:
        # Another worker finished the same entry first: a folder that is not empty is never replaced.
        if not intact(target):
            raise


def intact(folder: Path) -> bool:
    """True if a finished entry is here, by its description and size."""
    try:
        return Entry.read(folder).sized
    except StoreUnreadable:
        raise
    except StoreError:
        return False


def drop_data(folder: str) -> None:
    """Remove an entry's data and keep its description. Whoever writes the last shard does it, and two may think so."""
    try:
        os.unlink(f"{folder}/{DATA}")
    except ABSENT:
        return
    failpoint("block.dropped")


def set_aside(store: Path, name: str) -> None:
    """Take a damaged entry out of the journal, so that the next run computes it again."""
    target = journal_folder(store) / name
    if target.exists():
        make_folders(scratch_folder(store))
        rename(target, scratch_name(scratch_folder(store), f"damaged-{name}"), flush=False)


def little_endian(values: ArrayLike, dtype: str) -> NDArray[Any]:
    """The array in the byte order and memory order of the journal."""
    return np.ascontiguousarray(values, dtype=dtype)
