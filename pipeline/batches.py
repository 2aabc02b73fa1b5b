"""The batches of a training, in an order that depends on the seed alone, read by as many processes as one likes."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import torch

from ezsd.data.dataset import DetectionDataset, collate, epoch_order
from ezsd.detector.model import Batch
from pipeline.config import ConfigError, TrainConfig
from pipeline.datasets import DatasetError
from pipeline.processes import Processes

Key = tuple[int, int]
"""Epoch and position of an image."""


def load_batches(
    samples: DetectionDataset, config: TrainConfig, *, first_step: int, processes: Processes | None = None
) -> Iterator[tuple[list[Key], list[Batch]]]:
    """This process' batches of each step from `first_step` to the end, and the keys of all images of the step.

    Raises:
        ConfigError: the images of a step cannot be shared out evenly.
        DatasetError: an image cannot be read.
    """
    processes = processes or Processes()
    parts = config.accumulate * processes.count
    if config.images % parts:
        raise ConfigError(
            f"train.images={config.images} cannot be shared out to {processes.count} processes with "
            f"train.accumulate={config.accumulate}; choose a multiple of {parts}"
        )
    order = list(
        epoch_order(len(samples), per_step=config.images, first_step=first_step, steps=config.steps, seed=config.seed)
    )
    size = config.images // parts
    starts = range(processes.rank * size, config.images, processes.count * size)
    mine = [keys[start : start + size] for keys in order for start in starts]
    loader = torch.utils.data.DataLoader(
        samples,
        batch_sampler=mine,
        num_workers=config.loader_workers,
        # Not forked from here: a fork beside other threads, as the store's reader has, may hang.
        multiprocessing_context="forkserver" if config.loader_workers else None,
        collate_fn=collate,
        worker_init_fn=_ignore_termination,
    )
    batches = iter(loader)
    for keys in order:
        yield keys, [_next(batches) for _ in range(config.accumulate)]


def _ignore_termination(_: int) -> None:
    # A scheduler tells all processes at once; the training itself ends its readers, after its checkpoint.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _next(batches: Iterator[Batch]) -> Batch:
    try:
        return next(batches)
    except (ValueError, OSError) as error:
        # A reader's error arrives with the whole traceback in its message.
        if "Original Traceback" in str(error):
            raise DatasetError(str(error).strip().splitlines()[-1].partition(": ")[2]) from error
        raise
