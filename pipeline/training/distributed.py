"""One training in several processes: who is who, and what they add up. Started by `torchrun`, or alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ezsd.pipeline.errors import RunError
from ezsd.pipeline.process_environment import require_launcher


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among those of one training."""

    rank: int = 0
    count: int = 1
    here: int = 1
    """How many of them are on this machine."""

    @property
    def first(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    def wait(self) -> None:
        """Return once all processes are here."""
        if self.count > 1:
            dist.barrier()

    def add(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes; in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def largest(self, value: int, device: torch.device) -> int:
        """The largest of all processes' values."""
        if self.count == 1:
            return value
        values = torch.tensor(value, device=device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return int(values)

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its sum over all processes."""
        if self.count == 1:
            return
        trained = [p for p in parameters if p.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        # One message instead of hundreds.
        flat = self.add(torch.cat([g.flatten() for g in gradients]))
        for parameter, part in zip(trained, flat.split([g.numel() for g in gradients]), strict=True):
            parameter.grad = part.view_as(parameter).clone(memory_format=torch.preserve_format)


@contextmanager
def join_processes(device: torch.device) -> Iterator[Processes]:
    """The processes that `torchrun` started together, connected while the context lasts; one alone without it.

    Raises:
        ArgumentError: the environment's variables are not those of a launcher.
        RunError: the processes do not reach each other.
    """
    if require_launcher(os.environ) == 1:
        yield Processes()
        return
    mine = not dist.is_initialized()
    if mine:
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        except dist.DistError as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise RunError(f"the {os.environ['WORLD_SIZE']} processes did not meet at {where}: {error}") from error
    try:
        # Another launcher than torchrun need not say how many are here.
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        yield Processes(dist.get_rank(), dist.get_world_size(), here)
    finally:
        if mine:
            dist.destroy_process_group()


def own_device(name: str) -> torch.device:
    """The device of this process: with several processes and "cuda", each has its own GPU."""
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device(name)
