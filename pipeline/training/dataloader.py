"""Batches of a training in an order that depends only on the seed, read ahead by a thread or by processes."""

from __future__ import annotations

import concurrent.futures
import logging
import multiprocessing.queues
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from ezsd.cache import StoreError
from ezsd.data.dataset import DetectionDataset, Key, Sample, collate, epoch_order, padded_size
from ezsd.detector.model import Batch
from ezsd.errors import AnnotationError
from ezsd.pipeline.config.schema import TrainConfig
from ezsd.pipeline.devices import is_out_of_memory
from ezsd.pipeline.errors import ConfigError, ImageError, OutOfMemory, RunError
from ezsd.pipeline.interrupts import shielded
from ezsd.pipeline.training.distributed import Distributed

log = logging.getLogger("ezsd")

LINGER_SECONDS = 30
LOOK_SECONDS = 2.0
TELL_SECONDS = 60.0
AHEAD = 2
"""Number of batches that each reading process reads or has ready."""
SHARED_MEMORY = Path("/dev/shm")
_OWN_QUEUE: Any = multiprocessing.queues.Queue
CURE = "train.num_workers=0 reads without reading processes; a container gets more by `docker run --shm-size=SIZE`"


def load_batches(
    samples: DetectionDataset,
    config: TrainConfig,
    *,
    first_step: int,
    distributed: Distributed | None = None,
    stopping: Callable[[], bool] = lambda: False,
    pinned: bool = False,
) -> Generator[tuple[list[tuple[int, int]], list[Batch]], None, None]:
    """Load the batches of this process for each step from `first_step` on, with the `epoch_order` of their images.

    All batches of a step are padded to the same size, so that training gives the same result as with one batch.

    Close the generator if it is left early: the reading processes live as long as it does.

    Args:
        samples: training samples to read.
        config: images per step and number of reading processes.
        first_step: first step to load; earlier ones are skipped.
        distributed: processes that share the steps.
        stopping: called while a batch is waited for; once it returns true, there are no more batches.
        pinned: whether batches come in page-locked memory, for a GPU.

    Raises:
        ConfigError: the images of a step cannot be divided evenly.
        ImageError: an image cannot be read.
        RunError: a reading process has died, or there is no shared memory for its batches.
        StoreError: rows of the store are damaged or cannot be read.
    """
    distributed = distributed or Distributed()
    parts = config.grad_accumulation * distributed.world_size
    if config.batch_size % parts:
        raise ConfigError(
            f"train.batch_size={config.batch_size} cannot be shared out to {distributed.world_size} processes with "
            f"train.grad_accumulation={config.grad_accumulation}; choose a multiple of {parts}"
        )
    order = partial(
        epoch_order,
        len(samples),
        per_step=config.batch_size,
        first_step=first_step,
        steps=config.steps,
        seed=config.seed,
        repeats=samples.repeats,
    )
    size = config.batch_size // parts
    starts = range(distributed.rank * size, config.batch_size, distributed.world_size * size)
    wanted = partial(_shared_out, samples, starts=starts, size=size)
    source: _Source
    if config.num_workers:
        _require_shared_memory(
            samples, list(islice(wanted(order()), AHEAD * config.num_workers)), config, distributed.local_world_size
        )
        source = _Readers(samples, wanted(order()), config.num_workers, pinned=pinned)
    else:
        source = _OneAhead(samples, wanted(order()), pinned=pinned)
    try:
        for keys in order():
            batches: list[Batch] = []
            while len(batches) < config.grad_accumulation:
                batch = _wait(source, stopping)
                if batch is None:
                    return
                batches.append(batch)
            yield keys, batches
    finally:
        source.close()


class _Source(Protocol):
    """Interface of a source of batches in order."""

    def take(self) -> Batch | None:
        """Take the next batch; None if it takes longer than `LOOK_SECONDS`, to be called again."""
        ...

    def close(self) -> None:
        """End the reading thread or processes."""
        ...


