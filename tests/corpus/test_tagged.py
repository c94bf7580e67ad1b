"""Tokens and tags: CoNLL written, and the data sets of Hugging Face read and written."""

import io
import json
from collections import Counter

import pytest

from llamalora.corpus.conll import write_conll
from llamalora.corpus.documents import CorpusError, Document, Span, sentence_bounds
from llamalora.corpus.hugging_face import write_tokens
from llamalora.corpus.read import find_splits, read_documents, stream_documents
from llamalora.corpus.tagged import tokenised

TEXT = "Na+ fell (5-HT2).  It slept\nfor 3.5 h."
SPANS = (
    Span(0, 2, "Chemical"),
    Span(0, 8, "Finding"),
    Span(10, 14, "Chemical"),  # within the token HT2
    Span(14, 21, "Odd"),  # across the end of a sentence
    Span(22, 27, "Sign"),
)
DOCUMENT = Document("7", TEXT, SPANS, sentence_bounds(TEXT))
TAGGED = [
    [("Na", "B-Finding"), ("+", "I-Finding"), ("fell", "I-Finding")]
    + [(token, "O") for token in ("(", "5", "-", "HT2", ")", ".")],
    [("It", "O"), ("slept", "B-Sign"), ("for", "O"), ("3", "O"), (".", "O"), ("5", "O"), ("h", "O"), (".", "O")],
]
LOST = {
    "mentions that overlap a longer one, left out": 1,
    "mentions that begin or end within a token, left out": 1,
    "mentions that cross the end of a sentence, left out": 1,
    "documents whose spaces are not kept between tokens": 1,
}


def write(path, text: str):
    path.write_text(text, encoding="utf-8")
    return path


def written(write_, documents) -> tuple[str, dict]:
    file, lost = io.StringIO(), Counter()
    write_(documents, file, lost)
    return file.getvalue(), dict(+lost)


# ---- tokens ----


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("α-zorba_mycin's 3,4-x", ["α", "-", "zorba_mycin", "'", "s", "3", ",", "4", "-", "x"]),
        ("e\u0301mesis\u00a0na\u00efve", ["e\u0301mesis", "na\u00efve"]),
        ("高血圧のHT2で", ["高", "血", "圧", "の", "HT2", "で"]),
        ("\ufeffa\u200b \U0001f922!", ["a", "\u200b", "\U0001f922", "!"]),
        (" \n\t", []),
    ],
)
def test_tokens(text, tokens):
    assert [text[start:end] for start, end in tokenised(text)] == tokens


# ---- CoNLL ----


def test_conll_of_offsets():
    text, lost = written(write_conll, [DOCUMENT])
    sentences = ["".join(f"{word}\t{tag}\n" for word, tag in sentence) + "\n" for sentence in TAGGED]
    assert text == "-DOCSTART-\tO\n\n" + "".join(sentences)
    assert lost == LOST | {"ids of documents, which CoNLL does not hold": 1}


@pytest.mark.parametrize(
    "text",
    [
        "-DOCSTART-\tO\n\nNew York\tB-LOC\nis\tO\n\n#\tO\nbig\tO\n\n-DOCSTART-\tO\n\nIt\tO\n\n",
        "α-fever\tB-Disease\n2-8°C\tI-Disease\n.\tO\n\n1\tO\n2\tB-X y\n\n",
    ],
    ids=["documents", "sentences"],
)
def test_tokens_of_a_file_are_kept(tmp_path, text):
    """Which no rule would find again; and sentences without documents stay so."""
    documents = read_documents(write(tmp_path / "dev.conll", text))
    assert written(write_conll, documents) == (text, {})


def test_every_scheme_is_written_as_iob2(tmp_path):
    documents = read_documents(write(tmp_path / "dev.bioes", "a S-X\nb B-X\nc I-X\nd E-X\n\ne L-Y\nf U-Y\n"))
    assert written(write_conll, documents)[0] == "a\tB-X\nb\tB-X\nc\tI-X\nd\tI-X\n\ne\tB-Y\nf\tB-Y\n\n"


def test_another_reader_finds_the_same_mentions(tmp_path):
    get_entities = pytest.importorskip("seqeval.metrics.sequence_labeling").get_entities
    text, _ = written(write_conll, [DOCUMENT, DOCUMENT])
    tags = [
        [line.split("\t")[1] for line in part.splitlines()] for part in text.split("\n\n") if "DOCSTART" not in part
    ]
    ours = read_documents(write(tmp_path / "x.conll", text))
    assert [label for label, _, _ in get_entities(tags)] == [span.label for document in ours for span in document.spans]
    assert len(ours) == 2 and len(ours[0].sentences) == 2


def test_documents_without_a_word():
    empty = Document("8", " ", (), ())
    text, lost = written(write_conll, [empty, DOCUMENT])
    assert text.count("-DOCSTART-") == 1 and lost["documents without a word, left out"] == 1


# ---- tokens and tags as JSON ----

