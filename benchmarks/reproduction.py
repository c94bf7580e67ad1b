#!/usr/bin/env python3
"""Writes docs/reproduction.md from docs/results/tables.json, which `python -m llamalora tables` wrote.

python -m llamalora tables recipe 1 2 3 4 --out runs/tables ...
cp runs/tables/tables.json docs/results/ && python benchmarks/reproduction.py
"""

import json
from dataclasses import fields
from pathlib import Path

from llamalora.paper import figures, report
from llamalora.paper.printed import RANKS
from llamalora.runs.settings import Settings

DOCS = Path(__file__).resolve().parents[1] / "docs"


def main() -> None:
    result = json.loads((DOCS / "results" / "tables.json").read_text())
    figures.save(result, DOCS / "results")
    (DOCS / "reproduction.md").write_text(document(result), encoding="utf-8")
    print(f"written: {DOCS / 'reproduction.md'}")


def document(result: dict) -> str:
    settings, machine, found = result["settings"], result["machine"], result["tables"]
    hours = sum(curve["seconds"] for curve in result["curves"].values()) / 3600
    steps = max((len(curve["loss"]) for curve in result["curves"].values()), default=0)
    seeds = ", ".join(map(str, result["seeds"]))
    scored = f"the first {settings['eval_limit']} sentences" if settings["eval_limit"] else "all sentences"
    learnt = f"the first {settings['limit_train']} sentences" if settings["limit_train"] else "all sentences"
    step = f"{settings['batch_sentences']} sentences" if settings["batch_sentences"] else "a number of tokens"
    parts = [
        "# The paper's tables again",
        "",
        "This page is written by `benchmarks/reproduction.py` from `docs/results/tables.json`; no figure is typed.",
        "",
        f"The paper fine-tunes Llama-2-7B. Here its questions are put to `{settings['model']}` on the paper's corpus "
        f"(`{settings['data']}`): the same formats, targets, ranks and scoring, another model and a smaller budget. "
        "The figures say whether the findings hold there; they are not the paper's figures.",
        "",
        *findings_at_a_glance(found),
        "## How it was run",
        "",
        "```",
        command(result),
        "```",
        "",
        f"- **Machine**: {machine['device']}, processes: {machine['processes']}, threads of each: "
        f"{machine['threads']}, torch {machine['torch']}; {len(result['curves'])} runs of {steps} steps at most, "
        f"{hours:.1f} hours of training and decoding in all, finished {result['date']}.",
        f"- **Budget**: {learnt} of the training split, {settings['epochs']} epoch, steps of "
        f"{step}, the same for every row; seed {seeds}; scores on {scored} of the development split (Table 4: of "
        "the test split, looked at once, by the systems of that table only).",
        f"- **Recipe**: AdamW, no weight decay, {settings['schedule']} schedule with "
        f"{100 * settings['warmup']:.0f} % warm-up, clipping at {settings['clip']:g}, dropout {settings['dropout']:g}, "
        f"scale 1 (equation 2), peak learning rate {settings['lr']:g} for every LoRA run and "
        f"{settings['lr_full']:g} for full fine-tuning, which is the one thing besides the trainable set in which "
        "these differ. The paper gives none of this.",
        "- **Intervals**: 95 %, bootstrap over documents, paired for differences. A claim that A is better holds where "
        "the interval is above zero. A claim of equality holds where it is within 1 point of zero on either side, and "
        "does not where it is outside of that. All else is not decided.",
        "",
        *how_the_recipe_was_chosen(found),
    ]
    for name in ("1", "2", "3", "4"):
        if name in found:
            parts += [report.trained(found[name]).markdown, ""]
        if name == "3" and name in found:
            parts += ["![F1 against trainable parameters](results/table3.png)", ""]
    parts += ["## Learning curves", "", "![loss of each run](results/curves.png)", "", *what_differs(result)]
    return "\n".join(parts)


