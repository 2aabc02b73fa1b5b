"""One training step on a GPU beside the same one on the CPU: terms, gradients, and how the loss falls."""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ezsd.data.dataset import Sample, collate
from ezsd.data.shapes import SHAPES_SPLIT, scene
from ezsd.detector.masks import GRID, ObjectMasks
from ezsd.detector.model import Batch, Detector
from ezsd.losses import weighted_sum
from ezsd.pipeline.config.schema import Config, load_preset
from ezsd.pipeline.runs.model import build_detector
from ezsd.pipeline.training.trainer import Objective, Trainer, build_optimiser
from ezsd.precision import autocast

Row = dict[str, Any]
EMBED_DIM = 64
HEADS = {"fast": ("model.head=fast", "loss.metric=l1"), "paper": ("model.head=paper", "loss.metric=cosine")}
"""The two heads with the two distances."""
ALL_TAKEN = (
    "model.masks=true",
    "train.rng=image",
    "model.rpn_proposals=60",
    "model.box_batch_size_per_image=128",
    "model.box_positive_fraction=1.0",
    "train.warmup_steps=0",
    "train.pseudo_confidence=0",
)
"""All proposals are learned from: two of them in another order would else be drawn differently."""
MEDIAN = {
    "terms in float32": 1e-4,
    "gradients in float32": 1e-3,
    "terms as trained": 3e-2,
    "gradients as trained": 0.45,
}
"""Largest relative difference of each term, and of each parameter's gradient by norms, of the median batch.

Between two orders of summation on a CPU: 2e-7, 5e-4 (a maximum or a kink changes sides) and, in bf16, 6e-3 and 0.31: a
first convolution's gradient has come through all others. Boxes 2 pixels aside backward make that 0.5, none at all 1.
"""
WORST = {"terms in float32": 3e-2, "gradients in float32": 0.3, "terms as trained": 0.5, "gradients as trained": 0.8}
"""The same of the worst batch: one proposal at IoU 0.5 with an object, on one side here and on the other there, moves
the terms of objects by 0.16 there."""
ROUND = 4
"""Batches of a short training, in turns; losses are compared by the mean of a round."""
FALLEN = 0.97
"""Of the first round's loss, what the last one has to be below."""
FALL = 0.1
"""Largest relative difference of that mean: 0.007 between bf16 and float32 on a CPU."""


class Differs(Exception):
    """What a GPU computes differs from what the CPU does."""


@dataclass(frozen=True, slots=True)
class Losses:
    """Terms of the objective and gradients, of one batch."""

    terms: dict[str, float]
    gradients: dict[str, Tensor]
    """By parameter, on the CPU."""


def sample(index: int, text: Tensor) -> Sample:
    """A scene of the shapes with its base objects, a diamond in the box of each, and regions anywhere."""
    drawn = scene(seed=0, split="train", index=index)
    random = torch.Generator().manual_seed(index)
    base = [n for n, name in enumerate(drawn.names) if name in SHAPES_SPLIT.base]
    boxes = torch.from_numpy(drawn.boxes[base])
    labels = torch.tensor([SHAPES_SPLIT.base.index(drawn.names[n]) for n in base], dtype=torch.int64)
    corner = torch.rand(8, 2, generator=random) * 80
    regions = torch.cat([corner, corner + 16 + torch.rand(8, 2, generator=random) * 30], 1)
    cached = torch.cat([boxes, regions])
    noise = torch.randn(len(cached), text.shape[1], generator=random) / text.shape[1] ** 0.5
    near = torch.cat([labels, torch.randint(0, len(text), (8,), generator=random)])
    confidence = torch.cat([torch.ones(len(boxes)), torch.rand(8, generator=random)])
    places = torch.arange(GRID).float() - (GRID - 1) / 2
    diamond = places.abs()[:, None] + places.abs() < GRID / 2
    return Sample(
        image=torch.from_numpy(np.ascontiguousarray(drawn.pixels)).permute(2, 0, 1).contiguous(),
        boxes=boxes,
        labels=labels,
        region_boxes=cached,
        region_target=functional.normalize(text[near] + noise, dim=1).half(),
        region_confidence=confidence,
        cached_boxes=cached,
        cached_confidence=confidence,
        canvas=(0, 0),
        seed=index,
        masks=ObjectMasks(boxes, diamond.expand(len(boxes), -1, -1).clone()),
    )


