"""Commands in processes of their own, forked from one that has torch imported, and the faults that strike them."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path

import torch

import train
from llamalora.cli import run_command
from llamalora.commands import verify as verifier
from llamalora.distributed.gradients import GradientSum
from llamalora.model.llama import Llama
from llamalora.runs import state
from llamalora.runs.state import checkpoints_of
from llamalora.training import job, loop
from llamalora.training.steplog import StepLog

CONTEXT = multiprocessing.get_context("forkserver")
# torch imports the last two when they are first needed, for longer than a run here takes
CONTEXT.set_forkserver_preload(["pytest", "faulty", "torch._dynamo", "torch.distributed.tensor"])
STEPS = 20
FLAGS = (
    "--rank", "2", "--dropout", "0.1", "--lr", "0.01", "--precision", "fp32", "--batch-sentences", "3", "--epochs", "2",
    "--save-every", "4", "--eval-batch", "2", "--labels", "Disease",
)  # fmt: skip

# ---- processes ----


@dataclass
class Started:
    """The processes of one command."""

    processes: list
    logs: list[Path]

    def finish(self, timeout: float = 120) -> list[int]:
        """Exit codes, negative for a signal. A process that is alive after so many seconds is an error."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        alive = [process for process in self.processes if process.is_alive()]
        for process in alive:
            process.kill()
            process.join()
        assert not alive, f"{len(alive)} processes did not end: {self.output()}"
        return [process.exitcode for process in self.processes]

    def output(self, rank: int | None = None) -> str:
        logs = self.logs if rank is None else [self.logs[rank]]
        return "\n".join(log.read_text(errors="replace") for log in logs)


def start(log: Path, argv, main: Callable = train.main, fault: Callable | None = None, ranks: int = 1) -> Started:
    """Starts `main(argv)` on so many ranks, as torchrun would; `fault` is called in each process before."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes, logs = [], []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        logs.append(log.with_name(f"{log.name}-{rank}-{time.monotonic_ns()}.log"))
        env = {name: str(value) for name, value in place.items()} | {"CUDA_VISIBLE_DEVICES": ""}
        arguments = (main, [str(item) for item in argv], str(logs[-1]), env, fault)
        processes.append(CONTEXT.Process(target=_child, args=arguments))
        logs[-1].touch()
        processes[-1].start()
    return Started(processes, logs)


def _child(main: Callable, argv: list[str], log: str, env: dict[str, str], fault: Callable | None) -> None:
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(file, standard)
    os.environ.update(env)
    torch.set_num_threads(1)
    if fault:
        fault()
    run_command(main, argv)


def run(log: Path, argv, **how) -> tuple[int, str]:
    """The exit code and the output of a command on one rank."""
    started = start(log, argv, **how)
    (code,) = started.finish()
    return code, started.output()


# ---- what a run holds ----


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same(folder: Path, whole: Path) -> None:
    """Bitwise: weights, optimizer state, losses, answers; and nothing is damaged or left over."""
    newest, expected = checkpoints_of(folder)[0], checkpoints_of(whole)[0]
    for one, other in ((newest, expected), *((folder / name, whole / name) for name in ("best", "last"))):
        assert contents(one) == contents(other), one
    for name in ("step", "loss", "lr", "grad_norm", "skipped"):
        assert [line[name] for line in metrics(folder)] == [line[name] for line in metrics(whole)], name
    assert (folder / "answers-dev.jsonl").read_bytes() == (whole / "answers-dev.jsonl").read_bytes()
    report = verifier.check_run(folder)
    assert report.sound and not report.leftovers, verifier.show(report)


# ---- faults: functions that are called in the process before the command ----


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def _struck(rank: int | None) -> bool:
    return rank is None or os.environ["RANK"] == str(rank)


def _before(owner, name: str, strike: Callable[..., None]) -> None:
    """From now on `strike`, given its arguments, is called before each call of `owner.name`."""
    original = getattr(owner, name)

    @wraps(original)
    def struck(*arguments, **named):
        strike(*arguments, **named)
        return original(*arguments, **named)

    setattr(owner, name, struck)


def at_step(step: int, number: int, rank: int | None = None, after: float = 0.0) -> None:
    """A signal when this step has been made, before it is logged; after so many seconds the process goes on."""

    def strike(log, made, *_, **__):
        if made == step and _struck(rank):
            send(number)
            time.sleep(after)

    _before(StepLog, "step", strike)


def in_phase(phase: str, number: int, rank: int | None = None) -> None:
    """A signal when a phase begins for the first time: start, saving, evaluation, decoding."""
    owner, name = {
        "start": (job, "encode_all"),
        "saving": (state, "write_atomically"),
        "evaluation": (loop, "evaluate_now"),
        "decoding": (Llama, "make_cache"),
    }[phase]
    left = [1]

    def strike(*_, **__):
        if left and _struck(rank):
            left.pop()
            send(number)

    _before(owner, name, strike)


def at_write(moment: int, folder: Path, act: Callable[[], None]) -> None:
    """Acts before the `moment`-th opening for writing, fsync, rename, removal, ... of anything in a folder."""
    inside, seen = os.fspath(folder), [0]

    def count(path) -> None:
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(inside):
            seen[0] += 1
            if seen[0] == moment:
                act()

    def hook(event: str, arguments) -> None:
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod"):
            count(arguments[0])

    sys.addaudithook(hook)
    _before(os, "fsync", lambda handle: count(os.readlink(f"/proc/self/fd/{handle}")))


def cut_off(size: int, dies: bool) -> None:
    """No file can grow beyond `size` bytes: the process is killed in the middle of a write, or told so."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if dies else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def poison(steps: range, rank: int) -> None:
    """The gradient of one rank is NaN in these steps, counted from 1, before it is summed."""
    original, calls = GradientSum.begin, [0]

    def begin(sums, module):
        calls[0] += 1
        if calls[0] in steps and _struck(rank):
            parameter = sums.parameters[0]
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.fill_(float("nan"))
        return original(sums, module)

    GradientSum.begin = begin


kill = partial(send, signal.SIGKILL)
