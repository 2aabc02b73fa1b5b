"""Schema of a store: products, fields and array geometry.

Conventions of every array: little-endian; rows of one image are together, images in the order of `images/id`;
boxes are x1, y1, x2, y2 in pixels of the original image; embeddings have unit length.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from ezsd.cache.errors import StoreError

FORMAT_VERSIONS = (2, 3)
"""Versions that this code reads and writes, see `format_version`.

They change only together with a migration, or a clear refusal of the older stores."""

SHARD_BYTES = 256 * 2**20
"""Largest size of one shard's rows, in bytes; a shard is what one commit task writes."""

UNIT_TOLERANCE = 1e-3
"""Largest |length - 1| of an embedding. Rounding to float16 alone moves the length by up to 5e-4."""

EMBED = -1
"""Stands for the embedding width D in a field's trailing shape."""

EmbeddingType: TypeAlias = Literal["float16", "int8"]
"""Stored type of the embeddings of regions and ground truth; with int8 each row has a float32 scale."""
EMBEDDING_TYPES: tuple[EmbeddingType, ...] = get_args(EmbeddingType)


@dataclass(frozen=True, slots=True)
class Field:
    """A column of a product: `dtype` as numpy spells it, `trailing` the shape of one row."""

    name: str
    dtype: str
    trailing: tuple[int, ...] = ()

    def row_shape(self, embed_dim: int) -> tuple[int, ...]:
        """Shape of one row when embeddings have `embed_dim` numbers."""
        return tuple(embed_dim if size == EMBED else size for size in self.trailing)


_BOX = Field("box", "<f4", (4,))
_SCORE = Field("score", "<f4")
_CLASS = Field("class_index", "<i4")
_EMBEDDING = Field("embedding", "<f2", (EMBED,))

PER_IMAGE: Mapping[str, tuple[Field, ...]] = MappingProxyType(
    {
        "proposals": (_BOX, _SCORE),
        "regions": (_BOX, _SCORE, Field("confidence", "<f4"), _CLASS, _EMBEDDING),
        "ground_truth": (_BOX, _CLASS, Field("annotation_id", "<i8"), _EMBEDDING),
    }
)
"""Products with any number of rows per image, zero included: the columns that a writer is given and a reader gives."""

_INT8 = (Field("embedding", "|i1", (EMBED,)), Field("embedding_scale", "<f4"))


def stored_fields(product: str, embedding: EmbeddingType) -> tuple[Field, ...]:
    """The columns of a ragged product as they are in the store.

    They are those of `PER_IMAGE`, but for int8: there `embedding` is int8 (N, D), and `embedding_scale` float32 (N,)
    follows it. A row's unit vector is then `embedding * embedding_scale`, in float32.
    """
    if embedding == "float16":
        return PER_IMAGE[product]
    return tuple(
        stored for field in PER_IMAGE[product] for stored in (_INT8 if field.name == "embedding" else (field,))
    )


PER_STORE: Mapping[str, Field] = MappingProxyType(
    {
        "teacher": Field("values", "<f4"),
        "text": Field("embedding", "<f4", (EMBED,)),
        "proposer": Field("values", "<f4"),
    }
)
"""Products that belong to the whole store: one small array each, with JSON attributes."""

PRODUCTS = ("teacher", "text", "proposer", "proposals", "regions", "ground_truth")
"""All products, in the order in which they are made: one may need those before it."""

OPTIONAL = ("proposer",)
"""Products that a store may lack; its manifest and the files that its commit mark lists say whether it has them."""

IMAGES: tuple[Field, ...] = (Field("id", "<i8"), Field("width", "<i4"), Field("height", "<i4"))
OFFSET = Field("offset", "<i8")

CHECKSUMS = "checksums"
"""Group that holds, for each array NAME, the array `checksums/NAME`: CRC-32 of each of its chunks, uint32."""
CHECKSUM = Field("crc32", "<u4")


@dataclass(frozen=True, slots=True)
class RaggedRows:
    """Rows of one product for one block of images.

    counts: rows of each image, int32 (images,). fields: one array per column, (sum of counts, ...),
    rows of the first image first.
    """

    counts: NDArray[np.int32]
    fields: Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, slots=True, order=True)
class Block:
    """Images `start` to `stop` (exclusive) of the image list: what one build task computes."""

    index: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """Name and geometry of one stored array; axis 0 alone is chunked and sharded."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunk_rows: int
    shard_rows: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return _row_bytes(self.dtype, self.shape[1:])

    @property
    def shards(self) -> int:
        """Number of shard files."""
        return -(-self.shape[0] // self.shard_rows)

    def shard_range(self, index: int) -> tuple[int, int]:
        """First and last (exclusive) row of shard `index`."""
        start = index * self.shard_rows
        return start, min(start + self.shard_rows, self.shape[0])

    def shard_file(self, index: int) -> str:
        """Path of shard `index` inside the store, with forward slashes."""
        return "/".join([self.name, "c", str(index), *["0"] * (len(self.shape) - 1)])


def array_spec(name: str, dtype: str, shape: tuple[int, ...], *, shard_bytes: int) -> ArraySpec:
    """Geometry of an array: a function of its shape and `shard_bytes` alone, so every build agrees.

    Chunks hold 256 rows, or 4096 where a row is under 64 bytes: 256 scores would be a chunk of 1 KiB, and the
    index of a shard as long as a tenth of its data. A small array is one shard just large enough.
    """
    row_bytes = _row_bytes(dtype, shape[1:])
    chunk_rows = 256 if row_bytes >= 64 else 4096
    most_chunks = max(1, shard_bytes // (row_bytes * chunk_rows))
    needed_chunks = max(1, -(-shape[0] // chunk_rows))
    return ArraySpec(name, dtype, shape, chunk_rows, chunk_rows * min(most_chunks, needed_chunks))


def _row_bytes(dtype: str, trailing: tuple[int, ...]) -> int:
    return int(np.dtype(dtype).itemsize * math.prod(trailing))


def holds_rows(array: str) -> bool:
    """True if an array holds rows of images; all others are small."""
    product, _, field = array.partition("/")
    return product in PER_IMAGE and field != OFFSET.name


def per_store(products: Collection[str]) -> dict[str, Field]:
    """Fields of the per-store products among a store's `products`, by name."""
    return {name: field for name, field in PER_STORE.items() if name in products}


def per_store_field(product: str, products: Collection[str], where: object) -> Field:
    """Field of one per-store product of the store `where`, which has `products`.

    Raises:
        StoreError: this is none of them.
    """
    known = per_store(products)
    if product not in known:
        raise StoreError(f"{where}: has no per-store product {product!r}; it has {', '.join(known)}")
    return known[product]


def format_version(products: Collection[str]) -> int:
    """Version of the format of a store with these products: 2, or 3 with an optional one, which version 2 lacks."""
    return 2 if set(OPTIONAL).isdisjoint(products) else 3


def require_supported(found: object, where: str) -> None:
    """Refuse a store written in a format this code cannot read faithfully."""
    if found not in FORMAT_VERSIONS:
        raise StoreError(
            f"{where}: store format {found!r}, this version reads formats {' and '.join(map(str, FORMAT_VERSIONS))}; "
            "build the store anew in another folder, or use the version that wrote it"
        )
