"""Class names: the split into base and novel classes, prompts, and the lookup of a name's position.

A class is identified by its name. A class index is a position in a table of names that is kept together with the index
(in a store, a checkpoint, `Split.names`); dataset ids and file order mean nothing. Names are compared exactly, except
for their Unicode form, and an unknown name is an error that suggests the nearest one.
"""

import csv
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from ezsd.errors import VocabularyError


def canonical(name: str) -> str:
    """The form in which class names and file names are compared: Unicode's NFC.

    "é" is one character or two, which look the same; tools and file systems write either. A name is only compared in
    this form: stores, runs and prompts keep the spelling they were given.
    """
    return unicodedata.normalize("NFC", name)


def is_writable(name: str) -> bool:
    """Return whether a text can be encoded as UTF-8; a lone surrogate, which JSON may contain, cannot."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Split of the classes into base classes, with training boxes, and novel classes, with only a name.

    Raises:
        VocabularyError: no base class, an empty name, or a name that occurs twice.
    """

    base: tuple[str, ...]
    """Classes with training boxes; their indices are 0 .. len(base) - 1."""
    novel: tuple[str, ...]
    """Classes without any training box; their indices follow. May be empty."""

    def __post_init__(self) -> None:
        _refuse_untyped("base", self.base)
        _refuse_untyped("novel", self.novel)
        if not self.base:
            raise VocabularyError("a split needs at least one base class, got none")
        base = {canonical(name) for name in self.base}
        both = sorted(name for name in self.novel if canonical(name) in base)
        if both:
            raise VocabularyError(f"class {both[0]!r} is base and novel at once; it must be one of them")
        _positions(self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """All names, base then novel: the one order of classes, (C,)."""
        return self.base + self.novel

    def index(self, name: str) -> int:
        """Position of `name` in `names`.

        Raises:
            VocabularyError: the name is in neither part of the split.
        """
        return resolve([name], self.names)[0]


def spelt_as(names: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    """Names spelt as in a table where it has them in another Unicode form; others in the form of `canonical`."""
    table = {canonical(name): name for name in known}
    return tuple(table.get(canonical(name), canonical(name)) for name in names)


def prompts(names: Sequence[str], template: str = "a photo of a {}") -> tuple[str, ...]:
    """Put every class name into the template.

    Args:
        names: class names, (C,).
        template: a text with one pair of braces where the name goes.

    Returns:
        The prompts, (C,), in the order of `names`.

    Raises:
        VocabularyError: the template does not have exactly one `{}`.
    """
    if template.count("{}") != 1:
        raise VocabularyError(f"a prompt template needs '{{}}' once, where the name goes; got {template!r}")
    # Not str.format: braces elsewhere in a template or a name are ordinary characters.
    return tuple(template.replace("{}", name) for name in names)


IMAGENET_TEMPLATES = "imagenet"
"""Word that stands for CLIP's 80 templates for ImageNet where a template is expected."""


def templates(template: str | Sequence[str]) -> tuple[str, ...]:
    """One template or several as a tuple; CLIP's for ImageNet by `IMAGENET_TEMPLATES`."""
    if template == IMAGENET_TEMPLATES:
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        return tuple(phrase("{}") for phrase in OPENAI_IMAGENET_TEMPLATES)
    return texts(template)


def texts(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """One text or several as a tuple; empty for None."""
    return (value,) if isinstance(value, str) else tuple(value or ())


def clean_names(names: Sequence[str]) -> tuple[str, ...]:
    """Convert class names to their spoken form: underscores become blanks, a remark in parentheses is removed.

    A remark that tells two names of LVIS apart is kept, for example "bow (weapon)"; the misspelt remark of its speaker
    is removed like any other. Each name is cleaned independently of the others.

    Args:
        names: class names, (C,).

    Returns:
        The words, (C,), all different.

    Raises:
        VocabularyError: two of the names would become the same words.
    """
    words = tuple(_clean(name) for name in names)
    first: dict[str, str] = {}
    for name, spoken in zip(names, words, strict=True):
        if first.setdefault(spoken, name) != name:
            raise VocabularyError(
                f"classes {first[spoken]!r} and {name!r} are both said {spoken!r}; rename one, or use the names as "
                f'they are (names = "raw")'
            )
    return words


def _clean(name: str) -> str:
    kept = name if name in _REMARK_DECIDES else re.sub(r"\([^)]*\)", " ", name)
    # A name that is nothing but a remark stays as it is.
    return " ".join(kept.replace("_", " ").split()) or name


def resolve(names: Iterable[str], known: Sequence[str]) -> tuple[int, ...]:
    """Look up the positions of names in a table.

    Args:
        names: the wanted names, in the wanted order.
        known: the table, (C,), without doubles.

    Returns:
        For each wanted name its position in `known`.

    Raises:
        VocabularyError: a name is unknown (the message offers the nearest), or occurs twice in
            `names` or in `known`.
    """
    table = _positions(known)
    wanted = _positions(names)
    for key, (_, name) in wanted.items():
        if key not in table:
            raise VocabularyError(f"unknown class {name!r}; {suggest(name, known)}")
    return tuple(table[key][0] for key in wanted)


def parse_classes(text: str) -> tuple[str, ...]:
    """Read a comma-separated list of names: one record of CSV.

    Args:
        text: for example 'dog, traffic light, "tench, Tinca tinca"'. Blanks around a name are ignored. Double quotes
            around a whole name, up to the next comma, make its commas part of the name; within such a name, two double
            quotes stand for one.

    Returns:
        The names in the order given, in the form of `canonical`, at least one.

    Raises:
        VocabularyError: a name is empty, occurs twice or holds a control character; quotes that do not enclose a whole
            name; one name with a semicolon where commas were meant.
    """
    require_characters(text)
    try:
        (parts,) = csv.reader([text], skipinitialspace=True, strict=True) if text.strip() else ([""],)
    except csv.Error as error:
        raise VocabularyError(
            f"{text!r}: double quotes must enclose a whole name, as in '\"tench, Tinca tinca\",square' ({error})"
        ) from None
    names = tuple(canonical(part.strip()) for part in parts)
    if not all(names):
        raise VocabularyError(f"expected class names with a comma between them, found an empty name in {text!r}")
    if len(names) == 1 and ";" in text and '"' not in text:
        raise VocabularyError(
            f"{text!r} is one name with a semicolon; put commas between names, or double quotes around this one"
        )
    require_different(names)
    return names


def require_characters(text: str) -> None:
    """Raise VocabularyError if a class name contains a line break, another control character or invalid Unicode."""
    for character in text:
        kind = unicodedata.category(character)
        if kind in _NO_NAME:
            what = "a line break" if character in _LINE_BREAKS else _NO_NAME[kind]
            raise VocabularyError(f"expected class names, found {what} ({character!a}) in {text!r}")


def require_different(names: Iterable[str]) -> None:
    """Raise VocabularyError if a class name is empty or occurs twice, even in two Unicode forms."""
    _positions(names)


def nearest(name: str, known: Sequence[str]) -> str | None:
    """Find the name in a table that is most similar to a misspelt one; None if none is similar."""
    # Upper case is the commonest slip, and costs a short name most of its similarity.
    by_lower = {other.lower(): other for other in known}
    near = get_close_matches(name.lower(), list(by_lower), n=1)
    return by_lower[near[0]] if near else None


def suggest(name: str, known: Sequence[str]) -> str:
    """Suggest a name from the table for an unknown one, as the second half of an error message.

    Args:
        name: a name that is not in `known`.
        known: the table, (C,).

    Returns:
        A question with the nearest name, or the beginning of the table if none is near.
    """
    near = nearest(name, known)
    if near is not None:
        return f"did you mean {near!r}?"
    return f"known are {first_few([repr(other) for other in known], 5)}"


def first_few(words: Sequence[str], most: int) -> str:
    """Join the first of many words, with the number of the remaining ones.

    Args:
        words: words in the form to show.
        most: largest number of words to show.
    """
    rest = len(words) - most
    return ", ".join(words[:most]) + (f" and {rest} more" if rest > 0 else "")


def _positions(names: Iterable[str]) -> dict[str, tuple[int, str]]:
    """Position and spelling of each name, by its canonical form; a double or an empty name is an error."""
    table: dict[str, tuple[int, str]] = {}
    for position, name in enumerate(names):
        if not name.strip():
            raise VocabularyError(f"the class name at position {position} is empty")
        if not is_writable(name):
            raise VocabularyError(f"class {name!r} holds half a character (a lone surrogate); rename it")
        first, spelling = table.setdefault(canonical(name), (position, name))
        if first != position:
            forms = "" if spelling == name else " in two Unicode forms"
            raise VocabularyError(f"class {name!r} occurs twice{forms}, at positions {first} and {position}")
    return table


_LINE_BREAKS = "\n\r\v\f\x85\u2028\u2029"
_NO_NAME = {
    "Cc": "a control character",
    "Cs": "a byte that is not UTF-8",
    "Zl": "a line break",
    "Zp": "a line break",
}
"""Unicode categories whose characters are not allowed in class names."""


def _refuse_untyped(part: str, names: object) -> None:
    """Refuse a text or a list instead of a tuple of names: a text would be split into letters."""
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        raise VocabularyError(f"{part} must be a tuple of texts, got {names!r}")


# The 48 / 17 zero-shot split of COCO, each part in the order of COCO's category ids. The 15
# remaining classes of COCO are in neither part: never supervised, never evaluated.
COCO_SPLIT = Split(
    base=parse_classes(
        "person, bicycle, car, motorcycle, train, truck, boat, bench, bird, horse, sheep, bear, zebra, giraffe, "
        "backpack, handbag, suitcase, frisbee, skis, kite, surfboard, bottle, fork, spoon, bowl, banana, apple, "
        "sandwich, orange, broccoli, carrot, pizza, donut, chair, bed, toilet, tv, laptop, mouse, remote, microwave, "
        "oven, toaster, refrigerator, book, clock, vase, toothbrush"
    ),
    novel=parse_classes(
        "airplane, bus, cat, dog, cow, elephant, umbrella, tie, snowboard, skateboard, cup, knife, cake, couch, "
        "keyboard, sink, scissors"
    ),
)

# The names of LVIS v1 that differ from another in nothing but the remark.
_REMARK_DECIDES = frozenset(
    {
        "bow_(weapon)",
        "bow_(decorative_ribbons)",
        "fish_(food)",
        "octopus_(food)",
        "octopus_(animal)",
        "pan_(for_cooking)",
        "pan_(metal_container)",
        "salmon_(fish)",
        "salmon_(food)",
    }
)
