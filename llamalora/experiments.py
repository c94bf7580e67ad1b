"""The paper's experiments as data - rows that differ from a base in the fields it varies - and the cells, each trained
and scored once, that the rows are made of."""

import gc
import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from . import corpus, evaluate, paper, run
from .checkpoint import CheckpointError, skeleton
from .distributed import World
from .errors import InputError
from .files import write_json
from .loop import train
from .lora import KINDS, count_parameters, make_trainable
from .model import LlamaConfig
from .systems import load_run, score_split
from .training import DivergedError

Changes = Mapping[str, object]  # to the settings of train.py

# what the tables vary themselves, and what each run of theirs has in common
VARIED = ("out", "format", "labels", "instruction", "shots", "method", "targets", "rank", "rslora", "dora", "loraplus",
          "seed", "eval_every")  # fmt: skip
BASE: Changes = {"format": "tagging", "labels": "all", "method": "lora", "targets": "all", "rank": 8}


@dataclass(frozen=True)
class Row:
    """A system of a table.

    Attributes:
        title: what it is, a cell for each column of the table's head.
        runs: one training run each, as changes to `BASE`; several answer for one label each and are joined.
            Without a run it is only cited.
        paper: F1 in percent and its deviation, None where the paper gives none.
    """

    title: tuple[str, ...]
    runs: tuple[Changes, ...]
    paper: float | None = None
    deviation: float | None = None

    @property
    def name(self) -> str:
        return ", ".join(self.title)


@dataclass(frozen=True)
class Claim:
    """Something that the paper concludes from a table.

    Attributes:
        text: the claim in words.
        a, b: titles of the rows whose F1 is compared, A less B.
        equal: the claim is that they do not differ; else that A is better.
    """

    text: str
    a: tuple[str, ...]
    b: tuple[str, ...]
    equal: bool = False


@dataclass(frozen=True)
class Table:
    """One table of the paper, or beyond it.

    Attributes:
        head: titles of the columns that name a row.
        split: on which its systems are scored.
    """

    name: str
    caption: str
    head: tuple[str, ...]
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...] = ()
    split: str = "dev"


def table1(labels: tuple[str, ...], shots: int, chat_model: str | None) -> Table:
    label = "Chemical" if "Chemical" in labels else labels[0]
    prompt = {"instruction": True, "shots": shots}
    rows = []
    if chat_model:
        chat = {"model": chat_model, "labels": label}
        (_, _, *with_prompt), (_, _, *without), _ = paper.TABLE1
        rows.append(Row(("chat model", "instruction and demonstrations"), ({**chat, **prompt},), *with_prompt))
        rows.append(Row(("chat model", "input sentence only"), (chat,), *without))
    (_, _, *base) = paper.TABLE1[-1]
    rows.append(Row(("base model", "instruction and demonstrations"), ({"labels": label, **prompt},)))
    rows.append(Row(("base model", "input sentence only"), ({"labels": label},), *base))
    model = "chat model" if chat_model else "base model"
    claim = Claim(
        "The prompt does not matter once the model is fine-tuned",
        (model, "instruction and demonstrations"),
        (model, "input sentence only"),
        equal=True,
    )
    return Table("1", f"Prompt ({label} only)", ("model", "prompt"), tuple(rows), (claim,))


def table2(labels: tuple[str, ...]) -> Table:
    rows, claims = [], []
    for form in ("tagging", "extraction"):
        per_label = tuple({"format": form, "labels": label} for label in labels)
        for how, runs in {"per-label": per_label, "all": ({"format": form},)}.items():
            rows.append(Row((form, how), runs, *paper.TABLE2[form, how]))
    for how, words in {"all": "all labels at once", "per-label": "one model per label"}.items():
        claims.append(Claim(f"Tagging beats extraction ({words})", ("tagging", how), ("extraction", how)))
    claims.append(
        Claim(
            "One model for all labels is as good as one per label", ("tagging", "all"), ("tagging", "per-label"), True
        )
    )
    return Table("2", "Way to solve the task", ("format", "labels"), tuple(rows), tuple(claims))


