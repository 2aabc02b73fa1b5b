"""Taking over from an earlier store what would come out the same."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from ezsd.cache import PER_IMAGE, Manifest, Store

Columns: TypeAlias = dict[str, np.ndarray]
"""The rows of one product of one image, by field."""


_OF_TEACHER = ("background", "batch")
"""Settings, beside those of the products `teacher` and `text`, that what the teacher says of a box depends on."""


@dataclass(frozen=True, slots=True)
class Reuse:
    """An earlier store, and what of it is taken over; picklable."""

    store: str
    products: tuple[str, ...]
    """Products whose rows are taken as they are."""
    embeddings: bool
    """True if regions have to be chosen anew, and embeddings of the same boxes can be taken."""


@dataclass(frozen=True, slots=True)
class KnownRegion:
    """Probabilities and embedding that the teacher computes for one box."""

    foreground: float
    """Probability of an object: 1 - p(background)."""
    confidence: np.float32
    class_index: int
    embedding: np.ndarray
    """(D,) float16, unit."""


def plan_reuse(path: Path, wanted: Manifest) -> Reuse:
    """Find the products that a store has in common with another one that is wanted.

    A product is taken over when its fingerprint is the wanted one, or would be if the store kept embeddings as they
    are wanted: float16 becomes int8 in the writer. The other way something would be missing.

    Raises:
        StoreError: no complete store of regions.
    """
    store = Store(path)
    store.require_regions()
    found = store.manifest
    convertible = found.embedding in ("float16", wanted.embedding)
    products = tuple(
        name
        for name, fingerprint in found.fingerprints.items()
        if name in wanted.products
        and fingerprint == wanted.fingerprint(name, embedding=found.embedding)
        and (convertible or fingerprint == wanted.fingerprints[name])
    )
    # What `ReusedRows.known` says of kept regions holds of those that background was dropped from.
    no_background = found.products["regions"].inputs.get("drop_background", True)
    same_teacher = {"teacher", "text"} <= set(products) and all(
        found.products["proposals"].inputs[key] == wanted.products["proposals"].inputs[key] for key in _OF_TEACHER
    )
    embeddings = same_teacher and "regions" not in products and convertible and bool(no_background)
    return Reuse(str(path.absolute()), products, embeddings)


class ReusedRows:
    """The rows of an earlier store, image by image."""

    def __init__(self, reuse: Reuse) -> None:
        self._reuse, self._store = reuse, Store(reuse.store)
        # These may have been mended since.
        self._bad = self._store.bad_images

    def taken(self, image_id: int) -> dict[str, Columns]:
        """The rows of one image that are taken as they are, by product."""
        if image_id in self._bad:
            return {}
        return {name: self._columns(name, image_id) for name in PER_IMAGE if name in self._reuse.products}

    def known(self, image_id: int) -> dict[bytes, KnownRegion]:
        """Kept regions of one image, by the bytes of their boxes."""
        if not self._reuse.embeddings:
            return {}
        rows = self._columns("regions", image_id)
        columns = zip(rows["box"], rows["confidence"], rows["class_index"], rows["embedding"], strict=True)
        # Regions are kept only where they are likelier something than nothing.
        return {box.tobytes(): KnownRegion(1.0, sure, int(guess), unit) for box, sure, guess, unit in columns}

    def _columns(self, product: str, image_id: int) -> Columns:
        rows = getattr(self._store, product)[image_id]
        return {field.name: getattr(rows, field.name) for field in dataclasses.fields(rows)}
