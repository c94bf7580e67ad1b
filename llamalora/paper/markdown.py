"""The paper's tables as Markdown: a grid for Table 3, else a line a row; then the verdicts on its claims."""


def table(summary: dict) -> str:
    """A table that `findings.summarise` made."""
    title = f"## Table {summary['name']}" if summary["name"].isdigit() else f"## {summary['name'].capitalize()}"
    where = {"dev": "development", "test": "test"}[summary["split"]]
    lines = [f"{title}: {summary['caption']} (F1 in percent, {where} split)", ""]
    lines += _grid(summary) if summary["name"] == "3" else _list(summary)
    lines += [f"\n{row_title(row)} failed: {row['error']}" for row in summary["rows"] if "error" in row]
    for claim in summary["claims"]:
        lines += ["", f"**{claim['text']}**: {_verdicts(claim)}"]
    return "\n".join(lines)


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


def _list(summary: dict) -> list[str]:
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
    return _markdown_table(head, rows, len(summary["head"]))


def _grid(summary: dict) -> list[str]:
    """Targets by rank, the paper's in brackets."""
    ranks = list(dict.fromkeys(row["title"][1] for row in summary["rows"]))
    by_title = {tuple(row["title"]): row for row in summary["rows"]}
    rows = []
    for targets in dict.fromkeys(row["title"][0] for row in summary["rows"]):
        cells = (by_title[targets, rank] for rank in ranks)
        rows.append([targets, *(f"{_ours(cell)} ({_paper(cell)})" for cell in cells)])
    return _markdown_table(["ours (paper)", *(f"r={rank}" for rank in ranks)], rows, 1)


def _markdown_table(head: list[str], rows: list[list[str]], left: int) -> list[str]:
    line = ["---"] * left + ["---:"] * (len(head) - left)
    return ["| " + " | ".join(cells) + " |" for cells in (head, line, *rows)]


def _verdicts(claim: dict) -> str:
    parts = []
    for convention, found in claim["by"].items():
        words = "" if convention == "exact" else " by first occurrence"
        numbers = ""
        if "difference" in found:
            low, high = (f"{100 * found[key]:+.1f}" for key in ("low", "high"))
            numbers = f" ({100 * found['difference']:+.1f} points{words}, 95 % interval {low} to {high})"
        parts.append(found["verdict"] + numbers)
    return parts[0] if claim["equal"] else "; ".join(parts)
