#!/usr/bin/env python3
"""Writes docs/reproduction.md from the results of cells that docs/results/cells keeps, and from nothing else.

COMMANDS below made them. What they add to RUNS/cells goes on another day where docs/results/cells has it:

cp runs/tables/cells/*.json docs/results/cells/ && python benchmarks/reproduction.py
"""

import statistics
from collections.abc import Mapping
from pathlib import Path

from kept import BUDGET, RATES, RATES_FULL, TRIALS, Kept, runs_of

from llamalora.cli import flag
from llamalora.evaluation.result import WORDS as RESULT_WORDS
from llamalora.lora.kinds import KINDS
from llamalora.model.config import LlamaConfig
from llamalora.paper import figures, findings, report
from llamalora.paper.cells import deciding
from llamalora.paper.experiments import Table, ablation, methods, table1, table2, table3, table4
from llamalora.paper.printed import RANKS, TABLE4
from llamalora.paper.runner import rate
from llamalora.runs.settings import Settings

DOCS = Path(__file__).resolve().parents[1] / "docs"
RESULTS = DOCS / "results"
LABELS, SHOTS = ("Disease", "Chemical"), 2
PAPER = ("1", "2", "3", "4")  # the paper's own tables
BEYOND = ("ablation", "methods")  # what it leaves open
RATES_METHODS = {1e-3: 1e-4, 2e-3: 2e-4, 4e-3: 4e-4}  # tried of each method: of LoRA's kind -> of full fine-tuning
SHOWN = 8  # of the best recipes
ENCODERS = {  # F1 on the test split, of Gu et al. 2021
    "BioBERT-base": {"Chemical": 92.9, "Disease": 84.7},
    "PubMedBERT-base": {"Chemical": 93.3, "Disease": 85.6},
}
READINGS = {  # of each claim: verdict -> what it says to a reader; {size}, {difference}, {low} and {high} are points
    "The prompt does not matter once the model is fine-tuned": {
        "holds": "Leave instruction and demonstrations out: they change the score by {difference} ({low} to {high}), "
        "and every sentence costs several times as many tokens.",
        "does not hold": "Instruction and demonstrations do matter here, by {size} ({low} to {high}). The model is "
        "small, and has seen each sentence once; that may be why.",
    },
    "Tagging beats extraction (all labels at once)": {
        "holds": "Let the model copy the sentence and mark the mentions: that beats a list of them by {size} points "
        "with one model for all labels.",
    },
    "Tagging beats extraction (one model per label)": {"holds": "With one model for each label it is {size}."},
    "One model for all labels is as good as one per label": {
        "holds": "One model for all labels is as good as one for each ({low} to {high}), at half the cost.",
    },
    "q,k,v,o at r=2 beats q alone at r=128": {
        "holds": "Where the updates are matters more than their rank: rank 2 on queries, keys, values and outputs "
        "beats rank 128 on queries alone by {size}.",
    },
    "All kinds at r=2 beat q alone at r=128": {
        "holds": "All nine kinds of layer at rank 2 beat queries alone at rank 128 by {size}."
    },
    "All kinds at r=2 beat q,k,v,o at r=128": {
        "holds": "All nine kinds at rank 2 beat attention's four even at rank 128, by {size}.",
        "does not hold": "But attention's four kinds at rank 128 are {size} better than all nine at rank 2. The "
        "paper's model is fifty times larger, so that its rank 2 has many times as many values; that may be why.",
    },
    "With all kinds the rank does not matter (r=128 against 2)": {
        "holds": "With all kinds the rank does not matter ({low} to {high}).",
        "does not hold": "With all kinds the rank matters here: 128 is {size} better than 2 ({low} to {high}), each "
        "with the learning rate that is the best for it.",
    },
    "LoRA on all kinds equals full fine-tuning": {
        "holds": "LoRA on all kinds at rank 128 is as good as full fine-tuning on the test split ({low} to {high}).",
    },
}

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
    begun = [table for table in defined(kept) if _begun(found[table.name])]
    figures.save({"tables": found, "curves": kept.curves(begun)}, RESULTS)
    print(f"written: {DOCS / 'reproduction.md'}")


