"""What stands on the screen and in a log file while something takes long, and how text fits 80 columns."""

import io

import pytest

from llamalora import progress
from llamalora.commands import audit
from llamalora.evaluation import result
from llamalora.inspection import report
from llamalora.progress import Bar, duration
from llamalora.task import error_tables
from llamalora.text_table import aligned, legend, used, wrapped


@pytest.fixture
def shown(monkeypatch):
    """Works off steps of so many seconds, and returns what was written to standard error."""

    def work(seconds, terminal=False, notes=(), **how):
        now, stream = [0.0], io.StringIO()
        stream.isatty = lambda: terminal
        monkeypatch.setattr(progress, "clock", lambda: now[0])
        monkeypatch.setattr("sys.stderr", stream)
        with Bar("training", len(seconds), "step", **how) as bar:
            for index, gone in enumerate(seconds):
                now[0] += gone
                bar.update(note=notes[index] if notes else "")
        return stream.getvalue()

    return work


def test_a_log_has_a_line_for_each_part_of_the_work(shown):
    assert shown([4] * 12, leave=True).splitlines() == [
        "training: 3 of 12 steps, 0.25 steps/s, 36 s left",
        "training: 6 of 12 steps, 0.25 steps/s, 24 s left",
        "training: 9 of 12 steps, 0.25 steps/s, 12 s left",
        "training: 12 of 12 steps, 0.25 steps/s, in 48 s",
    ]


def test_slow_work_has_a_line_every_half_minute_and_quick_work_none_but_the_last(shown):
    lines = shown([6] * 400).splitlines()
    assert len(lines) == 80 - 1  # each fifth step, a part's end among them; the last one says nothing new
    assert lines[0] == "training: 5 of 400 steps, 0.167 steps/s, 40 min left"
    assert shown([0.001] * 400) == ""
    assert shown([0.001] * 400, leave=True) == "training: 400 of 400 steps, 1e+03 steps/s, in 0 s\n"


def test_a_note_takes_the_place_of_the_rate_and_what_was_done_before_does_not_count_for_it(shown):
    assert shown([30, 30], notes=["loss 2.0", "loss 1.0"], leave=True).splitlines() == [
        "training: 1 of 2 steps, loss 2.0, 30 s left", "training: 2 of 2 steps, loss 1.0, in 60 s"
    ]  # fmt: skip
    with Bar("training", 100, "step", done=90) as bar:
        bar.started -= 10
        bar.done += 5
        assert str(bar) == "training: 95 of 100 steps, 0.5 steps/s, 10 s left"


def test_a_terminal_has_a_bar_and_a_log_nothing_that_moves_the_cursor(shown):
    assert "\r" not in shown([40] * 3) and "\x1b" not in shown([40] * 3)
    drawn = shown([40] * 3, terminal=True, notes=["loss 2.0"] * 3, leave=True)
    assert "\rtraining" in drawn and "3/3" in drawn and "loss 2.0]" in drawn
    for terminal in (False, True):
        assert shown([40] * 3, terminal=terminal, hidden=True, leave=True) == ""


def test_bytes_of_an_unknown_number(monkeypatch):
    with Bar("data.zip", None, "B") as bar:
        monkeypatch.setattr(progress, "clock", lambda: bar.started + 2)
        bar.update(3 * 10**6)
        assert str(bar) == "data.zip: 3.00MB, 1.50MB/s"


def test_durations():
    assert [duration(seconds) for seconds in (0.2, 89, 90, 5399, 5400, 36000)] == [
        "0 s", "89 s", "2 min", "90 min", "1.5 h", "10.0 h"
    ]  # fmt: skip


# ---- 80 columns ----


def test_a_table_that_is_too_wide_goes_on_below():
    rows = [["", *(f"column {n:02}" for n in range(10))], ["a", *map(str, range(10))], ["bc", *"9876543210"]]
    first, second = aligned(rows).split("\n\n")
    assert first.splitlines()[0].split("  ")[1:] == ["", *(f"column {n:02}" for n in range(5))]
    assert second.splitlines()[0].split("  ")[1:] == ["", *(f"column {n:02}" for n in range(5, 10))]
    assert [line.split() for line in second.splitlines()[1:]] == [["a", *"56789"], ["bc", *"43210"]]
    assert all(len(line) <= 80 for line in aligned(rows).splitlines())
    # what fits is one table, to the last column; what can never fit stays whole
    assert "\n\n" not in aligned([["a" * 38, "b" * 40]]) and aligned([["x"]]) == "x"
    assert aligned([["a" * 50, "b" * 50, "c"]]) == f"{'a' * 50}  {'b' * 50}\n\n{'a' * 50}  c"
    # all columns that lean to the left in front say which row it is
    assert aligned([["a", "b", "c" * 50, "d" * 50]], "ll") == f"a  b  {'c' * 50}\n\na  b  {'d' * 50}"


def test_prose_is_broken_between_words_and_a_path_is_not():
    path = "/" + "x-y" * 40
    text = f"model      {path} (requested)\n\n  short,  as it is"
    assert wrapped(text, 11) == f"model\n           {path}\n           (requested)\n\n  short,  as it is"
    assert wrapped("word " * 20) == ("word " * 16).strip() + "\n" + ("word " * 4).rstrip()


@pytest.mark.parametrize("words", [
    result.WORDS | error_tables.WORDS, audit.WORDS, {metric.short: metric.gist for metric in report.METRICS.values()}
])  # fmt: skip
def test_each_word_is_explained_on_one_line(words):
    lines = legend(words).splitlines()
    assert lines[0] == "what the words mean" and len(lines) == 1 + len(words)
    assert all(len(line) <= 80 for line in lines)
    assert legend({}) == ""


def test_words_that_are_not_there_are_not_explained():
    words = {"one, two": "1 and 2", "three": "3"}
    assert used(words, "some two of them") == {"one, two": "1 and 2"} and used(words, "none") == {}


def test_troubles_that_there_were_are_explained():
    scored = {"health": {"exact_copy": 0.5, "unaligned": 2, "truncated": 0}}
    text = "outputs: 50.0 % exact copies; truncated 0, unaligned 2"
    assert [line.split("  ")[1] for line in result.format_legend(scored, text).splitlines()[1:]] == [
        "exact copies", "unaligned"
    ]  # fmt: skip
