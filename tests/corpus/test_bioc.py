"""BioC as XML and JSON: what the library bioc finds, passages and sentences, and what offsets may count."""

import json
import sys
from collections import Counter

import pytest

from llamalora.corpus.bioc import write_bioc_json, write_bioc_xml
from llamalora.corpus.documents import CorpusError, Document, Span, sentence_bounds
from llamalora.corpus.read import find_splits, read_documents, stream_documents

TITLE = "Zorbamycin and the rat"
ABSTRACT = "It lost α-waves \U0001f922 and renal function. Then it slept."
TEXT = f"{TITLE} {ABSTRACT}"


def annotation(id, label: str, *strings: str, length=len) -> dict:
    """An annotation of one or several strings of the text, its places as `length` counts them."""
    places = [{"offset": length(TEXT[: TEXT.index(s)]), "length": length(s)} for s in strings]
    return {
        "id": str(id),
        "infons": {"type": label, "identifier": "MESH:D1"},
        "text": " ".join(strings),
        "locations": places,
    }


def document(length=len, **more) -> dict:
    """A document as PubTator Central gives it: with keys of its own, without some of the standard's."""
    title = {"infons": {"type": "title"}, "offset": 0, "text": TITLE, "annotations": []}
    title["annotations"] = [annotation(1, "Chemical", "Zorbamycin", length=length)]
    abstract = {"infons": {"type": "abstract"}, "offset": length(TITLE) + 1, "text": ABSTRACT, "annotations": []}
    abstract["annotations"] = [
        annotation(2, "Finding", "α-waves", length=length),
        annotation(3, "Sign", "\U0001f922", length=length),
        annotation(4, "Organ", "renal", length=length),
        annotation(5, "Finding", "renal function", length=length),
        annotation(6, "Finding", "lost", "renal function", length=length),
    ]
    return {"_id": "7|None", "id": "7", "infons": {}, "passages": [title, abstract], "pmid": 7, **more}


FOUND = [
    ("Zorbamycin", "Chemical"),
    ("lost α-waves \U0001f922 and renal function", "Finding"),
    ("α-waves", "Finding"),
    ("\U0001f922", "Sign"),
    ("renal", "Organ"),
    ("renal function", "Finding"),
]
NOTES = {
    "documents of several passages, read as one text": 1,
    "mentions in several parts, read as one, from the first part to the last": 1,
    "infons of mentions beside their type, not read": 6,
}


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def strings(document: Document) -> list[tuple[str, str]]:
    return [(document.text[span.start : span.end], span.label) for span in document.spans]


def collection(**more) -> dict:
    """With all keys that the library asks for."""
    inner = document(annotations=[], relations=[], **more)
    for passage in inner["passages"]:
        passage |= {"sentences": [], "relations": []}
    return {"source": "s", "date": "d", "key": "k", "infons": {}, "documents": [inner]}


@pytest.mark.parametrize(
    "value",
    [
        json.dumps(document()) + "\n",
        {"PubTator3": [document()]},
        [{"bioctype": "BioCCollection", "documents": [document()]}],
        json.dumps(collection(), indent=2),
        json.dumps(collection(), ensure_ascii=False),
    ],
    ids=["a document a line", "PubTator 3", "PMC", "indented", "in one line"],
)
def test_json(tmp_path, value):
    (read,) = documents = read_documents(write(tmp_path / "x.json", value))
    assert (read.id, read.text, strings(read)) == ("7", TEXT, FOUND)
    assert [read.text[start:end] for start, end in read.sentences] == [
        TITLE,
        *ABSTRACT.split(" T")[:1],
        "Then it slept.",
    ]
    assert documents.notes == NOTES


@pytest.fixture
def xml(tmp_path):
    """The same as XML, written by the library."""
    biocxml, biocjson = (pytest.importorskip(f"bioc.{name}") for name in ("biocxml", "biocjson"))
    return write(tmp_path / "train.xml", biocxml.dumps(biocjson.loads(json.dumps(collection()))))