def _begun(table: dict) -> bool:
    """Whether there is anything to compare."""
    return sum("f1" in row for row in table["rows"]) > 1


def defined(kept: Kept) -> list[Table]:
    """The tables that the page has; of those beyond the paper the rows that have been run."""
    config = next(result["model"] for result in kept.by_runs.values() if "model" in result)  # joins have none
    beyond = (ablation(LlamaConfig.from_dict(config), 8), kept.beside_again.at_own_rates(methods())[0])
    return [table1(LABELS, SHOTS, None), table2(LABELS), table3(RATES), table4(), TRIALS, *map(kept.begun, beyond)]


def summaries(kept: Kept) -> dict[str, dict]:
    """The tables' summaries by their names. Those beyond the paper were run on another machine than most of the paper's
    tables: the rows that they share are taken from there, too."""
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
            lines.append(f"| {_flags(group[0][1]['runs'][0])} | {runs} |")
    if not lines:
        return []
    deviation = statistics.mean(variances) ** 0.5
    return [
        "Intervals are over documents, and leave out what training again changes. Where that was tried, with another "
        f"seed or on another machine, F1 has a standard deviation of {deviation:.1f} points, about "
        f"{deviation * 2**0.5:.1f} for a difference of two runs. A verdict that rests on one seed, above all one of "
        "equality, is about those runs.",
        "",
        "| flags | F1 (seed, machine) |",
        "| --- | --- |",
        *lines,
        "",
    ]


def conclusion(found: Mapping[str, dict]) -> list[str]:
    """What a reader should take from the verdicts, a paragraph a table, in the words of READINGS.

    Raises:
        SystemExit: a verdict has come out for which READINGS has no words.
    """
    parts = ["## What to conclude", ""]
    for name in PAPER:
        sentences = [reading(claim) for claim in found[name]["claims"] if "difference" in claim["by"]["exact"]]
        if sentences:
            parts += [f"**{found[name]['caption']}.** {' '.join(sentences)}", ""]
    return parts


def reading(claim: dict) -> str:
    exact = claim["by"]["exact"]
    low, high = (f"{100 * exact[end]:+.1f}" for end in ("low", "high"))
    difference = f"{100 * exact['difference']:+.1f}"
    if exact["verdict"] == "not decided":
        times = findings.to_decide(claim["equal"], *(exact[key] for key in ("difference", "low", "high")))
        certain = exact["low"] > 0 or exact["high"] < 0
        what = "zero is outside the interval, but whether the difference exceeds a point is open" if certain else "open"
        return (
            f"{claim['text']}: {what} ({difference}, {low} to {high}); about {times:.1f} times as many documents would "
            "decide it, if the difference stays what it is."
        )
    try:
        words = READINGS[claim["text"]][exact["verdict"]]
    except KeyError:
        raise SystemExit(f"READINGS has no words for {claim['text']!r}, which {exact['verdict']}: write them") from None
    return words.format(size=difference.strip("+-"), difference=difference, low=low, high=high)


# ---- beyond the paper's tables ----


