"""Schema of ezsd's own stores: proposals, regions and ground truth of images, their teacher, text and proposer."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

from ezsd.cache.format.schema import CHECKSUMS, EMBED, Field, PerImage, PerStore, Schema

EmbeddingType: TypeAlias = Literal["float16", "int8"]
"""Stored type of the embeddings of regions and ground truth; with int8 each row has a float32 scale."""
EMBEDDING_TYPES: tuple[EmbeddingType, ...] = get_args(EmbeddingType)

_BOX = Field("box", "<f4", (4,), "box")
_SCORE = Field("score", "<f4")
_CLASS = Field("class_index", "<i4")
_EMBEDDING = Field("embedding", "<f2", (EMBED,), "unit")

PER_IMAGE: Mapping[str, tuple[Field, ...]] = MappingProxyType(
    {
        "proposals": (_BOX, _SCORE),
        "regions": (_BOX, _SCORE, Field("confidence", "<f4"), _CLASS, _EMBEDDING),
        "ground_truth": (_BOX, _CLASS, Field("annotation_id", "<i8"), _EMBEDDING),
    }
)
"""Products with any number of rows per image, zero included: the columns that a writer is given and a reader gives."""

PER_STORE: Mapping[str, Field] = MappingProxyType(
    {
        "teacher": Field("values", "<f4"),
        "text": Field("embedding", "<f4", (EMBED,), "unit"),
        "proposer": Field("values", "<f4"),
    }
)
"""Products that belong to the whole store: one small array each, with JSON attributes."""

PRODUCTS = ("teacher", "text", "proposer", "proposals", "regions", "ground_truth")
"""All products, in the order in which they are made: one may need those before it."""

OPTIONAL = ("proposer",)
"""Products that a store may lack; its manifest and the files that its commit mark lists say whether it has them."""


def region_schema(embed_dim: int, embedding: EmbeddingType, products: Collection[str] = PRODUCTS) -> Schema:
    """Schema of a store of regions.

    Args:
        embed_dim: D, the width of the embeddings.
        embedding: stored type of the embeddings of regions and ground truth.
        products: those of `OPTIONAL` that the store has, and all others.
    """
    return Schema(
        _per_image(name, embed_dim, embedding)
        if name in PER_IMAGE
        else PerStore(name, (_of(PER_STORE[name], embed_dim),))
        for name in PRODUCTS
        if name in products
    )


def _per_image(name: str, embed_dim: int, embedding: EmbeddingType) -> PerImage:
    fields = (_of(field, embed_dim) for field in PER_IMAGE[name])
    if embedding == "int8":
        fields = (replace(field, kept="int8") if field.values == "unit" else field for field in fields)
    return PerImage(name, tuple(fields))


def _of(field: Field, embed_dim: int) -> Field:
    return replace(field, trailing=field.row_shape(embed_dim))


def products_of_files(names: Iterable[str]) -> tuple[str, ...]:
    """The products of a store of regions that lists these files, in the order in which they are made."""
    found = {name.removeprefix(f"{CHECKSUMS}/").partition("/")[0] for name in names}
    return tuple(product for product in PRODUCTS if product not in OPTIONAL or product in found)


def format_version(products: Collection[str]) -> int:
    """Version of the format of a store of regions: 2, or 3 with an optional product, which version 2 lacks."""
    return 2 if set(OPTIONAL).isdisjoint(products) else 3