def text_rows() -> Tensor:
    """Unit text rows of the base classes, (C, D)."""
    rows = torch.randn(len(SHAPES_SPLIT.base), EMBED_DIM, generator=torch.Generator().manual_seed(0))
    return functional.normalize(rows, dim=1)


def detector_of(config: Config) -> Detector:
    """A detector with the same first weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_detector(config, EMBED_DIM, None).train()


def placed(detector: Detector, device: torch.device, config: Config) -> Detector:
    """A copy on a device, laid out as a training has it."""
    found = copy.deepcopy(detector).to(device)
    return found.to(memory_format=torch.channels_last) if config.train.channels_last else found


def losses(detector: Detector, batch: Batch, text: Tensor, config: Config, *, rounded: bool) -> Losses:
    """What one batch teaches a detector, in float32, or as a training on this device rounds it."""
    device = next(detector.parameters()).device
    detector.zero_grad(set_to_none=True)
    objective = Objective(text.to(device), config.loss)
    with autocast(device, training=True) if rounded else contextlib.nullcontext():
        parts = detector(batch.to(device), objective.text, distill=config.loss.metric)
    total = weighted_sum(parts, objective.weights)
    total.backward()
    gradients = {name: p.grad.cpu() for name, p in detector.named_parameters() if p.grad is not None}
    terms = {"loss": total, **parts}
    return Losses({name: float(term.detach()) for name, term in terms.items()}, gradients)


def relative(found: float, expected: float) -> float:
    """Difference over what is expected; 0 where there is none, infinite where 0 is expected."""
    if found == expected:
        return 0.0
    return abs(found - expected) / abs(expected) if expected else math.inf


def of_terms(found: Losses, expected: Losses) -> dict[str, float]:
    """Relative difference of each term."""
    return {name: relative(found.terms[name], right) for name, right in expected.terms.items()}


def of_gradients(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Norm of the difference over the norm of the gradient of each parameter; infinite where there is none.

    A norm that is tiny beside that of all gradients counts as a thousandth of it: a bias before a batch norm has no
    gradient but what rounding leaves.
    """
    whole = math.sqrt(sum(float(one.double().square().sum()) for one in expected.values()))
    differences = {}
    for name, right in expected.items():
        size = max(float(right.double().norm()), 1e-3 * whole)
        apart = (found[name].double() - right.double()).norm() if name in found else math.inf
        differences[name] = relative(size + float(apart), size)
    return differences


def largest(by_batch: Sequence[Mapping[str, float]], what: str) -> dict[str, float | str]:
    """The largest differences of the median and of the worst batch. Differs says which name is beyond its bound."""
    # NaN is larger than anything.
    values = {name: sorted(_or_infinite(one[name]) for one in by_batch) for name in by_batch[0]}
    middle = max(values, key=lambda name: statistics.median(values[name]))
    worst = max(values, key=lambda name: values[name][-1])
    median_, worst_ = statistics.median(values[middle]), values[worst][-1]
    for name, value, bound, batch in (
        (middle, median_, MEDIAN[what], "the median batch"),
        (worst, worst_, WORST[what], "one batch"),
    ):
        if not value <= bound:
            raise Differs(f"{what}: {name} of {batch} is off by {value:.1e} of its size, {bound:.0e} allowed")
    return {"median": median_, "of": middle, "worst": worst_, "worst_of": worst}


def _or_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value


def batches_of(count: int, images: int, text: Tensor) -> list[Batch]:
    """Batches of different scenes, on the CPU."""
    numbers = iter(range(count * images))
    return [collate([sample(next(numbers), text) for _ in range(images)]) for _ in range(count)]


