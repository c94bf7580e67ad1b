"""The result of `inspect` as a table for the terminal, PNG heat maps, and one HTML page that needs no other file."""

import html
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from ..drawing import new_figure
from ..html_template import fill
from ..text_table import aligned, legend, wrapped

PAGE = Path(__file__).with_name("page.html")
PHI_GRID = 16  # the page shows phi(i, j) for at most this many i and j


@dataclass(frozen=True)
class Metric:
    """One figure of a matrix: the name of its column, its title, what it means in a line, and at length."""

    short: str
    title: str
    gist: str
    meaning: str
    digits: int = 3


METRICS = {
    "norm": Metric("|dW|", "Norm of the update", "Frobenius norm of scale·BA", "Frobenius norm of scale·BA."),
    "ratio": Metric(
        "|dW|/|W0|", "Norm against W0", "that norm over that of W0", "Frobenius norm of scale·BA over that of W0."
    ),
    "effective_rank": Metric(
        "eff.rank",
        "Effective rank",
        "how many directions the update spreads over",
        "exp of the entropy of the normalised singular values (Roy and Vetterli 2007): how many directions the "
        "update spreads over.",
    ),
    "used": Metric("used", "Share of the rank used", "effective rank over r", "Effective rank over r.", 2),
    "stable_rank": Metric(
        "stab.rank",
        "Stable rank",
        "|dW|² over the largest singular value²: how many carry its size",
        "Squared Frobenius norm over squared largest singular value: how many directions carry its size.",
    ),
    "energy_rank": Metric(
        "99%",
        "Directions for 99 %",
        "how many singular values hold 99 % of |dW|²",
        "Singular values that hold 99 % of the squared norm.",
    ),
    "amplification": Metric(
        "amplif.",
        "Amplification factor",
        "how much stronger than in W0 the update's directions become",
        "Norm of the update over that of UᵀW0V, U and V its singular directions (Hu et al. 2022, 7.3): how much "
        "stronger than in W0 these directions become.",
    ),
    "overlap_left": Metric(
        "in W0:out",
        "Overlap with W0, rows",
        "share of its ten leading left directions in W0's r leading ones",
        "Share of the update's ten leading left directions that lies in W0's r leading ones; by chance r over the "
        "number of rows.",
        2,
    ),
    "overlap_right": Metric(
        "in W0:in",
        "Overlap with W0, columns",
        "share of its ten leading right directions in W0's r leading ones",
        "Share of the update's ten leading right directions that lies in W0's r leading ones; by chance r over the "
        "number of columns.",
        2,
    ),
    "intruders": Metric(
        "intruders",
        "Intruder dimensions",
        "leading directions of W0 + dW that resemble none of W0's",
        "Leading left singular vectors of W0 + scale·BA that resemble none of W0 (Shuttleworth et al. 2024).",
    ),
    "similarity_A": Metric(
        "phi A",
        "Similarity of A",
        "share of directions that the two adapters' A have in common",
        "phi(r, r) of the two adapters' right singular directions of A (Hu et al. 7.2).",
        2,
    ),
    "similarity_B": Metric(
        "phi B",
        "Similarity of B",
        "share of directions that the two adapters' B have in common",
        "phi(r, r) of the two adapters' left singular directions of B (Hu et al. 7.2).",
        2,
    ),
}


def present(result: dict) -> list[str]:
    """The metrics that the result has, in the order of `METRICS`."""
    return [name for name in METRICS if any(name in kind for kind in result["kinds"].values())]


