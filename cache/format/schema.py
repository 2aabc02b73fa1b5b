"""Schema of a store: products, their arrays, and the geometry of arrays. `regions` has the schema of ezsd's own stores.

Conventions of every array: little-endian; rows of one image are together, images in the order of `images/id`;
boxes are x1, y1, x2, y2 in pixels of the original image; floating-point numbers are finite.
"""

import math
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from ezsd.cache.errors import StoreError

SCHEMA_VERSION = 4
"""Version of the format of a store that records its schema."""
FORMAT_VERSIONS = (2, 3, SCHEMA_VERSION)
"""Versions that this code reads and writes; for 2 and 3 see `regions.format_version`.

They change only together with a migration, or a clear refusal of the older stores."""

SHARD_BYTES = 256 * 2**20
"""Largest size of one shard's rows, in bytes; a shard is what one commit task writes."""

_CHUNK_BYTES = 2**24
"""Largest size of a chunk of more than one row, in bytes."""

UNIT_TOLERANCE = 1e-3
"""Largest |length - 1| of an embedding. Rounding to float16 alone moves the length by up to 5e-4."""

EMBED = -1
"""Stands for the embedding width D in a field's trailing shape, in declarations of ezsd's own schema."""

Values: TypeAlias = Literal["number", "box", "unit"]
"""Values of a field: any (finite) numbers, boxes within their image, or vectors of unit length."""
Kept: TypeAlias = Literal["as given", "int8"]
"""Form in which a field is kept: as it is given, or a unit vector as int8 with one float32 scale per row."""


@dataclass(frozen=True, slots=True)
class Field:
    """An array of a product.

    Args:
        name: lower-case letters, digits and underscores.
        dtype: as numpy spells it: float16, float32, float64, int8 to int64 or uint8 to uint64.
        trailing: shape of one row, () for a number.
        values: "box" for float32 (4,), x1, y1, x2, y2 in pixels within the image; "unit" for floating-point vectors of
            length 1.
        kept: "int8" for "unit" vectors of float16 that take one byte a number in the store.
    """

    name: str
    dtype: str
    trailing: tuple[int, ...] = ()
    values: Values = "number"
    kept: Kept = "as given"

    def __post_init__(self) -> None:
        try:
            dtype = np.dtype(self.dtype)
        except (TypeError, ValueError, SyntaxError) as error:
            shown = reprlib.repr(self.dtype)
            raise StoreError(f"field {reprlib.repr(self.name)}: numpy knows no type {shown}") from error
        object.__setattr__(self, "dtype", dtype.newbyteorder("<").str)
        if not isinstance(self.trailing, Iterable):
            shown = reprlib.repr(self.trailing)
            raise StoreError(f"field {reprlib.repr(self.name)}: trailing: expected a shape such as (4,), found {shown}")
        object.__setattr__(self, "trailing", tuple(self.trailing))

    def row_shape(self, embed_dim: int) -> tuple[int, ...]:
        """Shape of one row when embeddings have `embed_dim` numbers."""
        return tuple(embed_dim if size == EMBED else size for size in self.trailing)

    @property
    def stored(self) -> "tuple[Field, ...]":
        """The field's arrays in the store: itself, or whole numbers and their scale."""
        if self.kept != "int8":
            return (self,)
        return Field(self.name, "|i1", self.trailing), Field(f"{self.name}{SCALE}", "<f4")


SCALE = "_scale"
"""End of the name of the array with the scales of a field that is kept as int8."""


@dataclass(frozen=True, slots=True)
class PerImage:
    """Product with rows of images: any number of each image, or `rows` of every image that could be read."""

    name: str
    fields: Sequence[Field]
    rows: int | None = None


@dataclass(frozen=True, slots=True)
class PerStore:
    """Product of the whole store: small arrays, each of any length, with JSON attributes."""

    name: str
    fields: Sequence[Field]


_Product = TypeVar("_Product", PerImage, PerStore)

_NAME = re.compile("[a-z][a-z0-9_]{0,63}")
# Folders of every store, and names that stand beside products where manifests are compared.
_NO_PRODUCTS = frozenset(("images", "checksums", "journal", "schema", "embedding", "images_sha256"))
# The array of every product with rows of images, the folder of an array's shards, and what `export` puts beside arrays
# or numpy's writer takes as its own arguments.
_NO_FIELDS = frozenset(("offset", "c", "image_id", "attributes", "file", "allow_pickle"))
# Names that are no files on Windows, where stores are read.
_DEVICES = re.compile("con|prn|aux|nul|(?:com|lpt)[0-9]")
DTYPES = ("<f2", "<f4", "<f8", "|i1", "<i2", "<i4", "<i8", "|u1", "<u2", "<u4", "<u8")
"""Types of the arrays of stores."""
TYPES_BY_NAME: Mapping[str, str] = MappingProxyType({np.dtype(dtype).name: dtype for dtype in DTYPES})
"""Types of the arrays of stores by the names that files have for them; numpy itself would read more than names."""
_MOST_FIELDS = 64
"""Arrays of one product: a reader notes in the bits of one number which of them it has looked at."""
_MOST_ROW_NUMBERS = 2**20
_MOST_AXES = 8
"""Axes of one row; numpy stops at 64 of an array."""
_MOST_PRODUCTS = 64


