"""The detector: losses that stay finite, detections that obey their limits, names that are no positions."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torchvision.ops import FrozenBatchNorm2d, box_iou

from ezsd.choices import BACKBONES
from ezsd.detector.backbone import build_backbone, normalise
from ezsd.detector.ensemble import geometric_ensemble
from ezsd.detector.heads import CosineClassifier, SemanticBoxRegressor, Tower
from ezsd.detector.masks import GRID, ObjectMasks
from ezsd.detector.model import Batch, Detections, Detector, Totals, Vocabulary
from ezsd.detector.rpn import SAMPLED_ANCHORS, Proposals, suppress_on_cpu, suppress_on_gpu
from ezsd.detector.sampling import SampledRegions, draw_balanced, image_seeds, random_keys, sample_regions
from ezsd.detector.settings import DetectorSettings
from ezsd.kernels import Pooling, roi_align
from ezsd.losses import region_weights

DIM, SIDE, NAMES = 12, 64, 5
SETTINGS = {
    "backbone": "tiny",
    "fpn_channels": 16,
    "head": "fast",
    "rpn_sizes": (16, 32),
    "rpn_proposals": 30,
    "pool_size": 3,
    "canonical_size": 32,
    "canonical_level": 4,
    "tower_depth": 1,
    "box_hidden": 16,
    "semantic_boxes": True,
    "logit_scale": 20.0,
    "box_batch_size_per_image": 16,
    "box_positive_fraction": 0.25,
    "ignore_confidence": 2.0,
    "ignore_rpn": False,
    "box_class": "foreground",
    "box_top_k": 3,
    "masks": False,
}


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def make_detector(weights=None, **changes):
    settings = DetectorSettings(**(SETTINGS | changes))
    backbone = build_backbone(settings.backbone, channels=settings.fpn_channels, weights=weights)
    return Detector(backbone, settings, embed_dim=DIM, backend="eager")


RESNET = {"backbone": "resnet18", "rpn_sizes": (8, 16, 32, 64, 128)}


@pytest.fixture(params=["fast", "paper"])
def detector(request):
    """Both heads keep the same promises."""
    return make_detector(head=request.param)


def unit_rows(count, seed=1):
    return F.normalize(torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)), dim=1)


def random_boxes(count, seed=2, limit=SIDE):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * (limit - 24)
    return torch.cat([corner, corner + 8 + torch.rand(count, 2, generator=generator) * 16], 1)


def make_batch(objects=(2, 1), regions=(4, 3)):
    """Two images of 64 x 64 and 64 x 50 with so many base boxes and cached regions (the boxes among them)."""
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    images[1, :, :, 50:] = 0
    boxes = [random_boxes(n, seed=i, limit=50) for i, n in enumerate(objects)]
    count = sum(regions)
    fields = dict(
        images=images,
        sizes=[(SIDE, SIDE), (SIDE, 50)],
        boxes=boxes,
        labels=[torch.arange(n) % NAMES for n in objects],
        region_boxes=random_boxes(count, seed=9, limit=50),
        region_image=torch.repeat_interleave(torch.arange(2), torch.tensor(regions)),
        region_target=unit_rows(count, seed=4).half(),
        region_confidence=torch.linspace(0.2, 1, count),
    )
    return Batch(**fields, **all_drawn(fields))


def all_drawn(fields):
    """The cached regions of a batch whose regions were all drawn."""
    mine = [fields["region_image"] == number for number in range(len(fields["sizes"]))]
    return {
        "cached_boxes": [fields["region_boxes"][one] for one in mine],
        "cached_confidence": [fields["region_confidence"][one] for one in mine],
    }


def with_masks(batch):
    """The batch with a mask for every object: the upper left triangle of its box."""
    triangle = torch.ones(GRID, GRID, dtype=torch.bool).triu().flip(1)
    masks = [ObjectMasks(boxes, triangle.expand(len(boxes), -1, -1)) for boxes in batch.boxes]
    return replaced(batch, masks=masks)


def replaced(batch, **fields):
    """The batch with other values; other regions are all drawn."""
    values = {name: getattr(batch, name) for name in batch.__slots__} | fields
    return Batch(**(values | (all_drawn(values) if "region_boxes" in fields else {})))


def losses_and_gradients(detector, batch, *, distill, weight=1.0, novel=0, totals=None):
    """The parts, and the gradient of their sum by parameter, from the same random choices and statistics."""
    model = copy.deepcopy(detector).train()
    torch.manual_seed(5)
    text = torch.cat([unit_rows(NAMES), unit_rows(novel, seed=14)])
    parts = model.losses(batch, text, distill=distill, totals=totals)
    sum(value * (weight if name == "distillation" else 1) for name, value in parts.items()).backward()
    return parts, {name: p.grad for name, p in model.named_parameters()}


def test_a_call_gives_losses_in_training_and_detections_in_evaluation(detector):
    """So hooks, counters and wrappers see what is done."""
    batch, text, seen = make_batch(), unit_rows(NAMES), []
    detector.register_forward_hook(lambda _, __, result: seen.append(result))
    torch.manual_seed(5)
    called = detector.train()(batch, text, distill="cosine")
    assert seen == [called]
    parts, _ = losses_and_gradients(detector, batch, distill="cosine")
    assert called.keys() == parts.keys()
    assert all(value.requires_grad for value in called.values())
    options = {"score_floor": 0.0, "nms_iou": 0.5, "keep": 9}
    found = detector.eval()(batch.images, batch.sizes, text, **options)
    wanted = detector.detect(batch.images, batch.sizes, text, **options)
    assert [len(one.boxes) for one in found] == [9, 9]
    assert all(torch.equal(one.boxes, other.boxes) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("objects", "regions"),
    [((2, 1), (4, 3)), ((0, 2), (4, 3)), ((0, 0), (4, 3)), ((2, 1), (0, 3)), ((2, 1), (0, 0)), ((0, 0), (0, 0))],
)
def test_losses_are_finite_without_boxes_or_regions(detector, objects, regions):
    parts, gradients = losses_and_gradients(detector, make_batch(objects, regions), distill="cosine")
    assert set(parts) == {"rpn_objectness", "rpn_box", "classification", "box", "distillation"}
    for name, value in parts.items():
        assert value.shape == (), name
        assert value.isfinite(), name
        assert value >= 0, name
    assert all(g.isfinite().all() for g in gradients.values() if g is not None)
    if objects == (0, 0):
        assert parts["box"] == parts["rpn_box"] == 0
    if regions == (0, 0):
        assert parts["distillation"] == 0


def test_every_parameter_learns(detector):
    _, gradients = losses_and_gradients(detector, make_batch(), distill="cosine")
    # The background row starts at zero but not its gradient.
    still = {name for name, g in gradients.items() if g is None or not g.any()}
    assert still == set()


def test_without_distillation_all_else_is_as_with_weight_zero(detector):
    without, gradients = losses_and_gradients(detector, make_batch(), distill=None)
    zero_weight, same = losses_and_gradients(detector, make_batch(), distill="cosine", weight=0.0)
    assert set(without) == set(zero_weight) - {"distillation"}
    for name, value in without.items():
        assert torch.equal(value, zero_weight[name]), name
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, same[name], rtol=1e-5, atol=1e-8)


def test_cached_regions_reach_the_distillation_and_nothing_else(detector):
    batch = make_batch()
    changed = replaced(
        batch,
        region_boxes=random_boxes(7, seed=31),
        region_target=unit_rows(7, seed=32),
        region_confidence=torch.rand(7),
    )
    first, _ = losses_and_gradients(detector, batch, distill="cosine")
    second, _ = losses_and_gradients(detector, changed, distill="cosine")
    assert {name for name in first if not torch.equal(first[name], second[name])} == {"distillation"}


def test_competing_novel_names_reach_the_classification_and_nothing_else(detector):
    first, _ = losses_and_gradients(detector, make_batch(), distill="cosine")
    second, gradients = losses_and_gradients(detector, make_batch(), distill="cosine", novel=3)
    assert {name for name in first if not torch.equal(first[name], second[name])} == {"classification"}
    assert second["classification"] > first["classification"]
    assert all(g.isfinite().all() for g in gradients.values())


def distillation(detector, batch, metric="cosine"):
    return losses_and_gradients(detector, batch, distill=metric)[0]["distillation"].item()


def test_distillation_is_the_weighted_mean_of_the_distance(detector):
    batch = make_batch()
    model = copy.deepcopy(detector).train()
    features = model.head.features(model.backbone(normalise(batch.images, batch.sizes)))
    embedding = model.head.embed(features, batch.region_boxes, batch.region_image).embedding
    distance = 1 - F.cosine_similarity(embedding, batch.region_target.float())
    confidence = batch.region_confidence
    # Mean one within each image, then the mean over all regions: 4 in the first image, 3 in the second.
    weight = torch.cat([confidence[:4] / confidence[:4].mean(), confidence[4:] / confidence[4:].mean()])
    assert distillation(detector, batch) == pytest.approx((weight * distance).mean().item(), rel=1e-5)
    l1 = (F.normalize(embedding) - F.normalize(batch.region_target.float())).abs().sum(1)
    assert distillation(detector, batch, metric="l1") == pytest.approx((weight * l1).mean().item(), rel=1e-5)


def test_distillation_ignores_a_common_factor_and_a_doubled_set(detector):
    batch = make_batch()
    value = distillation(detector, batch)
    assert distillation(detector, replaced(batch, region_confidence=batch.region_confidence * 0.1)) == pytest.approx(
        value, rel=1e-5
    )
    doubled = {
        name: torch.cat([getattr(batch, name)] * 2)
        for name in ("region_boxes", "region_image", "region_target", "region_confidence")
    }
    assert distillation(detector, replaced(batch, **doubled)) == pytest.approx(value, rel=1e-5)


def test_distillation_vanishes_when_the_student_is_the_teacher(detector):
    batch = make_batch()
    model = copy.deepcopy(detector).train()
    features = model.head.features(model.backbone(normalise(batch.images, batch.sizes)))
    own = model.head.embed(features, batch.region_boxes, batch.region_image).embedding.detach()
    assert distillation(detector, replaced(batch, region_target=own)) == pytest.approx(0, abs=1e-6)
    assert distillation(detector, replaced(batch, region_target=-own)) == pytest.approx(2, abs=1e-6)


def test_regions_of_an_image_weigh_as_much_as_their_number():
    weight = region_weights(torch.tensor([0.9, 0.1, 0.5, 0.2]), torch.tensor([0, 0, 0, 1]), images=2)
    assert weight[:3].sum().item() == pytest.approx(3)
    assert weight[3].item() == pytest.approx(1)


# The regions that the box head learns from.


def sample(proposals, boxes, labels, **changes):
    """The regions of one image, without the slots that stay empty."""
    options = {"background": NAMES, "count": 20, "share": 0.25} | changes
    if "unknown" in changes:
        options["unknown"] = changes["unknown"][None], torch.ones(1, len(changes["unknown"]), dtype=torch.bool)
    marks = torch.ones(1, len(proposals), dtype=torch.bool)
    found = sample_regions(
        proposals[None], marks, [boxes], [labels], image_seeds(None, 1, torch.device("cpu")), **options
    )
    assert (found.objects[0, found.object_slots :] < 0).all()
    fields = {
        name: getattr(found, name)[found.counted] for name in ("boxes", "labels", "targets", "objects", "counted")
    }
    return SampledRegions(**fields, object_slots=found.object_slots)


def shifted(boxes, *, copies, spread):
    generator = torch.Generator().manual_seed(6)
    many = boxes.repeat(copies, 1)
    return many + (torch.rand(many.shape, generator=generator) - 0.5) * spread


def test_sampled_regions_obey_overlap_count_and_share():
    boxes, labels = torch.tensor([[5.0, 5, 25, 25], [30, 30, 60, 60]]), torch.tensor([3, 1])
    proposals = torch.cat([shifted(boxes, copies=40, spread=16), random_boxes(60)])
    for _ in range(5):
        found = sample(proposals, boxes, labels)
        assert len(found.boxes) == len(found.labels) == len(found.targets) == 20
        overlap, nearest = box_iou(found.boxes, boxes).max(1)
        positive = found.labels != NAMES
        assert positive.sum() == 5
        assert torch.equal(positive, overlap >= 0.5)
        assert torch.equal(found.labels[positive], labels[nearest[positive]])
        assert torch.equal(found.targets[positive], boxes[nearest[positive]])
        assert torch.equal(found.objects[positive], nearest[positive])
        assert (found.objects[~positive] == -1).all()
        assert (found.targets[~positive] == 0).all()


def test_overlap_of_exactly_one_half_is_an_object():
    box = torch.tensor([[0.0, 0, 10, 10]])
    found = sample(torch.tensor([[0.0, 0, 10, 5], [0, 0, 10, 4.9]]), box, torch.tensor([2]), share=1.0)
    assert sorted(zip(found.boxes[:, 3].tolist(), found.labels.tolist(), strict=True)) == [
        (pytest.approx(4.9), NAMES),
        (5, 2),
        (10, 2),
    ]


def test_sampled_regions_are_drawn_anew_and_without_replacement():
    boxes = torch.tensor([[5.0, 5, 25, 25]])
    near, far = shifted(boxes, copies=40, spread=4), random_boxes(60) + 100
    for _ in range(3):
        first, second = (sample(torch.cat([near, far]), boxes, torch.tensor([0])) for _ in range(2))
        assert len(first.boxes.unique(dim=0)) == 20
        for number in (0, NAMES):
            drawn = [{tuple(box) for box in s.boxes[s.labels == number].tolist()} for s in (first, second)]
            assert drawn[0] != drawn[1]


def test_ground_truth_is_among_the_candidates():
    boxes, labels = torch.tensor([[5.0, 5, 25, 25]]), torch.tensor([4])
    found = sample(torch.tensor([[40.0, 40, 60, 60]]), boxes, labels)
    assert found.labels.tolist() == [4, NAMES]
    assert torch.equal(found.boxes[0], boxes[0])


def test_an_image_without_objects_is_background():
    found = sample(random_boxes(30), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert found.labels.tolist() == [NAMES] * 20
    assert found.targets.shape == (20, 4)
    assert len(found.boxes.unique(dim=0)) == 20


def test_missing_objects_are_made_up_for_by_background():
    found = sample(random_boxes(60, limit=40) + 100, torch.tensor([[5.0, 5, 25, 25]]), torch.tensor([0]), share=0.5)
    assert (found.labels == 0).sum() == 1
    assert (found.labels == NAMES).sum() == 19


@pytest.mark.parametrize("objects", [0, 1])
def test_what_may_be_an_unlabelled_object_is_neither_object_nor_background(objects):
    boxes, unknown = torch.tensor([[5.0, 5, 25, 25]])[:objects], torch.tensor([[30.0, 30, 60, 60]])
    proposals = torch.cat([shifted(unknown, copies=40, spread=20), random_boxes(60)])
    plain = sample(proposals, boxes, torch.zeros(objects, dtype=torch.int64), count=200)
    spared = sample(proposals, boxes, torch.zeros(objects, dtype=torch.int64), count=200, unknown=unknown)
    overlap = box_iou(plain.boxes, unknown)[:, 0]
    assert (overlap >= 0.5).sum() > 10
    rest = {tuple(box) for box in plain.boxes[overlap < 0.5].tolist()}
    assert {tuple(box) for box in spared.boxes.tolist()} == rest
    assert (spared.labels != NAMES).sum() == (plain.labels != NAMES).sum()


def test_a_known_object_is_learned_from_although_a_cached_region_lies_on_it():
    boxes = torch.tensor([[5.0, 5, 25, 25]])
    found = sample(shifted(boxes, copies=40, spread=4), boxes, torch.tensor([2]), unknown=boxes + 1, share=0.5)
    assert found.labels.tolist() == [2] * 10


def test_confident_cached_regions_are_spared_when_asked(detector):
    batch = make_batch()
    # So dense that every proposal of these sizes in the first image lies on one.
    everywhere = torch.cartesian_prod(*[torch.arange(0, SIDE, 4.0)] * 2)
    regions = torch.cat([torch.cat([everywhere, everywhere + s], 1) for s in (10, 20, 40)])
    many = replaced(
        batch,
        region_boxes=regions,
        region_image=torch.zeros(len(regions), dtype=torch.int64),
        region_target=unit_rows(len(regions)),
        region_confidence=torch.full((len(regions),), 0.5),
    )
    values = {}
    for threshold in (0.4, 0.6):
        detector.settings = dataclasses.replace(detector.settings, ignore_confidence=threshold)
        values[threshold] = losses_and_gradients(detector, many, distill=None)[0]
    detector.settings = dataclasses.replace(detector.settings, ignore_confidence=2.0)
    unspared, _ = losses_and_gradients(detector, batch, distill=None)
    assert torch.equal(values[0.6]["classification"], unspared["classification"])
    assert not torch.equal(values[0.4]["classification"], unspared["classification"])
    assert torch.equal(values[0.4]["rpn_objectness"], unspared["rpn_objectness"])
    # Whether they were drawn for this step is no matter.
    undrawn = dataclasses.replace(batch, cached_boxes=many.cached_boxes, cached_confidence=many.cached_confidence)
    detector.settings = dataclasses.replace(detector.settings, ignore_confidence=0.4)
    spared, _ = losses_and_gradients(detector, undrawn, distill=None)
    assert torch.equal(values[0.4]["classification"], spared["classification"])


def test_what_stands_beside_an_image_is_not_looked_at(detector):
    batch = make_batch()
    beside = batch.images.clone()
    beside[1, :, :, 50:] = 1
    plain = losses_and_gradients(detector, batch, distill="cosine")[0]
    white = losses_and_gradients(detector, replaced(batch, images=beside), distill="cosine")[0]
    assert all(torch.equal(plain[name], white[name]) for name in plain)
    # Zeros, as beyond the border of a batch.
    assert (normalise(beside, batch.sizes)[1, :, :, 50:] == 0).all()
    assert (normalise(beside, batch.sizes)[0] != 0).all()


def test_bytes_are_the_same_pixels():
    batch = make_batch()
    pixels = (batch.images * 255).round().to(torch.uint8)
    torch.testing.assert_close(normalise(pixels, batch.sizes), normalise(pixels.float() / 255, batch.sizes))


def test_confident_cached_regions_are_spared_by_the_proposal_network_too_when_asked(detector):
    batch = make_batch()
    # Anchors of 16 and 32 px cannot but overlap these.
    everywhere = torch.cartesian_prod(*[torch.arange(-16, SIDE, 4.0)] * 2)
    regions = torch.cat([torch.cat([everywhere, everywhere + s], 1) for s in (16, 24, 32)])
    many = replaced(
        batch,
        region_boxes=regions.repeat(2, 1),
        region_image=torch.arange(2).repeat_interleave(len(regions)),
        region_target=unit_rows(2 * len(regions)),
        region_confidence=torch.full((2 * len(regions),), 0.5),
    )
    detector.settings = dataclasses.replace(detector.settings, ignore_confidence=0.4, ignore_rpn=True)
    model, losses = copy.deepcopy(detector).train(), []
    model.rpn.losses = lambda *args: losses.append(detector.rpn.losses(*args)) or losses[-1]
    model.losses(many, unit_rows(NAMES), distill=None)
    model.losses(batch, unit_rows(NAMES), distill=None)
    # Anchors on objects are left, and those that stick out too far to overlap anything much.
    assert 0 < losses[0].sampled < losses[1].sampled / 2


def seeded(batch, seeds=(17, 400)):
    return replaced(batch, seeds=seeds)


def test_positions_are_drawn_by_seed_alone_whatever_the_neighbours():
    marks = torch.zeros(2, 900, dtype=torch.bool)
    marks[:, ::5] = True
    seeds, options = torch.tensor([17, 2**61 + 400]), {"count": 256, "share": 0.5}
    first = draw_balanced(marks, ~marks, seeds, **options)
    assert first.counted.all()
    assert first.positive.sum(1).tolist() == [128, 128]
    swapped = draw_balanced(marks, ~marks, seeds.flip(0), **options)
    assert torch.equal(first.rows, swapped.rows.flip(0))
    # None comes twice, and positives come first.
    assert all(len(row.unique()) == 256 for row in first.rows)
    assert torch.equal(marks.gather(1, first.rows), first.positive)
    assert first.positive[:, :128].all()


def test_keys_are_fixed_and_every_position_is_drawn_as_often():
    """The same on every device and in every version: runs go on from checkpoints."""
    assert random_keys(torch.tensor([5]), 3).tolist() == [
        [1435830862955413504, 4389421950485659649, 3380159164830449666]
    ]
    seeds = image_seeds(range(1000, 3000), 2000, torch.device("cpu"))
    keys = random_keys(seeds, 40)
    assert keys.min() >= 0
    assert all(len(row.unique()) == 40 for row in keys[:50])
    # Of 2000 draws of 10 of 40, each position is in 500, with a deviation of 19; so is each pair in 115, with 10.
    drawn = torch.zeros(2000, 40).scatter_(1, keys.topk(10).indices, 1)
    together = drawn.T @ drawn
    assert (together.diagonal() - 500).abs().max() < 80
    assert (together.fill_diagonal_(115.4) - 115.4).abs().max() < 50


def boxes_of_levels(levels, images=2, seed=3):
    """Overlapping boxes with scores, best first within each level, and marks of most of them."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(images, sum(levels), 2, generator=generator) * 60
    boxes = torch.cat([corner, corner + 15 + 10 * torch.rand(images, sum(levels), 2, generator=generator)], 2)
    parts = torch.rand(images, sum(levels), generator=generator).split(levels, 1)
    marks = torch.rand(images, sum(levels), generator=generator) < 0.9
    return boxes, torch.cat([part.sort(descending=True).values for part in parts], 1), marks


