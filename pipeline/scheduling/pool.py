"""Pools that run the tasks of a build: this process, worker processes of this machine, or a Dask cluster."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Literal, TypeVar

from ezsd.pipeline.devices import usable_cores
from ezsd.pipeline.errors import ClusterError
from ezsd.pipeline.interrupts import shielded
from ezsd.pipeline.process_environment import MALLOC_ENVIRONMENT
from ezsd.pipeline.progress import Progress
from ezsd.pipeline.scheduling.dask_cluster import (
    LOST,
    connected,
    dashboard_address,
    gibibytes,
    require_bokeh,
    silence_dask,
)

if TYPE_CHECKING:
    from distributed import Client, Future, KilledWorker, SpecCluster

log = logging.getLogger("ezsd")

T = TypeVar("T")
U = TypeVar("U")

_LOOK_SECONDS = 15.0
"""Seconds without a result after which the cluster's workers are counted."""
_ALONE_SECONDS = 600.0
"""Least time for which a cluster without workers is waited for, seconds."""
_LEAST_TASKS = 1000
"""Tasks that a cluster knows of at a time; twice its workers where these are more than half as many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Scheduler, workers and device for the tasks of a build."""

    scheduler: str = "local"
    """"local": worker processes of this machine. "sync": this process. Else the address of a Dask scheduler."""
    workers: int = 0
    """Worker processes of this machine; 0 takes one per GPU, or one per core on the CPU."""
    device: str = "cpu"
    """Device of the teacher."""
    dashboard: bool = False
    """True if Dask's pages about the work are served."""
    wait_for_workers: float | None = None
    """Seconds to wait for a cluster's first worker, or for one when it has lost all; None for the default."""

    @property
    def kind(self) -> Literal["local", "sync", "cluster"]:
        """Kind of scheduler, without its address, so that it may be told."""
        if self.scheduler == "local":
            return "local"
        return "sync" if self.scheduler == "sync" else "cluster"

    @property
    def processes(self) -> int | None:
        """Processes that run tasks; None on a cluster, which has to be asked."""
        if self.kind == "cluster":
            return None
        return 1 if self.kind == "sync" else self.workers or _processes(self.device)


class Pool:
    """Runs the tasks of one build; a context manager. Worker processes are started once they are worth it."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._stack = ExitStack()
        self.client: Client | None = None
        """Client of the cluster that tasks run on; None while there is none."""
        self.workers = 1
        """Processes that run tasks, as far as there is enough to do."""

    def __enter__(self) -> Pool:
        schedule = self._schedule
        with ExitStack() as stack:
            if schedule.kind == "cluster":
                self.client = stack.enter_context(connected(schedule.scheduler, wait=schedule.wait_for_workers))
                self.workers = len(self.client.nthreads())
            else:
                self.workers = schedule.processes or 1
            if schedule.dashboard:
                self.client = self.client or stack.enter_context(_local(schedule, self.workers))
                log.info("dashboard: %s", dashboard_address(self.client))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def run(
        self,
        task: Callable[[T], U],
        items: Sequence[T],
        *,
        named: Callable[[T], str],
        progress: Progress,
        few: int = 1,
    ) -> list[U]:
        """Results of one task per item, as they come. The first failure is raised; what was not begun then is not.

        Args:
            task: small and picklable, and so is its result: both travel.
            items: numbers.
            named: what an error calls an item.
            progress: told of each finished item and its result.
            few: so many items are done here sooner than worker processes are started for them.
        """
        if self.client is None and self.workers > 1 and len(items) > few:
            self.client = self._stack.enter_context(_local(self._schedule, min(self.workers, len(items))))
        if self.client is not None:
            alone = max(_ALONE_SECONDS, self._schedule.wait_for_workers or 0)
            return _gathered(self.client, task, items, named=named, progress=progress, alone=alone)
        results: list[U] = []
        for item in items:
            results.append(task(item))
            progress.finish(item, results[-1])
        return results


def _gathered(
    client: Client,
    task: Callable[[T], U],
    items: Sequence[T],
    *,
    named: Callable[[T], str],
    progress: Progress,
    alone: float,
) -> list[U]:
    """Results of one task per item. The cluster knows of some hundred at a time, or its memory would grow with all."""
    from distributed import CancelledError, KilledWorker

    begun, most = 0, max(_LEAST_TASKS, 2 * len(client.nthreads()))
    left: dict[Future[U], T] = {}
    results: list[U] = []
    # Distributed's `wait` for a first one leaves a waiter behind for each of the others, a megabyte with every block.
    ended: SimpleQueue[Future[U]] = SimpleQueue()
    seen = time.monotonic()
    try:
        while begun < len(items) or left:
            if begun < len(items) and len(left) <= most // 2:
                more = items[begun : begun + most - len(left)]
                futures = client.map(task, more, pure=False)
                left |= dict(zip(futures, more, strict=True))
                for future in futures:
                    future.add_done_callback(ended.put)
                begun += len(more)
            try:
                future = ended.get(timeout=_LOOK_SECONDS)
            except Empty:
                seen = _workers_seen(client, seen, alone)
                continue
            item = left.pop(future)
            try:
                # A failed task raises its own error here.
                results.append(future.result())
            except KilledWorker as error:
                raise ClusterError(f"{named(item)}: {_died(error)}") from error
            progress.finish(item, results[-1])
            seen = time.monotonic()
    except CancelledError as error:
        raise ClusterError(LOST) from error
    return results


def _died(error: KilledWorker) -> str:
    """Describe why a task's workers may have died, and what stays."""
    limit = error.last_worker.memory_limit
    near = f" at their memory limit of {gibibytes(limit)}: start workers with --memory-limit 0" if limit else ""
    return (
        f"the worker processes that had it died ({error.allowed_failures + 1} in all; out of memory{near}, or killed "
        "from outside?); what is finished stays, run the same command again"
    )


