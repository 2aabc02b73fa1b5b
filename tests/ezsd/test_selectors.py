"""Which anchors of the method's grid are looked at: where they lie, how many, and whether a good one is found."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from ezsd.proposals.search import Lattice, coarse_to_fine_rounds, grown_stride, in_grid_order, thinned
from ezsd.proposals.select import faithful_anchors, faithful_cells

SIZES, RATIOS = (32.0, 64.0, 128.0, 256.0, 512.0), (0.5, 1.0, 2.0)


def lattice_of(width, height):
    _, rows, columns = faithful_cells(width, height, stride=32)
    return Lattice(rows=rows, columns=columns, sizes=SIZES, ratios=RATIOS, stride=32)


COCO = lattice_of(640, 480)


def everywhere(lattice):
    return torch.ones(len(lattice), dtype=torch.bool)


class Teacher:
    """Scores by anchor number, and remembers what it was asked."""

    def __init__(self, score):
        self.score, self.asked = score, []

    def look(self, anchors):
        self.asked += anchors.tolist()
        return self.score[anchors], anchors[:, None].float()


def search(lattice, score, *, allowed=None, growth=0.5, passes=1275):
    teacher = Teacher(score)
    allowed = everywhere(lattice) if allowed is None else allowed
    rounds = coarse_to_fine_rounds(lattice, allowed, growth=growth, passes=passes)
    anchors, parts = next(rounds), []
    while anchors is not None:
        score, embedding = teacher.look(anchors)
        parts.append((anchors, embedding))
        try:
            anchors = rounds.send(score)
        except StopIteration:
            anchors = None
    return in_grid_order(parts), teacher


@pytest.mark.parametrize(("width", "height"), [(640, 480), (480, 640), (602, 456), (1333, 800)])
def test_anchor_numbers_are_the_faithful_grids(width, height):
    lattice = lattice_of(width, height)
    boxes = faithful_anchors(width, height, short_side=800)
    assert len(lattice) == len(boxes)
    scale, _, _ = faithful_cells(width, height, stride=32)
    row, column, size, ratio = lattice.places().unbind(1)
    inside = (boxes[:, :2] > 0).all(1) & (boxes[:, 2] < width) & (boxes[:, 3] < height)
    centre = (boxes[inside, :2] + boxes[inside, 2:]) / 2 * scale
    torch.testing.assert_close(centre, torch.stack([column, row], 1)[inside] * 32.0, atol=1e-2, rtol=0)
    extent = (boxes[inside, 2:] - boxes[inside, :2]) * scale
    torch.testing.assert_close(extent.prod(1).sqrt(), torch.tensor(SIZES)[size[inside]], atol=1e-2, rtol=0)
    torch.testing.assert_close(extent[:, 1] / extent[:, 0], torch.tensor(RATIOS)[ratio[inside]], atol=1e-3, rtol=0)
    assert lattice.anchors(lattice.places()).tolist() == list(range(len(lattice)))


def test_places_outside_the_grid_have_no_anchor():
    outside = torch.tensor([[-1, 0, 0, 0], [25, 0, 0, 0], [0, 34, 0, 0], [0, 0, 5, 0], [0, 0, -1, 0], [0, 0, 0, 3]])
    assert COCO.anchors(outside).tolist() == [-1] * 6


@pytest.mark.parametrize(
    ("growth", "count"),
    # 25 x 34 cells; every second row and column are 13 x 17, every fourth 7 x 9, every eighth 4 x 5, then 2 x 3.
    [(0.01, 12_750), (0.5, 3 * (850 + 850 + 221 + 63 + 20)), (1.0, 3 * (850 + 221 + 63 + 20 + 6))],
)
def test_the_spacing_grows_with_the_size(growth, count):
    chosen = grown_stride(COCO, growth=growth)
    assert len(chosen) == count
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    row, column, size, _ = COCO.places()[chosen].unbind(1)
    for number, pixels in enumerate(SIZES):
        for axis in (row, column):
            gaps = axis[size == number].unique().diff()
            assert set(gaps.tolist()) == {max(1, round(growth * pixels / 32))}


def test_a_thinned_grid_keeps_to_the_middle():
    chosen = thinned(COCO, torch.tensor([4, 4, 4, 4, 4]), [1])
    for axis, limit in zip(COCO.places()[chosen].T[:2], (25, 34), strict=True):
        assert abs(int(axis.min()) - (limit - 1 - int(axis.max()))) <= 1
    assert set(COCO.places()[chosen, 3].tolist()) == {1}


@settings(max_examples=30)
@given(passes=st.integers(1, 1500), growth=st.sampled_from([0.25, 0.5, 2.0]), seed=st.integers(0, 9))
def test_a_search_looks_at_no_anchor_twice_and_at_no_more_than_it_may(passes, growth, seed):
    score = torch.rand(len(COCO), generator=torch.Generator().manual_seed(seed))
    looked, teacher = search(COCO, score, growth=growth, passes=passes)
    assert len(teacher.asked) == passes == len(set(teacher.asked))
    assert looked.anchor.tolist() == sorted(teacher.asked)
    assert looked.embedding[:, 0].tolist() == looked.anchor.tolist(), "each embedding is its own anchor's"


def test_a_search_ends_where_the_grid_does():
    small = Lattice(rows=3, columns=4, sizes=(32.0, 64.0), ratios=(1.0,), stride=32)
    looked, _ = search(small, torch.zeros(len(small)), passes=10_000)
    assert len(looked.anchor) <= len(small)


def test_what_is_not_allowed_is_not_looked_at():
    score, allowed = torch.rand(len(COCO)), everywhere(COCO)
    allowed[::3] = False
    looked, _ = search(COCO, score, allowed=allowed)
    assert allowed[looked.anchor].all()
    empty, teacher = search(COCO, score, allowed=torch.zeros(len(COCO), dtype=torch.bool))
    assert len(empty.anchor) == len(teacher.asked) == 0


def planted(target):
    """One object: scores fall with the distance to the anchor that fits it, as they do around a real one."""
    places, goal = COCO.places().float(), torch.tensor(target).float()
    size = torch.tensor(SIZES)[places[:, 2].long()] / 32
    return -((places[:, :2] - goal[:2]) / size[:, None]).norm(dim=1) - (places[:, 2:] - goal[2:]).abs().sum(1)


@pytest.mark.parametrize("target", [(3, 5, 2, 0), (12, 17, 1, 2), (20, 30, 0, 1), (11, 9, 3, 2), (23, 31, 2, 1)])
def test_a_promising_place_is_looked_at_closely(target):
    anchor, boxes = int(COCO.anchors(torch.tensor([target]))), faithful_anchors(640, 480)
    around = COCO.anchors(torch.tensor([target]) + torch.tensor([[r, c, 0, 0] for r in (-1, 0, 1) for c in (-1, 0, 1)]))
    sparse = thinned(COCO, COCO.steps(0.5, least=2), [1])
    fit = box_iou(boxes[anchor][None], boxes)[0]
    tenth, _ = search(COCO, planted(target), passes=1275)
    assert fit[tenth.anchor].max() > max(0.6, fit[sparse].max() - 1e-6)
    assert torch.isin(around, tenth.anchor).sum() > torch.isin(around, sparse).sum()
    third, _ = search(COCO, planted(target), passes=4250)
    assert torch.isin(around, third.anchor).all()


def test_the_rest_of_the_passes_goes_where_scores_are_high():
    """The left third of the image is promising: most of what is not on the sparse grid lies there."""
    column = COCO.places()[:, 1]
    looked, _ = search(COCO, (column < 11).float(), passes=1275)
    sparse = thinned(COCO, COCO.steps(0.5, least=2), [1])
    refined = looked.anchor[~torch.isin(looked.anchor, sparse)]
    assert len(refined) > 400
    assert (column[refined] < 12).float().mean() > 0.9


def test_fewer_passes_than_the_sparse_grid_has_are_spread_over_it():
    looked, _ = search(COCO, torch.zeros(len(COCO)), passes=60)
    rows = COCO.places()[looked.anchor, 0]
    assert len(looked.anchor) == 60
    assert rows.min() < 5
    assert rows.max() > 20
