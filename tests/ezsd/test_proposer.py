"""The learned proposer alone: it finds what it was shown, says how sure it is, and learns from base boxes only."""

import pytest
import torch

from ezsd.boxes import iou
from ezsd.detector.backbone import build_backbone
from ezsd.detector.proposer import Proposer

SIDE, STEPS = 64, 80


def scenes(count, seed):
    """Grey images with one bright square each, (N, 3, S, S), and the squares, (N, 4)."""
    generator = torch.Generator().manual_seed(seed)
    images, boxes = torch.full((count, 3, SIDE, SIDE), 0.4), torch.zeros(count, 4)
    for image, box in zip(images, boxes, strict=True):
        size = int(torch.randint(18, 30, (1,), generator=generator))
        x, y = torch.randint(0, SIDE - size, (2,), generator=generator).tolist()
        image[:, y : y + size, x : x + size] = 0.9
        box[:] = torch.tensor([x, y, x + size, y + size])
    return images, boxes


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    proposer = Proposer(build_backbone("tiny", channels=16, weights=None), (20, 32), proposals=7)
    optimiser = torch.optim.AdamW(proposer.parameters(), 4e-3)
    # At a rate that does not fall, the last steps decide how well boxes lie, and with them the rounding of a processor.
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1, 0.05, STEPS)
    for step in range(STEPS):
        images, boxes = scenes(8, step)
        optimiser.zero_grad()
        proposer(images, [(SIDE, SIDE)] * 8, list(boxes[:, None])).backward()
        optimiser.step()
        schedule.step()
    return proposer.eval()


def test_the_best_box_lies_on_the_object(trained):
    images, objects = scenes(6, 1000)
    proposed = trained.propose(images, [(SIDE, SIDE)] * 6)
    overlap = torch.stack(
        [iou(box[:1], target[None])[0, 0] for (box, _), target in zip(proposed, objects, strict=True)]
    )
    assert overlap.min() > 0.4


def test_scores_are_those_of_the_boxes_best_first(trained):
    images, _ = scenes(3, 2000)
    for boxes, score in trained.propose(images, [(SIDE, SIDE)] * 3):
        assert boxes.shape == (len(score), 4)
        assert 1 <= len(score) <= 7
        assert ((score >= 0) & (score <= 1)).all()
        assert torch.equal(score, score.sort(descending=True).values)


def test_an_image_is_proposed_for_as_it_would_be_alone(trained):
    images, _ = scenes(2, 3000)
    (boxes, score), _ = trained.propose(images, [(SIDE, SIDE)] * 2)
    ((alone, alone_score),) = trained.propose(images[:1], [(SIDE, SIDE)])
    torch.testing.assert_close(boxes, alone, atol=1e-3, rtol=0)
    torch.testing.assert_close(score, alone_score, atol=1e-4, rtol=0)
