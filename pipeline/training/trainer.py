"""Optimiser step: objective, learning rate, gradient accumulation over batches and processes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ezsd.detector.model import Batch, Detector, Totals
from ezsd.losses import loss_weights, weighted_sum
from ezsd.pipeline.config.schema import Config, LossConfig, TrainConfig
from ezsd.pipeline.errors import NonFiniteLoss
from ezsd.pipeline.runs.model import rate_groups
from ezsd.pipeline.runs.schedule import learning_rate, peak_rate
from ezsd.pipeline.training.distributed import Distributed
from ezsd.precision import autocast


@dataclass(frozen=True, slots=True)
class Objective:
    """Text embeddings and weights of the objective."""

    text: Tensor
    """Unit text embeddings of the classes in the cross-entropy, base classes first, (C, D)."""
    config: LossConfig

    @property
    def weights(self) -> dict[str, float]:
        """Factor of each term, see `ezsd.losses.loss_weights`."""
        return loss_weights(self.config, self.text.shape[1])


class AverageWeights:
    """Moving average of a model's state; its decay starts small, so that the initial weights are forgotten."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the average towards the model's weights after step number `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.state[name].lerp_(value, 1 - decay)
            else:
                self.state[name].copy_(value)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore a saved average."""
        for name, value in self.state.items():
            value.copy_(state[name])


@dataclass
class Trainer:
    """Detector with its optimiser and training steps."""

    detector: Detector
    optimiser: torch.optim.Optimizer
    objective: Objective
    config: TrainConfig
    average: AverageWeights | None = None
    distributed: Distributed = field(default_factory=Distributed)
    class_counts: Tensor | None = None
    """Objects of each base class that training has shown, (B,) int64, over all processes; only Seesaw loss counts."""

    def __post_init__(self) -> None:
        self._model = self.distributed.wrap(self.detector)

    def step(self, batches: Sequence[Batch], step: int) -> dict[str, float]:
        """Make one optimiser step over the batches of this process, which are on the detector's device.

        Returns:
            `loss`, the weighted sum, its unweighted parts, and the learning rate; over all processes.

        Raises:
            NonFiniteLoss: loss or gradient is not finite; the message has the parts.
        """
        rate = learning_rate(step, self.config)
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["lr_mult"]
        totals = self._totals(batches)
        self._count_objects(batches)
        self.optimiser.zero_grad(set_to_none=True)
        with self._without_exchange():
            *earlier, last = batches
            parts = [self._backward(batch, totals) for batch in earlier]
        # Gradients are exchanged once a step, while those of the last batch are computed.
        parts.append(self._backward(last, totals))
        names, values = parts[0][0], sum((values for _, values in parts[1:]), parts[0][1])
        norm = nn.utils.clip_grad_norm_(self.detector.parameters(), self.config.max_grad_norm)
        self.optimiser.step()
        self.detector.constrain()
        if self.average is not None:
            self.average.update(self.detector, step + 1)
        # One transfer, for a GPU is waited for at each.
        *found, length = torch.cat([self.distributed.all_reduce(values), norm.detach().float()[None]]).tolist()
        record = dict(zip(names, found, strict=True))
        if not (math.isfinite(record["loss"]) and math.isfinite(length)):
            what = "gradient" if math.isfinite(record["loss"]) else "loss"
            raise NonFiniteLoss(f"the {what} is not finite at step {step + 1}; parts: {record}")
        return {**record, "learning_rate": rate}

    def _backward(self, batch: Batch, totals: Totals | None) -> tuple[list[str], Tensor]:
        with autocast(batch.images.device, training=True):
            parts: dict[str, Tensor] = self._model(
                batch,
                self.objective.text,
                distill=self.objective.config.metric if self.objective.config.distillation > 0 else None,
                totals=totals,
                class_counts=self.class_counts,
            )
        loss = weighted_sum(parts, self.objective.weights)
        # The terms of all processes add up, while `DistributedDataParallel` averages their gradients.
        (loss * self.distributed.world_size).backward()
        return ["loss", *parts], torch.stack([loss.detach(), *(p.detach().float() for p in parts.values())])

    def _without_exchange(self) -> AbstractContextManager[None]:
        return self._model.no_sync() if isinstance(self._model, DistributedDataParallel) else nullcontext()

    def _count_objects(self, batches: Sequence[Batch]) -> None:
        # Before the step, of all its parts: each part then has the numbers that the whole has.
        if self.class_counts is not None:
            base, label = len(self.class_counts), torch.cat([of_image for b in batches for of_image in b.labels])
            # What is no base class is counted behind them, and left out.
            counts = torch.zeros(base + 1, dtype=torch.int64, device=label.device)
            counts.index_add_(0, label.clamp(max=base), torch.ones_like(label))
            self.class_counts += self.distributed.all_reduce(counts[:base])

    def _totals(self, batches: Sequence[Batch]) -> Totals | None:
        if self.config.rng == "step":
            return None
        regions = sum(len(b.region_boxes) for b in batches)
        if self.distributed.world_size > 1:
            all_of_them = torch.tensor(float(regions), device=batches[0].region_boxes.device)
            regions = int(self.distributed.all_reduce(all_of_them))
        return Totals(images=self.config.batch_size, regions=regions)


def in_effect(config: Config, embed_dim: int) -> dict[str, float]:
    """Effective values of settings that depend on others: runs differ when these differ."""
    return {
        "distillation_weight": loss_weights(config.loss, embed_dim)["distillation"],
        "peak_rate": peak_rate(config.train),
    }


def build_optimiser(detector: Detector, config: TrainConfig) -> torch.optim.Optimizer:
    """Build AdamW or SGD, without weight decay on vectors (biases, norms, background) and the logit scale.

    Each group has the factor of its rate, `lr_mult`.
    """
    groups = [
        {"params": parameters, "weight_decay": decay, "lr_mult": factor}
        for trained, factor in rate_groups(detector, config.backbone_lr_mult)
        for parameters, decay in (
            ([p for p in trained if p.ndim > 1], config.weight_decay),
            ([p for p in trained if p.ndim <= 1], 0.0),
        )
    ]
    rate = peak_rate(config)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=rate)
