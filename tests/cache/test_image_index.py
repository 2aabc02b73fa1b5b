"""Ids to places, in a table or a sorted copy: the same answer for every id."""

import random

import numpy as np
import pytest

from ezsd.cache.storage import image_index
from ezsd.cache.storage.image_index import ImageIndex


@pytest.mark.parametrize("table_bytes", [0, 2**24], ids=["sorted", "table"])
@pytest.mark.parametrize(
    "ids", [[], [7], [0, 1, 2, 3], [5, -3, 2**40, 0, -(2**63), 2**63 - 1], random.Random(0).sample(range(9000), 3000)]
)
def test_each_image_is_found_in_its_place_and_no_other_is(ids, table_bytes, monkeypatch):
    monkeypatch.setattr(image_index, "_TABLE_BYTES", table_bytes)
    monkeypatch.setattr(image_index, "_PIECE", 1000)
    index = ImageIndex(np.array(ids, np.int64))
    assert [index.place(image) for image in ids] == list(range(len(ids)))
    others = {-(2**70), -1, 1, 6, 8, 2**39, 2**63 - 2, 2**63, 2**70, *range(-5, 9005, 7)} - set(ids)
    assert {index.place(image) for image in others} == {-1}


@pytest.mark.parametrize("first", [10**12, -(10**12)])
def test_ids_close_together_take_a_table_wherever_they_begin(first, monkeypatch):
    monkeypatch.setattr(image_index.np, "argsort", lambda *_: pytest.fail("a sorted copy"))
    index = ImageIndex(np.arange(first, first + 1000))
    assert [index.place(first + at) for at in (-1, 0, 999, 1000)] == [-1, 0, 999, -1]


def test_ids_far_apart_take_no_table(monkeypatch):
    monkeypatch.setattr(image_index, "_table", lambda *_: pytest.fail("a table of 2**62 numbers"))
    assert ImageIndex(np.array([2**61, 3, -(2**61)])).place(3) == 1
