"""Runs that are killed, interrupted or starved at any moment, and what --resume makes of them."""

import shutil
import signal
from functools import partial

import pytest
from faulty import STEPS, assert_same, at_step, at_write, cut_off, in_phase, kill, metrics, run, start

from llamalora.cli import Interrupt
from llamalora.runs.state import checkpoints_of, find_leftovers

pytestmark = pytest.mark.slow

WRITES = 56  # more than a resumed run makes; beyond its last one nothing strikes


def some(cases, quick):
    """The quick ones in every test run, the others with `-m ""`."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.faults) for case in cases]


def resume(folder, flags, whole, **how):
    """Goes on, or starts again where the run was struck before it had begun."""
    begun = (folder / "config.json").exists()
    code, output = run(folder.with_name("log"), [*flags, "--out", folder, *(["--resume"] if begun else [])], **how)
    assert code == 0, output
    assert_same(folder, whole)
    return output


@pytest.fixture
def begun(tmp_path, whole, flags):
    """A copy of the run as it was after step 16."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    assert [path.name for path in checkpoints_of(folder)] == ["step-000020", "step-000016"]
    shutil.rmtree(folder / "checkpoints/step-000020")
    return folder


@pytest.mark.parametrize("step", some(range(1, STEPS + 1), (1, 11)))
def test_killed_at_a_step(step, tmp_path, flags, whole):
    """SIGKILL at each of 20 steps | resumed: weights, optimizer state, losses and answers bitwise those of an
    uninterrupted run"""
    folder = tmp_path / "run"
    code, output = run(tmp_path / "log", [*flags, "--out", folder], fault=partial(at_step, step, signal.SIGKILL))
    assert code == -signal.SIGKILL, output
    assert len(metrics(folder)) == step - 1
    resume(folder, flags, whole)


@pytest.mark.parametrize("moment", some(range(1, WRITES), (2, 14, 30, 44)))
def test_killed_at_a_write(moment, begun, flags, whole):
    """SIGKILL before each write, fsync, rename and removal of steps 17 to 20, two checkpoints, an evaluation and the
    saved models among them | resumed: bitwise, the partial files cleared away"""
    fault = partial(at_write, moment, begun, kill)
    code, output = run(begun.with_name("log"), [*flags, "--out", begun, "--resume"], fault=fault)
    if code == 0 and moment > 40:
        pytest.skip("fewer writes")
    assert code == -signal.SIGKILL, output
    resume(begun, flags, whole)


@pytest.mark.parametrize("moment", some(range(1, 16), (3, 6)))
def test_killed_while_it_starts(moment, tmp_path, flags, whole):
    """SIGKILL before each of the first 15 writes of a new run | started again or resumed: bitwise"""
    folder = tmp_path / "run"
    code, output = run(tmp_path / "log", [*flags, "--out", folder], fault=partial(at_write, moment, folder, kill))
    assert code == -signal.SIGKILL, output
    resume(folder, flags, whole)


@pytest.mark.parametrize("share", some((0.02, 0.1, 0.5, 0.9), (0.5,)))
def test_killed_in_the_middle_of_a_write(share, begun, flags, whole):
    """killed by the kernel in the middle of writing the tensors (RLIMIT_FSIZE, SIGXFSZ) | resumed: bitwise"""
    size = (begun / "checkpoints/step-000016/tensors.safetensors").stat().st_size
    fault = partial(cut_off, max(int(share * size), 16384), True)  # of the other files none is so large
    code, output = run(begun.with_name("log"), [*flags, "--out", begun, "--resume"], fault=fault)
    assert code == -signal.SIGXFSZ, output
    assert len(find_leftovers(begun)) == 1
    resume(begun, flags, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.faults)])
@pytest.mark.parametrize("phase", some(("start", "step", "saving", "evaluation", "decoding"), ("start", "decoding")))
def test_interrupted_in_a_phase(phase, number, tmp_path, flags, whole):
    """SIGTERM or Ctrl-C during start, step, save, evaluation or decoding | exit code 143 or 130 without a traceback,
    the step saved; resumed: bitwise"""
    folder = tmp_path / "run"
    fault = partial(at_step, 7, number) if phase == "step" else partial(in_phase, phase, number)
    code, output = run(tmp_path / "log", [*flags, "--out", folder], fault=fault)
    assert code == 128 + number and "Traceback" not in output, output
    if phase != "start":
        assert f"go on with: python -m llamalora train --resume {folder}" in output
        done = len(metrics(folder))
        # what comes after a step has been summed up is seen in the next
        assert done == {"step": 8, "saving": 5}.get(phase, 10)
        assert checkpoints_of(folder)[0].name == f"step-{done:06d}"  # also where it fell into an evaluation
    resume(folder, flags, whole)


def test_a_second_signal_ends_at_once(tmp_path, flags, whole):
    """a second Ctrl-C in the same step | exit code 130 at once; resumed: bitwise"""
    folder = tmp_path / "run"
    code, output = run(tmp_path / "log", [*flags, "--out", folder], fault=_twice)
    assert code == 130 and "Traceback" not in output, output
    assert checkpoints_of(folder)[0].name == "step-000004"
    resume(folder, flags, whole)


def _twice():
    at_step(7, signal.SIGINT)  # the one set up last is the first to strike
    at_step(7, signal.SIGINT, after=Interrupt.APART)


def test_one_signal_that_comes_twice(tmp_path, flags, whole):
    """two SIGTERM at once, as torchrun passes on what a scheduler has sent to every process | exit code 143, the step
    saved; resumed: bitwise"""
    folder = tmp_path / "run"
    code, output = run(tmp_path / "log", [*flags, "--out", folder], fault=_at_once)
    assert code == 143 and "Traceback" not in output, output
    assert checkpoints_of(folder)[0].name == "step-000008"
    resume(folder, flags, whole)


def _at_once():
    at_step(7, signal.SIGTERM)
    at_step(7, signal.SIGTERM)


def test_two_writers(tmp_path, flags, whole):
    """a second run, new or resumed, into the folder of one that is being written | refused with exit code 2, the
    first unharmed"""
    folder = tmp_path / "run"
    first = start(tmp_path / "first", [*flags, "--out", folder], fault=partial(at_step, 5, signal.SIGSTOP))
    while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < 4:
        assert first.processes[0].is_alive(), first.output()
    for extra, words in (((), "holds a run already"), (("--resume",), "another process is writing to this run")):
        code, output = run(tmp_path / "second", [*flags, "--out", folder, *extra])
        assert code == 2 and words in output and "Traceback" not in output, output
    first.processes[0].kill()
    first.finish()
    resume(folder, flags, whole)