def number(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, in the form 1e-5 only where it is tiny or huge."""
    value = float(f"{value:.{digits}g}") if abs(value) < 10**6 else value
    if value == int(value) and abs(value) < 10**6:
        return str(int(value))
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


# ---- terminal ----


def format_table(result: dict) -> str:
    """Medians by kind of layer, the matrices at either end of each metric, and what the metrics are."""
    metrics = present(result)
    head = ["kind", "matrices", "parameters", *(METRICS[name].short for name in metrics)]
    rows = [head]
    for kind, figures in result["kinds"].items():
        row = [kind, str(figures["count"]), f"{figures['parameters']:,}"]
        for name in metrics:
            row.append(number(figures[name]["median"], METRICS[name].digits) if name in figures else "-")
        rows.append(row)
    words = legend({METRICS[name].short: METRICS[name].gist for name in metrics})
    table = aligned(rows)
    extremes = f"largest and smallest (above are medians)\n{_extremes(result, metrics)}"
    return f"{table}\n\n{extremes}\n\n{words}"


def _extremes(result: dict, metrics: list[str], count: int = 3) -> str:
    lines = []
    for name in metrics:
        having = sorted((m for m in result["matrices"] if name in m), key=lambda matrix: -matrix[name])
        if len({number(m[name]) for m in having}) < 2:
            continue
        top, bottom = having[:count], having[count:][-count:]
        shown = [", ".join(f"{label(m)}\N{NO-BREAK SPACE}{number(m[name])}" for m in part) for part in (top, bottom)]
        line = wrapped(f"  {METRICS[name].short:<10} {' ... '.join(part for part in shown if part)}", indent=13)
        lines.append(line.replace("\N{NO-BREAK SPACE}", " "))
    return "\n".join(lines)


def label(matrix: dict) -> str:
    """`11.down` for the down projection of block 11."""
    return matrix["kind"] if matrix["layer"] is None else f"{matrix['layer']}.{matrix['kind']}"


# ---- PNG ----


def save_heatmap(result: dict, metric: str, path: Path) -> None:
    """One metric by layer (from left to right, embedding and head at the ends) and kind of layer."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.patches import Rectangle

    matrices = [matrix for matrix in result["matrices"] if metric in matrix]
    kinds = [kind for kind in result["kinds"] if kind not in ("embed", "head")]
    blocks = 1 + max((matrix["layer"] for matrix in result["matrices"] if matrix["layer"] is not None), default=-1)
    height = max(1, len(kinds))
    values = [matrix[metric] for matrix in matrices]
    least = min((value for value in values if value > 0), default=0)
    # an embedding may differ from the rest by orders of magnitude, and would leave one colour to these
    wide = max(values) > 10 * least > 0
    norm = LogNorm(least, max(values)) if wide else Normalize(min(values), max(values))

    figure = new_figure(1.7 + 0.3 * (blocks + 3.4), 1.1 + 0.3 * height)
    axes = figure.subplots()
    colours = axes.imshow([[math.nan]], cmap="viridis", norm=norm)  # gives the legend its scale
    for x, y in [(block, row) for block in range(blocks) for row in range(len(kinds))]:
        axes.add_patch(Rectangle((x, y), 1, 1, facecolor="none", edgecolor="0.8", hatch="////", linewidth=0))
    ends = {kind: x for kind, x in {"embed": -1.5, "head": blocks + 0.5}.items() if kind in result["kinds"]}
    for matrix in matrices:
        x = ends.get(matrix["kind"], matrix["layer"])
        y, tall = (0, height) if matrix["layer"] is None else (kinds.index(matrix["kind"]), 1)
        colour = colours.cmap(norm(max(matrix[metric], least) if wide else matrix[metric]))
        axes.add_patch(Rectangle((x, y), 1, tall, facecolor=colour, edgecolor="white"))
    ticks = list(range(0, blocks, 1 if blocks <= 16 else 4))
    axes.set_xticks([x + 0.5 for x in (*ticks, *ends.values())], [*map(str, ticks), *ends])
    axes.set_yticks([row + 0.5 for row in range(len(kinds))], kinds)
    axes.set(xlim=(-1.7 if "embed" in ends else 0, blocks + (1.7 if "head" in ends else 0)), ylim=(height, 0))
    axes.set(xlabel="layer", aspect="equal")
    axes.set_title(METRICS[metric].title, loc="left", fontsize=11)
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    legend = axes.inset_axes((1.01, 0, 0.02 if blocks > 8 else 0.05, 1))
    figure.colorbar(colours, cax=legend).outline.set_visible(False)
    legend.tick_params(labelsize=8)
    figure.savefig(path)


# ---- HTML ----


def html_page(result: dict) -> str:
    """The page, with its data, style and script inside: it opens from a file, and loads nothing."""
    metrics = present(result)
    data = {
        "metrics": {name: asdict(METRICS[name]) for name in metrics},
        "kinds": list(result["kinds"]),
        "epsilon": result["epsilon"],
        "matrices": [_for_page(matrix) for matrix in result["matrices"]],
    }
    facts = [
        f"{len(result['matrices'])} matrices",
        f"{sum(kind['parameters'] for kind in result['kinds'].values()):,} parameters",
        "rank " + ", ".join(map(str, sorted({matrix["rank"] for matrix in result["matrices"]}))),
    ]
    facts += [f"{title} {result[name]}" for name, title in (("model", "base"), ("against", "against")) if result[name]]
    terms = ((html.escape(METRICS[name].title), html.escape(METRICS[name].meaning)) for name in metrics)
    return fill(
        PAGE,
        _rounded(data),
        title=html.escape(result["adapter"]),
        facts=html.escape(" · ".join(facts)),
        table=_html_table(result, metrics),
        meanings="".join(f"<dt>{title}</dt><dd>{meaning}</dd>\n" for title, meaning in terms),
    )


def _for_page(matrix: dict) -> dict:
    """phi thinned out: at rank 128 it would be most of the page."""
    shown = {name: value for name, value in matrix.items() if not name.startswith("phi_")}
    for name in ("phi_A", "phi_B"):
        if name in matrix:
            rows, columns = (_spread(size) for size in (len(matrix[name]), len(matrix[name][0])))
            phi = [[matrix[name][i - 1][j - 1] for j in columns] for i in rows]
            shown[name] = {"i": rows, "j": columns, "phi": phi}
    return shown


def _spread(size: int) -> list[int]:
    """At most `PHI_GRID` numbers from 1 to size, evenly spread."""
    steps = min(size, PHI_GRID)
    return [1 + round(step * (size - 1) / max(1, steps - 1)) for step in range(steps)]


def _rounded(value):
    """Five significant digits are more than a page can show, and a third of the bytes."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def _html_table(result: dict, metrics: list[str]) -> str:
    """A row for each figure, a column for each kind."""
    kinds = result["kinds"]
    table = {
        "matrices": [str(figures["count"]) for figures in kinds.values()],
        "parameters": [f"{figures['parameters']:,}" for figures in kinds.values()],
    } | {METRICS[name].title: [_spread_of(figures, name) for figures in kinds.values()] for name in metrics}
    rows = ["<tr>" + "".join(f'<th scope="col">{cell}</th>' for cell in ("", *kinds)) + "</tr>"]
    for title, values in table.items():
        cells = "".join(f'<td data-kind="{kind}">{cell}</td>' for kind, cell in zip(kinds, values, strict=True))
        rows.append(f'<tr><th scope="row">{html.escape(title)}</th>{cells}</tr>')
    return "<table>\n" + "\n".join(rows) + "\n</table>"


def _spread_of(figures: dict, name: str) -> str:
    """The median, below it the least and the largest, if these differ."""
    if name not in figures:
        return "–"
    least, middle, largest = (
        number(figures[name][key], METRICS[name].digits) for key in ("least", "median", "largest")
    )
    return middle if least == largest else f"{middle}<small>{least} – {largest}</small>"
