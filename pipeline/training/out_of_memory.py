"""Out-of-memory errors of training steps, and the settings that avoid them."""

from __future__ import annotations

from collections.abc import Sequence

from ezsd.detector.model import Batch
from ezsd.errors import inflected, quantity
from ezsd.pipeline.config.schema import TrainConfig
from ezsd.pipeline.errors import OutOfMemory
from ezsd.pipeline.runs.run import learns_the_same_in_parts


def step_does_not_fit(
    batches: Sequence[Batch],
    config: TrainConfig,
    *,
    world_size: int,
    step: int,
    saved: int,
    frozen_norms: bool,
    said: str = "",
) -> OutOfMemory:
    """Error for a step that does not fit in memory, with its cure.

    Args:
        batches: batches of this process.
        config: configuration of the run.
        world_size: number of processes that share the steps.
        step: number of finished steps.
        saved: step of the newest checkpoint; 0 if there is none.
        frozen_norms: true if no normalisation depends on the other images of a batch.
        said: see `said_instead`.
    """
    images, _, height, width = max((batch.images.shape for batch in batches), key=lambda shape: shape.numel())
    number = f"{quantity(images, 'image')} of {width} x {height} at a time"
    what = f"out of memory in step {step + 1}{said}: {number} {inflected(images, 'does', 'do')} not fit"
    parts = next_parts(config, world_size)
    if parts is None:
        cure = "use a GPU with more memory, or another `run` with smaller train.min_size and train.max_size"
        return OutOfMemory(f"{what}, and fewer are not possible; {cure}")
    options, at_once = f"`train.grad_accumulation={parts}`", config.batch_size // parts // world_size
    if learns_the_same_in_parts(config.rng, frozen_norms=frozen_norms):
        return OutOfMemory(f"{what}; run the same command with {options} ({at_once} at a time; it learns the same)")
    if config.rng != "image":
        options = f"`train.rng=image` {options}"
    how = "start another `run`" if saved else "run the same command"
    return OutOfMemory(f"{what}; {how} with {options} ({at_once} at a time; it learns a little otherwise)")


def next_parts(config: TrainConfig, world_size: int) -> int | None:
    """Next larger `train.grad_accumulation` that divides the images of a step; None if there is none."""
    most = config.batch_size // world_size
    return next(
        (k for k in range(config.grad_accumulation + 1, most + 1) if config.batch_size % (k * world_size) == 0), None
    )