def _wait(source: _Source, stopping: Callable[[], bool]) -> Batch | None:
    """Wait for the next batch; None once training is to stop."""
    told = time.monotonic()
    while (batch := _take(source, stopping)) is None:
        if stopping():
            return None
        if time.monotonic() - told > TELL_SECONDS:
            # Slow is not dead: a disk may have to wake up, or a network to come back.
            log.info("still waiting for images to be read")
            told = time.monotonic()
    return batch


def _take(source: _Source, stopping: Callable[[], bool]) -> Batch | None:
    try:
        return source.take()
    except RunError:
        # Whoever stops a training may have told its readers as well: they are not to blame.
        if stopping():
            return None
        raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"out of memory while a batch of images was read ({str(error) or 'MemoryError'}); give the training more "
            "memory, or read fewer images at a time: lower train.num_workers, or raise train.grad_accumulation with "
            "`train.rng=image`"
        ) from error


class _OneAhead:
    """Source of batches read by a thread, one ahead of the batch in use."""

    def __init__(self, samples: DetectionDataset, wanted: Iterable[list[Key]], *, pinned: bool) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        read = (collate([samples[key] for key in keys]) for keys in wanted)
        self._batches = (batch.pin_memory() for batch in read) if pinned else read
        self._waiting = self._pool.submit(next, self._batches, None)

    def take(self) -> Batch | None:
        """Take the next batch, as `_Source.take` does."""
        if not concurrent.futures.wait([self._waiting], LOOK_SECONDS).done:
            return None
        batch = self._waiting.result()
        self._waiting = self._pool.submit(next, self._batches, None)
        return batch

    def close(self) -> None:
        """End the reading thread."""
        self._pool.shutdown(cancel_futures=True)


class _Readers:
    """Source of batches read by processes and passed through shared memory."""

    def __init__(self, samples: DetectionDataset, wanted: Iterable[list[Key]], count: int, *, pinned: bool) -> None:
        loader = torch.utils.data.DataLoader(
            samples,
            batch_sampler=wanted,
            num_workers=count,
            prefetch_factor=AHEAD,
            # Not forked from here: a fork beside other threads, as the store's reader has, may hang.
            multiprocessing_context="forkserver",
            collate_fn=_collate_shared,
            worker_init_fn=partial(_begin_reading, os.getpid()),
            timeout=LOOK_SECONDS,
            pin_memory=pinned,
        )
        try:
            with shielded():
                self._batches: Any = iter(loader)
        except OSError as error:
            raise RunError(
                f"{SHARED_MEMORY}: the shared memory of reading processes cannot be used ({error.strerror}); {CURE}"
            ) from error

    def take(self) -> Batch | None:
        """Take the next batch, as `_Source.take` does."""
        try:
            batch: Batch = next(self._batches)
        except (RuntimeError, ValueError, OSError, EOFError) as error:
            # torch's own words; it has looked whether the readers live.
            if str(error).startswith("DataLoader timed out"):
                return None
            raise _told(error) from error
        return batch

    def close(self) -> None:
        """End the reading processes."""
        for reader in self._batches._workers:
            # It may wait for a picture, and has nothing to finish.
            reader.kill()
        # What reads ends once nothing refers to the iterator; an error's traceback may, until the interpreter's end.
        self._batches._shutdown_workers()


def _told(error: Exception) -> Exception:
    """Convert an error from a reading process to a one-line error, unless it is a bug."""
    words = str(error).strip().splitlines()
    if "Original Traceback" in str(error):
        # A reader's own error arrives with the whole traceback in its message.
        last = words[-1].partition(": ")[2]
        if "unable to allocate shared memory" in last or "unable to mmap" in last:
            return RunError(f"{SHARED_MEMORY}: has no room for the batches of reading processes ({last}); {CURE}")
        if is_out_of_memory(error):
            return MemoryError(last or words[-1])
        # Anything else is a bug, which shows itself.
        return type(error)(last) if isinstance(error, AnnotationError | ImageError | StoreError) else error
    if "DataLoader worker" in str(error):
        # torch names the process.
        return RunError(f"{words[0]}. Run the same command to go on from the newest checkpoint.")
    if isinstance(error, OSError | EOFError):
        return RunError(
            f"a reading process has died while it handed a batch over ({error}). Run the same command to go on from "
            "the newest checkpoint."
        )
    return error