def table3(ranks: Iterable[int]) -> Table:
    ranks = tuple(ranks)
    least, most = str(min(ranks)), str(max(ranks))
    printed = {(t, r): f1 for t, row in paper.TABLE3.items() for r, f1 in zip(paper.RANKS, row, strict=True)}
    rows = [
        Row((targets, str(rank)), ({"targets": targets, "rank": rank},), printed.get((targets, rank)))
        for targets in paper.TARGETS
        for rank in ranks
    ]
    claims = [
        Claim(f"q,k,v,o at r={least} beats q alone at r={most}", ("q,k,v,o", least), ("q", most)),
        Claim(f"All kinds at r={least} beat q alone at r={most}", ("all", least), ("q", most)),
        Claim(f"All kinds at r={least} beat q,k,v,o at r={most}", ("all", least), ("q,k,v,o", most)),
        Claim(
            f"With all kinds the rank does not matter (r={most} against {least})", ("all", most), ("all", least), True
        ),
    ]
    return Table("3", "Target layers and rank", ("targets", "r"), tuple(rows), tuple(claims))


def table4() -> Table:
    (lora, _, f1_lora), (full, _, f1_full), (cited, _, f1_cited) = paper.TABLE4
    rows = (
        Row((lora,), ({"rank": 128},), f1_lora),
        Row((full,), ({"method": "full", "rank": 128},), f1_full),
        Row((cited,), (), f1_cited),
    )
    claim = Claim("LoRA on all kinds equals full fine-tuning", (lora,), (full,), equal=True)
    return Table("4", "Against full fine-tuning", ("system",), rows, (claim,), split="test")


def ablation(config: LlamaConfig, rank: int) -> Table:
    """Each kind of layer alone, and all but one, with as many parameters as all nine have at `rank`."""
    sizes = {kind: _size(config, kind, 1) for kind in KINDS}
    budget = rank * sum(sizes.values())
    rows = [Row(("all nine", str(rank)), ({"rank": rank},))]
    for kind in KINDS:
        others = tuple(other for other in KINDS if other != kind)
        for title, kinds in ((f"{kind} alone", (kind,)), (f"all but {kind}", others)):
            equal = max(1, round(budget / sum(sizes[one] for one in kinds)))
            rows.append(Row((title, str(equal)), ({"targets": ",".join(kinds), "rank": equal},)))
    return Table("ablation", f"Kinds of layer at {budget:,} trainable parameters", ("targets", "r"), tuple(rows))


def _size(config: LlamaConfig, targets: str, rank: int) -> int:
    return count_parameters(make_trainable(skeleton(config), "lora", targets, rank))["trainable"]


def recipe(rates: Iterable[float], rates_full: Iterable[float]) -> Table:
    """The search for the learning rates, on the development split."""
    rows = [Row(("LoRA", str(r), f"{lr:g}"), ({"rank": r, "lr": lr},)) for r in (8, 128) for lr in rates]
    rows += [Row(("full", "-", f"{lr:g}"), ({"method": "full", "lr": lr},)) for lr in rates_full]
    return Table("recipe", "Learning rates tried", ("method", "r", "learning rate"), tuple(rows))


def methods() -> Table:
    """LoRA beside its relatives, under one recipe."""
    rows = {
        "LoRA": {},
        "rsLoRA": {"rslora": True},
        "LoRA+ (B learns 4 times as fast)": {"loraplus": 4.0},
        "DoRA": {"dora": True},
        "full fine-tuning of the same layers": {"method": "partial"},
    }
    return Table("methods", "Low-cost methods", ("method",), tuple(Row((name,), (run,)) for name, run in rows.items()))


# ---- cells ----


