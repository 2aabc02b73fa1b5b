"""Kinds of errors, case by case, and against the matching that AP is made of."""

from pathlib import Path

import numpy as np
import pytest

from ezsd.data.catalogue import Catalogue, Federated
from ezsd.metrics import Results, Truth
from ezsd.metrics.error_kinds import KINDS, FoundBoxes, TrueBoxes, error_kinds
from ezsd.metrics.judging import found_of_results, judge, objects_of_truth
from ezsd.metrics.matching import is_not_exhaustive, match
from ezsd.vocabulary import Split

CUP, CAT = 0, 1


def sides(table):
    """Left, top, width, height of rows that begin with corners."""
    return np.concatenate([table[:, :2], table[:, 2:4] - table[:, :2]], axis=1)


def truth_of(xywh, label, *, crowd=None, ignore=None, federated=None):
    """Ground truth of one image."""
    none, names = np.zeros(len(xywh), bool), ("cup", "cat", "dog")
    return Truth(
        path=Path("no.json"),
        split=Split(base=names, novel=()),
        image_ids=np.array([1]),
        image_id=np.ones(len(xywh), np.int64),
        class_index=label,
        xywh=xywh,
        area=xywh[:, 2] * xywh[:, 3],
        crowd=none if crowd is None else crowd,
        ignore=none if ignore is None else ignore,
        annotation_id=np.arange(len(xywh)),
        catalogue=Catalogue(ids={name: i for i, name in enumerate(names)}, frequency={}, federated=federated),
        image_size=np.array([[64, 64]]),
        images=None,
    )


def found(*rows):
    """Detections of (x1, y1, x2, y2, class, score)."""
    table = np.array(rows, np.float64).reshape(-1, 6)
    return FoundBoxes(sides(table), table[:, 4].astype(int), table[:, 5])


def true(*rows):
    """Objects of (x1, y1, x2, y2, class, crowd)."""
    table = np.array(rows, np.float64).reshape(-1, 6)
    return TrueBoxes(sides(table), table[:, 4].astype(int), table[:, 5].astype(bool))


CUP_AT_0 = (0, 0, 10, 10, CUP, 0)
CAT_AT_50 = (50, 50, 60, 60, CAT, 0)


@pytest.mark.parametrize(
    ("detection", "kind", "matched", "missed"),
    [
        ((0, 0, 10, 10, CUP, 1), "right", 0, [False, True]),
        ((0, 0, 10, 5, CUP, 1), "right", 0, [False, True]),
        ((0, 0, 10, 4.9, CUP, 1), "misplaced", 0, [False, True]),
        ((0, 0, 10, 1, CUP, 1), "misplaced", 0, [False, True]),
        ((0, 0, 10, 0.9, CUP, 1), "background", -1, [True, True]),
        ((0, 0, 10, 5, CAT, 1), "confused", 0, [False, True]),
        ((0, 0, 10, 4.9, CAT, 1), "confused and misplaced", 0, [True, True]),
        ((0, 0, 10, 0.9, CAT, 1), "background", -1, [True, True]),
        ((20, 20, 30, 30, CAT, 1), "background", -1, [True, True]),
    ],
)
def test_a_detection_has_the_kind_of_its_overlap(detection, kind, matched, missed):
    kinds = error_kinds(found(detection), true(CUP_AT_0, CAT_AT_50))
    assert (kinds.kind.tolist(), kinds.matched.tolist(), kinds.missed.tolist()) == ([kind], [matched], missed)


def test_the_surest_has_the_object_and_the_others_are_doubled():
    kinds = error_kinds(found((0, 0, 10, 9, CUP, 0.3), (0, 0, 10, 6, CUP, 0.9)), true(CUP_AT_0))
    assert kinds.kind.tolist() == ["doubled", "right"]
    assert kinds.matched.tolist() == [0, 0]


def test_the_second_of_two_near_objects_is_not_doubled():
    kinds = error_kinds(
        found((0, 0, 10, 10, CUP, 0.9), (0, 0, 10, 10, CUP, 0.8)), true(CUP_AT_0, (0, 2, 10, 12, CUP, 0))
    )
    assert kinds.kind.tolist() == ["right", "right"]
    assert kinds.matched.tolist() == [0, 1]