def findings_at_a_glance(found: dict) -> list[str]:
    lines = ["## The findings", "", "| table | claim of the paper | verdict | A less B, points | 95 % interval |",
             "| --- | --- | --- | ---: | ---: |"]  # fmt: skip
    for table in (found[name] for name in ("1", "2", "3", "4") if name in found):
        for claim in table["claims"]:
            exact = claim["by"]["exact"]
            numbers = ["–", "–"]
            if "difference" in exact:
                low, high = (f"{100 * exact[end]:+.1f}" for end in ("low", "high"))
                numbers = [f"{100 * exact['difference']:+.1f}", f"{low} to {high}"]
            lines.append("| " + " | ".join([table["name"], claim["text"], exact["verdict"], *numbers]) + " |")
    return [*lines, ""]


def how_the_recipe_was_chosen(found: dict) -> list[str]:
    if "recipe" not in found:
        return []
    by_rate: dict[str, list[float]] = {}
    for row in found["recipe"]["rows"]:
        if row["title"][0] == "LoRA":
            by_rate.setdefault(row["title"][2], []).append(100 * row["f1"])
    means = ", ".join(f"{rate}: {sum(f1) / len(f1):.1f}" for rate, f1 in by_rate.items())
    return [
        "The learning rates were chosen on the development split among these trials; nothing else was searched. All "
        f"LoRA runs share one rate, that with the best mean F1 over both ranks ({means}). With scale 1 an update of "
        "higher rank moves more at the same rate, so that at a small budget rank and learning rate cannot be told "
        "apart: what the tables say of low ranks, they say of low ranks at this rate and this number of steps.",
        "",
        report.trained(found["recipe"]).markdown.replace("## Recipe", "### Trials"),
        "",
    ]


def what_differs(result: dict) -> list[str]:
    shown = [row["title"][1] for row in result["tables"].get("3", {"rows": []})["rows"]]
    missing = [str(rank) for rank in RANKS if str(rank) not in shown]
    lines = [
        "## What differs from the paper",
        "",
        f"- The model: `{result['settings']['model']}` instead of Llama-2-7B, which is SmolLM2-135M-*Instruct*, "
        "quantised to 4 bits and back (see `weights/README.md`). So the question of Table 1, chat model or base model, "
        "could not be asked.",
        "- Sentences are those of the official PubTator text, scored by exact offsets; the paper's text is tokenised.",
        f"- {len(result['seeds'])} seed where the paper has several in Tables 1 and 2."
        if len(result["seeds"]) == 1 else f"- Seeds: {len(result['seeds'])}.",
        "- The number of demonstrations in Table 1 is ours: 2.",
    ]  # fmt: skip
    if missing:
        lines.append(f"- Ranks {', '.join(missing)} of Table 3 were left out.")
    limits = [name for name in ("limit_train", "eval_limit") if result["settings"][name]]
    if limits:
        lines.append(
            "- A part of the corpus only: less is learnt than in the paper's runs, and the intervals are wide."
        )
    return [*lines, ""]


def command(result: dict) -> str:
    """What the results were made with, but for where model and data lay."""
    defaults = {field.name: field.default for field in fields(Settings)}
    settings = dict(result["settings"])
    settings.pop("batch_tokens", None)  # steps of tables are sentences
    flags = [f"--seeds {','.join(map(str, result['seeds']))}"]
    if settings["eval_limit"]:
        flags.append(f"--limit-eval {settings.pop('eval_limit')}")
    if "3" in result["tables"]:
        ranks = dict.fromkeys(row["title"][1] for row in result["tables"]["3"]["rows"])
        flags.append(f"--ranks {','.join(ranks)}")
    if "recipe" in result["tables"]:
        rows = result["tables"]["recipe"]["rows"]
        rates = dict.fromkeys(row["title"][2] for row in rows if row["title"][0] == "LoRA")
        flags.append(f"--rates {','.join(rates)}")
    for name, value in settings.items():
        if value != defaults.get(name) and value is not False:
            flags.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}"))
    lines, line = [], f"python -m llamalora tables {' '.join(result['tables'])}"
    for flag in flags:
        if len(line) + len(flag) > 100:
            lines.append(line + " \\")
            line = "   "
        line += f" {flag}"
    return "\n".join([*lines, line])


if __name__ == "__main__":
    main()
