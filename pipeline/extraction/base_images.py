"""Training images with their base boxes, as both trainings of stage one read them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ezsd.data.annotations import Annotations
from ezsd.pipeline.data.image_source import ImageSource
from ezsd.pipeline.data.images import require_few_bad
from ezsd.pipeline.data.requirements import held_out_images
from ezsd.pipeline.devices import is_out_of_memory, said_instead
from ezsd.pipeline.errors import ConfigError, ImageError
from ezsd.pipeline.extraction.read_ahead import read_images

log = logging.getLogger("ezsd")

_UNREAD = torch.zeros(3, 0, 0, dtype=torch.uint8)
_READ_AHEAD = 4
"""Most images that wait for a CPU, which takes longer for one than its reader."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseImages:
    """Images with their base boxes; images that cannot be read are left out, up to a limit."""

    annotations: Annotations
    source: ImageSource
    reader: str
    """Name of the work that reads them, for warnings."""
    most_bad: int = 0
    """Images that may be left out because they cannot be read."""
    bad: dict[int, str] = field(default_factory=dict)
    """Images left out so far, by id, and why."""

    def read(self, position: int) -> Tensor | None:
        """Pixels (3, H, W) uint8 of an image; None when it cannot be read.

        Raises:
            ImageError: it cannot be read, and with it more than may be left out.
        """
        return self._unless_bad(position, lambda: self.source.read(self.annotations.images[position]))

    def ahead(
        self, positions: Iterable[int], *, device: torch.device, known: Collection[int]
    ) -> Generator[tuple[int, Tensor | None], None, None]:
        """Positions in order and their pixels, see `read`. The next images are read while one is worked on.

        An image that is never asked for is never left out, even where it was read ahead. One that is known by the time
        a thread comes to it, which is before its turn, is not read; its pixels are empty then.
        """
        images = self.annotations.images
        reads = read_images(
            positions,
            lambda position: _UNREAD if position in known else self.source.read(images[position]),
            lambda position: images[position].width * images[position].height,
            device=device,
            most=_READ_AHEAD,
        )
        with contextlib.closing(reads):
            for position, pixels in reads:
                yield position, self._unless_bad(position, pixels)

    def _unless_bad(self, position: int, read: Callable[[], Tensor]) -> Tensor | None:
        record = self.annotations.images[position]
        try:
            return read()
        except ImageError as error:
            if not self.most_bad:
                raise
            if record.id not in self.bad:
                log.warning("left out of %s: %s", self.reader, error)
                self.bad[record.id] = str(error)
                require_few_bad(self.bad, self.most_bad)
            return None

    def boxes(self, position: int) -> Tensor:
        """Base boxes (N, 4) of an image, original pixels."""
        return torch.from_numpy(self.annotations.box[self.annotations.rows(position)])

    def split(self, fraction: float, *, seed: int, most: int | None = None) -> tuple[list[int], list[int]]:
        """Split the images that have base boxes into those to train on and those to measure on, see `hold_out`."""
        return hold_out(self.annotations, fraction, seed=seed, most=most)


def hold_out(
    annotations: Annotations, fraction: float, *, seed: int, most: int | None = None
) -> tuple[list[int], list[int]]:
    """Split the images that have base boxes, at random, into those to train on and those to measure on.

    Args:
        annotations: images with their BASE boxes.
        fraction: fraction to measure on, at least one image.
        seed: seed of the choice.
        most: limit of the number to measure on.

    Returns:
        Positions of both, ascending.
    """
    with_boxes = np.unique(annotations.image_index)
    held = held_out_images(len(with_boxes), fraction)
    held = held if most is None else min(held, most)
    order = np.random.default_rng([seed, 0]).permutation(with_boxes)
    return np.sort(order[held:]).tolist(), np.sort(order[:held]).tolist()


@contextlib.contextmanager
def halving_where_memory_is_short(setting: str, value: int, items: str) -> Iterator[None]:
    """Turn a lack of memory into advice to halve the items of a step.

    Raises:
        ConfigError: the memory was too small.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(
            f"{setting}={value}: so many {items} in a step do not fit the memory{said_instead(error)}; use "
            f"`{setting}={max(1, value // 2)}`"
        ) from error
