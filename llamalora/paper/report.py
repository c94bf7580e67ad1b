"""Tables as Markdown, and as text for a terminal of 80 columns."""

from dataclasses import dataclass

from ..evaluation.result import WORDS
from ..text_table import aligned, used, wrapped


@dataclass(frozen=True)
class Section:
    """A table in both forms, and the words in it that a reader cannot know."""

    markdown: str
    plain: str
    words: dict[str, str]


def counted(title: str, text: str) -> Section:
    """A table that is text already."""
    return Section(f"## {title}\n\n```\n{text}\n```", f"{wrapped(title)}\n\n{text}", {})


def trained(summary: dict) -> Section:
    """A table of `findings.summarise`: a grid for Table 3, else a line a row; then the verdicts."""
    head, rows, titles = _grid(summary) if summary["name"] == "3" else _list(summary)
    title = _title(summary)
    failed = [f"\n{row_title(row)} failed: {row['error']}" for row in summary["rows"] if "error" in row]
    claims = [(claim["text"], _verdicts(claim)) for claim in summary["claims"]]
    markdown = [f"## {title}", "", *_markdown(head, rows, titles), *failed]
    plain = [wrapped(title), "", _plain(head, rows, titles)]
    plain += map(wrapped, failed)
    for text, found in claims:
        markdown += ["", f"**{text}**: {found}"]
        plain += ["", wrapped(f"{text}:\n    {found}", indent=4)]
    return Section("\n".join(markdown), "\n".join(plain), used(WORDS, ", ".join(head)))


def _markdown(head: list[str], rows: list[list[str]], titles: int) -> list[str]:
    line = ["---"] * titles + ["---:"] * (len(head) - titles)
    return ["| " + " | ".join(cells) + " |" for cells in (head, line, *rows)]


def _plain(head: list[str], rows: list[list[str]], titles: int) -> str:
    """What the paper has, the last column, stands beside ours; a long head is on two lines."""
    order = [*range(len(head))]
    if head[-1] == "paper":
        order.insert(titles + 1, order.pop())
    above, below = zip(*(head[column].rpartition(" ")[::2] for column in order), strict=True)
    return aligned([above, below, *([row[column] for column in order] for row in rows)], "l" * titles)


def _title(summary: dict) -> str:
    name = f"Table {summary['name']}" if summary["name"].isdigit() else summary["name"].capitalize()
    where = {"dev": "development", "test": "test"}[summary["split"]]
    return f"{name}: {summary['caption']} (F1 in percent, {where} split)"


def row_title(row: dict) -> str:
    return ", ".join(row["title"])


def percent(value: float | None, deviation: float | None = None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f}" + (f" ± {100 * deviation:.1f}" if deviation is not None else "")


def _ours(row: dict) -> str:
    return "failed" if "error" in row else percent(row.get("f1"), row.get("deviation"))


def _paper(row: dict) -> str:
    scale = {key: row[key] / 100 if row[key] is not None else None for key in ("paper", "paper_deviation")}
    return percent(scale["paper"], scale["paper_deviation"])


def _list(summary: dict) -> tuple[list[str], list[list[str]], int]:
    """Head, rows, and how many columns name a row."""
    head = [*summary["head"], "ours", "95 % interval", "first occurrence", "string set", "exact copies"]
    head += ["trainable", "minutes", "paper"]
    rows = []
    ranked = summary["name"] in ("recipe", "ablation", "methods")
    for row in sorted(summary["rows"], key=lambda row: -row.get("f1", -1)) if ranked else summary["rows"]:
        interval, secondary = row.get("interval"), row.get("secondary", {})
        rows.append([
            *row["title"],
            _ours(row),
            f"{percent(interval['low'])} – {percent(interval['high'])}" if interval else "–",
            percent(secondary.get("first_occurrence")),
            percent(secondary.get("string_set")),
            percent(row.get("exact_copy")),
            f"{row['trainable']:,.0f}" if "trainable" in row else "–",
            f"{row['seconds'] / 60:.1f}" if "seconds" in row else "–",
            _paper(row),
        ])  # fmt: skip
    return head, rows, len(summary["head"])


def _grid(summary: dict) -> tuple[list[str], list[list[str]], int]:
    """Targets by rank, the paper's in brackets."""
    ranks = list(dict.fromkeys(row["title"][1] for row in summary["rows"]))
    by_title = {tuple(row["title"]): row for row in summary["rows"]}
    rows = []
    for targets in dict.fromkeys(row["title"][0] for row in summary["rows"]):
        cells = (by_title[targets, rank] for rank in ranks)
        rows.append([targets, *(f"{_ours(cell)} ({_paper(cell)})" for cell in cells)])
    return ["ours (paper)", *(f"r={rank}" for rank in ranks)], rows, 1


def _verdicts(claim: dict) -> str:
    parts = []
    for convention, found in claim["by"].items():
        words = "" if convention == "exact" else " by first occurrence"
        numbers = ""
        if "difference" in found:
            low, high = (f"{100 * found[key]:+.1f}" for key in ("low", "high"))
            numbers = f" ({100 * found['difference']:+.1f} points{words}, 95 % interval {low} to {high})"
        parts.append(found["verdict"] + numbers)
    return parts[0] if claim["equal"] else "; ".join(dict.fromkeys(parts))
