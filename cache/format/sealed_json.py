"""JSON of a store's files: the one canonical text, strict parsing, records with a checksum, differences."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ezsd.cache.errors import StoreError

JSON: TypeAlias = "None | bool | int | float | str | Sequence[JSON] | Mapping[str, JSON]"

_DEEPEST = 64
"""Most levels of JSON in JSON."""
_SEAL = "sha256"
"""Key of a record's checksum of itself."""
_SHOWN = 60
"""Longest value shown in a difference, in characters."""
_LISTED = 3
"""Most differences listed inside one list."""


def canonical_json(value: JSON, where: str = "value") -> str:
    """The one text of a JSON value: keys sorted by code point, no spaces, no escapes beyond JSON's own.

    Raises:
        StoreError: a number that is not finite, a key that is not text, or a type JSON does not have.
    """
    return compact_json(plain_json(value, where))


def compact_json(value: JSON) -> str:
    """`canonical_json` of what is known to be plain: it is not looked at."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def plain_json(value: object, where: str) -> JSON:
    """A copy of plain dicts and lists; StoreError names the place of what is not JSON by its dotted name."""
    if isinstance(value, Mapping):
        bad = [key for key in value if not isinstance(key, str)]
        if bad:
            raise StoreError(f"{where}: the key {bad[0]!r} is not text; JSON objects have text keys only")
        return {_text(key, where): plain_json(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, str):
        return _text(value, where)
    if isinstance(value, list | tuple):
        return [plain_json(item, f"{where}[{place}]") for place, item in enumerate(value)]
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
            compact_json(found).encode()
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{where}: not valid JSON ({error}); the file is damaged or was edited") from error
    # Few brackets cannot be nested deeply, and most files have few.
    if text.count("[") + text.count("{") > _DEEPEST and _deeper(found, _DEEPEST):
        raise StoreError(f"{where}: JSON nested deeper than {_DEEPEST} levels; the file is damaged or was edited")
    if not isinstance(found, dict):
        raise StoreError(f"{where}: expected a JSON object, found a {type(found).__name__}")
    return found


def _deeper(value: object, levels: int) -> bool:
    """True if JSON is nested deeper than `levels`: whatever walks through it later would end in a RecursionError."""
    inner: Iterable[object] = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    # Most lists are long and hold numbers alone, which their types tell fastest.
    if _CONTAINERS.isdisjoint(map(type, inner)):
        return False
    return any(not levels or _deeper(item, levels - 1) for item in inner if isinstance(item, dict | list))


_CONTAINERS = frozenset((dict, list))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def seal(record: Mapping[str, JSON]) -> bytes:
    """Canonical JSON that carries the sha256 of itself, so that one wrong bit anywhere shows."""
    plain = plain_json(record, "value")
    assert isinstance(plain, dict)
    return _sealed(plain)


def _sealed(plain: Mapping[str, JSON]) -> bytes:
    """The sealed text of a plain record."""
    before = compact_json({key: value for key, value in plain.items() if key < _SEAL})[1:-1]
    after = compact_json({key: value for key, value in plain.items() if key > _SEAL})[1:-1]
    digest = hashlib.sha256(_object(before, after)).hexdigest()
    return _object(before, f'"{_SEAL}":"{digest}"', after) + b"\n"


def _object(*members: str) -> bytes:
    return b"{%b}" % ",".join(filter(None, members)).encode()


def unseal(data: bytes, where: str) -> dict[str, Any]:
    """The record that `seal` wrote.

    Raises:
        StoreError: the bytes are not exactly those that `seal` made.
    """
    record = parse_json(data, where)
    # What was parsed is plain already, and made into text once: a journal has thousands of records.
    if f"{compact_json(record)}\n".encode() == data and _carries_digest(data, record.pop(_SEAL, None)):
        return record
    raise StoreError(f"{where}: its contents do not match the checksum it carries; the file is damaged or was edited")


def _carries_digest(data: bytes, digest: object) -> bool:
    """True if canonical text carries this digest as its seal, and is what the digest was taken of."""
    before, seal, after = data.partition(f'"{_SEAL}":"{digest}"'.encode())
    if before == b"{" or not before.endswith(b","):
        after = after.removeprefix(b",")
    else:
        before = before[:-1]
    hashed = hashlib.sha256(before)
    hashed.update(after.removesuffix(b"\n"))
    return bool(seal) and hashed.hexdigest() == digest


def is_sealed(data: bytes) -> bool:
    """True if bytes are a record as `seal` wrote it, whatever it says."""
    try:
        unseal(data, "record")
    except StoreError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Difference:
    """A value in which two JSON objects differ; printed as one line."""

    name: str
    """Dotted name of the value."""
    stored: JSON
    """The first object's value; None also where it has none."""
    wanted: JSON
    """The second object's value; None also where it has none."""
    absent: Literal["stored", "wanted"] | None = None
    """The side without such an entry."""
    more: str = ""
    """Instead of the values: the number of further differences in a list."""

    def __str__(self) -> str:
        return self.line()

    def line(self, first: str = "store", second: str = "wanted", *, verb: str = "") -> str:
        """Describe the difference in one line, with names for the two sides; `verb` precedes the second value."""
        if self.more:
            return f"{self.name}: {self.more}"
        left = "no such entry" if self.absent == "stored" else short_json(self.stored)
        right = "has no such entry" if self.absent == "wanted" else f"{verb}{short_json(self.wanted)}"
        return f"{self.name}: {first} has {left}, {second} {right}"