@dataclass(frozen=True)
class Cell:
    """One run with one seed, and where what it found is kept.

    Attributes:
        settings: resolved, with the output folder.
        path: of the JSON file with its result, or with the error that it ended in.
    """

    settings: run.ResolvedSettings
    path: Path

    @staticmethod
    def of(base: run.Settings, changes: Changes, out: Path, world: World) -> "Cell":
        """The cell of a run whose settings are `base` with these changes. Its name holds a hash of all that
        decides its result: settings, model, tokenizer, data; not where they lie."""
        settings = run.resolve(replace(base, **changes, out=""), world.device)[0]
        idle = {*run.Settings.FREE, "model", "data", *settings.idle}
        deciding = {name: value for name, value in asdict(settings).items() if name not in idle}
        content = json.dumps([deciding, run.fingerprints(settings)], sort_keys=True)
        what = [settings.format, settings.labels.replace(",", "+")]
        what += ["prompt"] if settings.instruction or settings.shots else []
        what += [variant for variant in ("rslora", "dora") if getattr(settings, variant)]
        what += ["loraplus"] if settings.loraplus != 1 else []
        what += [settings.method] if not settings.adapts else []
        what += [settings.targets.replace(",", "")] if "targets" not in settings.idle else []
        what += [f"r{settings.rank}"] if settings.adapts else []
        name = "-".join([*what, f"s{settings.seed}", hashlib.sha256(content.encode()).hexdigest()[:10]])
        return Cell(replace(settings, out=str(out / "runs" / name)), out / "cells" / f"{name}.json")

    @property
    def folder(self) -> Path:
        return Path(self.settings.out)

    def read(self) -> dict | None:
        """What is known about the cell; None before it has been run."""
        return json.loads(self.path.read_text()) if self.path.exists() else None

    def run(self, world: World) -> dict:
        """Trains and scores, or goes on where it was interrupted.

        Returns:
            The result on the development split with `trainable` parameters, `seconds` of training and of its best
            evaluation, and the learning `curve` (loss of each step), or `{"error": ...}`.
        """
        settings, resume = self.settings, world.from_main((self.folder / run.CONFIG).exists())
        gc.collect()  # AdamW is part of a cycle: the last cell's would stay on the GPU
        try:
            if resume:  # with the number of epochs that was found at the start, and with ours of what is free
                free = {name: getattr(settings, name) for name in (*run.Settings.FREE, "model", "data")}
                settings = replace(run.read_settings(self.folder), **free)
            result = train(settings, replace(world, quiet=True), resume)
        except (RuntimeError, InputError) as error:
            result = failure(error)
            if not on_every_process(error, world):
                self.keep(result)
                raise  # the others have not failed, and wait
        else:
            config = json.loads((self.folder / run.CONFIG).read_text())
            steps = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
            result |= {
                "trainable": config["parameters"]["trainable"],
                "seconds": sum(step["seconds"] for step in steps) + result["speed"]["seconds"],
                "curve": [round(step["loss"], 5) for step in steps],
            }
        result["settings"] = asdict(self.settings)
        if world.is_main:
            self.keep(result)
        world.barrier()
        return result

    def keep(self, result: dict) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(result, self.path)


def failure(error: Exception) -> dict:
    return {"error": f"{type(error).__name__}: {error}"}


def on_every_process(error: Exception, world: World) -> bool:
    """Whether all processes have met the same error: one that memory or a disk gave may be one process's own."""
    alike = isinstance(error, (DivergedError, InputError)) and not isinstance(error, CheckpointError)
    return alike or world.size == 1


