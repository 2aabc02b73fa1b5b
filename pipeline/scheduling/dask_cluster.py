"""An existing Dask cluster: reached in time, and looked over before any work, worker by worker."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import logging
import platform
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ezsd.cache import file_digest
from ezsd.errors import quantity
from ezsd.pipeline.devices import resolve_device
from ezsd.pipeline.errors import ArgumentError, ClusterError

if TYPE_CHECKING:
    from distributed import Client, Worker

log = logging.getLogger("ezsd")

CONNECT_SECONDS = 10
"""Seconds within which a scheduler must answer."""
WAIT_SECONDS = 10.0
"""Seconds within which a cluster's first worker must come, unless a user waits for longer."""
TELL_SECONDS = 15.0
"""Seconds between two lines about a wait."""
SHAPES_BYTES = ("ezsd", "torch", "torchvision", "open_clip_torch", "numpy", "zarr", "pillow")
"""Packages that must have the same version in every process of a build."""


LOST = "the connection to the Dask scheduler is lost; what is finished stays, run the same command again"


@contextmanager
def connected(address: str, *, wait: float | None = None) -> Iterator[Client]:
    """A client of the scheduler at an address that has workers.

    Args:
        address: of the scheduler.
        wait: seconds to wait for a first worker; None for `WAIT_SECONDS`.

    Raises:
        ClusterError: it does not answer in time, or has no workers.
    """
    from distributed import Client

    silence_dask()
    # It compares versions by a list of its own; see `check_workers`.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, TypeError, ValueError) as error:
            raise ClusterError(
                f"`scheduler={address}`: no Dask scheduler answers there within {CONNECT_SECONDS} s "
                f"({type(error).__name__}: {error}); start one with `dask scheduler`, or check the address"
            ) from error
    with client:
        _await_worker(client, address, WAIT_SECONDS if wait is None else wait)
        yield client


def _await_worker(client: Client, address: str, seconds: float) -> None:
    """Wait until a cluster has a worker, a busy one too; ClusterError where none comes in time."""
    from distributed import CancelledError, wait

    # A cluster that starts workers on demand starts one for a task that waits, and for nothing else.
    asked = client.submit(abs, 0, pure=False)
    began = time.monotonic()
    try:
        while not client.nthreads():
            left = seconds - (time.monotonic() - began)
            if left <= 0:
                raise ClusterError(
                    f"`scheduler={address}`: has no workers, none came within {seconds:g} s; start some with "
                    f"`dask worker {address} --nthreads 1 --memory-limit 0`, or wait for longer with `wait_for_workers`"
                )
            with contextlib.suppress(TimeoutError), client.as_current():
                wait([asked], timeout=min(left, TELL_SECONDS))
                return
            log.info("waiting for a first worker of the Dask scheduler")
    except (CancelledError, OSError) as error:
        raise ClusterError(LOST) from error