@pytest.mark.parametrize("keep", [25, 1000])
def test_suppression_for_a_gpu_keeps_what_torchvision_keeps(keep):
    levels = [200, 150, 3]
    boxes, scores, marks = boxes_of_levels(levels)
    # A chain: each overlaps the one before it, and every second one stays.
    boxes[1, :200] = torch.arange(200)[:, None] * 3.0 + torch.tensor([0.0, 0, 10, 10])
    ours, theirs = (
        suppress(boxes, scores, marks, levels, iou_threshold=0.3, keep=keep)
        for suppress in (suppress_on_gpu, suppress_on_cpu)
    )
    for image in range(2):
        mine, wanted = ours.marks[image], theirs.marks[image]
        assert 20 < wanted.sum() < 300
        assert torch.equal(ours.boxes[image][mine], theirs.boxes[image][wanted])
        assert torch.equal(ours.scores[image][mine], theirs.scores[image][wanted])
    assert (ours.scores.diff() <= 0).all()


def test_padding_is_no_region_and_changes_no_loss(monkeypatch):
    """On a GPU it is computed, on a CPU left out."""
    detector, batch = make_detector(box_batch_size_per_image=200, rpn_proposals=400), seeded(make_batch())
    # Fewer boxes stay than there is room for.
    detector.rpn.nms_iou = 0.2
    plain, gradients = losses_and_gradients(detector, batch, distill="cosine")
    seen = []

    def every(marks):
        seen.append(marks)
        return slice(None)

    monkeypatch.setattr("ezsd.detector.model.worth_computing", every)
    padded, same = losses_and_gradients(detector, batch, distill="cosine")
    for name, value in plain.items():
        torch.testing.assert_close(padded[name], value, rtol=1e-5, atol=1e-7)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, rtol=1e-4, atol=1e-6)
    text = unit_rows(4)
    with_padding = detect(detector, text)
    monkeypatch.undo()
    assert len(seen) == 2
    assert not any(marks.all() for marks in seen), "nothing is padded"
    for found, wanted in zip(with_padding, detect(detector, text), strict=True):
        torch.testing.assert_close(found.boxes, wanted.boxes)
        torch.testing.assert_close(found.scores, wanted.scores)
        assert torch.equal(found.labels, wanted.labels)


