"""The cells that tables are made of: each is one run with one seed, trained and scored once, and kept."""

import gc
import hashlib
import json
import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..corpus.documents import Document, Sentence, label_order
from ..corpus.read import find_splits, read_documents
from ..distributed.world import World
from ..errors import InputError
from ..evaluation.answer import join_answers, select_sentences
from ..evaluation.own import own_scoring
from ..evaluation.result import assess, read_answers, write_result
from ..evaluation.systems import load_run, score_split
from ..files import write_json
from ..model.tensors import CheckpointError
from ..progress import duration
from ..runs.folder import RUN_CONFIG, fingerprints, read_settings, read_task
from ..runs.resolve import resolve
from ..runs.settings import ResolvedSettings, Settings
from ..training.loop import train
from ..training.step import DivergedError
from .experiments import BASE, Changes, Row, Table
from .origin import origin

# ---- cells ----


@dataclass(frozen=True)
class Cell:
    """One run with one seed, and where what it found is kept.

    Attributes:
        settings: resolved, with the output folder.
        path: of the JSON file with its result, or with the error that it ended in.
    """

    settings: ResolvedSettings
    path: Path

    @staticmethod
    def of(base: Settings, changes: Changes, out: Path, world: World) -> "Cell":
        """The cell of a run whose settings are `base` with these changes. Its name holds a hash of all that
        decides its result: settings, model, tokenizer, data; not where they lie."""
        settings = resolve(replace(base, **changes, out=""), world.device, world.size)[0]
        content = json.dumps([deciding(settings), fingerprints(settings)], sort_keys=True)
        what = [settings.format, re.sub(r"[^\w+-]+", "_", settings.labels.replace(",", "+"))]
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
        settings, resume = self.settings, world.from_main((self.folder / RUN_CONFIG).exists())
        gc.collect()  # AdamW is part of a cycle: the last cell's would stay on the GPU
        try:
            if resume:  # with the number of epochs that was found at the start, and with ours of what is free
                free = {name: getattr(settings, name) for name in (*Settings.FREE, "model", "data")}
                settings = replace(read_settings(self.folder), **free)
            trained = train(settings, replace(world, quiet=True), resume)
            assert trained is not None, "a cell has a development split"
        except (RuntimeError, InputError) as error:
            result = failure(error)
            if not on_every_process(error, world):
                self.keep(result, world)
                raise  # the others have not failed, and wait
        else:
            config = json.loads((self.folder / RUN_CONFIG).read_text())
            steps = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
            result = trained | {
                "model": config["model"],
                "trainable": config["parameters"]["trainable"],
                "seconds": sum(step["seconds"] for step in steps) + trained["speed"]["seconds"],
                "curve": [round(step["loss"], 5) for step in steps],
            }
        if world.is_main:
            self.keep(result, world)
        world.barrier()
        return result

    def keep(self, result: dict, world: World) -> None:
        keep(result, [self], self.path, world)


def keep(result: dict, cells: Iterable[Cell], path: Path, world: World) -> None:
    """Writes a result with the settings of its `runs`, but for where things lay, and what it was made by."""
    runs = []
    for cell in cells:
        places = {name: Path(getattr(cell.settings, name)).name for name in ("model", "data", "out")}
        runs.append(asdict(cell.settings) | places)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(result | {"runs": runs, "made_by": origin(world)}, path)


def deciding(settings: Settings) -> dict[str, Any]:
    """The settings that decide a result, as far as they differ from their defaults: a setting that comes with a later
    version, and does nothing unless it is asked for, leaves the cells that are kept as they are."""
    idle = {*Settings.FREE, "model", "data", *settings.idle} | ({"batch_tokens"} if settings.batch_sentences else set())
    return {
        field.name: value
        for field in fields(Settings)
        if field.name not in idle and (value := getattr(settings, field.name)) != field.default
    }


def failure(error: Exception) -> dict:
    return {"error": f"{type(error).__name__}: {error}"}


def on_every_process(error: Exception, world: World) -> bool:
    """Whether all processes have met the same error: one that memory or a disk gave may be one process's own."""
    alike = isinstance(error, (DivergedError, InputError)) and not isinstance(error, CheckpointError)
    return alike or world.size == 1


def rate(rank: int, rates: Mapping[int, float], default: float | None) -> float | None:
    """The peak learning rate of a rank: that of the nearest rank, by ratio, among `rates`; of two, of the lower."""
    if not rates:
        return default
    return rates[min(sorted(rates), key=lambda known: abs(math.log(known / rank)))]


