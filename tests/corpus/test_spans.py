"""JSON lines with spans, as doccano, spaCy, Prodigy and predict write them."""

import io
import json
from collections import Counter

import pytest

from llamalora.corpus.documents import CorpusError, Document, Reading, Span, sentence_bounds
from llamalora.corpus.read import FORMATS, find_splits, read_documents, stream_documents
from llamalora.corpus.spans import write_spans

TEXT = "Zorbamycin gave “one” rat α-fever \U0001f922.\nIt slept."
SPANS = (Span(0, 10, "Chemical"), Span(26, 33, "Disease"), Span(34, 35, "Sign"))
LISTS = [[span.start, span.end, span.label] for span in SPANS]
DICTS = [vars(span) for span in SPANS]
TOKENS = [{"text": "Zorbamycin", "start": 0, "end": 10, "id": 0, "ws": True}]


def write(path, text: str):
    path.write_text(text, encoding="utf-8")
    return path


def line(**fields) -> str:
    return json.dumps({"text": TEXT, **fields}, ensure_ascii=False) + "\n"


PREDICTED = [item | {"text": TEXT[item["start"] : item["end"]], "confidence": 0.9} for item in DICTS]
PRODIGY = [item | {"token_start": 0, "token_end": 0, "input_hash": 3} for item in DICTS]
SPELLINGS = {
    "doccano": (line(id=3, label=LISTS, Comments=[]), {}),
    "doccano before": (line(id=3, labels=LISTS, meta={"by": "x"}), {"fields 'meta' not read": 1}),
    "doccano with relations": (
        line(
            id=3,
            entities=[{"id": 1, "label": s.label, "start_offset": s.start, "end_offset": s.end} for s in SPANS],
            relations=[{"from_id": 1, "to_id": 2}],
        ),
        {"fields 'relations' not read": 1},
    ),
    "spaCy": (line(id="3", ents=DICTS, tokens=TOKENS, spans={}), {"fields 'tokens' not read": 1}),
    "spaCy's groups": (line(id="3", ents=[], spans={"sc": DICTS[:1], "b": DICTS[1:]}), {}),
    "both of spaCy's": (
        line(id="3", ents=DICTS, spans={"sc": DICTS}),
        {"texts with mentions in several fields, all read": 1},
    ),
    "spaCy 2": (json.dumps([TEXT, {"entities": LISTS, "id": "3"}]), {}),
    "Prodigy": (
        line(id="3", spans=PRODIGY, tokens=TOKENS, answer="accept", _input_hash=1, _view_id="ner_manual"),
        {"fields 'input_hash' of mentions, not read": 3, "fields 'tokens' not read": 1},
    ),
    "predict": (
        line(id="3", entities=PREDICTED, unread=[[0, 3]]),
        {"fields 'confidence' of mentions, not read": 3, "fields 'unread' not read": 1},
    ),
    "with its tokens": (line(id="3", entities=LISTS, tokens=TEXT.split()), {"fields 'tokens' not read": 1}),
    "an array": (json.dumps([{"id": 3, "text": TEXT, "entities": LISTS}], indent=1), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(tmp_path, name):
    text, notes = SPELLINGS[name]
    documents = read_documents(write(tmp_path / "x.jsonl", text))
    assert documents == [Document("3", TEXT, SPANS, sentence_bounds(TEXT))]
    assert documents.notes == notes


def test_spacy_reads_the_same_mentions(tmp_path):
    """Its own Doc, written by itself, and ours as spans of its characters."""
    spacy = pytest.importorskip("spacy")
    doc = spacy.blank("en").make_doc(TEXT)
    doc.ents = [doc.char_span(span.start, span.end, label=span.label, alignment_mode="expand") for span in SPANS]
    (read,) = read_documents(write(tmp_path / "x.jsonl", json.dumps(doc.to_json())))
    theirs = [(entity.text, entity.label_) for entity in doc.ents]
    assert [(read.text[span.start : span.end], span.label) for span in read.spans] == theirs
    file = io.StringIO()
    write_spans([read], file, Counter())
    for entity in json.loads(file.getvalue())["entities"]:
        assert doc.char_span(entity["start"], entity["end"], label=entity["label"]).text == entity["text"]


def test_answers_of_prodigy(tmp_path):
    lines = [line(spans=DICTS, answer=answer) for answer in ("reject", "accept", "ignore", "ignore", None)]
    documents = read_documents(write(tmp_path / "dev.jsonl", "".join(lines)))
    assert [document.id for document in documents] == ["dev-2", "dev-5"]  # not answered yet
    assert documents.notes == {
        "examples whose answer is reject, left out": 1,
        "examples whose answer is ignore, left out": 2,
    }
    with pytest.raises(CorpusError, match="x.jsonl: holds no document; examples whose answer is reject, left out: 1"):
        read_documents(write(tmp_path / "x.jsonl", lines[0]))


def test_labels_of_a_whole_text_are_no_mentions(tmp_path):
    documents = read_documents(write(tmp_path / "x.jsonl", line(label="positive") + line(labels=["a", "b"]) + line()))
    assert [document.spans for document in documents] == [(), (), ()]
    assert documents.notes == {
        "fields 'label' that hold no mentions, not read": 1,
        "fields 'labels' that hold no mentions, not read": 1,
        "texts without a field of mentions": 3,
    }


def test_predictions_without_ids_take_those_of_the_gold(tmp_path):
    gold = [Document("a", TEXT, (), ()), Document("b", TEXT, (), ())]
    path = write(tmp_path / "mine.jsonl", line(spans=DICTS) + line(id=None, spans=[]))
    assert [document.id for document in read_documents(path, gold)] == ["a", "b"]
    assert [document.id for document in read_documents(path)] == ["mine-1", "mine-2"]


@pytest.mark.parametrize(
    "text, message",
    [
        (line(label=[[0, 99, "X"]]), "outside the text of x-2"),
        (line(label=[[0.0, 5, "X"]]), "'0.0' is not a whole number"),
        (line(label=[[True, 5, "X"]]), "'True' is not a whole number"),
        (line(label=[["X", 0, 5]]), "'X' is not a whole number"),
        (line(annotations=[{"start_offset": 0, "end_offset": 5, "label": 3}]), "0 to 5 is the number 3; give its name"),
        (line(label=[[0, 5, None]]), "from 0 to 5 has no label"),
        (line(label=[[0, 5, " "]]), "has no label"),
        (line(label=[[0, 5]]), r"\[0, 5\] is no mention"),
        (line(ents=[{"start": 0, "label": "X"}]), "'None' is not a whole number"),
        (line(ents=[{"start": 0, "end": 5, "label": "X", "text": "zorbas"}]), "stands 'Zorba', not 'zorbas'"),
        (line(id="x-1", label=LISTS), "a second document x-1, with another text or other mentions"),
        ('{"txt": "a"}\n', "no text"),
        ('{"text": 3}\n', "no text"),
        ("3\n", "no text"),
        ('{"text": "a"\n', "no JSON .Expecting ',' delimiter at column 13"),
        ('{"text": "\\ud83d"}\n', "half a character"),
        ("[" * 100_000 + "\n", "no JSON"),
    ],
)  # fmt: skip
def test_faults_name_their_line(tmp_path, text, message):
    path = write(tmp_path / "x.jsonl", line() + text + line() + text)
    with pytest.raises(CorpusError, match=message) as caught:
        read_documents(path)
    assert str(caught.value).startswith(f"{path}:2: ") and f"\n  {path}:4: " in str(caught.value)


def test_faults_of_an_array_name_their_item(tmp_path):
    path = write(tmp_path / "x.json", '[\n{"text": "a"},\n{"text": "a", "spans": [[0, 9, "X"]]}\n]')
    with pytest.raises(CorpusError, match="x.json: item 2: offsets 0 to 9"):
        read_documents(path)
    with pytest.raises(CorpusError, match="x.json: no JSON .Expecting .* line 3"):
        read_documents(write(path, '[\n{"text": "a"},\n{"text" "a"}\n]'))


def test_lines_come_as_they_are_written(tmp_path):
    """The first document is there before the rest of the file has been read."""

    def lines():
        yield "x:1", line().strip()
        raise AssertionError("read too far")

    assert next(iter(FORMATS["jsonl"].read(lines(), "x", Reading()))).text == TEXT
    path = write(tmp_path / "x.jsonl", line(id=1) + "{\n")
    stream = stream_documents(str(path), Counter())
    assert next(stream).id == "1"
    with pytest.raises(CorpusError, match=":2: no JSON"):
        next(stream)


def test_what_only_looks_like_json_is_text(tmp_path):
    path = write(tmp_path / "x.txt", "[Aspirin and the rat].\n{a} helps.\n")
    assert [document.text for document in stream_documents(str(path), Counter())] == [
        "[Aspirin and the rat].",
        "{a} helps.",
    ]


def test_written_and_read(tmp_path):
    documents = [Document("a", TEXT, SPANS, sentence_bounds(TEXT)), Document("b|\t\u2028", "", (), ())]
    with (tmp_path / "train.jsonl").open("w", encoding="utf-8") as file:
        write_spans(documents, file, Counter())
    assert read_documents(find_splits(tmp_path)["train"]) == documents


def test_a_document_that_stands_twice_is_read_once(tmp_path):
    """As 8528200 of NCBI's corpus of diseases does."""
    documents = read_documents(write(tmp_path / "x.jsonl", 2 * line(id="a", label=LISTS) + line(id="b")))
    assert [document.id for document in documents] == ["a", "b"] and documents[0].spans == SPANS
    assert documents.notes["documents that stand twice, read once"] == 1


@pytest.mark.parametrize(
    "head", ['{ "id": "a",\n "text"', '{"meta": "",\n\n"id": "a", "text"', '[ {"id": "a",\n  "text"']
)
def test_json_over_several_lines(tmp_path, head):
    text = f'{head}: "It slept."\n}}' + "]" * head.startswith("[")
    (document,) = read_documents(write(tmp_path / "x.json", text))
    assert (document.id, document.text) == ("a", "It slept.")
