"""Search for the anchors of the method's grid that are worth an encoder pass.

Scoring every anchor is most of the cost of stage one, and NMS drops most of the large anchors again. The selectors in
this module score only a part of the grid. They score only anchors of that grid, so every region of a cheaper store
could also be in the full store, with the same embedding.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ezsd.transfer import to_device

_ROUND = 64
"""Anchors expanded per round of refinement. Fewer follow the scores more closely, more fill an accelerator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lattice:
    """Index of the paper's anchor grid: anchor number ((row * columns + column) * sizes + size) * ratios + ratio."""

    rows: int
    columns: int
    sizes: tuple[float, ...]
    """Square roots of anchor areas, ascending, resized-image pixels."""
    ratios: tuple[float, ...]
    """Height over width, ascending."""
    stride: float
    """Distance between cells, resized-image pixels."""

    def __len__(self) -> int:
        """Number of anchors."""
        return self.rows * self.columns * len(self.sizes) * len(self.ratios)

    def places(self) -> Tensor:
        """Row, column, position of the size and position of the ratio of every anchor, (A, 4) int64."""
        axes = [torch.arange(n) for n in (self.rows, self.columns, len(self.sizes), len(self.ratios))]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 4)

    def anchors(self, places: Tensor) -> Tensor:
        """Numbers (N,) of anchors at places (N, 4); -1 outside the grid."""
        limits = torch.tensor([self.rows, self.columns, len(self.sizes), len(self.ratios)])
        inside = ((places >= 0) & (places < limits)).all(1)
        row, column, size, ratio = places.unbind(1)
        numbers = ((row * self.columns + column) * len(self.sizes) + size) * len(self.ratios) + ratio
        return torch.where(inside, numbers, -1)

    def steps(self, growth: float, *, least: int = 1) -> Tensor:
        """Cells between anchors spaced by `growth` times their size, at least `least`, (sizes,) int64."""
        return torch.tensor([max(least, round(growth * size / self.stride)) for size in self.sizes])


def thinned(lattice: Lattice, steps: Tensor, ratios: Sequence[int]) -> Tensor:
    """Every `steps[size]`-th row and column of each size, centred on the grid: numbers (N,), ascending.

    Args:
        lattice: the grid.
        steps: (sizes,) int64, >= 1.
        ratios: positions of the ratios that are taken.
    """
    row, column, size, ratio = lattice.places().unbind(1)
    step = steps[size]
    # Both margins are then the same, within a cell.
    keep = row % step == (lattice.rows - 1) % step // 2
    keep &= column % step == (lattice.columns - 1) % step // 2
    keep &= torch.isin(ratio, torch.tensor(ratios))
    return torch.nonzero(keep)[:, 0]


def grown_stride(lattice: Lattice, *, growth: float) -> Tensor:
    """Anchors whose spacing grows with their size, and is never below the grid's: numbers (N,), ascending."""
    return thinned(lattice, lattice.steps(growth), range(len(lattice.ratios)))


@dataclass(frozen=True, slots=True)
class SearchResult:
    """Anchors scored by a selector, with their embeddings."""

    anchor: Tensor
    """Numbers (N,) of anchors, ascending, int64."""
    embedding: Tensor
    """Embeddings (N, D) of these anchors."""


