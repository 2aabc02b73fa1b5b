"""Provenance: everything that shaped a store's bytes, its canonical form, digest and comparison."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from cache.schema import StoreError

JSON: TypeAlias = "None | bool | int | float | str | Sequence[JSON] | Mapping[str, JSON]"

_SHOWN = 60
"""Longest value shown in a difference, in characters."""
_LISTED = 3
"""Most differences shown inside one list."""


def canonical_json(value: JSON, where: str = "value") -> str:
    """The one text of a JSON value: keys sorted by code point, no spaces, no escapes beyond JSON's own.

    Raises:
        StoreError: a number that is not finite, a key that is not text, or a type JSON does not have.
    """
    return json.dumps(_plain(value, where), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


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
        StoreError: not JSON, not an object, or it uses NaN or Infinity.
    """
    try:
        found = json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        raise StoreError(f"{where}: not valid JSON ({error}); the file is damaged or was edited") from error
    if not isinstance(found, dict):
        raise StoreError(f"{where}: expected a JSON object, found a {type(found).__name__}")
    return found


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
    record.pop("sha256", None)
    if seal(record) == data:
        return record
    raise StoreError(f"{where}: its contents do not match the checksum it carries; the file is damaged or was edited")


@dataclass(frozen=True)
class Manifest:
    """Everything that shaped a store's bytes, as nested JSON; equal manifests mean equal stores.

    Held as a private plain copy: changing the argument afterwards changes nothing here.
    """

    fields: Mapping[str, JSON]

    def __post_init__(self) -> None:
        if not isinstance(self.fields, Mapping):
            raise StoreError(f"manifest: expected an object of named values, found {type(self.fields).__name__}")
        object.__setattr__(self, "fields", _plain(self.fields, "manifest"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Manifest) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @cached_property
    def digest(self) -> str:
        """Sha256 of the canonical JSON, 64 hexadecimal digits."""
        return hashlib.sha256(canonical_json(self.fields).encode()).hexdigest()

    def differences(self, wanted: "Manifest") -> list[str]:
        """One line per value in which this store's manifest differs from `wanted`, by dotted name."""
        return list(_object_differences(self.fields, wanted.fields, ""))

    def to_json(self) -> str:
        """Indented JSON with sorted keys, for people; `from_json` reads it back exactly."""
        return json.dumps(self.fields, sort_keys=True, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "manifest") -> "Manifest":
        """Parse what `to_json` wrote; `where` names the source in errors."""
        return cls(parse_json(text, where))


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
