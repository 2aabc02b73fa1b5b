"""Reading ahead of what is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Read = TypeVar("Read")


def read_ahead(read: Callable[[Item], Read], items: Iterable[Item]) -> Iterator[tuple[Item, Read]]:
    """Iterate over items and what a thread reads of each, one ahead of the item in use.

    An error of reading is raised where its item would come.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
        earlier = None
        for item in items:
            ahead = item, reader.submit(read, item)
            if earlier is not None:
                yield earlier[0], earlier[1].result()
            earlier = ahead
        if earlier is not None:
            yield earlier[0], earlier[1].result()
