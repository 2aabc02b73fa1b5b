"""Provenance: everything that shaped a store's bytes, its digest and its comparison."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ezsd.cache.errors import StoreError
from ezsd.cache.format.regions import (
    EMBEDDING_TYPES,
    OPTIONAL,
    PER_IMAGE,
    PRODUCTS,
    EmbeddingType,
    format_version,
    region_schema,
)
from ezsd.cache.format.schema import IMAGES, SCHEMA_VERSION, Schema, require_supported
from ezsd.cache.format.sealed_json import JSON, Difference, canonical_json, differences, parse_json, plain_json


@dataclass(frozen=True)
class Origin:
    """Provenance of one product: the algorithm's version, its inputs, and the products it was made from.

    Held as a private plain copy: changing the arguments afterwards changes nothing here.
    """

    version: int
    inputs: Mapping[str, JSON]
    needs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.inputs, Mapping):
            raise StoreError(f"inputs: expected an object of named values, found {type(self.inputs).__name__}")
        if not isinstance(self.version, int) or isinstance(self.version, bool) or self.version < 1:
            raise StoreError(f"version: expected a whole number from 1, found {self.version!r}")
        object.__setattr__(self, "inputs", plain_json(self.inputs, "inputs"))
        object.__setattr__(self, "needs", tuple(sorted(self.needs)))

    @property
    def fields(self) -> dict[str, JSON]:
        """The origin as JSON."""
        return {"version": self.version, "inputs": self.inputs, "needs": list(self.needs)}


_OWN_NAMES = frozenset(("algorithm_version", "needs"))
"""Names that stand beside the inputs of a product where manifests are compared."""


@dataclass(frozen=True)
class Manifest:
    """Everything that shaped a store's bytes, product by product; equal manifests mean equal stores."""

    products: Mapping[str, Origin]
    """Origin of each product of the schema; in a store of regions those in `OPTIONAL` may be absent."""
    images_sha256: str
    """Sha256 of the image list, as of `images_digest`."""
    embedding: EmbeddingType | None = None
    """Stored type of the embeddings of regions and ground truth, in a store of regions: float16 if none is given.

    None in a store with a schema, which says itself how its fields are kept."""
    schema: Schema | None = None
    """Schema of the store; None for a store of regions."""

    def __post_init__(self) -> None:
        known = PRODUCTS if self.schema is None else self.schema.names
        optional = OPTIONAL if self.schema is None else ()
        required = [name for name in known if name not in optional]
        if not isinstance(self.products, Mapping) or not set(required) <= set(self.products) <= set(known):
            found = sorted(self.products) if isinstance(self.products, Mapping) else type(self.products).__name__
            more = f" and, where there is one, {', '.join(optional)}" if optional else ""
            raise StoreError(f"manifest: expected the products {', '.join(required)}{more}; found {found}")
        made = [name for name in known if name in self.products]
        object.__setattr__(self, "products", {name: self.products[name] for name in made})
        if self.schema is not None and self.embedding is not None:
            raise StoreError(
                f"manifest: embedding {self.embedding!r} is of stores of regions; a schema says it of each field"
            )
        if self.schema is None and self.embedding is None:
            object.__setattr__(self, "embedding", "float16")
        elif self.schema is None and self.embedding not in EMBEDDING_TYPES:
            raise StoreError(f"manifest: embedding {self.embedding!r} is not one of {', '.join(EMBEDDING_TYPES)}")
        for place, name in enumerate(made):
            late = [needed for needed in self.products[name].needs if needed not in made[:place]]
            if late:
                raise StoreError(f"manifest: {name} cannot need {late[0]}; products are made as {', '.join(made)}")
            taken = _OWN_NAMES & self.products[name].inputs.keys() if self.schema is not None else ()
            if taken:
                raise StoreError(f"manifest: {name}: an input is named {min(taken)!r}, as a value of every product is")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Manifest) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def format_version(self) -> int:
        """Version of the format of a store with these products."""
        return format_version(self.products) if self.schema is None else SCHEMA_VERSION

    def layout(self, embed_dim: int | None) -> Schema:
        """Schema of the store; `embed_dim` is D in a store of regions, and None in any other.

        Raises:
            StoreError: no D is given where one is needed, or one where it means nothing.
        """
        if (self.schema is None) != (embed_dim is not None):
            expected = "expected None, the schema has all shapes" if self.schema else "expected a width of embeddings"
            raise StoreError(f"embed_dim: {expected}, found {embed_dim}")
        if self.schema is not None:
            return self.schema
        assert embed_dim is not None
        assert self.embedding is not None
        return region_schema(embed_dim, self.embedding, self.products)

    @cached_property
    def fields(self) -> dict[str, JSON]:
        """The manifest as JSON."""
        return {
            "format_version": self.format_version,
            "images_sha256": self.images_sha256,
            **self._shapes,
            "products": {name: origin.fields for name, origin in self.products.items()},
        }

    @property
    def _shapes(self) -> dict[str, JSON]:
        """Values that shape the arrays and belong to no product."""
        return {"embedding": self.embedding} if self.schema is None else {"schema": self.schema.to_json()}

    @cached_property
    def digest(self) -> str:
        """Sha256 of the canonical JSON, 64 hexadecimal digits."""
        return _sha256(self.fields)

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Sha256 of all that shaped each product, by name; what was decided later does not count."""
        return {name: self.fingerprint(name) for name in self.products}

    def fingerprint(self, product: str, *, embedding: EmbeddingType | None = None) -> str:
        """Sha256 of all that shaped a product; with `embedding`, as if the store kept its embeddings so."""
        origin = self.products[product]
        of_images = product in (PER_IMAGE if self.schema is None else self.schema.per_image)
        described: dict[str, JSON] = {
            "product": product,
            "version": origin.version,
            "inputs": origin.inputs,
            "needs": {needed: self.fingerprint(needed) for needed in origin.needs},
            "images_sha256": self.images_sha256 if of_images else None,
        }
        if self.schema is not None:
            return _sha256({**described, "schema": self.schema.described(product)})
        units = any(field.values == "unit" for field in PER_IMAGE.get(product, ()))
        return _sha256({**described, "embedding": (embedding or self.embedding) if units else None})

    def same_products(self, other: "Manifest") -> tuple[str, ...]:
        """Names of the products that both have, made from the same things in the same way."""
        return tuple(name for name, found in self.fingerprints.items() if other.fingerprints.get(name) == found)

    def differences(self, wanted: "Manifest") -> list[Difference]:
        """The values in which this manifest differs from `wanted`, by dotted name; none where the digests are equal."""
        found = differences(self._named, wanted._named)
        if not found and self.digest != wanted.digest:
            # The digests decide, whatever the names can tell apart.
            return [Difference("manifest_digest", self.digest, wanted.digest)]
        return found

    @property
    def _named(self) -> dict[str, JSON]:
        """The compared values: an input is named PRODUCT.KEY, as in `proposals.nms_iou`."""
        origins = {
            name: {**origin.inputs, "algorithm_version": origin.version, "needs": list(origin.needs)}
            for name, origin in self.products.items()
        }
        shapes = self._shapes
        if self.schema is not None:
            # By name: what differs is then said of the product that it is in.
            described = {name: self.schema.described(name) for name in self.schema.names}
            shapes = {"schema": described, "schema.products": list(self.schema.names)}
        return {"images_sha256": self.images_sha256, **shapes, **origins}

    def to_json(self) -> str:
        """Indented JSON with sorted keys, for people; `from_json` reads it back exactly."""
        return json.dumps(self.fields, sort_keys=True, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "manifest") -> "Manifest":
        """Parse what `to_json` wrote; `where` names the source in errors."""
        return cls.from_fields(parse_json(text, where), where)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], where: str = "manifest") -> "Manifest":
        """The inverse of `fields`.

        Raises:
            StoreError: another format version, or not a manifest.
        """
        require_supported(fields.get("format_version"), where)
        try:
            products = {
                name: Origin(at["version"], at["inputs"], tuple(at["needs"])) for name, at in fields["products"].items()
            }
            listed = str(fields["images_sha256"])
            if fields["format_version"] == SCHEMA_VERSION:
                manifest = cls(products, listed, schema=Schema.from_json(fields["schema"], where))
            else:
                manifest = cls(products, listed, fields["embedding"])
        except (KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{where}: is not a manifest ({error}); the file is damaged or was edited") from error
        if manifest.schema is None and fields["embedding"] is None:
            raise StoreError(f"{where}: is not a manifest (embedding: null); the file is damaged or was edited")
        if manifest.format_version != fields["format_version"]:
            raise StoreError(
                f"{where}: says format {fields['format_version']}, and with these products it is "
                f"{manifest.format_version}; the file is damaged or was edited"
            )
        return manifest


def images_digest(image_ids: ArrayLike, widths: ArrayLike, heights: ArrayLike) -> str:
    """Sha256 of an image list: all ids (int64), then all widths, then all heights (int32), little-endian."""
    columns = zip((image_ids, widths, heights), IMAGES, strict=True)
    data = b"".join(np.ascontiguousarray(values, field.dtype).tobytes() for values, field in columns)
    return hashlib.sha256(data).hexdigest()


def _sha256(value: JSON) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()