def silence_dask() -> None:
    """Keep Dask from logging: its workers' comings and goings do not concern users, and what fails is raised."""
    # Both have levels of their own once Dask is imported.
    for name in ("distributed", "distributed.client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def require_bokeh() -> None:
    """ClusterError where Dask cannot draw its pages."""
    if importlib.util.find_spec("bokeh") is None:
        raise ClusterError("`dashboard`: needs the package bokeh; install it, or leave the option out")


def dashboard_address(client: Client) -> str:
    """Address of the scheduler's pages; ClusterError when it serves none."""
    if "dashboard" not in client.scheduler_info()["services"]:
        raise ClusterError("`dashboard`: this scheduler serves no dashboard; it needs the package bokeh where it runs")
    return str(client.dashboard_link)


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Requirements that every worker is checked for."""

    files: Mapping[str, str]
    """Sha256 by absolute path."""
    device: str | None
    """Device of the teacher; None for tasks without a teacher."""
    code: str = "ezsd"
    """The module that the tasks come from."""


@cache
def versions() -> Mapping[str, str]:
    """Versions that shape the bytes, in this process; builds of one release for different hardware count as one."""
    found = {name: importlib.metadata.version(name).partition("+")[0] for name in SHAPES_BYTES}
    return {"python": ".".join(map(str, sys.version_info[:2])), **found}


def other_versions(wanted: Mapping[str, str]) -> str | None:
    """Describe what this process has in another version than the one that began the build; None when nothing."""
    found = versions()
    other = [f"{name} {found[name]} instead of {version}" for name, version in wanted.items() if found[name] != version]
    if not other:
        return None
    return f"has {', '.join(other)}, and the bytes could differ; install the same versions there"


@dataclass(frozen=True, slots=True)
class Look:
    """Self-description of a worker."""

    problem: str | None
    """Reason why it cannot do the work; None when it can."""
    memory_limit: int | None
    """Bytes of memory near which Dask pauses it and ends it; None for no limit."""


def look_around(needs: Needs, wanted: Mapping[str, str], dask_worker: Worker) -> Look:
    """Find why this process, a worker, cannot do the work, and what limits it."""
    try:
        # A task whose code cannot be imported would end the worker.
        import_module(needs.code)
        problem = other_threads(dask_worker) or _unreachable(needs) or other_versions(wanted)
    except Exception as error:
        # Returned, not raised: what is raised is the connection's, or this package is not there.
        problem = _not_able(error)
    return Look(problem, dask_worker.memory_manager.memory_limit)


def _not_able(error: Exception) -> str:
    return f"cannot run ezsd ({error}); install it there, in the version that is used here"


def other_threads(worker: Worker) -> str | None:
    """Describe why a worker's threads are too many; None when they are not."""
    threads = worker.state.nthreads
    return (
        None if threads == 1 else f"runs {threads} threads; start it with --nthreads 1, which keeps sums in one order"
    )


def _unreachable(needs: Needs) -> str | None:
    for file, digest in needs.files.items():
        if not Path(file).is_file():
            return _not_seen(file)
        if file_digest(Path(file)).sha256 != digest:
            return f"sees another file than this process as {file}; all machines must share it"
    try:
        if needs.device is not None:
            resolve_device(needs.device)
    except ArgumentError as error:
        return str(error)
    return None


def _not_seen(file: str) -> str:
    return f"does not see {file}; all machines must reach the store and the images under the same paths"


def require_fit(wanted: Mapping[str, str] | None = None, *, file: Path | None = None) -> None:
    """Check this process, if it is a cluster's worker: it may have come after the others were looked over.

    Args:
        wanted: versions of the process that began the build; None where these were compared before.
        file: a file that every process of the build has to see.

    Raises:
        ClusterError: its threads or versions are others, or it does not see the file.
    """
    problem = None if wanted is None else other_versions(wanted)
    if file is not None and not file.is_file():
        problem = _not_seen(str(file))
    # A worker has loaded it; any other process would spend half a second on it.
    if "distributed" in sys.modules:
        from distributed import get_worker

        with contextlib.suppress(ValueError):
            problem = other_threads(get_worker()) or problem
    if problem is not None:
        raise ClusterError(f"{platform.node()}: a worker {problem}")


def check_workers(client: Client, needs: Needs) -> None:
    """Have every worker look around before any work.

    Workers that vanish meanwhile are left out, be it all of them: a cluster that starts workers on demand ends those
    that have nothing to do. Those that come later are looked over by `require_fit`.

    Raises:
        ClusterError: one of them cannot do it, says which, and why; or the scheduler is gone.
    """
    try:
        answers: Mapping[str, Any] = client.run(look_around, needs, versions(), on_error="return")
    except OSError as error:
        raise ClusterError(LOST) from error
    gone = {worker: why for worker, why in answers.items() if isinstance(why, OSError)}
    there = {worker: answer for worker, answer in answers.items() if worker not in gone}
    bad = {worker: problem for worker, answer in there.items() if (problem := _problem(answer)) is not None}
    for worker, problem in bad.items():
        raise ClusterError(f"worker {worker}: {problem} ({len(bad)} of {len(answers)} workers cannot do the work)")
    for worker, why in gone.items():
        log.warning(
            "worker %s: has vanished while it was looked over (%s), killed or not needed; going on with %s",
            worker,
            why,
            quantity(len(there), "other"),
        )
    _tell_of_limits({worker: look.memory_limit for worker, look in there.items() if look.memory_limit})


def _problem(answer: Look | Exception) -> str | None:
    return answer.problem if isinstance(answer, Look) else _not_able(answer)


def _tell_of_limits(limits: Mapping[str, int]) -> None:
    """Warn of workers that Dask ends when they need more memory than it has given them."""
    if limits:
        worker = min(limits, key=lambda worker: limits[worker])
        log.warning(
            "%s a memory limit, the least %s (%s): Dask pauses a worker that comes near it, and then ends "
            "it; start them with --memory-limit 0",
            quantity(len(limits), "worker has", "workers have"),
            gibibytes(limits[worker]),
            worker,
        )


def gibibytes(size: int) -> str:
    """Bytes as "2.0 GiB"."""
    return f"{size / 2**30:.1f} GiB"
