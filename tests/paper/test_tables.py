"""`tables`: the paper's experiments as cells that are run once, kept, and put beside the paper's figures."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

import eval as evaluation
from llamalora.__main__ import main as command
from llamalora.cli import run_command
from llamalora.distributed.world import World
from llamalora.lora.inject import count_parameters, make_trainable
from llamalora.model.checkpoint import read_config, skeleton
from llamalora.model.config import LlamaConfig
from llamalora.paper import cells, counted, figures, findings, runner, tables
from llamalora.paper.experiments import (
    BASE,
    VARIED,
    Claim,
    Row,
    Table,
    ablation,
    methods,
    recipe,
    table1,
    table2,
    table3,
    table4,
)
from llamalora.paper.printed import RANKS, TABLE1, TABLE2, TABLE3, TABLE4, TABLE6, TARGETS
from llamalora.paper.runner import Runner, rate
from llamalora.runs.settings import Settings
from llamalora.training.step import DivergedError

pytestmark = pytest.mark.slow

HOME = Path(evaluation.__file__).parent
SHORT = ("--model", "weights/tiny", "--data", "data/sample", "--limit-train", "16", "--limit-eval", "2",
         "--epochs", "1", "--precision", "fp32")  # fmt: skip
BASE_SETTINGS = Settings(model=str(HOME / "weights/tiny"), data=str(HOME / "data/sample"), eval_limit=2)


def run_tables(*which, out, flags=SHORT):
    run_command(command, ["tables", *which, *flags, "--out", str(out)])
    return json.loads((out / "tables.json").read_text())


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Table 2, run once; the tests about it change nothing in its folder."""
    out = tmp_path_factory.mktemp("tables")
    return out, run_tables("2", out=out)


@pytest.fixture
def trained(monkeypatch):
    """The settings of every run that is started; none is trained."""
    seen = []

    def train(settings, world, resume=False):
        seen.append(settings)
        raise DivergedError("not today")

    monkeypatch.setattr(cells, "train", train)
    return seen


# ---- definitions ----


def every_table():
    config = read_config(HOME / "weights/tiny")
    labels = ("Disease", "Chemical")
    return [
        table1(labels, 2, "chat"), table2(labels), table3(RANKS),
        table4(), ablation(config, 8), methods(),
        recipe({8: [1e-3]}, [1e-4]),
    ]  # fmt: skip


def test_the_rows_hold_every_figure_of_the_paper():
    one, two, three, four = every_table()[:4]
    assert [(row.paper, row.deviation) for row in one.rows if row.paper] == [entry[2:] for entry in TABLE1]
    assert {row.title: (row.paper, row.deviation) for row in two.rows} == TABLE2
    assert [row.paper for row in three.rows] == [f1 for targets in TARGETS for f1 in TABLE3[targets]]
    assert [row.paper for row in four.rows] == [entry[2] for entry in TABLE4]


@pytest.mark.parametrize("table", every_table(), ids=lambda table: table.name)
def test_rows_are_distinct_changes_of_the_base(table):
    titles = [row.title for row in table.rows]
    assert len(set(titles)) == len(titles) and all(len(title) == len(table.head) for title in titles)
    runs = [run for row in table.rows for run in row.runs]
    assert len({json.dumps(run, sort_keys=True) for run in runs}) == len(runs)
    for run in runs:
        assert run.keys() <= set(VARIED) | {"model", "lr"}
    for claim in table.claims:
        assert {claim.a, claim.b} <= set(titles) and claim.a != claim.b


def test_one_rank_is_compared_with_no_other():
    assert table3((8,)).claims == () and len(table3((8, 2)).claims) == 4


def test_full_fine_tuning_differs_from_lora_in_what_is_trained(tmp_path):
    runner = Runner(BASE_SETTINGS, (0,), tmp_path, World())
    lora, full = (asdict(runner.cells(row, 0)[0].settings) for row in table4().rows[:2])
    assert {name for name in lora if lora[name] != full[name]} == {"method", "lr", "out"}
    assert full["lr"] == pytest.approx(lora["lr"] / 10, rel=0.01)


