"""A model and a corpus so small that a run of 20 steps takes a second, and the table of docs/reliability.md."""

import os
import shutil
import time
from collections import defaultdict
from datetime import date
from pathlib import Path

import pytest
import torch
from faulty import FLAGS, run
from helpers import tiny_model

from llamalora.model.checkpoint import save_model

WORDS = ("fever", "rash", "nausea", "cough", "coma")


def corpus_file(path: Path, count: int) -> None:
    """PubTator of one short sentence a document."""
    with path.open("w") as file:
        for number in range(count):
            word = WORDS[number % len(WORDS)]
            text = f"Dose {number}: {word}."
            start = text.index(word)
            file.write(f"{number}|t|{text}\n{number}\t{start}\t{start + len(word)}\t{word}\tDisease\t-1\n\n")


@pytest.fixture(scope="session")
def flags(tmp_path_factory, tiny_sentencepiece) -> tuple:
    """The flags of a run of 20 steps; only --out is missing."""
    home = tmp_path_factory.mktemp("home")
    save_model(tiny_model(vocab_size=400, max_position_embeddings=256), home / "model")
    shutil.copy(tiny_sentencepiece / "tokenizer.model", home / "model")
    (home / "data").mkdir()
    corpus_file(home / "data/train.PubTator.txt", 30)
    corpus_file(home / "data/dev.PubTator.txt", 2)
    return "--model", str(home / "model"), "--data", str(home / "data"), *FLAGS


@pytest.fixture(scope="session")
def whole(tmp_path_factory, flags) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    code, output = run(folder.with_name("log"), [*flags, "--out", folder])
    assert code == 0, output
    return folder


# ---- the table: each test's docstring is `what was tried | what came of it` ----

_OUTCOMES: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
_ROWS: dict[str, str] = {}
_STARTED = time.monotonic()
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def pytest_collection_modifyitems(items) -> None:
    if os.environ.get("RELIABILITY") and os.environ.get("PYTEST_XDIST_WORKER"):
        raise pytest.UsageError("RELIABILITY: leave out -n, for a worker would write a table of its own cases alone")
    for item in items:
        words = " ".join((getattr(item.obj, "__doc__", None) or "").split())
        if " | " in words:
            _ROWS[item.nodeid] = words


def pytest_runtest_logreport(report) -> None:
    if report.nodeid in _ROWS and (report.when == "call" or report.outcome != "passed"):
        _OUTCOMES[_ROWS[report.nodeid]][report.outcome] += 1


def pytest_sessionfinish(session) -> None:
    """With RELIABILITY=docs/reliability.md the table in that file is written anew from this run."""
    target = os.environ.get("RELIABILITY")
    if not target or not _OUTCOMES:
        return
    total = sum(sum(outcomes.values()) for outcomes in _OUTCOMES.values())
    lines = [
        f"{date.today()}, torch {torch.__version__}, {os.cpu_count()} cores: {total} cases in "
        f"{(time.monotonic() - _STARTED) / 60:.0f} minutes.\n",
        "| what was done | what must come of it | cases | passed |",
        "|---|---|---:|---:|",
    ]
    for words, outcomes in _OUTCOMES.items():
        passed, skipped = outcomes["passed"], outcomes["skipped"]
        note = f" ({skipped} skipped)" if skipped else ""
        lines.append(f"| {words} | {sum(outcomes.values())} | {passed}{note} |")
    path = Path(target)
    text = path.read_text(encoding="utf-8")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    path.write_text(before + "\n".join([BEGIN, *lines, after]), encoding="utf-8")
