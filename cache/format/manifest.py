"""Provenance: everything that shaped a store's bytes, its canonical form, digest and comparison."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from ezsd.cache.errors import StoreError
from ezsd.cache.format.schema import (
    EMBED,
    EMBEDDING_TYPES,
    FORMAT_VERSION,
    IMAGES,
    PER_IMAGE,
    PRODUCTS,
    EmbeddingType,
    require_supported,
)

JSON: TypeAlias = "None | bool | int | float | str | Sequence[JSON] | Mapping[str, JSON]"

_DEEPEST = 64
"""Most levels of JSON in JSON."""
_SHOWN = 60
"""Longest value shown in a difference, in characters."""
_LISTED = 3
"""Most differences shown inside one list."""


def canonical_json(value: JSON, where: str = "value") -> str:
    """The one text of a JSON value: keys sorted by code point, no spaces, no escapes beyond JSON's own.

    Raises:
        StoreError: a number that is not finite, a key that is not text, or a type JSON does not have.
    """
    return _compact(_plain(value, where))


def _compact(value: JSON) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _plain(value: object, where: str) -> JSON:
    """A copy of plain dicts and lists, or a StoreError that names the place by its dotted name."""
    if isinstance(value, Mapping):
        bad = [key for key in value if not isinstance(key, str)]
        if bad:
            raise StoreError(f"{where}: the key {bad[0]!r} is not text; JSON objects have text keys only")
        return {_text(key, where): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, str):
        return _text(value, where)
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{place}]") for place, item in enumerate(value)]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, float):
        raise StoreError(f"{where}: {value} is not a finite number; JSON has no such number")
    raise StoreError(f"{where}: a {type(value).__name__} is not JSON; convert it to a plain number, text or list")


def _text(value: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise StoreError(f"{where}: the text {value!r} cannot be written as UTF-8 ({error.reason})") from error
    return value


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """Parse strict JSON that is an object.

    Raises:
        StoreError: not JSON, not an object, it uses NaN or Infinity, or is nested deeper than any file of a store.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        found = json.loads(text, parse_constant=_refuse_constant)
        if "\\u" in text:
            # Half of a character is legal in JSON, and ends whatever writes it later.
            _compact(found).encode()
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{where}: not valid JSON ({error}); the file is damaged or was edited") from error
    if _deeper(found, _DEEPEST):
        raise StoreError(f"{where}: JSON nested deeper than {_DEEPEST} levels; the file is damaged or was edited")
    if not isinstance(found, dict):
        raise StoreError(f"{where}: expected a JSON object, found a {type(found).__name__}")
    return found


def _deeper(value: object, levels: int) -> bool:
    """Whether JSON is nested deeper than `levels`: whatever walks through it later would end in a RecursionError."""
    inner: Iterable[object] = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(not levels or _deeper(item, levels - 1) for item in inner if isinstance(item, dict | list))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def seal(record: Mapping[str, JSON]) -> bytes:
    """Canonical JSON that carries the sha256 of itself, so that one wrong bit anywhere shows."""
    digest = hashlib.sha256(canonical_json(record).encode()).hexdigest()
    return (canonical_json({**record, "sha256": digest}) + "\n").encode()


def unseal(data: bytes, where: str) -> dict[str, Any]:
    """The record that `seal` wrote.

    Raises:
        StoreError: the bytes are not exactly those that `seal` made.
    """
    record = parse_json(data, where)
    digest = record.pop("sha256", None)
    # What was parsed is plain already: copying it, as for values from elsewhere, took most of the time.
    sealed = (_compact({**record, "sha256": digest}) + "\n").encode()
    if sealed == data and digest == hashlib.sha256(_compact(record).encode()).hexdigest():
        return record
    raise StoreError(f"{where}: its contents do not match the checksum it carries; the file is damaged or was edited")