def _collate_shared(samples: Sequence[Sample]) -> Batch:
    """Collate a batch into shared memory.

    Tensors outside shared memory would be moved by a thread of the queue. If there is no room, that thread loses the
    batch, and its error is not reported.
    """
    batch = collate(samples)
    for tensor in _tensors(batch):
        tensor.share_memory_()
    return batch


def _tensors(batch: Batch) -> Iterator[Tensor]:
    yield from (batch.images, batch.region_boxes, batch.region_image, batch.region_target, batch.region_confidence)
    for of_images in (batch.boxes, batch.labels, batch.cached_boxes, batch.cached_confidence):
        yield from of_images
    for masks in batch.masks or ():
        yield from (masks.frame, masks.grid)


def _require_shared_memory(
    samples: DetectionDataset, first: Sequence[Sequence[Key]], config: TrainConfig, here: int
) -> None:
    """Check that shared memory has room for all batches in flight, estimated from the images of the first ones.

    Args:
        samples: training samples to read.
        first: images of the first batches.
        config: number of reading processes.
        here: training processes on this machine, which share the memory; each has its own reading processes.

    Raises:
        RunError: there is not enough room.
    """
    if not SHARED_MEMORY.is_dir():
        return
    pixels = 0
    for keys in first:
        height, width = padded_size([*(samples.size(key.epoch, key.position) for key in keys), keys[0].canvas])
        pixels = max(pixels, len(keys) * height * width)
    # Each reader's, and the one that is in use.
    count = (AHEAD * config.num_workers + 1) * here
    needed, free = count * pixels * 3, shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise RunError(
            f"{SHARED_MEMORY}: {free / 2**20:,.0f} MB of shared memory are free, but {count} batches of "
            f"{pixels * 3 / 2**20:,.0f} MB are under way at once with train.num_workers="
            f"{config.num_workers}{f' in {here} processes' if here > 1 else ''}; {CURE}"
        )


def _shared_out(
    samples: DetectionDataset, order: Iterable[list[tuple[int, int]]], *, starts: range, size: int
) -> Iterator[list[Key]]:
    """Select this process's batches of `size` images, which begin at positions `starts` of each step's images."""
    for keys in order:
        canvas = (0, 0) if size == len(keys) else padded_size(samples.size(*key) for key in keys)
        for start in starts:
            yield [Key(*key, canvas) for key in keys[start : start + size]]


def _begin_reading(training: int, _: int) -> None:
    """Initialise a reading process."""
    signal.signal(signal.SIGTERM, _linger)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What fails in a queue's thread loses the batch; as a dead reader it is noticed.
    _OWN_QUEUE._on_queue_feeder_error = staticmethod(_end_unheard)
    threading.Thread(target=_end_with, args=(training,), daemon=True).start()


def _end_unheard(error: Exception, _: object) -> NoReturn:
    sys.stderr.write(f"ezsd: a reading process cannot hand a batch over: {error}\n")
    sys.stderr.flush()
    os._exit(1)


def _linger(_: int, frame: FrameType | None) -> None:
    # A scheduler tells all processes at once; the training needs its readers until its step and checkpoint are done.
    signal.alarm(LINGER_SECONDS)


def _end_with(training: int) -> None:
    """End this reading process after its training process, which is not its parent, has ended."""
    while True:
        try:
            os.kill(training, 0)
        except ProcessLookupError:
            os._exit(1)
        time.sleep(LOOK_SECONDS)
