"""What a reader of docs/reproduction.md should conclude, in words that follow from the results."""

from collections.abc import Mapping

from kept import Kept

from llamalora.lora.kinds import KINDS
from llamalora.paper import findings, report
from llamalora.paper.cells import deciding
from llamalora.paper.experiments import methods
from llamalora.paper.runner import rate
from llamalora.runs.settings import Settings

PAPER = ("1", "2", "3", "4")  # the paper's own tables
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


def of_kinds(kept: Kept, table: dict) -> list[str]:
    """What the ablation says in a paragraph."""
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
        "holds": "Eight kinds are as good as all nine, within a point, where the one left out is {}.",
        "does not hold": "They differ by more than a point where it is {}.",
        "not decided": "Whether they are as good is open where it is {}.",
    }
    missing = [title for kind in KINDS for title in (f"{kind} alone", f"all but {kind}") if title not in f1]
    not_run = f" Not run: {', '.join(missing)}." if missing else ""
    return [
        f"With as many parameters as all nine have together, which reach {report.percent(f1['all nine'])}, a kind "
        f"alone reaches {report.percent(least)} ({worst}) to {report.percent(most)} ({strongest}). "
        + " ".join(text.format(_or(by_verdict[verdict])) for verdict, text in words.items() if verdict in by_verdict)
        + not_run,
        "",
        f"A kind alone was trained with the learning rate {', '.join(sorted(rates[True]))}, all else with "
        f"{', '.join(sorted(rates[False]))}: the best of the nearest rank with all nine kinds, not chosen for the row. "
        "Some of what separates the kinds may be that.",
        "",
    ]


def _or(names: list[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def beyond(kept: Kept) -> list[str]:
    """What to conclude about what the paper leaves open: how long, and with what method."""
    searched = {"epochs", "lr", "dropout", "batch_sentences", "eval_every", "precision"}
    by_length: dict[str, dict[int, tuple[float, float]]] = {}  # F1 and dropout of the best of each length
    for result in kept.recipes():
        run = result["runs"][0]
        rest = deciding(Settings(**run)).keys() - searched
        if rest <= {"rank"} or run["method"] == "full":
            name = "full fine-tuning" if run["method"] == "full" else f"rank {run['rank']}"
            by_length.setdefault(name, {}).setdefault(run["epochs"], (result["micro"]["f1"], run["dropout"]))
    longer = []
    for name, by_epochs in by_length.items():
        f1, dropout = max(by_epochs.values())
        if 1 in by_epochs and len(by_epochs) > 1:
            how = f" (with dropout {dropout:g})" * bool(dropout)
            longer.append(f"{name} from {report.percent(by_epochs[1][0])} to {report.percent(f1)}{how}")
    sentences = [f"More epochs, at lower rates, take {', '.join(longer)}: the best of each length."]
    tried = kept.beside_again.at_own_rates(methods())[1]
    ours = tried.pop("LoRA")
    at_ours = [those[lr] for those in tried.values() if (lr := max(ours, key=ours.__getitem__)) in those]
    own = [max(those.values()) for those in tried.values()]
    sentences.append(
        "How LoRA's relatives compare depends on the learning rate: at LoRA's they score "
        f"{report.percent(min(at_ours))} to {report.percent(max(at_ours))}, at their own "
        f"{report.percent(min(own))} to {report.percent(max(own))}, LoRA {report.percent(max(ours.values()))}."
    )
    return [f"**Beyond the paper.** {' '.join(sentences)}", ""]
