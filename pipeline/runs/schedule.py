"""Learning rate of each step."""

from __future__ import annotations

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


def first_other_rate(one: TrainConfig, other: TrainConfig, steps: int) -> int | None:
    """First of the steps below `steps` whose learning rate two configurations do not share; None where none is."""
    return next((step for step in range(steps) if learning_rate(step, one) != learning_rate(step, other)), None)
