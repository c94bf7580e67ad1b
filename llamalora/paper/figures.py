"""Figures of the paper's tables: F1 against parameters for Table 3, learning curves of all runs."""

from pathlib import Path

from ..cli import UsageError
from ..drawing import INK, dress, log_scale, need_matplotlib, new_figure, smooth, style


def save(result: dict, out: Path) -> None:
    """Writes `table3.png` and `curves.png` of what `tables.json` holds, as far as it has them; without matplotlib
    nothing."""
    try:
        need_matplotlib("figures are drawn")
    except UsageError:
        return
    if "3" in result["tables"]:
        save_grid(result["tables"]["3"], out / "table3.png")
    if any(curve["loss"] for curve in result["curves"].values()):
        save_curves(result["curves"], out / "curves.png")


def save_grid(table: dict, path: Path) -> None:
    """F1 against trainable parameters: a line for each set of targets, at each rank a disc with its number."""
    axes = (figure := new_figure(7, 4.2)).subplots()
    for index, targets in enumerate(dict.fromkeys(row["title"][0] for row in table["rows"])):
        rows = [row for row in table["rows"] if row["title"][0] == targets and "f1" in row]
        if not rows:
            continue
        x, y = [row["trainable"] for row in rows], [100 * row["f1"] for row in rows]
        reach = [[100 * abs(row["interval"][end] - row["f1"]) for row in rows] for end in ("low", "high")]
        axes.errorbar(
            x, y, reach, capsize=2, elinewidth=0.8, marker="o", markersize=13, markerfacecolor="white",
            markeredgewidth=1.2, label=targets, **style(index),
        )  # fmt: skip
        for row, place in zip(rows, zip(x, y, strict=True), strict=True):
            axes.annotate(row["title"][1], place, ha="center", va="center_baseline", fontsize=5.5, color=INK)
    axes.set(xlabel="trainable parameters (in the discs: the rank)", ylabel="F1 (%)")
    log_scale(axes, "x")
    dress(axes, "Target layers and rank, with 95 % intervals over documents")
    axes.legend(title="targets", frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), markerscale=0.5,
                handlelength=4, labelspacing=0.8)  # fmt: skip
    figure.savefig(path)


def save_curves(curves: dict, path: Path) -> None:
    """The loss of each run over its steps, smoothed: a panel for each table that the run is in, a style for each
    row, or for each label of a row whose labels have a model each."""
    by_table: dict[str, dict[str, list[dict]]] = {}
    for curve in curves.values():
        for table, row in curve["rows"]:
            by_table.setdefault(table, {}).setdefault(row, []).append(curve)
    by_table = dict(sorted(by_table.items(), key=lambda item: (not item[0].isdigit(), item[0])))
    heights = [max(2.6, 0.5 + 0.17 * len(rows)) for rows in by_table.values()]
    figure = new_figure(8, sum(heights))
    panels = figure.subplots(len(by_table), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, rows) in zip(panels, by_table.items(), strict=True):
        for index, (row, those) in enumerate(rows.items()):
            for label, one in zip([row, *[None] * len(those)], those, strict=False):
                loss = smooth(one["loss"])
                axes.plot(range(1, 1 + len(loss)), loss, label=label, **style(index))
        axes.set(xlabel="step", ylabel="loss (nats a token)")
        log_scale(axes, "y")
        dress(axes, f"Table {name}" if name.isdigit() else name.capitalize())
        axes.legend(
            frameon=False, fontsize=7, labelcolor=INK, loc="upper left", bbox_to_anchor=(1, 1), handlelength=3.6
        )
    figure.savefig(path)
