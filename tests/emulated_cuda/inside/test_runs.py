"""train.py, eval.py, predict and merge from end to end, beside the same on the CPU."""

import json
import os
import runpy
import shutil
import signal
import sys
from pathlib import Path

import emulated
import pytest
import torch
from helpers import tiny_model

import eval as evaluation
import train
from llamalora.cli import UsageError
from llamalora.commands import merge, predict
from llamalora.distributed.world import World
from llamalora.model.checkpoint import save_model
from llamalora.model.free_memory import free_memory
from llamalora.paper.jobs import check_jobs, shares
from llamalora.training.memory import CONTEXT_BYTES
from llamalora.training.placement import capacity_of
from llamalora.training.steplog import StepLog

WORDS = ("fever", "rash", "nausea", "cough", "coma")
FLAGS = (
    "--rank", "2", "--lr", "0.01", "--batch-tokens", "200", "--epochs", "3", "--labels", "Disease",
    "--eval-every", "1000",
)  # fmt: skip


def corpus(path: Path, count: int) -> None:
    with path.open("w") as file:
        for number in range(count):
            word = WORDS[number % len(WORDS)]
            text = "Dose " + "1 " * (number % 7) + f"gave {word}."
            start = text.index(word)
            file.write(f"{number}|t|{text}\n{number}\t{start}\t{start + len(word)}\t{word}\tDisease\t-1\n\n")


@pytest.fixture(scope="session", autouse=True)
def small_card():
    """Of so little memory that the search for the largest micro-batch of a tiny model is short."""
    emulated.CARD.memory = 400 * 2**20


@pytest.fixture(scope="session")
def home(tmp_path_factory, tiny_sentencepiece) -> Path:
    """A folder with a model and a corpus; runs are made in it."""
    home = tmp_path_factory.mktemp("home")
    save_model(tiny_model(vocab_size=400, max_position_embeddings=256), home / "model")
    shutil.copy(tiny_sentencepiece / "tokenizer.model", home / "model")
    (home / "data").mkdir()
    corpus(home / "data/train.PubTator.txt", 24)
    corpus(home / "data/dev.PubTator.txt", 4)
    return home


def training(home: Path, out: str, *flags: str) -> Path:
    model, data, out_folder = (str(home / name) for name in ("model", "data", out))
    train.main(["--model", model, "--data", data, *FLAGS, *flags, "--out", out_folder])
    return home / out


@pytest.fixture
def on_cpu(monkeypatch):
    """Calls a function where torch sees no GPU."""

    def call(function, *arguments):
        with monkeypatch.context() as patched:
            patched.setattr(torch.cuda, "is_available", lambda: False)
            return function(*arguments)

    return call


@pytest.fixture(scope="session")
def run(home) -> Path:
    """Trained on the device in fp32."""
    return training(home, "device", "--precision", "fp32")


def metrics(folder: Path, name: str = "loss") -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def test_fp32_learns_and_answers_as_on_the_cpu(home, run, on_cpu):
    cpu = on_cpu(training, home, "cpu", "--precision", "fp32")
    assert metrics(run) == pytest.approx(metrics(cpu), rel=1e-4)
    assert metrics(run)[-1] < 0.95 * metrics(run)[0]
    assert (run / "answers-dev.jsonl").read_bytes() == (cpu / "answers-dev.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("flags", "card", "precision"),
    [((), "V100", "fp16"), (("--dora", "--dropout", "0.1", "--activation-checkpointing", "1"), "V100", "fp16"),
     (("--method", "full"), "H100", "bf16"), pytest.param((), "H100", "bf16", marks=pytest.mark.faults),
     pytest.param(("--method", "partial"), "V100", "fp16", marks=pytest.mark.faults)],
    ids=["lora", "dora", "full", "lora-bf16", "partial"],
)  # fmt: skip
def test_half_precision_learns(home, run, monkeypatch, tmp_path, flags, card, precision):
    """`auto` is what the card computes; without dropout it learns what fp32 learns, up to rounding."""
    monkeypatch.setattr(emulated.CARD, "capability", {"V100": (7, 0), "H100": (9, 0)}[card])
    if "--method" in flags:
        monkeypatch.setitem(globals(), "FLAGS", FLAGS[2:])
    half = training(home, str(tmp_path / "half"), *flags)
    assert json.loads((half / "config.json").read_text())["settings"]["precision"] == precision
    assert metrics(half)[-1] < 0.95 * metrics(half)[0]
    if not flags:
        assert metrics(half) == pytest.approx(metrics(run), rel=0.02)
    assert metrics(half, "skipped") == [False] * len(metrics(half))
    assert set(metrics(half, "loss_scale")) == {65536.0 if precision == "fp16" else 1.0}


