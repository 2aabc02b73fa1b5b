"""Validation of rows before they enter a store; errors name the product, the field, the row and the image."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ezsd.cache.errors import StoreError
from ezsd.cache.format.schema import UNIT_TOLERANCE, Field, PerImage, RaggedRows, Schema
from ezsd.errors import quantity


def check_images(image_ids: NDArray[np.int64], widths: NDArray[np.int32], heights: NDArray[np.int32]) -> None:
    """Refuse an image list that is empty, uneven, has an id twice or an image without area; all arrays (n,)."""
    if not image_ids.ndim == widths.ndim == heights.ndim == 1:
        raise StoreError("images: ids, widths and heights must be flat lists of whole numbers")
    if not len(image_ids) == len(widths) == len(heights):
        raise StoreError(f"images: {len(image_ids)} ids, {len(widths)} widths and {len(heights)} heights")
    if not len(image_ids):
        raise StoreError("images: the list is empty; a store needs at least one image")
    ordered = np.sort(image_ids)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        raise StoreError(f"images: id {twice[0]} is in the list more than once; ids must differ")
    flat = np.flatnonzero((widths < 1) | (heights < 1))
    if len(flat):
        at = flat[0]
        raise StoreError(f"images: image {image_ids[at]} has {widths[at]} x {heights[at]} pixels, thus no area")


def check_block(
    products: Mapping[str, RaggedRows],
    *,
    image_ids: NDArray[np.int64],
    widths: NDArray[np.int32],
    heights: NDArray[np.int32],
    schema: Schema,
    bad_images: Collection[int],
    where: str,
) -> None:
    """Refuse rows that do not belong into a store.

    Args:
        products: the rows of one block, by product.
        image_ids: the block's images, (n,).
        widths: theirs in pixels, (n,).
        heights: theirs in pixels, (n,).
        schema: of the store.
        bad_images: ids of images that could not be read, which have no rows.
        where: names the block in errors.

    Raises:
        StoreError: for the first thing that is wrong.
    """
    _check_names(products.keys(), schema.per_image.keys(), f"{where}: products")
    for product in schema.per_image.values():
        rows = products[product.name]
        place = f"{where}, {product.name}"
        _check_names(rows.fields.keys(), {field.name for field in product.fields}, f"{place}: fields")
        total = _check_counts(rows.counts, len(image_ids), place)
        _check_fixed(product, rows.counts, image_ids, bad_images, place)
        owner = np.repeat(np.arange(len(image_ids)), rows.counts)
        for field in product.fields:
            column = _Column(rows.fields[field.name], f"{place}.{field.name}", image_ids[owner])
            column.check_form(field.dtype, (total, *field.trailing))
            column.check_values(field)
            if field.values == "box":
                column.check_boxes(widths[owner], heights[owner])


def check_per_store(product: str, arrays: Mapping[str, NDArray[Any]], attributes: object, *, schema: Schema) -> None:
    """Refuse a per-store product that is not as the schema says: arrays by field name, attributes a JSON object."""
    fields = schema.per_store[product].fields
    if not isinstance(arrays, Mapping):
        raise StoreError(f"{product}: expected arrays by field name, found {type(arrays).__name__}")
    _check_names(arrays.keys(), {field.name for field in fields}, f"{product}: arrays")
    if not isinstance(attributes, Mapping):
        raise StoreError(f"{product}: the attributes must be a JSON object, found {type(attributes).__name__}")
    for field in fields:
        column = _Column(arrays[field.name], f"{product}.{field.name}", None)
        column.check_form(field.dtype, (len(np.atleast_1d(arrays[field.name])), *field.trailing))
        column.check_values(field)


def _check_fixed(
    product: PerImage, counts: NDArray[np.int32], image_ids: NDArray[np.int64], bad: Collection[int], where: str
) -> None:
    """Refuse another number of rows than a product has of each image that could be read."""
    if product.rows is None:
        return
    wrong = np.flatnonzero((counts != product.rows) & ~np.isin(image_ids, np.array([*bad], np.int64)))
    if len(wrong):
        at = int(wrong[0])
        raise StoreError(
            f"{where}: expected {quantity(product.rows, 'row')} of each image, found {counts[at]} of {image_ids[at]}"
        )


def check_text_names(names: object, total: int) -> None:
    """Refuse class names that do not name the rows of the product `text` of a store of regions, one each."""
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise StoreError('text: the attributes must hold "names", a list with the class name of each row')
    if len(names) != total or len(set(names)) != total:
        raise StoreError(
            f"text: {quantity(total, 'embedding')} but {len(set(names))} different names in a list of {len(names)}"
        )


def _check_names(found: Iterable[str], expected: Iterable[str], where: str) -> None:
    if set(found) != set(expected):
        raise StoreError(f"{where}: expected {sorted(expected)}, found {sorted(map(str, found))}")


def _check_counts(counts: NDArray[np.int32], images: int, where: str) -> int:
    if not isinstance(counts, np.ndarray) or counts.dtype.newbyteorder("<").str != "<i4" or counts.shape != (images,):
        raise StoreError(f"{where}: counts must be int32 of shape ({images},), one for each image of the block")
    if (counts < 0).any():
        raise StoreError(f"{where}: counts holds {counts.min()}; a number of rows cannot be negative")
    return int(counts.sum(dtype=np.int64))


@dataclass(frozen=True, slots=True)
class _Column:
    """Values of a field, their name in errors, and the image of each row where rows belong to images."""

    values: NDArray[Any]
    name: str
    images: NDArray[np.int64] | None

    def check_form(self, dtype: str, shape: tuple[int, ...]) -> None:
        """Refuse another type or shape; nothing is converted silently."""
        expected = np.dtype(dtype)
        if not isinstance(self.values, np.ndarray):
            raise StoreError(f"{self.name}: expected a numpy array, found {type(self.values).__name__}")
        if self.values.dtype.newbyteorder("=") != expected.newbyteorder("="):
            raise StoreError(f"{self.name}: expected {expected.name}, found {self.values.dtype.name}; convert it first")
        if self.values.shape != shape:
            raise StoreError(f"{self.name}: expected shape {shape} (rows as counted), found {self.values.shape}")

    def check_values(self, field: Field) -> None:
        """Refuse values that are not finite, and embeddings that are not of unit length."""
        if self.values.dtype.kind != "f":
            return
        if field.values != "unit":
            finite = np.isfinite(self.values).all(axis=tuple(range(1, self.values.ndim)))
            self._refuse(~finite, "is not finite")
            return
        # Sums of squares in float32 at least: a value that is not finite makes its row's length not finite too.
        with np.errstate(over="ignore", invalid="ignore"):
            wide = np.result_type(self.values.dtype, np.float32)
            lengths = np.sqrt(np.einsum("nd,nd->n", self.values, self.values, dtype=wide))
        self._refuse(~np.isfinite(lengths), "is not finite")
        self._refuse(np.abs(lengths - 1) > UNIT_TOLERANCE, f"is not of unit length (within {UNIT_TOLERANCE})")

    def check_boxes(self, widths: NDArray[np.int32], heights: NDArray[np.int32]) -> None:
        """Refuse boxes without area or beyond their image; widths and heights of each row's image, (rows,)."""
        x1, y1, x2, y2 = self.values.T
        self._refuse((x2 <= x1) | (y2 <= y1), "has no area; it must be x1, y1, x2, y2 with x1 < x2 and y1 < y2")
        self._refuse((x1 < 0) | (y1 < 0) | (x2 > widths) | (y2 > heights), "reaches beyond its image; clip it first")

    def _refuse(self, bad: NDArray[np.bool_], why: str) -> None:
        if bad.any():
            row = int(np.argmax(bad))
            image = "" if self.images is None else f" (image {self.images[row]})"
            raise StoreError(f"{self.name}: row {row}{image} {why}: {np.array2string(self.values[row], threshold=8)}")
