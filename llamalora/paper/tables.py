"""`python -m llamalora tables`: the paper's tables again, ours beside the paper's, as Markdown, JSON and PNG."""

import argparse
import math
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from datetime import date
from pathlib import Path

import torch

from ..cli import Parser, UsageError, add_flags, check_least, refuse_idle
from ..corpus.documents import Span, all_sentences, labels_of
from ..corpus.read import find_splits, read_documents, read_splits
from ..distributed.world import World, join_world
from ..files import replace_file, write_json
from ..mistakes import is_run
from ..model.checkpoint import read_config
from ..model.config import LLAMA_2
from ..runs.settings import ResolvedSettings, Settings, resolve
from ..task.definition import Task
from ..task.prompt import render_answer
from ..task.score import document_counts, score, score_files, span_keys
from . import figures, findings, stats
from .cells import Runner
from .costs import show_table7, show_table8, table7, table8
from .experiments import VARIED, Row, Table, ablation, methods, recipe, table1, table2, table3, table4
from .printed import RANKS, TABLE6, TABLE6_INPUT, TABLE6_MENTIONS

TRAINED = ("1", "2", "3", "4", "recipe", "ablation", "methods")  # need runs; the others need none
COUNTED = ("5", "6", "7", "8")
CHOICES = (*TRAINED[:4], *COUNTED, "all", *TRAINED[4:])


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m llamalora tables", description=__doc__)
    parser.add_argument("which", nargs="+", metavar="TABLE", help=f"any of {', '.join(CHOICES)} (all: 1 to 8)")
    parser.add_argument("--seeds", default="0", help="each row is run with each seed of this comma list (default: 0)")
    parser.add_argument("--limit-eval", type=int, help="score on the first N sentences of the split")
    parser.add_argument("--chat-model", metavar="FOLDER", help="a second model for Table 1")
    parser.add_argument("--demonstrations", type=int, default=2, help="in the prompt of Table 1 (default: 2)")
    parser.add_argument("--ranks", default=",".join(map(str, RANKS)), help="of Table 3 (default: the paper's)")
    parser.add_argument("--lr-full", type=float, help="peak learning rate of full fine-tuning (default: a tenth)")
    parser.add_argument("--rates", default="5e-4,1e-3,2e-3", help="for `recipe` (default: %(default)s)")
    parser.add_argument(
        "--predictions", action="append", default=[], metavar="NAME=FILE", help="PubTator, a further row of Table 4"
    )
    parser.add_argument("--out", default="runs/tables", metavar="FOLDER", help="(default: runs/tables)")
    # steps of so many tokens would give the formats, which differ in length, different numbers of steps
    own = (*VARIED, "eval_limit", "batch_tokens")
    common = [field.name for field in fields(Settings) if field.name not in own]
    add_flags(parser.add_argument_group("of every run, as in train.py"), Settings, common)
    parser.set_defaults(batch_sentences=10)
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.which if name not in CHOICES]
    if unknown:
        raise UsageError(f"no table {', '.join(unknown)}; choose from {', '.join(CHOICES)}")
    which = [name for name in CHOICES if name in arguments.which or "all" in arguments.which and name.isdigit()]
    refuse_idle(arguments, idle_flags(set(which), common))
    check_least(arguments, limit_eval=1, demonstrations=0)
    seeds, rate = numbers(arguments.seeds, "seeds", int), arguments.lr_full
    if rate is not None and not 0 < rate < 10:
        raise UsageError(f"--lr-full is {rate}; it must be above 0 (and below 10)")
    if (out := Path(arguments.out)).is_file() or is_run(out):
        raise UsageError(f"--out {out}: is {'a file' if out.is_file() else 'a run'}; choose a folder of its own")
    base = Settings(eval_limit=arguments.limit_eval, **{name: getattr(arguments, name) for name in common})
    predictions = {}
    for item in arguments.predictions:
        name, _, file = item.partition("=")
        if not name or not Path(file).is_file():
            raise UsageError(f"--predictions {item}: write NAME=FILE, with a PubTator file that is there")
        predictions[name] = Path(file)
    with join_world(base.timeout) as world:
        places = resolve(base, world.device)[0]
        base = replace(base, model=places.model, data=places.data)
        sections = [counted(name, places.data) for name in which if name in COUNTED]
        if any(name in TRAINED for name in which):
            runner = Runner(base, seeds, out, world, rate)
            chosen = [define(name, arguments, places) for name in which if name in TRAINED]
            missing = {"train", "dev", *(table.split for table in chosen)} - find_splits(places.data).keys()
            if missing:
                raise UsageError(f"--data {places.data}: these tables need a split {', '.join(sorted(missing))}, too")
            runner.run(chosen)
            summaries = [summarise(table, runner, predictions) for table in chosen]
            sections += [markdown(summary) for summary in summaries]
            if world.is_main:
                keep(summaries, runner, chosen, out)
        if world.is_main:
            text = "\n\n".join(sections)
            out.mkdir(parents=True, exist_ok=True)
            replace_file(out / "tables.md", text + "\n")
            print(f"\n{text}\n\nwritten to {out / 'tables.md'}")


