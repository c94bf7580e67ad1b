"""Figures of the paper's tables: F1 against parameters for Table 3, learning curves of all runs."""

from pathlib import Path

SMOOTHED = 0.1  # share of a run's steps over which its curve is averaged


def save(result: dict, out: Path) -> None:
    """Writes `table3.png` and `curves.png` of what `tables.json` holds, as far as it has them; without matplotlib
    nothing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return
    if "3" in result["tables"]:
        save_grid(result["tables"]["3"], out / "table3.png")
    if any(curve["loss"] for curve in result["curves"].values()):
        save_curves(result["curves"], out / "curves.png")


def save_grid(table: dict, path: Path) -> None:
    """F1 against trainable parameters: a line for each set of targets, a point for each rank."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4.2), dpi=150, layout="constrained")).subplots()
    for targets in dict.fromkeys(row["title"][0] for row in table["rows"]):
        rows = [row for row in table["rows"] if row["title"][0] == targets and "f1" in row]
        if not rows:
            continue
        x, y = [row["trainable"] for row in rows], [100 * row["f1"] for row in rows]
        reach = [[100 * abs(row["interval"][end] - row["f1"]) for row in rows] for end in ("low", "high")]
        axes.errorbar(x, y, reach, marker="o", capsize=2, linewidth=1, label=targets)
        for row, place in zip(rows, zip(x, y, strict=True), strict=True):
            axes.annotate(f"r={row['title'][1]}", place, (4, 4), textcoords="offset points", fontsize=7)
    axes.set(xscale="log", xlabel="trainable parameters", ylabel="F1 (%)")
    axes.set_title("Target layers and rank, with 95 % intervals over documents", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="targets", frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path)


def save_curves(curves: dict, path: Path) -> None:
    """The loss of each run over its steps, smoothed; a panel for each table, a colour for each row."""
    from matplotlib.figure import Figure

    by_table: dict[str, list[dict]] = {}
    for curve in curves.values():
        by_table.setdefault(curve["table"], []).append(curve)
    figure = Figure(figsize=(7, 2.9 * len(by_table)), dpi=150, layout="constrained")
    panels = figure.subplots(len(by_table), 1, squeeze=False)[:, 0]
    for axes, (name, those) in zip(panels, by_table.items(), strict=True):
        colours = {row: f"C{number % 10}" for number, row in enumerate(dict.fromkeys(one["row"] for one in those))}
        named = set()
        for one in those:
            label = None if one["row"] in named else one["row"]
            named.add(one["row"])
            dashed = "--" if list(colours).index(one["row"]) >= 10 else "-"
            axes.plot(smooth(one["loss"]), dashed, color=colours[one["row"]], linewidth=0.9, label=label)
        axes.set(yscale="log", xlabel="step", ylabel="loss (nats a token)")
        axes.set_title(f"Table {name}" if name.isdigit() else name, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path)


def smooth(losses: list[float]) -> list[float]:
    """The mean of each loss and of those before it, over `SMOOTHED` of the run."""
    window = max(1, round(SMOOTHED * len(losses)))
    return [sum(part) / len(part) for end in range(len(losses)) if (part := losses[max(0, end + 1 - window) : end + 1])]
