"""An existing Dask cluster: reached in time, and looked over before any work, worker by worker."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ezsd.cache import file_digest
from ezsd.pipeline.devices import resolve_device
from ezsd.pipeline.errors import ArgumentError, ClusterError

if TYPE_CHECKING:
    from distributed import Client, Worker

CONNECT_SECONDS = 10
"""Seconds within which a scheduler must answer, and its workers must come."""
SHAPES_BYTES = ("ezsd", "torch", "torchvision", "open_clip_torch", "numpy", "zarr", "pillow")
"""Packages that must have the same version in every process of a build."""


LOST = "the connection to the Dask scheduler is lost; what is finished stays, run the same command again"


@contextmanager
def connected(address: str) -> Iterator[Client]:
    """A client of the scheduler at an address that has workers.

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
        try:
            client.wait_for_workers(1, timeout=CONNECT_SECONDS)
        except TimeoutError as error:
            raise ClusterError(
                f"`scheduler={address}`: has no workers, none came within {CONNECT_SECONDS} s; "
                f"start some with `dask worker {address} --nthreads 1`"
            ) from error
        yield client


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


def versions() -> dict[str, str]:
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


def look_around(needs: Needs, wanted: Mapping[str, str], dask_worker: Worker) -> str | None:
    """Find why this process, a worker, cannot do the work; None when it can."""
    # A task whose code cannot be imported would end the worker.
    import_module(needs.code)
    threads = dask_worker.state.nthreads
    if threads != 1:
        return f"runs {threads} threads; start it with --nthreads 1, which keeps sums in one order"
    for file, digest in needs.files.items():
        if not Path(file).is_file():
            return f"does not see {file}; all machines must reach the store and the images under the same paths"
        if file_digest(Path(file)).sha256 != digest:
            return f"sees another file than this process as {file}; all machines must share it"
    try:
        if needs.device is not None:
            resolve_device(needs.device)
    except ArgumentError as error:
        return str(error)
    return other_versions(wanted)


def check_workers(client: Client, needs: Needs) -> None:
    """Have every worker look around before any work.

    Raises:
        ClusterError: one of them cannot do it, says which, and why; or the scheduler is gone.
    """
    try:
        answers: Mapping[str, Any] = client.run(look_around, needs, versions(), on_error="return")
    except OSError as error:
        raise ClusterError(LOST) from error
    bad = {worker: answer for worker, answer in answers.items() if answer is not None}
    if not bad:
        return
    worker, why = next(iter(bad.items()))
    if isinstance(why, Exception):
        why = f"cannot run ezsd ({why}); install it there, in the version that is used here"
    raise ClusterError(f"worker {worker}: {why} ({len(bad)} of {len(answers)} workers cannot do the work)")