def coarse_to_fine_rounds(
    lattice: Lattice, allowed: Tensor, *, growth: float, passes: int
) -> Generator[Tensor, Tensor, None]:
    """Score a sparse grid, then the neighbours of its best anchors, until the passes are used up.

    Yields anchor numbers (N,) to score, and is sent their scores (N,), on the CPU. Equal scores give equal rounds.

    The sparse grid has only the middle ratio and a spacing of `growth` times an anchor's size, at least two cells. Each
    round scores the neighbours of the best anchors not yet expanded: half as far as the last time in all eight
    directions, and the next ratios and sizes in the same place. An anchor whose neighbours are less than two cells away
    is not expanded again.

    Args:
        lattice: the grid; all its anchors are candidates.
        allowed: (A,) bool, anchors that may be scored.
        growth: spacing of the sparse grid as a fraction of the anchor's size, > 0.
        passes: largest number of anchors scored. If the sparse grid is larger, evenly spaced anchors of it are scored.
    """
    steps = lattice.steps(growth, least=2)
    start = thinned(lattice, steps, [len(lattice.ratios) // 2])
    start = start[allowed[start]]
    if len(start) > passes:
        start = start[torch.arange(passes) * len(start) // passes]
    search = _Search(lattice, allowed.clone(), steps)
    around, reach = start, steps[lattice.places()[start, 2]]
    while True:
        around, reach = around[: passes - search.looked], reach[: passes - search.looked]
        search.add(around, reach, (yield around))
        if search.looked >= passes:
            return
        around, reach = search.next_round()
        if not len(around):
            return


def in_grid_order(parts: Sequence[tuple[Tensor, Tensor]]) -> SearchResult:
    """Anchors (N,), on the CPU, and their embeddings (N, D) of several rounds, put in the grid's order."""
    anchors = torch.cat([anchors for anchors, _ in parts])
    order, embedding = anchors.argsort(), torch.cat([embedding for _, embedding in parts])
    return SearchResult(anchors[order], embedding[to_device(order, embedding.device)])


class _Search:
    """State of a coarse-to-fine search: the anchors scored so far and the distance to their next neighbours."""

    def __init__(self, lattice: Lattice, unseen: Tensor, steps: Tensor) -> None:
        self._lattice, self._unseen, self._steps = lattice, unseen, steps
        self._places = lattice.places()
        self._score = torch.full((len(lattice),), -torch.inf)
        # Cells to the neighbours that an anchor was last looked at with; 1 is as close as the grid allows.
        self._reach = torch.zeros(len(lattice), dtype=torch.int64)
        self._open = torch.zeros(len(lattice), dtype=torch.bool)
        self.looked = 0

    def add(self, anchors: Tensor, reach: Tensor, score: Tensor) -> None:
        """Note the scores (N,) of anchors that had none, and are `reach` (N,) cells from their neighbours."""
        self._unseen[anchors], self._open[anchors] = False, True
        self._score[anchors], self._reach[anchors] = score, reach
        self.looked += len(anchors)

    def next_round(self) -> tuple[Tensor, Tensor]:
        """Neighbours (N,) not yet scored of the best open anchors, and their reach (N,), best anchors first."""
        while self._open.any():
            waiting = torch.nonzero(self._open)[:, 0]
            best = waiting[self._score[waiting].argsort(descending=True, stable=True)[:_ROUND]]
            half = (self._reach[best] // 2).clamp(min=1)
            # As close as can be: what lies around is looked at once.
            self._open[best] = half > 1
            self._reach[best] = half
            anchors, reach = self._neighbours(best, half)
            if len(anchors):
                return anchors, reach
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)

    def _neighbours(self, anchors: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
        across = torch.tensor([[r, c, 0, 0] for r in (-1, 0, 1) for c in (-1, 0, 1) if r or c])
        beside = torch.tensor([[0, 0, 0, -1], [0, 0, 0, 1], [0, 0, -1, 0], [0, 0, 1, 0]])
        near = self._places[anchors][:, None]
        places = torch.cat([near + across * half[:, None, None], near + beside], 1).reshape(-1, 4)
        reach = half.repeat_interleave(len(across) + len(beside))
        numbers = self._lattice.anchors(places)
        wanted = (numbers >= 0) & self._unseen[numbers]
        numbers, reach = numbers[wanted], reach[wanted]
        first = _first_of_each(numbers)
        return numbers[first], reach[first]


def _first_of_each(numbers: Tensor) -> Tensor:
    """Ascending positions (U,) at which a value occurs for the first time in (N,) values."""
    order = numbers.argsort(stable=True)
    ordered = numbers[order]
    new = torch.ones(len(ordered), dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return order[new].sort().values
