"""Train the learned proposer on base boxes, and propose regions with it."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ezsd.adapt import flatten, restore
from ezsd.boxes import clip, flip_horizontal, iou, scale
from ezsd.cache import Unfinished
from ezsd.data.dataset import pad_images, resize
from ezsd.detector.proposer import Proposer
from ezsd.detector.rpn import NMS_IOU
from ezsd.detector.sampling import step_seed
from ezsd.pipeline.config.schema import ProposerConfig
from ezsd.pipeline.errors import ConfigError
from ezsd.pipeline.extraction.base_images import BaseImages, halving_where_memory_is_short
from ezsd.pipeline.extraction.encoder import single_thread
from ezsd.pipeline.extraction.reuse import Columns
from ezsd.pipeline.progress import Progress
from ezsd.pipeline.runs.model import configured_backbone, rate_groups, read_backbone
from ezsd.pipeline.runs.run import flatten_optimiser, restore_optimiser

log = logging.getLogger("ezsd")

_WARMUP = 0.06
"""Fraction of the steps in which the learning rate rises."""
_MAX_GRAD_NORM = 1.0
HELD_OUT_IMAGES = 500
"""Most held-out images: enough to measure recall."""
SAVE_SECONDS = 120
"""Time after which the state of a training is kept."""
_RECALL_BOXES = 100
"""Boxes per image that recall is measured with, whatever proposer.max_proposals is: it is no input of the network."""


@dataclass(frozen=True, slots=True)
class ProposerWeights:
    """State of a trained proposer as a store keeps it. Equal weights have equal digests."""

    digest: str
    """Sha256 of the values."""
    values: NDArray[np.float32] = field(compare=False)
    """Parameters and statistics, (K,)."""
    parameters: list[dict[str, object]] = field(compare=False)
    """Names and shapes."""


def make_proposer(
    config: ProposerConfig, *, proposals: int = _RECALL_BOXES, nms_iou: float = NMS_IOU, pretrained: bool = True
) -> Proposer:
    """Make a proposer that is not trained on boxes yet.

    Args:
        config: network, and the file of its backbone's weights.
        proposals: most boxes per image.
        nms_iou: IoU threshold of NMS, within a level of the pyramid.
        pretrained: False to leave that file alone, where trained weights are going to be loaded.

    Raises:
        ConfigError: the weights do not fit the backbone, or the anchor sizes its levels.
    """
    weights = read_backbone(Path(config.weights), "proposer.weights") if pretrained and config.weights else None
    backbone = configured_backbone("proposer", config, weights, frozen_norms=config.weights is not None)
    return Proposer(backbone, config.rpn_sizes, proposals=proposals, nms_iou=nms_iou)


def proposer_weights(arrays: Mapping[str, NDArray[np.float32]], attributes: Mapping[str, Any]) -> ProposerWeights:
    """Weights from a store's product `proposer`: its arrays and attributes."""
    values = arrays["values"]
    return ProposerWeights(values_digest(values), values, attributes["parameters"])


def values_digest(values: NDArray[np.float32]) -> str:
    """Sha256 of a proposer's values."""
    return hashlib.sha256(values.tobytes()).hexdigest()


def load_proposer(
    config: ProposerConfig, weights: ProposerWeights, *, proposals: int, nms_iou: float = NMS_IOU, device: str
) -> Proposer:
    """Make a trained proposer in evaluation mode."""
    proposer = make_proposer(config, proposals=proposals, nms_iou=nms_iou, pretrained=False)
    restore(proposer_state(proposer), weights.values, weights.parameters)
    return proposer.to(device).eval()


