"""Samples: boxes follow their pixels, draws depend on (seed, epoch, image) alone, epochs are whole and resumable."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ezsd.boxes import flip_horizontal
from ezsd.data.dataset import (
    DetectionDataset,
    Key,
    PseudoLabels,
    collate,
    epoch_order,
    pad_images,
    repeat_factors,
    resize,
)
from ezsd.data.transforms import Augmentation, boxes_in_window
from ezsd.detector.masks import GRID, ObjectMasks

DIM = 6
SIZES = {4: (40, 60), 9: (64, 48), 30: (33, 90)}
"""Height and width by image id."""


@dataclass(frozen=True)
class Record:
    """What a cache holds of one image, as truth or as regions."""

    box: np.ndarray
    class_index: np.ndarray
    confidence: np.ndarray
    embedding: np.ndarray
    score: np.ndarray | None = None


def record(image_id, count, *, salt):
    """Boxes whose number n is readable from every field: class n, confidence (n + 1) / 100, embedding (n, id, ...)."""
    height, width = SIZES[image_id]
    rng = np.random.default_rng([image_id, salt])
    corner = rng.uniform(0, [width / 2, height / 2], (count, 2))
    box = np.concatenate([corner, corner + rng.uniform(4, [width / 2, height / 2], (count, 2))], 1)
    embedding = np.zeros((count, DIM), np.float16)
    embedding[:, 0], embedding[:, 1], embedding[:, 2] = np.arange(count), image_id, salt
    number = np.arange(count)
    return Record(box.astype(np.float32), number.astype(np.int32), ((number + 1) / 100).astype(np.float32), embedding)


def paint(image_id):
    generator = torch.Generator().manual_seed(image_id)
    return torch.randint(0, 256, (3, *SIZES[image_id]), dtype=torch.uint8, generator=generator)


def make(image_ids=(4, 9, 30), *, truths=3, regions=10, read=paint, **changes):
    options = {"regions_per_image": 4, "short_side": 0, "long_side": 0, "seed": 0} | changes
    truth = {i: record(i, truths, salt=1) for i in image_ids}
    cached = {i: record(i, regions, salt=2) for i in image_ids}
    return DetectionDataset(image_ids, read, SIZES.__getitem__, truth, cached, **options)


def is_flipped(sample, image_id):
    plain = paint(image_id)
    assert torch.equal(sample.image, plain) != torch.equal(sample.image, plain.flip(2))
    return not torch.equal(sample.image, plain)


def one_painted_box(**settings):
    """A dataset of one dark image whose one object, a cached region too, is white."""
    box = np.array([[12, 7, 34, 29]], np.float32)

    def read(_):
        image = torch.zeros(3, *SIZES[4], dtype=torch.uint8)
        image[:, 7:29, 12:34] = 255
        return image

    one = Record(box, np.zeros(1, np.int32), np.ones(1, np.float32), np.zeros((1, DIM), np.float16))
    return DetectionDataset([4], read, SIZES.__getitem__, {4: one}, {4: one}, regions_per_image=1, seed=0, **settings)


@pytest.mark.parametrize(("short_side", "long_side"), [(0, 0), (80, 100), (25, 1000), (37, 50)])
def test_a_painted_box_stays_under_its_pixels(short_side, long_side):
    dataset = one_painted_box(short_side=short_side, long_side=long_side)
    middles = set()
    for epoch in range(12):
        sample = dataset[epoch, 0]
        bright = sample.image[0] > 127
        columns, rows = torch.nonzero(bright.any(0))[:, 0], torch.nonzero(bright.any(1))[:, 0]
        painted = torch.tensor([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]])
        assert (sample.boxes - painted).abs().max() <= 0.75
        assert torch.equal(sample.region_boxes, sample.boxes.expand(2, 4))
        middles.add(round(columns.double().mean().item()))
    assert len(middles) == 2, "in twelve epochs an image is seen both ways round"


@pytest.mark.parametrize(
    "how", [Augmentation(short_side_min=30), Augmentation(jitter=(0.3, 2.0))], ids=["multi-scale", "jitter"]
)
def test_a_painted_box_stays_under_its_pixels_at_any_size_and_in_any_window(how):
    dataset = one_painted_box(short_side=60, long_side=90, augmentation=how)
    sizes, shown = set(), 0
    for epoch in range(40):
        sample = dataset[epoch, 0]
        sizes.add(sample.image.shape)
        assert max(sample.image.shape[1:]) <= 90
        assert len(sample.boxes) == len(sample.labels)
        assert len(sample.region_boxes) == len(sample.region_target) == len(sample.region_confidence)
        bright = sample.image[0] > 127
        columns, rows = torch.nonzero(bright.any(0))[:, 0], torch.nonzero(bright.any(1))[:, 0]
        if len(sample.boxes) and len(columns) and len(rows):
            painted = torch.tensor([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]])
            assert (sample.boxes - painted).abs().max() <= 1.6
            shown += 1
    assert len(sizes) > 8
    assert shown > 10


def test_a_window_shows_a_share_of_each_box():
    boxes = torch.tensor([[0.0, 0, 10, 10], [10, 10, 20, 20], [5, 5, 15, 15], [90, 90, 95, 95]])
    inside, share = boxes_in_window(boxes, (5, 5, 20, 10))
    assert inside.tolist() == [[0, 0, 5, 5], [5, 5, 15, 10], [0, 0, 10, 10], [20, 10, 20, 10]]
    assert share.tolist() == [0.25, 0.5, 1, 0]


def test_regions_of_which_a_window_leaves_little_are_not_distilled():
    dataset = make([4], augmentation=Augmentation(jitter=(3.0, 3.0)), short_side=60, long_side=60, regions_per_image=10)
    counts = set()
    for epoch in range(20):
        sample = dataset[epoch, 0]
        counts.add(len(sample.region_boxes))
        assert (sample.region_target[:, 1] == 4).all()
    assert min(counts) < 13


def test_all_regions_are_handed_on_whether_drawn_or_not():
    for augmentation in (None, Augmentation(jitter=(0.5, 2.0))):
        dataset = make([4], regions_per_image=2, short_side=60, long_side=60, augmentation=augmentation)
        drawn = set()
        for epoch in range(20):
            sample = dataset[epoch, 0]
            rows = [
                tuple(row) for row in torch.cat([sample.cached_boxes, sample.cached_confidence[:, None]], 1).tolist()
            ]
            own = torch.cat([sample.region_boxes, sample.region_confidence[:, None]], 1).tolist()
            assert {tuple(row) for row in own} <= set(rows)
            assert len(rows) == 13 or augmentation is not None
            drawn |= {row[4] for row in map(tuple, own)}
        # In any one epoch two regions and the ground truth's confidence of one, in all most regions.
        assert len(drawn) > 6


def test_a_samples_size_is_known_before_it_is_read():
    for augmentation in (None, Augmentation(jitter=(0.3, 3.0)), Augmentation(short_side_min=20)):
        dataset = make(short_side=50, long_side=70, augmentation=augmentation)
        for epoch, position in itertools.product(range(8), range(3)):
            assert dataset[epoch, position].image.shape[1:] == dataset.size(epoch, position)


def test_a_batch_is_as_large_as_its_samples_are_asked_to_be():
    dataset = make()
    plain = collate([dataset[0, 0]]).images
    wide = collate([dataset[Key(0, 0, (200, 70))]]).images
    assert wide.shape[2:] == (224, 96)
    assert torch.equal(wide[:, :, : plain.shape[2], : plain.shape[3]], plain)
    assert wide.sum() == plain.sum()


def test_seeds_are_one_per_image_and_epoch_and_only_when_asked_for():
    assert collate([make()[0, p] for p in range(3)]).seeds is None
    seeded = make(seeded=True)
    seeds = [collate([seeded[epoch, p] for p in range(3)]).seeds for epoch in range(4)]
    assert len({seed for some in seeds for seed in some}) == 12
    assert collate([seeded[2, 1], seeded[2, 0]]).seeds == (seeds[2][1], seeds[2][0])


def test_resizing_fits_both_limits_and_says_by_how_much():
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    assert [resize(image, short_side=s, long_side=b)[0].shape for s, b in ((80, 1000), (80, 90), (0, 90))] == [
        (3, 80, 120),
        (3, 60, 90),
        (3, 40, 60),
    ]
    out, sx, sy = resize(image, short_side=37, long_side=1000)
    assert out.dtype == torch.uint8
    assert (sx, sy) == (out.shape[2] / 60, out.shape[1] / 40)


def test_flipping_twice_is_identity():
    dataset = make([4])
    seen = {is_flipped(sample, 4): sample for sample in (dataset[epoch, 0] for epoch in range(12))}
    plain, flipped = seen[False], seen[True]
    width = SIZES[4][1]
    assert torch.equal(flipped.image.flip(2), plain.image)
    torch.testing.assert_close(flip_horizontal(flipped.boxes, width), plain.boxes)
    originals = torch.from_numpy(dataset.regions[4].box)
    drawn = flipped.region_target[3:, 0].long()
    torch.testing.assert_close(flip_horizontal(flipped.region_boxes[3:], width), originals[drawn])
    assert torch.equal(plain.boxes, torch.from_numpy(dataset.ground_truth[4].box))


def test_ground_truth_comes_first_with_confidence_one():
    sample = make([9])[0, 0]
    assert torch.equal(sample.region_boxes[:3], sample.boxes)
    assert sample.region_confidence[:3].tolist() == [1, 1, 1]
    assert sample.region_target[:3, 2].tolist() == [1, 1, 1]
    assert sample.region_target[3:, 2].tolist() == [2, 2, 2, 2]
    assert sample.labels.tolist() == [0, 1, 2]
    assert sample.labels.dtype == torch.int64


def test_targets_and_confidences_stay_with_their_boxes():
    dataset = make()
    for position, image_id in enumerate(SIZES):
        for epoch in range(6):
            sample = dataset[epoch, position]
            number = sample.region_target[:, 0].long()
            assert number[:3].tolist() == [0, 1, 2]
            assert sample.region_target.dtype == torch.float16
            assert (sample.region_target[:, 1] == image_id).all()
            truth, cached = dataset.ground_truth[image_id], dataset.regions[image_id]
            expected = torch.from_numpy(np.concatenate([truth.box, cached.box[number[3:].numpy()]]))
            if is_flipped(sample, image_id):
                expected = flip_horizontal(expected, SIZES[image_id][1])
            torch.testing.assert_close(sample.region_boxes, expected)
            torch.testing.assert_close(sample.region_confidence[3:], (number[3:] + 1) / 100)


def drawn(sample, truths=3):
    return sample.region_target[truths:, 0].int().tolist()


def test_regions_are_drawn_without_replacement():
    dataset = make()
    draws = [drawn(dataset[epoch, position]) for epoch in range(20) for position in range(3)]
    assert all(len(set(one)) == 4 for one in draws)
    assert {number for one in draws for number in one} == set(range(10))


def test_all_regions_are_taken_when_there_are_fewer_than_wanted():
    assert drawn(make(regions=3)[5, 1]) == [0, 1, 2]
    assert drawn(make(regions_per_image=10)[5, 1]) == list(range(10))


def test_a_draw_depends_on_seed_epoch_and_image_only():
    dataset, reordered, other_seed = make(), make((30, 4, 9)), make(seed=1)

    def draws(source, position):
        return [(drawn(sample), sample.region_boxes.tolist()) for sample in (source[e, position] for e in range(8))]

    first = draws(dataset, 0)
    assert draws(dataset, 0) == first
    assert draws(reordered, 1) == first
    assert len({tuple(numbers) for numbers, _ in first}) > 4
    assert draws(other_seed, 0) != first
    assert [numbers for numbers, _ in draws(dataset, 1)] != [numbers for numbers, _ in first]


def test_the_global_random_state_changes_nothing():
    torch.manual_seed(1)
    first = make()[3, 1]
    torch.manual_seed(2)
    second = make()[3, 1]
    assert torch.equal(first.region_boxes, second.region_boxes)
    assert torch.equal(first.image, second.image)


@pytest.mark.parametrize(("truths", "regions"), [(0, 0), (0, 5), (2, 0)])
def test_images_may_lack_boxes_or_regions(truths, regions):
    dataset = make(truths=truths, regions=regions, short_side=50, long_side=80)
    samples = [dataset[epoch, 0] for epoch in range(4)]
    kept = truths + min(regions, 4)
    for sample in samples:
        assert sample.boxes.shape == (truths, 4)
        assert sample.labels.shape == (truths,)
        assert sample.region_boxes.shape == (kept, 4)
        assert sample.region_target.shape == (kept, DIM)
        assert sample.region_confidence.shape == (kept,)
    batch = collate(samples)
    assert batch.region_boxes.shape == (4 * kept, 4)
    assert batch.region_image.tolist() == [image for image in range(4) for _ in range(kept)]


def test_a_batch_is_padded_to_multiples_of_32_with_zeros():
    dataset = make()
    samples = [dataset[0, position] for position in range(3)]
    batch = collate(samples)
    assert batch.images.shape == (3, 3, 64, 96)
    assert batch.images.dtype == torch.uint8
    assert batch.sizes == [SIZES[i] for i in (4, 9, 30)]
    for padded, sample, (height, width) in zip(batch.images, samples, batch.sizes, strict=True):
        assert torch.equal(padded[:, :height, :width], sample.image)
        assert (padded[:, height:] == 0).all()
        assert (padded[:, :, width:] == 0).all()


def test_an_image_of_whole_cells_is_not_padded():
    assert pad_images([torch.zeros(3, 64, 96, dtype=torch.uint8)])[0].shape == (1, 3, 64, 96)
    assert pad_images([torch.zeros(3, 65, 97, dtype=torch.uint8)])[0].shape == (1, 3, 96, 128)


def test_a_batch_keeps_the_regions_of_each_image_together():
    dataset = make()
    samples = [dataset[0, position] for position in (2, 0)]
    batch = collate(samples)
    assert batch.region_image.tolist() == [0] * 7 + [1] * 7
    assert batch.region_target[:, 1].tolist() == [30] * 7 + [4] * 7
    assert torch.equal(batch.region_boxes[7:], samples[1].region_boxes)
    assert torch.equal(batch.region_confidence[:7], samples[0].region_confidence)
    assert torch.equal(batch.boxes[1], samples[1].boxes)
    assert torch.equal(batch.labels[0], samples[0].labels)


def order(images=7, per_step=3, first_step=0, steps=20, seed=0, repeats=None):
    return list(epoch_order(images, per_step=per_step, first_step=first_step, steps=steps, seed=seed, repeats=repeats))


@given(st.integers(1, 12), st.integers(1, 15), st.integers(0, 5))
def test_every_image_comes_once_per_epoch(images, per_step, seed):
    batches = order(images, per_step, steps=3 * images, seed=seed)
    assert all(len(batch) == per_step for batch in batches)
    flat = [key for batch in batches for key in batch]
    assert len(flat) == 3 * images * per_step
    # So many steps make whole epochs.
    assert sorted(flat) == [(epoch, position) for epoch in range(3 * per_step) for position in range(images)]
    assert [epoch for epoch, _ in flat] == sorted(epoch for epoch, _ in flat)


@given(st.integers(0, 20))
def test_an_epoch_order_resumes_mid_way_identically(first_step):
    assert order(first_step=first_step) == order()[first_step:]


@given(st.integers(1, 9), st.integers(1, 7), st.integers(0, 4), st.integers(0, 9))
def test_the_order_of_an_epoch_is_a_permutation_of_its_seed(images, per_step, seed, first_step):
    drawn = [divmod(n, images) for n in range(first_step * per_step, 10 * per_step)]
    expected = [
        (epoch, int(np.random.default_rng([seed, 1, epoch]).permutation(images)[place])) for epoch, place in drawn
    ]
    found = order(images, per_step, first_step=first_step, steps=10, seed=seed)
    assert [key for batch in found for key in batch] == expected
    assert order(images, per_step, first_step=first_step, steps=10, seed=seed, repeats=np.ones(images)) == found


FACTORS = np.array([1.0, 2.0, 1.25, 3.5, 1.0])


def test_images_come_as_often_as_their_factors_say():
    flat = [position for batch in order(5, 1, steps=4000, repeats=FACTORS) for _, position in batch]
    assert np.bincount(flat) / 4000 == pytest.approx(FACTORS / FACTORS.sum(), abs=0.01)
    # An epoch has the whole parts at least, and each image once more at most.
    first = np.bincount(flat[:8], minlength=5)
    assert (first <= [1, 2, 2, 4, 1]).all()


def test_an_epoch_has_as_many_images_as_all_their_factors():
    ids = list(range(5))
    data = DetectionDataset(ids, *[None] * 4, regions_per_image=0, short_side=0, long_side=0, seed=0)
    assert data.epoch_images == 5
    data.repeats = FACTORS
    assert data.epoch_images == 9


def test_an_image_that_comes_again_is_drawn_anew():
    flat = [key for batch in order(5, 2, steps=200, repeats=FACTORS) for key in batch]
    for position in range(5):
        assert [earlier for earlier, image in flat if image == position] == list(
            range(sum(image == position for _, image in flat))
        )


@given(st.integers(0, 20), st.lists(st.floats(1, 4), min_size=7, max_size=7))
def test_an_order_with_repeats_resumes_mid_way_identically(first_step, factors):
    repeats = np.array(factors)
    assert order(first_step=first_step, repeats=repeats) == order(repeats=repeats)[first_step:]


def test_repeat_factors_are_those_of_the_scarcest_class():
    # Class 0 in 4 of 5 images, class 1 in one of them, twice; class 2 in another; an image without objects.
    image, label = np.array([0, 1, 1, 1, 2, 3, 3]), np.array([0, 0, 1, 1, 0, 0, 2], np.int32)
    found = repeat_factors(image, label, images=5, threshold=0.4)
    assert found.tolist() == pytest.approx([1, math.sqrt(2), 1, math.sqrt(2), 1])
    assert repeat_factors(image, label, images=5, threshold=1.0)[0] == pytest.approx(math.sqrt(5 / 4))
    assert repeat_factors(image[:0], label[:0], images=2, threshold=1.0).tolist() == [1, 1]


@given(st.lists(st.sets(st.integers(0, 5)), min_size=1, max_size=12), st.floats(0.01, 1))
def test_repeat_factors_follow_the_formula(shown, threshold):
    image = np.array([i for i, classes in enumerate(shown) for _ in classes], np.int64)
    label = np.array([one for classes in shown for one in classes], np.int32)
    found = repeat_factors(image, label, images=len(shown), threshold=threshold)
    for classes, factor in zip(shown, found, strict=True):
        of_class = [math.sqrt(threshold / (sum(one in other for other in shown) / len(shown))) for one in classes]
        assert factor == pytest.approx(max([1.0, *of_class]))


def test_epochs_are_shuffled_anew_by_the_seed():
    epochs = [[position for _, position in batch] for batch in order(30, 30, steps=4)]
    assert len({tuple(one) for one in epochs}) == 4
    assert [[position for _, position in batch] for batch in order(30, 30, steps=4, seed=1)] != epochs


def test_a_loader_serves_the_order_it_is_given():
    dataset = make()
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=order(3, 2, steps=4), collate_fn=collate)
    for batch, keys in zip(loader, order(3, 2, steps=4), strict=True):
        assert torch.equal(batch.region_boxes, collate([dataset[key] for key in keys]).region_boxes)


def believed(**changes):
    """Two regions of one image that are apart, of novel classes 5 and 6; both are sure of name and box."""
    fields = {
        "box": np.array([[2, 2, 22, 22], [30, 10, 55, 35]], np.float32),
        "class_index": np.array([5, 6], np.int32),
        "confidence": np.array([0.9, 0.8], np.float32),
        "score": np.array([0.6, 0.7], np.float32),
        "embedding": np.zeros((2, DIM), np.float16),
    }
    return Record(**fields | {key: np.array(value, fields[key].dtype) for key, value in changes.items()})


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({}, [1, 0]),
        ({"confidence": [0.7, 0.69]}, [0]),
        ({"score": [0.49, 0.5]}, [1]),
        ({"class_index": [4, 5]}, [1]),
        ({"box": [[2, 2, 22, 22], [2, 2, 22, 20]]}, [1]),
        ({"box": [[2, 2, 22, 22], [12, 2, 32, 22]]}, [1, 0]),
    ],
    ids=["both", "confidence", "objectness", "base", "duplicate", "neighbour"],
)
def test_pseudo_labels_are_sure_novel_regions_without_duplicates_most_believed_first(changes, chosen):
    labels = PseudoLabels(confidence=0.7, objectness=0.5, base_count=5)
    assert labels.select(believed(**changes)).tolist() == chosen


@pytest.mark.parametrize(
    "how", [{}, {"short_side": 60, "long_side": 90}, {"augmentation": Augmentation(jitter=(0.6, 1.8))}]
)
def test_pseudo_labels_follow_the_base_objects_and_their_own_regions(how):
    truth = {4: record(4, 2, salt=1)}
    masks = {4: ObjectMasks(torch.from_numpy(truth[4].box), torch.ones(2, GRID, GRID, dtype=torch.bool))}
    options = {"regions_per_image": 2, "short_side": 70, "long_side": 70, "seed": 0, "masks": masks} | how
    found = PseudoLabels(confidence=0.7, objectness=0.5, base_count=5)
    plain, dataset = (
        DetectionDataset([4], paint, SIZES.__getitem__, truth, {4: believed()}, pseudo_labels=labels, **options)
        for labels in (None, found)
    )
    seen = 0
    for epoch in range(20):
        one, other = dataset[epoch, 0], plain[epoch, 0]
        objects = len(other.boxes)
        assert torch.equal(one.image, other.image)
        assert torch.equal(one.region_boxes, other.region_boxes)
        assert torch.equal(one.cached_confidence, other.cached_confidence)
        assert torch.equal(one.boxes[:objects], other.boxes)
        assert torch.equal(one.labels[:objects], other.labels)
        assert len(one.masks) == objects
        assert torch.equal(one.masks.frame, other.masks.frame)
        if len(one.labels) == objects + 2 and len(other.cached_boxes) == 4:
            assert one.labels[objects:].tolist() == [6, 5]
            assert torch.equal(one.boxes[objects:], other.cached_boxes[[3, 2]])
            seen += 1
    assert seen > 2
