"""Corpora and texts of unusual size: nothing grows with what has been dealt with already, nothing is assumed to be
there."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import tiny_model

import train
from llamalora.cli import run_command
from llamalora.corpus.documents import Document, Span, labels_of, sentence_bounds, sentences_of
from llamalora.corpus.pubtator import write_pubtator
from llamalora.corpus.read import read_documents, stream_documents
from llamalora.distributed.world import World
from llamalora.evaluation.answer import answer_sentences
from llamalora.evaluation.result import health
from llamalora.model.checkpoint import load_model, save_model
from llamalora.task.definition import Task
from llamalora.task.parse import parse
from llamalora.task.prompt import render_answer
from llamalora.task.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def write(path: Path, *documents: Document) -> None:
    with path.open("w", encoding="utf-8") as file:
        write_pubtator(documents, file)


def document(id: str, text: str, **mentions: str) -> Document:
    """Each mention once; a label's `_` is a space."""
    spans = [Span(text.index(word), text.index(word) + len(word), label) for label, word in mentions.items()]
    return Document(id, text, tuple(sorted(spans)), sentence_bounds(text))


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_sentencepiece) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(tiny_model(vocab_size=400, max_position_embeddings=512, num_hidden_layers=1), folder / "tiny")
    (folder / "tiny/tokenizer.model").write_bytes((tiny_sentencepiece / "tokenizer.model").read_bytes())
    return folder / "tiny"


def trained(model: Path, data: Path, out: Path, *flags: str) -> dict:
    """The scores of a run of one epoch."""
    argv = ["--model", model, "--data", data, "--out", out, "--rank", "2", "--epochs", "1", "--precision", "fp32"]
    run_command(train.main, [*map(str, argv), *flags])
    return json.loads((out / "eval-dev.json").read_text())


def test_a_document_of_100_000_characters(tmp_path):
    """Read, cut into sentences, written and read back; each mention where it stood."""
    sentence = "A mild fever followed the second dose. "
    text = (sentence * (100_000 // len(sentence) + 1))[:100_000].rstrip()
    spans = tuple(Span(i, i + 5, "Disease") for i in range(7, len(text) - 5, len(sentence)))
    long = Document("1", text, spans, sentence_bounds(text))
    write(tmp_path / "train.txt", long)
    (back,) = read_documents(tmp_path / "train.txt")
    assert back == long and len(back.spans) > 2500
    inside = sentences_of(back)
    assert sum(len(one.spans) for one in inside) == len(spans)
    assert {one.text[s.start : s.end] for one in inside for s in one.spans} == {"fever"}
    (tmp_path / "line.txt").write_text(text + "\n")
    (read,) = stream_documents(str(tmp_path / "line.txt"), Counter())
    assert read.text == text and len(read.sentences) == len(inside)


def test_one_sentence_of_100_000_characters_is_passed_over(model):
    """It does not fit the context, so nothing is asked, and that is said; what stands beside it is answered."""
    texts = ["word " * 20_000, "A fever."]
    asked = [one for number, text in enumerate(texts) for one in sentences_of(document(str(number), text))]
    task = Task("tagging", ("Disease",), True)
    system = load_model(model, torch.float32), load_tokenizer(model)
    answers, _ = answer_sentences(*system, task, asked, World(), quiet=True)
    assert [answer.overlong for answer in answers] == [True, False]
    assert health(answers)["overlong"] == 1


STREAM = """
import resource, sys
from llamalora.commands import predict
from llamalora.evaluation import annotate, systems
from llamalora.evaluation.answered import Answer
from llamalora.evaluation.systems import System
from llamalora.task.parse import parse
from llamalora.task.definition import Task

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def answer(model, tokenizer, task, asked, *_, **__):
    seen.append(seen[-1] + len(asked))
    peaks.append(peak())
    return [Answer(sentence, "", nothing) for sentence in asked], None

seen, peaks = [0], []
task = Task("tagging", ("Disease",), per_label=True)
nothing = parse(task, "", "")
predict.read_task, systems.load_run = lambda _: task, lambda *_: System(None, None, task)
annotate.answer_sentences = answer
predict.main(["--run", ".", "-"])
early = next(peak for count, peak in zip(seen[1:], peaks) if count > 5000)
sys.stderr.write(f"{seen[-1]} {peaks[-1] - early}")
"""


def test_100_000_documents_are_a_stream():
    """Through `predict`, with a stub in place of the model; from document 5,000 on memory grows by less than 4 MB, a
    tenth of what it reads and writes."""
    command = subprocess.Popen([sys.executable, "-c", STREAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, cwd=ROOT)  # fmt: skip
    line = b"a mild fever followed the second dose of naloxone, " * 8 + b"\n"
    written, errors = command.communicate(line * 100_000)
    assert command.returncode == 0, errors
    count, growth = map(int, errors.split())
    assert count == written.count(b"\n") == 100_000 and growth < 4e6
    assert json.loads(written.splitlines()[-1])["id"] == "100000"


def test_fifty_types(model, tmp_path):
    """Trained and scored, each type by itself."""
    made = [document(str(i), f"Item {i} and {j}.", **{f"Type_{i}": f"Item {i}", f"Type_{j}": str(j)})
            for i in range(0, 50, 2) for j in [i + 1]]  # fmt: skip
    for name in ("train", "dev"):
        write(tmp_path / f"{name}.txt", *made)
    result = trained(model, tmp_path, tmp_path / "run", "--format", "extraction", "--eval-limit", "2")
    assert len(json.loads((tmp_path / "run/config.json").read_text())["task"]["labels"]) == 50
    assert len(result["types"]) == 50
    task = Task("tagging", labels_of(made), False)
    for one in made:
        (sentence,) = sentences_of(one)
        parsed = parse(task, sentence.text, render_answer(task, sentence.text, sentence.spans))
        assert parsed.spans == sentence.spans and parsed.exact_copy


def test_a_corpus_of_one_sentence(model, tmp_path):
    for name in ("train", "dev"):
        write(tmp_path / f"{name}.txt", document("1", "A fever.", Disease="fever"))
    result = trained(model, tmp_path, tmp_path / "run", "--epochs", "4")
    assert result["sentences"] == 1 and result["micro"]["tp"] + result["micro"]["fn"] == 1
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 4


def test_a_corpus_without_an_entity(model, tmp_path, capsys):
    """There is no label to learn; where only the development split lacks them, scores are zeros, not errors."""
    write(tmp_path / "train.txt", document("1", "No finding."))
    write(tmp_path / "dev.txt", document("2", "No finding."))
    with pytest.raises(SystemExit) as ended:
        trained(model, tmp_path, tmp_path / "run")
    assert ended.value.code == 2 and "holds no mention" in capsys.readouterr().err
    write(tmp_path / "train.txt", document("1", "A fever.", Disease="fever"), document("3", "A rash.", Disease="rash"))
    result = trained(model, tmp_path, tmp_path / "run", "--epochs", "2")
    assert result["micro"]["tp"] == result["micro"]["fn"] == 0 and result["micro"]["f1"] == 0