def test_the_ablation_spends_the_same_parameters_everywhere():
    table = ablation(LlamaConfig(), 8)
    runs = [{"targets": "all", **row.runs[0]} for row in table.rows]
    sizes = [make_trainable(skeleton(LlamaConfig()), **one) for one in runs]
    sizes = [count_parameters(model)["trainable"] for model in sizes]
    assert len(sizes) == 19 and all(size == pytest.approx(20_566_016, rel=0.03) for size in sizes)


def test_a_cell_is_known_by_what_decides_its_result(tmp_path):
    def name(**changes):
        return cells.Cell.of(BASE_SETTINGS, {**BASE, **changes}, tmp_path, World()).path.name

    assert name() == name(micro_tokens=64) == name(keep=7)
    names = {name(), name(seed=1), name(rank=9), name(lr=0.1), name(eval_limit=3), name(batch_tokens=77)}
    assert len(names) == 6
    # full fine-tuning has no rank
    assert name(method="full", rank=8) == name(method="full", rank=128) != name(method="full", seed=1)
    # the same data at another place is the same
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in (HOME / "data/sample").glob("*.txt"):
        (copy / path.name).write_bytes(path.read_bytes())
    assert name(data=str(copy)) == name()
    (copy / "dev.PubTator.txt").write_text("1|t|Nothing here\n")
    assert name(data=str(copy)) != name()


# ---- runs ----


def test_a_joined_row_is_what_eval_says_of_both_runs(done, capsys):
    out, result = done
    rows = {tuple(row["title"]): row for row in result["tables"]["2"]["rows"]}
    runs = [str(next(out.glob(f"runs/tagging-{label}-*"))) for label in ("Disease", "Chemical")]
    flags = ["--run", runs[0], "--run", runs[1], "--limit", "2", "--precision", "fp32", "--json"]
    run_command(evaluation.main, flags)
    scored = json.loads(capsys.readouterr().out)
    joined = rows["tagging", "per-label"]
    assert joined["f1"] == scored["micro"]["f1"]
    assert joined["by_document"]["exact"] == list(scored["by_document"]["exact"].values())
    alone = json.loads(next(out.glob("runs/extraction-all-*/eval-dev.json")).read_text())
    assert rows["extraction", "all"]["f1"] == alone["micro"]["f1"]
    assert joined["trainable"] == 2 * rows["tagging", "all"]["trainable"]


def test_a_joined_result_of_many_labels_has_a_short_name(done, trained, monkeypatch, tmp_path):
    """A file system takes 255 bytes."""
    shutil.copytree(done[0], tmp_path / "out", symlinks=True)
    for path in (tmp_path / "out/cells").glob("*+*.json"):
        path.unlink()
    monkeypatch.setattr(runner, "LONGEST", 50)
    assert run_tables("2", out=tmp_path / "out")["tables"]["2"]["rows"] == done[1]["tables"]["2"]["rows"]
    joined = sorted(path.name for path in (tmp_path / "out/cells").glob("*+*.json"))
    assert len(joined) == 2 and all(
        re.fullmatch(r"[\w-]+-s0-[0-9a-f]{10}\+1-[0-9a-f]{10}\.json", name) for name in joined
    )
    assert trained == []


def test_what_is_written(done):
    out, result = done
    text = (out / "tables.md").read_text()
    assert "88.6 ± 0.6" in text and text.count("| tagging |") == 2
    for name in ("Tagging beats extraction (all labels at once)", "One model for all labels"):
        assert name in text
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(result["curves"]) == 6 and all(curve["loss"] for curve in result["curves"].values())
    rows = {tuple(row) for curve in result["curves"].values() for row in curve["rows"]}
    names = ("Disease", "Chemical")
    labels = {("2", f"{form}, per-label: {label}") for form in ("tagging", "extraction") for label in names}
    assert rows == labels | {("2", "tagging, all"), ("2", "extraction, all")}
    assert result["settings"]["model"] == "tiny" and str(HOME) not in json.dumps(result)


def test_a_repeated_table_runs_nothing(done, trained):
    out, before = done
    assert run_tables("2", out=out) == before
    assert trained == []


