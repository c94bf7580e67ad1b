"""`tables --jobs`, and several commands at once: the same results, nothing run twice, nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from llamalora.__main__ import main as command
from llamalora.cli import UsageError, run_command
from llamalora.distributed.world import World
from llamalora.files import BUILT_IN, built_in, lock_file
from llamalora.paper import cells, figures, findings, jobs, runner
from llamalora.paper.experiments import recipe
from llamalora.paper.runner import Runner
from llamalora.runs.settings import Settings
from llamalora.training.memory import CONTEXT_BYTES

pytestmark = pytest.mark.slow

MODEL, DATA = (str(built_in(name)) for name in BUILT_IN)
SHORT = ("--model", MODEL, "--data", DATA, "--limit-train", "16", "--limit-eval", "2", "--precision", "fp32")


def test_the_rates_are_chosen_before_other_tables_begin(monkeypatch, tmp_path):
    started = []

    def side_by_side(work, items, jobs, log, ended):
        assert jobs == 2
        started.append([])
        for cell in items:
            started[-1].append(cell.settings.lr)
            by_document = dict.fromkeys(findings.CONVENTIONS, {"1": [1, 0, 1]})
            f1 = {"micro": {"f1": 1 - abs(cell.settings.lr - 2e-3)}, "trainable": 7, "seconds": 1, "curve": [1.0]}
            cell.keep(f1 | {"by_document": by_document, "health": {"exact_copy": 1}, "secondary": {}}, World())
            ended(cell, 0)

    monkeypatch.setattr(runner, "side_by_side", side_by_side)
    monkeypatch.setattr(figures, "save", lambda *_: None)
    rates = ["--rates", "8=1e-3,2e-3,3e-3", "--rates", "full=1e-4,1e-3"]
    run_command(command, ["tables", "recipe", "methods", *SHORT, *rates, "--jobs", "2", "--out", str(tmp_path)])
    trials, methods = started
    assert trials == [1e-3, 2e-3, 3e-3, 1e-4, 1e-3] and methods == [2e-3] * 3 + [1e-3]  # LoRA at 2e-3 is a trial


def test_after_ctrl_c_no_process_is_left(tmp_path):
    """Ctrl-C on a terminal reaches all processes of the command; each run is saved at the step it was at."""
    arguments = [sys.executable, "-m", "llamalora", "tables", "4", *SHORT, "--jobs", "2", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [*arguments, "--epochs", "9999"], env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while sum(path.stat().st_size > 0 for path in tmp_path.glob("runs/*/metrics.jsonl")) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in output, output
    assert output.count("the same command goes on from there") == 1, output
    deadline = time.monotonic() + 5  # multiprocessing's tracker sees a moment later that it has nobody left
    while left := [child for child in children if Path(f"/proc/{child}").exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)
    logs = [path.read_text() for path in tmp_path.glob("cells/*.log")]
    assert len(logs) == 2 and all("stopped by a signal after step" in log for log in logs)
    assert len({path.parent for path in tmp_path.glob("runs/*/checkpoints/step-*")}) == 2  # each run may have several
    assert not [*tmp_path.glob("cells/*.json")]


def test_a_process_that_dies_is_a_failure(tmp_path):
    ends = {}
    items = [signal.SIGCHLD, signal.SIGKILL, 10**4]  # the first is ignored, the last is no signal
    jobs.side_by_side(signal.raise_signal, items, 1, lambda item: tmp_path / f"{item:d}", ends.__setitem__)
    assert ends == {signal.SIGCHLD: 0, signal.SIGKILL: -signal.SIGKILL, 10**4: 1}
    assert (tmp_path / "10000").read_text() == "error: [Errno 22] Invalid argument\n"
    cell = cells.Cell.of(Settings(model=MODEL, data=DATA), {}, tmp_path, World())
    for code, words in {-9: "its process ended with SIGKILL; what it said is in", 1: "with exit code 1"}.items():
        assert words in cell.outcome(code, World())["error"] and words in cell.read()["error"]
    cell.keep({"micro": 1}, World())
    assert "error" not in cell.outcome(-9, World())  # it had done its work


def test_what_another_command_is_at_comes_last_and_is_not_repeated(monkeypatch, tmp_path, capsys):
    table = Runner(Settings(model=MODEL, data=DATA), (0,), tmp_path, World())
    trials = recipe({8: [1e-3, 2e-3, 3e-3]}, [])
    busy, *others = (table.cells(row, 0)[0] for row in trials.rows)
    theirs, trained = lock_file(cells.lock_of(busy.path)), []

    def run(cell, world):
        assert lock_file(cells.lock_of(cell.path)) is None  # while it runs, no other command can
        trained.append(cell.path)
        cell.keep({"micro": {"f1": 0.5}}, world)
        return cell.read()

    def finish(_):
        busy.keep({"micro": {"f1": 0.25}}, World())
        theirs.close()

    monkeypatch.setattr(cells.Cell, "_run", run)
    monkeypatch.setattr(time, "sleep", finish)
    table.run([trials])
    assert trained == [cell.path for cell in others]
    said = capsys.readouterr()
    assert f"another command is making {busy.path}; waiting for it" in said.err
    assert said.out.rstrip().rpartition("\n")[2].startswith("  F1 25.00; ")


def test_jobs_that_cannot_be():
    jobs.check_jobs(1, World(size=2))
    jobs.check_jobs(64, World())
    with pytest.raises(UsageError, match="--jobs 2: not under torchrun"):
        jobs.check_jobs(2, World(size=2))


def test_jobs_are_dealt_out_over_the_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (2**33, 2**34))
    for gpus, expected in ((0, []), (3, [0, 1, 2, 0, 1]), (8, [0, 1, 2, 3, 4])):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert [gpu for gpu, _ in jobs.shares(5)] == expected
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    half = (2**32 - CONTEXT_BYTES) / 2**34
    assert [fraction for _, fraction in jobs.shares(5)] == [half, half, 1.0, half, half]
