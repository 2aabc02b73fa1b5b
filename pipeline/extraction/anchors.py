"""The anchors of a configuration, and which of them the teacher is shown."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ezsd.boxes import clip
from ezsd.crops import distinct_crops
from ezsd.pipeline.config.schema import ProposalConfig
from ezsd.pipeline.extraction.in_flight import Fetched, Work, finished
from ezsd.proposals.search import Lattice, coarse_to_fine_rounds, grown_stride, in_grid_order
from ezsd.proposals.select import faithful_anchors, faithful_cells, sliding_anchors


def image_anchors(config: ProposalConfig, width: int, height: int) -> Tensor:
    """Anchors (A, 4) of an image that are at least one pixel wide and high, original-image pixels."""
    anchors = _grid(config, width, height)
    return anchors[_wide(anchors)]


def encoded_at_most(config: ProposalConfig, width: int, height: int) -> int:
    """Number of crops of an image that the teacher is shown for its anchors; an upper bound for "coarse-to-fine".

    Anchors with the same crop share one.
    """
    if config.search == "coarse-to-fine":
        return _most_looks(config, _lattice(config, width, height))
    anchors = _grid(config, width, height)
    boxes = _chosen(config, anchors, _wide(anchors), width, height)
    first, _ = distinct_crops(boxes, ratio=config.crop_ratio, surround=config.padding, width=width, height=height)
    return len(first)


def look_at_anchors(
    config: ProposalConfig,
    width: int,
    height: int,
    encode: Callable[[Tensor], Tensor],
    score: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Show the teacher those anchors of an image that the mode chooses.

    Args:
        config: grid and mode.
        width: of the image, pixels.
        height: likewise.
        encode: unit embeddings (R, D) of boxes (R, 4).
        score: scores (R,) of embeddings (R, D); "coarse-to-fine" follows them.

    Returns:
        Boxes (R, 4), float32, original-image pixels, in the grid's order, and their embeddings (R, D).
    """
    return finished(anchor_looks(config, width, height, encode, score))


def anchor_looks(
    config: ProposalConfig,
    width: int,
    height: int,
    encode: Callable[[Tensor], Tensor],
    score: Callable[[Tensor], Tensor],
) -> Work[tuple[Tensor, Tensor]]:
    """Anchors and embeddings as work that may wait for scores; see `finished`.

    Embeddings are where `encode` leaves them, boxes on the CPU.
    """
    anchors = _grid(config, width, height)
    wide = _wide(anchors)
    if config.search == "coarse-to-fine":
        anchors = clip(anchors, width, height)
        lattice = _lattice(config, width, height)
        passes = _most_looks(config, lattice)
        rounds = coarse_to_fine_rounds(lattice, wide, growth=config.growth, passes=passes)
        looked, parts = next(rounds), list[tuple[Tensor, Tensor]]()
        while True:
            embedding = encode(anchors[looked])
            parts.append((looked, embedding))
            scores = Fetched(score(embedding))
            yield
            try:
                looked = rounds.send(scores.result()[0])
            except StopIteration:
                break
        found = in_grid_order(parts)
        return anchors[found.anchor], found.embedding
    boxes = _chosen(config, anchors, wide, width, height)
    return boxes, encode(boxes)


def _chosen(config: ProposalConfig, anchors: Tensor, wide: Tensor, width: int, height: int) -> Tensor:
    """The boxes of a mode that need not see anything to choose, within the image."""
    anchors = clip(anchors, width, height)
    if config.search == "exhaustive":
        return anchors[wide]
    chosen = grown_stride(_lattice(config, width, height), growth=config.growth)
    return anchors[chosen[wide[chosen]]]


def _most_looks(config: ProposalConfig, lattice: Lattice) -> int:
    return max(1, round(config.anchor_fraction * len(lattice)))


def _grid(config: ProposalConfig, width: int, height: int) -> Tensor:
    if config.grid == "paper":
        stride = round(config.stride)
        return faithful_anchors(width, height, sizes=config.sizes, ratios=config.ratios, stride=stride)
    return sliding_anchors(width, height, sizes=config.sizes, ratios=config.ratios, stride=config.stride)


def _wide(anchors: Tensor) -> Tensor:
    return ((anchors[:, 2:] - anchors[:, :2]) >= 1).all(1)


def _lattice(config: ProposalConfig, width: int, height: int) -> Lattice:
    stride = round(config.stride)
    _, rows, columns = faithful_cells(width, height, stride=stride)
    return Lattice(rows=rows, columns=columns, sizes=config.sizes, ratios=config.ratios, stride=stride)
