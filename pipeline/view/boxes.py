"""Boxes of a part of a dataset as a page gets them, and the images that show some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ezsd.data.annotations import Annotations
from ezsd.metrics.error_kinds import KINDS, ErrorKind
from ezsd.metrics.judging import Errors, Found, Objects, rows_matched
from ezsd.metrics.results import corners

Kind: TypeAlias = Literal[ErrorKind, "missed"]
"""Kinds that images are looked for by: of a detection, or an object that is missed."""
ALL_KINDS: tuple[Kind, ...] = (*KINDS, "missed")
"""All of them."""


def objects_of_annotations(annotations: Annotations) -> Objects:
    """Base objects of training images."""
    box = annotations.box.astype(np.float64)
    return Objects(
        image=annotations.image_index.astype(np.int64),
        row=np.arange(len(box)),
        xywh=np.concatenate([box[:, :2], box[:, 2:] - box[:, :2]], axis=1),
        class_index=annotations.class_index.astype(np.int64),
        crowd=np.array(annotations.crowd),
        ignored=np.array(annotations.crowd),
    )


def images_with(
    class_index: int | None,
    kind: Kind | None,
    *,
    objects: Objects,
    found: Found | None,
    errors: Errors | None,
    threshold: float,
) -> NDArray[np.int64]:
    """Positions of images, ascending, that show a class or an error of a kind, or an error of a kind of a class.

    An error is of a class if the detection or its object is.

    Args:
        class_index: the class; None for any.
        kind: the kind; None for any object or detection.
        objects: what is there.
        found: what was found; None where nothing was detected.
        errors: kinds of these, where a kind is asked for; else None.
        threshold: detections below this score are left out.
    """
    assert kind is None or errors is not None
    shown = []
    if kind is None or kind == "missed":
        of_objects = np.ones(len(objects.image), np.bool_) if errors is None else errors.found_at < threshold
        if class_index is not None:
            of_objects &= objects.class_index == class_index
        shown.append(objects.image[of_objects])
    if found is not None and kind != "missed":
        of_found = found.score >= threshold
        if kind is not None and errors is not None:
            of_found &= errors.kind == KINDS.index(kind)
        if class_index is not None:
            of_found &= (found.class_index == class_index) | (_class_matched(objects, found, errors) == class_index)
        shown.append(found.image[of_found])
    return np.unique(np.concatenate(shown))


def _class_matched(objects: Objects, found: Found, errors: Errors | None) -> NDArray[np.int64]:
    """Class of the object that each detection's kind is about, -1 for none, (N,)."""
    if errors is None or not len(objects.image):
        return np.full(len(found.image), -1)
    row = rows_matched(objects, found, errors)
    return np.where(row >= 0, objects.class_index[row], -1)


def as_rows(box: NDArray[np.floating], *columns: Sequence[object]) -> list[list[object]]:
    """Boxes xyxy (n, 4) with further columns (n,), as JSON has them: hundredths of a pixel."""
    rounded = np.asarray(box, np.float64).round(2).tolist()
    return [[*one, *rest] for one, *rest in zip(rounded, *columns, strict=True)]


def xywh_as_rows(xywh: NDArray[np.float64], *columns: Sequence[object]) -> list[list[object]]:
    """Boxes given as left, top, width, height (n, 4), see `as_rows`."""
    return as_rows(corners(xywh), *columns)
