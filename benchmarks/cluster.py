"""Does a long build on a Dask cluster keep its memory? `python benchmarks/cluster.py [--tasks 7000]`.

A scheduler and worker processes, started by Dask's own commands, run so many tasks of `--milliseconds` each, given to
them as blocks of a build are. Every twentieth part the resident memory of client, scheduler and workers is read; one
row goes to results/cluster.jsonl. Its gate: every result is right, and no process is more than `--most` MiB larger in
the second half than it ever was in the first. Exit code 1 otherwise.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import partial

import driver
import psutil

from ezsd.pipeline.progress import Progress
from ezsd.pipeline.scheduling.pool import Pool, Schedule

LOOKS = 20
WAIT_SECONDS = 120
MIB = 2**20


class Watch(Progress):
    """Progress that reads the memory of processes now and then."""

    def __init__(self, processes: dict[str, psutil.Process], tasks: int) -> None:
        super().__init__("soak", tasks, unit="task")
        self.resident: dict[str, list[float]] = {name: [] for name in processes}
        self.at: list[int] = []
        self._processes = processes

    def finish(self, item: object, result: object) -> None:
        """Count a task."""
        super().finish(item, result)
        if self.done % max(1, self.total // LOOKS) == 0:
            self.at.append(self.done)
            for name, process in self._processes.items():
                self.resident[name].append(process.memory_info().rss / MIB)

    def growth(self, name: str) -> float:
        """MiB by which a process was larger in the second half than ever in the first."""
        half, resident = len(self.at) // 2, self.resident[name]
        return max(resident[half:]) - max(resident[:half])


def measure(arguments: argparse.Namespace) -> Iterator[driver.Row]:
    """One row of one soak."""
    if arguments.tasks < LOOKS:
        raise driver.UsageError(f"--tasks {arguments.tasks}: expected at least {LOOKS}")
    with ExitStack() as stack:
        address, scheduler = started_scheduler(stack)
        options = ["--nthreads", "1", "--memory-limit", "0", "--no-dashboard", "--no-nanny"]
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        workers = [
            started(stack, "dask_worker", address, *options, "--local-directory", folder)
            for _ in range(arguments.workers)
        ]
        processes = {"client": psutil.Process(), "scheduler": psutil.Process(scheduler.pid)}
        processes |= {f"worker {number}": psutil.Process(one.pid) for number, one in enumerate(workers)}
        task = partial(slow, seconds=arguments.milliseconds / 1000)
        with Pool(Schedule(scheduler=address, wait_for_workers=WAIT_SECONDS)) as pool:
            client = pool.client
            assert client is not None
            client.wait_for_workers(arguments.workers, timeout=WAIT_SECONDS)
            with Watch(processes, arguments.tasks) as watch:
                results, spent = driver.timed(lambda: pool.run(task, range(arguments.tasks), named=str, progress=watch))
    growth = {name: round(watch.growth(name), 1) for name in processes}
    right = sorted(results) == [-number for number in reversed(range(arguments.tasks))]
    flat = max(growth.values()) < arguments.most
    yield {
        "tasks": arguments.tasks,
        "milliseconds": arguments.milliseconds,
        "workers": arguments.workers,
        "wall_seconds": round(spent.wall, 1),
        "resident_mib": {name: [round(figure, 1) for figure in watch.resident[name]] for name in processes},
        "grown_mib": growth,
        "results_right": right,
        "memory_flat": flat,
        "note": arguments.note,
    }
    if not (right and flat):
        raise SystemExit(f"results right: {right}; memory flat: {flat}")


def slow(number: int, *, seconds: float) -> int:
    """The negative of a number, after some time."""
    time.sleep(seconds)
    return -number


def started_scheduler(stack: ExitStack) -> tuple[str, subprocess.Popen[bytes]]:
    """Address and process of a scheduler at a free port."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    process = started(stack, "dask_scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard")
    return f"tcp://127.0.0.1:{port}", process


def started(stack: ExitStack, command: str, *words: str) -> subprocess.Popen[bytes]:
    """A process of one of Dask's commands, which is killed at the end."""
    process = subprocess.Popen([sys.executable, "-m", f"distributed.cli.{command}", *words], stderr=subprocess.DEVNULL)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


if __name__ == "__main__":
    driver.run(
        "cluster",
        measure,
        __doc__,
        driver.option("--tasks", type=int, default=7000, help=f"at least {LOOKS}"),
        driver.option("--workers", type=int, default=2),
        driver.option("--milliseconds", type=float, default=2.0),
        driver.option("--most", type=float, default=8.0, help="MiB that a process may grow"),
        "--note",
    )
