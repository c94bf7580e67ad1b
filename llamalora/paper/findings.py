"""What the cells of a table say together: means over seeds, paired differences, and a verdict on each claim."""

import math
import statistics
from collections.abc import Sequence

import numpy as np

from ..task.score import bootstrap, paired_bootstrap
from .experiments import Claim, Row, Table

MARGIN = 0.01  # of F1: a smaller difference is called none. Those that the paper calls none are 0.3 and 0.4 points.
CONVENTIONS = ("exact", "first_occurrence")


def summarise(table: Table, results: dict[tuple[str, ...], list[dict]]) -> dict:
    """A table as JSON: each row's scores, the paper's beside them, and the claims' verdicts. F1 are fractions.

    Args:
        results: of each row, by its title, one for each seed.
    """
    rows = {row.title: _row(row, results[row.title]) for row in table.rows}
    return {
        "name": table.name,
        "caption": table.caption,
        "split": table.split,
        "head": list(table.head),
        "rows": list(rows.values()),
        "claims": [
            judge(claim, rows[claim.a], rows[claim.b]) for claim in table.claims if {claim.a, claim.b} <= rows.keys()
        ],
    }


def _row(row: Row, results: Sequence[dict]) -> dict:
    summary: dict = {"title": list(row.title), "paper": row.paper, "paper_deviation": row.deviation}
    errors = [result["error"] for result in results if "error" in result]
    if errors or not results:
        return summary | ({"error": errors[0]} if errors else {})
    f1 = [result["micro"]["f1"] for result in results]
    pooled = {name: pool(results, name) for name in CONVENTIONS}
    summary |= {
        "seeds": len(results),
        "f1": statistics.mean(f1),
        "deviation": statistics.stdev(f1) if len(f1) > 1 else None,
        "interval": bootstrap(pooled["exact"]),
        "by_document": {name: counts.tolist() for name, counts in pooled.items()},
    }
    if "health" not in results[0]:  # predictions that were made elsewhere
        return summary
    return summary | {
        "secondary": {
            name: statistics.mean(result["secondary"][name]["micro"]["f1"] for result in results)
            for name in results[0]["secondary"]
        },
        "exact_copy": statistics.mean(result["health"]["exact_copy"] for result in results),
        "trainable": results[0]["trainable"],
        "seconds": statistics.mean(result["seconds"] for result in results),
    }


def pool(results: Sequence[dict], convention: str) -> np.ndarray:
    """Counts of each document (documents, 3), summed over seeds: seeds are repetitions of one experiment, and what
    is drawn anew by the bootstrap is the documents."""
    return np.sum([list(result["by_document"][convention].values()) for result in results], axis=0)


def judge(claim: Claim, a: dict, b: dict) -> dict:
    """The difference of F1, A less B, with its 95 % interval, and the verdict under each scoring convention.

    A claim that A is better holds where the interval is above zero, and does not where it is below. A claim of
    equality holds where the interval is within `MARGIN` on either side of zero, and does not where it is
    outside of that. All else is not decided.
    """
    judged: dict = {"text": claim.text, "a": list(claim.a), "b": list(claim.b), "equal": claim.equal, "by": {}}
    for name in CONVENTIONS:
        if "f1" not in a or "f1" not in b:
            judged["by"][name] = {"verdict": "not decided (a cell has no result)"}
            continue
        if a["f1"] == b["f1"] == 0:
            judged["by"][name] = {"verdict": "not decided (neither has learnt anything)"}
            continue
        difference = paired_bootstrap(np.array(a["by_document"][name]), np.array(b["by_document"][name]))
        judged["by"][name] = difference | {"verdict": verdict(claim.equal, difference["low"], difference["high"])}
    return judged


def verdict(equal: bool, low: float, high: float) -> str:
    """`judge`, for one interval."""
    if equal:
        holds, fails = low > -MARGIN and high < MARGIN, low > MARGIN or high < -MARGIN
    else:
        holds, fails = low > 0, high < 0
    return "holds" if holds else "does not hold" if fails else "not decided"


def to_decide(equal: bool, difference: float, low: float, high: float) -> float:
    """How many times as many documents would decide a claim, if the difference stays what it is: the width of an
    interval falls with the root of their number."""
    distance = abs(abs(difference) - MARGIN) if equal else abs(difference)
    return (max(high - difference, difference - low) / distance) ** 2 if distance else math.inf
