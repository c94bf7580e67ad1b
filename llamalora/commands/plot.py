"""Draws how the training of runs went, as a picture or for TensorBoard."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..cli import Parser, UsageError
from ..drawing import INK, dress, log_scale, marked, need_matplotlib, new_figure, smooth, style
from ..errors import InputError
from ..files import naming
from ..mistakes import is_run, wrong_folder

PICTURES = (".png", ".pdf", ".svg")
PICTURE = "curves.png"  # where no name is given
# figures of a step: title, whether it is drawn smoothed, on a logarithmic axis
OF_STEPS = {
    "loss": ("Loss, nats a supervised token (thin: each step)", True),
    "grad_norm": ("Norm of the gradient before clipping (thin: each step)", True),
    "lr": ("Learning rate", False),
}
TAGS = {"loss": "train/loss", "grad_norm": "train/gradient norm", "lr": "train/learning rate", "f1": "dev/F1"}


@dataclass(frozen=True)
class Curves:
    """What a run has recorded: for each figure the steps at which it is known, and its values.

    Attributes:
        series: `loss`, `grad_norm`, `lr` of each step; `f1` of each evaluation, in percent.
    """

    name: str
    series: dict[str, tuple[list[int], list[float]]]


def main(argv: list[str]) -> None:
    parser = Parser("plot", "RUN RUN2 --out curves.png", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder; the run may still be training")
    parser.add_argument(
        "--out", metavar="FILE", help=f"picture, {', '.join(PICTURES)} (default: {PICTURE}, in the run if it is one)"
    )
    parser.add_argument("--tensorboard", metavar="FOLDER", help="write event files there, and no picture without --out")
    arguments = parser.parse_args(argv)
    out = None if arguments.tensorboard and arguments.out is None else picture(arguments.out, arguments.runs)
    runs = [read_curves(Path(run), name) for run, name in zip(arguments.runs, names(arguments.runs), strict=True)]
    if arguments.tensorboard is not None:
        write_events(runs, Path(arguments.tensorboard))
        print(f"written to {arguments.tensorboard}; look at it with: tensorboard --logdir {arguments.tensorboard}")
    if out is not None:
        with naming(out):
            save_picture(runs, out)
        print(f"written to {out}")


def names(runs: Sequence[str]) -> list[str]:
    """The names of the folders, with so much of their paths that they differ.

    Raises:
        UsageError: one folder twice.
    """
    paths = [Path(run).resolve() for run in runs]
    for place, path in enumerate(paths):
        if path in paths[:place]:
            raise UsageError(f"{runs[place]}: is listed twice")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def picture(given: str | None, runs: Sequence[str]) -> Path:
    """Where the picture goes.

    Raises:
        UsageError: no place for a picture, or no matplotlib.
    """
    out = Path(given or (Path(runs[0]) / PICTURE if len(runs) == 1 else PICTURE))
    if out.suffix not in PICTURES or out.is_dir() or given and not out.parent.is_dir():
        raise UsageError(f"--out {out}: must be a file ending in {', '.join(PICTURES)}, in a folder that is there")
    need_matplotlib("plot draws")
    return out


def read_curves(run: Path, name: str) -> Curves:
    """What a run has recorded so far.

    Raises:
        InputError: no run, one without a step, or a line that this program has not written.
    """
    if not is_run(run):
        raise InputError(wrong_folder(run, "run folder", f"{run}: no run folder, for it has no config.json of a run"))
    steps = _records(run / "metrics.jsonl", ("loss", "lr"))
    if not steps:
        raise UsageError(f"{run}: the run has made no step yet")
    series = {}
    for figure in OF_STEPS:
        known = [line for line in steps if line.get(figure) is not None]  # a NaN is none
        series[figure] = [line["step"] for line in known], [line[figure] for line in known]
    scored = _records(run / "evaluations.jsonl", ("micro",))
    series["f1"] = [line["step"] for line in scored], [100 * line["micro"]["f1"] for line in scored]
    return Curves(name, series)


def _records(path: Path, wanted: Sequence[str]) -> list[dict]:
    """The JSON lines of a file, those of a crash's last moment left out; none without the file."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    found = []
    for number, line in enumerate(lines[:-1], 1):  # the last one is empty, or still being written
        try:
            record = json.loads(line)
            assert isinstance(record["step"], int) and all(name in record for name in wanted)
        except (ValueError, TypeError, KeyError, AssertionError):
            raise InputError(f"{path}:{number}: no line of a run") from None
        found.append(record)
    return found


def save_picture(runs: Sequence[Curves], out: Path) -> None:
    """Four panels over the steps of all runs: loss, F1, norm of the gradient, learning rate."""
    figure = new_figure(9, 6)
    grid = figure.subplots(2, 2, sharex=True)
    panels = dict(zip(("loss", "f1", "grad_norm", "lr"), grid.flat, strict=True))
    for index, run in enumerate(runs):
        for name, axes in panels.items():
            steps, values = run.series[name]
            if not steps:
                continue
            if name == "f1":
                axes.plot(steps, values, **marked(index))
                best = max(range(len(values)), key=values.__getitem__)
                axes.annotate(f"{values[best]:.1f}", (steps[best], values[best]), (0, 6), textcoords="offset points",
                              ha="center", fontsize=7, color=style(index)["color"])  # fmt: skip
            elif OF_STEPS[name][1]:
                axes.plot(steps, values, color=style(index)["color"], linewidth=0.6, alpha=0.35)
                axes.plot(steps, smooth(values), **style(index))
            else:
                axes.plot(steps, values, **style(index))
    for name, axes in panels.items():
        title, rough = OF_STEPS.get(name, ("F1 on the development split (%)", False))
        if rough and any(value > 0 for run in runs for value in run.series[name][1]):
            log_scale(axes, "y")
        dress(axes, title)
        if not any(run.series[name][0] for run in runs):
            axes.text(0.5, 0.5, "no evaluation yet", transform=axes.transAxes, ha="center", color=INK, fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("step")
    panels["f1"].margins(y=0.12)
    lines = [panels["lr"].plot([], [], label=run.name, **marked(index))[0] for index, run in enumerate(runs)]
    figure.legend(handles=lines, loc="outside lower center", ncols=2 if len(runs) > 1 else 1, frameon=False, fontsize=8,
                  labelcolor=INK, handlelength=3.6)  # fmt: skip
    figure.savefig(out)


def write_events(runs: Sequence[Curves], folder: Path) -> None:
    """A folder of event files for each run, with the scalars of `TAGS`.

    Raises:
        UsageError: no tensorboard, or a place that is not free.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("--tensorboard writes with tensorboard: pip install tensorboard") from None
    for run in runs:
        place = folder / run.name
        if folder.is_file() or place.exists():
            raise UsageError(f"--tensorboard {folder}: {place if place.exists() else folder} is there already")
    for run in runs:
        with SummaryWriter(str(folder / run.name)) as writer:
            for name, (steps, values) in run.series.items():
                for step, value in zip(steps, values, strict=True):
                    writer.add_scalar(TAGS[name], value, step)
