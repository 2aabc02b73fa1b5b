"""Images read by threads while others are worked on."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

import torch
from torch import Tensor

from ezsd.pipeline.devices import usable_cores
from ezsd.pipeline.read_ahead import read_ahead

T = TypeVar("T")

_MOST_PIXELS = 2**26
"""Most pixels of images that wait to be used; 200 of COCO's, three bytes each."""
_MOST_READERS = 16
_PER_READER = 4
"""Most images that wait for a GPU, for each thread that reads."""


def reading_threads(device: torch.device) -> int:
    """Number of threads that read images for a device: a GPU wants more of them a second than one thread decodes."""
    if device.type == "cpu":
        return 1
    return min(_MOST_READERS, usable_cores())


def read_images(
    items: Iterable[T], read: Callable[[T], Tensor], pixels: Callable[[T], int], *, device: torch.device, most: int
) -> Generator[tuple[T, Callable[[], Tensor]], None, None]:
    """Images of items in order, see `read_ahead`, as a device wants them.

    Args:
        items: may be endless; asked for as many as are read ahead.
        read: reads one image (3, H, W) uint8, on any thread.
        pixels: size of an item's image; images that wait have a limited number together.
        device: where the images are going; for a GPU they wait in page-locked memory.
        most: limit of images that wait for a CPU; for a GPU it is a few for each reading thread.
    """

    def ready(item: T) -> Tensor:
        image = read(item)
        return image if device.type == "cpu" else image.pin_memory()

    readers = reading_threads(device)
    limit = most if device.type == "cpu" else _PER_READER * readers
    return read_ahead(items, ready, threads=readers, most=limit, size=pixels, most_size=_MOST_PIXELS)
