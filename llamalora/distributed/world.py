"""One process or many: the group, sums over it, and who may write. Started by torchrun or alone."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InputError, RunError
from ..model.precision import prepare_gpu

T = TypeVar("T")


class LostError(RunError):
    """Another process has died, or has been silent for too long.

    Between GPUs it is mostly not reached: a thread of NCCL's own watches each process, and ends it (SIGABRT) with a
    message of its own when another is lost.
    """


class ExchangeError(RunError):
    """NCCL cannot exchange anything, though no process need have died."""


class DeviceError(InputError):
    """There is no GPU for this process."""


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

    def sum(self, values: Sequence[float | Tensor]) -> list[float]:
        """Each number summed over all processes (in fp64, so the same on each)."""
        if self.size == 1:
            return [float(value) for value in values]
        tensor = torch.tensor([float(value) for value in values], dtype=torch.float64)
        tensor = tensor.to(self.device, non_blocking=True)
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
        DeviceError, PrecisionError: no GPU for this process, or one that this PyTorch has no kernels for.
        LostError: another process has died, or was silent for the timeout.
        ExchangeError: NCCL does not work.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    device = _own_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        prepare_gpu(device)
    if size == 1:
        yield World(device=device)
        return
    try:
        if device.type == "cuda":
            dist.init_process_group("nccl", timeout=timedelta(minutes=timeout_minutes), device_id=device)
        else:
            dist.init_process_group("gloo", timeout=timedelta(minutes=timeout_minutes))
        yield World(dist.get_rank(), size, device)
        dist.barrier()
    except RuntimeError as error:
        explained = _explained(error, f"process {os.environ.get('RANK')} of {size}", timeout_minutes)
        if explained is None:
            raise
        raise explained from None
    # not after a failure: NCCL would wait for processes that are stuck, before anything is said
    dist.destroy_process_group()


def _own_device() -> torch.device:
    """The GPU of this process, if there are any.

    SLURM may show each process a single GPU, its own; torchrun shows all processes of a machine the same.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    place, visible = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if place >= visible:
        if visible > 1 or "TORCHELASTIC_RUN_ID" in os.environ:
            raise DeviceError(
                f"LOCAL_RANK is {place}, so there are at least {place + 1} processes on this machine, and GPUs visible "
                f"to them: {visible}. Start as many processes as there are GPUs (torchrun --nproc_per_node {visible}), "
                "or show more (CUDA_VISIBLE_DEVICES)"
            )
        place = 0
    return torch.device("cuda", place)


def _explained(error: RuntimeError, who: str, timeout_minutes: float) -> RunError | None:
    """What is said of an error of the exchange between processes; None for another one."""
    text = str(error)
    # gloo's errors have no class of their own; most of them name the source file that they come from
    if not (isinstance(error, dist.DistError) or "gloo" in text or "pair closure" in text):
        return None
    # one that NCCL finds at this end: two processes on one GPU, a failed kernel, no shared memory
    if found := re.search(r"^nccl(?!RemoteError)\w+:.*?(?=\nException raised|\Z)", text, re.MULTILINE | re.DOTALL):
        return ExchangeError(
            f"{who} cannot exchange anything with the others: {' '.join(found[0].split())} (NCCL_DEBUG=WARN in the "
            "environment shows more)"
        )
    return LostError(
        f"{who} has lost another one, which died or was silent for {timeout_minutes:g} minutes ({text.splitlines()[0]})"
    )
