"""The detector as one function of tensors detects as `Detector.detect_each` does, with every head and setting."""

import pytest
import torch
import torch.nn.functional as F

from ezsd.detector.exportable import ExportableDetector, pool
from ezsd.detector.model import Vocabulary
from ezsd.kernels import Pooling, roi_align
from tests.ezsd.test_detector import DIM, make_detector

INFERENCE = {"score_floor": 0.05, "nms_iou": 0.5, "keep": 40, "class_agnostic_nms": False, "objectness": 0.0}


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def lively_detector(**changes):
    """A detector whose proposals, scores and boxes differ from region to region."""
    detector = make_detector(**changes).eval()
    with torch.no_grad():
        for layer in (detector.rpn.head.cls_logits, detector.rpn.head.bbox_pred, detector.head.regressor.deltas):
            layer.weight.normal_(std=0.2)
    return detector


@pytest.mark.parametrize(
    ("model", "inference"),
    [
        ({}, {}),
        ({"head": "paper", "semantic_boxes": False}, {}),
        ({"box_class": "reference"}, {"class_agnostic_nms": True}),
        ({"box_class": "topk"}, {"objectness": 0.4}),
        ({"masks": True}, {"keep": 3}),
        # More proposals than a level has anchors.
        ({"rpn_proposals": 400}, {}),
    ],
)
def test_detections_are_those_of_the_detector(model, inference):
    detector, inference = lively_detector(**model), INFERENCE | inference
    masks = detector.mask_head is not None
    images = torch.randint(0, 256, (2, 3, 61, 94), dtype=torch.uint8)
    text = F.normalize(torch.randn(5, DIM), dim=1)
    padded = F.pad(images, (0, 2, 0, 3))
    expected = detector.detect_each(padded, [(61, 94)] * 2, [Vocabulary(text=text)], masks=masks, **inference)[0]
    with torch.no_grad():
        outputs = ExportableDetector(detector, pad_multiple=32, masks=masks, **inference)(images, text)
    assert len(outputs) == 4 + masks
    for place, one in enumerate(expected):
        assert len(one.boxes)
        mine = [output[outputs[3] == place] for output in outputs]
        torch.testing.assert_close(mine[0], one.boxes, atol=1e-3, rtol=1e-5)
        torch.testing.assert_close(mine[1], one.scores, atol=1e-5, rtol=1e-4)
        assert torch.equal(mine[2], one.labels)
        if masks:
            torch.testing.assert_close(mine[4], one.masks, atol=1e-4, rtol=1e-4)


def test_nothing_found_is_no_rows():
    detector = lively_detector(masks=True)
    graph = ExportableDetector(detector, pad_multiple=32, masks=True, **(INFERENCE | {"score_floor": 1.1}))
    with torch.no_grad():
        outputs = graph(torch.zeros(1, 3, 40, 40, dtype=torch.uint8), F.normalize(torch.randn(2, DIM), dim=1))
    assert [tuple(one.shape) for one in outputs] == [(0, 4), (0,), (0,), (0,), (0, 28, 28)]


def test_pooling_is_that_of_the_operator():
    pooling = Pooling(spatial_scale=(1 / 8, 1 / 16), output_size=3, canonical_size=32, backend="eager")
    maps = [torch.randn(2, 4, 8, 12), torch.randn(2, 4, 4, 6)]
    corner = torch.rand(20, 2) * 60
    boxes = torch.cat([corner, corner + 1 + torch.rand(20, 2) * 50], 1)
    index = torch.arange(20) % 2
    torch.testing.assert_close(pool(maps, boxes, index, pooling), roi_align(maps, boxes, index, pooling))
