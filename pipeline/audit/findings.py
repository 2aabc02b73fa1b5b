"""Findings of an audit and the verdict that follows from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ezsd.errors import quantity

Level: TypeAlias = Literal["ok", "note", "unproven", "violation"]
Setting: TypeAlias = Literal["zad", "ovd-strict"]
Verdict: TypeAlias = Literal["passed", "not proven", "violation"]
NAMED = 100
"""Most boxes that a finding names; it counts all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedBox:
    """A box that an audit names."""

    annotation_id: int | None
    """Id that the store has for it; None for a region, which has none."""
    image_id: int
    image: str
    """File name of the image; empty where the annotation file has no such image."""
    stored_class: str | None
    """Class name that the store has for it; None for a region."""
    reason: str
    """Fault, in words."""
    novel: dict[str, Any] | None = None
    """`annotation_id`, `class` and `iou` of the novel annotation that it is, or lies on; None for none."""

    def __str__(self) -> str:
        what = "region" if self.annotation_id is None else f"annotation {self.annotation_id}"
        stored = "" if self.stored_class is None else f", stored as {self.stored_class!r}"
        where = f"image {self.image_id}" + (f" ({self.image})" if self.image else "")
        text = f"{what} in {where}{stored}: {self.reason}"
        if self.novel is None or self.novel["annotation_id"] == self.annotation_id:
            return text
        over = f"annotation {self.novel['annotation_id']} of novel class {self.novel['class']!r}"
        return f"{text}; it lies on {over} (IoU {self.novel['iou']:.2f})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    subject: str
    text: str
    boxes: int | None = None
    """Number of boxes that entered a stage; None where none did, or nobody knows."""
    digest: str | None = None
    """Sha256 of their ids, classes and boxes, as recorded."""
    named: tuple[NamedBox, ...] = ()
    """Boxes that are wrong, or worth a look; the first `NAMED`."""


def verdict(findings: Sequence[Finding]) -> Verdict:
    """Verdict of all findings: a violation is one, and what is not proven is not passed."""
    levels = {finding.level for finding in findings}
    if "violation" in levels:
        return "violation"
    return "not proven" if "unproven" in levels else "passed"


def summary(findings: Sequence[Finding]) -> str:
    """The verdict, with the numbers of findings that are not ok."""
    counted = [(level, sum(one.level == level for one in findings)) for level in ("violation", "unproven", "note")]
    words = [quantity(count, level, level if level == "unproven" else None) for level, count in counted if count]
    return f"{verdict(findings)}{': ' if words else ''}{', '.join(words)}"


def as_table(finding: Finding) -> dict[str, Any]:
    """A finding as JSON has it."""
    return dataclasses.asdict(finding)
