"""Outlines of annotated objects for a page, read from the annotation file when they are first asked for."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ezsd.data.masks import pack, read_outlines, unpack
from ezsd.data.records import ImageTable
from ezsd.errors import AnnotationError
from ezsd.metrics.judging import Objects
from ezsd.pipeline.data.annotation_cache import category_ids
from ezsd.pipeline.inference.outlines import outlines

POINTS = 400
"""Most points of the outlines of a mask, about: the page enlarges images."""


class ObjectOutlines:
    """Outlines of the objects of a part of a dataset, where they have one. Threads may share it.

    Args:
        path: the annotation file.
        names: classes that the objects are of; outlines of others are not looked at.
        objects: the objects, with N rows in the table that they were taken from.
        annotation_id: their ids by row of that table, (N,).
        images: the part's images.
    """

    def __init__(
        self,
        path: Path,
        names: Collection[str],
        objects: Objects,
        annotation_id: NDArray[np.int64],
        images: ImageTable,
    ) -> None:
        self._path, self._names, self._objects, self._images = path, names, objects, images
        self._id = annotation_id[objects.row]
        self._packed: dict[int, bytes] | AnnotationError | None = None
        self._lock = threading.Lock()

    def of_image(self, position: int) -> list[list[str]]:
        """Rings of each object of an image, see `outlines`; none for an object without an outline.

        Raises:
            AnnotationError: the file has an outline that is not in order.
        """
        with self._lock:
            # Boxes are shown meanwhile: a large file takes a while.
            if self._packed is None:
                self._packed = self._read()
        if isinstance(self._packed, AnnotationError):
            raise self._packed
        height, width = int(self._images.height[position]), int(self._images.width[position])
        packed = [self._packed.get(number) for number in self._id[self._objects.rows(position)].tolist()]
        return [[] if one is None else outlines(unpack(one), height, width, points=POINTS) for one in packed]

    def _read(self) -> dict[int, bytes] | AnnotationError:
        """Packed outlines by annotation id, or what is wrong with them, so that no image reads the file again."""
        size = np.stack([self._images.height, self._images.width], axis=1)[self._objects.image].tolist()
        wanted = {number: (height, width) for number, (height, width) in zip(self._id.tolist(), size, strict=True)}
        categories = category_ids(self._path, self._names)
        found = read_outlines(self._path, wanted, categories, required=False)
        try:
            return {number: pack(outline) for number, outline in found}
        except AnnotationError as error:
            return error


def mask_outlines(masks: Sequence[bytes], height: int, width: int) -> list[list[str]]:
    """Rings of each mask of an image, given as run lengths."""
    return [outlines(one, height, width, points=POINTS) for one in masks]
