"""Text of a dataset's TOML file, which `ezsd.pipeline.data.datasets` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ezsd.vocabulary import Split


class Places(NamedTuple):
    """Images and annotations of a part, below the dataset's folder."""

    images: str
    annotations: str


def dataset_toml(name: str, parts: Mapping[str, Places], split: Split) -> str:
    """A dataset of "train" and, where there is one, "val"."""
    lines = [f"name = {_text(name)}"]
    for part, places in parts.items():
        lines += ["", f"[{part}]", f"images = {_text(places.images)}", f"annotations = {_text(places.annotations)}"]
    return "\n".join([*lines, "", "[classes]", f"base = {_list(split.base)}", f"novel = {_list(split.novel)}", ""])


def _list(names: Sequence[str]) -> str:
    return f"[{', '.join(map(_text, names))}]"


def _text(text: str) -> str:
    """A text as TOML has it: as JSON, but for pairs of surrogates and a control character that JSON lets stand."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
