"""eval, predict, merge and tables: interrupted, or out of room, they end cleanly and leave nothing half written."""

import json
import signal
from functools import partial
from pathlib import Path

import pytest
from faulty import _before, cut_off, in_phase, run, send

import eval as evaluation
from llamalora import __main__ as commands
from llamalora.commands import merging
from llamalora.corpus import read

pytestmark = pytest.mark.slow

NUMBERS = [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.faults)]


def ended_cleanly(code: int, output: str, number: int) -> None:
    assert code == 128 + number and "Traceback" not in output, output


@pytest.mark.parametrize("number", NUMBERS)
def test_eval(number, whole, tmp_path):
    """SIGTERM or Ctrl-C while eval.py decodes | exit code 143 or 130 without a traceback, nothing written"""
    out, predictions = tmp_path / "out", tmp_path / "predictions.txt"
    argv = ["--run", whole, "--out", out, "--predictions", predictions]
    code, output = run(tmp_path / "log", argv, main=evaluation.main, fault=partial(in_phase, "decoding", number))
    ended_cleanly(code, output, number)
    assert not out.exists() and not predictions.exists()


def _in_a_line(number: int) -> None:
    """The signal comes between the second and the third document of the second chunk that is written."""
    left = list(range(67))

    def strike(*_, **__):
        if left:
            left.pop()
            if not left:
                send(number)

    _before(read, "sentence_bounds", lambda *_: None)
    _before(json, "dumps", strike)


@pytest.mark.parametrize("number", NUMBERS)
def test_predict(number, whole, tmp_path):
    """SIGTERM or Ctrl-C while `predict` writes | exit code 143 or 130 without a traceback; all lines are whole"""
    (tmp_path / "notes.txt").write_text("".join(f"Dose {number}: é漢.\n" for number in range(200)))
    argv = ["predict", "--run", whole, tmp_path / "notes.txt"]
    code, output = run(tmp_path / "log", argv, main=commands.main, fault=partial(_in_a_line, number))
    ended_cleanly(code, output, number)
    lines = [line for line in output.split("\n") if line.startswith("{")]
    assert [json.loads(line)["id"] for line in lines] == [str(number) for number in range(1, 129)]


@pytest.mark.parametrize("number", NUMBERS)
def test_merge(number, whole, tmp_path):
    """SIGTERM or Ctrl-C in the middle of `merge` | exit code 143 or 130 without a traceback, no folder left"""
    code, output = run(tmp_path / "log", ["merge", "--run", whole, "--out", tmp_path / "merged"], main=commands.main,
                       fault=partial(_in_a_merge, number))  # fmt: skip
    ended_cleanly(code, output, number)
    assert {path.suffix for path in tmp_path.iterdir()} == {".log"}


def _in_a_merge(number: int) -> None:
    _before(merging, "write_tensors", lambda *_: send(number))


def test_tables(flags, tmp_path):
    """SIGTERM while `tables` decodes | exit code 143 without a traceback; repeated, the table is completed"""
    left_out = ("--rank", "--labels")  # which the tables vary
    own = [item for flag, value in zip(flags[::2], flags[1::2], strict=True) if flag not in left_out
           for item in (flag, value)]  # fmt: skip
    argv = ["tables", "3", "--ranks", "1", "--out", tmp_path / "out", *own, "--epochs", "1"]
    fault = partial(in_phase, "decoding", signal.SIGTERM)
    code, output = run(tmp_path / "log", argv, main=commands.main, fault=fault)
    ended_cleanly(code, output, signal.SIGTERM)
    assert not (tmp_path / "out/tables.md").exists()
    code, output = run(tmp_path / "log", argv, main=commands.main)
    assert code == 0 and "resum" not in output and "failed" not in output, output
    assert (tmp_path / "out/tables.md").read_text().count(" (–) |") == 5  # rows of a rank that the paper has not


@pytest.mark.parametrize("command", ["eval", "merge"])
def test_no_room(command, whole, tmp_path):
    """no room for the results of eval.py or `merge` (RLIMIT_FSIZE) | exit code 1 and the path named, no
    traceback, nothing half written"""
    out = tmp_path / "out"
    main, argv, room = {
        "eval": (evaluation.main, ["--run", whole, "--out", out], 1000),
        "merge": (commands.main, ["merge", "--run", whole, "--out", out], 5000),
    }[command]
    code, output = run(tmp_path / "log", argv, main=main, fault=partial(cut_off, room, False))
    assert code == 1 and f"error: {out}" in output and "Traceback" not in output, output
    left = [path for path in Path(tmp_path).rglob("*") if path.is_file() and path.suffix != ".log"]
    assert [path.name for path in left] in ([], ["answers-dev.jsonl"])  # the smaller of two files may be there, whole
