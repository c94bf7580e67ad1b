"""The error analysis of `errors.py` as lines and tables for people."""

from ..text_table import aligned
from .errors import KINDS, RATES

WORDS = {
    "boundary, type, both": "overlaps gold with other ends, another label, or both",
    "missing, spurious": "gold without a prediction, a prediction without gold",
    "strict, exact": "place and label have to be right; only the place has to",
    "partial, type": "the place, half for an overlap; the label, at an overlap",
    "seen in training": "a training sentence has the mention, letter by letter",
    "calibration error": "how far confidence is from the share that is correct",
}
LONGEST_LABEL = 20  # characters that a table shows; with them the widest table has 78 columns


def format_summary(errors: dict) -> str:
    """A few lines for the end of a report."""
    schemes, seen, calibration = (errors[part] for part in ("schemes", "seen", "calibration"))
    micro = ", ".join(f"{name} {_percent(scheme['micro']['f1'])}" for name, scheme in schemes.items())
    lines = [
        "mentions: " + ", ".join(f"{_name(kind)} {errors['kinds']['all'][kind]}" for kind in KINDS),
        f"micro F1 by scheme: {micro}",
    ]
    if seen:
        known, new = (_percent(seen[part]["f1"]) for part in ("seen", "unseen"))
        lines.append(f"micro F1 of mentions seen in training {known}, of others {new}")
    if calibration:
        sure, right, gap = (_percent(calibration[name]) for name in ("confidence", "correct", "ece"))
        lines.append(f"confidence: mean {sure} %, correct {right} %, expected calibration error {gap}")
    return "\n".join(lines)


def format_tables(errors: dict) -> str:
    """The analysis as tables of at most 80 columns."""
    return "\n\n".join(f"{title}\n{aligned(rows)}" for title, rows in tables(errors))


def tables(errors: dict) -> list[tuple[str, list[tuple[str, ...]]]]:
    """The analysis as titles and rows of cells, the head first."""
    schemes, seen, words, calibration = (errors[part] for part in ("schemes", "seen", "words", "calibration"))
    kinds = [*errors["kinds"]["types"].items(), ("all", errors["kinds"]["all"])]
    by_kind = [(_short(name), *map(str, row.values())) for name, row in kinds]
    columns = [{**scheme["types"], "macro": scheme["macro"], "micro": scheme["micro"]} for scheme in schemes.values()]
    by_scheme = [(_short(name), *(_percent(column[name]["f1"]) for column in columns)) for name in columns[0]]
    found = [
        ("mentions by kind", [("", "gold", *map(_name, KINDS)), *by_kind]),
        ("F1 by scheme", [("", *schemes), *by_scheme]),
    ]
    if confused := _confused(errors["confusion"]):
        found.append(("labels confused", [("gold", "predicted", "mentions"), *confused]))
    if seen:
        rates = [
            (name, *(_percent(row[rate]) for rate in RATES), str(row["tp"] + row["fn"])) for name, row in seen.items()
        ]
        found.append(("mentions seen in training and unseen", [("", "P", "R", "F1", "gold"), *rates]))
    if words:
        shares = [
            (name, str(row["gold"]), _percent(row["correct"] / max(1, row["gold"]))) for name, row in words.items()
        ]
        found.append(("gold mentions by their words", [("", "gold", "found"), *shares]))
    if calibration:
        bins = [(f"{row['low']:.1f} to {row['high']:.1f}", row) for row in calibration["bins"]]
        rows = [
            (name, str(row["count"]), _percent(row["confidence"]), _percent(row["correct"]))
            for name, row in [*bins, ("all", calibration)]
        ]
        title = f"confidence (expected calibration error {_percent(calibration['ece'])})"
        found.append((title, [("", "mentions", "mean", "correct"), *rows]))
    return found


def _confused(confusion: dict, most: int = 10) -> list[tuple[str, str, str]]:
    """The commonest pairs of a gold label and another predicted one."""
    names = [_short(label) for label in confusion["labels"]]
    cells = [
        (number, names[row], names[column])
        for row, numbers in enumerate(confusion["counts"][:-1])
        for column, number in enumerate(numbers[:-1])
        if row != column and number
    ]
    return [
        (gold, predicted, str(number)) for number, gold, predicted in sorted(cells, key=lambda cell: -cell[0])[:most]
    ]


def _name(kind: str) -> str:
    return {"boundary_and_type": "both"}.get(kind, kind)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _short(label: str) -> str:
    return label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…"
