"""`plot`: what a run has recorded, as a picture and as event files."""

import json
import sys

import pytest

from llamalora.__main__ import main
from llamalora.cli import run_command
from llamalora.commands import plot
from llamalora.drawing import COLOURS, DASHES, MARKERS, marked, plain, style

LOSSES = [2.0, 1.0, 0.5, 0.25]


def write_run(folder, losses=LOSSES, scores=(0.1, 0.3), norms=None):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"settings": {}}')
    norms = norms or [1.0] * len(losses)
    steps = [
        {"step": step, "loss": loss, "lr": 0.1 / step, "grad_norm": norm}
        for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    scored = [{"step": 2 * number, "micro": {"f1": f1}} for number, f1 in enumerate(scores, 1)]
    if scored:
        (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in scored))
    return folder


def refusal(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as stop:
        run_command(main, ["plot", *map(str, argv)])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_what_a_run_has_recorded(tmp_path):
    run = write_run(tmp_path / "run", norms=[1.0, None, 3.0, 4.0])  # the second step was skipped
    found = plot.read_curves(run, "name")
    assert found.series["loss"] == ([1, 2, 3, 4], LOSSES)
    assert found.series["grad_norm"] == ([1, 3, 4], [1.0, 3.0, 4.0])
    assert found.series["f1"] == ([2, 4], [10.0, 30.0])
    # of a run that is being written to, the line that is not whole is left out
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert plot.read_curves(run, "name").series == found.series


@pytest.fixture
def lines(monkeypatch):
    """What is drawn: for each panel its lines, as (x, y, look)."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn = {}
    save = Figure.savefig

    def savefig(figure, *how):
        for axes in figure.axes:
            drawn[axes.get_title(loc="left").split()[0]] = [
                (list(line.get_xdata()), list(line.get_ydata()), (line.get_color(), line.get_linestyle()))
                for line in axes.lines if len(line.get_xdata())
            ]  # fmt: skip
        drawn["names"] = [text.get_text() for text in figure.legends[0].get_texts()]
        save(figure, *how)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return drawn


def test_a_picture_of_several_runs(lines, tmp_path, capsys):
    one, two = write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run", [3.0, 2.0], scores=())
    main(["plot", str(one), str(two), "--out", str(tmp_path / "both.png")])
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"written to {tmp_path / 'both.png'}\n"
    assert lines["names"] == ["a/run", "b/run"]
    assert [(x, y) for x, y, _ in lines["Loss,"]] == [([1, 2, 3, 4], LOSSES)] * 2 + [([1, 2], [3.0, 2.0])] * 2
    assert [(x, y) for x, y, _ in lines["F1"]] == [([2, 4], [10.0, 30.0])]
    assert [y for _, y, _ in lines["Learning"]] == [[0.1, 0.05, 0.1 / 3, 0.025], [0.1, 0.05]]
    looks = [look for _, _, look in lines["Learning"]]
    assert looks[0][0] != looks[1][0] and looks[0][1] != looks[1][1]


def test_of_one_run_the_picture_is_in_its_folder(lines, tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", [0.0, 0.0], scores=())  # no logarithm, no evaluation
    main(["plot", str(run)])
    assert (run / "curves.png").is_file() and lines["names"] == ["run"]
    monkeypatch.chdir(run)
    main(["plot", ".", "--out", "again.svg"])
    assert "<svg" in (run / "again.svg").read_text() and lines["names"] == ["run"]


def test_lines_differ_without_colour():
    assert len({(style(n)["color"], style(n)["linestyle"]) for n in range(len(COLOURS) * len(DASHES))}) == 28
    grey = {(style(n)["linestyle"], marked(n)["marker"]) for n in range(20)}
    assert len(grey) == 20 == len(DASHES) * len(MARKERS) // 2
    assert [plain(value) for value in (0.02, 3, 1500, 2e6, 7e9)] == ["0.02", "3", "1.5 K", "2 M", "7 B"]


def test_what_cannot_be_plotted(tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "run")
    assert "no such run folder" in refusal(capsys, tmp_path / "nowhere")
    assert "is listed twice" in refusal(capsys, run, tmp_path / "run" / ".." / "run")
    for out in (tmp_path, tmp_path / "none" / "x.png", tmp_path / "x.json"):
        assert f"--out {out}: must be a file ending in .png" in refusal(capsys, run, "--out", out)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_text('{"settings": {}}')
    assert "has made no step yet" in refusal(capsys, tmp_path / "new")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "lr": 0.1}\nnonsense\n')
    assert "metrics.jsonl:2: no line of a run" in refusal(capsys, run)
    for name, flags in {
        "matplotlib.figure": (),
        "torch.utils.tensorboard": ("--tensorboard", tmp_path / "events"),
    }.items():
        monkeypatch.setitem(sys.modules, name, None)
        package = {"matplotlib.figure": "'llamalora[plots]'"}.get(name, "tensorboard")
        assert f"pip install {package}" in refusal(capsys, write_run(tmp_path / package), *flags)
    assert not (tmp_path / "events").exists()


def test_event_files(tmp_path, capsys):
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", exc_type=ImportError)
    run = write_run(tmp_path / "run")
    main(["plot", str(run), "--tensorboard", str(tmp_path / "events")])
    assert not (run / "curves.png").exists()
    events = loading.EventAccumulator(str(tmp_path / "events" / "run"))
    events.Reload()
    loss = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert loss == list(enumerate(LOSSES, 1))
    assert [event.value for event in events.Scalars("dev/F1")] == pytest.approx([10, 30])
    assert set(events.Tags()["scalars"]) == set(plot.TAGS.values())
    assert "is there already" in refusal(capsys, run, "--tensorboard", tmp_path / "events")
