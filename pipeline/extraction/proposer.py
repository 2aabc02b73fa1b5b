"""Train the learned proposer on base boxes, and propose regions with it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ezsd.adapt import flatten, restore
from ezsd.boxes import clip, flip_horizontal, iou, scale
from ezsd.data.annotations import Annotations
from ezsd.data.dataset import pad_images, resize
from ezsd.detector.backbone import build_backbone
from ezsd.detector.proposer import Proposer
from ezsd.pipeline.config.schema import Config, ProposerConfig
from ezsd.pipeline.data.image_source import ImageSource
from ezsd.pipeline.data.images import require_few_bad
from ezsd.pipeline.data.requirements import held_out_images
from ezsd.pipeline.errors import ConfigError, ImageError
from ezsd.pipeline.extraction.reuse import Columns
from ezsd.pipeline.progress import Progress
from ezsd.pipeline.runs.model import read_backbone

log = logging.getLogger("ezsd")

_WARMUP = 0.06
"""Fraction of the steps in which the learning rate rises."""
_MAX_GRAD_NORM = 1.0


@dataclass(frozen=True, slots=True)
class ProposerWeights:
    """State of a trained proposer as a store keeps it."""

    values: NDArray[np.float32]
    """(K,)."""
    parameters: list[dict[str, object]]
    """Names and shapes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseImages:
    """Training images with their base boxes; images that cannot be read are left out, up to a limit."""

    annotations: Annotations
    source: ImageSource
    most_bad: int
    bad: dict[int, str] = field(default_factory=dict)
    """Images left out so far, by id, and why."""

    def sample(self, position: int, config: ProposerConfig, *, flipped: bool) -> tuple[Tensor, Tensor] | None:
        """A resized image (3, H, W) uint8 and its boxes (N, 4); None when it cannot be read.

        Raises:
            ImageError: it cannot be read, and with it more than may be left out.
        """
        record = self.annotations.images[position]
        try:
            image, sx, sy = _resized(self.source.read(record), config)
        except ImageError as error:
            if not self.most_bad:
                raise
            if record.id not in self.bad:
                log.warning("left out of the proposer's training: %s", error)
                self.bad[record.id] = str(error)
                require_few_bad(self.bad, self.most_bad)
            return None
        boxes = scale(torch.from_numpy(self.annotations.box[self.annotations.rows(position)]), sx, sy)
        return (image.flip(2), flip_horizontal(boxes, image.shape[2])) if flipped else (image, boxes)


def make_proposer(config: Config) -> Proposer:
    """Make an untrained proposer that gives proposals.max_proposals boxes an image.

    Raises:
        ConfigError: the weights do not fit the backbone, or the anchor sizes its levels.
    """
    settings = config.proposer
    weights = None if settings.weights is None else read_backbone(Path(settings.weights), "proposer.weights")
    return _proposer(config, weights)


def load_proposer(config: Config, weights: ProposerWeights, *, device: str) -> Proposer:
    """Make a trained proposer in evaluation mode."""
    proposer = _proposer(config, None)
    restore(proposer_state(proposer), weights.values, weights.parameters)
    return proposer.to(device).eval()


def _proposer(config: Config, weights: dict[str, Tensor] | None) -> Proposer:
    settings = config.proposer
    try:
        backbone = build_backbone(
            settings.backbone,
            channels=settings.fpn_channels,
            weights=weights,
            frozen_norms=settings.weights is not None,
        )
    except ValueError as error:
        raise ConfigError(str(error).replace("model.backbone", "proposer.backbone")) from error
    if len(settings.rpn_sizes) != len(backbone.strides):
        raise ConfigError(
            f"proposer.rpn_sizes needs one size per level of {settings.backbone} (strides {backbone.strides}), "
            f"got {len(settings.rpn_sizes)}"
        )
    return Proposer(backbone, settings.rpn_sizes, proposals=config.proposals.max_proposals)


