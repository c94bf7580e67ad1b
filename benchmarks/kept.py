"""The results of cells that docs/results/cells keeps, and the settings that they were tried with."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from llamalora.paper import findings
from llamalora.paper.cells import deciding
from llamalora.paper.experiments import Row, Table, recipe
from llamalora.paper.runner import runs
from llamalora.paper.tables import best_rates
from llamalora.runs.settings import Settings

BUDGET = {"epochs": 1, "batch_sentences": 10}  # of every table
RATES = {2: (2e-3, 4e-3, 8e-3, 1.6e-2), 8: (1e-3, 2e-3, 4e-3, 8e-3), 128: (5e-4, 1e-3, 2e-3)}  # tried, of LoRA by rank
RATES_FULL = (1e-4, 2e-4, 4e-4)
TRIALS = recipe(RATES, RATES_FULL)


@dataclass
class Kept:
    """Results of cells, found by the settings that decided them.

    Attributes:
        by_runs: by the runs that a result is of, and "dev", "test", or either with ", constrained" behind it.
        again: the same of runs that were run once more, on another machine.
        rates, lr_full: peak learning rates, as in `llamalora.paper.runner.Runner`.
    """

    by_runs: dict[tuple[frozenset, str], dict]
    again: dict[tuple[frozenset, str], dict] = field(default_factory=dict)
    rates: Mapping[int, float] = field(default_factory=dict)
    lr_full: float | None = None

    @staticmethod
    def read(folder: Path) -> "Kept":
        """All that is in a folder, and in `again` beside it, with the rates that its trials found to be the best.

        Raises:
            SystemExit: a result of another model or corpus than the others, of a part of the corpus, or of the same
                runs as another one.
        """
        known: dict[str, object] = {}
        by_runs, again = (_read(place, known) for place in (folder, folder.with_name("again")))
        kept = Kept(by_runs, again)
        return Kept(by_runs, again, *best_rates(TRIALS, lambda row, split: kept.results(row, split)[:1]))

    @property
    def beside_again(self) -> "Kept":
        """With the results of `again` in place of the same runs' on the first machine."""
        return replace(self, by_runs=self.by_runs | self.again)

    def by_seed(self, row: Row, split: str) -> dict[int, dict]:
        """What is known about a row with each seed, the lowest first."""
        known = {}
        for seed in range(10):
            wanted = runs(row, seed, self.rates, None, self.lr_full)
            key = frozenset(decided(Settings(**{**BUDGET, **one})) for one in wanted)
            if wanted and (result := self.by_runs.get((key, split))):
                known[seed] = result
        return known

    def results(self, row: Row, split: str) -> list[dict]:
        return [*self.by_seed(row, split).values()] or [{"error": "it has not been run"}]

    def summary(self, table: Table) -> dict:
        """`findings.summarise`, each row with the seeds that all rows have which have been run."""
        known = {row.title: self.by_seed(row, table.split) for row in table.rows}
        seeds = set.intersection(*([set(found) for found in known.values() if found] or [set()]))
        results = {title: [found[seed] for seed in sorted(seeds & found.keys())] for title, found in known.items()}
        return findings.summarise(table, results)

    def recipes(self) -> list[dict]:
        """The results of all recipes with one model for both labels, on the development split, the best first."""
        tried = [
            result
            for (_, split), result in self.by_runs.items()
            if split == "dev" and [(run["labels"], run["seed"]) for run in result["runs"]] == [("all", 0)]
        ]
        return sorted(tried, key=lambda result: -result["micro"]["f1"])

    def scored(self, result: Mapping) -> list[tuple[dict, dict]]:
        """A result on the development split with the one on the test split, if there is one; both as the system was
        chosen, free or with constrained answers."""
        key = runs_of(result)
        pairs = ([self.by_runs.get((key, split + how)) for split in ("dev", "test")] for how in (", constrained", ""))
        return [(dev, test) for dev, test in pairs if dev and test]

    def begun(self, table: Table) -> Table:
        """A table without the rows that have not been run."""
        return replace(table, rows=tuple(row for row in table.rows if self.by_seed(row, table.split)))

    def at_own_rates(self, table: Table) -> tuple[Table, dict[str, dict[float, float]]]:
        """A table with each row at the learning rate that is the best for it, of those that were tried; and the F1 at
        each of them."""
        rows, tried = [], {}
        for row in table.rows:
            (run,) = row.runs
            trials = {}
            for lr in RATES[8] if run.get("method", "lora") == "lora" else RATES_FULL:
                if result := self.by_seed(Row(row.title, ({**run, "lr": lr},)), table.split).get(0):
                    trials[lr] = result["micro"]["f1"]
            tried[row.name] = trials
            best = {"lr": max(trials, key=lambda lr: trials[lr])} if trials else {}
            rows.append(replace(row, runs=({**run, **best},)))
        return replace(table, rows=tuple(rows)), tried

    def curves(self, tables: Iterable[Table]) -> dict[str, dict]:
        """The losses of each cell, as `figures.save` wants them."""
        curves: dict[str, dict] = {}
        for table in tables:
            for row in table.rows:
                for found in self.by_seed(row, "dev").values():
                    if "curve" in found:
                        curve = curves.setdefault(found["name"], {"rows": [], "loss": found["curve"]})
                        curve["rows"].append([table.name, row.name])
        return curves


def decided(settings: Settings) -> frozenset:
    """What decided a result, less the precision that a machine chose."""
    return frozenset((name, value) for name, value in deciding(settings).items() if name != "precision")


def runs_of(result: Mapping) -> frozenset:
    """The key of a result in `Kept.by_runs`."""
    return frozenset(decided(Settings(**run)) for run in result["runs"])


def _read(folder: Path, known: dict[str, object]) -> dict[tuple[frozenset, str], dict]:
    """The results in a folder by their runs. `known` is the model and the corpus that all have."""
    found: dict[tuple[frozenset, str], dict] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if "error" in result:
            continue
        for run in result["runs"]:
            if run["limit_train"] is not None or run["eval_limit"] is not None:
                raise SystemExit(f"{path}: is of a part of the corpus; only results on all of it are kept")
            model = {"model": result["model"]} if "model" in result else {}  # joins have none
            for name, value in ({"data": run["data"]} | model).items():
                if known.setdefault(name, value) != value:
                    raise SystemExit(f"{path}: is of another {name} than the results before it")
        key = runs_of(result), result["split"] + ", constrained" * result.get("constrained", False)
        if key in found:
            raise SystemExit(f"{path}: is of the same runs as {found[key]['name']}; keep one of them")
        found[key] = result | {"name": path.stem}
    return found