@dataclass
class Runner:
    """Runs the cells of tables that have not been run yet.

    Attributes:
        base: settings that all cells share, with model and data.
        seeds: each row is run with each of them.
        out: folder of cells and runs.
        lr_full: peak learning rate of full and partial fine-tuning; by default a tenth of LoRA's.
    """

    base: run.Settings
    seeds: tuple[int, ...]
    out: Path
    world: World
    lr_full: float | None = None

    def __post_init__(self):
        if self.lr_full is None and self.base.lr is not None:
            self.lr_full = self.base.lr / 10

    def cells(self, row: Row, seed: int) -> list[Cell]:
        cells = []
        for one in row.runs:
            changes = {**BASE, **one, "seed": seed}
            if changes["method"] != "lora":
                changes = {"lr": self.lr_full} | changes
            cells.append(Cell.of(self.base, changes, self.out, self.world))
        return cells

    def run(self, tables: Iterable[Table]) -> None:
        """A failed cell is recorded and passed over; the next time it is tried again."""
        wanted: dict[Path, Cell] = {}
        for row in (row for table in tables for row in table.rows):
            for seed in self.seeds:
                wanted |= {cell.path: cell for cell in self.cells(row, seed)}
        todo = [cell for cell in wanted.values() if "error" in (cell.read() or {"error": None})]
        todo.sort(key=lambda cell: cell.path.exists())  # what failed before comes last
        todo = self.world.from_main(todo)
        self.world.say(f"{len(wanted)} cells, {len(wanted) - len(todo)} of them done before; results in {self.out}")
        started = time.perf_counter()
        for number, cell in enumerate(todo):
            self.world.say(f"cell {number + 1} of {len(todo)}: {cell.path.stem}")
            result = cell.run(self.world)
            outcome = result["error"] if "error" in result else f"F1 {100 * result['micro']['f1']:.2f}"
            gone = time.perf_counter() - started
            left = gone / (number + 1) * (len(todo) - number - 1)
            self.world.say(f"  {outcome}; {_minutes(gone)} gone, about {_minutes(left)} to go")

    def results(self, row: Row, split: str) -> list[dict]:
        """The results of a row for each seed; `{"error": ...}` where a cell failed."""
        return [self._result(self.cells(row, seed), split) for seed in self.seeds] if row.runs else []

    def _result(self, cells: list[Cell], split: str) -> dict:
        known = [cell.read() or {"error": "it has not been run"} for cell in cells]
        errors = [result["error"] for result in known if "error" in result]
        if errors:
            return {"error": errors[0]}
        together = {key: sum(result[key] for result in known) for key in ("trainable", "seconds")}
        if split != "dev":
            scored = self._score(cells, split)
            return scored if "error" in scored else scored | together
        if len(cells) == 1:
            return known[0]
        documents, asked = self.documents("dev")
        tasks = [run.read_task(cell.folder) for cell in cells]
        by_label = {
            task.labels[0]: evaluate.read_answers(cell.folder, "dev", task, asked)
            for cell, task in zip(cells, tasks, strict=True)
        }
        labels = corpus.label_order(by_label)
        return evaluate.assess(documents, evaluate.joined(by_label, labels), labels) | together

    def _score(self, cells: list[Cell], split: str) -> dict:
        """On another split, with the models that were the best on the development split; once."""
        path = cells[0].path.with_suffix(f".{split}.json")
        if self.world.from_main(path.exists()):
            return json.loads(path.read_text())
        documents, asked = self.documents(split)
        loaders = [partial(load_run, cell.folder, "best", cell.settings.precision, self.world) for cell in cells]
        gc.collect()
        try:
            result, answers = score_split(
                loaders, split, documents, asked, cells[0].settings.precision, self.world, self.base.eval_batch
            )
        except (RuntimeError, InputError) as error:
            if not on_every_process(error, self.world):
                raise
            return failure(error)
        if self.world.is_main:
            evaluate.write(result, answers, cells[0].folder)
            replace(cells[0], path=path).keep(result)
        self.world.barrier()
        return result

    def documents(self, split: str) -> tuple[list[corpus.Document], list[corpus.Sentence]]:
        """The documents and sentences of a split that systems are scored on."""
        return evaluate.select(corpus.read(corpus.find_splits(self.base.data)[split]), self.base.eval_limit)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