def test_regions_of_an_image_do_not_depend_on_the_others_in_its_batch():
    boxes, scores, marks = boxes_of_levels([60], images=1)
    # More of them stay.
    apart = torch.arange(60)[None, :, None] * 30.0 + torch.tensor([0.0, 0, 10, 10])

    def drawn(images):
        batch = torch.cat([boxes, apart])[:images], scores.expand(images, -1), marks.expand(images, -1)
        found = suppress_on_cpu(*batch, [60], iou_threshold=0.3, keep=60)
        truth = [boxes[0, :5] + 1] * images, [torch.arange(5)] * images, torch.full((images,), 7)
        return sample_regions(found.boxes, found.marks, *truth, background=9, count=12, share=0.5).boxes[0]

    assert torch.equal(drawn(2), drawn(1))


def test_seeded_regions_are_drawn_whatever_the_global_state(detector):
    batch = seeded(make_batch())
    torch.manual_seed(1)
    first = losses_and_gradients(detector, batch, distill=None)[0]
    torch.manual_seed(2)
    model = copy.deepcopy(detector).train()
    second = model.losses(batch, unit_rows(NAMES), distill=None)
    assert all(torch.equal(first[name], value) for name, value in second.items())
    other = losses_and_gradients(detector, seeded(make_batch(), (5, 6)), distill=None)[0]
    assert not torch.equal(first["classification"], other["classification"])