def train_proposer(
    images: BaseImages,
    config: ProposerConfig,
    *,
    held_out: float,
    device: torch.device,
    seed: int,
    unfinished: Unfinished | None = None,
) -> tuple[NDArray[np.float32], dict[str, object]]:
    """Train a proposer on the base boxes of the training images.

    One thread of the CPU computes, in float32: the same machine makes the same weights.

    Args:
        images: BASE boxes only.
        config: network, schedule and input size.
        held_out: fraction of the images whose base objects measure recall.
        device: device of the training.
        seed: seed of the weights, the held-out choice, the order, the flips and the anchors drawn.
        unfinished: keeps the training's state every `SAVE_SECONDS`, and has that of a killed one, with which this one
            goes on: the weights become the same.

    Returns:
        State (K,), and attributes for the store: parameter table, steps, recall of held-out base objects.

    Raises:
        ConfigError: no held-out image, or none of the others, can be read; the loss is not finite; a step does not fit
            in memory.
        ImageError: more images than may be left out cannot be read.
    """
    trained_on, held = images.split(held_out, seed=seed, most=HELD_OUT_IMAGES)
    if all(images.read(position) is None for position in held):
        raise ConfigError("the proposer needs base boxes in images that can be read, found none to hold out")
    torch.manual_seed(seed)
    training = _Training(make_proposer(config).to(device).train(), config)
    training.resume(unfinished, images)
    with single_thread(), ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
        with halving_where_memory_is_short("proposer.batch_size", config.batch_size, "images"):
            batches = _batches(images, trained_on, config, seed=seed, drawn=training.drawn)
            _train(training, batches, images, device, reader, seed=seed, unfinished=unfinished)
        overlap = _held_out_overlap(training.proposer.eval(), images, held, config)
    values, table = flatten(proposer_state(training.proposer))
    attributes: dict[str, object] = {
        "parameters": table,
        "steps": config.steps,
        "held_out_objects": len(overlap),
        "held_out_boxes_per_image": _RECALL_BOXES,
        "held_out_recall_50": float((overlap >= 0.5).float().mean()),
        "held_out_recall_70": float((overlap >= 0.7).float().mean()),
    }
    if images.bad:
        attributes["left_out_images"] = sorted(images.bad)
    return values, attributes


def proposer_state(proposer: Proposer) -> dict[str, Tensor]:
    """Parameters and statistics of a proposer by name, without step counters."""
    return {name: value for name, value in proposer.state_dict().items() if value.is_floating_point()}


def propose(proposer: Proposer, pixels: Tensor, config: ProposerConfig) -> Columns:
    """Propose regions of one image, best first.

    Args:
        proposer: in evaluation mode.
        pixels: (3, H, W) uint8, original size, on any device.
        config: input size.

    Returns:
        `box` (P, 4) float32 in original-image pixels, at least one pixel wide and high, and `score` (P,) float32.
    """
    _, height, width = pixels.shape
    # The CPU alone resamples bytes, and training does it there.
    image, sx, sy = _resized(pixels.cpu(), config)
    padded, sizes = pad_images([image])
    ((boxes, score),) = proposer.propose(padded.to(next(proposer.parameters()).device), sizes)
    boxes = clip(scale(boxes.cpu(), 1 / sx, 1 / sy), width, height)
    kept = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1)
    return {"box": boxes[kept].numpy(), "score": score.cpu()[kept].numpy()}


def _resized(pixels: Tensor, config: ProposerConfig) -> tuple[Tensor, float, float]:
    return resize(pixels, short_side=config.min_size, long_side=config.max_size)


class _Training:
    """A proposer with its optimiser, and how far it has come."""

    def __init__(self, proposer: Proposer, config: ProposerConfig) -> None:
        self.proposer = proposer
        self.config = config
        groups = rate_groups(proposer, config.backbone_lr_mult)
        self.optimiser = torch.optim.AdamW(
            [{"params": group} for group, _ in groups], config.learning_rate, weight_decay=config.weight_decay
        )
        self._peaks = [config.learning_rate * factor for _, factor in groups]
        self.schedule = self._schedule_after(0)
        self.step = 0
        self.drawn = 0
        """Images drawn for the steps done, with those that could not be read."""

    def _schedule_after(self, step: int) -> torch.optim.lr_scheduler.OneCycleLR:
        # One that begins later takes the peaks and floors that the first has given the optimiser.
        return torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser,
            self._peaks,
            total_steps=self.config.steps,
            pct_start=_WARMUP,
            cycle_momentum=False,
            last_epoch=step - 1,
        )

    def resume(self, unfinished: Unfinished | None, images: BaseImages) -> None:
        """Take up a state that a killed training left, if there is one."""
        state = None if unfinished is None else unfinished.read()
        if state is None:
            return
        arrays, attributes = state
        tensors = {name: torch.from_numpy(values) for name, values in arrays.items()}
        self.proposer.load_state_dict(_of_kind("proposer", tensors))
        restore_optimiser(self.optimiser, _of_kind("optimiser", tensors))
        self.step, self.drawn = attributes["step"], attributes["drawn"]
        self.schedule = self._schedule_after(self.step)
        images.bad.update({int(image): reason for image, reason in attributes["bad_images"].items()})
        log.info("proposer: goes on after step %d of %d", self.step, self.config.steps)

    def save(self, unfinished: Unfinished, images: BaseImages) -> None:
        """Keep the state."""
        kinds = {"proposer": self.proposer.state_dict(), "optimiser": flatten_optimiser(self.optimiser)}
        arrays = {f"{kind}/{name}": _array(value) for kind, own in kinds.items() for name, value in own.items()}
        # A copy: the reader may find another one meanwhile.
        bad = {str(image): reason for image, reason in dict(images.bad).items()}
        unfinished.write(self.step, arrays, {"step": self.step, "drawn": self.drawn, "bad_images": bad})