def test_xml(xml):
    (read,) = documents = read_documents(xml)
    assert (read.id, read.text, strings(read), documents.notes) == ("7", TEXT, FOUND, NOTES)
    assert find_splits(xml.parent) == {"train": xml}
    assert [document.text for document in stream_documents(str(xml), Counter())] == [TEXT]


def test_the_library_reads_what_is_written(tmp_path):
    biocxml, biocjson = (pytest.importorskip(f"bioc.{name}") for name in ("biocxml", "biocjson"))
    spans = (Span(0, 10, "Chemical"), Span(0, 22, "Title & <all>"), Span(39, 40, "Sign"))
    documents = [Document("7", TEXT, spans, sentence_bounds(TEXT)), Document("a|b", " \n\r\n\tx ", (), ((5, 6),))]
    for write_, library, name in (
        (write_bioc_xml, biocxml, "x.xml"),
        (write_bioc_json, biocjson, "x.json"),
    ):
        with (tmp_path / name).open("w", encoding="utf-8", newline="") as file:
            write_(documents, file, Counter())
        assert read_documents(tmp_path / name) == documents
        with (tmp_path / name).open(encoding="utf-8", newline="") as file:
            theirs = library.load(file)
        (passage,) = theirs.documents[0].passages
        for item, span in zip(passage.annotations, spans, strict=True):
            (place,) = item.locations
            assert (place.offset, place.end, item.infons["type"]) == (span.start, span.end, span.label)
            assert passage.text[place.offset : place.end] == item.text


@pytest.mark.parametrize(
    "length, unit",
    [
        (lambda text: len(text.encode()), "UTF-8 bytes"),
        (lambda text: len(text.encode("utf-16-le")) // 2, "UTF-16 units"),
    ],
)
def test_offsets_that_count_bytes_or_utf_16(tmp_path, length, unit):
    """The standard leaves open what they count; the texts of the mentions tell."""
    (read,) = documents = read_documents(write(tmp_path / "x.json", document(length)))
    assert (read.text, strings(read)) == (TEXT, FOUND)
    assert documents.notes == {f"documents whose offsets count {unit}, read so": 1} | NOTES


def test_sentences_hold_texts_where_passages_have_none(tmp_path):
    item = {"id": 1, "infons": {"type": "Organ"}, "text": "renal", "locations": [{"offset": 12, "length": 5}]}
    sentences = [{"offset": 0, "text": "It slept."}, {"offset": 10, "text": "A renal fever", "annotations": [item]}]
    value = {"id": 1, "passages": [{"offset": 0, "sentences": sentences, "relations": [{}, {}]}]}
    (read,) = documents = read_documents(write(tmp_path / "x.json", value))
    assert read == Document("1", "It slept. A renal fever", (Span(12, 17, "Organ"),), ((0, 9), (10, 23)))
    assert documents.notes == {"relations not read": 2}


@pytest.mark.parametrize("offset", [5, 10**12])
def test_passages_at_odd_places_are_moved(tmp_path, offset):
    """Within an earlier passage, or so far away that spaces would fill the memory."""
    item = annotation(1, "Organ", "renal") | {"locations": [{"offset": offset + 2, "length": 5}]}
    passages = [{"offset": 0, "text": "It slept."}, {"offset": offset, "text": "A renal fever", "annotations": [item]}]
    (read,) = documents = read_documents(write(tmp_path / "x.json", {"id": "1", "passages": passages}))
    assert (read.text, strings(read)) == ("It slept. A renal fever", [("renal", "Organ")])
    assert documents.notes["passages that do not follow the one before by their offset, moved there"] == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"infons": {}}, "annotation 1 of 7: the mention 'Zorbamycin' has no label"),
        ({"locations": [{"offset": 3, "length": 4}]}, "at 3 to 7 stands 'bamy', not 'Zorbamycin'"),
        ({"locations": [{"offset": 0, "length": 400}]}, "lie outside the text of 7"),
        ({"locations": [{"offset": 0}]}, "document 7: no BioC .KeyError: 'length'"),
        ({"locations": [{"offset": "x", "length": 1}]}, "document 7: no BioC .ValueError"),
    ],
)
def test_faults_name_the_annotation(tmp_path, change, message):
    value = document()
    value["passages"][0]["annotations"][0] |= change
    path = write(tmp_path / "x.json", f"\n{json.dumps(value)}\n{json.dumps(value)}\n")
    with pytest.raises(CorpusError, match=message) as caught:
        read_documents(path)
    assert str(caught.value).startswith(f"{path}:2: ") and f"{path}:3: " in str(caught.value)