def differences(store: Mapping[str, JSON], wanted: Mapping[str, JSON]) -> list[Difference]:
    """The values in which two JSON objects differ, by dotted name."""
    return list(_object_differences(_objects(store), _objects(wanted), ""))


def _objects(value: Mapping[str, JSON]) -> Mapping[str, JSON]:
    plain = plain_json(value, "value")
    assert isinstance(plain, dict)
    return plain


def _object_differences(store: Mapping[str, JSON], wanted: Mapping[str, JSON], prefix: str) -> Iterator[Difference]:
    for key in sorted(store.keys() | wanted.keys()):
        name = f"{prefix}{key}"
        if key not in wanted:
            yield Difference(name, store[key], None, absent="wanted")
        elif key not in store:
            yield Difference(name, None, wanted[key], absent="stored")
        else:
            yield from _value_differences(store[key], wanted[key], name)


def _value_differences(store: JSON, wanted: JSON, name: str) -> Iterator[Difference]:
    # Texts are compared, not values: 1, 1.0 and true are equal in Python and shape different bytes.
    if canonical_json(store) == canonical_json(wanted):
        return
    if isinstance(store, dict) and isinstance(wanted, dict):
        yield from _object_differences(store, wanted, f"{name}.")
    elif isinstance(store, list) and isinstance(wanted, list) and len(store) == len(wanted):
        yield from _list_differences(store, wanted, name)
    else:
        yield Difference(name, store, wanted)


def _list_differences(store: list[JSON], wanted: list[JSON], name: str) -> Iterator[Difference]:
    found = [
        one
        for place, (old, new) in enumerate(zip(store, wanted, strict=True))
        for one in _value_differences(old, new, f"{name}[{place}]")
    ]
    yield from found[:_LISTED]
    if len(found) > _LISTED:
        more = f"{len(found) - _LISTED} more differences in this list of {len(store)}"
        yield Difference(name, None, None, more=more)


def short_json(value: JSON) -> str:
    """Canonical JSON for messages: the middle of a long one is left out."""
    text = canonical_json(value)
    if len(text) <= _SHOWN:
        return text
    size = f"{len(value)} items" if isinstance(value, list | dict) else f"{len(text)} characters"
    return f"{text[: _SHOWN // 2]}…{text[-_SHOWN // 4 :]} ({size})"
