"""Base and novel classes of an annotation file."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ezsd.errors import VocabularyError
from ezsd.pipeline.data.toml_files import read_toml
from ezsd.pipeline.errors import ArgumentError
from ezsd.vocabulary import COCO_SPLIT, Split, first_few, nearest, resolve, spelt_as

log = logging.getLogger("ezsd")

NAMED = 5
"""Most names in one line of what cannot be measured."""


def chosen_split(
    names: Sequence[str],
    frequency: dict[str, str],
    *,
    where: Path,
    base: Sequence[str] | None,
    novel: Sequence[str] | None,
    split_file: Path | None,
) -> Split:
    """Choose the base and novel classes of an annotation file.

    Without a choice, LVIS's rare classes are novel, and COCO's 48 and 17 are taken where the file has them all.

    Args:
        names: all classes of the file.
        frequency: LVIS's letters by name; empty for other files.
        where: the file, for errors.
        base: names, see `class_names`; alone, all other classes are novel.
        novel: names; alone, all other classes are base.
        split_file: TOML with lists `base` and `novel`, at the top or in [classes].

    Raises:
        ArgumentError: a choice is made twice, or none and the file suggests none.
        VocabularyError: a base name is not in the file, a name occurs twice or is empty.
    """
    if split_file is not None:
        if base is not None or novel is not None:
            raise ArgumentError(
                "`split_file` already says which classes are base and novel; leave `base` and `novel` out"
            )
        return _known(_read_split(split_file), names)
    if base is not None or novel is not None:
        first = None if base is None else spelt_as(base, names)
        second = None if novel is None else spelt_as(novel, names)
        return _known(
            Split(
                base=_others(names, second) if first is None else first,
                novel=_others(names, first) if second is None else second,
            ),
            names,
        )
    if frequency:
        return frequency_split({name: frequency[name] for name in names})
    if set(COCO_SPLIT.names) <= set(names):
        return COCO_SPLIT
    raise ArgumentError(f"{where}: which of its {len(names)} classes are novel? Give `novel`, `base` or `split_file`")


def named_split(names: Sequence[str], *, where: Path, base: Sequence[str] | None, novel: Sequence[str] | None) -> Split:
    """Choose the base and novel classes as `chosen_split` does; without a choice all are base classes.

    A warning names the novel classes that the file lacks: a misspelt one leaves the class that was meant a base class.

    Raises:
        VocabularyError: as `chosen_split`, and a novel name that differs from a class of the file by case alone.
    """
    if base is None and novel is None:
        return Split(base=tuple(names), novel=())
    split = chosen_split(names, {}, where=where, base=base, novel=novel, split_file=None)
    known = set(names)
    absent = [name for name in split.novel if name not in known]
    by_case = {name.casefold(): name for name in names}
    for name in absent:
        if name.casefold() in by_case:
            other = by_case[name.casefold()]
            raise VocabularyError(f"{where}: has no class {name!r}, but {other!r}; spell the novel name as it does")
    if absent:
        log.warning("%s: %s", where, no_ground_truth(absent, names))
    return split


def frequency_split(frequency: Mapping[str, str], base: str = "fc") -> Split:
    """LVIS's split: names of the letters in `base` are base ones, the others novel; both in alphabetical order.

    Args:
        frequency: LVIS's "r", "c" or "f" by name.
        base: some of the letters.
    """
    return Split(
        base=tuple(sorted(name for name, letter in frequency.items() if letter in base)),
        novel=tuple(sorted(name for name, letter in frequency.items() if letter not in base)),
    )


def is_names(value: object) -> bool:
    """Test whether a value of a TOML file is a list of texts."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _others(names: Sequence[str], chosen: Sequence[str] | None) -> tuple[str, ...]:
    assert chosen is not None
    return tuple(name for name in names if name not in chosen)


def _known(split: Split, names: Sequence[str]) -> Split:
    """Spell the names of a split as the file spells them; the file may lack novel ones."""
    resolve(split.base, names)
    return Split(base=spelt_as(split.base, names), novel=spelt_as(split.novel, names))


def _read_split(path: Path) -> Split:
    try:
        document = read_toml(path)
    except OSError as error:
        raise ArgumentError(f"`split_file={path}`: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ArgumentError(f"`split_file={path}`: is not valid TOML: {error}") from error
    table = document.get("classes", document)
    lists = [table.get(part) if isinstance(table, dict) else None for part in ("base", "novel")]
    for part, found in zip(("base", "novel"), lists, strict=True):
        if not is_names(found):
            raise ArgumentError(f"`split_file={path}`: {part}: expected a list of names, found {found!r}")
    return Split(base=tuple(lists[0]), novel=tuple(lists[1]))  # type: ignore[arg-type]


def no_ground_truth(absent: Iterable[str], offered: Iterable[str]) -> str:
    """Describe the names that the class table of an annotation file lacks, in one line.

    Args:
        absent: the names.
        offered: names of the class table, near ones of which are offered.
    """
    table = list(offered)
    near = {name: nearest(name, [other for other in table if other != name]) for name in absent}
    hints = [f"{name!r}" + (f" (did you mean {other!r}?)" if other else "") for name, other in near.items()]
    return f"no entry in categories named {first_few(hints, NAMED)}: without ground truth, figures of it are '-'"