def test_a_changed_option_runs_what_it_touches(done, trained, tmp_path):
    out = tmp_path / "out"
    (out / "cells").mkdir(parents=True)
    for path in done[0].glob("cells/*.json"):
        (out / "cells" / path.name).write_bytes(path.read_bytes())
    (out / "runs").symlink_to(done[0] / "runs")
    table = run_tables("2", out=out, flags=(*SHORT, "--seeds", "0,1"))["tables"]["2"]
    assert len(trained) == 6 and {settings.seed for settings in trained} == {1}
    assert all("not today" in row["error"] for row in table["rows"])
    trained.clear()
    run_tables("3", out=out, flags=(*SHORT, "--ranks", "8,9"))
    assert {(settings.targets, settings.rank) for settings in trained} == {
        (targets, rank) for targets in TARGETS for rank in (8, 9) if (targets, rank) != ("all", 8)
    }


def test_a_failed_cell_is_shown_and_tried_again(done, monkeypatch, tmp_path, capsys):
    out = tmp_path / "out"
    right, calls = cells.train, []

    def train(settings, world, resume=False):
        calls.append(settings.method)
        if settings.method == "full" and len(calls) < 3:
            raise DivergedError("the loss is gone")
        return right(settings, world, resume)

    monkeypatch.setattr(cells, "train", train)
    rows = run_tables("4", out=out)["tables"]["4"]["rows"]
    assert "f1" in rows[0] and rows[1]["error"] == "DivergedError: the loss is gone"
    assert "| failed |" in (out / "tables.md").read_text() and "not decided" in (out / "tables.md").read_text()
    rows = run_tables("4", out=out)["tables"]["4"]["rows"]
    assert calls == ["lora", "full", "full"] and "f1" in rows[1]
    # the test split, with the best models; and predictions that were made elsewhere
    gold = HOME / "data/sample/test.PubTator.txt"
    rows = run_tables("4", out=out, flags=(*SHORT, "--predictions", f"gold={gold}"))["tables"]["4"]["rows"]
    assert rows[-1]["title"] == ["gold"] and rows[-1]["f1"] == 1.0
    assert json.loads(next(out.glob("cells/*full*.test.json")).read_text())["sentences"] == 2
    assert not list(out.glob("runs/*/eval-test.json"))  # where a run keeps nothing that is scored on a part of it


def test_jobs_side_by_side_find_the_same(done, tmp_path, monkeypatch, capsys):
    """Two cells are run again, by two processes; a third fails, and spoils nothing else."""
    monkeypatch.setattr(figures, "save", lambda *_: None)
    out, again = tmp_path / "out", ("tagging-all-", "extraction-all-", "extraction-Disease-")
    for name in ("cells", "runs"):
        (out / name).mkdir(parents=True)
        for path in (done[0] / name).iterdir():
            if not path.name.startswith(again):
                (out / name / path.name).symlink_to(path)
            elif path.is_dir() and path.name.startswith(again[-1]):
                (out / name / path.name / "something else").mkdir(parents=True)

    def timeless(result):
        """A result without what differs from one call to the next."""
        left = {name: value for name, value in result.items() if name not in ("seconds", "speed", "made_by")}
        return {name: timeless(value) if isinstance(value, dict) else value for name, value in left.items()}

    rows = run_tables("2", out=out, flags=(*SHORT, "--jobs", "2"))["tables"]["2"]["rows"]
    assert "is not an empty folder" in rows[2]["error"]
    whole = done[1]["tables"]["2"]["rows"]
    assert [timeless(rows[place]) for place in (0, 1, 3)] == [timeless(whole[place]) for place in (0, 1, 3)]
    logs = sorted(out.glob("cells/*.log"))
    assert len(logs) == 3 and all(log.name.startswith(again) for log in logs)
    for log in logs:
        kept, before = (json.loads((folder / "cells" / f"{log.stem}.json").read_text()) for folder in (out, done[0]))
        assert "error" in kept or timeless(kept) == timeless(before) and "development split" in log.read_text()
    said = capsys.readouterr().out
    assert "2 at once, each on " in said and "cell 3 of 3: " in said


