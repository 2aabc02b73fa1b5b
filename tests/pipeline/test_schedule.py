"""Where tasks run on one machine, and how little travels to them."""

import asyncio
import importlib.util
import os
import pickle
import resource
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

import ezsd.pipeline.scheduling.pool
from ezsd.pipeline.errors import ClusterError
from ezsd.pipeline.extraction.build import build_cache
from ezsd.pipeline.extraction.request import BuildRequest
from ezsd.pipeline.progress import Progress
from ezsd.pipeline.scheduling.pool import Pool, Schedule, worker_environments
from tests.pipeline import tasks
from tests.pipeline.test_build import files


def run(schedule, task, items, **options):
    with Pool(schedule) as pool, Progress("x", len(items), unit="task") as progress:
        return pool.run(task, items, named=str, progress=progress, **options)


def test_only_numbers_travel(shapes_dataset, quick_config, shapes_store, tmp_path, monkeypatch):
    """The job of a block (LayerNorms, text rows, settings) is tens of kilobytes and stays on the disk."""
    sent = {}
    real = Pool.run

    def watched(pool, task, items, **options):
        sent[task.func.__name__] = (len(pickle.dumps(task)), list(items))
        return real(pool, task, items, **options)

    monkeypatch.setattr(Pool, "run", watched)
    out = tmp_path / "store"
    build_cache(BuildRequest(dataset=shapes_dataset, config=quick_config, out=out, scheduler="sync"))
    assert sent.keys() == {"extract_numbered", "_write_shard"}
    for size, items in sent.values():
        assert size < 900 + 2 * len(str(out))
        assert items == list(range(len(items)))
        assert all(type(item) is int for item in items)
    assert files(out) == files(shapes_store)


def test_sync_runs_everything_in_this_process():
    assert run(Schedule(scheduler="sync"), os.getppid, []) == []
    assert run(Schedule(scheduler="sync"), lambda _: os.getpid(), [1, 2, 3]) == [os.getpid()] * 3


def test_few_items_start_no_process():
    assert run(Schedule(workers=4), lambda _: os.getpid(), [1, 2, 3], few=3) == [os.getpid()] * 3


def test_each_worker_process_sees_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    assert worker_environments("cpu", 2) == [{}, {}]
    assert worker_environments("cuda:1", 1) == [{}]
    with Pool(Schedule(device="cuda")) as pool:
        assert pool.workers == 2
    seen = run(Schedule(device="cuda"), tasks.visible, list(range(2)))
    assert sorted(seen) == ["GPU-a", "GPU-b"]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in worker_environments("cuda", 3)] == ["GPU-a", "GPU-b", "GPU-a"]


@pytest.mark.usefixtures("warm_workers")
def test_workers_keep_no_call_trees_unless_somebody_looks():
    """They would be 1,000, one a second, and most of what a worker's memory grows by."""
    assert run(Schedule(workers=2), tasks.call_trees, [0, 1]) == [False, False]


def _faults(size):
    """Page faults of a block that was allocated and freed before."""
    bytearray(size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_waiting_for_tasks_leaves_nothing_behind():
    """Not a waiter for each of the others with every task that ends: memory would grow with the tasks."""
    waiting = []
    with Pool(Schedule(workers=2)) as pool, Progress("x", 60, unit="task") as progress:
        finish = progress.finish

        def counted(item, result):
            waiting.append(len(asyncio.all_tasks(pool.client.loop.asyncio_loop)))
            finish(item, result)

        progress.finish = counted
        # Slow enough to end one by one.
        pool.run(lambda _: time.sleep(0.02), range(60), named=str, progress=progress)
    assert len(waiting) == 60
    assert max(waiting) < 2 * 60


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is Linux's")
def test_workers_keep_freed_memory_for_the_next_tensor(monkeypatch):
    """As malloc comes, a block of 80 MB has some 20,000 page faults each time."""
    # Dask leaves its variables behind in a process that has started workers of its own, and they would stay in force.
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    assert max(run(Schedule(workers=2), _faults, [80_000_000] * 2)) < 100


def test_a_worker_that_always_dies_is_named_by_its_item():
    with pytest.raises(ClusterError, match=r"^5: the worker processes that had it died \(4 in all"):
        run(Schedule(workers=2), os._exit, [5, 5])


def _starting():
    """Processes that Dask has begun; one that has just ended has no command line."""
    return {one for one in psutil.Process().children() if any("spawn_main" in word for word in one.cmdline())}


def test_a_worker_killed_while_it_starts_is_one_line_and_what_is_there_goes_on():
    # Workers of an earlier test may still be ending.
    before = _starting()

    ended = threading.Event()

    def kill_the_first():
        while not (found := _starting() - before) and not ended.is_set():
            time.sleep(0.001)
        found.pop().kill()

    with ThreadPoolExecutor(1) as threads:
        killing = threads.submit(kill_the_first)
        try:
            with pytest.raises(ClusterError, match=r"^a worker process ended while it was starting \(out of memory"):
                run(Schedule(workers=2), abs, [-1, -2])
        finally:
            # It must not lie in wait for a process of another test.
            ended.set()
        killing.result()
    assert not _starting() - before
    assert sorted(run(Schedule(workers=2), abs, [-1, -2])) == [1, 2]


def test_a_failure_ends_all_workers_whatever_they_are_at(monkeypatch):
    ended, kill = [], os.kill
    monkeypatch.setattr(ezsd.pipeline.scheduling.pool.os, "kill", lambda pid, sig: ended.append(sig) or kill(pid, sig))
    with pytest.raises(ValueError, match="of the first"):
        run(Schedule(workers=2), tasks.fail_or_wait, [0, 1])
    # Dask may tell them to end as well, which is not enough.
    assert ended.count(signal.SIGKILL) == 2


@pytest.mark.skipif(importlib.util.find_spec("bokeh") is not None, reason="bokeh is installed")
def test_a_dashboard_needs_bokeh():
    with pytest.raises(ClusterError, match="`dashboard`: needs the package bokeh"), Pool(Schedule(dashboard=True)):
        pass


def test_a_job_has_as_many_workers_as_it_has_cores(monkeypatch):
    monkeypatch.setattr(ezsd.pipeline.scheduling.pool.os, "sched_getaffinity", lambda _: {3, 5, 6}, raising=False)
    with Pool(Schedule()) as pool:
        assert pool.workers == 3
