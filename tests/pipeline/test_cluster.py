"""Builds on a real Dask cluster: scheduler and workers are processes of their own, started by Dask's own commands."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import ezsd.pipeline.scheduling.dask_cluster
import ezsd.pipeline.scheduling.pool
from ezsd.cache import file_digest
from ezsd.cache.format.sealed_json import unseal
from ezsd.pipeline.errors import ClusterError
from ezsd.pipeline.extraction.build import build_cache
from ezsd.pipeline.extraction.request import BuildRequest
from ezsd.pipeline.progress import Progress
from ezsd.pipeline.scheduling.dask_cluster import (
    Needs,
    check_workers,
    connected,
    other_versions,
    require_fit,
    versions,
)
from ezsd.pipeline.scheduling.pool import Pool, Schedule
from tests import commandkit
from tests.pipeline.forkkit import Fork
from tests.pipeline.test_build import ROOT, build_command, files

WAIT_SECONDS = 120


class Cluster:
    """A scheduler, and workers beside it; `network`: a namespace that they are in."""

    def __init__(self, folder, *, host="127.0.0.1", network=None, **environment):
        self.folder, self.processes = folder, []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"tcp://{host}:{port}"
        options = ("--host", host, "--port", str(port), "--no-dashboard")
        self._begin = ["distributed.cli.dask_scheduler", *options], environment, network
        self.scheduler = self._start(*self._begin)

    def start_again(self):
        """Another scheduler in the place of one that has ended."""
        self.scheduler = self._start(*self._begin)

    def worker(self, *options, host="127.0.0.1", network=None, **environment):
        """One more worker; without a nanny, which would start it again when it dies."""
        own = ("--host", host, "--no-dashboard", "--no-nanny", "--local-directory", str(self.folder))
        threads = () if "--nthreads" in options else ("--nthreads", "1")
        words = ["distributed.cli.dask_worker", self.address, *own, *threads, *options]
        return self._start(words, environment, network)

    def _start(self, words, environment, network=None):
        own = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        if "PYTHONPATH" in environment:
            # Modules that a fork would have loaded from elsewhere.
            silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            process = subprocess.Popen([sys.executable, "-m", *words], cwd=self.folder, env=own, **silent)
        else:
            process = Fork(words, self.folder, own, network=network)
        self.processes.append(process)
        return process

    def wait_for_scheduler(self):
        host, port = self.address.removeprefix("tcp://").split(":")
        while self.scheduler.poll() is None:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection((host, int(port))):
                return
            time.sleep(0.1)

    def wait_for(self, workers):
        with connected(self.address) as client:
            client.wait_for_workers(workers, timeout=WAIT_SECONDS)

    def stop(self):
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture(autouse=True)
def _patience(monkeypatch):
    # Processes start slowly where tests share two cores.
    monkeypatch.setattr(ezsd.pipeline.scheduling.dask_cluster, "CONNECT_SECONDS", WAIT_SECONDS)
    monkeypatch.setattr(ezsd.pipeline.scheduling.dask_cluster, "WAIT_SECONDS", WAIT_SECONDS)


@pytest.fixture
def cluster(tmp_path):
    made = Cluster(tmp_path)
    yield made
    made.stop()


def test_a_worker_killed_in_the_middle_changes_no_byte(cluster, shapes_dataset, quick_config, shapes_store, tmp_path):
    doomed = cluster.worker(EZSD_FAILPOINT="block.before_rename")
    cluster.worker()
    cluster.worker()
    cluster.wait_for(3)
    out = tmp_path / "store"
    build_cache(BuildRequest(dataset=shapes_dataset, config=quick_config, out=out, scheduler=cluster.address))
    assert doomed.wait(WAIT_SECONDS) == -signal.SIGKILL
    assert files(out) == files(shapes_store)
    record = unseal((out / "environment.json").read_bytes(), "environment.json")
    assert (record["scheduler"], record["workers"], record["shares"]) == ("cluster", 3, None)
    assert record["started"] <= record["finished"]
    assert cluster.address.removeprefix("tcp://") not in json.dumps(record) + (out / "build.log").read_text()


def test_what_kills_every_worker_is_named(tmp_path):
    cluster = Cluster(tmp_path, DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="0")
    try:
        cluster.worker()
        cluster.wait_for(1)
        with (
            Pool(Schedule(scheduler=cluster.address)) as pool,
            Progress("x", 1, unit="block") as progress,
            pytest.raises(ClusterError, match=r"block 7: .* died \(1 in all"),
        ):
            pool.run(os._exit, [7], named=lambda number: f"block {number}", progress=progress)
    finally:
        cluster.stop()


def test_what_a_build_has_finished_stays_when_its_workers_or_the_scheduler_are_lost(
    shapes_dataset, quick_config, shapes_store, tmp_path, monkeypatch
):
    cluster = Cluster(tmp_path, DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="0")
    request = BuildRequest(
        dataset=shapes_dataset, config=quick_config, out=tmp_path / "store", scheduler=cluster.address
    )
    again = "what is finished stays, run the same command again$"
    finish = Progress.finish

    def lose_the_scheduler(progress, item, result):
        finish(progress, item, result)
        cluster.scheduler.kill()

    try:
        cluster.worker(EZSD_FAILPOINT="block.after_rename")
        cluster.wait_for(1)
        with pytest.raises(ClusterError, match=rf"block \d: the worker .* died \(1 in all; .* outside\?\); {again}"):
            build_cache(request)
        assert blocks_done(request.out) == 1
        cluster.worker()
        cluster.wait_for(1)
        with monkeypatch.context() as patch:
            patch.setattr("ezsd.pipeline.extraction.build._Extraction.finish", lose_the_scheduler)
            patch.setattr(ezsd.pipeline.scheduling.pool, "_LOOK_SECONDS", 1.0)
            patch.setattr(ezsd.pipeline.scheduling.dask_cluster, "CONNECT_SECONDS", 1)
            with pytest.raises(ClusterError, match=f"the connection to the Dask scheduler is lost; {again}"):
                build_cache(request)
        cluster.scheduler.wait()
        assert blocks_done(request.out) >= 2
        cluster.start_again()
        cluster.worker()
        cluster.wait_for(1)
        # Of blocks of 5, 5 and 2 images.
        assert build_cache(request).extracted <= 5
        assert files(request.out) == files(shapes_store)
    finally:
        cluster.stop()


def blocks_done(store):
    return len(list(store.glob("journal/block-*")))


def test_workers_that_died_at_a_memory_limit_are_told_of_it(tmp_path):
    cluster = Cluster(tmp_path, DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="0")
    try:
        cluster.worker("--memory-limit", "3GiB")
        cluster.wait_for(1)
        with (
            Pool(Schedule(scheduler=cluster.address)) as pool,
            Progress("x", 1, unit="block") as progress,
            pytest.raises(
                ClusterError, match=r"memory at their memory limit of 3\.0 GiB: .* --memory-limit 0, or killed"
            ),
        ):
            pool.run(os._exit, [7], named=lambda number: f"block {number}", progress=progress)
    finally:
        cluster.stop()


def test_many_tasks_are_given_to_a_cluster_some_at_a_time(cluster, monkeypatch):
    monkeypatch.setattr(ezsd.pipeline.scheduling.pool, "_LEAST_TASKS", 4)
    cluster.worker()
    known = []

    class Counting(Progress):
        def finish(self, item, result):
            super().finish(item, result)
            known.append(pool.client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)))

    with Pool(Schedule(scheduler=cluster.address)) as pool, Counting("x", 23, unit="task") as progress:
        results = pool.run(abs, list(range(-23, 0)), named=str, progress=progress)
    assert sorted(results) == list(range(1, 24))
    # The scheduler learns a moment later that a result is no longer wanted.
    assert 1 <= max(known) <= 12


def test_a_tasks_own_error_ends_the_work_at_once(cluster):
    cluster.worker()
    cluster.wait_for(1)
    with (
        Pool(Schedule(scheduler=cluster.address)) as pool,
        Progress("x", 3, unit="task") as progress,
        pytest.raises(ValueError, match="sleep length must be non-negative"),
    ):
        pool.run(time.sleep, [-1, 600, 600], named=str, progress=progress)


def test_workers_are_looked_over_before_any_work(cluster, shapes_store, tmp_path, monkeypatch):
    mark = shapes_store / "COMMIT.json"
    there = {str(mark): file_digest(mark).sha256}
    worker = cluster.worker("--nthreads", "2")
    with connected(cluster.address) as client:
        with pytest.raises(ClusterError, match="runs 2 threads; start it with --nthreads 1"):
            check_workers(client, Needs(files=there, device="cpu"))
        worker.kill()
        worker.wait()
        worker = cluster.worker("--nthreads", "1")
        client.wait_for_workers(1, timeout=WAIT_SECONDS)
        check_workers(client, Needs(files=there, device="cpu"))
        with pytest.raises(ClusterError, match=r"does not see /absent/plan; all machines .* \(1 of 1 workers"):
            check_workers(client, Needs(files={**there, "/absent/plan": ""}, device="cpu"))
        with pytest.raises(ClusterError, match="sees another file than this process as .*COMMIT.json"):
            check_workers(client, Needs(files={str(mark): "0" * 64}, device="cpu"))
        with pytest.raises(ClusterError, match="cuda:99"):
            check_workers(client, Needs(files=there, device="cuda:99"))
        with monkeypatch.context() as patch:
            patch.setattr(ezsd.pipeline.scheduling.dask_cluster, "versions", lambda: versions() | {"numpy": "1.0"})
            with pytest.raises(ClusterError, match=r"has numpy .* instead of 1\.0, .* same versions"):
                check_workers(client, Needs(files=there, device="cpu"))
        worker.kill()
        worker.wait()
        (tmp_path / "else/ezsd").mkdir(parents=True)
        (tmp_path / "else/ezsd/__init__.py").write_text("raise ImportError('not here')")
        cluster.worker(PYTHONPATH=str(tmp_path / "else"))
        client.wait_for_workers(1, timeout=WAIT_SECONDS)
        with pytest.raises(ClusterError, match=r"cannot run ezsd .*not here"):
            check_workers(client, Needs(files=there, device="cpu"))


def test_a_memory_limit_is_named_before_any_work(cluster, caplog):
    cluster.worker("--memory-limit", "2GiB")
    cluster.worker("--memory-limit", "0")
    cluster.wait_for(2)
    with connected(cluster.address) as client:
        check_workers(client, Needs(files={}, device="cpu"))
    assert re.search(
        r"1 worker has a memory limit, the least 2\.0 GiB .* start them with --memory-limit 0", caplog.text
    )


def test_workers_that_vanish_while_they_are_looked_over_are_called_vanished(cluster, tmp_path, caplog):
    (tmp_path / "ending.py").write_text(
        "import os, signal\nif os.environ.get('ENDS'): os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = f"{ROOT}:{tmp_path}"
    cluster.worker(PYTHONPATH=path, ENDS="1")
    stays = cluster.worker(PYTHONPATH=path)
    cluster.wait_for(2)
    needs = Needs(files={}, device="cpu", code="ending")
    with connected(cluster.address) as client:
        check_workers(client, needs)
        assert re.search(r"worker \S+: has vanished while .*; going on with 1 other\n", caplog.text)
        stays.kill()
        stays.wait()
        cluster.worker(PYTHONPATH=path, ENDS="1")
        client.wait_for_workers(1, timeout=WAIT_SECONDS)
        check_workers(client, needs)
        assert "going on with 0 others" in caplog.text


@pytest.mark.usefixtures("warm_workers")
def test_a_cluster_that_starts_workers_on_demand_is_waited_for(shapes_dataset, quick_config, shapes_store, tmp_path):
    """As a queueing system's: it has none until a task waits, and none once it has nothing to do."""
    from distributed import LocalCluster

    out = tmp_path / "store"
    with LocalCluster(
        n_workers=0,
        threads_per_worker=1,
        memory_limit=None,
        dashboard_address=None,
        local_directory=str(tmp_path),
        silence_logs=50,
    ) as adaptive:
        adaptive.adapt(minimum=0, maximum=2, interval="100ms", wait_count=1)
        words = build_command(shapes_dataset, quick_config, out, workers=0)[3:]
        done = commandkit.ezsd(
            *words, "--scheduler", adaptive.scheduler_address, "--wait-for-workers", WAIT_SECONDS, cwd=tmp_path
        )
    assert done.returncode == 0, done.stderr
    assert files(out) == files(shapes_store)