def test_after_ctrl_c_no_finished_cell_is_repeated(done, tmp_path):
    out = tmp_path / "out"
    arguments = [sys.executable, "-m", "llamalora", "tables", "2", *SHORT, "--out", str(out)]
    process = subprocess.Popen(arguments, cwd=HOME, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    deadline = time.monotonic() + 120
    while not (finished := list(out.glob("cells/*.json"))):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command goes on from there" in output, output
    before = {path: path.stat().st_mtime_ns for path in finished}
    again = run_tables("2", out=out)
    assert {path: path.stat().st_mtime_ns for path in finished} == before
    # and all is as if it had not been interrupted
    for result in (again, whole := json.loads((done[0] / "tables.json").read_text())):
        for item in (*result["tables"]["2"]["rows"], *result["curves"].values()):
            del item["seconds"]
    assert again["tables"] == whole["tables"] and again["curves"] == whole["curves"]


def test_two_processes_fill_a_table_together(tmp_path):
    out = tmp_path / "out"
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint",
                "localhost:0")  # fmt: skip
    arguments = [sys.executable, *launcher, "-m", "llamalora", "tables", "4", *SHORT, "--out", str(out)]
    done = subprocess.run(arguments, cwd=HOME, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, timeout=300,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    assert done.returncode == 0, done.stdout
    result = json.loads((out / "tables.json").read_text())
    assert result["made_by"]["machine"]["processes"] == 2
    assert ["f1" in row for row in result["tables"]["4"]["rows"]] == [True, True, False]


def test_the_recipe_chooses_the_learning_rates_of_the_other_tables(monkeypatch, tmp_path):
    """For each rank that with the best F1; a rank without trials takes that of the nearest."""
    seen = []

    def train(settings, world, resume=False):
        seen.append((settings.method, settings.rank, settings.lr, settings.seed))
        folder = Path(settings.out)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text('{"model": {}, "parameters": {"trainable": 7}}')
        (folder / "metrics.jsonl").write_text('{"loss": 1.0, "seconds": 1.0}\n')
        best = {2: 0.04, 32: 0.01}[settings.rank] if settings.method == "lora" else 0.002
        by_document = dict.fromkeys(findings.CONVENTIONS, {"1": [1, 0, 1]})
        f1 = {"micro": {"f1": 1 - abs(settings.lr - best)}}
        return f1 | {"by_document": by_document, "health": {"exact_copy": 1}, "secondary": {}, "speed": {"seconds": 1}}

    monkeypatch.setattr(cells, "train", train)
    rates = ("--rates", "2=0.01,0.02,0.04", "--rates", "32=0.01,0.02", "--rates", "full=0.001,0.002,0.003")
    result = run_tables("recipe", out=tmp_path, flags=(*SHORT, "--seeds", "0,1", *rates))
    assert len(seen) == 8 and {seed for *_, seed in seen} == {0}
    assert result["settings"]["rates"] == {"2": 0.04, "32": 0.01} and result["settings"]["lr_full"] == 0.002
    assert [rate(rank, {2: 0.04, 32: 0.01}, None) for rank in (1, 2, 7, 8, 9, 128)] == [0.04] * 4 + [0.01] * 2
    assert rate(8, {}, 0.5) == 0.5
    table, runner = methods(), Runner(BASE_SETTINGS, (0,), tmp_path, World(), 0.002, {2: 0.04, 32: 0.01})
    used = {row.name: runner.cells(row, 0)[0].settings.lr for row in table.rows}
    assert used["DoRA"] == 0.04 and used["full fine-tuning of the same layers"] == 0.002


def test_a_kept_cell_says_what_it_was_made_by(done):
    out, result = done
    for path in out.glob("cells/*.json"):
        kept = json.loads(path.read_text())
        assert kept["made_by"] == result["made_by"] and kept["made_by"]["machine"]["processes"] == 1
        assert len(kept["runs"]) == path.name.count("+") + 1 and str(HOME) not in json.dumps(kept)
    assert len(list(out.glob("cells/*+*.json"))) == 2  # the systems of one model per label


# ---- tables without runs ----


def test_tables_5_to_8_need_no_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("llamalora.runs.resolve.read_config", None)  # a call would be a traceback
    run_command(command, ["tables", "5", "6", "7", "8", "--data", str(HOME / "data/sample"), "--out", str(tmp_path)])
    text, shown = (tmp_path / "tables.md").read_text(), capsys.readouterr().out
    assert all(len(line) <= 80 for line in shown.splitlines() if str(tmp_path) not in line)
    text, shown = (" ".join(form.replace("```", "").replace("## ", "").split()) for form in (text, shown))
    assert text in shown and not (tmp_path / "cells").exists()
    for words in ("(Table 5: 4,182)", "it differs for q,k at r=64 and q,k,v at r=64", "329,056,256 ✓"):
        assert words in text


def test_what_cannot_be_written_has_been_shown(tmp_path, capsys, monkeypatch):
    def refuse(path, text):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(tables, "replace_file", refuse)
    with pytest.raises(SystemExit):
        run_command(command, ["tables", "8", "--out", str(tmp_path)])
    shown = capsys.readouterr()
    assert "329,056,256" in shown.out and "tables.md" in shown.err


def test_the_formats_of_table_6_come_out_exactly():
    lines = counted.formats()
    assert len(lines) == 6 and all(line.endswith(" ✓") for line in lines)
    for line, answer in zip(lines, TABLE6.values(), strict=True):
        assert answer in line


def test_bad_flags_are_refused(capsys, tmp_path):
    for flags, words in {
        ("9",): "choose from 1, 2, 3",
        ("3", "--seeds", "a"): "--seeds a",
        ("3", "--ranks", "0"): "--ranks 0",
        ("4", "--predictions", "x"): "NAME=FILE",
        ("1", "--limit-eval", "0"): "--limit-eval is 0",
        ("1", "--jobs", "0"): "--jobs is 0",
        ("5", "--jobs", "2"): "--jobs: no effect on tables that train nothing",
        ("1", "--model", "nowhere"): "no such model folder",
        ("1", "--demonstrations", "9999"): "--demonstrations: the training split has no more than 417 sentences",
        ("4", "--lr-full", "nan"): "--lr-full is nan",
        ("recipe", "--rates", "8=nan"): "--rates 8=nan: must be positive",
        ("recipe", "--rates", "8=x"): "--rates 8=x: must be a comma list of numbers",
        ("recipe", "--rates", "1e-3"): "--rates 1e-3: write RANK=LR,LR,...",
        ("recipe", "--rates", "full=1e-3"): "--rates: name a rank, too",
        ("recipe", "--rates", "\u00b2=1e-3"): "write RANK=LR,LR,...",
        ("recipe", "--rates", "8=1e-3,16=1e-3"): "one --rates for each",
        ("recipe", "--rates", "8=1e-3", "--rates", "08=2e-3"): "--rates 08=2e-3: names 8 again",
        ("recipe", "--rates", "8=20"): "--rates 8=20: a learning rate must be below 10",
        ("1", "--out", str(HOME / "README.md")): "is a file",
        ("5", "--seeds", "1"): "--seeds: no effect on tables that train nothing",
        ("7", "--data", "data/sample"): "--data: no effect",
        ("3", "--rank", "2"): "--rank: no such flag; did you mean --ranks?",
        ("6", "8", "--epochs", "1"): "--epochs: no effect on tables that train nothing",
        ("2", "--chat-model", "weights/tiny", "--demonstrations", "2"): "--chat-model, --demonstrations: no effect",
        ("1", "--ranks", "2"): "--ranks: no effect",
        ("1", "--rates", "1e-3"): "--rates: no effect",
        ("4", "recipe", "--lr-full", "1e-3"): "--lr-full: no effect beside recipe",
        ("recipe", "5", "--lr", "1e-3"): "--lr: no effect beside recipe",
        ("1", "--predictions", "x=README.md"): "--predictions: no effect",
    }.items():
        with pytest.raises(SystemExit) as stop:
            run_command(command, ["tables", "--out", str(tmp_path), *flags])
        assert stop.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "cells").exists()


