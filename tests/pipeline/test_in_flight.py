"""Work in turns, and images read ahead: results come in order, and nothing is done that nobody asked for."""

import threading

import pytest
import torch

from ezsd.pipeline.extraction.in_flight import Fetched, finished, in_flight
from ezsd.pipeline.extraction.read_ahead import read_images
from tests.pretend_gpu import GPU, pretend_gpu

CPU = torch.device("cpu")


def work(name, waits, steps):
    for _ in range(waits):
        steps.append(name)
        yield
    steps.append(name)
    return name.upper()


@pytest.mark.parametrize(
    ("most", "order"),
    [(1, "aabccccdd"), (2, "abcadcdcc"), (9, "abcdacdcc")],
)
def test_results_come_in_order_whichever_is_done_first(most, order):
    steps, waits = [], {"a": 1, "b": 0, "c": 3, "d": 1}
    found = list(in_flight((work(name, count, steps) for name, count in waits.items()), most=most))
    assert found == ["A", "B", "C", "D"]
    assert "".join(steps) == order
    assert finished(work("e", 2, steps)) == "E"


def test_an_error_of_one_piece_of_work_ends_all():
    closed = []

    def waiting(name):
        try:
            yield from work(name, 5, [])
        finally:
            closed.append(name)

    def broken():
        yield
        raise ValueError("broken")

    kept = [waiting("a"), waiting("b"), broken()]
    with pytest.raises(ValueError, match="broken"):
        list(in_flight(kept, most=3))
    assert closed == ["a", "b"]


def test_work_that_nobody_waits_for_any_more_is_ended():
    kept = [work(name, waits, []) for name, waits in (("a", 0), ("b", 5))]
    results = in_flight(kept, most=3)
    assert next(results) == "A"
    results.close()
    assert kept[1].gi_frame is None


def test_only_some_small_images_are_read_ahead_for_a_gpu(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})
    asked = []
    with pretend_gpu():
        items = (asked.append(number) or number for number in range(1000))
        read = read_images(items, lambda _: torch.zeros(3, 1, 1), lambda _: 1, device=GPU, most=4)
        next(read)
        read.close()
    assert len(asked) == 9


def test_tensors_of_all_kinds_come_back_from_the_device_as_they_are():
    sent = [torch.rand(3, 5), torch.rand(7, 2).half(), torch.arange(5), torch.zeros(0, 4), torch.rand(4, 3).T]
    assert all(a is b for a, b in zip(Fetched(*sent).result(), sent, strict=True))
    with pretend_gpu() as gpu:
        there = [one.to("cuda") for one in sent]
        with gpu.counting() as counts:
            found = Fetched(*there).result()
    assert counts.waits.total() == 1
    for one, wanted in zip(found, sent, strict=True):
        assert one.dtype == wanted.dtype
        assert torch.equal(one, wanted)


@pytest.mark.parametrize("wide", [1, 2**25])
def test_images_are_read_ahead_in_order_and_only_some(wide):
    asked, free = [], threading.Event()

    def endless():
        for number in range(1000):
            asked.append(number)
            yield number

    def read(number):
        free.wait(10)
        if number == 2:
            raise OSError("no such image")
        return torch.full((3, 1, 1), number)

    reads = read_images(endless(), read, lambda _: wide, device=CPU, most=4)
    free.set()
    for expected in range(5):
        number, result = next(reads)
        assert number == expected
        if number == 2:
            with pytest.raises(OSError, match="no such image"):
                result()
        else:
            assert int(result()[0]) == number
    assert len(asked) == (9 if wide == 1 else 7)
    reads.close()
    assert not [one for one in threading.enumerate() if one.name.startswith("read-ahead")]