@dataclass(frozen=True)
class Origin:
    """What shaped one product: the algorithm's version, its own inputs, and the products it was made from.

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
        object.__setattr__(self, "inputs", _plain(self.inputs, "inputs"))
        object.__setattr__(self, "needs", tuple(sorted(self.needs)))

    @property
    def fields(self) -> dict[str, JSON]:
        """The origin as JSON."""
        return {"version": self.version, "inputs": self.inputs, "needs": list(self.needs)}


@dataclass(frozen=True)
class Manifest:
    """Everything that shaped a store's bytes, product by product; equal manifests mean equal stores."""

    products: Mapping[str, Origin]
    """One for each name in `PRODUCTS`."""
    images_sha256: str
    """See `images_digest`."""
    embedding: EmbeddingType = "float16"
    """How embeddings of regions and ground truth are kept."""

    def __post_init__(self) -> None:
        if not isinstance(self.products, Mapping) or set(self.products) != set(PRODUCTS):
            found = sorted(self.products) if isinstance(self.products, Mapping) else type(self.products).__name__
            raise StoreError(f"manifest: expected the products {', '.join(PRODUCTS)}, found {found}")
        if self.embedding not in EMBEDDING_TYPES:
            raise StoreError(f"manifest: embedding {self.embedding!r} is not one of {', '.join(EMBEDDING_TYPES)}")
        for place, name in enumerate(PRODUCTS):
            late = [needed for needed in self.products[name].needs if needed not in PRODUCTS[:place]]
            if late:
                raise StoreError(f"manifest: {name} cannot need {late[0]}; products are made as {', '.join(PRODUCTS)}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Manifest) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @cached_property
    def fields(self) -> dict[str, JSON]:
        """The manifest as JSON."""
        return {
            "format_version": FORMAT_VERSION,
            "images_sha256": self.images_sha256,
            "embedding": self.embedding,
            "products": {name: self.products[name].fields for name in PRODUCTS},
        }

    @cached_property
    def digest(self) -> str:
        """Sha256 of the canonical JSON, 64 hexadecimal digits."""
        return _sha256(self.fields)

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Sha256 of all that shaped each product, by name; what was decided later does not count."""
        return {name: self.fingerprint(name) for name in PRODUCTS}

    def fingerprint(self, product: str, *, embedding: EmbeddingType | None = None) -> str:
        """Sha256 of all that shaped a product; with `embedding`, as if the store kept its embeddings so."""
        origin = self.products[product]
        ragged = PER_IMAGE.get(product, ())
        return _sha256(
            {
                "product": product,
                "version": origin.version,
                "inputs": origin.inputs,
                "needs": {needed: self.fingerprint(needed) for needed in origin.needs},
                "images_sha256": self.images_sha256 if ragged else None,
                "embedding": (embedding or self.embedding) if any(EMBED in f.trailing for f in ragged) else None,
            }
        )

    def differences(self, wanted: "Manifest") -> list[str]:
        """One line per value in which this store's manifest differs from `wanted`, by dotted name."""
        return differences(self._named, wanted._named)

    @property
    def _named(self) -> dict[str, JSON]:
        """What is compared: `proposals.nms_iou` is what people call it, without the rooms it lies in."""
        origins = {
            name: {**origin.inputs, "algorithm_version": origin.version, "needs": list(origin.needs)}
            for name, origin in self.products.items()
        }
        return {"images_sha256": self.images_sha256, "embedding": self.embedding, **origins}

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
            return cls(products, str(fields["images_sha256"]), fields["embedding"])
        except (KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{where}: is not a manifest ({error}); the file is damaged or was edited") from error


def images_digest(image_ids: ArrayLike, widths: ArrayLike, heights: ArrayLike) -> str:
    """Sha256 of an image list: all ids (int64), then all widths, then all heights (int32), little-endian."""
    columns = zip((image_ids, widths, heights), IMAGES, strict=True)
    data = b"".join(np.ascontiguousarray(values, field.dtype).tobytes() for values, field in columns)
    return hashlib.sha256(data).hexdigest()


def _sha256(value: JSON) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def differences(store: Mapping[str, JSON], wanted: Mapping[str, JSON]) -> list[str]:
    """One line per value in which two JSON objects differ, by dotted name."""
    return list(_object_differences(_objects(store), _objects(wanted), ""))


def _objects(value: Mapping[str, JSON]) -> Mapping[str, JSON]:
    plain = _plain(value, "value")
    assert isinstance(plain, dict)
    return plain


def _object_differences(store: Mapping[str, JSON], wanted: Mapping[str, JSON], prefix: str) -> Iterator[str]:
    for key in sorted(store.keys() | wanted.keys()):
        name = f"{prefix}{key}"
        if key not in wanted:
            yield f"{name}: store has {_short(store[key])}, wanted has no such entry"
        elif key not in store:
            yield f"{name}: store has no such entry, wanted {_short(wanted[key])}"
        else:
            yield from _value_differences(store[key], wanted[key], name)


def _value_differences(store: JSON, wanted: JSON, name: str) -> Iterator[str]:
    # Texts are compared, not values: 1, 1.0 and true are equal in Python and shape different bytes.
    if canonical_json(store) == canonical_json(wanted):
        return
    if isinstance(store, dict) and isinstance(wanted, dict):
        yield from _object_differences(store, wanted, f"{name}.")
    elif isinstance(store, list) and isinstance(wanted, list) and len(store) == len(wanted):
        yield from _list_differences(store, wanted, name)
    else:
        yield f"{name}: store has {_short(store)}, wanted {_short(wanted)}"


def _list_differences(store: list[JSON], wanted: list[JSON], name: str) -> Iterator[str]:
    found = [
        line
        for place, (old, new) in enumerate(zip(store, wanted, strict=True))
        for line in _value_differences(old, new, f"{name}[{place}]")
    ]
    yield from found[:_LISTED]
    if len(found) > _LISTED:
        yield f"{name}: {len(found) - _LISTED} more differences in this list of {len(store)}"


def _short(value: JSON) -> str:
    text = canonical_json(value)
    if len(text) <= _SHOWN:
        return text
    size = f"{len(value)} items" if isinstance(value, list | dict) else f"{len(text)} characters"
    return f"{text[: _SHOWN // 2]}…{text[-_SHOWN // 4 :]} ({size})"
