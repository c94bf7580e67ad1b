"""predict reads and writes every corpus format. What the model answers does not matter here: each text's first word is
a Sign."""

import io
import json
import sys
from collections import Counter

import pytest

from llamalora.__main__ import main
from llamalora.commands import predict
from llamalora.corpus.documents import Document, Span, sentence_bounds
from llamalora.corpus.read import FORMATS, read_documents
from llamalora.errors import InputError
from llamalora.evaluation import annotate, systems
from llamalora.evaluation.answered import Answer
from llamalora.evaluation.systems import System
from llamalora.task.definition import Task
from llamalora.task.parse import parse

TEXT = "Fever came. Then it\nwent by α-zorbamycin."
GOLD = [Document("a", TEXT, (Span(0, 5, "Old"),), sentence_bounds(TEXT)), Document("b", "It slept.", (), ((0, 9),))]
SIGNS = [("Fever", "Then"), ("It",)]


@pytest.fixture
def run(monkeypatch, capsys):
    """Calls predict with a stub in place of the model; returns standard output and error."""
    task = Task("tagging", ("Sign",), per_label=False)

    def answer(model, tokenizer, task_, asked, *_, **__):
        answers = []
        for sentence in asked:
            first, _, rest = sentence.text.partition(" ")
            output = f"[Sign]{first}[/Sign] {rest}"
            parsed = parse(task, sentence.text, output)
            answers.append(Answer(sentence, output, parsed, confidence=dict.fromkeys(parsed.spans, 0.5)))
        return answers, None

    monkeypatch.setattr(predict, "find_task", lambda _: task)
    monkeypatch.setattr(systems, "load_run", lambda *_: System(None, None, task))
    monkeypatch.setattr(annotate, "answer_sentences", answer)

    def call(*arguments) -> tuple[str, str]:
        main(["predict", "--run", ".", *map(str, arguments)])
        return capsys.readouterr()

    return call


def given(form: str, place, documents=GOLD):
    if form == "bioc":
        pytest.importorskip("bioc")
    if FORMATS[form].folder:
        FORMATS[form].write(documents, place, Counter())
    else:
        file = io.StringIO()
        FORMATS[form].write(documents, file, Counter())
        place.write_text(file.getvalue(), encoding="utf-8")
    return place


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_read_and_written(form, run, tmp_path):
    """The mentions of the input are not those of the output."""
    given(form, tmp_path / "in")
    where = ("--out", tmp_path / "out") if form == "brat" else ()
    out, err = run("--to", form, *where, tmp_path / "in")
    if form != "brat":
        (tmp_path / "out").write_text(out, encoding="utf-8")
    documents = read_documents(tmp_path / "out", form=FORMATS[form])
    signs = [tuple(one.text[span.start : span.end] for span in one.spans) for one in documents]
    assert signs == SIGNS and {span.label for one in documents for span in one.spans} == {"Sign"}
    assert [one.id for one in documents] == (["out-1", "out-2"] if form == "conll" else ["a", "b"])
    told = {"pubtator": "tabs and line ends in texts", "conll": "ids of documents"}.get(form, "")
    assert (f"--to {form}: " in err) == (f"--to {form}: {told}" in err)


def test_tokens_of_the_input_are_kept(run, tmp_path):
    text = "New York\tO\n2-8°C\tB-Old\n\nα-x,\tO\ny\tO\n\n"
    (tmp_path / "x.conll").write_text(text, encoding="utf-8")
    out, _ = run("--to", "conll", tmp_path / "x.conll")
    assert [line.split("\t")[0] for line in out.splitlines()] == [line.split("\t")[0] for line in text.splitlines()]
    out, _ = run("--to", "hf", tmp_path / "x.conll")
    assert [json.loads(line)["tokens"] for line in out.splitlines()] == [["New York", "2-8°C"], ["α-x,", "y"]]


def test_texts_of_brat_stay_as_they_are(run, tmp_path):
    """So that what is predicted can be looked at in brat, beside its own text."""
    (tmp_path / "in").mkdir()
    text = b"Fever\r\ncame.\n\n\tIt slept.\n"
    (tmp_path / "in/a.txt").write_bytes(text)
    _, err = run("--to", "brat", "--out", tmp_path / "out", tmp_path / "in")
    assert (tmp_path / "out/a.txt").read_bytes() == text and err == ""
    assert (tmp_path / "out/a.ann").read_text() == "T1\tSign 0 5\tFever\nT2\tSign 15 17\tIt\n"


def test_a_format_is_read_from_standard_input(run, tmp_path, monkeypatch):
    content = given("jsonl", tmp_path / "in").read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(content))))
    out, _ = run("-")
    first = json.loads(out.splitlines()[0])
    assert (first["id"], first["text"], first["unread"]) == ("a", TEXT, [])
    assert first["entities"][0] == {"start": 0, "end": 5, "label": "Sign", "text": "Fever", "confidence": 0.5}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--to", "brat", "in"], "--to brat: needs --out FOLDER"),
        (["--to", "brat", "--out", "corpus", "in"], "--out corpus: exists and is not an empty folder"),
        (["--out", "new", "in"], "--out: no effect without --to brat"),
        (["corpus"], "corpus: a corpus folder; give one split of it: .*train.tsv"),
        (["--from", "hf", "in"], "in:1: no tokens"),
        (["absent"], "absent: no such file"),
        (["odd.jsonl"], "odd.jsonl: JSON or XML of no known format"),
        (["odd"], "odd: JSON or XML of no known format"),
        (["odd.xml"], "odd.xml: JSON or XML of no known format"),
    ],
)
def test_refusals(arguments, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given("jsonl", tmp_path / "in")
    (tmp_path / "odd.jsonl").write_text('{"pmid": 1, "abstract": "It slept."}\n')
    (tmp_path / "odd").write_text('{"pmid": 1,\n"abstract": "It slept."}\n')
    (tmp_path / "odd.xml").write_text("<PubmedArticleSet>\n</PubmedArticleSet>\n")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/train.tsv").write_text("Flu\tB-D\n")
    with pytest.raises(InputError, match=message):
        run(*arguments)
    assert not (tmp_path / "new").exists()


def test_what_a_format_cannot_hold_is_refused_before_it_is_decoded(run, tmp_path, monkeypatch):
    monkeypatch.setattr(annotate, "answer_sentences", lambda *_, **__: pytest.fail("it was decoded"))
    (tmp_path / "x.jsonl").write_text(json.dumps({"id": "a|b/../c", "text": "Aspirin."}) + "\n")
    for flags in (("--to", "pubtator"), ("--to", "brat", "--out", tmp_path / "out")):
        with pytest.raises(InputError, match="a|b"):
            run(*flags, tmp_path / "x.jsonl")


def test_a_folder_that_cannot_be_written_is_refused_before_it_is_decoded(run, tmp_path, monkeypatch):
    monkeypatch.setattr(annotate, "answer_sentences", lambda *_, **__: pytest.fail("it was decoded"))
    given("jsonl", tmp_path / "in")
    out = tmp_path / "in/out"
    with pytest.raises(InputError, match=f"--out {out}: {tmp_path / 'in'} is a file"):
        run("--to", "brat", "--out", out, tmp_path / "in")
