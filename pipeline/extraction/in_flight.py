"""Work on several images at a time: one has results on their way to the host while a GPU computes for the other.

Work on an image is a generator. It yields wherever it is about to wait for the device, and returns its result. One
thread does all of it, so that the order of all calls is the same each time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

Work = Generator[None, None, T]


class Fetched:
    """Tensors on their way to the host, together in one copy.

    Args:
        tensors: of one device.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tensors
        self._bytes: Tensor | None = None
        if tensors[0].device.type == "cpu":
            return
        # Wide numbers first: each tensor's bytes then begin at a multiple of its numbers' width.
        self._order = sorted(range(len(tensors)), key=lambda place: -tensors[place].element_size())
        rows = [tensors[place].contiguous().flatten().view(torch.uint8) for place in self._order]
        self._bytes = torch.cat(rows).to("cpu", non_blocking=True)
        self._there = torch.cuda.Event()
        # The copy's own stream: the current device need not be the tensors'.
        self._there.record(torch.cuda.current_stream(tensors[0].device))

    def result(self) -> list[Tensor]:
        """The tensors on the CPU, in the order given; waits until they are there."""
        if self._bytes is None:
            return list(self._tensors)
        self._there.synchronize()
        found: dict[int, Tensor] = {}
        begin = 0
        for place in self._order:
            one = self._tensors[place]
            end = begin + one.numel() * one.element_size()
            found[place] = self._bytes[begin:end].view(one.dtype).reshape(one.shape)
            begin = end
        return [found[place] for place in range(len(self._tensors))]


def finished(work: Work[T]) -> T:
    """The result of one piece of work, done alone."""
    try:
        while True:
            next(work)
    except StopIteration as done:
        result: T = done.value
        return result


def in_flight(works: Iterable[Work[T]], *, most: int) -> Iterator[T]:
    """Results of pieces of work in order. Up to `most` are under way, and go on in turns; an error ends them all."""
    coming = iter(works)
    in_order: deque[_UnderWay[T]] = deque()
    in_turns: deque[_UnderWay[T]] = deque()
    try:
        while True:
            # The device has the next one's work before the host goes on with another.
            while len(in_turns) < most and (work := next(coming, None)) is not None:
                one = _UnderWay(work)
                in_order.append(one)
                if one.goes_on():
                    in_turns.append(one)
            if not in_order:
                return
            if in_turns:
                one = in_turns.popleft()
                if one.goes_on():
                    in_turns.append(one)
            while in_order and in_order[0].done:
                yield in_order.popleft().result
    finally:
        for one in in_order:
            one.close()


class _UnderWay(Generic[T]):
    def __init__(self, work: Work[T]) -> None:
        self._work = work
        self.done = False
        self.result: T

    def goes_on(self) -> bool:
        """Work until the next wait, or to the end: False."""
        try:
            next(self._work)
        except StopIteration as done:
            self.done, self.result = True, done.value
        return not self.done

    def close(self) -> None:
        """Give the work up where it waits."""
        self._work.close()
