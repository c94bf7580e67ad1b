#!/usr/bin/env python3
"""Writes docs/reproduction.md from the results of cells that docs/results/cells keeps, and from nothing else.

COMMANDS below made them. What they add to RUNS/cells goes on another day where docs/results/cells has it:

cp runs/tables/cells/*.json docs/results/cells/ && python benchmarks/reproduction.py
"""

import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path

from conclusions import PAPER, beyond, conclusion, of_kinds
from kept import BUDGET, RATES, RATES_FULL, TRIALS, Kept
from recipes import best, flags

from llamalora.evaluation.result import WORDS as RESULT_WORDS
from llamalora.model.config import LlamaConfig
from llamalora.paper import figures, report
from llamalora.paper.experiments import Table, ablation, methods, table1, table2, table3, table4
from llamalora.paper.printed import RANKS
from llamalora.runs.settings import Settings

DOCS = Path(__file__).resolve().parents[1] / "docs"
RESULTS = DOCS / "results"
LABELS, SHOTS = ("Disease", "Chemical"), 2
BEYOND = ("ablation", "methods")  # what it leaves open
RATES_METHODS = {1e-3: 1e-4, 2e-3: 2e-4, 4e-3: 4e-4}  # tried of each method: of LoRA's kind -> of full fine-tuning

WORDS = {
    "r": "the rank of LoRA's updates",
    "kinds of layer": "q, k, v, o (attention), gate, up, down (MLP), embed (input embedding), head (output)",
    "A less B": "the F1 of the claim's first system less that of its second, in points",
} | {word: RESULT_WORDS[word] for word in ("first occurrence", "string set", "exact copies")}
_TRIED = [(str(rank), those) for rank, those in RATES.items()] + [("full", RATES_FULL)]
_METHODS = "\n".join(
    f"llamalora tables methods --lr {lr:g} --lr-full {full:g} $BUDGET" for lr, full in RATES_METHODS.items()
)
COMMANDS = f"""\
RATES="{" ".join(f"--rates {rank}={','.join(f'{rate:g}' for rate in those)}" for rank, those in _TRIED)}"
BUDGET="--model weights/smollm2-135m --data data/bc5cdr --epochs {BUDGET["epochs"]}
        --batch-sentences {BUDGET["batch_sentences"]} --eval-batch 64 --compile on --jobs 2"
llamalora tables recipe 4 $RATES $BUDGET
llamalora tables recipe 1 2 $RATES $BUDGET --seeds 0,1,2
llamalora tables recipe 3 $RATES $BUDGET --ranks {",".join(map(str, RATES))}
llamalora tables recipe ablation $RATES $BUDGET
{_METHODS}"""


def main() -> None:
    kept = Kept.read(RESULTS / "cells")
    found = summaries(kept)
    (DOCS / "reproduction.md").write_text(document(kept, found), encoding="utf-8")
    figures.save({"tables": found, "curves": kept.curves(defined(kept))}, RESULTS)
    print(f"written: {DOCS / 'reproduction.md'}")


def defined(kept: Kept) -> list[Table]:
    """The tables that the page has; of those beyond the paper the rows that have been run."""
    config = next(result["model"] for result in kept.by_runs.values() if "model" in result)  # joins have none
    beyond = (ablation(LlamaConfig.from_dict(config), 8), kept.beside_again.at_own_rates(methods())[0])
    return [table1(LABELS, SHOTS, None), table2(LABELS), table3(RATES), table4(), TRIALS, *map(kept.begun, beyond)]


def summaries(kept: Kept) -> dict[str, dict]:
    """The tables' summaries by their names. Most rows of those beyond the paper were run on another machine than the
    paper's tables: the rows that they share are taken from there, too."""
    return {table.name: (kept.beside_again if table.name in BEYOND else kept).summary(table) for table in defined(kept)}


def document(kept: Kept, found: Mapping[str, dict]) -> str:
    """The page; `found` are the summaries by the tables' names."""
    parts = [
        "# The paper's findings, asked again",
        "",
        "This page is written by `benchmarks/reproduction.py` from the results in `docs/results/cells`; no score of "
        "ours in it is typed.",
        "",
        'The paper, "LoRA fine-tuning of large language models for named-entity recognition" (Kito, Makino, Miwa, '
        "Sasaki), fine-tunes Llama-2-7B. Here its questions are put to another Llama, fifty times smaller "
        "(SmolLM2-135M-*Instruct*, quantised to 4 bits and back, see `weights/README.md`), on the paper's whole "
        "corpus, with the same formats, targets and scoring. The figures say whether the findings hold there; they "
        "are not the paper's figures.",
        "",
        *verdicts(found),
        *repeated(kept),
        *conclusion(found),
        *beyond(kept),
        "Minutes in the tables are those of one process among several, on two kinds of machine: they say little.",
        "",
    ]
    for name in PAPER:
        parts += [report.trained(found[name]).markdown, ""]
        if name == "3":
            parts += ["![F1 against trainable parameters](results/table3.png)", ""]
    parts += ["# What the paper leaves open", ""]
    for name in BEYOND:
        parts += [report.trained(found[name]).markdown, ""]
        parts += of_kinds(kept, found[name]) if name == "ablation" else of_methods(kept)
    parts += [*best(kept), *how_it_was_run(kept), *rates(found["recipe"])]
    parts += ["## Learning curves", "", "![loss of each run](results/curves.png)", "", *what_differs(found)]
    parts += ["## Words", "", *(f"- **{word}**: {meaning}" for word, meaning in WORDS.items()), ""]
    return "\n".join(parts)


