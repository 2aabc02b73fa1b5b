"""Box voting."""

import pytest
import torch

from ezsd.proposals.refine import vote

BOXES = torch.tensor([[0.0, 0, 10, 10], [2, 0, 12, 10], [0, 4, 10, 14], [50, 50, 60, 60]])


def test_a_box_becomes_the_mean_of_those_around_it_weighted_by_score():
    score = torch.tensor([3.0, 1.0, 0.0, 1.0])
    boxes, kept = vote(BOXES, score, refine_iou=0.3, nms_iou=0.9)
    # Both of the first two move to one place, where NMS keeps the better.
    assert boxes[:2].tolist() == [[0.5, 0, 10.5, 10], [50, 50, 60, 60]]
    assert kept[:2].tolist() == [3, 1]


def test_a_box_below_the_overlap_has_no_vote_and_a_lonely_one_stays():
    boxes, score = vote(BOXES, torch.ones(4), refine_iou=0.9, nms_iou=1.0)
    assert boxes.tolist() == BOXES.tolist()
    assert score.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("score", [[0.0, 0.0, 0.0, 0.0], [-1.0, -1.0, -2.0, -3.0]])
def test_scores_without_a_vote_move_nothing(score):
    boxes, _ = vote(BOXES, torch.tensor(score), refine_iou=0.3, nms_iou=1.0)
    assert boxes.tolist() == BOXES.tolist()


def test_no_boxes_are_none():
    boxes, score = vote(torch.zeros(0, 4), torch.zeros(0), refine_iou=0.3, nms_iou=0.7)
    assert (boxes.shape, score.shape) == ((0, 4), (0,))
