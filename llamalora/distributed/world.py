"""One process or many: the group, sums over it, and who may write. Started by torchrun or alone."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from ..errors import RunError

T = TypeVar("T")


class LostError(RunError):
    """Another process has died, or has been silent for too long."""


@dataclass(frozen=True)
class World:
    """This process's place among the others."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    quiet: bool = False  # says nothing but warnings
    terse: bool = False  # says nothing but warnings and the result, and shows no progress

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, *words, result: bool = False) -> None:
        """Prints once for all processes, unless quiet; if terse only what is the `result`."""
        if self.is_main and not self.quiet and (result or not self.terse):
            print(*words, flush=True)

    def warn(self, *words) -> None:
        """Prints once for all processes to standard error, however quiet."""
        if self.is_main:
            print(*words, file=sys.stderr, flush=True)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def sum(self, values: list[float]) -> list[float]:
        """Each number summed over all processes (in fp64, so the same on each)."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, item: T) -> list[T]:
        """Every process's item, in the order of ranks, on every process."""
        if self.size == 1:
            return [item]
        items: list = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def from_main(self, item: T) -> T:
        """The main process's item, on every process."""
        if self.size == 1:
            return item
        box = [item]
        dist.broadcast_object_list(box, src=0)
        return box[0]


@contextmanager
def join_world(timeout_minutes: float = 30) -> Iterator[World]:
    """The `World` that torchrun's environment describes; alone without it.

    NCCL between GPUs, gloo between CPUs.

    Raises:
        LostError: another process has died, or was silent for the timeout.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if size == 1:
        yield World(device=device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=timeout_minutes))
    try:
        yield World(dist.get_rank(), size, device)
        dist.barrier()
    except RuntimeError as error:
        # gloo's errors have no class of their own; most of them name the source file that they come from
        if isinstance(error, dist.DistError) or "gloo" in str(error) or "pair closure" in str(error):
            reason = str(error).splitlines()[0]
            raise LostError(
                f"process {dist.get_rank()} of {size} has lost another one, which died or was silent for "
                f"{timeout_minutes:g} minutes ({reason})"
            ) from None
        raise
    # not after a failure: NCCL would wait for processes that are stuck, before anything is said
    dist.destroy_process_group()