def one_image(batch, number):
    mine = batch.region_image == number
    return replaced(
        batch,
        images=batch.images[number : number + 1],
        sizes=batch.sizes[number : number + 1],
        boxes=batch.boxes[number : number + 1],
        labels=batch.labels[number : number + 1],
        region_boxes=batch.region_boxes[mine],
        region_image=torch.zeros(int(mine.sum()), dtype=torch.int64),
        region_target=batch.region_target[mine],
        region_confidence=batch.region_confidence[mine],
        seeds=batch.seeds[number : number + 1],
        masks=None if batch.masks is None else batch.masks[number : number + 1],
    )


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("head", ["fast", "paper"])
def test_parts_of_a_step_add_up_to_the_step(head, masks):
    """Losses and gradients, with 4 regions in one image and 3 in the other, 2 and 1 objects."""
    weights = torchvision.models.resnet18(weights=None).state_dict()
    # Frozen statistics: those of a batch would depend on who is in it.
    detector = make_detector(weights, head=head, masks=masks, **RESNET)
    batch, totals = with_masks(seeded(make_batch())), Totals(images=2, regions=7)
    whole, gradients = losses_and_gradients(detector, batch, distill="l1", totals=totals)
    parts = [losses_and_gradients(detector, one_image(batch, i), distill="l1", totals=totals) for i in range(2)]
    assert ("mask" in whole) is masks
    for name, value in whole.items():
        torch.testing.assert_close(parts[0][0][name] + parts[1][0][name], value, rtol=1e-5, atol=1e-7)
    for name, gradient in gradients.items():
        if gradient is not None:
            difference = parts[0][1][name] + parts[1][1][name] - gradient
            assert difference.norm() <= 1e-5 * gradient.norm(), name


def test_with_totals_a_term_is_divided_by_what_was_asked_for(detector):
    detector.settings = dataclasses.replace(detector.settings, box_batch_size_per_image=1000)
    batch = seeded(make_batch())
    found, _ = losses_and_gradients(detector, batch, distill="l1")
    asked, _ = losses_and_gradients(detector, batch, distill="l1", totals=Totals(images=4, regions=70))
    anchors = detector.rpn.anchor_generator.num_anchors_per_location()[0] * (8 * 8 + 4 * 4)
    assert anchors < SAMPLED_ANCHORS
    assert asked["distillation"].item() == pytest.approx(found["distillation"].item() / 10)
    assert asked["classification"] < found["classification"] / 20
    assert 0 < asked["rpn_objectness"] < found["rpn_objectness"] / 2


# Masks.


