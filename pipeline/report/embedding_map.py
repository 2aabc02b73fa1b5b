"""Map of region embeddings and text embeddings on two principal components."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from numpy.typing import NDArray

from ezsd.cache import Store
from ezsd.pipeline.report.svg import BASE, INK, NOVEL, drawn

SEED = 0
"""Seed of the choice of images and regions."""
_IMAGES = 400
_REGIONS = 600
_LABELLED = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingMap:
    """Map, and what it is of."""

    chart: Markup
    regions: int
    """Regions on the map."""
    images: int
    """Images that they were drawn from."""
    explained: tuple[float, float]
    """Fraction of the regions' variance along each component."""
    gap: float
    """Cosine between the mean region embedding and the mean text embedding."""
    labelled: Sequence[tuple[int, str, bool]]
    """Number on the map, name, and True for a novel class."""


def embedding_map(store: Store, novel: frozenset[str]) -> EmbeddingMap | None:
    """Project a sample of a store's region embeddings, and its text embeddings; None for fewer than three regions.

    The components are those of the regions. Regions and texts are centred each by its own mean: the two kinds of CLIP
    embeddings lie apart, and the distance between them would be all that a map shows.
    """
    names, text = store.text
    rng = np.random.default_rng(SEED)
    ids = store.image_ids
    images = np.sort(rng.permutation(ids)[:_IMAGES])
    batch = store.regions.batch(images.tolist())
    chosen = np.sort(rng.permutation(len(batch.rows.box))[:_REGIONS])
    embedding = batch.rows.embedding[chosen].astype(np.float64)
    if len(embedding) < 3:
        return None
    regions, explained, axes = _components(embedding)
    texts = (text.astype(np.float64) - text.mean(0, dtype=np.float64)) @ axes
    is_novel = np.array([name in novel for name in names])
    # Novel names first: what a map of many classes is looked at for.
    order = sorted(range(len(names)), key=lambda index: (not is_novel[index], index))[:_LABELLED]
    labelled = [(number, names[index], bool(is_novel[index])) for number, index in enumerate(order, 1)]
    guessed_novel = is_novel[batch.rows.class_index[chosen]]

    def draw(canvas: Axes) -> None:
        for marks, colour, shape in ((~guessed_novel, BASE, "o"), (guessed_novel, NOVEL, "^")):
            canvas.scatter(regions[marks, 0], regions[marks, 1], s=16, c=colour, marker=shape, alpha=0.55, linewidths=0)
        for marks, colour, shape in ((~is_novel, BASE, "s"), (is_novel, NOVEL, "D")):
            canvas.scatter(
                texts[marks, 0], texts[marks, 1], s=26, c=colour, marker=shape, edgecolors=INK, linewidths=0.8
            )
        for number, index in enumerate(order, 1):
            canvas.annotate(str(number), texts[index], (3, 3), textcoords="offset points", color=INK, weight="bold")
        canvas.set_xlabel(f"component 1, {100 * explained[0]:.0f} % of the variance")
        canvas.set_ylabel(f"component 2, {100 * explained[1]:.0f} %")

    chart = drawn(
        draw,
        size=(6.2, 4.4),
        prefix="map",
        label=f"{len(regions)} region embeddings and {len(texts)} text embeddings on two principal components",
    )
    means = [one.mean(0) for one in (embedding, text.astype(np.float64))]
    gap = float(means[0] @ means[1] / max(float(np.linalg.norm(means[0]) * np.linalg.norm(means[1])), 1e-12))
    return EmbeddingMap(
        chart=chart,
        regions=len(regions),
        images=len(images),
        explained=explained,
        # No minus before a zero.
        gap=round(gap, 2) + 0.0,
        labelled=labelled,
    )


def _components(
    values: NDArray[np.float64],
) -> tuple[NDArray[np.float64], tuple[float, float], NDArray[np.float64]]:
    """Values (N, D) on their first two principal components (N, 2), the variance along these, and the axes (D, 2)."""
    centred = values - values.mean(0)
    _, size, rows = np.linalg.svd(centred, full_matrices=False)
    axes = rows[:2].T
    # The sign of a component is the decomposition's whim.
    axes = axes * np.where(axes[np.abs(axes).argmax(0), [0, 1]] < 0, -1, 1)
    share = size**2 / max(float((size**2).sum()), 1e-12)
    return (centred @ axes).round(4), (float(share[0]), float(share[1])), axes
