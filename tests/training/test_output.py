"""What train.py and eval.py print: in a log file, in 80 columns, and with --quiet."""

import json
import math
from pathlib import Path

import pytest

import eval as evaluation
import train as script
from llamalora.cli import run_command
from llamalora.distributed.world import World
from llamalora.progress import Bar
from llamalora.training.batch import Example
from llamalora.training.step import Update
from llamalora.training.steplog import StepLog

HOME = Path(__file__).parents[2]
SIZE = [
    *("--model", str(HOME / "weights/tiny"), "--data", str(HOME / "data/sample"), "--precision", "fp32", "--rank", "2"),
    *("--limit-train", "4", "--batch-sentences", "2", "--epochs", "2", "--eval-limit", "2"),
]


@pytest.fixture
def ran(tmp_path, capsys):
    """Standard output and standard error of a script, with the folder of the runs taken out."""

    def run(main, *argv):
        run_command(main, [word.replace("RUNS", str(tmp_path)) for word in argv])
        return tuple(text.replace(str(tmp_path), "RUNS") for text in capsys.readouterr())

    return run


def test_a_log_and_how_little_is_left_of_it_if_quiet(ran, monkeypatch):
    out, err = ran(script.main, *SIZE, "--out", "RUNS/run")
    assert err.count("training: ") == 1 and "training: 4 of 4 steps, loss " in err and "dev F1" in err
    assert "\r" not in out + err and "\x1b" not in out + err
    example = out[out.index("Answer:") : out.index("<end>")]
    assert all(len(line) <= 80 for line in (out.replace(example, "") + err).splitlines())
    report = out[out.index("development split, best of RUNS/run") :]
    assert "what the words mean" in report and "  exact copies  " in report

    quiet, err = ran(script.main, *SIZE, "--out", "RUNS/quiet", "--quiet")
    assert err == "" and quiet.strip().startswith("development split, best of RUNS/quiet")
    assert "micro" in quiet and "what the words mean" not in quiet and "python eval.py" not in quiet
    # so it is when it is resumed, but what is wrong is said
    again, err = ran(script.main, "--resume", "RUNS/quiet", "--quiet")
    assert err == "" and again == quiet

    flags = ("--run", "RUNS/run", "--limit", "3", "--precision", "fp32")
    monkeypatch.setattr("llamalora.progress.OFTEN", 0)
    out, err = ran(evaluation.main, *flags)
    assert "not kept, for it is not the run's own result" in err and "decoding: 2 of 3 sentences" in err
    assert "3 sentences; precision fp32" in out and out.count("what the words mean") == 1
    assert all(len(line) <= 80 for line in (out + err).splitlines())
    quiet, err = ran(evaluation.main, *flags, "--quiet")
    assert "decoding" not in err and "not kept" in err
    assert quiet.strip().startswith("P ") and "mentions by kind" in quiet and "what the words mean" not in quiet


def test_an_evaluation_that_is_repeated_is_logged_once(tmp_path):
    """A crash between its line and the checkpoint that knows of it."""
    result = {"micro": {"f1": 0.5}, "types": {}, "health": {}, "speed": {}}
    world = World(quiet=True)
    for evaluated in (0, 0, 2):
        with StepLog(tmp_path, world, 4, 2, evaluated) as log:
            if evaluated == 0:
                log.evaluation(2, result)
    (line,) = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 2


def test_a_loss_that_is_no_number_is_null(tmp_path):
    with StepLog(tmp_path, World(quiet=True), 2, 0, 0) as log:
        log.step(1, 0, math.nan, 0.1, Update(math.inf, True, 1.0), [Example((1, 2), 1)], 2, 1.0)
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line["loss"] is line["grad_norm"] is None


def test_quiet_json_is_refused(capsys, tmp_path, ran):
    ran(script.main, *SIZE, "--max-steps", "1", "--out", "RUNS/run", "--quiet")
    with pytest.raises(SystemExit):
        run_command(evaluation.main, ["--run", str(tmp_path / "run"), "--json", "--quiet"])
    assert "--quiet: no effect with --json" in capsys.readouterr().err


def test_a_run_that_was_damaged_says_so_however_quiet(ran, tmp_path):
    ran(script.main, *SIZE, "--out", "RUNS/run", "--quiet")
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    (newest / "state.json").write_text("{")
    _, err = ran(script.main, "--resume", "RUNS/run", "--quiet")
    assert f"checkpoint passed over: RUNS/run/checkpoints/{newest.name}" in err


def test_a_hidden_bar_says_nothing(capsys):
    with Bar("training", 2, "step", hidden=True, leave=True) as bar:
        bar.update(2)
    assert capsys.readouterr() == ("", "")