def of_kinds(kept: Kept, table: dict) -> list[str]:
    """What the ablation says in a paragraph."""
    if not _begun(table):
        return []
    rates: dict[bool, set[str]] = {}
    for title, rank in (row["title"] for row in table["rows"]):
        rates.setdefault(title.endswith(" alone"), set()).add(f"{rate(int(rank), kept.rates, None):g}")
    f1 = {row["title"][0]: row["f1"] for row in table["rows"]}
    alone = sorted((value, title.removesuffix(" alone")) for title, value in f1.items() if title.endswith(" alone"))
    (least, worst), (most, strongest) = alone[0], alone[-1]
    by_verdict: dict[str, list[str]] = {}
    for claim in table["claims"]:
        by_verdict.setdefault(claim["by"]["exact"]["verdict"], []).append(claim["a"][0].removeprefix("all but "))
    words = {
        "holds": "All but one of these are as good as all nine, within a point: {}.",
        "does not hold": "All but one of these differ from all nine by more than a point: {}.",
        "not decided": "Whether all but one of these are as good is open: {}.",
    }
    missing = [title for kind in KINDS for title in (f"{kind} alone", f"all but {kind}") if title not in f1]
    not_run = f" Not run: {', '.join(missing)}." if missing else ""
    return [
        f"With as many parameters as all nine have together, which reach {report.percent(f1['all nine'])}, a kind "
        f"alone reaches {report.percent(least)} ({worst}) to {report.percent(most)} ({strongest}). "
        + " ".join(words[verdict].format(", ".join(by_verdict[verdict])) for verdict in words if verdict in by_verdict)
        + not_run,
        "",
        f"A kind alone was trained with the learning rate {', '.join(sorted(rates[True]))}, all else with "
        f"{', '.join(sorted(rates[False]))}: the best of the nearest rank with all nine kinds, not chosen for the row. "
        "Some of what separates the kinds may be that.",
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


def beyond(kept: Kept) -> list[str]:
    """What to conclude about what the paper leaves open: how long, and with what method."""
    searched = {"epochs", "lr", "dropout", "batch_sentences", "eval_every", "precision"}
    by_length: dict[str, dict[int, float]] = {}
    for result in _recipes(kept):
        run = result["runs"][0]
        rest = deciding(Settings(**run)).keys() - searched
        if rest <= {"rank"} or run["method"] == "full":
            name = "full fine-tuning" if run["method"] == "full" else f"rank {run['rank']}"
            by_length.setdefault(name, {}).setdefault(run["epochs"], result["micro"]["f1"])
    longer = [
        f"{name} from {report.percent(those[1])} to {report.percent(max(those.values()))}"
        for name, those in by_length.items()
        if 1 in those and len(those) > 1
    ]
    sentences = []
    if longer:
        sentences.append(f"More epochs, at lower rates, take {', '.join(longer)} (the best of each length).")
    tried = kept.beside_again.at_own_rates(methods())[1]
    ours = tried.pop("LoRA")
    at_ours = [those[lr] for those in tried.values() if (lr := max(ours, key=ours.__getitem__)) in those]
    own = [max(those.values()) for those in tried.values() if those]
    if at_ours and own:
        sentences.append(
            "How LoRA's relatives compare depends on the learning rate: at LoRA's they score "
            f"{report.percent(min(at_ours))} to {report.percent(max(at_ours))}, at their own "
            f"{report.percent(min(own))} to {report.percent(max(own))}, LoRA {report.percent(max(ours.values()))}."
        )
    return [f"**Beyond the paper.** {' '.join(sentences)}", ""] if sentences else []


def best(kept: Kept) -> list[str]:
    """The search for the best recipe: all that was tried with one model for both labels, the best ones shown."""
    tried = _recipes(kept)
    chosen, test = next((pair for result in tried for pair in scored(kept, result)), (tried[0], None))
    lines = ["| flags | F1 | 95 % interval | trainable |", "| --- | ---: | ---: | ---: |"]
    for result in tried[:SHOWN]:
        low, high = (report.percent(result["interval"][end]) for end in ("low", "high"))
        lines.append(
            f"| {_flags(result['runs'][0])} | {report.percent(result['micro']['f1'])} | {low} – {high} | "
            f"{result['trainable']:,} |"
        )
    parts = [
        "## The best that this model can do",
        "",
        f"{len(tried)} recipes with one model for both labels were tried, and scored on the whole development split. "
        f"The best {min(SHOWN, len(tried))}, each as `llamalora train --model weights/smollm2-135m --data data/bc5cdr` "
        "makes it with these flags:",
        "",
        *lines,
        "",
    ]
    if test:
        low, high = (report.percent(test["interval"][end]) for end in ("low", "high"))
        own = ", ".join(f"{label} {report.percent(counts['f1'])}" for label, counts in test["types"].items())
        cited = "; ".join(f"{system} with {model} {f1}" for system, model, f1 in TABLE4)
        encoders = "; ".join(
            f"{name} {', '.join(f'{label} {f1}' for label, f1 in scores.items())}" for name, scores in ENCODERS.items()
        )
        which = "The first of them"
        if runs_of(chosen) != runs_of(tried[0]):
            which = f"The models of those above it were not kept: {_flags(chosen['runs'][0])}"
        if chosen.get("constrained"):
            which += f", with `--constrain` ({report.percent(chosen['micro']['f1'])} on the development split)"
        parts += [
            f"{which}, was scored once on the test split: "
            f"**{report.percent(test['micro']['f1'])}** ({low} – {high}; {own}). The paper's Table 4 has {cited}. "
            "Encoders of 110 million parameters that were pretrained on biomedical text and label tokens, a model per "
            f"label, as published (BLURB, arXiv 2007.15779): {encoders}.",
            "",
        ]
    return [*parts, *mistakes(chosen), *picture(chosen)]


def _recipes(kept: Kept) -> list[dict]:
    """The results of all recipes with one model for both labels, on the development split, the best first."""
    tried = [
        result
        for (_, split), result in kept.by_runs.items()
        if split == "dev" and [(run["labels"], run["seed"]) for run in result["runs"]] == [("all", 0)]
    ]
    return sorted(tried, key=lambda result: -result["micro"]["f1"])


def scored(kept: Kept, result: dict) -> list[tuple[dict, dict]]:
    """A result on the development split with the one on the test split, if there is one; both as the system was chosen,
    free or with constrained answers."""
    key = runs_of(result)
    pairs = ([kept.by_runs.get((key, split + how)) for split in ("dev", "test")] for how in (", constrained", ""))
    return [(dev, test) for dev, test in pairs if dev and test]


def mistakes(result: dict) -> list[str]:
    """What kinds of mention a system misses, on the development split."""
    errors = result["errors"]
    kinds = {"both": errors["kinds"]["all"], **errors["kinds"]["types"]}
    columns = ("correct", "boundary", "type", "boundary_and_type", "missing", "spurious")
    lines = ["| label | mentions | " + " | ".join(columns).replace("_", " ") + " |", "| --- " + "| ---: " * 7 + "|"]
    for label, counts in kinds.items():
        lines.append(
            f"| {label} | {counts['support']:,} | " + " | ".join(f"{counts[kind]:,}" for kind in columns) + " |"
        )
    seen = {name: 100 * errors["seen"][name]["recall"] for name in ("seen", "unseen")}
    by_words = ""
    if words := errors.get("words"):
        shares = ", ".join(f"{name}: {100 * row['correct'] / row['gold']:.0f} %" for name, row in words.items())
        by_words = f" By the number of words in a mention it finds: {shares}."
    return [
        "### What it gets wrong",
        "",
        _flags(result["runs"][0]) + " with `--constrain`" * result.get("constrained", False) + ", on the development "
        "split:",
        "",
        *lines,
        "",
        f"It finds {seen['seen']:.0f} % of the mentions that a training sentence has, letter by letter, and "
        f"{seen['unseen']:.0f} % of the others.{by_words}",
        "",
    ]


def _flags(run: Mapping) -> str:
    """The settings of a run that decide its result, as flags of `train`."""
    flags = []
    for name, value in deciding(Settings(**run)).items():
        if name not in ("precision", "seed"):
            flags.append(flag(name) if value is True else f"{flag(name)} {value:g}" if isinstance(value, float)
                         else f"{flag(name)} {value}")  # fmt: skip
    return f"`{' '.join(flags)}`"


def picture(result: dict) -> list[str]:
    """Of that system's answers; made by hand (a browser's picture of the page), again when another is the one shown."""
    flags = "--data data/sample --split test" + " --constrain" * result.get("constrained", False)
    return [
        f"`eval.py --run RUN {flags} --html FILE` shows its errors, here in the sample's invented text, since BC5CDR's "
        "belongs to others; it was trained on none of it:",
        "",
        "![predictions beside gold, the errors alone](results/predictions.png)",
        "",
    ]


# ---- how ----


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
    main()
