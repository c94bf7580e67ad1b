"""Makes the paper's tables again, ours beside the paper's, as Markdown, JSON and PNG. What they need is trained once
and kept; the flags in groups are those of `train`, for every run."""

import argparse
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..cli import Parser, UsageError, add_flags, check_least, refuse_idle
from ..corpus.documents import all_sentences, labels_of
from ..corpus.read import find_splits, read_documents, read_splits
from ..files import replace_file, write_json
from ..mistakes import is_run
from ..model.config import read_config
from ..runs.settings import ResolvedSettings, Settings
from ..task.score import document_counts, score, score_files, span_keys
from ..text_table import legend, wrapped
from . import figures, findings, report
from .counted import COUNTED, counted
from .experiments import VARIED, Row, Table, ablation, methods, recipe, table1, table2, table3, table4
from .printed import RANKS

if TYPE_CHECKING:
    from ..distributed.world import World
    from .runner import Runner

TRAINED = ("1", "2", "3", "4", "recipe", "ablation", "methods")  # need runs; the others need none
FULL = 0  # in the place of a rank: full fine-tuning
CHOICES = (*TRAINED[:4], *COUNTED, "all", *TRAINED[4:])


def main(argv: list[str]) -> None:
    usage = "%(prog)s TABLE ... [FLAG ...]"
    parser = Parser("tables", "5 6 7 8\n2 --limit-train 64 --limit-eval 20", usage=usage, description=__doc__)
    parser.add_argument("which", nargs="+", metavar="TABLE", help=f"any of {', '.join(CHOICES)} (all: 1 to 8)")
    parser.add_argument("--seeds", default="0", help="each row is run with each seed of this comma list (default: 0)")
    parser.add_argument("--limit-eval", type=int, help="score on the first N sentences of the split")
    parser.add_argument("--chat-model", metavar="FOLDER", help="a second model for Table 1")
    parser.add_argument("--demonstrations", type=int, default=2, help="in the prompt of Table 1 (default: 2)")
    parser.add_argument("--ranks", default=",".join(map(str, RANKS)), help="of Table 3 (default: the paper's)")
    parser.add_argument("--lr-full", type=float, help="peak learning rate of full fine-tuning (default: a tenth)")
    parser.add_argument(
        "--rates", action="append", metavar="RANK=LR,...", default=["8=5e-4,1e-3,2e-3", "128=5e-4,1e-3,2e-3"],
        help="learning rates that `recipe` tries at a rank, or with full=LR,... in full fine-tuning (default: "
        "5e-4,1e-3,2e-3 at ranks 8 and 128; a tenth of the last rank's in full fine-tuning)",
    )  # fmt: skip
    parser.add_argument(
        "--predictions", action="append", default=[], metavar="NAME=FILE", help="PubTator, a further row of Table 4"
    )
    parser.add_argument(
        "--jobs", type=int, default=1,
        help="processes that run cells side by side, each with its share of the threads, and with a GPU or a share of "
        "one if there are any (default: 1)",
    )  # fmt: skip
    parser.add_argument("--out", default="runs/tables", metavar="FOLDER", help="(default: runs/tables)")
    # steps of so many tokens would give the formats, which differ in length, different numbers of steps
    own = (*VARIED, "eval_limit", "batch_tokens")
    common = [field.name for field in fields(Settings) if field.name not in own]
    add_flags(parser, Settings, common, batch_sentences=10)
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.which if name not in CHOICES]
    if unknown:
        raise UsageError(f"no table {', '.join(unknown)}; choose from {', '.join(CHOICES)}")
    which = [name for name in CHOICES if name in arguments.which or "all" in arguments.which and name.isdigit()]
    refuse_idle(arguments, idle_flags(set(which), common))
    check_least(arguments, limit_eval=1, demonstrations=0, jobs=1)
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

    from ..distributed.world import join_world
    from ..runs.resolve import choose_data, resolve
    from .cells import alone
    from .jobs import check_jobs
    from .runner import Runner

    with join_world(base.timeout) as world, resumable(world):
        check_jobs(arguments.jobs, world)
        sections = [report.counted(*counted(name, choose_data(base.data)[0])) for name in which if name in COUNTED]
        if any(name in TRAINED for name in which):
            places = resolve(base, world.device)[0]
            base = replace(base, model=places.model, data=places.data)
            chosen = [define(name, arguments, places) for name in which if name in TRAINED]
            missing = {"train", "dev", *(table.split for table in chosen)} - find_splits(places.data).keys()
            if missing:
                raise UsageError(f"--data {places.data}: these tables need a split {', '.join(sorted(missing))}, too")
            runner = Runner(base, seeds, out, world, rate, jobs=arguments.jobs)
            runners = [runner] * len(chosen)
            if "recipe" in which:
                (trials,) = (table for table in chosen if table.name == "recipe")
                first = replace(runner, seeds=seeds[:1])
                first.run([trials])
                runner.rates, runner.lr_full = best_rates(trials, first.results)
                runners = [first if table is trials else runner for table in chosen]
            runner.run(table for table in chosen if table.name != "recipe")
            summaries = [summarise(*each, predictions) for each in zip(chosen, runners, strict=True)]
            sections += [report.trained(summary) for summary in summaries]
        if world.is_main:  # before it is written, which may fail
            words = {word: meaning for section in sections for word, meaning in section.words.items()}
            parts = [section.plain for section in sections] + [legend(words)] * bool(words)
            print("\n" + "\n\n".join(parts), flush=True)
        names = ["tables.md"]
        if any(name in TRAINED for name in which):
            with alone(out / "tables.json", world):
                if world.is_main:
                    keep(summaries, runner, list(zip(chosen, runners, strict=True)), out)
            names += [name for name in ("tables.json", "curves.png", "table3.png") if (out / name).exists()]
        with alone(out / "tables.md", world):
            if world.is_main:
                replace_file(out / "tables.md", "\n\n".join(section.markdown for section in sections) + "\n")
                print("\n" + wrapped(f"written to {out}: {', '.join(names)}"))


