"""Detection in images that are given to the page, by the runs that it shows."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from ezsd.boxes import iou
from ezsd.pipeline.data.images import pixels_of_bytes
from ezsd.pipeline.errors import ArgumentError, ImageError
from ezsd.pipeline.inference.detect import Model, Picture, resolve_names
from ezsd.pipeline.inference.detections import ImageDetections
from ezsd.pipeline.inference.outlines import outlines
from ezsd.pipeline.view.masks import POINTS
from ezsd.pipeline.view.target import Target
from ezsd.vocabulary import parse_classes, require_different

COMPETITORS = 5
"""Most other names that are given with a detection."""
KEPT_IMAGES = 4
"""Given images that are remembered, the last ones."""
_SAME_IOU = 0.9
"""Least IoU with the box of an evaluation of what is the same detection, computed anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenImage:
    """An image that was given to the page."""

    name: str
    """Name of the file as the browser said it."""
    data: bytes
    """Content of the file."""
    width: int
    """Pixels, as the image is shown."""
    height: int
    """Pixels, as the image is shown."""

    def pixels(self) -> NDArray[Any]:
        """(H, W, 3) uint8 RGB. ImageError when it cannot be read."""
        return pixels_of_bytes(self.name, self.data)


class GivenImages:
    """The last images that were given to the page. Threads may share them."""

    def __init__(self) -> None:
        self._images: OrderedDict[str, GivenImage] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, name: str, data: bytes) -> tuple[str, GivenImage]:
        """Remember an image under a key that nobody can guess. ImageError when it cannot be read."""
        with self._lock:
            # One at a time: a decoded image may fill half a gigabyte.
            height, width, _ = pixels_of_bytes(name, data).shape
            image, key = GivenImage(name=name, data=data, width=width, height=height), secrets.token_hex(8)
            self._images[key] = image
            while len(self._images) > KEPT_IMAGES:
                self._images.popitem(last=False)
        return key, image

    def get(self, key: str) -> GivenImage:
        """An image by its key. ArgumentError when it is forgotten."""
        with self._lock:
            if key not in self._images:
                raise ArgumentError("this image is forgotten; give it again")
            return self._images[key]


class Detectors:
    """Detectors of the runs of a page, loaded when they are first needed. Threads may share them."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._models: dict[int, Model] = {}
        self._lock = threading.Lock()

    def detect(self, pixels: NDArray[Any], text: str, *, alone: bool) -> dict[str, Any]:
        """Detect names in an image (H, W, 3) with every run; as JSON has it.

        Args:
            pixels: uint8 RGB.
            text: names, see `parse_names`; "" for the runs' own.
            alone: True to let no other name compete.

        Raises:
            EzsdError: no name can be read, no teacher knows it, or there is no run.
        """
        with self._lock:
            if not self._target.runs:
                raise ArgumentError("a store detects nothing; open a run")
            return {"runs": [self._run(number, pixels, text, alone) for number in range(len(self._target.runs))]}

    def _run(self, number: int, pixels: NDArray[Any], text: str, alone: bool) -> dict[str, Any]:
        run = self._target.runs[number].run
        names = resolve_names(run, parse_names(text) if text.strip() else None)
        found = self._detect(number, pixels, names, alone=alone)
        base = set(self._model(number).base_names)
        return {
            "boxes": [
                {
                    "box": [round(corner, 2) for corner in one.box],
                    "name": one.name,
                    "base": one.name in base,
                    "score": round(one.score, 4),
                    "competitors": _rounded(one.competitors),
                    "outlines": [] if one.mask is None else outlines(one.mask, *pixels.shape[:2], points=POINTS),
                }
                for one in found
            ]
        }

    def competitors(self, number: int, pixels: NDArray[Any], box: Sequence[float], name: str) -> dict[str, Any]:
        """Competitors of a detection of an evaluation, which is computed anew; None where it does not come again.

        Args:
            number: position of the run.
            pixels: (H, W, 3) uint8 RGB.
            box: xyxy of the detection.
            name: its class.
        """
        with self._lock:
            found = self._detect(number, pixels, self._target.split.names, alone=False)
        same = [one for one in found if one.name == name]
        overlap = iou(torch.tensor([list(box)]), torch.from_numpy(found.boxes).reshape(-1, 4))[0]
        overlaps = {id(one): float(value) for one, value in zip(found, overlap, strict=True)}
        best = max(same, key=lambda one: overlaps[id(one)], default=None)
        if best is None or overlaps[id(best)] < _SAME_IOU:
            return {"competitors": None}
        return {"competitors": _rounded(best.competitors)}

    def _detect(self, number: int, pixels: NDArray[Any], names: Sequence[str], *, alone: bool) -> ImageDetections:
        model = self._model(number)
        ((_, found),) = model.each(
            [Picture(image=pixels)], names, thresholds=[0.0] * len(names), alone=alone, competitors=COMPETITORS
        )
        if isinstance(found, ImageError):
            raise found
        return found[1]

    def _model(self, number: int) -> Model:
        if number not in self._models:
            request = self._target.request
            self._models[number] = Model(
                self._target.runs[number].run,
                device=request.device,
                overrides=request.overrides,
                weights=request.weights,
            )
        return self._models[number]


def parse_names(text: str) -> tuple[str, ...]:
    """Class names of a text: one a line, or comma-separated as `parse_classes` reads them.

    Raises:
        VocabularyError: there is none, a name occurs twice, or a line is not well-formed.
    """
    names = [name for line in text.splitlines() if line.strip() for name in parse_classes(line.strip().rstrip(","))]
    require_different(names)
    return tuple(names)


def _rounded(competitors: Sequence[tuple[str, float]]) -> list[list[object]]:
    return [[name, round(score, 4)] for name, score in competitors[:COMPETITORS]]
