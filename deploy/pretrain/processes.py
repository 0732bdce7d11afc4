"""Data-parallel processes on one machine: start them, average gradients, share tensors."""

import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

COLLECTIVE_DEADLINE = timedelta(minutes=10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process's place among those that train together.

    Attributes:
        rank: its number.
        size: how many there are.
    """

    rank: int
    size: int

    @property
    def leads(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def average(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor by its mean over the processes, in one collective."""
        kept = list(tensors)
        if self.size == 1 or not kept:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in kept])
        dist.all_reduce(flat)
        flat /= self.size
        offset = 0
        for tensor in kept:
            tensor.copy_(flat[offset : offset + tensor.numel()].view_as(tensor))
            offset += tensor.numel()

    def share(self, tensors: Iterable[torch.Tensor], source: int) -> None:
        """Replace each tensor by the one of process `source`, in one collective."""
        kept = list(tensors)
        if self.size == 1 or not kept:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in kept])
        dist.broadcast(flat, src=source)
        offset = 0
        for tensor in kept:
            tensor.copy_(flat[offset : offset + tensor.numel()].view_as(tensor))
            offset += tensor.numel()

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.size > 1:
            dist.barrier()


def _enter(rank: int, size: int, threads: int, meeting: str, stage: Callable[[Ranks], None]) -> None:
    torch.set_num_threads(threads)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=COLLECTIVE_DEADLINE)
    try:
        stage(Ranks(rank=rank, size=size))
    finally:
        if size > 1:
            dist.destroy_process_group()


def run_processes(stage: Callable[[Ranks], None], *, num_processes: int, threads: int) -> None:
    """Run a stage in several processes and wait for all of them; with one, run it here.

    Args:
        stage: what each does; it must be importable (a module's function or a partial of one).
        num_processes: how many.
        threads: CPU threads of each.
    """
    if num_processes == 1:
        _enter(0, 1, threads, "", stage)
        return
    os.environ["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        start_processes(_enter, args=(num_processes, threads, meeting, stage), nprocs=num_processes, start_method="spawn")
