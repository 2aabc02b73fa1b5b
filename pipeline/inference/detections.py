"""Detections of an image, named, and in the forms of other libraries."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ezsd.data.masks import decode
from ezsd.errors import quantity
from ezsd.pipeline.data.sources import FRAME_DIGITS
from ezsd.pipeline.errors import ArgumentError

if TYPE_CHECKING:
    import fiftyone as fo
    import supervision as sv


@dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """A detected object."""

    name: str
    score: float
    """Confidence in [0, 1]."""
    box: tuple[float, float, float, float]
    """Corners x1, y1, x2, y2 in pixels of the image as it is shown."""
    mask: bytes | None
    """Run lengths of the mask over the image as it is shown; None without masks."""
    competitors: tuple[tuple[str, float], ...] = ()
    """The likeliest other names of its region, with scores of the detector alone; empty unless asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageDetections:
    """Named detections of one image: a sequence of `Detection`, best first."""

    source: str
    """Path or URL of the image; empty for an image in memory."""
    width: int
    """Width of the image as it is shown, pixels."""
    height: int
    """Height of the image as it is shown, pixels."""
    objects: tuple[Detection, ...]
    """Detected objects, best first."""
    classes: tuple[str, ...]
    """Names that were searched, (C,); formats with class numbers count in this order."""
    has_masks: bool = False
    """True if each object has a mask."""
    frame: int | None = None
    """Number of the frame, from 0, of a video or a camera; None of an image."""

    def __len__(self) -> int:
        return len(self.objects)

    def __iter__(self) -> Iterator[Detection]:
        return iter(self.objects)

    def __getitem__(self, position: int) -> Detection:
        return self.objects[position]

    @property
    def label(self) -> str:
        """Name of the image in texts and files: its source, of a frame with "#" and its number."""
        return self.source if self.frame is None else f"{self.source}#{self.frame:0{FRAME_DIGITS}d}"

    @property
    def class_ids(self) -> NDArray[np.int64]:
        """Positions of the objects' names in `classes`, (N,)."""
        number = {name: position for position, name in enumerate(self.classes)}
        return np.array([number[one.name] for one in self.objects], np.int64)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes, (N,)."""
        return tuple(one.name for one in self.objects)

    @property
    def scores(self) -> NDArray[np.float32]:
        """Confidences in [0, 1], (N,)."""
        return np.array([one.score for one in self.objects], np.float32)

    @property
    def boxes(self) -> NDArray[np.float32]:
        """Boxes x1, y1, x2, y2 in pixels of the image as it is shown, (N, 4)."""
        return np.array([one.box for one in self.objects], np.float32).reshape(-1, 4)

    @property
    def masks(self) -> NDArray[np.bool_] | None:
        """Masks over the image as it is shown, (N, H, W); None without masks."""
        if not self.has_masks:
            return None
        masks = np.zeros((len(self.objects), self.height, self.width), np.bool_)
        for position, one in enumerate(self.objects):
            assert one.mask is not None
            masks[position] = decode(one.mask, self.height, self.width)
        return masks

    def _repr_html_(self) -> str:
        """Table of the detections, for notebooks."""
        rows = "".join(
            f"<tr><td>{html.escape(one.name)}</td><td>{one.score:.3f}</td>"
            + "".join(f"<td>{value:.1f}</td>" for value in one.box)
            + "</tr>"
            for one in self.objects
        )
        head = "".join(f"<th>{title}</th>" for title in ("name", "score", "x1", "y1", "x2", "y2"))
        caption = html.escape(
            f"{self.source or 'image'}, {self.width} x {self.height}: {quantity(len(self), 'object')}"
        )
        return f"<table><caption>{caption}</caption><tr>{head}</tr>{rows}</table>"

    def to_supervision(self) -> sv.Detections:
        """Convert to `supervision.Detections`, with names under "class_name"; ArgumentError without supervision."""
        try:
            import supervision
        except ImportError as error:
            raise ArgumentError("supervision is not installed; pip install supervision") from error
        return supervision.Detections(
            xyxy=self.boxes,
            mask=self.masks,
            confidence=self.scores,
            class_id=self.class_ids,
            data={"class_name": np.array(self.names, dtype=np.str_)},
        )

    def to_fiftyone(self) -> fo.Detections:
        """Convert to `fiftyone.Detections`, whose boxes are relative to the image; ArgumentError without FiftyOne."""
        try:
            import fiftyone
        except ImportError as error:
            raise ArgumentError("FiftyOne is not installed; pip install fiftyone") from error
        return fiftyone.Detections(
            detections=[
                fiftyone.Detection(label=one.name, bounding_box=self.relative(one), confidence=one.score)
                for one in self.objects
            ]
        )

    def relative(self, one: Detection) -> list[float]:
        """Left, top, width and height of an object's box as fractions of the image, within [0, 1]."""
        scale = (self.width, self.height)
        x1, y1, x2, y2 = (min(max(value / scale[axis % 2], 0.0), 1.0) for axis, value in enumerate(one.box))
        return [x1, y1, x2 - x1, y2 - y1]


def detection_lines(detections: ImageDetections, *, with_path: bool) -> Iterator[str]:
    """Lines of text, one per object: score, name and corners, after the image's path if asked for."""
    for one in detections:
        box = " ".join(f"{v:.1f}" for v in one.box)
        path = f"{detections.label}  " if with_path else ""
        yield f"{path}{one.score:.3f}  {one.name}  {box}"
