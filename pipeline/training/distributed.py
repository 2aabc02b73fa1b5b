"""Training in several processes, started by `torchrun`: rank, collectives, and the wrapped model."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ezsd.choices import Backend
from ezsd.errors import BackendError, quantity
from ezsd.kernels import require_backend
from ezsd.pipeline.errors import ArgumentError, RunError
from ezsd.pipeline.process_environment import require_launcher

log = logging.getLogger("ezsd")


@dataclass(frozen=True, slots=True)
class Distributed:
    """Place of one process among all processes of a training; the default is a training in one process."""

    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    """Processes on this machine."""

    @property
    def is_main(self) -> bool:
        """True in the process that writes the run folder."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def all_reduce_max(self, value: int, device: torch.device) -> int:
        """Maximum of an integer over all processes."""
        if self.world_size == 1:
            return value
        values = torch.tensor(value, device=device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return int(values)

    def agree(self, backend: Backend, device: torch.device) -> Backend:
        """Backend for all processes: "auto" becomes "eager" in all where Triton cannot run in one of them.

        Two backends round differently, and each process would find out for itself.
        """
        if backend != "auto" or self.world_size == 1 or device.type == "cpu":
            return backend
        try:
            require_backend("triton", device)
            obstacle = ""
        except BackendError as error:
            obstacle = str(error)
        missing = int(self.all_reduce(torch.tensor(int(bool(obstacle)), device=device)))
        if 0 < missing < self.world_size:
            log.warning(
                "process %d takes eager, as all do: Triton cannot run in %d of %d processes%s",
                self.rank,
                missing,
                self.world_size,
                f"; in this one: {obstacle}" if obstacle else "",
            )
        return "eager" if missing else "triton"

    def wrap(self, model: nn.Module) -> nn.Module:
        """Make backward average the gradients of a model over all processes.

        Buffers stay each process' own: frozen norms have equal ones, and batch statistics are those of one batch.
        """
        if self.world_size == 1:
            return model
        with warnings.catch_warnings():
            # Newer versions have another argument for it, which the oldest one that we run on lacks.
            warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
            return DistributedDataParallel(model, broadcast_buffers=False)


@contextmanager
def join_process_group(device: torch.device) -> Iterator[Distributed]:
    """Connect the processes started together by `torchrun` while the context lasts; without it, a single process.

    Raises:
        ArgumentError: the environment variables are not those of a launcher.
        RunError: the processes cannot reach each other.
    """
    if require_launcher(os.environ) == 1:
        yield Distributed()
        return
    mine = not dist.is_initialized()
    if mine:
        try:
            _meet(device)
        except dist.DistError as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            reason = " ".join(str(error).split())
            raise RunError(f"the {os.environ['WORLD_SIZE']} processes did not meet at {where}: {reason}") from error
    try:
        # Another launcher than torchrun need not say how many are here.
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        yield Distributed(dist.get_rank(), dist.get_world_size(), local)
    finally:
        if mine:
            dist.destroy_process_group()


def _meet(device: torch.device) -> None:
    if device.type != "cuda":
        dist.init_process_group("gloo")
        return
    # Otherwise the first collective guesses which GPU is meant, and processes take memory of each other's.
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)


def local_device(name: str) -> torch.device:
    """The device of this process: with several processes and "cuda", each has its own GPU.

    Raises:
        ArgumentError: this machine has fewer GPUs than processes, or the launcher does not number them.
    """
    if name != "cuda":
        return torch.device(name)
    text = os.environ.get("LOCAL_RANK")
    if text is None:
        if require_launcher(os.environ) > 1:
            raise ArgumentError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set in the environment without LOCAL_RANK, by which each "
                "process takes a GPU of its machine; start the training with `torchrun`"
            )
        return torch.device(name)
    if not (text.isascii() and text.isdigit()):
        raise ArgumentError(
            f"LOCAL_RANK={text}: expected the number of this process on its machine; start the training with `torchrun`"
        )
    rank, count = int(text), torch.cuda.device_count()
    if count == 0:
        raise ArgumentError(f"process {rank} of this machine finds no GPU; use `device=cpu`")
    if count == 1 and "CUDA_VISIBLE_DEVICES" in os.environ:
        # Some launchers show each process its own GPU alone.
        return torch.device("cuda", 0)
    if rank >= count:
        raise ArgumentError(
            f"process {rank} of this machine has no GPU of its own, for there are {count}; start the training with "
            f"`torchrun` and at most {quantity(count, 'process', 'processes')} on a machine"
        )
    return torch.device("cuda", rank)
