"""Masks follow their objects through scaling, cutting and mirroring, and mean what full-size masks mean."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.models.detection.roi_heads import maskrcnn_loss, project_masks_on_boxes

from ezsd.data.dataset import DetectionDataset, collate
from ezsd.data.masks import decode, draw_in_frame, encode, to_run_lengths
from ezsd.data.transforms import Augmentation
from ezsd.detector.masks import GRID, ObjectMasks, concatenated, mask_targets, paste
from ezsd.losses import mask_loss

HEIGHT, WIDTH = 120, 160


def star(seed):
    """A star with 9 points somewhere in the image, as rings."""
    rng = np.random.default_rng(seed)
    angle = np.linspace(0, 2 * np.pi, 18, endpoint=False)
    radius = np.where(np.arange(18) % 2, 14, 38) * rng.uniform(0.8, 1.2, 18)
    centre = rng.uniform((45, 45), (WIDTH - 45, HEIGHT - 45))
    return [centre + np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)]


def pixels(rings, height=HEIGHT, width=WIDTH):
    return decode(to_run_lengths(rings, height, width), height, width)


def object_masks(*outlines):
    frames, grids = zip(*(draw_in_frame(outline, HEIGHT, WIDTH, GRID) for outline in outlines), strict=True)
    return ObjectMasks(torch.from_numpy(np.stack(frames)), torch.from_numpy(np.stack(grids)))


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


def targets_of(masks, boxes):
    return mask_targets(masks, boxes, torch.zeros(len(boxes), dtype=torch.int64), 28)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("as_runs", [False, True])
def test_targets_are_the_part_of_a_full_size_mask_that_a_region_sees(seed, as_runs):
    rings = star(seed)
    full = pixels(rings)
    masks = object_masks(encode(full) if as_runs else rings)
    x1, y1, x2, y2 = masks.frame[0].tolist()
    boxes = torch.tensor([[x1, y1, x2, y2], [x1 - 9, y1 + 6, x2 - 5, y2 + 12], [x1 + 10, y1 + 9, x2 + 4, y2 - 8]])
    found = targets_of(masks, boxes)
    assert found.shape == (3, 28, 28)
    for target, box in zip(found, boxes.tolist(), strict=True):
        # Each cell's share of the object, summed up from pixels eight times as fine.
        fine = torch.from_numpy(pixels([8 * ring for ring in rings], 8 * HEIGHT, 8 * WIDTH)).float()
        y, x = (low + (torch.arange(280) + 0.5) / 280 * (high - low) for low, high in (box[1::2], box[::2]))
        inside = ((x >= 0) & (x < WIDTH))[None] & ((y >= 0) & (y < HEIGHT))[:, None]
        seen = fine[(8 * y).long().clamp(0, 8 * HEIGHT - 1)[:, None], (8 * x).long().clamp(0, 8 * WIDTH - 1)] * inside
        exact = F.avg_pool2d(seen[None], 10)[0]
        # Pixels of full size, as run lengths have them, are as coarse as a cell.
        assert (target - exact).abs().mean() < (0.05 if as_runs else 0.015)


def test_targets_and_loss_are_torchvisions_on_full_size_masks():
    """Their box coordinates lie half a pixel beside ours."""
    outlines = [star(seed) for seed in range(3)]
    full = torch.from_numpy(np.stack([pixels(rings) for rings in outlines]))
    masks = object_masks(*outlines)
    objects = torch.tensor([2, 0, 1, 1])
    boxes = masks.frame[objects] + torch.tensor([[0.0, 0, 0, 0], [3, 2, -4, 5], [-6, 1, 4, 4], [1, 1, 1, 1]])
    theirs = project_masks_on_boxes(full.float(), boxes - 0.5, objects, 28)
    ours = mask_targets(masks, boxes, objects, 28)
    assert (ours - theirs).abs().mean() < 0.03
    logits = 3 * torch.randn(4, 28, 28, generator=torch.Generator().manual_seed(0))
    labels = [torch.zeros(4, dtype=torch.int64)]
    expected = maskrcnn_loss(logits[:, None], [boxes - 0.5], [full], labels, [objects])
    assert mask_loss(logits, ours).item() == pytest.approx(expected.item(), rel=0.02)
    same = F.binary_cross_entropy_with_logits(logits, ours)
    torch.testing.assert_close(mask_loss(logits, ours), same)


def test_without_a_region_the_loss_is_zero_and_so_is_its_gradient():
    logits = torch.zeros(0, 28, 28, requires_grad=True)
    target = mask_targets(object_masks(star(0)), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 28)
    loss = mask_loss(logits, target)
    loss.backward()
    assert loss == 0
    assert logits.grad.shape == (0, 28, 28)


def test_regions_of_several_images_find_their_own_objects():
    first, second = object_masks(star(0), star(1)), object_masks(star(2))
    none = ObjectMasks(torch.zeros(0, 4), torch.zeros(0, GRID, GRID, dtype=torch.bool))
    boxes = torch.cat([first.frame[[1, 0]], second.frame])
    found = mask_targets(concatenated([first, none, second]), boxes, torch.tensor([1, 0, 2]), 28)
    for target, masks in zip(found, (first[1:], first[:1], second), strict=True):
        assert torch.equal(target, targets_of(masks, masks.frame)[0])


@pytest.mark.parametrize("seed", range(4))
def test_a_pasted_target_is_the_object(seed):
    rings = star(seed)
    masks = object_masks(rings)
    (pasted,) = paste(targets_of(masks, masks.frame), masks.frame, HEIGHT, WIDTH)
    assert pasted.shape == (HEIGHT, WIDTH)
    # What 28 cells can say of a star of 80 pixels.
    assert overlap(pasted, pixels(rings)) > 0.88


def test_a_full_mask_fills_its_box_and_what_lies_outside_is_cut_off():
    boxes = torch.tensor([[10.0, 20, 30, 50], [-8, -9, 12, 11], [150, 100, 190, 130], [500, 500, 510, 510]])
    for found, (x1, y1, x2, y2) in zip(paste(torch.ones(4, 28, 28), boxes, HEIGHT, WIDTH), boxes.int(), strict=True):
        expected = np.zeros((HEIGHT, WIDTH), dtype=np.bool_)
        expected[max(y1, 0) : max(y2, 0), max(x1, 0) : max(x2, 0)] = True
        assert np.array_equal(found, expected)
    assert not any(found.any() for found in paste(torch.zeros(4, 28, 28), boxes, HEIGHT, WIDTH))


class Truth:
    """Ground truth of one image whose boxes are the frames of its masks."""

    def __init__(self, masks):
        self.box = masks.frame.numpy()
        self.class_index = np.zeros(len(masks), np.int32)
        self.embedding = np.ones((len(masks), 4), np.float16)
        self.confidence = np.ones(len(masks), np.float32)


@pytest.mark.parametrize(
    "how",
    [
        {"short_side": 0, "long_side": 0},
        {"short_side": 60, "long_side": 90},
        {"short_side": 60, "long_side": 90, "augmentation": Augmentation(short_side_min=30)},
        {"short_side": 100, "long_side": 100, "augmentation": Augmentation(jitter=(0.6, 1.8))},
    ],
)
def test_masks_go_with_the_image_through_flips_sizes_and_windows(how):
    """The object is painted white on black, so every sample shows where its mask must lie."""
    masks = object_masks(star(5), star(9))
    painted = torch.from_numpy(np.stack([pixels(star(s)) for s in (5, 9)]).any(0)).expand(3, -1, -1)
    truth = Truth(masks)
    samples = DetectionDataset(
        [4],
        lambda _: (255 * painted).to(torch.uint8),
        lambda _: (HEIGHT, WIDTH),
        {4: truth},
        {4: truth},
        regions_per_image=0,
        seed=0,
        masks={4: masks},
        **how,
    )
    shown = []
    for epoch in range(12):
        sample = samples[epoch, 0]
        height, width = sample.image.shape[1:]
        assert len(sample.masks) == len(sample.boxes)
        drawn = np.zeros((height, width), dtype=np.bool_)
        for one in paste(sample.masks.grid.float(), sample.masks.frame, height, width):
            drawn |= one
        seen = (sample.image[0] > 127).numpy()
        if seen.sum() > 300:
            shown.append(overlap(drawn, seen))
    assert len(shown) >= 4
    assert min(shown) > 0.85


def test_a_batch_has_masks_if_its_samples_have():
    masks = object_masks(star(1))
    options = {"regions_per_image": 0, "short_side": 0, "long_side": 0, "seed": 0}
    image = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8)
    for source in (None, {4: masks}):
        samples = DetectionDataset(
            [4],
            lambda _: image,
            lambda _: (HEIGHT, WIDTH),
            {4: Truth(masks)},
            {4: Truth(masks)},
            **options,
            masks=source,
        )
        batch = collate([samples[0, 0], samples[1, 0]])
        assert (batch.masks is None) is (source is None)
        if batch.masks is not None:
            moved = batch.to(torch.device("cpu")).masks
            assert [len(one) for one in moved] == [1, 1]