def compare(device: torch.device, *, count: int, images: int) -> Row:
    """Terms and gradients of both heads with masks on a device beside the CPU. Differs says what is off.

    Args:
        device: where the other half runs.
        count: batches.
        images: of a batch.
    """
    text, row = text_rows(), {}
    for head, settings in HEADS.items():
        config = load_preset("shapes", (*settings, *ALL_TAKEN))
        on_cpu = detector_of(config)
        there = placed(on_cpu, device, config)
        differences: dict[str, list[dict[str, float]]] = {what: [] for what in MEDIAN}
        for batch in batches_of(count, images, text):
            expected = losses(on_cpu, batch, text, config, rounded=False)
            plain = losses(there, batch, text, config, rounded=False)
            differences["terms in float32"].append(of_terms(plain, expected))
            differences["gradients in float32"].append(of_gradients(plain.gradients, expected.gradients))
            rounded = losses(there, batch, text, config, rounded=True)
            differences["terms as trained"].append(of_terms(rounded, expected))
            differences["gradients as trained"].append(of_gradients(rounded.gradients, expected.gradients))
        try:
            row[head] = {what: largest(by_batch, what) for what, by_batch in differences.items()}
        except Differs as error:
            raise Differs(f"head {head}: {error}") from error
    return row


def trainer_of(config: Config, device: torch.device, text: Tensor) -> Trainer:
    """A trainer of the first weights on a device."""
    detector = placed(detector_of(config), device, config)
    return Trainer(
        detector, build_optimiser(detector, config.train), Objective(text.to(device), config.loss), config.train
    )


def losses_of_steps(trainer: Trainer, batches: Sequence[Batch], steps: int) -> list[float]:
    """Loss of each of some training steps, the batches in turns."""
    device = next(trainer.detector.parameters()).device
    return [trainer.step([batches[step % len(batches)].to(device)], step)["loss"] for step in range(steps)]


def falls(device: torch.device, *, images: int, steps: int) -> Row:
    """Mean loss of the last round of a short training on both devices. Differs if it does not fall, or not alike."""
    text, row = text_rows(), {}
    batches = batches_of(ROUND, images, text)
    for head, settings in HEADS.items():
        config = load_preset("shapes", (*settings, *ALL_TAKEN, f"train.steps={10 * steps}"))
        found = {}
        for name, place in (("cpu", torch.device("cpu")), ("there", device)):
            seen = losses_of_steps(trainer_of(config, place, text), batches, steps)
            first, last = statistics.mean(seen[:ROUND]), statistics.mean(seen[-ROUND:])
            if not last < FALLEN * first:
                raise Differs(f"head {head}: the loss of {steps} steps on {place} went from {first:.3f} to {last:.3f}")
            found[name] = {"first": first, "last": last}
        apart = relative(found["there"]["last"], found["cpu"]["last"])
        if not apart <= FALL:
            raise Differs(
                f"head {head}: after {steps} steps the loss is {found['there']['last']:.3f} there and "
                f"{found['cpu']['last']:.3f} on the CPU, {FALL:.0%} allowed"
            )
        row[head] = {**found, "apart": apart}
    return row


def speed(device: torch.device, *, images: int, steps: int) -> Row:
    """Waits of the host, seconds and memory of a step of the preset's own size, forward to optimiser."""
    text = text_rows()
    config = load_preset("shapes", ("model.masks=true", "train.pseudo_confidence=0"))
    trainer, batches = trainer_of(config, device, text), batches_of(2, images, text)
    losses_of_steps(trainer, batches, 2)
    waits = count_waits(lambda: losses_of_steps(trainer, batches[:1], 1))
    torch.cuda.reset_peak_memory_stats(device)
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    losses_of_steps(trainer, batches, steps)
    torch.cuda.synchronize(device)
    spent = time.perf_counter() - began
    return {
        "images": images,
        "waits_per_step": waits,
        "steps_per_s": steps / spent,
        "peak_mib": torch.cuda.max_memory_allocated(device) / 2**20,
    }


def count_waits(call: Callable[[], object]) -> int:
    """How often the host waits for the device in a call, as torch reports it."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(one.message) for one in told)