def test_kinds_that_both_fit_come_in_the_order_of_the_toolbox():
    """Misplaced before confused, confused before doubled."""
    objects = true(CUP_AT_0, (0, 6, 10, 16, CAT, 0))
    kinds = error_kinds(found((0, 6, 10, 16, CUP, 0.5)), objects)
    assert (kinds.kind.tolist(), kinds.missed.tolist()) == (["misplaced"], [False, True])
    objects = true(CUP_AT_0, (0, 1, 10, 11, CAT, 0))
    kinds = error_kinds(found((0, 0, 10, 10, CUP, 0.9), (0, 0, 10, 10, CUP, 0.5)), objects)
    assert (kinds.kind.tolist(), kinds.matched.tolist()) == (["right", "confused"], [0, 1])


def test_a_crowd_region_forgives_its_class_and_is_never_missed():
    crowd = (0, 0, 100, 100, CUP, 1)
    objects = true(crowd, CUP_AT_0)
    kinds = error_kinds(
        found((0, 0, 10, 10, CUP, 0.9), (0, 0, 10, 9, CUP, 0.8), (70, 70, 80, 80, CUP, 0.7), (0, 0, 9, 9, CAT, 0.6)),
        objects,
    )
    assert kinds.kind.tolist() == ["right", "ignored", "ignored", "confused"]
    assert kinds.matched.tolist() == [1, 0, 0, 1]
    assert error_kinds(found(), objects).missed.tolist() == [False, True]


def test_images_without_detections_or_objects():
    kinds = error_kinds(found(), true())
    assert (len(kinds.kind), len(kinds.matched), len(kinds.missed)) == (0, 0, 0)
    kinds = error_kinds(found((0, 0, 10, 10, CUP, 1)), true())
    assert (kinds.kind.tolist(), kinds.matched.tolist()) == (["background"], [-1])


@pytest.mark.parametrize("thresholds", [(0.5, 0.6), (0.5, 0.0), (1.1, 0.1)])
def test_thresholds_out_of_order_are_refused(thresholds):
    with pytest.raises(ValueError, match="background_iou <= iou <= 1"):
        error_kinds(found(), true(), iou=thresholds[0], background_iou=thresholds[1])


@pytest.mark.parametrize("federated", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_right_and_ignored_are_those_of_ap50(seed, federated):
    rng = np.random.default_rng(seed)
    n, m = 60, 20
    # Whole numbers: equal overlaps occur.
    corner, side = rng.integers(0, 30, (n + m, 2)), rng.integers(5, 20, (n + m, 2))
    xywh = np.concatenate([corner, side], axis=1).astype(np.float64)
    label, score, crowd = rng.integers(0, 3, n + m), rng.integers(0, 8, n) / 8, rng.random(m) < 0.2
    ignore = crowd | (federated & (rng.random(m) < 0.3))
    lists = Federated(not_exhaustive={1: frozenset({2})}) if federated else None
    truth = truth_of(xywh[n:], label[n:], crowd=crowd, ignore=ignore, federated=lists)
    results = Results(image_id=np.ones(n, np.int64), class_index=label[:n], xywh=xywh[:n], score=score, masks=None)
    matches = match(truth, results, np.arange(n))["all"]
    kinds = error_kinds(
        (xywh[:n], label[:n], score),
        TrueBoxes(xywh[n:], label[n:], crowd, ignore),
        not_exhaustive=is_not_exhaustive(truth, results, np.arange(n)),
    )
    true_positive, ignored = matches.matched[0] & ~matches.ignored[0], matches.ignored[0]
    assert (kinds.kind[matches.row] == "right").tolist() == true_positive.tolist()
    assert (kinds.kind[matches.row] == "ignored").tolist() == ignored.tolist()
    assert set(kinds.kind.tolist()) <= set(KINDS)


@pytest.mark.parametrize(
    ("box", "right"),
    [
        # IoU 0.5, a bit more, a bit less. Sides made of corners would differ in the last bit, and fall beyond it.
        ((6.3, 2.6, 19.1, 3.4), True),
        ((63.7, 26.98, 6.84, 5.74), True),
        ((2.83, 12.43, 35.18, 34.12), False),
    ],
)
def test_the_upper_half_of_an_object_is_right_where_ap50_says_so(box, right):
    whole, half = np.array([[*box[:3], 2 * box[3]]]), np.array([box])
    label = np.zeros(1, np.int64)
    truth = truth_of(whole, label)
    results = Results(image_id=np.ones(1, np.int64), class_index=label, xywh=half, score=np.ones(1), masks=None)
    assert match(truth, results, np.arange(1))["all"].matched[0].tolist() == [right]
    errors = judge(objects_of_truth(truth), found_of_results(results, truth))
    assert [KINDS[kind] for kind in errors.kind] == ["right" if right else "misplaced"]
