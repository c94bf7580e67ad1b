"""Every Python snippet of README.md and docs/ runs: those of one file in order, in one namespace."""

import re
import runpy
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
FILES = [path for path in (*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").glob("*.md"))) if path.is_file()]
SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A working directory that looks like the root of the project, but takes what a snippet writes."""
    for entry in ROOT.iterdir():
        if entry.name != "runs" and not entry.name.startswith("."):
            (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    grad = torch.is_grad_enabled()
    yield
    torch.set_grad_enabled(grad)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_snippets_run(path, outside):
    text = path.read_text(encoding="utf-8")
    snippets = list(SNIPPET.finditer(text))
    if "weights/tiny" in "".join(snippet[1] for snippet in snippets) and not (ROOT / "weights/tiny").is_dir():
        pytest.skip("weights/tiny is not there")
    namespace = {"__name__": "__main__"}
    for snippet in snippets:
        above = "\n" * text[: snippet.start(1)].count("\n")  # so that a traceback gives the line of the document
        exec(compile(above + snippet[1], path, "exec"), namespace)


def test_the_tour_has_snippets():
    assert len(SNIPPET.findall((ROOT / "docs/internals.md").read_text(encoding="utf-8"))) >= 6


def test_the_reproduction_is_what_its_script_makes_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = runpy.run_path(str(ROOT / "benchmarks/reproduction.py"))
    kept = module["Kept"].read(ROOT / "docs/results/cells")
    assert module["document"](kept, module["summaries"](kept)) == (ROOT / "docs/reproduction.md").read_text(
        encoding="utf-8"
    )
