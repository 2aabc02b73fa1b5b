"""Learning rate of each step."""

from __future__ import annotations

import dataclasses
import math

from ezsd.pipeline.config.schema import TrainConfig


def peak_rate(config: TrainConfig) -> float:
    """Peak learning rate, scaled to the images per step.

    Linear scaling with SGD (Goyal et al., arXiv 1706.02677); square-root scaling with AdamW, which divides by the size
    of the gradient (Malladi et al., arXiv 2205.10287).
    """
    if not config.reference_batch_size:
        return config.learning_rate
    if config.optimizer == "adamw":
        return config.learning_rate * math.sqrt(config.batch_size / config.reference_batch_size)
    return config.learning_rate * config.batch_size / config.reference_batch_size


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of a step: linear warm-up, then a cosine to zero or steps down; depends only on the step."""
    height = peak_rate(config)
    if step < config.warmup_steps:
        return height * (step + 1) / config.warmup_steps
    if config.schedule == "step":
        return height * 0.1 ** sum(step >= share * config.steps for share in config.decay_at)
    progress = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    return height * 0.5 * (1 + math.cos(math.pi * progress))


def can_train_longer(config: TrainConfig) -> bool:
    """Test whether a finished training may go on: its learning rates would be the same in one of twice its steps."""
    return first_other_rate(config, dataclasses.replace(config, steps=2 * config.steps), config.steps) is None


def first_other_rate(shorter: TrainConfig, longer: TrainConfig, done: int) -> int | None:
    """First of the steps below `done` with another learning rate in the longer training; None where there is none.

    The two differ in the number of steps alone, so that rates part at the end of the warm-up or where one falls: the
    number of steps may come from a stranger's file, and is not counted through.
    """
    falls = {math.ceil(share * one.steps) for one in (shorter, longer) for share in one.decay_at}
    parting = sorted({shorter.warmup_steps, shorter.warmup_steps + 1, done - 1} | falls)
    rates = ((step, learning_rate(step, shorter), learning_rate(step, longer)) for step in parting if 0 <= step < done)
    return next((step for step, one, other in rates if one != other), None)