def train_proposer(
    proposer: Proposer, images: BaseImages, config: ProposerConfig, *, held_out: float, device: torch.device, seed: int
) -> tuple[NDArray[np.float32], dict[str, object]]:
    """Train a proposer in place on the base boxes of the training images.

    Args:
        proposer: see `make_proposer`.
        images: BASE boxes only.
        config: schedule and input size.
        held_out: fraction of the images whose base objects measure recall.
        device: of the training.
        seed: of the held-out choice, the order and the flips.

    Returns:
        Its state (K,), and attributes for the store: parameter table, steps, recall of held-out base objects.

    Raises:
        ConfigError: no held-out image with a base box can be read.
        ImageError: more images than may be left out cannot be read.
    """
    with_boxes = np.unique(images.annotations.image_index)
    order = np.random.default_rng([seed, 0]).permutation(with_boxes)
    held = held_out_images(len(with_boxes), held_out)
    proposer.to(device).train()
    optimiser = torch.optim.AdamW(
        [p for p in proposer.parameters() if p.requires_grad], config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, config.learning_rate, total_steps=config.steps, pct_start=_WARMUP, cycle_momentum=False
    )
    batches = _batches(images, np.sort(order[held:]), config, seed=seed)
    with Progress("proposer", config.steps, unit="step") as progress, ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(next, batches)
        for step in range(config.steps):
            pixels, sizes, boxes = ahead.result()
            if step + 1 < config.steps:
                ahead = reader.submit(next, batches)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                loss = proposer(pixels.to(device), sizes, [b.to(device) for b in boxes])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(proposer.parameters(), _MAX_GRAD_NORM)
            optimiser.step()
            schedule.step()
            progress.advance(note=f"loss {loss.detach():.3f}")
    proposer.eval()
    overlap = _held_out_overlap(proposer, images, np.sort(order[:held]).tolist(), config, device)
    values, table = flatten(proposer_state(proposer))
    attributes: dict[str, object] = {
        "parameters": table,
        "steps": config.steps,
        "held_out_objects": len(overlap),
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
        pixels: (3, H, W) uint8, original size, where the proposer is.
        config: input size.

    Returns:
        `box` (P, 4) float32 in original-image pixels, at least one pixel wide and high, and `score` (P,) float32.
    """
    _, height, width = pixels.shape
    image, sx, sy = _resized(pixels, config)
    padded, sizes = pad_images([image])
    (boxes, score), *_ = proposer.propose(padded.to(pixels.device), sizes)
    boxes = clip(scale(boxes.cpu().float(), 1 / sx, 1 / sy), width, height)
    kept = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1)
    return {"box": boxes[kept].numpy(), "score": score.cpu().float()[kept].numpy()}


def _resized(pixels: Tensor, config: ProposerConfig) -> tuple[Tensor, float, float]:
    return resize(pixels, short_side=config.min_size, long_side=config.max_size)


def _batches(
    images: BaseImages, positions: NDArray[np.int64], config: ProposerConfig, *, seed: int
) -> Iterator[tuple[Tensor, list[tuple[int, int]], list[Tensor]]]:
    """Padded images (B, 3, H, W), their sizes and boxes, for ever; images reshuffled each round."""
    rng = np.random.default_rng([seed, 2])
    samples: list[tuple[Tensor, Tensor]] = []
    while True:
        for position in rng.permutation(positions).tolist():
            sample = images.sample(position, config, flipped=bool(rng.random() < 0.5))
            if sample is not None:
                samples.append(sample)
            if len(samples) == config.batch_size:
                pixels, sizes = pad_images([image for image, _ in samples])
                yield pixels, sizes, [boxes for _, boxes in samples]
                samples = []


def _held_out_overlap(
    proposer: Proposer, images: BaseImages, positions: Sequence[int], config: ProposerConfig, device: torch.device
) -> Tensor:
    """Largest IoU of each held-out base object with a proposed box, (N,)."""
    found = []
    for position in positions:
        record = images.annotations.images[position]
        objects = torch.from_numpy(images.annotations.box[images.annotations.rows(position)])
        try:
            boxes = propose(proposer, images.source.read(record).to(device), config)["box"]
        except ImageError:
            continue
        found.append(iou(objects, torch.from_numpy(boxes)).amax(1) if len(boxes) else torch.zeros(len(objects)))
    if not found:
        raise ConfigError("the proposer needs base boxes in images that can be read, found none to hold out")
    return torch.cat(found)
