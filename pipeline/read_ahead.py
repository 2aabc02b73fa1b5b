"""Reading by threads ahead of what is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Read = TypeVar("Read")


def read_ahead(
    items: Iterable[Item],
    read: Callable[[Item], Read],
    *,
    threads: int = 1,
    most: int = 1,
    size: Callable[[Item], int] = lambda _: 0,
    most_size: int = 0,
) -> Generator[tuple[Item, Callable[[], Read]], None, None]:
    """Items in order, each with a function that returns what was read of it, or raises why it was not.

    Args:
        items: may be endless; asked for as many as are read ahead.
        read: reads one item, on any thread.
        threads: that read.
        most: items that wait while one is in use.
        size: of an item; those that wait have a limited size together.
        most_size: that limit.
    """
    waiting: deque[tuple[Item, Future[Read]]] = deque()
    held = 0
    with ThreadPoolExecutor(threads, thread_name_prefix="read-ahead") as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(read, item)))
                held += size(item)
                while len(waiting) > 1 and (held > most_size or len(waiting) > most):
                    first, future = waiting.popleft()
                    held -= size(first)
                    yield first, future.result
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result
        finally:
            for _, future in waiting:
                future.cancel()
