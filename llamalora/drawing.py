"""One style for all figures: colours that the colour-blind tell apart, and lines that do without colour.

matplotlib is optional (the extra `plots`), so it is imported where something is drawn.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .cli import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito 2008, without the yellow that is lost on white
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.4)), (0, (6, 1.5, 1.2, 1.5)))
MARKERS = "osD^vPX*<>"  # with 7 colours and 4 dashes no two of the first 70 lines look alike
INK, SOFT = "#222222", "#d9d9d9"
SMOOTHED = 0.1  # share of a run's steps over which its curve is averaged


def need_matplotlib(what: str) -> None:
    """Refuses what draws something where matplotlib is not installed.

    Args:
        what: as in `--out draws heat maps`.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UsageError(f"{what} with matplotlib: pip install 'llamalora[plots]'") from None


def new_figure(width: float, height: float) -> "Figure":
    """A figure of so many inches, whose parts make room for each other."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def style(index: int) -> dict:
    """How the line with this number is drawn."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)], "linewidth": 1.4}


def marked(index: int) -> dict:
    """How the line with this number is drawn through few points, each of which is marked."""
    return style(index) | {"marker": MARKERS[index % len(MARKERS)], "markersize": 4.5, "markeredgecolor": "white",
                           "markeredgewidth": 0.6}  # fmt: skip


def dress(axes: "Axes", title: str) -> None:
    """Title, two spines, a faint grid, and ticks by their rank: minor ones shorter, thinner and without a number."""
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.grid(which="major", color=SOFT, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(which="major", length=4, width=0.8, labelsize=8, color="#888888", labelcolor=INK)
    axes.tick_params(which="minor", length=2, width=0.5, labelsize=8, color="#888888", labelcolor=INK)
    axes.xaxis.label.set(fontsize=9, color=INK)
    axes.yaxis.label.set(fontsize=9, color=INK)


def log_scale(axes: "Axes", which: str) -> None:
    """A logarithmic `x` or `y` axis with plain numbers, some of them at minor ticks where there are few major ones."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    low, high = axis.get_view_interval()
    wide = high / low >= 100
    axis.set_major_locator(LogLocator(10, (1,) if wide else (1, 2, 5) if high / low > 4 else tuple(range(1, 10))))
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    axis.set_minor_locator(LogLocator(10, tuple(range(2, 10)) if wide else ()))
    axis.set_minor_formatter(NullFormatter())


def plain(value: float) -> str:
    """0.02, 3, 10 K, 1 M, 1e-05."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " K")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def smooth(values: Sequence[float]) -> list[float]:
    """The mean of each value and of as many before it as behind it, in all `SMOOTHED` of the run, fewer at its ends."""
    most, last = round(SMOOTHED * len(values)) // 2, len(values) - 1
    smoothed = []
    for place in range(len(values)):
        reach = min(most, place, last - place)
        around = values[place - reach : place + reach + 1]
        smoothed.append(sum(around) / len(around))
    return smoothed
