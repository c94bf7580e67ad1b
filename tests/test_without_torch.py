"""torch takes seconds to load: what can be said, refused or done without it does not wait."""

import json
import os
import subprocess
import sys
from pathlib import Path

from llamalora.__main__ import MODULES
from llamalora.runs.settings import Settings

ROOT = Path(__file__).parents[1]
GOLD = "data/sample/test.PubTator.txt"

CALLS = """
import contextlib, io, json, sys
import llamalora
from llamalora.__main__ import main
from llamalora.cli import run_command

for call in json.load(sys.stdin):
    output = io.StringIO()
    code = 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            run_command(main, call)
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, output.getvalue()]))
    assert "torch" not in sys.modules, call
"""


def called(calls: list[list[str]]) -> list[tuple[int, str]]:
    """Exit code and output of each call, in one process, which none of them makes load torch."""
    done = subprocess.run([sys.executable, "-c", CALLS], input=json.dumps(calls), capture_output=True, text=True,
                          cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_help_and_unknown_flags():
    for name, (code, text) in zip(MODULES, called([[name, "--help"] for name in MODULES]), strict=True):
        assert code == 0 and f"llamalora {name}" in text, text
    for code, text in called([[name, "--no-such-flag"] for name in MODULES]):
        assert code == 2 and text.startswith("error: "), text


REFUSED = {
    "train --rank many": "--rank",
    "train --resume nowhere": "nowhere: no such run folder",
    "eval --run nowhere": "nowhere: no such run folder",
    "eval --model nowhere --data data/sample": "nowhere: no such model folder",
    "eval --model weights/tiny --data data/sample --split dev --batch 0": "--batch is 0",
    "eval --model weights/tiny --data nowhere": "nowhere: no such corpus folder",
    "predict --run nowhere README.md": "nowhere: no such run folder",
    "predict --adapter nowhere README.md": "nowhere: no such adapter folder",
    "predict --run nowhere nothing.txt": "nothing.txt: no such file",
    "merge --run nowhere --out new": "nowhere: no such run folder",
    "merge --adapter nowhere --model weights/tiny --out new": "nowhere: no such adapter folder",
    "merge --adapter tests --model nowhere --out new": "nowhere: no such model folder",
    "merge --adapter tests --model weights/tiny --out tests": "--out tests: exists",
    "fetch bc5cdr --from nowhere": "--from nowhere: no such file or folder",
    "fetch bc5cdr --from tests --out new": "has no CDR_TrainingSet",
    "stats --data nowhere": "nowhere: no such corpus folder",
    "convert nowhere new --to brat": "nowhere: no such file or folder",
    "audit --model nowhere": "nowhere: no such model folder",
    "audit --rank 0": "--rank is 0",
    "audit --memory --gpu-memory 16": "--gpu-memory 16: write 16GB",
    "score nowhere nowhere": "nowhere: no such file or folder",
    "compare nowhere nowhere": "nowhere: no such run folder",
    "plot nowhere": "nowhere: no such run folder",
    "inspect nowhere": "nowhere: no such adapter folder",
    "inspect tests --against nowhere": "adapter_config.json: no such file",
    "verify nowhere": "nowhere: no such run folder",
    "tables 9": "no table 9",
    "tables 1 --seeds x": "--seeds x: must be a comma list",
}


def test_bad_input():
    for (call, message), (code, text) in zip(REFUSED.items(), called([c.split() for c in REFUSED]), strict=True):
        assert code == 2 and message in text, (call, text)


def test_work_on_text(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    settings = Settings(model="weights/tiny", data="data/sample", out=str(run), lr=1e-3, batch_tokens=1)
    task = {"format": "tagging", "labels": ["Disease"], "per_label": True}
    (run / "config.json").write_text(json.dumps({"settings": vars(settings), "task": task}))
    (run / "metrics.jsonl").write_text("")
    results = called([
        ["stats", "--data", "data/sample"],
        ["convert", GOLD, str(tmp_path / "gold.jsonl"), "--to", "jsonl"],
        ["score", GOLD, str(tmp_path / "gold.jsonl")],
        ["compare", "--gold", GOLD, GOLD, str(tmp_path / "gold.jsonl"), "--html", str(tmp_path / "page.html")],
        ["verify", str(run)],
    ])  # fmt: skip
    for code, text in results:
        assert code == 0, text
    assert "100.00" in results[2][1] and "nothing has been saved yet" in results[4][1]
