"""Coverage of objects by proposals."""

import random

import numpy as np
import pytest
import torch

from ezsd.metrics.recall import recall_at


def test_recall_counts_objects_covered_by_the_first_boxes():
    truth = [np.array([[0, 0, 10, 10], [50, 50, 60, 60]], np.float32), np.zeros((0, 4), np.float32)]
    proposals = [np.array([[90, 90, 99, 99], [0, 0, 10, 5], [50, 50, 60, 61]], np.float32), truth[0]]
    assert recall_at(proposals, truth, top=(1, 2, 3)) == {1: 0, 2: 0.5, 3: 1}
    assert recall_at(proposals, truth, iou=0.6, top=(2, 3)) == {2: 0, 3: 0.5}


def test_recall_takes_tensors_and_read_only_arrays_and_any_count():
    boxes = np.array([[0, 0, 10, 10]], np.float32)
    boxes.setflags(write=False)
    assert recall_at([torch.tensor([[0.0, 0.0, 10.0, 10.0]])], [boxes]) == {100: 1, 300: 1}
    assert recall_at([np.zeros((0, 4), np.float32)], [boxes]) == {100: 0, 300: 0}
    assert recall_at([boxes], [np.zeros((0, 4), np.float32)]) == {100: None, 300: None}


@pytest.mark.parametrize(("extra", "message"), [({"iou": 0}, "iou"), ({"top": (0,)}, "every k")])
def test_recall_refuses_senseless_numbers(extra, message):
    boxes = [np.zeros((1, 4), np.float32)]
    with pytest.raises(ValueError, match=message):
        recall_at(boxes, boxes, **extra)
    with pytest.raises(ValueError, match="images"):
        recall_at(boxes, [])


def test_recall_does_not_depend_on_the_order_within_the_first_k():
    rng = random.Random(0)
    corners = [(rng.uniform(0, 80), rng.uniform(0, 80)) for _ in range(30)]
    boxes = np.array([[x, y, x + 15, y + 15] for x, y in corners], np.float32)
    assert recall_at([boxes], [boxes[:5]], top=(30,)) == recall_at([boxes[::-1]], [boxes[:5]], top=(30,)) == {30: 1}
