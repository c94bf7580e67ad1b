"""How long a run is: --epochs, --max-steps, --limit-train, --patience; the same when it is resumed."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

import train as script
from llamalora.cli import UsageError, run_command
from llamalora.distributed.world import World
from llamalora.runs.folder import read_settings
from llamalora.runs.settings import Settings
from llamalora.training import job, loop
from llamalora.training.job import prepare
from llamalora.training.step import learning_rate

HOME = Path(__file__).parents[2]
SIZE = {"model": str(HOME / "weights/tiny"), "data": str(HOME / "data/sample"), "precision": "fp32"}


def planned(folder, **changes):
    return prepare(Settings(**SIZE | {"out": str(folder)} | changes), World(), False)


def test_a_limited_corpus_is_passed_over_three_times_and_a_small_one_as_often_as_gives_400_steps(tmp_path):
    small = planned(tmp_path, batch_sentences=100)  # 417 sentences: 5 steps an epoch
    assert small.settings.epochs == 80 and len(small.steps) == 400
    limited = planned(tmp_path, batch_sentences=10, limit_train=20)
    assert limited.settings.epochs == 3 and len(limited.steps) == 6
    assert len(planned(tmp_path, batch_sentences=10, limit_train=20, epochs=5).steps) == 10


def test_max_steps_is_the_beginning_of_the_longer_run(tmp_path):
    whole = planned(tmp_path, batch_sentences=10, limit_train=40, epochs=3)
    cut = planned(tmp_path, batch_sentences=10, limit_train=40, epochs=3, max_steps=6)
    assert cut.steps == whole.steps[:6] and len(whole.steps) == 12
    # the number of epochs that was given stays the run's, or the same command could not resume it
    assert cut.settings.epochs == 3
    assert [done for done in range(1, 7) if cut.is_evaluated(done)] == [4, 6]
    assert planned(tmp_path, batch_sentences=10, limit_train=40, epochs=3, max_steps=99).steps == whole.steps
    # without epochs it is just so many
    alone = planned(tmp_path, batch_sentences=10, limit_train=40, max_steps=50)
    assert len(alone.steps) == 50 and alone.steps[:12] == whole.steps and alone.settings.epochs == 13
    # a resumed run knows its epochs, and plans the same
    assert planned(tmp_path, batch_sentences=10, limit_train=40, max_steps=50, epochs=13).steps == alone.steps


@pytest.mark.parametrize("changes, message", [
    ({"max_steps": 100_000, "limit_train": 1}, "--max-steps 100000: would take more than 10,000 passes"),
    ({"patience": 3, "limit_train": 20, "epochs": 4}, "--patience 3: cannot end .* evaluated 4 times; --eval-every"),
    ({"patience": 1, "limit_train": 20, "max_steps": 1}, "--patience 1: cannot end .* evaluated 1 times"),
])  # fmt: skip
def test_what_cannot_be_or_has_no_effect_is_refused(changes, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        planned(tmp_path, batch_sentences=10, **changes)


def test_numbers_below_one_and_a_corpus_without_a_development_split(tmp_path):
    for name in ("max_steps", "patience"):
        with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} is 0; it must be at least 1"):
            Settings(**{name: 0})
    (tmp_path / "train.PubTator.txt").write_text("1|t|Mesna helps.\n1|a|\n1\t0\t5\tMesna\tChemical\tD1\n")
    with pytest.raises(UsageError, match="--patience: .* has no development split"):
        planned(tmp_path / "run", data=str(tmp_path), patience=1)
    assert planned(tmp_path / "run", batch_sentences=10, limit_train=20, epochs=5, patience=3).settings.patience == 3


@pytest.fixture
def scored(monkeypatch):
    """F1 of one evaluation after another; beyond them the power fails."""
    script = []
    real = loop.evaluate_now

    def evaluate_now(*arguments, **options):
        if not script:
            raise InterruptedError
        result, answers = real(*arguments, **options)
        result["micro"]["f1"] = script.pop(0)
        return result, answers

    monkeypatch.setattr(loop, "evaluate_now", evaluate_now)
    monkeypatch.setattr(job, "FEWEST_STEPS", 1)
    return script


RUN = SIZE | {"batch_sentences": 2, "limit_train": 4, "eval_limit": 1, "epochs": 6, "rank": 2}
HISTORY = [0.0, 0.3, 0.2, 0.3]  # the second is the best; two later ones are not better


def run(folder, resume=False, **changes):
    return loop.train(Settings(**RUN | {"out": str(folder)} | changes), World(), resume)


def steps(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder, which):
    return load_file(folder / which / "adapter_model.safetensors")


def test_patience_ends_a_run_with_the_best_kept(scored, tmp_path, capsys):
    scored += [*HISTORY, 0.9]
    result = run(tmp_path / "run", patience=2)
    assert scored == [0.9]  # it was not asked for
    assert len(steps(tmp_path / "run")) == 8 and result["micro"]["f1"] == 0.3
    assert "ended early after step 8: no better dev F1 than 30.00 in 2 evaluations" in capsys.readouterr().out
    # the best is that of step 4, the last that of step 8, and the learning rate that of the whole plan
    scored += [0.1, 0.2, 0.3, 0.4]
    run(tmp_path / "four", epochs=6, max_steps=8)
    last, eight = weights(tmp_path / "run", "last"), weights(tmp_path / "four", "last")
    assert any(not last[name].equal(eight[name]) for name in last)
    rates = [step["lr"] for step in steps(tmp_path / "run")]
    assert rates == [learning_rate(0.00469, update, 12, 1, "cosine") for update in range(8)]
    rates = [step["lr"] for step in steps(tmp_path / "four")]
    assert rates == [learning_rate(0.00469, update, 8, 0, "cosine") for update in range(8)]


@pytest.mark.parametrize("done", [1, 3])
def test_a_resumed_run_is_as_patient(done, scored, tmp_path, capsys):
    uneven = {"limit_train": 6, "eval_every": 4}  # not at the ends of epochs
    scored += HISTORY
    run(tmp_path / "whole", patience=2, **uneven)
    scored += HISTORY[:done]
    with pytest.raises(InterruptedError):
        run(tmp_path / "run", patience=2, **uneven)
    scored += HISTORY[done:]
    assert run(tmp_path / "run", resume=True, patience=2, **uneven)["micro"]["f1"] == 0.3
    assert scored == []
    for which in ("best", "last"):
        one, other = weights(tmp_path / "run", which), weights(tmp_path / "whole", which)
        assert all(one[name].equal(other[name]) for name in one)
    state = [(step["step"], step["loss"], step["lr"]) for step in steps(tmp_path / "run")]
    assert state == [(step["step"], step["loss"], step["lr"]) for step in steps(tmp_path / "whole")]
    # once it has ended, it does not go on
    capsys.readouterr()
    run(tmp_path / "run", resume=True, patience=2, **uneven)
    assert "ended early" in capsys.readouterr().out and len(steps(tmp_path / "run")) == len(state)


def test_a_run_is_resumed_with_its_own_length(scored, tmp_path, capsys):
    scored += [0.1]
    with pytest.raises(InterruptedError):
        run(tmp_path / "run", max_steps=5, epochs=None)
    assert read_settings(tmp_path / "run").epochs == 3
    with pytest.raises(SystemExit):
        run_command(script.main, ["--resume", str(tmp_path / "run"), "--max-steps", "6"])
    assert "--max-steps is 6, the run has 5" in capsys.readouterr().err
    scored += [0.2, 0.3]
    run_command(script.main, ["--resume", str(tmp_path / "run"), "--max-steps", "5"])
    assert [step["step"] for step in steps(tmp_path / "run")] == [1, 2, 3, 4, 5]