# ---- findings ----


@pytest.mark.parametrize(
    "equal, low, high, expected",
    [
        (False, 0.001, 0.05, "holds"), (False, -0.05, -0.001, "does not hold"), (False, -0.01, 0.01, "not decided"),
        (True, -0.009, 0.009, "holds"), (True, 0.011, 0.05, "does not hold"), (True, -0.05, -0.011, "does not hold"),
        (True, -0.02, 0.001, "not decided"), (True, 0.002, 0.02, "not decided"),
    ],
)  # fmt: skip
def test_verdicts(equal, low, high, expected):
    assert findings.verdict(equal, low, high) == expected


@pytest.mark.parametrize("equal, found, times", [
    (False, (0.01, -0.01, 0.03), 4),
    (False, (-0.01, -0.03, 0.01), 4),
    (True, (0.0, -0.02, 0.02), 4),
    (True, (0.005, -0.005, 0.015), 4),  # the interval has to keep below the margin
    (True, (-0.03, -0.07, 0.01), 4),  # or beyond it
    (True, (0.01, 0.0, 0.02), math.inf),  # at the margin none decides
])  # fmt: skip
def test_documents_that_would_decide_a_claim(equal, found, times):
    assert findings.to_decide(equal, *found) == pytest.approx(times)


def result(*counts):
    """A result about documents with these counts of true positives, false positives and false negatives."""
    by_document = {str(number): list(three) for number, three in enumerate(counts)}
    tp, fp, fn = (sum(column) for column in zip(*counts, strict=True))
    by_document = dict.fromkeys(findings.CONVENTIONS, by_document)
    return {"micro": {"f1": 2 * tp / (2 * tp + fp + fn)}, "by_document": by_document}