def test_workers_as_an_ssh_cluster_starts_them_make_the_same_bytes(
    cluster, shapes_dataset, quick_config, shapes_store, tmp_path
):
    options = {"nthreads": 1, "memory_limit": 0, "local_directory": str(tmp_path), "dashboard": False}
    spec = json.dumps({number: {"cls": "distributed.Nanny", "opts": options} for number in range(2)})
    cluster._start(["distributed.cli.dask_spec", cluster.address, "--spec", spec], {})
    cluster.wait_for(2)
    out = tmp_path / "store"
    build_cache(BuildRequest(dataset=shapes_dataset, config=quick_config, out=out, scheduler=cluster.address))
    assert files(out) == files(shapes_store)


def test_a_worker_that_comes_later_is_looked_over_too(cluster):
    cluster.worker("--nthreads", "2")
    cluster.wait_for(1)
    with connected(cluster.address) as client, pytest.raises(ClusterError, match="a worker runs 2 threads; start it"):
        client.submit(require_fit, versions()).result()
    with pytest.raises(ClusterError, match=r"a worker has numpy .* instead of 1\.0"):
        require_fit(versions() | {"numpy": "1.0"})
    with pytest.raises(ClusterError, match=r"a worker does not see /absent/plan; all machines must reach the store"):
        require_fit(file=Path("/absent/plan"))
    require_fit(versions(), file=Path(__file__))