def test_all_else_is_as_without_masks():
    """Weights at the start and every other loss, to the last bit."""
    made = []
    for masks in (False, True):
        torch.manual_seed(8)
        made.append(make_detector(masks=masks))
    plain, masked = made
    state = masked.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())
    first, _ = losses_and_gradients(plain, make_batch(), distill="cosine")
    second, _ = losses_and_gradients(masked, with_masks(make_batch()), distill="cosine")
    assert set(second) - set(first) == {"mask"}
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("objects", [(2, 1), (0, 2), (0, 0)])
def test_the_mask_loss_is_a_mean_over_regions_on_objects(objects):
    detector = make_detector(masks=True)
    parts, gradients = losses_and_gradients(detector, with_masks(make_batch(objects=objects)), distill="cosine")
    learned = [g for name, g in gradients.items() if name.startswith("mask_head")]
    assert all(g.isfinite().all() for g in learned)
    if objects == (0, 0):
        assert parts["mask"] == 0
        return
    assert all(g.any() for g in learned)
    # A head that always says one half: ln 2, however many regions there are.
    for parameter in detector.mask_head.predictor.mask_fcn_logits.parameters():
        torch.nn.init.zeros_(parameter)
    parts, _ = losses_and_gradients(detector, with_masks(make_batch(objects=objects)), distill="cosine")
    assert parts["mask"].item() == pytest.approx(math.log(2))
    totals = Totals(images=2, regions=7)
    asked, _ = losses_and_gradients(detector, with_masks(make_batch(objects=objects)), distill=None, totals=totals)
    # A quarter of 16 regions of two images.
    assert asked["mask"].item() / math.log(2) * 8 == pytest.approx(round(asked["mask"].item() / math.log(2) * 8))
    assert 1 <= round(asked["mask"].item() / math.log(2) * 8) <= 8


def with_pseudo_labels(batch):
    """The batch with one more object in each image, in a corner of it, of a novel class and without a mask."""
    corner = torch.tensor([[0.0, 50.0, 14.0, 64.0]])
    return replaced(
        batch,
        boxes=[torch.cat([boxes, corner]) for boxes in batch.boxes],
        labels=[torch.cat([labels, torch.tensor([NAMES])]) for labels in batch.labels],
    )


@pytest.mark.parametrize("totals", [None, Totals(images=2, regions=7)])
@pytest.mark.parametrize("objects", [(2, 1), (0, 2), (0, 0)])
def test_pseudo_labels_are_classified_and_have_a_box_but_no_mask(objects, totals):
    # All regions on objects are drawn.
    detector = make_detector(masks=True, box_batch_size_per_image=1000, box_positive_fraction=1.0)
    plain = with_masks(make_batch(objects=objects))
    without, _ = losses_and_gradients(detector, plain, distill=None, novel=1, totals=totals)
    parts, gradients = losses_and_gradients(detector, with_pseudo_labels(plain), distill=None, novel=1, totals=totals)
    torch.testing.assert_close(parts["mask"], without["mask"])
    assert (parts["mask"] > 0) == (sum(objects) > 0)
    assert all(g.isfinite().all() for g in gradients.values() if g is not None)
    assert parts["box"] > without["box"]
    assert parts["classification"] != without["classification"]


def test_the_mask_head_learns_the_shape_of_an_object_and_no_other_image_is_asked():
    detector = make_detector(masks=True).train()
    batch = with_masks(make_batch(objects=(1, 1)))
    optimiser = torch.optim.Adam(detector.mask_head.parameters(), lr=3e-3)
    torch.manual_seed(1)
    for _ in range(60):
        optimiser.zero_grad()
        detector.losses(batch, unit_rows(NAMES), distill=None)["mask"].backward()
        optimiser.step()
    with torch.no_grad():
        maps = detector.eval().backbone(normalise(batch.images, batch.sizes))
        levels = maps[: detector.head.pooling.levels]
        seen = detector.mask_head(levels, torch.cat(batch.boxes), torch.tensor([0, 1])) > 0
    triangle = torch.ones(28, 28, dtype=torch.bool).triu().flip(1)
    for one in seen:
        assert (one & triangle).sum() / (one | triangle).sum() > 0.8


def test_a_detection_has_a_mask_if_one_is_asked_for():
    detector = make_detector(masks=True)
    plain, filled = detect(detector, unit_rows(4), keep=9), detect(detector, unit_rows(4), keep=9, masks=True)
    for without, found in zip(plain, filled, strict=True):
        assert without.masks is None
        assert torch.equal(without.boxes, found.boxes)
        assert found.masks.shape == (9, 28, 28)
        assert 0 <= found.masks.min() <= found.masks.max() <= 1
    batch = make_batch()
    maps = detector.backbone(normalise(batch.images, batch.sizes))[: detector.head.pooling.levels]
    with torch.no_grad():
        alone = detector.mask_head(maps, filled[1].boxes, torch.ones(9, dtype=torch.int64)).sigmoid()
    torch.testing.assert_close(alone, filled[1].masks)
    (nothing, _) = detect(detector, unit_rows(4), score_floor=1.1, masks=True)
    assert nothing.masks.shape == (0, 28, 28)


# Detection.


def detect(detector, text, **changes):
    batch = make_batch()
    options = {"score_floor": 0.0, "nms_iou": 0.5, "keep": 1000} | changes
    return detector.eval().detect(batch.images, batch.sizes, text, **options)


@pytest.mark.parametrize("class_agnostic", [False, True])
def test_several_vocabularies_take_one_pass_and_find_what_each_finds_alone(detector, class_agnostic):
    vocabularies = [
        Vocabulary(text=unit_rows(4)),
        Vocabulary(text=unit_rows(2, seed=8), competing=unit_rows(3, seed=9)),
    ]
    batch, calls = make_batch(), []
    options = {"score_floor": 0.05, "nms_iou": 0.5, "keep": 20, "class_agnostic_nms": class_agnostic, "objectness": 0.3}
    detector.eval().backbone.register_forward_hook(lambda *_: calls.append(1))
    each = detector.detect_each(batch.images, batch.sizes, vocabularies, **options)
    assert len(calls) == 1
    assert all(len(one.boxes) for one in each[0])
    assert any(len(one.boxes) for one in each[1]) or class_agnostic
    for vocabulary, together in zip(vocabularies, each, strict=True):
        alone = detector.detect(batch.images, batch.sizes, vocabulary.text, competing=vocabulary.competing, **options)
        for one, other in zip(together, alone, strict=True):
            assert torch.equal(one.boxes, other.boxes)
            assert torch.equal(one.scores, other.scores)
            assert torch.equal(one.labels, other.labels)


def rows(found, labels=None):
    """Detections as a table in an order of its own: near-equal scores may swap places."""
    label = found.labels if labels is None else labels
    table = torch.cat([label[:, None].float(), found.scores[:, None], found.boxes], 1).tolist()
    return torch.tensor(sorted(table, key=lambda row: [round(v, 2) for v in (row[0], *row[2:])]))


def planted_objectness(detector, monkeypatch, value):
    """Make the proposal network say `value(boxes)` of the boxes that it proposes."""
    propose = detector.rpn.propose

    def planted(*arguments):
        found = propose(*arguments)
        return dataclasses.replace(found, scores=torch.stack([value(boxes) for boxes in found.boxes]))

    monkeypatch.setattr(detector.rpn, "propose", planted)