def test_seeds_are_averaged_and_their_counts_pooled():
    rows = (Row(("a",), ({},), 80.0, 0.5), Row(("b",), ({},)), Row(("cited",), (), 90.0))
    table = Table("x", "", ("what",), rows, (Claim("a is better", ("a",), ("b",)),))
    good = [result((9, 1, 1), (8, 1, 0)), result((10, 0, 0), (7, 2, 1))]
    bad = [result((5, 5, 5), (4, 4, 4)), result((4, 5, 6), (5, 4, 3))]
    summary = findings.summarise(table, {("a",): good, ("b",): bad, ("cited",): []})
    a, b, cited = summary["rows"]
    f1 = [one["micro"]["f1"] for one in good]
    assert a["f1"] == pytest.approx(sum(f1) / 2)
    assert a["deviation"] == pytest.approx(abs(f1[0] - f1[1]) / 2**0.5)  # of a sample of two
    assert a["by_document"]["exact"] == [[19, 1, 1], [15, 3, 1]]
    assert a["paper"] == 80.0 and "f1" not in cited
    judged = summary["claims"][0]["by"]["exact"]
    assert judged["verdict"] == "holds" and judged["low"] > 0
    failed = findings.summarise(table, {("a",): good, ("b",): [{"error": "gone"}], ("cited",): []})
    assert "not decided" in failed["claims"][0]["by"]["exact"]["verdict"]


def test_a_run_is_drawn_in_every_table_that_it_is_in(tmp_path, monkeypatch):
    panels = []
    figure = pytest.importorskip("matplotlib.figure").Figure
    monkeypatch.setattr(figure, "savefig", lambda figure, path: panels.extend(figure.axes))
    losses = {"one": [3.0, 2.0], "two": [2.0, 1.0], "again": [2.5, 1.0]}
    rows = {"one": [["3", "all, 128"], ["4", "LoRA"]], "two": [["4", "full"]], "again": [["4", "full"]]}
    curves = {name: {"loss": losses[name], "seconds": 1, "rows": rows[name]} for name in rows}
    figures.save_curves(curves, tmp_path / "curves.png")
    three, four = ([(list(line.get_ydata()), line.get_color(), line.get_linestyle()) for line in axes.lines]
                   for axes in panels)  # fmt: skip
    assert [y for y, *_ in three] == [losses["one"]] and [y for y, *_ in four] == list(losses.values())
    # a row's seeds look alike, and like nothing else
    assert four[1][1:] == four[2][1:] and four[0][1] != four[1][1] and four[0][2] != four[1][2]
    assert [text.get_text() for text in panels[1].get_legend().get_texts()] == ["LoRA", "full"]
    for axes in panels:
        minor = axes.yaxis.get_tick_params(which="minor")["length"]
        assert minor < axes.yaxis.get_tick_params(which="major")["length"]


def test_the_figure_of_table_3(tmp_path):
    rows = [
        {"title": [targets, rank], "f1": 0.5, "interval": {"low": 0.4, "high": 0.6}, "trainable": 10**number}
        for number, (targets, rank) in enumerate((t, r) for t in ("q", "all") for r in ("2", "8"))
    ]
    rows[0] = {"title": ["q", "2"], "error": "gone"}
    figures.save_grid({"rows": rows}, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert figures.smooth([1.0] * 5 + [3.0] * 5) == [1.0] * 5 + [3.0] * 5
    assert figures.smooth([float(n) for n in range(20)]) == [float(n) for n in range(20)]  # it does not lag
    assert figures.smooth([0.0] * 10 + [3.0] + [0.0] * 10)[8:13] == [0.0, 1.0, 1.0, 1.0, 0.0]