def test_a_scheduler_that_goes_before_any_work_is_one_line(cluster, monkeypatch):
    cluster.worker()
    cluster.wait_for(1)
    # So long the client looks for it again.
    monkeypatch.setattr(ezsd.pipeline.scheduling.dask_cluster, "CONNECT_SECONDS", 5)
    with connected(cluster.address) as client:
        cluster.scheduler.kill()
        cluster.scheduler.wait()
        with pytest.raises(ClusterError, match="connection to the Dask scheduler is lost"):
            check_workers(client, Needs(files={}, device=None))


def test_versions_are_compared_by_name():
    assert other_versions(versions()) is None
    assert versions()["python"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    other = other_versions(versions() | {"torch": "0.1", "zarr": "0.2"})
    assert re.match(r"has torch \d\S* instead of 0\.1, zarr \d\S* instead of 0\.2, and the bytes could differ", other)


def test_a_scheduler_without_workers_is_refused(cluster, monkeypatch):
    cluster.wait_for_scheduler()
    with (
        pytest.raises(
            ClusterError,
            match="has no workers, none came within 3 s; start some with `dask worker .*, or wait for longer with `",
        ),
        Pool(Schedule(scheduler=cluster.address, wait_for_workers=3)),
    ):
        pass
    cluster.worker()
    require_pool(cluster.address)


def test_a_cluster_whose_workers_are_busy_has_workers(cluster):
    cluster.worker()
    cluster.wait_for(1)
    with connected(cluster.address) as other:
        other.submit(time.sleep, 600)
        with connected(cluster.address, wait=0) as client:
            assert len(client.nthreads()) == 1


def test_a_scheduler_that_goes_while_a_worker_is_waited_for_is_one_line(cluster, monkeypatch):
    cluster.wait_for_scheduler()
    monkeypatch.setattr(ezsd.pipeline.scheduling.dask_cluster, "TELL_SECONDS", 0.2)
    monkeypatch.setattr(ezsd.pipeline.scheduling.dask_cluster, "CONNECT_SECONDS", 5)
    ending = threading.Timer(1.0, cluster.scheduler.kill)
    ending.start()
    with (
        pytest.raises(ClusterError, match="connection to the Dask scheduler is lost"),
        connected(cluster.address, wait=WAIT_SECONDS),
    ):
        pass


def test_a_scheduler_that_is_started_as_told_is_taken(cluster, monkeypatch):
    cluster.scheduler.kill()
    cluster.scheduler.wait()
    monkeypatch.setattr(ezsd.pipeline.scheduling.dask_cluster, "CONNECT_SECONDS", 1)
    with pytest.raises(ClusterError, match=r"\); start one with `dask scheduler`, or check the address$"):
        require_pool(cluster.address)
    cluster.start_again()
    cluster.worker()
    monkeypatch.setattr(ezsd.pipeline.scheduling.dask_cluster, "CONNECT_SECONDS", WAIT_SECONDS)
    require_pool(cluster.address)


def require_pool(address):
    with Pool(Schedule(scheduler=address)) as pool, Progress("x", 1, unit="task") as progress:
        pool.run(abs, [-1], named=str, progress=progress)


def test_a_scheduler_that_is_not_there_is_refused(shapes_dataset, quick_config, tmp_path, monkeypatch):
    monkeypatch.setattr(ezsd.pipeline.scheduling.dask_cluster, "CONNECT_SECONDS", 1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        request = BuildRequest(dataset=shapes_dataset, config=quick_config, out=tmp_path / "store", scheduler=address)
        with pytest.raises(ClusterError, match=rf"`scheduler={address}`: no Dask scheduler answers there within 1 s"):
            build_cache(request)
    assert not (tmp_path / "store").exists()


def test_a_scheduler_that_goes_away_ends_the_build(cluster, monkeypatch):
    cluster.worker()
    cluster.wait_for(1)

    class Killing(Progress):
        def advance(self, steps=1, note=""):
            super().advance(steps, note)
            cluster.scheduler.kill()

    monkeypatch.setattr(ezsd.pipeline.scheduling.pool, "_LOOK_SECONDS", 1.0)
    with (
        Pool(Schedule(scheduler=cluster.address)) as pool,
        Killing("x", 3, unit="task") as progress,
        pytest.raises(ClusterError, match="connection to the Dask scheduler is lost"),
    ):
        pool.run(time.sleep, [0, 600], named=str, progress=progress)


def test_a_cluster_that_loses_all_workers_is_not_waited_for_for_ever(cluster, monkeypatch, caplog):
    worker = cluster.worker()
    cluster.wait_for(1)
    monkeypatch.setattr(ezsd.pipeline.scheduling.pool, "_LOOK_SECONDS", 0.5)
    monkeypatch.setattr(ezsd.pipeline.scheduling.pool, "_ALONE_SECONDS", 1.0)
    with Pool(Schedule(scheduler=cluster.address)) as pool, Progress("x", 1, unit="task") as progress:
        worker.kill()
        with pytest.raises(ClusterError, match=r"no workers for \d+ s; start some and run the same command again"):
            pool.run(time.sleep, [600], named=str, progress=progress)
    assert "has no workers; waiting for some" in caplog.text
    cluster.worker()
    require_pool(cluster.address)


@pytest.fixture
def two_networks(tmp_path):
    """Names of two network namespaces, joined by a cable, and their addresses."""
    names = [f"ezsd-{os.getpid()}-{side}" for side in "ab"]
    ends = [f"ez{os.getpid() % 10**6}{side}" for side in "ab"]
    addresses = ["10.231.7.1", "10.231.7.2"]
    steps = [["netns", "add", name] for name in names]
    steps.append(
        ["link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1]]
    )
    for name, end, address in zip(names, ends, addresses, strict=True):
        steps += [["-n", name, "addr", "add", f"{address}/24", "dev", end], ["-n", name, "link", "set", end, "up"]]
        steps.append(["-n", name, "link", "set", "lo", "up"])
    try:
        for step in steps:
            try:
                subprocess.run(["ip", *step], check=True, capture_output=True)
            except (FileNotFoundError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no network namespaces can be made here: {error}")
        yield list(zip(names, addresses, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_workers_in_another_network_make_the_same_bytes(
    two_networks, shapes_dataset, quick_config, shapes_store, tmp_path
):
    """Scheduler and command in one network namespace, the workers in another: they share the disk alone."""
    (here, host), (across, other_host) = two_networks
    cluster = Cluster(tmp_path, host=host, network=here)
    try:
        doomed = cluster.worker(host=other_host, network=across, EZSD_FAILPOINT="block.half_written")
        cluster.worker(host=other_host, network=across)
        out = tmp_path / "store"
        words = [*build_command(shapes_dataset, quick_config, out, workers=0)[3:], "--scheduler", cluster.address]
        done = commandkit.ezsd(*words, cwd=tmp_path, faults=[["in_network", here]])
        assert done.returncode == 0, done.stderr
        assert doomed.wait(WAIT_SECONDS) == -signal.SIGKILL
        assert files(out) == files(shapes_store)
    finally:
        cluster.stop()
