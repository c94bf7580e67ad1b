"""Runs the cells of tables that have not been run yet, one after the other or side by side, and finds their results."""

import gc
import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from ..corpus.documents import Document, Sentence, label_order
from ..corpus.read import find_splits, read_documents
from ..distributed.world import World
from ..errors import InputError
from ..evaluation.answered import join_answers, select_sentences
from ..evaluation.own import own_scoring
from ..evaluation.result import assess, read_answers, write_result
from ..evaluation.systems import load_run, score_split
from ..progress import duration
from ..runs.folder import read_task
from ..runs.settings import Settings
from .cells import Cell, alone, failure, is_busy, is_done, keep, on_every_process, run_by_itself
from .experiments import BASE, Changes, Row, Table
from .jobs import side_by_side, threads_of

LONGEST = 200  # characters of a file's name, of which a file system has 255 bytes


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
        jobs: cells that are run at once, by as many processes; if 1, those of `world` run all of them.
    """

    base: Settings
    seeds: tuple[int, ...]
    out: Path
    world: World
    lr_full: float | None = None
    rates: Mapping[int, float] = field(default_factory=dict)
    jobs: int = 1

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
        todo = [cell for cell in wanted.values() if not is_done(cell.read())]
        todo.sort(key=lambda cell: cell.path.exists())  # what failed before comes last
        todo = self.world.from_main(todo)
        say, started, done = self.world.say, time.perf_counter(), 0
        say(f"{len(wanted)} cells, {len(wanted) - len(todo)} of them done before; results in {self.out}")

        def name(cell: Cell) -> None:
            say(f"cell {done + 1} of {len(todo)}: {cell.path.stem}")

        def tell(result: dict) -> None:
            nonlocal done
            done += 1
            outcome = result["error"] if "error" in result else f"F1 {100 * result['micro']['f1']:.2f}"
            gone = time.perf_counter() - started
            left = gone / done * (len(todo) - done)
            say(f"  {outcome}; {duration(gone)} gone, about {duration(left)} to go")

        def ended(cell: Cell, code: int) -> None:
            name(cell)
            tell(cell.outcome(code, self.world))

        if (jobs := min(self.jobs, len(todo))) > 1:
            threads = f"{threads_of(jobs)} thread{'s' * (threads_of(jobs) > 1)}"
            say(f"{jobs} at once, each on {threads}; what they say is in {self.out / 'cells'}/NAME.log")
            side_by_side(run_by_itself, self._free_first(todo), jobs, lambda cell: cell.log, ended)
            return
        for cell in self._free_first(todo):
            name(cell)
            tell(cell.run(replace(self.world, quiet=True)))

    def _free_first(self, todo: Iterable[Cell]) -> Iterator[Cell]:
        """The cells, but what another command is at comes last."""
        left = [*todo]
        while left:
            free = (number for number, cell in enumerate(left) if self.world.is_main and not is_busy(cell.path))
            yield left.pop(self.world.from_main(next(free, 0)))

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
        if len(name) > LONGEST:
            name = f"{cells[0].path.stem}+{len(cells) - 1}-{hashlib.sha256(name.encode()).hexdigest()[:10]}"
        path = cells[0].path.with_name(f"{name}.json" if split == "dev" else f"{name}.{split}.json")
        with alone(path, self.world):
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