def _of_kind(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{kind}/"): value for name, value in tensors.items() if name.startswith(f"{kind}/")}


def _array(value: Tensor) -> NDArray[Any]:
    """Values in a type that the journal keeps: float32 or int64."""
    kept: NDArray[Any] = value.detach().cpu().to(torch.float32 if value.is_floating_point() else torch.int64).numpy()
    return kept


@dataclass(frozen=True, slots=True)
class _Batch:
    """Images with their objects, of one step."""

    pixels: Tensor
    """Padded, (B, 3, H, W) uint8."""
    sizes: list[tuple[int, int]]
    boxes: list[Tensor]
    drawn: int
    """Images drawn up to here, with those that could not be read."""


def _train(
    training: _Training,
    batches: Iterator[_Batch],
    images: BaseImages,
    device: torch.device,
    reader: ThreadPoolExecutor,
    *,
    seed: int,
    unfinished: Unfinished | None,
) -> None:
    """Make the steps that are left, reading one batch ahead."""
    proposer, config, saved = training.proposer, training.config, time.monotonic()
    with Progress("proposer", config.steps, unit="step", done=training.step) as progress:
        # No more than the steps need: an image that cannot be read is recorded once it is read.
        wanted = islice(batches, config.steps - training.step)
        ahead = reader.submit(next, wanted, None)
        while (batch := ahead.result()) is not None:
            ahead = reader.submit(next, wanted, None)
            torch.manual_seed(step_seed(seed, training.step))
            loss = proposer(batch.pixels.to(device), batch.sizes, [boxes.to(device) for boxes in batch.boxes])
            training.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(proposer.parameters(), _MAX_GRAD_NORM)
            training.optimiser.step()
            training.schedule.step()
            training.step, training.drawn = training.step + 1, batch.drawn
            value = float(loss.detach())
            if not math.isfinite(value):
                raise ConfigError(
                    f"the proposer's loss is not finite at step {training.step}; lower `proposer.learning_rate`, now "
                    f"{config.learning_rate:g}"
                )
            if unfinished is not None and time.monotonic() - saved >= SAVE_SECONDS:
                training.save(unfinished, images)
                saved = time.monotonic()
            progress.advance(note=f"loss {value:.3f}")


def _batches(
    images: BaseImages, positions: Sequence[int], config: ProposerConfig, *, seed: int, drawn: int
) -> Iterator[_Batch]:
    """Batches for ever, after the first `drawn` images."""
    samples: list[tuple[Tensor, Tensor]] = []
    unread = 0
    for number, (position, flipped) in enumerate(islice(_order(positions, seed), drawn, None), drawn + 1):
        pixels = images.read(position)
        if pixels is None:
            unread += 1
            # No image of a whole round.
            if unread == 2 * len(positions):
                raise ConfigError("the proposer needs base boxes in images that can be read, found none to train on")
            continue
        unread = 0
        image, sx, sy = _resized(pixels, config)
        boxes = scale(images.boxes(position), sx, sy)
        samples.append((image.flip(2), flip_horizontal(boxes, image.shape[2])) if flipped else (image, boxes))
        if len(samples) == config.batch_size:
            padded, sizes = pad_images([image for image, _ in samples])
            yield _Batch(padded, sizes, [boxes for _, boxes in samples], number)
            samples = []


def _order(positions: Sequence[int], seed: int) -> Iterator[tuple[int, bool]]:
    """Images for ever, reshuffled each round, and whether to flip each; half of them are."""
    rng = np.random.default_rng([seed, 2])
    while True:
        for position in rng.permutation(positions).tolist():
            yield position, bool(rng.random() < 0.5)


def _held_out_overlap(
    proposer: Proposer, images: BaseImages, positions: Sequence[int], config: ProposerConfig
) -> Tensor:
    """Largest IoU of each held-out base object with a proposed box, (N,)."""
    found = []
    for position in positions:
        pixels = images.read(position)
        if pixels is not None:
            objects, boxes = images.boxes(position), propose(proposer, pixels, config)["box"]
            found.append(iou(objects, torch.from_numpy(boxes)).amax(1) if len(boxes) else torch.zeros(len(objects)))
    return torch.cat(found)