def verdicts(found: Mapping[str, dict]) -> list[str]:
    lines = [
        "| table | claim of the paper | here | A less B, points | 95 % interval |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    for table in (found[name] for name in PAPER):
        for claim in table["claims"]:
            exact = claim["by"]["exact"]
            numbers = ["–", "–"]
            if "difference" in exact:
                low, high = (f"{100 * exact[end]:+.1f}" for end in ("low", "high"))
                numbers = [f"{100 * exact['difference']:+.1f}", f"{low} to {high}"]
            lines.append("| " + " | ".join([table["name"], claim["text"], f"**{exact['verdict']}**", *numbers]) + " |")
    decided = sum(
        "not decided" not in claim["by"]["exact"]["verdict"] for name in PAPER for claim in found[name]["claims"]
    )
    return [
        "## The findings",
        "",
        *lines,
        "",
        f"Decided: {decided} of {len(lines) - 2}. Intervals are 95 %, by bootstrap over documents, paired, over all "
        "seeds of a row. A claim that A is better holds where the interval is above zero. A claim of equality holds "
        "where it is within 1 point of zero on either side, and does not where it is outside of that. All else is not "
        "decided.",
        "",
    ]


def repeated(kept: Kept) -> list[str]:
    """What training again changes: the runs that differ in seed or machine alone."""
    groups: dict[frozenset, list[tuple[int, dict]]] = {}
    for (key, split), result in [*kept.by_runs.items(), *kept.again.items()]:
        if split == "dev" and len(key) == 1:
            (run,) = key
            recipe = frozenset(item for item in run if item[0] != "seed")
            groups.setdefault(recipe, []).append((result["runs"][0]["seed"], result))
    lines, variances = [], []
    for group in groups.values():
        if len(group) > 1:
            f1 = [100 * result["micro"]["f1"] for _, result in group]
            variances.append(statistics.variance(f1))
            runs = ", ".join(
                f"{result['micro']['f1'] * 100:.1f} ({seed}, {_machine(result)})"
                for seed, result in sorted(group, key=lambda pair: pair[0])
            )
            lines.append(f"| {flags(group[0][1]['runs'][0])} | {runs} |")
    deviation = statistics.mean(variances) ** 0.5
    return [
        "Intervals are over documents, and leave out what training again changes. Where that was tried, with another "
        f"seed or on another machine, F1 has a standard deviation of {deviation:.1f} points, about "
        f"{deviation * 2**0.5:.1f} for a difference of two runs. A verdict that rests on one seed, above all one of "
        f"equality, is about those runs. {where(kept)}",
        "",
        "| flags | F1 (seed, machine) |",
        "| --- | --- |",
        *lines,
        "",
    ]


def of_methods(kept: Kept) -> list[str]:
    """The learning rates that were tried of each method."""
    tried = kept.beside_again.at_own_rates(methods())[1]
    edge = [
        name for name, those in tried.items() if those and max(those, key=those.__getitem__) in (min(those), max(those))
    ]
    return [
        "Each method has the learning rate, of those below, that is the best for it, on the split and with the seed "
        "that it is scored on."
        + f" {' and '.join(edge)} may want another yet: the best is the last that was tried."
        * bool(edge),
        "",
        *_by_rate({name: {lr: 100 * f1 for lr, f1 in those.items()} for name, those in tried.items()}),
        "",
    ]


def where(kept: Kept) -> str:
    """Which rows ran on another kind of machine than most of the paper's tables, or of those beyond."""
    on_gpu, on_cpu = [], []
    for table in defined(kept):
        for row in table.rows if table.name in PAPER else ():
            seeds = [str(seed) for seed, result in kept.by_seed(row, table.split).items() if _machine(result) == "GPU"]
            if seeds:
                on_gpu.append(f"{' / '.join(row.title)} of Table {table.name} (seed {' and '.join(seeds)})")
        for row in table.rows if table.name in BEYOND else ():
            if _machine(kept.beside_again.by_seed(row, table.split)[0]) == "CPU":
                on_cpu.append(row.title[0])
    but = f", but for {', '.join(on_cpu)}" * bool(on_cpu)
    return (
        f"On a GPU ran {'; '.join(on_gpu)}; all else of Tables 1 to 4 on CPUs. The tables beyond the paper's ran on a "
        f"GPU{but}."
    )


def how_it_was_run(kept: Kept) -> list[str]:
    own = [result for (key, split), result in kept.by_runs.items() if split == "dev" and len(key) == 1]
    by_machine: dict[str, list[dict]] = {}
    for result in own:
        machine = result["made_by"]["machine"]
        name = f"{machine['device']} ({machine['cores']} cores), torch {machine['torch']}"
        by_machine.setdefault(name, []).append(result)
    machines = "; ".join(
        f"{len(results)} on {name}, {sum(result['seconds'] for result in results) / 3600:.1f} hours of training and "
        "decoding"
        for name, results in sorted(by_machine.items())
    )
    made_by = [result["made_by"] for result in kept.by_runs.values()]
    days = sorted({made["date"] for made in made_by})
    commits = ", ".join(sorted({made["commit"] for made in made_by}))
    run = Settings(**BUDGET)
    return [
        "## How it was run",
        "",
        "These commands make the tables, and `llamalora train` the longer runs; kept so far is what is shown above.",
        "",
        "```",
        COMMANDS,
        "```",
        "",
        f"- **Machines**: {len(own)} cells: {machines}. They ran side by side, two on the CPUs, nine on the GPU. "
        f"{' to '.join(dict.fromkeys((days[0], days[-1])))}, at commits {commits}.",
        f"- **Budget** of the tables: all sentences of the training split, {BUDGET['epochs']} epoch, steps of "
        f"{BUDGET['batch_sentences']} sentences; scores on all sentences of the development split (Table 4: of the "
        "test split, looked at once).",
        f"- **Recipe** of the tables: AdamW, no weight decay, {run.schedule} schedule with {100 * run.warmup:.0f} % "
        f"warm-up, clipping at {run.clip:g}, dropout {run.dropout:g}, scale 1 (equation 2), the learning rate below. "
        "The paper gives none of this.",
        "",
    ]


def _machine(result: dict) -> str:
    return "GPU" if "NVIDIA" in result["made_by"]["machine"]["device"] else "CPU"


def rates(trials: dict) -> list[str]:
    """The learning rates that were tried, a line for each rank."""
    by_rank: dict[str, dict[float, float]] = {}
    for row in trials["rows"]:
        method, rank, rate = row["title"]
        if "f1" in row:
            by_rank.setdefault(f"r={rank}" if method == "LoRA" else method, {})[float(rate)] = 100 * row["f1"]
    lora = {name: those for name, those in by_rank.items() if name.startswith("r=")}
    shared = set.intersection(*map(set, lora.values())) if lora else set()
    parts = [
        "### Learning rates",
        "",
        "F1 on the development split with all kinds of layer, by peak learning rate. Every row of Tables 1 to 4 "
        "and of the ablation has the best rate of its rank, or of the nearest rank.",
        "",
        *_by_rate(by_rank),
        "",
        "With scale 1 an update of higher rank moves the weights more at the same rate, so that rank and learning rate "
        "cannot be told apart: a comparison of ranks at one rate compares rates, too.",
    ]
    if len(lora) > 1 and shared:
        for rate in sorted(shared):
            at_one = [those[rate] for those in lora.values()]
            at_own = [max(those.values()) for those in lora.values()]
            parts[-1] += (
                f" Here the ranks differ by {max(at_one) - min(at_one):.1f} points at {rate:g} for all of them, and by "
                f"{max(at_own) - min(at_own):.1f} at the best rate of each."
            )
    return [*parts, ""]


def _by_rate(by_name: Mapping[str, Mapping[float, float]]) -> list[str]:
    """A table of F1 by learning rate, a line for each name, the best of it in bold."""
    columns = sorted({rate for those in by_name.values() for rate in those})
    lines = ["| | " + " | ".join(f"{rate:g}" for rate in columns) + " |", "| --- " + "| ---: " * len(columns) + "|"]
    for name, those in by_name.items():
        most = max(those.values(), default=0)
        cells = {rate: f"**{f1:.1f}**" if f1 == most else f"{f1:.1f}" for rate, f1 in those.items()}
        lines.append(f"| {name} | " + " | ".join(cells.get(rate, "") for rate in columns) + " |")
    return lines


def what_differs(found: Mapping[str, dict]) -> list[str]:
    missing = ", ".join(str(rank) for rank in RANKS if rank not in RATES)
    seeds = {name: max(row.get("seeds", 0) for row in found[name]["rows"]) for name in ("1", "2")}
    return [
        "## What differs from the paper",
        "",
        "- The model, as said above. It is one model, and instruction-tuned: whether a chat model or a base model is "
        "the better start, the other question of Table 1, cannot be asked of it.",
        "- Sentences are those of the official PubTator text, scored by exact offsets; the paper's text is tokenised.",
        f"- The number of demonstrations in Table 1 is ours: {SHOTS}.",
        f"- Ranks {missing} of Table 3 were left out.",
        f"- Seeds so far: {seeds['1']} in Table 1, {seeds['2']} in Table 2, where the paper has several; one in Tables "
        "3 and 4, as there.",
        "",
    ]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
