"""Numbers of a store's regions, and the teacher's guesses of its base objects, from the store alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ezsd.cache import Store
from ezsd.metrics.matching import AREAS

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def survey(store: Store) -> dict[str, Any]:
    """Count a store's regions.

    Returns:
        JSON: `images`; `regions`; quantiles of `per_image`, `confidence` and `side` (root of a box's area, pixels;
        each None without regions); `images_without` (fraction of the images that have none); `by_size` (regions by area
        of their box); `guesses` (regions by name, most first).
    """
    ids = store.image_ids.tolist()
    confidence, counts = store.regions.column("confidence", ids)
    guess, _ = store.regions.column("class_index", ids)
    box, _ = store.regions.column("box", ids)
    area = ((box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])).astype(np.float64)
    names, _ = store.text
    frequent = Counter(guess.tolist()).most_common()
    return {
        "images": len(ids),
        "regions": len(box),
        "per_image": _quantiles(counts),
        "images_without": float((counts == 0).mean()),
        "confidence": _quantiles(confidence),
        "side": _quantiles(np.sqrt(area)),
        "by_size": {
            size: int(((area >= least) & (area < most)).sum()) for size, (least, most) in AREAS.items() if size != "all"
        },
        "guesses": {names[index]: count for index, count in frequent},
    }


def _quantiles(values: NDArray[Any]) -> dict[str, float] | None:
    if not len(values):
        return None
    return {str(q): float(v) for q, v in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)}


def named_objects(store: Store, image_ids: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Compare the teacher's guess of base objects, cropped by their own boxes, with their names.

    Args:
        store: complete.
        image_ids: images whose objects are looked at.

    Returns:
        JSON by base name that has an object: `objects`, `right` (fraction whose likeliest name of all is their own),
        `instead` (the name most often said of the others, and how often; None where all are right).
    """
    names, text = store.text
    embedding, _ = store.ground_truth.column("embedding", image_ids)
    label, _ = store.ground_truth.column("class_index", image_ids)
    guess = (embedding.astype(np.float32) @ text.T).argmax(1)
    found = {}
    for index in np.unique(label).tolist():
        said = guess[label == index]
        wrong = Counter(said[said != index].tolist()).most_common(1)
        found[names[index]] = {
            "objects": len(said),
            "right": float((said == index).mean()),
            "instead": [names[wrong[0][0]], wrong[0][1]] if wrong else None,
        }
    return found
