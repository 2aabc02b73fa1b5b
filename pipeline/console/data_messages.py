"""Arguments and output of `ezsd data`."""

from __future__ import annotations

import re
import shlex

from ezsd.errors import quantity
from ezsd.pipeline.console.options import as_options
from ezsd.pipeline.data.coco_folder import Conversion
from ezsd.pipeline.errors import ArgumentError


def parse_val(text: str) -> float:
    """Number of images for validation, or their fraction below 1; ArgumentError for any other text."""
    percent = re.fullmatch(r"(\d{1,2}(?:\.\d+)?)%", text)
    if percent:
        return _positive(text, float(percent[1]) / 100)
    if re.fullmatch(r"\d{1,12}|0?\.\d+", text):
        return _positive(text, float(text))
    raise _wrong(text)


def _positive(text: str, value: float) -> float:
    if value <= 0:
        raise _wrong(text)
    return value


def _wrong(text: str) -> ArgumentError:
    return ArgumentError(f"--val {text}: expected a number of images, such as 500, or a fraction, such as 0.2 or 20%")


def conversion_lines(made: Conversion, *, copied: bool = False) -> list[str]:
    """Description of a folder that was written: warnings, numbers, datasets.

    Args:
        made: the folder.
        copied: True if the images were copied, False if the folder links to them.
    """
    lines = [f"warning: {as_options(oddity)}" for oddity in made.oddities]
    lines += made.sources
    for part in made.parts:
        crowd = f" (+{part.crowd:,} crowd or difficult)" if part.crowd else ""
        lines.append(f"{part.name}: {quantity(part.images, 'image')}, {quantity(part.boxes, 'box', 'boxes')}{crowd}")
    lines.append(f"{made.out}: complete; the images are {'copied' if copied else 'linked to where they are'}")
    for name, split in made.splits.items():
        lines.append(f"{made.out / name}.toml: {len(split.base)} base and {quantity(len(split.novel), 'novel name')}")
    if any(not split.novel for split in made.splits.values()):
        lines.append("no class is novel yet: name those to find without boxes under novel in that file, then build")
    first = made.out / f"{next(iter(made.splits))}.toml"
    return [*lines, f"next: ezsd data check --dataset {shlex.quote(str(first))}"]