def test_objectness_enters_the_score_with_its_exponent(detector, monkeypatch):
    planted_objectness(detector, monkeypatch, lambda boxes: torch.full((len(boxes),), 0.25))
    plain, weighed = (detect(detector, unit_rows(3), nms_iou=1.0, objectness=a) for a in (0.0, 0.3))
    for without, found in zip(plain, weighed, strict=True):
        torch.testing.assert_close(found.scores, without.scores**0.7 * 0.25**0.3)


def test_objectness_is_that_of_the_region_the_box_came_from(detector, monkeypatch):
    # All but the third proposal of each image are nothing.
    planted_objectness(detector, monkeypatch, lambda boxes: (torch.arange(len(boxes)) == 2).float())
    classes = 3
    for found in detect(detector, unit_rows(classes), score_floor=1e-6, nms_iou=1.0, objectness=0.5):
        assert sorted(found.labels.tolist()) == list(range(classes))
        assert (found.boxes == found.boxes[0]).all()


def test_detections_are_inside_the_image_sorted_and_above_the_floor(detector):
    both = detect(detector, unit_rows(7), score_floor=0.05)
    assert len(both) == 2
    for found, (height, width) in zip(both, make_batch().sizes, strict=True):
        assert len(found.boxes) == len(found.scores) == len(found.labels) > 10
        assert found.boxes.min() >= 0
        assert found.boxes[:, 2].max() <= width
        assert found.boxes[:, 3].max() <= height
        assert ((found.boxes[:, 2:] - found.boxes[:, :2]) >= 1).all()
        assert (found.scores.diff() <= 0).all()
        assert found.scores.min() >= 0.05
        assert found.scores.max() <= 1
        assert found.labels.dtype == torch.int64
        assert set(found.labels.tolist()) <= set(range(7))


def test_detections_are_limited_to_the_best(detector):
    everything, few = detect(detector, unit_rows(7)), detect(detector, unit_rows(7), keep=5)
    for all_found, found in zip(everything, few, strict=True):
        assert len(found.scores) == 5
        assert torch.equal(found.scores, all_found.scores[:5])


def test_suppression_is_within_a_name(detector):
    for found in detect(detector, unit_rows(3)):
        overlap = box_iou(found.boxes, found.boxes).fill_diagonal_(0)
        same = found.labels[:, None] == found.labels[None]
        assert overlap[same].max() <= 0.5 + 1e-5
        assert overlap[~same].max() > 0.5


def test_class_agnostic_suppression_leaves_an_object_its_best_name_alone(detector):
    for plain, found in zip(
        detect(detector, unit_rows(3)), detect(detector, unit_rows(3), class_agnostic_nms=True), strict=True
    ):
        overlap = box_iou(found.boxes, found.boxes).fill_diagonal_(0)
        assert overlap.max() <= 0.5 + 1e-5
        assert 1 < len(found.scores) < len(plain.scores)
        assert found.scores[0] == plain.scores[0]


def test_names_that_compete_suppress_too_where_suppression_is_class_agnostic(detector):
    text, options = unit_rows(5), {"class_agnostic_nms": True, "nms_iou": 0.8}
    (every, _) = detect(detector, text, **options)
    assert len(every.labels)
    # Those that have lost everywhere are asked for too.
    for label in range(5):
        rest = torch.arange(5) != label
        (asked, _) = detect(detector, text[~rest], competing=text[rest], **options)
        mine = every.take(every.labels == label)
        torch.testing.assert_close(asked.boxes, mine.boxes)
        torch.testing.assert_close(asked.scores, mine.scores)


def test_an_ensemble_multiplies_powers_and_ranks_again():
    boxes, masks = torch.arange(12.0).reshape(3, 4), torch.arange(12.0).reshape(3, 2, 2)
    found = Detections(boxes=boxes, scores=torch.tensor([0.9, 0.5, 0.4]), labels=torch.tensor([4, 5, 6]), masks=masks)
    again = geometric_ensemble(found, torch.tensor([0.1, 0.8, 0.0]), torch.tensor([0.5, 0.25, 0.0]))
    # No weight, no say: 0.0 ** 0 = 1.
    torch.testing.assert_close(again.scores, torch.tensor([0.5**0.75 * 0.8**0.25, 0.4, (0.9 * 0.1) ** 0.5]))
    assert again.labels.tolist() == [5, 6, 4]
    assert torch.equal(again.boxes, boxes[[1, 2, 0]])
    assert torch.equal(again.masks, masks[[1, 2, 0]])


def test_a_floor_that_nothing_reaches_leaves_nothing(detector):
    for found in detect(detector, unit_rows(4), score_floor=1.1):
        assert found.boxes.shape == (0, 4)
        assert found.scores.shape == found.labels.shape == (0,)


def test_names_follow_their_text_rows(detector):
    text, order = unit_rows(6), torch.tensor([4, 2, 0, 5, 1, 3])
    for plain, permuted in zip(detect(detector, text), detect(detector, text[order]), strict=True):
        assert len(plain.labels.unique()) > 1
        torch.testing.assert_close(rows(permuted, order[permuted.labels]), rows(plain), rtol=1e-4, atol=1e-3)


def test_the_nearest_name_scores_highest(detector):
    batch = make_batch()
    model = detector.eval()
    boxes = detect(detector, unit_rows(1), nms_iou=1.0)[0].boxes
    with torch.no_grad():
        features = model.head.features(model.backbone(normalise(batch.images, batch.sizes)))
        near = model.head.embed(features, boxes[:1], torch.tensor([0])).embedding
    text = torch.cat([-near, unit_rows(2), near])
    found = detect(detector, text)[0]
    assert found.labels[0] == 3
    assert found.scores[found.labels == 0].max() < found.scores[found.labels == 3].max()


def test_any_number_of_names_may_be_asked_for(detector):
    losses_and_gradients(detector, make_batch(), distill="cosine")
    assert set(detect(detector, unit_rows(20))[0].labels.tolist()) <= set(range(20))
    assert detect(detector, unit_rows(1))[0].labels.tolist()[0] == 0


def test_a_box_is_placed_for_the_likeliest_object_however_likely_background_is(detector):
    # A wilder regressor, so that its class matters by pixels.
    torch.nn.init.normal_(detector.head.regressor.deltas.weight, std=0.3)
    text, places = unit_rows(4), []
    for row in (torch.zeros(DIM), 2 * unit_rows(1, seed=8)[0]):
        detector.head.classifier.background.data.copy_(row)
        places.append([rows(found, torch.zeros_like(found.labels)) for found in detect(detector, text, nms_iou=1.0)])
    for plain, background in zip(*places, strict=True):
        assert not torch.allclose(plain[:, 1], background[:, 1])
        torch.testing.assert_close(background[:, 2:], plain[:, 2:])


def test_the_reference_places_a_background_region_by_a_row_of_zeros():
    detector = make_detector()
    torch.nn.init.normal_(detector.head.regressor.deltas.weight, std=0.3)
    text = unit_rows(4)
    detector.head.classifier.background.data.copy_(9 * unit_rows(1, seed=8)[0])
    ours = detect(detector, text, nms_iou=1.0)
    detector.settings = dataclasses.replace(detector.settings, box_class="reference")
    theirs = detect(detector, text, nms_iou=1.0)
    for plain, zeros in zip(ours, theirs, strict=True):
        assert not torch.equal(plain.boxes, zeros.boxes)


