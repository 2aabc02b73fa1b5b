"""Where the tasks of a build run: here, or in worker processes."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from typing import TypeVar

from pipeline.progress import Progress

T = TypeVar("T")
U = TypeVar("U")


def run_tasks(task: Callable[[T], U], items: Sequence[T], *, workers: int, progress: Progress) -> list[U]:
    """Results of one Dask task per item, as they come, in this process or in `workers` of them.

    The first failure is raised.

    Args:
        task: picklable, and so is its result, which travels: keep it small.
        items: small and picklable: only numbers travel in the graph.
        workers: processes; 1 runs here.
        progress: advanced by one per finished item.
    """
    if workers == 1 or len(items) <= 1:
        from dask.base import compute
        from dask.delayed import delayed

        results: list[U] = []
        for item in items:
            results += compute(delayed(task)(item), scheduler="synchronous")
            progress.advance()
        return results
    from dask import config
    from distributed import Client, LocalCluster, as_completed

    # Dask tells its workers' allocator to give memory back at once; every tensor then costs a system call and fresh
    # pages, which took a third of the time here. One thread per process is what it sets besides, and stays.
    threads = {f"{library}_NUM_THREADS": 1 for library in ("OMP", "MKL", "OPENBLAS")}

    # Its workers' comings and goings are no user's business; what fails is raised below.
    logging.getLogger("distributed").setLevel(logging.ERROR)
    with (
        config.set({"distributed.nanny.pre-spawn-environ": threads}),
        tempfile.TemporaryDirectory(prefix="ezsd-dask-") as scratch,
        LocalCluster(
            n_workers=min(workers, len(items)),
            threads_per_worker=1,
            processes=True,
            # Any free port, and nothing to look at there.
            dashboard_address=":0",
            scheduler_kwargs={"dashboard": False},
            memory_limit=None,
            local_directory=scratch,
            silence_logs="ERROR",
        ) as cluster,
        Client(cluster) as client,
    ):
        futures = client.map(task, items, pure=False)
        results = []
        for future in as_completed(futures):
            # A failed task raises its own error here.
            results.append(future.result())
            progress.advance()
        return results