class Schema:
    """Products of a store, in the order in which they are made, and the arrays of each.

    Args:
        products: one or more, at least one of them with rows of images; names differ, and a product may be made from
            those before it.

    Raises:
        StoreError: a name, type or shape that no store can have; says which.
    """

    def __init__(self, products: Iterable[PerImage | PerStore]) -> None:
        if not isinstance(products, Iterable):
            raise StoreError(f"schema: expected a list of products, found {reprlib.repr(products)}")
        given = tuple(products)
        for one in given:
            if not isinstance(one, PerImage | PerStore) or not isinstance(one.fields, Iterable):
                raise StoreError(f"schema: expected products with fields, found {reprlib.repr(one)}")
        self.products = tuple(replace(product, fields=tuple(product.fields)) for product in given)
        """The products, in order."""
        _require_few(len(self.products))
        for product in self.products:
            _check_product(product)
        if len(set(self.names)) != len(self.names):
            raise StoreError(f"schema: two products have the same name; found {', '.join(self.names)}")
        if not self.per_image:
            raise StoreError("schema: expected a product with rows of images, found none")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schema) and self.products == other.products

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self.products)

    def __repr__(self) -> str:
        return f"Schema({list(self.products)!r})"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the products, in order."""
        return tuple(product.name for product in self.products)

    @cached_property
    def per_image(self) -> Mapping[str, PerImage]:
        """Products with rows of images, by name."""
        return {product.name: product for product in self.products if isinstance(product, PerImage)}

    @cached_property
    def per_store(self) -> Mapping[str, PerStore]:
        """Products of the whole store, by name."""
        return {product.name: product for product in self.products if isinstance(product, PerStore)}

    def stored(self, product: str) -> tuple[Field, ...]:
        """Arrays of a product as they are in the store, without offsets."""
        found = self.per_image.get(product) or self.per_store[product]
        return tuple(stored for field in found.fields for stored in field.stored)

    def per_store_product(self, product: str, where: object) -> PerStore:
        """A product of the whole store `where`; StoreError for any other name."""
        return _named(self.per_store, product, "per-store", where)

    def per_image_product(self, product: str, where: object) -> PerImage:
        """A product with rows of images of the store `where`; StoreError for any other name."""
        return _named(self.per_image, product, "per-image", where)

    @property
    def groups(self) -> tuple[str, ...]:
        """Groups of data; each has its like below `checksums`."""
        return ("images", *self.per_image, *self.per_store)

    @cached_property
    def arrays(self) -> Mapping[str, Field]:
        """All arrays of data by their path in the store, but for those below `checksums`."""
        columns = [("images", field) for field in IMAGES]
        columns += [(product, field) for product in self.per_image for field in (OFFSET, *self.stored(product))]
        columns += [(product, field) for product in self.per_store for field in self.stored(product)]
        return {f"{product}/{field.name}": field for product, field in columns}

    def holds_rows(self, array: str) -> bool:
        """True if an array holds rows of images; all others are small."""
        product, _, field = array.partition("/")
        return product in self.per_image and field != OFFSET.name

    def to_json(self) -> list[dict[str, Any]]:
        """The schema as JSON."""
        return [_described(product) for product in self.products]

    def described(self, product: str) -> dict[str, Any]:
        """One product of `to_json`."""
        return _described(self.per_image.get(product) or self.per_store[product])

    @classmethod
    def from_json(cls, found: object, where: str) -> "Schema":
        """The inverse of `to_json`; `where` names the source in errors.

        Raises:
            StoreError: no schema, or one with something that this version does not know.
        """
        if not isinstance(found, list) or not found:
            raise StoreError(f"{where}: schema: expected a list of products, found {reprlib.repr(found)}")
        _require_few(len(found))
        try:
            schema = cls(map(_product_of, found))
        except (KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"{where}: schema: does not describe products ({type(error).__name__}: {error}); the file is damaged, "
                "or a later version wrote it"
            ) from error
        except StoreError as error:
            raise StoreError(f"{where}: {error}") from error
        if schema.to_json() != found:
            raise StoreError(
                f"{where}: schema: says more than this version knows; use the version that wrote it, or a later one"
            )
        return schema


def _named(products: Mapping[str, _Product], name: str, kind: str, where: object) -> _Product:
    found = products.get(name)
    if found is None:
        raise StoreError(f"{where}: has no {kind} product {name!r}; it has {', '.join(products)}")
    return found


def _require_few(products: int) -> None:
    if products > _MOST_PRODUCTS:
        raise StoreError(f"schema: has {products} products, expected at most {_MOST_PRODUCTS}")


def _check_product(product: PerImage | PerStore) -> None:
    where = f"schema: product {reprlib.repr(product.name)}"
    _check_name(product.name, where, _NO_PRODUCTS)
    if isinstance(product, PerImage) and product.rows is not None and not _is_count(product.rows):
        raise StoreError(f"{where}: rows must be a whole number from 1, or None, found {reprlib.repr(product.rows)}")
    if not all(isinstance(field, Field) for field in product.fields):
        raise StoreError(f"{where}: expected fields, found {reprlib.repr(product.fields)}")
    names = [stored.name for field in product.fields for stored in field.stored]
    if not 1 <= len(names) <= _MOST_FIELDS:
        raise StoreError(f"{where}: has {len(names)} arrays, expected 1 to {_MOST_FIELDS}")
    for field in product.fields:
        _check_field(field, f"{where}, field {reprlib.repr(field.name)}", of_images=isinstance(product, PerImage))
    if len(set(names)) != len(names):
        raise StoreError(f"{where}: two arrays have the same name; found {', '.join(names)}")


def _check_field(field: Field, where: str, *, of_images: bool) -> None:
    _check_name(field.name, where, _NO_FIELDS)
    kind = np.dtype(field.dtype)
    if field.dtype not in DTYPES:
        raise StoreError(f"{where}: {kind.name} is not stored; expected {', '.join(np.dtype(d).name for d in DTYPES)}")
    if len(field.trailing) > _MOST_AXES:
        raise StoreError(f"{where}: a row has {len(field.trailing)} axes, expected at most {_MOST_AXES}")
    if not all(map(_is_count, field.trailing)) or math.prod(field.trailing) > _MOST_ROW_NUMBERS:
        raise StoreError(
            f"{where}: the shape of a row must be whole numbers from 1, at most {_MOST_ROW_NUMBERS:,} values in all, "
            f"found {reprlib.repr(field.trailing)}"
        )
    if field.values not in get_args(Values) or field.kept not in get_args(Kept):
        said = f"values {reprlib.repr(field.values)}, kept {reprlib.repr(field.kept)}"
        raise StoreError(f"{where}: {said}: not known to this version")
    if field.values == "box" and not (of_images and field.dtype == "<f4" and field.trailing == (4,)):
        raise StoreError(f"{where}: a box is float32 of shape (4,) of an image, found {kind.name} {field.trailing}")
    if field.values == "unit" and not (kind.kind == "f" and len(field.trailing) == 1):
        raise StoreError(f"{where}: a unit vector is floating-point with one axis, found {kind.name} {field.trailing}")
    if field.kept == "int8" and not (of_images and field.values == "unit" and field.dtype == "<f2"):
        raise StoreError(f"{where}: only unit vectors of float16 of images are kept as int8")


def _check_name(name: object, where: str, taken: frozenset[str]) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name) or _DEVICES.fullmatch(name) or name in taken:
        raise StoreError(
            f"{where}: expected a name of at most 64 lower-case letters, digits and underscores, the first a letter, "
            "that neither stores nor systems use themselves"
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def _described(product: PerImage | PerStore) -> dict[str, Any]:
    arrays = [
        {
            "name": field.name,
            "data_type": np.dtype(field.dtype).name,
            "shape": list(field.trailing),
            "values": field.values,
            "kept": field.kept,
        }
        for field in product.fields
    ]
    if isinstance(product, PerStore):
        return {"name": product.name, "per": "store", "arrays": arrays}
    return {"name": product.name, "per": "image", "rows": product.rows, "arrays": arrays}


def _type_named(name: object) -> str:
    if not isinstance(name, str) or name not in TYPES_BY_NAME:
        raise StoreError(f"schema: data_type {reprlib.repr(name)} is not known to this version")
    return TYPES_BY_NAME[name]


def _product_of(found: Mapping[str, Any]) -> PerImage | PerStore:
    fields = tuple(
        Field(one["name"], _type_named(one["data_type"]), tuple(one["shape"]), one["values"], one["kept"])
        for one in found["arrays"]
    )
    if found["per"] not in ("image", "store"):
        name, per = reprlib.repr(found["name"]), reprlib.repr(found["per"])
        raise StoreError(f"schema: product {name}: per {per} is not known to this version")
    if found["per"] == "store":
        return PerStore(found["name"], fields)
    return PerImage(found["name"], fields, found["rows"])


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
    index of a shard as long as a tenth of its data. Of rows above 64 KiB, as feature maps are, a chunk holds as many as
    fit into 16 MiB, at least one. A small array is one shard just large enough.
    """
    row_bytes = _row_bytes(dtype, shape[1:])
    chunk_rows = min(256, max(1, _CHUNK_BYTES // row_bytes)) if row_bytes >= 64 else 4096
    most_chunks = max(1, shard_bytes // (row_bytes * chunk_rows))
    needed_chunks = max(1, -(-shape[0] // chunk_rows))
    return ArraySpec(name, dtype, shape, chunk_rows, chunk_rows * min(most_chunks, needed_chunks))


def _row_bytes(dtype: str, trailing: tuple[int, ...]) -> int:
    return int(np.dtype(dtype).itemsize * math.prod(trailing))


def require_supported(found: object, where: str) -> None:
    """Refuse a store written in a format this code cannot read faithfully."""
    if found not in FORMAT_VERSIONS:
        raise StoreError(
            f"{where}: store format {found!r}, this version reads formats {', '.join(map(str, FORMAT_VERSIONS))}; "
            "build the store anew in another folder, or use the version that wrote it"
        )