@contextmanager
def resumable(world: "World") -> Iterator[None]:
    """Says of work that a signal ends how it goes on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        world.warn("stopped by a signal; the same command goes on from there")
        raise


def idle_flags(which: set[str], common: Iterable[str]) -> dict[str, object]:
    """The rules of `refuse_idle` for these tables.

    Args:
        common: the settings of every run.
    """
    trained = which & set(TRAINED)
    return {
        " ".join({"seeds", "limit_eval", "jobs", *common} - {"data"}): not trained and "on tables that train nothing",
        "data": not trained | which & {"5"} and "on tables without a corpus",
        "chat_model demonstrations": "1" not in which and "without table 1",
        "ranks": "3" not in which and "without table 3",
        "predictions": "4" not in which and "without table 4",
        "rates": "recipe" not in which and "without recipe",
        "lr_full": not which & {"4", "methods"} and "without table 4 or methods",
        "lr lr_full": "recipe" in which and "beside recipe, which chooses them",
    }


def numbers(text: str, flag: str, kind: type, before: str = "") -> tuple:
    """A comma list from the command line; what stands `before` it is quoted with it."""
    try:
        found = tuple(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        raise UsageError(f"--{flag} {before}{text}: must be a comma list of numbers") from None
    least = 0 if flag == "seeds" else 1 if kind is int else math.ulp(0.0)
    if not all(least <= value < math.inf for value in found):
        raise UsageError(f"--{flag} {before}{text}: must be positive")
    return found


def read_rates(items: Iterable[str]) -> dict[str, tuple[float, ...]]:
    """The learning rates of `--rates` by rank, or "full"."""
    rates: dict[str, tuple[float, ...]] = {}
    for item in items:
        rank, _, those = item.partition("=")
        if not those or "=" in those or rank != "full" and (not rank.isdecimal() or int(rank) == 0):
            raise UsageError(f"--rates {item}: write RANK=LR,LR,... or full=LR,LR,..., one --rates for each")
        rank = rank if rank == "full" else str(int(rank))
        if rank in rates:
            raise UsageError(f"--rates {item}: names {rank} again; list all its rates in one")
        rates[rank] = numbers(those, "rates", float, f"{rank}=")
        if max(rates[rank]) >= 10:
            raise UsageError(f"--rates {item}: a learning rate must be below 10")
    if rates.keys() <= {"full"}:
        raise UsageError("--rates: name a rank, too: RANK=LR,LR,...")
    return rates


def best_rates(trials: Table, results: Callable[[Row, str], list[dict]]) -> tuple[dict[int, float], float | None]:
    """The learning rate with the best F1 on the development split: for each rank that was tried, and for full
    fine-tuning. A trial that failed is none.

    Args:
        results: of a row on a split.
    """
    best: dict[int, tuple[float, float]] = {}
    for row in trials.rows:
        (result,), (run,) = results(row, trials.split), row.runs
        if "error" not in result:
            rank = run.get("rank", FULL)
            best[rank] = max(best.get(rank, (-1.0, 0.0)), (result["micro"]["f1"], run["lr"]))
    rates = {rank: lr for rank, (_, lr) in best.items()}
    return rates, rates.pop(FULL, None)


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
        rates = read_rates(arguments.rates)
        full = rates.pop("full", None) or tuple(lr / 10 for lr in [*rates.values()][-1])
        return recipe({int(rank): those for rank, those in rates.items()}, full)
    config = read_config(base.model)
    return ablation(config, 8) if name == "ablation" else methods()


def summarise(table: Table, runner: "Runner", predictions: dict[str, Path]) -> dict:
    results = {row.title: runner.results(row, table.split) for row in table.rows}
    if table.name == "4":
        for name, file in predictions.items():
            table = replace(table, rows=(*table.rows, Row((name,), ())))
            results[name,] = [predicted(file, runner, table.split)]
    return findings.summarise(table, results)


def predicted(file: Path, runner: "Runner", split: str) -> dict:
    """The scores of predictions that were made elsewhere, about the sentences that ours are scored on."""
    documents, asked = runner.documents(split)
    score_files(find_splits(runner.data)[split], file)  # refuses predictions about other texts
    ends = {sentence.document: sentence.start + len(sentence.text) for sentence in asked}
    made = span_keys(read_documents(file, documents))
    gold, made = span_keys(documents), {key for key in made if key[2] <= ends.get(key[0], 0)}
    ids = [document.id for document in documents]
    by_document = dict(zip(ids, document_counts(gold, made, ids).tolist(), strict=True))
    return {**score(gold, made), "by_document": dict.fromkeys(findings.CONVENTIONS, by_document)}


# ---- what is written ----


def keep(summaries: list[dict], runner: "Runner", chosen: "list[tuple[Table, Runner]]", out: Path) -> None:
    """Writes `tables.json`, all that a report is made of, and the figures."""
    from .origin import origin

    curves: dict[str, dict] = {}
    for table, its in chosen:
        for row in table.rows:
            for cell in (cell for seed in its.seeds for cell in its.cells(row, seed)):
                found = cell.read() or {}
                curve = {"seconds": found.get("seconds", 0), "loss": found.get("curve", [])}
                name = row.name if len(row.runs) == 1 else f"{row.name}: {cell.settings.labels}"
                curves.setdefault(cell.path.stem, {"rows": [], **curve})["rows"].append([table.name, name])
    common = {key: value for key, value in asdict(runner.base).items() if key not in VARIED}
    for name in ("model", "data"):
        common[name] = Path(common[name]).name  # not where it lay
    result = {
        "made_by": origin(runner.world),
        "settings": common | {"rates": runner.rates, "lr_full": runner.lr_full},
        "seeds": list(runner.seeds),
        "tables": {summary["name"]: summary for summary in summaries},
        "curves": curves,
    }
    write_json(result, out / "tables.json")
    figures.save(result, out)