def plant(detector, names):
    """A detector whose boxes say which text row its regressor saw: name k moves its box right by k + 1 widths."""
    text = torch.eye(DIM)[:names]
    deltas = detector.head.regressor.deltas
    torch.nn.init.zeros_(deltas.weight)
    # Deltas are in tenths of a width.
    deltas.weight.data[0, -DIM:] = 10 * (torch.arange(DIM) + 1)
    return text


def shifts(detector, text, proposals):
    """By region and name, how many widths its box was moved, (R, C)."""
    batch = make_batch()
    boxes, marks = torch.stack([proposals] * 2), torch.ones(2, len(proposals), dtype=torch.bool)
    marks[1] = False
    detector.rpn.propose = lambda *_: Proposals(boxes, torch.ones(marks.shape), marks)
    # A wide image: nothing is cut off at its edge.
    found = detector.eval().detect(
        batch.images, [(SIDE, 4000), (SIDE, 50)], text, score_floor=0.0, nms_iou=1.0, keep=10_000
    )[0]
    moved = torch.full((len(proposals), len(text)), -1.0)
    scores = torch.zeros_like(moved)
    for box, label, score in zip(found.boxes, found.labels, found.scores, strict=True):
        region = int((proposals[:, 1] - box[1]).abs().argmin())
        moved[region, label] = (box[0] - proposals[region, 0]) / (proposals[region, 2] - proposals[region, 0])
        scores[region, label] = score
    return moved, scores


@pytest.mark.parametrize("choice", ["foreground", "reference", "topk"])
def test_whose_box_a_region_gets_at_test_time(detector, choice):
    """With a planted regressor: boxes by the likeliest name, by none where background is likelier, by three names."""
    detector.settings = dataclasses.replace(detector.settings, box_class=choice, box_top_k=3)
    text = plant(detector, 6)
    top = 4.0 * torch.arange(12)
    proposals = torch.stack([torch.full_like(top, 5), top, torch.full_like(top, 17), top + 12], 1)
    batch = make_batch()
    with torch.no_grad():
        features = detector.eval().head.features(detector.backbone(normalise(batch.images, batch.sizes)))
        seen = detector.head.embed(features, proposals, torch.zeros(12, dtype=torch.int64)).embedding
    # Likelier than any name for six regions.
    ratio = (seen @ text.T).amax(1) / (seen @ seen.mean(0))
    middle = ratio.sort().values[5:7].mean()
    detector.head.classifier.background.data.copy_(middle * seen.mean(0))
    background = ratio < middle
    moved, scores = shifts(detector, text, proposals)
    ranked = scores.argsort(dim=1, descending=True)
    likeliest = (ranked[:, :1] + 1.0).expand(-1, 6)
    if choice == "foreground":
        expected = likeliest
    elif choice == "reference":
        assert background.sum() == 6
        expected = torch.where(background[:, None], 0.0, likeliest)
    else:
        expected = likeliest.scatter(1, ranked[:, :3], ranked[:, :3] + 1.0)
        assert len(expected[0].unique()) == 3
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-3)


def test_one_name_of_its_own_is_the_likeliest_and_more_names_than_there_are_do_no_harm(detector):
    torch.nn.init.normal_(detector.head.regressor.deltas.weight, std=0.3)
    text = unit_rows(4)
    found = {}
    for choice, count in (("foreground", 3), ("topk", 1), ("topk", 4), ("topk", 50)):
        detector.settings = dataclasses.replace(detector.settings, box_class=choice, box_top_k=count)
        found[choice, count] = detect(detector, text)
    for number in range(2):
        plain, one, four, fifty = (found[key][number] for key in found)
        assert torch.equal(plain.boxes, one.boxes)
        assert torch.equal(plain.scores, one.scores)
        assert torch.equal(four.boxes, fifty.boxes)
        assert not torch.equal(plain.boxes, four.boxes)


def by_place(found, label):
    """Boxes and scores of one name, best first."""
    mine = found.labels == label
    return found.boxes[mine], found.scores[mine]


@pytest.mark.parametrize("choice", ["foreground", "reference", "topk"])
def test_asked_names_are_found_as_among_all_when_the_others_compete_unseen(detector, choice):
    torch.nn.init.normal_(detector.head.regressor.deltas.weight, std=0.3)
    detector.settings = dataclasses.replace(detector.settings, box_class=choice)
    text = unit_rows(7)
    asked = [4, 1]
    others = [0, 2, 3, 5, 6]
    among, some = (
        detect(detector, rows, competing=rivals, keep=10_000)
        for rows, rivals in ((text, None), (text[asked], text[others]))
    )
    for every, found in zip(among, some, strict=True):
        assert set(found.labels.tolist()) == {0, 1}
        for label, name in enumerate(asked):
            for ours, theirs in zip(by_place(found, label), by_place(every, name), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_a_competitor_names_is_no_asked_object_and_takes_no_place(detector):
    detector.head.classifier.background.data.copy_(-9 * unit_rows(1, seed=8)[0])
    asked = unit_rows(1)
    (alone, _), (none, _) = (detect(detector, asked, competing=rivals) for rivals in (None, asked[:0]))
    assert torch.equal(alone.scores, none.scores)
    assert torch.equal(alone.boxes, none.boxes)
    # Five rows that say what the detector sees beat any other.
    batch = make_batch()
    with torch.no_grad():
        features = detector.eval().head.features(detector.backbone(normalise(batch.images, batch.sizes)))
        seen = detector.head.embed(features, random_boxes(9, limit=50), torch.zeros(9, dtype=torch.int64)).embedding
    winner = F.normalize(seen.mean(0, keepdim=True), dim=1)
    (found, _) = detect(detector, asked, competing=winner.expand(5, -1), keep=7)
    assert found.scores.max() < 0.5 * alone.scores.max()
    assert len(found.scores) == 7
    assert set(found.labels.tolist()) == {0}


def test_detection_changes_no_statistics_and_needs_no_gradient(detector):
    before = copy.deepcopy(detector.state_dict())
    found = detect(detector, unit_rows(3))[0]
    assert not found.scores.requires_grad
    assert all(torch.equal(before[name], value) for name, value in detector.state_dict().items())


# Heads.


def test_the_regressor_knows_the_class_unless_told_not_to():
    pooled, text = torch.randn(6, 4, 3, 3), unit_rows(12)
    semantic, blind = (
        SemanticBoxRegressor(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 8)), 8, dim)
        for dim in (DIM, 0)
    )
    assert semantic(pooled, text[:6]).shape == (6, 4)
    assert not torch.allclose(semantic(pooled, text[:6]), semantic(pooled, text[6:]), atol=1e-5, rtol=0)
    assert torch.equal(blind(pooled, text[:6]), blind(pooled, text[6:]))
    difference = sum(p.numel() for p in semantic.parameters()) - sum(p.numel() for p in blind.parameters())
    assert difference == 4 * DIM


@pytest.mark.parametrize("semantic", [True, False])
def test_the_detectors_regressor_is_semantic_when_asked(semantic):
    detector = make_detector(semantic_boxes=semantic)
    assert detector.head.regressor.semantic is semantic
    parts, _ = losses_and_gradients(detector, make_batch(), distill="cosine")
    assert all(value.isfinite() for value in parts.values())


