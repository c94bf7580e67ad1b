"""The script of the day on which a GPU is at hand: its cheap parts run dry, and what it makes of figures."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script():
    torch.set_num_threads(1)  # tiny matrices are slower on several
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("gpu_day")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.mark.slow
def test_cheap_parts_run_dry_and_add_up(script, tmp_path, capsys):
    out = tmp_path / "day.json"
    for part in ("headline", "training", "overflow"):
        script.main(["run", part, "--dry", "--out", str(out)])
    found = json.loads(out.read_text())
    assert list(found) == ["headline", "training", "overflow"] and all(part["dry"] for part in found.values())
    assert found["overflow"]["precision"] == "fp16"
    speeds = {one["name"]: one["measured"] for one in found["training"]["figures"]}
    assert len(speeds) == 5 and min(speeds.values()) > 0 and "attention padded, 200 tokens: speed" in speeds
    skipped, loss = found["overflow"]["figures"]
    assert 1 <= skipped["measured"] < 20 and loss["measured"] < 1
    assert "| steps skipped at first |" in capsys.readouterr().out
    with pytest.raises(script.UsageError, match="dry run"):
        script.main(["render", "--out", str(out)])


def test_figures_meet_their_targets(script):
    figure = script.Figure
    assert figure("a", 0.6, "%", least=0.57).met and not figure("a", 0.5, "%", least=0.57).met
    assert figure("a", 1.0, "", least=0.9, most=1.1).met and not figure("a", 1.2, "", least=0.9, most=1.1).met
    assert figure("a", 1.0, "", most=0.0).met is False and figure("a", 1.0, "").met is None


def test_the_page_takes_figures_between_its_marks(script, tmp_path, monkeypatch):
    figure = {"name": "MFU", "measured": 0.581, "unit": "%", "planned": 0.6, "least": 0.57, "most": None}
    part = {"about": "Speed.", "device": "H100", "precision": "bf16", "torch": "2.13", "date": "d", "dry": False}
    out, page = tmp_path / "day.json", tmp_path / "hardware.md"
    out.write_text(json.dumps({"training": part | {"figures": [figure]}}))
    text = (ROOT / "docs/hardware.md").read_text(encoding="utf-8")
    page.write_text(text)
    monkeypatch.setattr(script, "PAGE", page)
    script.main(["render", "--out", str(out)])
    written = page.read_text()
    assert "| MFU | 58.1% | 60.0% | at least 57.0% | yes |" in written
    before, after = (text.partition(mark) for mark in script.MARKS)
    assert written.startswith(before[0]) and written.endswith(after[2])
    script.main(["render", "--out", str(out)])
    assert page.read_text() == written
    page.write_text("no marks")
    with pytest.raises(script.UsageError, match="no marks"):
        script.main(["render", "--out", str(out)])
    with pytest.raises(script.UsageError, match="no figures"):
        script.main(["render", "--out", str(tmp_path / "nothing.json")])


def test_a_part_names_the_precision_that_it_ran_in(script, tmp_path, monkeypatch):
    def nothing(day):
        """Nothing."""
        return []

    out, own = tmp_path / "day.json", script.Day.today(True).precision
    for part in ("memory", "headline"):
        monkeypatch.setitem(script.PARTS, part, nothing)
        script.main(["run", part, "--dry", "--out", str(out)])
    found = json.loads(out.read_text())
    assert (
        found["headline"]["precision"] == own
        and found["memory"]["precision"] == f"fp16 in four processes, {own} in one"
    )


def test_parts_are_listed_in_order_and_others_refused(script, capsys):
    script.main(["parts"])
    assert capsys.readouterr().out.split() == [*script.PARTS] and next(iter(script.PARTS)) == "tests"
    with pytest.raises(SystemExit):
        script.main(["run", "speed", "--dry"])
    assert "no part speed" in capsys.readouterr().err


def test_the_shell_script_parses():
    assert subprocess.run(["bash", "-n", str(ROOT / "benchmarks/gpu_day.sh")]).returncode == 0
