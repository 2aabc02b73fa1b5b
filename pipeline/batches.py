"""The batches of a training, in an order that depends on the seed alone, read ahead by a thread or by processes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import FrameType
from typing import Any

import torch

from cache import StoreError
from ezsd.data.dataset import DetectionDataset, Key, collate, epoch_order, padded_size
from ezsd.detector.model import Batch
from pipeline.config import ConfigError, TrainConfig
from pipeline.images import ImageError
from pipeline.processes import Processes

LINGER_SECONDS = 30
LOOK_SECONDS = 2.0


def load_batches(
    samples: DetectionDataset, config: TrainConfig, *, first_step: int, processes: Processes | None = None
) -> Generator[tuple[list[tuple[int, int]], list[Batch]], None, None]:
    """This process' batches of each step from `first_step` to the end, and epoch and position of all its images.

    All batches of a step are padded to the same size: they learn what one batch would.

    Close it when it is left early: reading processes live as long as it does.

    Raises:
        ConfigError: the images of a step cannot be shared out evenly.
        ImageError: an image cannot be read.
        StoreError: rows of the store are damaged or cannot be read.
    """
    processes = processes or Processes()
    parts = config.accumulate * processes.count
    if config.images % parts:
        raise ConfigError(
            f"train.images={config.images} cannot be shared out to {processes.count} processes with "
            f"train.accumulate={config.accumulate}; choose a multiple of {parts}"
        )
    order = partial(
        epoch_order, len(samples), per_step=config.images, first_step=first_step, steps=config.steps, seed=config.seed
    )
    size = config.images // parts
    starts = range(processes.rank * size, config.images, processes.count * size)
    loader = torch.utils.data.DataLoader(
        samples,
        batch_sampler=_shared_out(samples, order(), starts, size),
        num_workers=config.loader_workers,
        # Not forked from here: a fork beside other threads, as the store's reader has, may hang.
        multiprocessing_context="forkserver" if config.loader_workers else None,
        collate_fn=collate,
        worker_init_fn=partial(_begin_reading, os.getpid()),
    )
    batches: Any = iter(loader) if config.loader_workers else _one_ahead(iter(loader))
    try:
        for keys in order():
            yield keys, [_next(batches) for _ in range(config.accumulate)]
    finally:
        # What reads ends once nothing refers to the iterator; an error's traceback may, until the interpreter's end.
        if config.loader_workers:
            batches._shutdown_workers()
        else:
            batches.close()


def _shared_out(
    samples: DetectionDataset, order: Iterable[list[tuple[int, int]]], starts: range, size: int
) -> Iterator[list[Key]]:
    """This process' batches of `size` images, which begin at `starts` of each step's images."""
    for keys in order:
        canvas = (0, 0) if size == len(keys) else padded_size(samples.size(*key) for key in keys)
        for start in starts:
            yield [Key(*key, canvas) for key in keys[start : start + size]]


def _one_ahead(batches: Iterator[Batch]) -> Generator[Batch, None, None]:
    """The same batches, each read by a thread while the one before it is in use."""
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
        waiting = reader.submit(next, batches, None)
        while (batch := waiting.result()) is not None:
            waiting = reader.submit(next, batches, None)
            yield batch


def _begin_reading(training: int, _: int) -> None:
    """What a reading process does first."""
    signal.signal(signal.SIGTERM, _linger)
    threading.Thread(target=_end_with, args=(training,), daemon=True).start()


def _linger(_: int, frame: FrameType | None) -> None:
    # A scheduler tells all processes at once; the training needs its readers until its step and checkpoint are done.
    signal.alarm(LINGER_SECONDS)


def _end_with(training: int) -> None:
    """End this process after the training that it reads for, which is not its parent."""
    while True:
        try:
            os.kill(training, 0)
        except ProcessLookupError:
            os._exit(1)
        time.sleep(LOOK_SECONDS)


def _next(batches: Iterator[Batch]) -> Batch:
    try:
        return next(batches)
    except (ValueError, OSError) as error:
        # A reader's error arrives with the whole traceback in its message.
        if "Original Traceback" in str(error):
            kind = type(error) if isinstance(error, StoreError) else ImageError
            raise kind(str(error).strip().splitlines()[-1].partition(": ")[2]) from error
        raise
