"""Work side by side: each piece in a process of its own, with its share of the cores, or with a GPU of its own."""

import os
import signal
import sys
from collections.abc import Callable, Iterable
from multiprocessing import connection, get_context
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..cli import UsageError, run_command
from ..distributed.world import World

T = TypeVar("T")


def check_jobs(jobs: int, world: World) -> None:
    """Refuses more pieces of work at once than can be.

    Raises:
        UsageError: under torchrun, or with more of them than GPUs.
    """
    if jobs > 1 and world.size > 1:
        raise UsageError(
            f"--jobs {jobs}: not under torchrun, whose processes train one cell together; without it every job is a "
            "process of its own, with a GPU of its own if there are any"
        )
    if world.device.type == "cuda" and jobs > (gpus := torch.cuda.device_count()):
        raise UsageError(f"--jobs {jobs}: every job needs a GPU of its own, and {gpus} can be seen")


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
        jobs: processes at once.
        log: the file to which is added what the work on an item prints.
        ended: called with an item and the exit code of its process (less than 0: it was ended by that signal).
    """
    todo, free = iter(items), list(range(jobs))
    running: dict[Any, tuple[SpawnProcess, T, int]] = {}  # by what tells that a process has ended
    try:
        while True:
            for place, item in zip(tuple(free), todo, strict=False):
                arguments = (work, item, log(item), place, jobs, threads_of(jobs))
                process = get_context("spawn").Process(target=_worker, args=arguments)
                handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which it inherits
                try:
                    process.start()
                finally:
                    signal.signal(signal.SIGINT, handler)
                running[process.sentinel] = process, item, place
                free.remove(place)
            if not running:
                return
            for sentinel in connection.wait(list(running)):
                process, item, place = running.pop(sentinel)
                process.join()
                assert process.exitcode is not None
                free.append(place)
                ended(item, process.exitcode)
    finally:
        for process, *_ in running.values():
            process.terminate()
        for process, *_ in running.values():
            process.join()


def _worker(work: Callable[[T], None], item: T, log: Path, place: int, jobs: int, threads: int) -> None:
    """What a process does.

    Args:
        place: among the `jobs` processes that there are at once.
    """
    os.setpgrp()  # Ctrl-C on a terminal is for the parent alone, or training would take its SIGTERM for a second signal
    with log.open("a") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    os.environ |= {"LOCAL_RANK": str(place), "LOCAL_WORLD_SIZE": str(jobs)}  # its GPU, its share of the memory
    torch.set_num_threads(threads)
    run_command(lambda _: work(item), [])