def _workers_seen(client: Client, seen: float, alone: float) -> float:
    """Time when workers were last seen, given the time before this look; ClusterError when that is too long ago."""
    try:
        if client.nthreads():
            return time.monotonic()
    except OSError as error:
        raise ClusterError(LOST) from error
    gone = time.monotonic() - seen
    if gone > alone:
        raise ClusterError(
            f"the Dask scheduler has had no workers for {gone:.0f} s; start some and run the same command again"
        )
    log.warning("the Dask scheduler has no workers; waiting for some")
    return seen


def _processes(device: str) -> int:
    """Worker processes by default: one for each GPU that may be used, or for each core."""
    if device == "cpu":
        return usable_cores()
    return len(_visible_gpus()) if device == "cuda" else 1


def _visible_gpus() -> list[str]:
    """The GPUs that may be used, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return given.split(",")
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def worker_environments(device: str, workers: int) -> list[dict[str, str]]:
    """Environment variables of each worker process: with several GPUs each process sees only one."""
    if device != "cuda":
        return [{}] * workers
    gpus = _visible_gpus()
    return [{"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} for number in range(workers)]


@contextmanager
def _local(schedule: Schedule, workers: int) -> Iterator[Client]:
    """A client of worker processes on this machine, one thread each."""
    if schedule.dashboard:
        require_bokeh()
    from dask import config
    from distributed import Client, Nanny, Scheduler, SpecCluster

    silence_dask()
    # Dask tells its workers' allocator to give memory back at once; every tensor then costs a system call and fresh
    # pages, which took a third of the time here. One thread per process is what it sets besides, and stays.
    variables = {**{f"{library}_NUM_THREADS": 1 for library in ("OMP", "MKL", "OPENBLAS")}, **MALLOC_ENVIRONMENT}
    host = "127.0.0.1"
    with ExitStack() as stack:
        # A terminal sends SIGINT to workers too; this process ends them, and threads of its own start others.
        with shielded():
            # Dask's profile of what workers do keeps 1,000 call trees of a second each in memory, for its pages alone.
            profile = {"distributed.worker.profile.enabled": schedule.dashboard}
            stack.enter_context(config.set({"distributed.nanny.pre-spawn-environ": variables, **profile}))
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="ezsd-dask-"))
            try:
                cluster = SpecCluster(
                    scheduler={
                        "cls": Scheduler,
                        # Any free port, and nothing to look at there unless it was asked for.
                        "options": {"host": host, "dashboard": schedule.dashboard, "dashboard_address": f"{host}:0"},
                    },
                    workers={
                        number: {
                            "cls": Nanny,
                            "options": {
                                "host": host,
                                "nthreads": 1,
                                "dashboard": False,
                                "env": environment,
                                "memory_limit": None,
                                "local_directory": scratch,
                                "silence_logs": logging.CRITICAL,
                            },
                        }
                        for number, environment in enumerate(worker_environments(schedule.device, workers))
                    },
                    silence_logs=logging.CRITICAL,
                )
            except RuntimeError as error:
                # Dask has closed what it had begun.
                if "Nanny" not in str(error):
                    raise
                raise ClusterError(
                    "a worker process ended while it was starting (out of memory, or killed from outside?); what is "
                    "finished stays, run the same command again"
                ) from error
            stack.push(partial(_close, cluster))
            client = stack.enter_context(Client(cluster, set_as_default=False))
            stack.push(partial(_kill_workers, cluster))
        yield client


def _kill_workers(cluster: SpecCluster, kind: type[BaseException] | None, *_: object) -> None:
    """After a failure or a signal, end worker processes at once: what they are at will not be finished.

    Dask waits for their tasks, and for those that are still starting.
    """
    if kind is None:
        return
    for nanny in list(cluster.workers.values()):
        # It would start another one.
        nanny.close_gracefully()
        if (pid := nanny.pid) is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _close(cluster: SpecCluster, kind: type[BaseException] | None, *_: object) -> None:
    """Close a cluster. After a failure that one is told, not what may follow from it here."""
    try:
        cluster.close()
    except Exception:
        if kind is None:
            raise
        log.debug("Dask did not close in order", exc_info=True)
