"""Two processes: one dies, hangs, is interrupted or computes NaN; and runs that change their number of ranks."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from faulty import assert_same, at_step, in_phase, metrics, poison, run, start

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def flags(flags):
    return (*flags, "--dropout", "0")  # drawn by each rank for itself


@pytest.fixture(scope="module")
def alone(tmp_path_factory, flags):
    """An uninterrupted run on one rank."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    code, output = run(folder.with_name("log"), [*flags, "--out", folder])
    assert code == 0, output
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory, flags):
    """An uninterrupted run on two ranks."""
    folder = tmp_path_factory.mktemp("runs") / "pair"
    started = start(folder.with_name("log"), [*flags, "--out", folder], ranks=2)
    assert started.finish() == [0, 0], started.output()
    return folder


def close(folder, whole):
    """Equal up to the order of sums."""
    assert [line["loss"] for line in metrics(folder)] == pytest.approx(
        [line["loss"] for line in metrics(whole)], rel=1e-3
    )


def resume(folder, flags, whole):
    started = start(folder.with_name("log"), [*flags, "--out", folder, "--resume"], ranks=2)
    assert started.finish() == [0, 0], started.output()
    assert_same(folder, whole)


def test_two_ranks_learn_what_one_learns(pair, alone):
    close(pair, alone)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.faults), 1])
def test_one_rank_is_killed(rank, tmp_path, flags, pair):
    """one of two ranks killed | the other ends with exit code 1 and a message; resumed: bitwise"""
    fault = partial(at_step, 7, signal.SIGKILL, rank)
    started = start(tmp_path / "log", [*flags, "--out", tmp_path / "run"], fault=fault, ranks=2)
    codes = started.finish(60)
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1, started.output()
    assert f"process {1 - rank} of 2 has lost another one" in started.output(1 - rank)
    assert "Traceback" not in started.output()
    resume(tmp_path / "run", flags, pair)


def test_one_rank_is_frozen(tmp_path, flags, pair):
    """one of two ranks frozen (SIGSTOP) | the other ends within --timeout with exit code 1 and a message; resumed:
    bitwise"""
    argv = [*flags, "--out", tmp_path / "run", "--timeout", "0.1"]
    started = start(tmp_path / "log", argv, fault=partial(at_step, 7, signal.SIGSTOP, 1), ranks=2)
    started.processes[0].join(60)
    assert started.processes[0].exitcode == 1, started.output()
    assert "was silent for 0.1 minutes" in started.output(0) and "Traceback" not in started.output(0)
    started.processes[1].kill()
    started.finish()
    resume(tmp_path / "run", flags, pair)


@pytest.mark.parametrize("rank", [pytest.param(None, marks=pytest.mark.faults), 0, 1], ids=["all", "first", "second"])
@pytest.mark.parametrize("phase", [pytest.param("step", marks=pytest.mark.faults), "decoding"])
def test_interrupted(phase, rank, tmp_path, flags, pair):
    """SIGTERM to one of two ranks, or to both, in a step or while decoding | both end with exit code 143 after the
    same step; resumed: bitwise"""
    fault = partial(at_step, 7, signal.SIGTERM, rank) if phase == "step" else partial(
        in_phase, phase, signal.SIGTERM, rank
    )  # fmt: skip
    started = start(tmp_path / "log", [*flags, "--out", tmp_path / "run"], fault=fault, ranks=2)
    assert started.finish() == [143, 143], started.output()
    assert "Traceback" not in started.output()
    resume(tmp_path / "run", flags, pair)


def test_one_two_one(tmp_path, flags, alone):
    """one rank, resumed on two, resumed on one | the same order of sentences, losses equal up to rounding"""
    folder = tmp_path / "run"
    for ranks, step, extra in ((1, 7, ()), (2, 14, ("--resume",)), (1, None, ("--resume",))):
        fault = step and partial(at_step, step, signal.SIGTERM)
        started = start(tmp_path / "log", [*flags, "--out", folder, *extra], fault=fault, ranks=ranks)
        assert started.finish() == [143 if step else 0] * ranks, started.output()
    assert [line["tokens"] for line in metrics(folder)] == [line["tokens"] for line in metrics(alone)]
    close(folder, alone)


def test_nan_on_one_rank(tmp_path, flags):
    """a NaN gradient on one of two ranks | both leave out that step and no other: losses as on one rank with the same
    NaN"""
    for ranks in (1, 2):
        argv, fault = [*flags, "--out", tmp_path / str(ranks)], partial(poison, range(5, 6), ranks - 1)
        started = start(tmp_path / "log", argv, fault=fault, ranks=ranks)
        assert started.finish() == [0] * ranks, started.output()
        assert [line["step"] for line in metrics(tmp_path / str(ranks)) if line["skipped"]] == [5]
    close(tmp_path / "2", tmp_path / "1")


def test_overflow_storm(tmp_path, flags):
    """NaN gradients from step 3 on, on one of two ranks | both end after 25 left-out steps with exit code 1 and a
    message"""
    argv = [*flags, "--out", tmp_path / "run", "--epochs", "3"]
    started = start(tmp_path / "log", argv, fault=partial(poison, range(3, 99), 1), ranks=2)
    assert started.finish() == [1, 1]
    for rank in (0, 1):
        assert "error: 25 steps in a row had gradients that are not finite" in started.output(rank)
        assert "Traceback" not in started.output(rank)
    assert len(metrics(tmp_path / "run")) == 26  # the 27th is the one that is too many


@pytest.mark.faults
def test_torchrun_leaves_no_orphan(tmp_path, flags):
    """a rank frozen under torchrun | non-zero exit, no process left"""
    out = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d",
                "--rdzv_endpoint", "localhost:0"]  # fmt: skip
    flags = [*flags, "--epochs", "400", "--timeout", "0.1", "--out", str(out)]
    with (tmp_path / "log").open("w") as log:
        launched = subprocess.Popen([*launcher, "train.py", *flags], cwd=ROOT, stdout=log, stderr=log,
                                    env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})  # fmt: skip
    while not (out / "metrics.jsonl").exists() or len(metrics(out)) < 3:
        assert launched.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.1)
    workers = _with(str(out)) - {launched.pid}
    assert len(workers) == 2
    os.kill(max(workers), signal.SIGSTOP)
    assert launched.wait(120) != 0
    assert not _with(str(out))


def _with(words: str) -> set[int]:
    """The processes that have these words in their command line."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if words in (folder / "cmdline").read_text(errors="replace"):
                found.add(int(folder.name))
        except OSError:
            pass  # it has ended
    return found
