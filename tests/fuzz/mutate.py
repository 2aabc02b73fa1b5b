"""Mutations of files by their structure: what a bytewise change of a valid file hardly ever comes to.

Everything follows from the `random.Random` that is given, so an input can be made again from its number.
"""

import json
import random
import re
import struct
import tomllib
import zlib
from collections.abc import Callable, Sequence

Chance = random.Random

NUMBERS = (
    *(
        0,
        -1,
        1,
        2,
        7,
        127,
        255,
        256,
        65535,
        2**24,
        2**31 - 1,
        2**31,
        2**32,
        2**53 + 1,
        2**62,
        2**63 - 1,
        2**63,
        -(2**63),
    ),
    *(
        2**64,
        2**70,
        -(2**70),
        10**400,
        0.5,
        -0.0,
        1e-320,
        1e15,
        1e308,
        -1e308,
        float("nan"),
        float("inf"),
        -float("inf"),
    ),
)
TEXTS = (
    *("", " ", "x", "0", "-1", "1e999", "null", "\0", "a\0b", "a\nb", "\r", "\x1b[31m", "\u2028", "\ufeff", "\ud800"),
    *(
        "é",
        "e\u0301",
        "ﬁ",
        "\U0001f984",
        "../outside/secret",
        "../../etc/passwd",
        "/etc/passwd",
        "/dev/zero",
        "..",
        ".",
    ),
    *("a\\..\\b", "C:\\x", "C:x", "//host/x", "a//b", "./a", "~/.bashrc", "$HOME", "file:///etc/passwd", "s3://x/y"),
    *(
        ".",
        "/dev/zero",
        "%s%n",
        "{}",
        "{0.__class__}",
        "<script>",
        "&amp;",
        "'\"",
        "-",
        "--",
        "con",
        "a" * 300,
        "b" * 5000,
        "{" * 300,
    ),
    *("plugin:ezsd_no_such:thing", "plugin:a", "NaN", "Infinity", "true", "a/" * 200, "*", "[", "a.tar", "a.tar/../x"),
)
PARTS = (b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\r", b"\n", b"\x80", b"{", b"[", b'"', b"\\", b"\xed\xa0\x80")


class Pairs(list):
    """Members of an object, which may have a key twice."""


class Raw(str):
    """Text that is written into JSON as it is."""


def text_of(value: object) -> str:
    """Write JSON, with NaN and doubled keys where they are."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(key)}:{text_of(one)}" for key, one in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(text_of, value)) + "]"
    return json.dumps(value)


def odd_value(chance: Chance) -> object:
    """A value that hardly any place of a file expects."""
    return chance.choice(
        (
            lambda: chance.choice(NUMBERS),
            lambda: chance.choice(TEXTS),
            lambda: chance.choice((None, True, False)),
            lambda: chance.choice(([], Pairs(), [[]], [None], [0] * 5, [Pairs()], Pairs([("x", 1)]), ["a", "a"])),
            lambda: Raw("[" * (depth := chance.choice((20, 70, 900, 5000))) + "]" * depth),
            lambda: Raw('{"a":' * (depth := chance.choice((20, 70, 900))) + "1" + "}" * depth),
            lambda: Raw("9" * chance.choice((20, 400, 5000))),
            lambda: Raw(
                chance.choice(("1e5", "1E400", "-0", "0.1e-400", "NaN", "-Infinity", '"\\ud800"', '"\\u0000"'))
            ),
        )
    )()


def _near(value: object, chance: Chance) -> object:
    """A value like this one, and not quite."""
    if isinstance(value, bool):
        return chance.choice((not value, int(value), str(value)))
    if isinstance(value, int | float):
        # Of some numbers there is no float, and of others no whole number.
        ways: tuple[Callable[[], object], ...] = (
            lambda: value + chance.choice((-1, 1)),
            lambda: -value,
            lambda: str(value),
            lambda: [value],
            lambda: value * chance.choice((2, 10, 1000)),
            lambda: float(value) + 0.5,
            lambda: value * 2**32,
        )
        try:
            return chance.choice(ways)()
        except OverflowError:
            return str(value)
    if isinstance(value, str):
        at = chance.randrange(len(value) + 1)
        other = chance.choice(TEXTS)
        return chance.choice((value[:at] + other + value[at:], value[:at], value * 2, value.upper(), [value], Pairs()))
    return odd_value(chance)


def _places(value: object, found: list[tuple[list, int]]) -> list[tuple[list, int]]:
    """The way to everything in a value: the list it stands in and its position there."""
    if isinstance(value, list):
        for position in range(len(value)):
            found.append((value, position))
            item = value[position]
            _places(item[1] if isinstance(value, Pairs) else item, found)
    return found


def change_value(root: object, chance: Chance) -> object:
    """Change up to four places of a parsed document."""
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        places = _places(root, [])
        if not places or chance.random() < 0.02:
            root = odd_value(chance)
            continue
        holder, at = chance.choice(places)
        key = holder[at][0] if isinstance(holder, Pairs) else None
        value = holder[at][1] if isinstance(holder, Pairs) else holder[at]
        way = chance.randrange(9)
        if way == 0:
            del holder[at]
        elif way == 1:
            holder.insert(chance.randrange(len(holder) + 1), holder[at])
        elif way == 2 and key is not None:
            holder[at] = (chance.choice((*TEXTS, key + " ", key.upper())), value)
        elif way == 3:
            other, place = chance.choice(places)
            if place < len(other):
                found = other[place][1] if isinstance(other, Pairs) else other[place]
                # By its text: a value must not come to hold itself.
                found = Raw(text_of(found))
                holder[at] = found if key is None else (key, found)
        elif way == 4 and key is not None:
            holder.append((key, odd_value(chance)))
        elif way == 5 and not isinstance(holder, Pairs):
            holder *= chance.choice((0, 2, 3))
        else:
            new = _near(value, chance) if way < 8 else odd_value(chance)
            holder[at] = new if key is None else (key, new)
    return root


def parsed(data: bytes) -> object:
    """JSON with objects as `Pairs`. ValueError or RecursionError for what is none."""
    return json.loads(data.decode(), object_pairs_hook=Pairs)


def change_json(data: bytes, chance: Chance) -> bytes:
    """Change a JSON document by its values, or by its text."""
    if chance.random() < 0.12:
        return change_bytes(data, chance)
    try:
        root = parsed(data)
        text = text_of(change_value(root, chance))
    except (ValueError, RecursionError):
        return change_bytes(data, chance)
    if chance.random() < 0.05:
        return chance.choice((b"\xef\xbb\xbf" + text.encode(), text.encode("utf-16"), text.encode() + b" {}", b""))
    return text.encode("utf-8", "surrogatepass")


def change_toml(data: bytes, chance: Chance) -> bytes:
    """Change a TOML document by its values, or by its text."""
    if chance.random() < 0.3:
        return change_text(data, chance)
    try:
        root = change_value(_pairs(tomllib.loads(data.decode())), chance)
    except (ValueError, RecursionError):
        return change_text(data, chance)
    if not isinstance(root, Pairs):
        return text_of(root).encode("utf-8", "surrogatepass")
    lines = [f"{_toml_key(key)} = {_toml(value)}" for key, value in root]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _pairs(value: object) -> object:
    if isinstance(value, dict):
        return Pairs((key, _pairs(one)) for key, one in value.items())
    return [_pairs(one) for one in value] if isinstance(value, list) else value


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[\w-]+", key, re.ASCII) else json.dumps(key)


def _toml(value: object) -> str:
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{_toml_key(key)} = {_toml(one)}" for key, one in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, float):
        return {"NaN": "nan", "Infinity": "inf", "-Infinity": "-inf"}.get(json.dumps(value), repr(value))
    return text_of(value)


def change_text(data: bytes, chance: Chance) -> bytes:
    """Change lines and words of a text."""
    if chance.random() < 0.15:
        return change_bytes(data, chance)
    lines = data.decode("utf-8", "surrogateescape").split("\n")
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.randrange(len(lines))
        way = chance.randrange(7)
        if way == 0 and len(lines) > 1:
            del lines[at]
        elif way == 1:
            lines.insert(at, lines[chance.randrange(len(lines))])
        elif way == 2:
            lines[at] = str(chance.choice((*TEXTS, *NUMBERS)))
        else:
            words = re.split(r"([\s<>=,:\"']+)", lines[at])
            place = chance.randrange(len(words))
            value = chance.choice((*TEXTS, *NUMBERS))
            if way == 3:
                words[place] += str(value)
            else:
                words[place] = str(value) if way < 6 else words[place] * 50
            lines[at] = "".join(words)
    return "\n".join(lines).encode("utf-8", "surrogatepass" if chance.random() < 0.3 else "replace")


XML = (
    '<!DOCTYPE a [<!ENTITY e "x"><!ENTITY f "&e;&e;">]>',
    '<!DOCTYPE a SYSTEM "file:///etc/passwd">',
    '<?xml version="1.0" encoding="utf-16"?>',
    '<?xml version="1.0" encoding="utf-7"?>',
    '<?xml version="1.0" encoding="idna"?>',
    '<?xml version="1.0" encoding="zlib"?>',
    '<?xml version="1.0" encoding="unicode_escape"?>',
    '<?xml version="1.1"?>',
    "<a>" * 3000,
    "<object>" * 200,
    "<![CDATA[x]]>",
    "&#0;",
    "&#x110000;",
    "&e;",
    "<!--",
    '<a xmlns="x">',
)


def change_xml(data: bytes, chance: Chance) -> bytes:
    """Change elements of an XML document, or its text."""
    text = data.decode("utf-8", "surrogateescape")
    tags = [one.span() for one in re.finditer(r"<[^>]+>", text)]
    way = chance.randrange(8)
    if way < 2 and tags:
        start, stop = chance.choice(tags)
        text = text[:start] + chance.choice(("", text[start:stop] * 2, *XML)) + text[stop:]
    elif way == 2:
        text = chance.choice(XML) + text
    elif way < 5 and len(tags) > 1:
        at = chance.randrange(len(tags) - 1)
        inner = str(chance.choice((*TEXTS, *NUMBERS, *XML)))
        text = text[: tags[at][1]] + inner + text[tags[at + 1][0] :]
    else:
        return change_text(data, chance)
    return text.encode("utf-8", "surrogatepass")


def change_bytes(data: bytes, chance: Chance) -> bytes:
    """Change bits, numbers and pieces of bytes."""
    found = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 8))):
        at = chance.randrange(len(found) + 1)
        way = chance.randrange(8)
        if way == 0 and found:
            found[at - 1] ^= 1 << chance.randrange(8)
        elif way == 1 and found:
            found[at - 1] = chance.randrange(256)
        elif way == 2:
            found[at:at] = chance.choice(PARTS) * chance.choice((1, 1, 4))
        elif way == 3:
            del found[at : at + chance.choice((1, 2, 8, len(found)))]
        elif way == 4:
            size = chance.choice((1, 4, 16, 64))
            found[at:at] = found[at : at + size]
        elif way == 5:
            width = chance.choice((1, 2, 4, 8))
            number = chance.choice([n for n in NUMBERS if isinstance(n, int)]) % 256**width
            found[at : at + width] = number.to_bytes(width, chance.choice(("little", "big")))
        elif way == 6:
            other = chance.randrange(len(found) + 1)
            found[at : at + 16] = found[other : other + 16]
        else:
            found += bytes(chance.choice((1, 7, 4096)))
    return bytes(found)


PNG = b"\x89PNG\r\n\x1a\n"


def change_image(data: bytes, chance: Chance) -> bytes:
    """Change the chunks of a PNG or the segments of a JPEG, or bytes of any image."""
    if data.startswith(PNG) and chance.random() < 0.8:
        return _change_png(data, chance)
    if data.startswith(b"\xff\xd8") and chance.random() < 0.6:
        return _change_jpeg(data, chance)
    # The head decides what is made of the rest.
    head = chance.choice((16, 64, 256, len(data)))
    return change_bytes(data[:head], chance) + data[head:]


def _change_png(data: bytes, chance: Chance) -> bytes:
    chunks, at = [], len(PNG)
    while at + 8 <= len(data):
        (size,) = struct.unpack_from(">I", data, at)
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    if not chunks:
        return change_bytes(data, chance)
    at = chance.randrange(len(chunks))
    name, body = chunks[at]
    way = chance.randrange(7)
    if way < 2 and len(chunks[0][1]) == 13:
        width, height, depth, kind, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
        large = chance.choice((0, 1, 3, 13_000, 20_000, 46_340, 65_536, 2**31 - 1, 2**32 - 1))
        width, height = chance.choice(((large, height), (width, large), (large, large), (width, height)))
        depth, kind = chance.choice(((depth, kind), (chance.choice((0, 1, 2, 4, 8, 16, 32)), chance.randrange(8))))
        rest[2] ^= chance.randrange(2)
        chunks[0] = chunks[0][0], struct.pack(">IIBBBBB", width, height, depth, kind, *rest)
    elif way == 2:
        chunks.insert(at, chance.choice(chunks))
    elif way == 3:
        del chunks[at]
    elif way == 4:
        bomb = zlib.compress(bytes(chance.choice((10, 10**5, 10**7))))
        extra = chance.choice(
            (
                (b"zTXt", b"a\0\0" + bomb),
                (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + bomb),
                (b"iCCP", b"a\0\0" + bomb),
                (b"eXIf", change_bytes(b"MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0", chance)),
                (b"tRNS", bytes(chance.choice((0, 1, 2, 6, 256, 1000)))),
                (b"PLTE", bytes(chance.choice((0, 1, 3, 768, 3000)))),
                (b"acTL", struct.pack(">II", chance.choice((0, 1, 2**32 - 1)), 0)),
                (b"fcTL", bytes(26)),
                (b"gAMA", b"\0"),
                (b"pHYs", b""),
            )
        )
        chunks.insert(min(at, 1), extra) if chance.random() < 0.7 else chunks.append(extra)
    elif name == b"IDAT" and way == 5:
        chunks[at] = name, zlib.compress(bytes(chance.choice((0, 1, 100, 10**6))))
    else:
        chunks[at] = name, change_bytes(body, chance)
    packed = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    return PNG + b"".join(packed)


def _change_jpeg(data: bytes, chance: Chance) -> bytes:
    segments, at = [], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        size = struct.unpack_from(">H", data, at + 2)[0]
        segments.append((data[at + 1], data[at + 4 : at + 2 + size]))
        at += 2 + size
    rest = data[at:]
    if not segments:
        return change_bytes(data, chance)
    at = chance.randrange(len(segments))
    kind, body = segments[at]
    way = chance.randrange(6)
    if way == 0:
        for place, (name, head) in enumerate(segments):
            if name in (0xC0, 0xC1, 0xC2) and len(head) > 5:
                sides = struct.pack(">HH", *(chance.choice((0, 1, 9, 13_000, 65_500)) for _ in range(2)))
                segments[place] = name, head[:1] + sides + head[5:]
    elif way == 1:
        segments.insert(at, chance.choice(segments))
    elif way == 2:
        del segments[at]
    elif way == 3:
        extra = change_bytes(b"Exif\0\0MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0", chance)
        segments.insert(0, (0xE1, extra))
    elif way == 4:
        segments.insert(0, (chance.choice((0xE2, 0xED, 0xEE, 0xFE)), chance.choice(PARTS) * chance.choice((1, 50))))
    else:
        segments[at] = kind, change_bytes(body, chance)
    packed = (bytes((0xFF, name)) + struct.pack(">H", min(len(body) + 2, 65535)) + body for name, body in segments)
    return b"\xff\xd8" + b"".join(packed) + rest


def change_safetensors(data: bytes, chance: Chance) -> bytes:
    """Change the head of a safetensors file, with a length that fits it, or its bytes."""
    if chance.random() < 0.25 or len(data) < 8:
        return change_bytes(data, chance)
    (size,) = struct.unpack_from("<Q", data)
    head = change_json(data[8 : 8 + size], chance)
    return struct.pack("<Q", len(head)) + head + data[8 + size :]


CHANGES: dict[str, Callable[[bytes, Chance], bytes]] = {
    ".json": change_json,
    ".jsonl": change_text,
    ".toml": change_toml,
    ".xml": change_xml,
    ".txt": change_text,
    ".names": change_text,
    ".yaml": change_text,
    ".csv": change_text,
    ".png": change_image,
    ".jpg": change_image,
    ".safetensors": change_safetensors,
}


def change_file(name: str, data: bytes, chance: Chance) -> bytes:
    """Change a file by its structure, which its name tells."""
    ending = name[name.rfind(".") :] if "." in name.rpartition("/")[2] else ""
    change = CHANGES.get(ending, change_bytes)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        data = change(data, chance)
    return data


# An input of a target: one line "WAY NAME", and the content of the file NAME

WAYS = ("as", "fit", "link", "gone")
"""The file as it is; with every digest of it fitting; a symbolic link to the content's path; removed."""


def packed(way: str, name: str, content: bytes) -> bytes:
    """An input."""
    return f"{way} {name}\n".encode() + content


def unpacked(data: bytes, names: Sequence[str]) -> tuple[str, str, bytes]:
    """Way, name and content of any bytes: a word that is none stands for one all the same."""
    head, _, content = data.partition(b"\n")
    word, _, name = head.decode("utf-8", "replace").partition(" ")
    way = word if word in WAYS else WAYS[zlib.crc32(word.encode()) % len(WAYS)]
    return way, name if name in names else names[zlib.crc32(name.encode()) % len(names)], content


def change_input(data: bytes, seeds: dict[str, bytes], ways: Sequence[str], chance: Chance) -> bytes:
    """Change an input: mostly its content, now and then its way or its file."""
    way, name, content = unpacked(data, list(seeds))
    if chance.random() < 0.15:
        name = chance.choice(list(seeds))
        content = seeds[name]
    if chance.random() < 0.1:
        way = chance.choice(ways)
    if way == "link":
        return packed(way, name, chance.choice(("../outside/secret", "/etc/passwd", "loop", ".", "gone")).encode())
    return packed(way if way in ways else ways[0], name, change_file(name, content, chance))