LINES = [
    {"id": "0", "tokens": ["α-fever", "and", "New York"], "ner_tags": ["B-Disease", "O", "B-LOC"]},
    {"id": "1", "tokens": ["It", "slept", "."], "ner_tags": ["O", "B-Sign", "I-Sign"]},
]
NAMES = ["O", "B-Disease", "I-Disease", "B-LOC", "I-LOC", "B-Sign", "I-Sign"]
READ = [
    Document("0", "α-fever and New York", (Span(0, 7, "Disease"), Span(12, 20, "LOC")), ((0, 20),)),
    Document("1", "It slept .", (Span(3, 10, "Sign"),), ((0, 10),)),
]
FEATURE = {"feature": {"names": NAMES, "_type": "ClassLabel"}, "_type": "Sequence"}
BESIDE = {
    "dataset_infos.json": {"default": {"features": {"tokens": {}, "ner_tags": FEATURE, "pos_tags": {"names": ["NN"]}}}},
    "dataset_info.json": {"features": {"ner_tags": FEATURE}},
    "features.json": {"ner_tags": {"names": NAMES}},
    "label.json": {name: number for number, name in enumerate(NAMES)},
    "labels.json": {str(number): name for number, name in enumerate(NAMES)},
    "labels.txt": NAMES,
}


def json_lines(records) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def numbered(field: str = "ner_tags") -> str:
    return json_lines(
        {"id": record["id"], "tokens": record["tokens"], field: [NAMES.index(tag) for tag in record["ner_tags"]]}
        for record in LINES
    )


def test_names_of_tags(tmp_path):
    path = write(tmp_path / "validation.jsonl", json_lines(LINES))
    documents = read_documents(path)
    assert (documents, documents.notes, find_splits(tmp_path)) == (READ, {}, {"dev": path})
    assert written(write_tokens, documents) == (json_lines(LINES[:1]) + json_lines(LINES[1:]), {})
    assert [document.text for document in stream_documents(str(path), Counter())] == [READ[0].text, READ[1].text]
    assert read_documents(write(tmp_path / "x.json", json.dumps(LINES, indent=2))) == READ


@pytest.mark.parametrize("name", BESIDE)
def test_numbers_of_tags(tmp_path, name):
    content = BESIDE[name]
    write(tmp_path / name, "\n".join(content) if name.endswith(".txt") else json.dumps(content))
    assert read_documents(write(tmp_path / "train.json", numbered())) == READ


@pytest.mark.parametrize("field", ["tags", "labels"])
def test_other_names_of_the_field(tmp_path, field):
    write(tmp_path / "label.json", json.dumps(BESIDE["label.json"]))
    assert read_documents(write(tmp_path / "train.json", numbered(field))) == READ


def test_numbers_without_names(tmp_path):
    path = write(tmp_path / "train.json", numbered())
    with pytest.raises(CorpusError, match="ner_tags are numbers, and nothing in .* names them; put there a labels.txt"):
        read_documents(path)
    write(tmp_path / "labels.txt", "O\nB-Disease\n")
    with pytest.raises(CorpusError, match="train.json:1: 3 is the number of no tag; .* names 0 to 1"):
        read_documents(path)
    write(tmp_path / "dataset_infos.json", "{")
    with pytest.raises(CorpusError, match="train.json:1: .*dataset_infos.json: cannot be read"):
        read_documents(path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ner_tags": ["O"]}, "3 tokens and 1 ner_tags"),
        ({"ner_tags": ["O", "O", "Disease"]}, "'Disease' is no tag"),
        ({"tokens": [1, 2, 3]}, "no tokens"),
        ({"id": "0"}, "a second document 0"),
        ({"ner_tags": None, "entities": [{"type": "X", "start": 0, "end": 1}]}, "mentions in 'entities' by token"),
    ],
)
def test_faults_name_their_line(tmp_path, change, message):
    path = write(tmp_path / "x.jsonl", json_lines([LINES[0], LINES[1] | change]))
    with pytest.raises(CorpusError, match=message) as caught:
        read_documents(path)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_what_is_not_read(tmp_path):
    records = [
        {"tokens": ["\u200a", "fever"], "tags": ["O", "B-Disease"], "pos_tags": [1, 2]},
        {"tokens": ["It", "slept"]},
        {"tokens": []},
    ]
    documents = read_documents(write(tmp_path / "dev.jsonl", json_lines(records)))
    assert [(document.id, document.text) for document in documents] == [
        ("dev-1", "fever"),
        ("dev-2", "It slept"),
        ("dev-3", ""),
    ]
    assert documents.notes == {
        "fields 'pos_tags' not read": 1,
        "tokens of nothing but whitespace, left out": 1,
        "sentences without a field of tags": 2,
    }


def test_sentences_of_a_document_find_each_other(tmp_path):
    text, lost = written(write_tokens, [DOCUMENT, DOCUMENT.__class__("8", "One.", (), ((0, 4),))])
    first, second, third = map(json.loads, text.splitlines())
    assert (first["id"], second["id"], third["id"]) == ("7-1", "7-2", "8")
    assert [list(zip(line["tokens"], line["ner_tags"], strict=True)) for line in (first, second)] == TAGGED
    assert lost == LOST | {"documents whose spaces are not kept between tokens": 2}
    documents = read_documents(write(tmp_path / "x.jsonl", text))
    assert [(document.id, len(document.sentences)) for document in documents] == [("7", 2), ("8", 1)]
    assert written(write_tokens, documents) == (text, {})


def test_numbers_of_tags_without_a_label(tmp_path):
    """As the data sets linnaeus and species_800 have them."""
    write(tmp_path / "labels.txt", "O\nB\nI\n")
    record = {"tokens": ["Acute", "fever", "came"], "ner_tags": [1, 2, 0]}
    (document,) = documents = read_documents(write(tmp_path / "train.json", json_lines([record])))
    assert document.spans == (Span(0, 11, "entity"),) and len(documents.notes) == 1