def idle_flags(which: set[str], common: Iterable[str]) -> dict[str, object]:
    """The rules of `refuse_idle` for these tables.

    Args:
        common: the settings of every run.
    """
    trained = which & set(TRAINED)
    return {
        " ".join({"seeds", "limit_eval", *common} - {"data"}): not trained and "on tables that train nothing",
        "data": not trained | which & {"5"} and "on tables without a corpus",
        "chat_model demonstrations": "1" not in which and "without table 1",
        "ranks": "3" not in which and "without table 3",
        "predictions": "4" not in which and "without table 4",
        "rates": "recipe" not in which and "without recipe",
        "lr": trained == {"recipe"} and "on recipe, which tries --rates",
        "lr_full": not which & {"4", "methods"} and "without table 4 or methods",
    }


def numbers(text: str, flag: str, kind: type) -> tuple:
    """A comma list from the command line."""
    try:
        found = tuple(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        raise UsageError(f"--{flag} {text}: must be a comma list of numbers") from None
    least = 0 if flag == "seeds" else 1 if kind is int else math.ulp(0.0)
    if not all(least <= value < math.inf for value in found):
        raise UsageError(f"--{flag} {text}: must be positive")
    return found


def define(name: str, arguments: argparse.Namespace, base: ResolvedSettings) -> Table:
    if name in ("1", "2"):
        splits = read_splits(base.data)
        labels = labels_of(document for documents in splits.values() for document in documents)
        if not labels:
            raise UsageError(f"--data {base.data}: the corpus holds no mention, so there is no label to learn")
        if name == "1":
            if arguments.demonstrations > (most := len(all_sentences(splits.get("train", ())))):
                raise UsageError(f"--demonstrations: the training split has no more than {most} sentences")
            return table1(labels, arguments.demonstrations, arguments.chat_model)
        return table2(labels)
    if name == "3":
        return table3(numbers(arguments.ranks, "ranks", int))
    if name == "4":
        return table4()
    if name == "recipe":
        rates = numbers(arguments.rates, "rates", float)
        return recipe(rates, [rate / 10 for rate in rates])
    config = read_config(base.model)
    return ablation(config, 8) if name == "ablation" else methods()


def summarise(table: Table, runner: Runner, predictions: dict[str, Path]) -> dict:
    results = {row.title: runner.results(row, table.split) for row in table.rows}
    if table.name == "4":
        for name, file in predictions.items():
            table = replace(table, rows=(*table.rows, Row((name,), ())))
            results[name,] = [predicted(file, runner, table.split)]
    return findings.summarise(table, results)


def predicted(file: Path, runner: Runner, split: str) -> dict:
    """The scores of predictions that were made elsewhere, about the sentences that ours are scored on."""
    documents, asked = runner.documents(split)
    score_files(find_splits(runner.data)[split], file)  # refuses predictions about other texts
    ends = {sentence.document: sentence.start + len(sentence.text) for sentence in asked}
    made = span_keys(read_documents(file, documents))
    gold, made = span_keys(documents), {key for key in made if key[2] <= ends.get(key[0], 0)}
    ids = [document.id for document in documents]
    by_document = dict(zip(ids, document_counts(gold, made, ids).tolist(), strict=True))
    return {**score(gold, made), "by_document": dict.fromkeys(findings.CONVENTIONS, by_document)}


# ---- tables that need no run ----


def counted(name: str, data: str) -> str:
    """Tables 5 to 8 as Markdown; `data` is the corpus folder."""
    if name == "5":
        splits = read_splits(data)
        title, text = f"Mentions by label ({Path(data).name})", stats.show(stats.statistics(splits))
    elif name == "6":
        title, text = f"Formats of the answer to: {TABLE6_INPUT}", "\n".join(formats())
    elif name == "7":
        title, text = "Trainable parameters of Llama-2-7B", show_table7(table7(LLAMA_2["llama-2-7b"]))
    else:
        title, text = "Cost, Llama-2-7B", show_table8(table8(LLAMA_2["llama-2-7b"]))
    return f"## Table {name}: {title}\n\n```\n{text}\n```"


def formats() -> list[str]:
    """The lines of Table 6, rendered, each ticked if it is the paper's."""
    text = TABLE6_INPUT
    spans = [Span(text.index(m), text.index(m) + len(m), label) for m, label in TABLE6_MENTIONS.items()]
    lines = []
    for (form, labels), printed in TABLE6.items():
        names = ("Disease", "Chemical") if labels == "all" else (labels,)
        answer = render_answer(Task(form, names, per_label=labels != "all"), text, spans)
        lines.append(f"{form:<10} {labels:<8} {answer} {'✓' if answer == printed else f'(printed: {printed})'}")
    return lines


# ---- what is written ----


def markdown(summary: dict) -> str:
    """A table as Markdown: a grid for Table 3, else a line a row; then the verdicts."""
    title = f"## Table {summary['name']}" if summary["name"].isdigit() else f"## {summary['name'].capitalize()}"
    where = {"dev": "development", "test": "test"}[summary["split"]]
    lines = [f"{title}: {summary['caption']} (F1 in percent, {where} split)", ""]
    lines += _grid(summary) if summary["name"] == "3" else _list(summary)
    lines += [f"\n{row_title(row)} failed: {row['error']}" for row in summary["rows"] if "error" in row]
    for claim in summary["claims"]:
        lines += ["", f"**{claim['text']}**: {_verdicts(claim)}"]
    return "\n".join(lines)


def row_title(row: dict) -> str:
    return ", ".join(row["title"])


def percent(value: float | None, deviation: float | None = None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f}" + (f" ± {100 * deviation:.1f}" if deviation is not None else "")


def _ours(row: dict) -> str:
    return "failed" if "error" in row else percent(row.get("f1"), row.get("deviation"))


def _paper(row: dict) -> str:
    scale = {key: row[key] / 100 if row[key] is not None else None for key in ("paper", "paper_deviation")}
    return percent(scale["paper"], scale["paper_deviation"])


def _list(summary: dict) -> list[str]:
    head = [*summary["head"], "ours", "95 % interval", "first occurrence", "string set", "exact copies"]
    head += ["trainable", "minutes", "paper"]
    rows = []
    ranked = summary["name"] in ("recipe", "ablation", "methods")
    for row in sorted(summary["rows"], key=lambda row: -row.get("f1", -1)) if ranked else summary["rows"]:
        interval, secondary = row.get("interval"), row.get("secondary", {})
        rows.append([
            *row["title"],
            _ours(row),
            f"{percent(interval['low'])} – {percent(interval['high'])}" if interval else "–",
            percent(secondary.get("first_occurrence")),
            percent(secondary.get("string_set")),
            percent(row.get("exact_copy")),
            f"{row['trainable']:,.0f}" if "trainable" in row else "–",
            f"{row['seconds'] / 60:.1f}" if "seconds" in row else "–",
            _paper(row),
        ])  # fmt: skip
    return _markdown_table(head, rows, len(summary["head"]))


def _grid(summary: dict) -> list[str]:
    """Targets by rank, the paper's in brackets."""
    ranks = list(dict.fromkeys(row["title"][1] for row in summary["rows"]))
    by_title = {tuple(row["title"]): row for row in summary["rows"]}
    rows = []
    for targets in dict.fromkeys(row["title"][0] for row in summary["rows"]):
        cells = (by_title[targets, rank] for rank in ranks)
        rows.append([targets, *(f"{_ours(cell)} ({_paper(cell)})" for cell in cells)])
    return _markdown_table(["ours (paper)", *(f"r={rank}" for rank in ranks)], rows, 1)


def _markdown_table(head: list[str], rows: list[list[str]], left: int) -> list[str]:
    line = ["---"] * left + ["---:"] * (len(head) - left)
    return ["| " + " | ".join(cells) + " |" for cells in (head, line, *rows)]


def _verdicts(claim: dict) -> str:
    parts = []
    for convention, found in claim["by"].items():
        words = "" if convention == "exact" else " by first occurrence"
        numbers = ""
        if "difference" in found:
            low, high = (f"{100 * found[key]:+.1f}" for key in ("low", "high"))
            numbers = f" ({100 * found['difference']:+.1f} points{words}, 95 % interval {low} to {high})"
        parts.append(found["verdict"] + numbers)
    return parts[0] if claim["equal"] else "; ".join(parts)


def keep(summaries: list[dict], runner: Runner, chosen: list[Table], out: Path) -> None:
    """Writes `tables.json`, all that a report is made of, and the figures."""
    curves: dict[str, dict] = {}
    for table in chosen:
        for row in table.rows:
            for cell in (cell for seed in runner.seeds for cell in runner.cells(row, seed)):
                found = cell.read() or {}
                curve = {"seconds": found.get("seconds", 0), "loss": found.get("curve", [])}
                curves.setdefault(cell.path.stem, {"table": table.name, "row": row.name} | curve)
    common = {key: value for key, value in asdict(runner.base).items() if key not in VARIED}
    for name in ("model", "data"):
        common[name] = Path(common[name]).name  # not where it lay
    result = {
        "date": str(date.today()),
        "machine": machine(runner.world),
        "settings": common | {"lr_full": runner.lr_full},
        "seeds": list(runner.seeds),
        "tables": {summary["name"]: summary for summary in summaries},
        "curves": curves,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(result, out / "tables.json")
    figures.save(result, out)


def machine(world: World) -> dict:
    """What the runs were made on."""
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else _processor()
    return {"device": name, "processes": world.size, "threads": torch.get_num_threads(), "cores": os.cpu_count(),
            "torch": torch.__version__, "python": platform.python_version()}  # fmt: skip


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
