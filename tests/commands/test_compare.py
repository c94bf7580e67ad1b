"""compare, on files whose differences are known."""

import json
from pathlib import Path

import pytest

from llamalora.__main__ import main as command
from llamalora.cli import run_command
from llamalora.corpus.documents import Document, Span, sentence_bounds
from llamalora.corpus.pubtator import write_pubtator
from llamalora.task.score import document_counts, paired_bootstrap, score, span_keys

TEXTS = {"1": "Aspirin caused fever. Then nausea & rash.", "2": "No lead, no <gold> here.", "3": "Nothing at all."}
IDS = list(TEXTS)


def documents(**strings: str) -> list[Document]:
    """`d1="fever:Disease"` is a mention in document 1."""
    result = []
    for id, text in TEXTS.items():
        found = (item.split(":") for item in strings.get(f"d{id}", "").split())
        spans = sorted(Span(text.index(word), text.index(word) + len(word), label) for word, label in found)
        result.append(Document(id, text, tuple(spans), sentence_bounds(text)))
    return result


GOLD = documents(d1="Aspirin:Chemical fever:Disease nausea:Disease rash:Disease", d2="lead:Chemical <gold>:Chemical")
A = documents(d1="Aspirin:Chemical fever:Disease Then:Disease", d2="lead:Chemical here:Chemical")
B = documents(d1="Aspirin:Chemical nausea:Disease rash:Chemical", d2="here:Chemical <gold>:Chemical")


@pytest.fixture
def files(tmp_path):
    paths = []
    for name, made in {"gold": GOLD, "a": A, "b": B}.items():
        paths.append(tmp_path / f"{name}.PubTator.txt")
        with paths[-1].open("w", encoding="utf-8") as file:
            write_pubtator(made, file)
    return [str(path) for path in paths]


def compared(capsys, gold, *flags) -> dict:
    run_command(command, ["compare", "--gold", gold, *flags, "--json"])
    return json.loads(capsys.readouterr().out)


def test_counts_by_hand_and_the_paired_interval(files, capsys):
    gold, a, b = files
    result = compared(capsys, gold, a, b)
    assert result["found"] == {
        "Disease": {"both": 0, "only_a": 1, "only_b": 1, "neither": 1},
        "Chemical": {"both": 1, "only_a": 1, "only_b": 1, "neither": 0},
    }
    assert result["spurious"] == {
        "Disease": {"both": 0, "only_a": 1, "only_b": 0}, "Chemical": {"both": 1, "only_a": 0, "only_b": 1}
    }  # fmt: skip
    keys = [span_keys(made) for made in (GOLD, A, B)]
    counts = [document_counts(keys[0], predicted, IDS) for predicted in keys[1:]]
    assert {name: result["micro"][name] for name in ("difference", "low", "high")} == paired_bootstrap(*counts)
    for name, predicted in zip("ab", keys[1:], strict=True):
        expected = score(keys[0], predicted)
        assert result["micro"][name] == expected["micro"]
        assert {label: row[name] for label, row in result["types"].items()} == expected["types"]
    only = {(one["text"], one["label"], one["gold"], one["only"]) for one in result["mentions"]}
    assert only == {
        ("fever", "Disease", True, "A"), ("nausea", "Disease", True, "B"), ("lead", "Chemical", True, "A"),
        ("<gold>", "Chemical", True, "B"), ("Then", "Disease", False, "A"), ("rash", "Chemical", False, "B"),
    }  # fmt: skip


def test_the_other_way_round_and_with_itself(files, capsys):
    gold, a, b = files
    one, other = compared(capsys, gold, a, b), compared(capsys, gold, b, a)
    for row, turned in [
        (one["micro"], other["micro"]),
        *zip(one["types"].values(), other["types"].values(), strict=True),
    ]:
        assert row["a"] == turned["b"]
        assert (row["difference"], row["low"]) == pytest.approx((-turned["difference"], -turned["high"]))
    same = compared(capsys, gold, a, a)
    assert same["mentions"] == [] and same["micro"]["low"] == same["micro"]["high"] == 0


def test_the_terminal_names_what_only_one_finds(files, capsys):
    gold, a, b = files
    run_command(command, ["compare", "--gold", gold, a, b])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"A  {a}", f"B  {b}"] and max(map(len, lines[2:])) <= 80
    rows = [line.split() for line in lines]
    assert ["Disease", "0", "1", "1", "1"] in rows and ["all", "1", "2", "2", "1"] in rows
    assert ["2", "3", "Chemical", "lead"] in rows and ["1", "27", "Disease", "nausea"] in rows
    assert next(row for row in rows if row[:1] == ["micro"])[:4] == ["micro", "54.55", "54.55", "+0.00"]


def test_the_page_in_a_browser(files, tmp_path, opened):
    gold, a, b = files
    run_command(command, ["compare", "--gold", gold, a, b, "--html", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    script = """<script>
    const counts = () => facets.kinds.boxes.map(({value, output}) => value + " " + output.value);
    const read = () => [$("status").textContent, ...counts()];
    const log = [read()];
    $("only").click();
    log.push(read());
    document.title = JSON.stringify(log);
    </script></body>"""
    dom = opened(page.replace("</body>", script))
    counts = ["both 1", "only_a 2", "only_b 2", "neither 1", "spurious_both 1", "spurious_a 1", "spurious_b 1"]
    assert json.loads(dom.split("<title>")[1].split("</title>")[0]) == [
        ["9 mentions in 4 sentences", *counts], ["6 mentions in 3 sentences, of 9 in 4", *counts],
    ]  # fmt: skip


def test_a_label_that_the_gold_lacks_is_wrong(files, tmp_path, capsys):
    gold, a, _ = files
    more = tmp_path / "more.PubTator.txt"
    more.write_text(Path(a).read_text().replace("\n\n", "\n1\t0\t7\tAspirin\tDrug\t-1\n\n", 1))
    result = compared(capsys, gold, a, str(more))
    assert result["spurious"]["Drug"] == {"both": 0, "only_a": 0, "only_b": 1}
    assert result["micro"]["b"]["fp"] == result["micro"]["a"]["fp"] + 1


def test_bad_input_is_refused(files, tmp_path, capsys):
    gold, a, _ = files
    other = tmp_path / "other.PubTator.txt"
    other.write_text("9|t|Another document.\n9|a|\n\n")
    for flags, words in (
        (["--gold", gold, a, str(other)], "documents that are not in"),
        (["--gold", gold, a, str(tmp_path / "none")], "none"),
        ([a, a], "a.PubTator.txt"),
        ([str(tmp_path), str(tmp_path)], str(tmp_path)),
    ):
        with pytest.raises(SystemExit) as stop:
            run_command(command, ["compare", *flags])
        assert stop.value.code == 2
        assert words in capsys.readouterr().err
