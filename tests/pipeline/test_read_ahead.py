"""Reading ahead: in order, one ahead of what is in use, errors where their item comes."""

import threading

import pytest

from ezsd.pipeline.read_ahead import read_ahead


def test_items_come_in_order_with_what_a_thread_reads_of_them():
    begun = [threading.Event() for _ in range(4)]

    def read(item):
        begun[item].set()
        return item * item, threading.get_ident()

    found = []
    for item, result in read_ahead(range(4), read):
        square, thread = result()
        # The next one is read while this one is in use.
        assert item == 3 or begun[item + 1].wait(10)
        assert item > 1 or not begun[item + 2].is_set()
        assert thread != threading.get_ident()
        found.append((item, square))
    assert found == [(0, 0), (1, 1), (2, 4), (3, 9)]
    assert list(read_ahead([], read)) == []


def test_an_error_is_raised_where_its_item_comes():
    def read(item):
        if item == 2:
            raise OSError("gone")
        return item

    items = (result() for _, result in read_ahead(range(4), read))
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(OSError, match="gone"):
        next(items)