def test_the_background_row_starts_at_zero_and_is_not_of_unit_length():
    classifier = CosineClassifier(DIM, temperature=20.0)
    embedding, text = unit_rows(5), unit_rows(3, seed=7)
    logits = classifier(embedding, text)
    assert logits.shape == (5, 4)
    assert (logits[:, 3] == 0).all()
    torch.testing.assert_close(logits[:, :3], 20 * embedding @ text.T)
    classifier.background.data.copy_(3 * embedding[0])
    assert classifier(embedding, text)[0, 3].item() == pytest.approx(60, rel=1e-5)


@pytest.mark.parametrize(("held", "used"), [(20, 20), (100, 100), (500, 100)])
def test_a_state_from_beyond_the_bound_of_the_temperature_means_the_bound(held, used):
    classifier = CosineClassifier(DIM, temperature=20.0)
    state = classifier.state_dict() | {"log_temperature": torch.tensor(math.log(held))}
    classifier.load_state_dict(state)
    embedding, text = unit_rows(5), unit_rows(3, seed=7)
    torch.testing.assert_close(classifier(embedding, text)[:, :3], used * embedding @ text.T)
    assert state["log_temperature"] == torch.tensor(math.log(held))


@pytest.mark.parametrize("start", [20.0, 99.0, 100.0])
def test_the_temperature_has_a_gradient_at_its_bound_too(start):
    classifier = CosineClassifier(DIM, temperature=start)
    F.cross_entropy(classifier(unit_rows(5), unit_rows(3, seed=7)), torch.arange(5) % 4).backward()
    assert classifier.log_temperature.grad.abs() > 0.1


def test_a_tower_keeps_shapes_and_is_never_negative():
    maps = [torch.randn(2, 8, 16, 16), torch.randn(2, 8, 8, 8)]
    out = Tower(8, 2)(maps)
    assert [m.shape for m in out] == [m.shape for m in maps]
    assert all((m >= 0).all() for m in out)
    assert all(a is b for a, b in zip(Tower(8, 0)(maps), maps, strict=True))


def test_a_mirrored_image_has_mirrored_regions():
    pooling = Pooling(spatial_scale=(1 / 8, 1 / 16), output_size=4, canonical_size=32, backend="eager")
    maps, boxes = [torch.randn(1, 6, 8, 8), torch.randn(1, 6, 4, 4)], random_boxes(10)
    boxes[5:] = torch.tensor([4.0, 6, 60, 55])
    index = torch.zeros(10, dtype=torch.int64)
    mirrored = torch.stack([SIDE - boxes[:, 2], boxes[:, 1], SIDE - boxes[:, 0], boxes[:, 3]], 1)
    found = roi_align([m.flip(3) for m in maps], mirrored, index, pooling)
    torch.testing.assert_close(found.flip(3), roi_align(maps, boxes, index, pooling), rtol=1e-4, atol=1e-5)


# Backbones.


@pytest.mark.parametrize(("name", "strides"), [("tiny", (8, 16)), ("resnet18", (4, 8, 16, 32, 64))])
def test_a_backbone_has_the_strides_it_states(name, strides):
    backbone = build_backbone(name, channels=24, weights=None).eval()
    assert name in BACKBONES
    assert (backbone.strides, backbone.channels) == (strides, 24)
    with torch.no_grad():
        maps = backbone(torch.rand(2, 3, 64, 128))
    assert [m.shape for m in maps] == [(2, 24, 64 // s, 128 // s) for s in strides]


def test_a_resnet_detector_pools_from_all_levels_but_the_last():
    detector = make_detector(**RESNET)
    assert detector.head.pooling.spatial_scale == (1 / 4, 1 / 8, 1 / 16, 1 / 32)
    parts, _ = losses_and_gradients(detector, make_batch(), distill="cosine")
    assert all(value.isfinite() for value in parts.values())
    assert len(detect(detector, unit_rows(3))) == 2


def test_images_are_normalised_by_channel():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = torch.tensor(mean)[None, :, None, None] + torch.tensor(std)[None, :, None, None] * 2
    torch.testing.assert_close(normalise(images, [(1, 1)]), torch.full((1, 3, 1, 1), 2.0))


@pytest.fixture(scope="module")
def resnet18_state():
    return torchvision.models.resnet18(weights=None).state_dict()


def test_imagenet_weights_are_loaded_and_the_early_part_frozen(resnet18_state):
    backbone = build_backbone("resnet18", channels=16, weights=resnet18_state)
    own = backbone.state_dict()
    assert torch.equal(own["body.body.layer3.0.conv1.weight"], resnet18_state["layer3.0.conv1.weight"])
    assert torch.equal(own["body.body.bn1.running_var"], resnet18_state["bn1.running_var"])
    frozen = {name.split(".")[2] for name, p in backbone.named_parameters() if not p.requires_grad}
    trained = {name.split(".")[2] for name, p in backbone.named_parameters() if p.requires_grad}
    assert frozen == {"conv1", "layer1"}
    assert {"layer2", "layer3", "layer4"} <= trained
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in backbone.modules())


def test_without_weights_all_is_trained():
    backbone = build_backbone("resnet18", channels=16, weights=None)
    assert all(p.requires_grad for p in backbone.parameters())
    assert not any(isinstance(m, FrozenBatchNorm2d) for m in backbone.modules())


def test_a_trained_state_fits_a_backbone_built_without_the_file(resnet18_state):
    trained = build_backbone("resnet18", channels=16, weights=resnet18_state)
    empty = build_backbone("resnet18", channels=16, weights=None, frozen_norms=True)
    empty.load_state_dict(trained.state_dict())
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(empty(image)[0], trained(image)[0])


def change(state, kind):
    if kind == "missing":
        return {name: value for name, value in state.items() if name != "layer2.0.conv1.weight"}
    if kind == "extra":
        return state | {"layer3.5.conv1.weight": torch.zeros(2)}
    return state | {"layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}


@pytest.mark.parametrize(
    ("kind", "tensor"),
    [("missing", "layer2.0.conv1.weight"), ("extra", "layer3.5.conv1.weight"), ("shape", "layer1.0.conv1.weight")],
)
def test_a_state_of_another_network_is_refused_in_one_line(resnet18_state, kind, tensor):
    with pytest.raises(ValueError, match=f"not an ImageNet state of resnet18.*{tensor}") as caught:
        build_backbone("resnet18", channels=16, weights=change(resnet18_state, kind))
    assert "\n" not in str(caught.value)


def test_weights_for_the_tiny_backbone_are_refused_and_taken_by_the_one_that_is_offered():
    state = torchvision.models.resnet50(weights=None).state_dict()
    with pytest.raises(
        ValueError, match="tiny backbone has no pretrained weights; choose model.backbone = resnet50"
    ) as said:
        build_backbone("tiny", channels=16, weights=state)
    offered = str(said.value).rpartition("= ")[2].partition(" ")[0]
    assert build_backbone(offered, channels=16, weights=state).strides[0] == 4


def test_an_unknown_backbone_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'resnet19' is unknown; choose one of tiny, resnet18"):
        build_backbone("resnet19", channels=16, weights=None)
