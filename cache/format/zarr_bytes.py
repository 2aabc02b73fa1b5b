"""Zarr v3 on the byte level: array and group metadata, and shards written as a stream.

The bytes are ours, not a library version's: the same rows give the same file wherever and whenever they are written,
and a shard needs no more memory than one block. Any Zarr v3 reader opens the result.
"""

import reprlib
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from ezsd.cache.errors import StoreError
from ezsd.cache.format.schema import TYPES_BY_NAME, ArraySpec
from ezsd.cache.format.sealed_json import JSON, canonical_json

_ABSENT = 2**64 - 1
"""Marks an inner chunk that a shard does not hold: those beyond the end of the array."""


def fill_value(dtype: str) -> float | int:
    """Padding of the last chunk, also read where data are missing: never a plausible value."""
    kind = np.dtype(dtype)
    return float("nan") if kind.kind == "f" else -1 if kind.kind == "i" else int(np.iinfo(kind).max)


def array_metadata(spec: ArraySpec, attributes: Mapping[str, JSON] | None = None) -> dict[str, JSON]:
    """The `zarr.json` of an array."""
    trailing = list(spec.shape[1:])
    little: JSON = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding: dict[str, JSON] = {
        "chunk_shape": [spec.chunk_rows, *trailing],
        "codecs": [little],
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(spec.shape),
        "data_type": np.dtype(spec.dtype).name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [spec.shard_rows, *trailing]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "NaN" if np.dtype(spec.dtype).kind == "f" else fill_value(spec.dtype),
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": attributes or {},
        "storage_transformers": [],
    }


_MOST_SHARDS = 2**20
"""More files than any store has of one array; what is made for each of them is made from a number in a file."""
_MOST_ROW_BYTES = 2**24
_MOST_BYTES = 2**62


def spec_of_metadata(name: str, metadata: Mapping[str, Any]) -> ArraySpec:
    """The geometry that `array_metadata` wrote down.

    Raises:
        StoreError: it is the geometry of no array: what is computed from it is neither defined nor small.
        KeyError, IndexError, TypeError, ValueError: the layout is another than this package's.
    """
    shape, outer = metadata["shape"], metadata["chunk_grid"]["configuration"]["chunk_shape"]
    _require_counts(name, "shape", shape, least=0)
    _require_counts(name, "chunk_shape of the shards", outer, least=1)
    inner = metadata["codecs"][0]["configuration"]["chunk_shape"]
    _require_counts(name, "chunk_shape", inner, least=1)
    spec = _spec(name, metadata)
    too_large = (
        spec.row_bytes > _MOST_ROW_BYTES
        or spec.shards > _MOST_SHARDS
        or max(spec.shape[0], spec.shard_rows) * spec.row_bytes > _MOST_BYTES
    )
    if too_large or spec.shard_rows % spec.chunk_rows:
        raise StoreError(
            f"{name}: its metadata describe an array that no store has (shape {list(spec.shape)}, shards of "
            f"{spec.shard_rows} rows, chunks of {spec.chunk_rows}); the store is damaged"
        )
    return spec


def _require_counts(name: str, what: str, values: object, *, least: int) -> None:
    if (
        not isinstance(values, list)
        or not values
        or not all(type(value) is int and least <= value <= _MOST_BYTES for value in values)
    ):
        raise StoreError(
            f"{name}: its metadata say {what} {reprlib.repr(values)}, expected whole numbers from {least}; "
            "the store is damaged"
        )


def _spec(name: str, metadata: Mapping[str, Any]) -> ArraySpec:
    sharding = metadata["codecs"][0]["configuration"]
    return ArraySpec(
        name=name,
        dtype=TYPES_BY_NAME[metadata["data_type"]],
        shape=tuple(metadata["shape"]),
        chunk_rows=int(sharding["chunk_shape"][0]),
        shard_rows=int(metadata["chunk_grid"]["configuration"]["chunk_shape"][0]),
    )


def group_metadata(attributes: Mapping[str, JSON]) -> dict[str, JSON]:
    """The `zarr.json` of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def root_metadata(attributes: Mapping[str, JSON], nodes: Mapping[str, JSON]) -> dict[str, JSON]:
    """The `zarr.json` of the store: a group that carries a copy of all metadata below it.

    One read then opens the whole store, and a reader that lists members does not trip over our other files.
    """
    consolidated: JSON = {"kind": "inline", "must_understand": False, "metadata": nodes}
    return {**group_metadata(attributes), "consolidated_metadata": consolidated}


def consolidated(root: Mapping[str, Any], array: str) -> dict[str, Any]:
    """The copy of an array's metadata in the root; nothing where the root has none."""
    found: object = root
    for key in ("consolidated_metadata", "metadata", array):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def metadata_bytes(metadata: Mapping[str, JSON]) -> bytes:
    """A `zarr.json` as it is on disk."""
    return (canonical_json(metadata) + "\n").encode()


def shard_parts(spec: ArraySpec, index: int, rows: Iterable[memoryview]) -> Iterator[bytes | memoryview]:
    """The bytes of shard `index`, in order: rows, padding of the last chunk, chunk index with its checksum.

    Args:
        spec: the array.
        index: which of its shards.
        rows: the bytes of exactly the shard's rows, in any number of pieces.
    """
    start, stop = spec.shard_range(index)
    yield from rows
    missing = -(stop - start) % spec.chunk_rows
    yield np.full((missing, *spec.shape[1:]), fill_value(spec.dtype), spec.dtype).tobytes()
    yield shard_index(spec, stop - start)


def shard_index(spec: ArraySpec, rows: int) -> bytes:
    """The end of a shard file with `rows` rows: place and length of each chunk, and the CRC-32C of these."""
    chunk_bytes = spec.chunk_rows * spec.row_bytes
    entries = np.full((spec.shard_rows // spec.chunk_rows, 2), _ABSENT, "<u8")
    present = -(-rows // spec.chunk_rows)
    entries[:present, 0] = np.arange(present, dtype="<u8") * chunk_bytes
    entries[:present, 1] = chunk_bytes
    data = entries.tobytes()
    return data + struct.pack("<I", google_crc32c.value(data))


def index_bytes(spec: ArraySpec) -> int:
    """Size of a shard's chunk index with its checksum, in bytes; the least that a shard file can have."""
    return 16 * (spec.shard_rows // spec.chunk_rows) + 4


def shard_chunks(spec: ArraySpec, index: int) -> int:
    """Number of chunks in shard `index`."""
    start, stop = spec.shard_range(index)
    return -(-(stop - start) // spec.chunk_rows)


def shard_bytes_on_disk(spec: ArraySpec, index: int) -> int:
    """Size of shard `index` as a file, in bytes."""
    chunk_bytes = spec.chunk_rows * spec.row_bytes
    return shard_chunks(spec, index) * chunk_bytes + index_bytes(spec)


def shard_rows(spec: ArraySpec, index: int, data: bytes | NDArray[np.uint8]) -> NDArray[Any]:
    """The rows in the bytes of shard `index`, read-only."""
    start, stop = spec.shard_range(index)
    return np.frombuffer(data, spec.dtype, (stop - start) * (spec.row_bytes // np.dtype(spec.dtype).itemsize)).reshape(
        stop - start, *spec.shape[1:]
    )
