"""Work side by side, in several processes, each with its share of the cores, and of the GPUs if there are any."""

import os
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..cli import UsageError, run_command
from ..distributed.world import World
from ..training.memory import CONTEXT_BYTES

T = TypeVar("T")


def check_jobs(jobs: int, world: World) -> None:
    """Refuses more pieces of work at once than can be.

    Raises:
        UsageError: under torchrun, or so many that they find no room on a GPU.
    """
    if jobs > 1 and world.size > 1:
        raise UsageError(
            f"--jobs {jobs}: not under torchrun, whose processes train one cell together; without it every job is a "
            "process, with a GPU or a share of one if there are any"
        )
    if any(fraction <= 0 for _, fraction in shares(jobs)):
        raise UsageError(
            f"--jobs {jobs}: what is free of a GPU's memory would hold no more than CUDA's own part of each"
        )


def shares(jobs: int) -> list[tuple[int, float]]:
    """The GPU of each job, and the fraction of its memory that the job may take: with more jobs than GPUs an even part
    of what is free, since a small model leaves a GPU idle most of the time. Empty where there is none."""
    found, gpus = [], torch.cuda.device_count()
    for gpu in (place % gpus for place in range(jobs if gpus else 0)):
        fraction, together = 1.0, len(range(gpu, jobs, gpus))
        if together > 1:
            free, total = torch.cuda.mem_get_info(gpu)
            fraction = (free / together - CONTEXT_BYTES) / total
        found.append((gpu, fraction))
    return found


def threads_of(jobs: int) -> int:
    """The threads of each process."""
    return max(1, torch.get_num_threads() // jobs)


def side_by_side(
    work: Callable[[T], None],
    items: Iterable[T],
    jobs: int,
    log: Callable[[T], Path],
    ended: Callable[[T, int], None],
) -> None:
    """Works on all items. However this ends, its processes end before it: they get a SIGTERM, and are waited for.

    Args:
        work: on an item; both can be pickled.
        items: each is taken when there is a process for it.
        jobs: processes at once, each of which works on one item after the other.
        log: the file to which is added what the work on an item prints.
        ended: called with an item and 0, or the exit code of its process if that ended instead (less than 0: by that
            signal); another one then takes its place.
    """
    todo, free, gpus = iter(items), list(range(jobs)), dict(enumerate(shares(jobs)))
    workers: dict[int, _Worker] = {}
    busy: dict[Any, tuple[int, T]] = {}  # by link
    try:
        while True:
            for place, item in zip(tuple(free), todo, strict=False):
                if place not in workers or not workers[place].process.is_alive():
                    workers[place] = _Worker(work, place, jobs, gpus.get(place))
                workers[place].link.send((item, log(item)))
                busy[workers[place].link] = place, item
                free.remove(place)
            if not busy:
                return
            for link in connection.wait(list(busy)):
                place, item = busy.pop(link)
                free.append(place)
                ended(item, workers[place].answer())
    finally:
        for worker in workers.values():
            worker.process.terminate()
        for worker in workers.values():
            worker.process.join()


class _Worker:
    """A process, and the link to it."""

    def __init__(self, work: Callable[[T], None], place: int, jobs: int, gpu: tuple[int, float] | None):
        """
        Args:
            place: among the `jobs` processes that there are at once.
            gpu: of `shares`.
        """
        context = get_context("spawn")
        self.link, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(work, theirs, place, jobs, threads_of(jobs), gpu))
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which it inherits
        try:
            self.process.start()
        finally:
            signal.signal(signal.SIGINT, handler)
        theirs.close()  # or its end could not be noticed

    def answer(self) -> int:
        """0 after an item, or the exit code of the process."""
        try:
            self.link.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            assert self.process.exitcode is not None
            return self.process.exitcode
        return 0


def _serve(
    work: Callable[[T], None],
    link: connection.Connection,
    place: int,
    jobs: int,
    threads: int,
    gpu: tuple[int, float] | None,
) -> None:
    """What a process does."""
    os.setpgrp()  # Ctrl-C on a terminal is for the parent alone, or training would take its SIGTERM for a second signal
    number, fraction = gpu or (place, 1.0)
    os.environ |= {"LOCAL_RANK": str(number), "LOCAL_WORLD_SIZE": str(jobs)}  # its GPU, its share of the host's memory
    torch.set_num_threads(threads)

    def in_turn(_: list[str]) -> None:
        with suppress(EOFError):  # the parent is gone
            while True:
                item, log = link.recv()
                with log.open("a") as file:
                    for stream in (sys.stdout, sys.stderr):
                        os.dup2(file.fileno(), stream.fileno())
                if fraction < 1:
                    torch.cuda.set_per_process_memory_fraction(fraction, number)
                work(item)
                link.send(None)

    run_command(in_turn, [])