@pytest.mark.parametrize("value", ["null", "[]", '"x"', '{"a": 1}', '{"passages": 3}', '{"passages": [1]}'])
def test_odd_documents(tmp_path, value):
    path = write(tmp_path / "x.json", f'{{"documents": [{value}, {json.dumps(document())}]}}')
    try:
        assert len(read_documents(path)) >= 1
    except CorpusError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(
    "text", ["<collection>", "<collection><document><passage/></document></collection>", "<collection>&x;</collection>"]
)
def test_broken_xml(tmp_path, text):
    pytest.importorskip("bioc")
    with pytest.raises(CorpusError, match="x.xml: no BioC XML"):
        read_documents(write(tmp_path / "x.xml", text))


def test_xml_declares_its_coding_but_no_entities(xml):
    text = xml.read_text(encoding="utf-8")
    body = text[text.index("<collection") :]
    write(xml, f"<?xml version='1.0' encoding='ISO-8859-1'?>\n<!DOCTYPE collection SYSTEM 'BioC.dtd'>\n{body}")
    assert read_documents(xml)[0].text == TEXT
    write(xml, f"<!DOCTYPE collection [<!ENTITY x SYSTEM 'file:///etc/hostname'>]>\n{body}")
    with pytest.raises(CorpusError, match="train.xml: declares entities"):
        read_documents(xml)


def test_without_the_library_the_extra_is_named(xml, monkeypatch):
    monkeypatch.setitem(sys.modules, "bioc", None)
    with pytest.raises(
        CorpusError, match=r"train.xml: BioC XML needs the library bioc: pip install 'llamalora\[bioc\]'"
    ):
        read_documents(xml)
    with pytest.raises(CorpusError, match=r"--to bioc: BioC XML needs"):
        write_bioc_xml([], sys.stdout, Counter())


def test_what_xml_cannot_hold(tmp_path):
    pytest.importorskip("bioc")
    with pytest.raises(CorpusError, match="a text that XML cannot hold"):
        write_bioc_xml([Document("1", "a\x01b", (), ((0, 3),))], sys.stdout, Counter())


def test_no_document(tmp_path):
    (tmp_path / "x.json").write_text('{"documents": []}')
    with pytest.raises(CorpusError, match="x.json: holds no document"):
        read_documents(tmp_path / "x.json")


def test_an_annotation_without_a_location_marks_no_text(tmp_path):
    """NLM-Chem's concepts of a whole article stand among its mentions."""
    value = document()
    value["passages"][0]["annotations"].append({"id": "MIC2", "infons": {"type": "Index"}, "text": "", "locations": []})
    (read,) = documents = read_documents(write(tmp_path / "x.json", value))
    assert strings(read) == FOUND
    assert documents.notes == NOTES | {"annotations without a location, which mark no text, left out": 1}


def test_a_collection_with_its_keys_on_lines_of_their_own(tmp_path):
    value = {"source": "PubTator", "date": "", "documents": [document()]}
    text = json.dumps(value, indent=1).replace("{\n ", "{", 1)
    assert text.startswith('{"source": "PubTator",\n')
    (read,) = read_documents(write(tmp_path / "x.json", text))
    assert strings(read) == FOUND