def test_an_interrupted_run_is_resumed(home, run, monkeypatch):
    step = StepLog.step

    def stop(log, number, *rest):
        step(log, number, *rest)
        if number == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(StepLog, "step", stop)
        with pytest.raises(SystemExit):
            training(home, "resumed", "--precision", "fp32")
    train.main(["--resume", str(home / "resumed")])
    assert metrics(home / "resumed") == metrics(run)
    for name in ("best", "last"):
        weights = f"{name}/adapter_model.safetensors"
        assert (home / "resumed" / weights).read_bytes() == (run / weights).read_bytes()


@pytest.mark.parametrize("flags", [(), ("--constrain",), ("--draft", "none")], ids=" ".join)
def test_eval_answers_as_on_the_cpu(home, run, on_cpu, tmp_path, flags):
    for where, call in (("device", lambda f, *a: f(*a)), ("cpu", on_cpu)):
        out = ["--out", str(tmp_path / where), "--predictions", str(tmp_path / f"{where}.txt")]
        call(evaluation.main, ["--run", str(run), "--precision", "fp32", *flags, *out])
    assert (tmp_path / "device.txt").read_bytes() == (tmp_path / "cpu.txt").read_bytes()
    answers = [(tmp_path / where / "answers-dev.jsonl").read_text() for where in ("device", "cpu")]
    assert answers[0] == answers[1]


def test_predict_and_merge(home, run, on_cpu, tmp_path, capsys):
    """What is merged answers on the device as the run does, there and on the CPU."""
    (tmp_path / "text.txt").write_text("Dose 1 1 gave coma.\nDose gave rash.\n")
    asked = ["--run", str(run), "--precision", "fp32", str(tmp_path / "text.txt")]
    capsys.readouterr()
    predict.main(asked)
    on_device = capsys.readouterr().out
    on_cpu(predict.main, asked)
    assert on_device == capsys.readouterr().out != ""

    merge.main(["--run", str(run), "--out", str(tmp_path / "merged")])
    data = ["--data", str(home / "data"), "--precision", "fp32", "--json"]
    capsys.readouterr()
    evaluation.main(["--model", str(tmp_path / "merged"), *data])
    of_merged = json.loads(capsys.readouterr().out)
    evaluation.main(["--run", str(run), "--precision", "fp32", "--json"])
    assert of_merged["micro"] == json.loads(capsys.readouterr().out)["micro"]


def test_the_benchmark_for_gpus_needs_no_peer_where_none_is_asked_for(monkeypatch, capsys):
    benchmarks = Path(train.__file__).parent / "benchmarks"
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.syspath_prepend(str(benchmarks))
    flags = ["--tiny", "--no-peer", "--repeats", "3", "--micro-tokens", "1024"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *flags])
    with pytest.warns(UserWarning, match="rank exceeds"):
        runpy.run_path(str(benchmarks / "gpu.py"), run_name="__main__")
    printed = capsys.readouterr().out
    result = json.loads(printed[printed.index("{") :])
    assert result["device"] == emulated.CARD.name and result["precision"] == "fp16"
    assert 1.5 < result["slots per token, padded"] < 2.5  # 1.85 are BC5CDR's
    assert len(set(result["training"]["repeats"])) == 3 and result["training"]["peak_gib"] > 0


def test_what_other_programs_hold_is_not_planned_with(monkeypatch):
    """CUDA's own part, which the plan counts, is in use by then, too."""
    context = 300 * 2**20
    monkeypatch.setattr(emulated.CARD, "memory", 16 * 2**30)
    monkeypatch.setattr(emulated.CARD, "tenants", context)
    assert capacity_of(torch.device("cuda", 0)) == 16 * 2**30
    monkeypatch.setattr(emulated.CARD, "tenants", context + 6 * 2**30)
    assert capacity_of(torch.device("cuda", 0)) == pytest.approx(10 * 2**30, rel=0.01)


@pytest.mark.parametrize("jobs", [1, 3])
def test_jobs_share_what_is_free_of_a_gpu(jobs, monkeypatch):
    card, size = torch.device("cuda", 0), 16 * 2**30
    monkeypatch.setattr(emulated.CARD, "memory", size)
    monkeypatch.setattr(emulated.CARD, "tenants", 4 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    of_each = shares(jobs)
    assert of_each == [of_each[0]] * jobs and of_each[0][0] == 0
    try:
        torch.cuda.set_per_process_memory_fraction(of_each[0][1], card)
        assert capacity_of(card) == pytest.approx(0.75 * size / jobs + (jobs == 1) * CONTEXT_BYTES, rel=1e-4)
        assert free_memory(card) == pytest.approx(0.75 * size / jobs - (jobs > 1) * CONTEXT_BYTES, rel=1e-4)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, card)
    with pytest.raises(UsageError, match="--jobs 99: what is free of a GPU's memory"):
        check_jobs(99, World(device=card))
