"""The search for the best recipe, and what the best system gets wrong, for docs/reproduction.md."""

from collections.abc import Mapping, Sequence

from kept import Kept

from llamalora.cli import flag
from llamalora.paper import report
from llamalora.paper.cells import deciding
from llamalora.paper.printed import TABLE4
from llamalora.runs.settings import Settings

SHOWN = 8  # of the best recipes
ENCODERS = {  # F1 on the test split, of Gu et al. 2021
    "BioBERT-base": {"Chemical": 92.9, "Disease": 84.7},
    "PubMedBERT-base": {"Chemical": 93.3, "Disease": 85.6},
}


def best(kept: Kept) -> list[str]:
    """The search for the best recipe: all that was tried with one model for both labels, the best ones shown."""
    tried = kept.recipes()
    pairs = sorted((pair for result in tried for pair in kept.scored(result)), key=lambda pair: -pair[0]["micro"]["f1"])
    lines = ["| flags | F1 | 95 % interval | trainable |", "| --- | ---: | ---: | ---: |"]
    longer = [result for result in tried[SHOWN:] if result["runs"][0]["epochs"] > 1]
    for result in [*tried[:SHOWN], *longer]:
        low, high = (report.percent(result["interval"][end]) for end in ("low", "high"))
        lines.append(
            f"| {flags(result['runs'][0])} | {report.percent(result['micro']['f1'])} | {low} – {high} | "
            f"{result['trainable']:,} |"
        )
    parts = [
        "## The best that this model can do",
        "",
        f"{len(tried)} recipes with one model for both labels were tried, and scored on the whole development split. "
        f"The best {SHOWN} and all of more than one epoch, each as `llamalora train --model weights/smollm2-135m "
        "--data data/bc5cdr` makes it with these flags:",
        "",
        *lines,
        "",
    ]
    cited = "; ".join(f"{system} with {model} {f1}" for system, model, f1 in TABLE4)
    encoders = "; ".join(
        f"{name} {', '.join(f'{label} {f1}' for label, f1 in scores.items())}" for name, scores in ENCODERS.items()
    )
    return [
        *parts,
        "Scored on the test split, each once; the first is the best of them on the development split:",
        "",
        *test_scores(pairs),
        "",
        f"The paper's Table 4 has {cited}. Encoders of 110 million parameters that were pretrained on biomedical text "
        f"and label tokens, a model per label, as published (BLURB, arXiv 2007.15779): {encoders}.",
        "",
        *mistakes(pairs[0][0]),
        *picture(pairs[0][0]),
    ]


def test_scores(pairs: Sequence[tuple[Mapping, Mapping]]) -> list[str]:
    """A table of systems' results on the development and the test split."""
    labels = [*pairs[0][1]["types"]]
    lines = [
        f"| flags | development | test | 95 % interval | {' | '.join(labels)} |",
        "| --- | ---: | ---: | ---: |" + " ---: |" * len(labels),
    ]
    for dev, test in pairs:
        low, high = (report.percent(test["interval"][end]) for end in ("low", "high"))
        scores = [dev["micro"], test["micro"], *(test["types"][label] for label in labels)]
        development, ours, *own = (report.percent(counts["f1"]) for counts in scores)
        cells = (flags(dev["runs"][0]) + _constrained(dev), development, f"**{ours}**", f"{low} – {high}", *own)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


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
        f"{flags(result['runs'][0])}{_constrained(result)}, on the development split:",
        "",
        *lines,
        "",
        f"It finds {seen['seen']:.0f} % of the mentions that a training sentence has, letter by letter, and "
        f"{seen['unseen']:.0f} % of the others.{by_words}",
        "",
    ]


def picture(result: dict) -> list[str]:
    """Of that system's answers; made by hand (a browser's picture of the page), again when another is the one shown."""
    options = "--data data/sample --split test" + " --constrain" * result.get("constrained", False)
    return [
        f"`eval.py --run RUN {options} --html FILE` shows its errors, here in the sample's invented text, since "
        "BC5CDR's belongs to others; it was trained on none of it:",
        "",
        "![predictions beside gold, the errors alone](results/predictions.png)",
        "",
    ]


def _constrained(result: Mapping) -> str:
    return " with `--constrain`" * result.get("constrained", False)


def flags(run: Mapping) -> str:
    """The settings of a run that decide its result, as flags of `train`."""
    given = []
    for name, value in deciding(Settings(**run)).items():
        if name not in ("precision", "seed"):
            given.append(flag(name) if value is True else f"{flag(name)} {value:g}" if isinstance(value, float)
                         else f"{flag(name)} {value}")  # fmt: skip
    return f"`{' '.join(given)}`"