def runs(row: Row, seed: int, rates: Mapping[int, float], lr: float | None, lr_full: float | None) -> list[Changes]:
    """The settings in which the runs of a row differ from what all share.

    Args:
        rates, lr: the peak learning rates of LoRA, as in `rate`.
        lr_full: that of full and partial fine-tuning.
    """
    changes: list[Changes] = []
    for one in row.runs:
        run = {**BASE, **one, "seed": seed}
        run.setdefault("lr", rate(run["rank"], rates, lr) if run["method"] == "lora" else lr_full)
        changes.append(run)
    return changes


@dataclass
class Runner:
    """Runs the cells of tables that have not been run yet.

    Attributes:
        base: settings that all cells share, with model and data.
        seeds: each row is run with each of them.
        out: folder of cells and runs.
        lr_full: peak learning rate of full and partial fine-tuning; by default a tenth of LoRA's.
        rates: peak learning rates by rank, which take the place of `base.lr`: see `rate`.
    """

    base: Settings
    seeds: tuple[int, ...]
    out: Path
    world: World
    lr_full: float | None = None
    rates: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self):
        if self.lr_full is None and self.base.lr is not None:
            self.lr_full = self.base.lr / 10

    @property
    def data(self) -> str:
        """The corpus folder."""
        assert self.base.data is not None, "the base of a runner names its corpus"
        return self.base.data

    def cells(self, row: Row, seed: int) -> list[Cell]:
        changes = runs(row, seed, self.rates, self.base.lr, self.lr_full)
        return [Cell.of(self.base, one, self.out, self.world) for one in changes]

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
            self.world.say(f"  {outcome}; {duration(gone)} gone, about {duration(left)} to go")

    def results(self, row: Row, split: str) -> list[dict]:
        """The results of a row for each seed; `{"error": ...}` where a cell failed."""
        return [self._result(self.cells(row, seed), split) for seed in self.seeds] if row.runs else []

    def _result(self, cells: list[Cell], split: str) -> dict:
        known = [cell.read() or {"error": "it has not been run"} for cell in cells]
        errors = [result["error"] for result in known if "error" in result]
        if errors:
            return {"error": errors[0]}
        if split == "dev" and len(cells) == 1:
            return known[0]
        missing = [cell.folder for cell in cells if not cell.folder.is_dir()]
        name = "+".join(cell.path.stem for cell in cells)
        path = cells[0].path.with_name(f"{name}.json" if split == "dev" else f"{name}.{split}.json")
        if self.world.from_main(path.exists()):
            return json.loads(path.read_text())
        if self.world.from_main(missing):
            return {"error": f"{missing[0]} is not there; without {cells[0].path} the run is repeated"}
        result = self._join(cells) if split == "dev" else self._score(cells, split)
        if "error" in result:
            return result
        result |= {key: sum(each[key] for each in known) for key in ("trainable", "seconds")}
        if self.world.is_main:
            keep(result, cells, path, self.world)
        self.world.barrier()
        return result

    def _join(self, cells: list[Cell]) -> dict:
        """The result on the development split of models for one label each, from the answers that they gave there."""
        documents, asked = self.documents("dev")
        tasks = [read_task(cell.folder) for cell in cells]
        by_label = {
            task.labels[0]: read_answers(cell.folder, "dev", task, asked)
            for cell, task in zip(cells, tasks, strict=True)
        }
        labels = label_order(by_label)
        return {"split": "dev", **assess(documents, join_answers(by_label, labels), labels)}

    def _score(self, cells: list[Cell], split: str) -> dict:
        """The result on another split, of the models that were the best on the development split."""
        documents, asked = self.documents(split)
        loaders = [partial(load_run, cell.folder, "best", cell.settings.precision, self.world) for cell in cells]
        gc.collect()
        try:
            result, answers, _ = score_split(loaders, split, documents, asked, self.world, self.base.eval_batch)
        except (RuntimeError, InputError) as error:
            if not on_every_process(error, self.world):
                raise
            return failure(error)
        if self.world.is_main and len(cells) == 1 and self.base.eval_limit is None:
            write_result(result | own_scoring(cells[0].folder, split), answers, cells[0].folder)
        return result

    def documents(self, split: str) -> tuple[list[Document], list[Sentence]]:
        """The documents and sentences of a split that systems are scored on."""
        return select_sentences(read_documents(find_splits(self.data)[split]), self.base.eval_limit)
