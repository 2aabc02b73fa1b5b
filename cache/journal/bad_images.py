"""Images that could not be read when a store was built: it lists them, says why, and has no rows for them."""

import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ezsd.cache.errors import StoreError
from ezsd.cache.format.schema import RaggedRows
from ezsd.cache.format.sealed_json import JSON
from ezsd.errors import quantity

_NAME = "bad_images"
"""Attribute of a block's journal entry and of the group `images`, where there are any: id -> reason."""
_ID = re.compile("0|-?[1-9][0-9]{0,18}")
"""An id as JSON's text of it; what `int` would take beside is no id that ezsd wrote."""


def bad_attributes(bad: Mapping[int, str]) -> dict[str, JSON]:
    """Bad images, by id, as they are written among other attributes; JSON has texts for keys. Nothing for none."""
    return {_NAME: {str(image): reason for image, reason in sorted(bad.items())}} if bad else {}


def all_bad_images(attributes: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    """The bad images that attributes tell of, by id.

    Raises:
        ValueError: these are not what `bad_attributes` wrote.
    """
    return {int(image): reason for found in attributes for image, reason in _listed(found).items()}


def _listed(attributes: Mapping[str, Any]) -> dict[str, str]:
    listed = attributes.get(_NAME, {})
    if not isinstance(listed, dict) or not all(
        _ID.fullmatch(image) and isinstance(reason, str) for image, reason in listed.items()
    ):
        raise ValueError(f"{_NAME}: expected an object of ids and reasons, found {reprlib.repr(listed)}")
    return listed


def bad_images_of(root: Mapping[str, Any], where: str) -> dict[int, str]:
    """The bad images of a finished store, by id, from the metadata of its root; `where` names the file in errors.

    Raises:
        StoreError: it is not the root of a store.
    """
    try:
        return all_bad_images([root["consolidated_metadata"]["metadata"]["images"]["attributes"]])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{where}: {NO_ROOT.format(type(error).__name__, error)}") from error


NO_ROOT = "does not say what the root of a store says ({}: {}); ezsd wrote no such file: do not use this store"


def require_no_rows(
    bad: Mapping[int, str], products: Mapping[str, RaggedRows], image_ids: NDArray[np.int64], *, where: str
) -> None:
    """Refuse rows of images that could not be read, and such images as are none of the block's.

    Raises:
        StoreError: says which image.
    """
    for image in bad:
        place = np.flatnonzero(image_ids == image)
        if not len(place):
            raise StoreError(f"{where}: bad image {image} is not one of its images")
        for product, rows in products.items():
            count = int(rows.counts[place[0]])
            if count:
                raise StoreError(f"{where}: bad image {image} has {quantity(count, 'row')} of {product}, expected none")
