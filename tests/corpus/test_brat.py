"""brat's folders: what another reader finds in them, mentions in parts, and what is not read."""

import os
from collections import Counter
from pathlib import Path

import pytest

from llamalora.corpus.brat import BRAT, brat_texts, write_brat
from llamalora.corpus.documents import CorpusError, Document, Reading, Span, sentence_bounds, sentences_of
from llamalora.corpus.read import find_splits, read_documents, stream_documents
from llamalora.runs.folder import fingerprint

TEXT = "Renal and hepatic failure\r\nafter α-zorbamycin\nThe rat lost its renal\nfunction. It slept \U0001f922.\n"
ANN = """T1\tDisease 0 5;18 25\tRenal failure
T2\tDisease 10 25\thepatic failure
T3\tChemical 33 45\tα-zorbamycin
T4\tFinding 59 68;69 77\tits renal function
R1\tCauses Arg1:T3 Arg2:T1
*\tEquiv T1 T2
E1\tFinding:T4 Cause:T3
A1\tNegated E1
M1\tSpeculated E1
N1\tReference T3 MESH:D000001\tzorbamycin
#1\tAnnotatorNotes T1\tT9 Disease 0 1, no mention
T5\tSign 88 89\t\U0001f922
"""


@pytest.fixture
def folder(tmp_path):
    """Two texts, one of them in a folder inside."""
    (tmp_path / "in/side").mkdir(parents=True)
    (tmp_path / "in/rat.txt").write_bytes(TEXT.encode())
    (tmp_path / "in/rat.ann").write_text(ANN, encoding="utf-8")
    (tmp_path / "in/side/b.c.txt").write_text("No mention.")
    (tmp_path / "in/side/b.c.ann").touch()
    (tmp_path / "in/annotation.conf").write_text("[entities]\nDisease\n")
    return tmp_path / "in"


def test_brat(folder):
    rat, other = documents = read_documents(folder)
    assert (rat.id, rat.text, other.id) == ("rat", TEXT, "side/b.c")
    assert [(rat.text[s.start : s.end], s.label) for s in rat.spans] == [
        ("Renal and hepatic failure", "Disease"),
        ("hepatic failure", "Disease"),
        ("α-zorbamycin", "Chemical"),
        ("its renal\nfunction", "Finding"),
        ("\U0001f922", "Sign"),
    ]
    assert documents.notes == {
        "mentions in several parts, read as one, from the first part to the last": 1,
        "mentions in several parts, joined across whitespace": 1,
        "relations, not read": 2,
        "events, not read": 1,
        "attributes, not read": 2,
        "normalisations to concepts, not read": 1,
        "notes of annotators, not read": 1,
    }


def test_another_reader_counts_the_same(folder):
    brat = pytest.importorskip("bioc.brat")
    with (folder / "rat.ann").open(encoding="utf-8") as file:
        theirs = brat.decoder.load_ann(file)
    ours = read_documents(folder)[0]
    assert Counter(entity.type for entity in theirs.entities) == Counter(span.label for span in ours.spans)
    assert sorted(entity.total_span for entity in theirs.entities) == [(span.start, span.end) for span in ours.spans]


def test_what_is_written_is_read_by_both(folder, tmp_path):
    brat = pytest.importorskip("bioc.brat")
    documents = read_documents(folder)
    lost = Counter()
    write_brat(documents, tmp_path / "out", lost)
    assert read_documents(tmp_path / "out") == documents and not +lost
    with (tmp_path / "out/rat.ann").open(encoding="utf-8") as file:
        entities = brat.decoder.load_ann(file).entities
    assert [entity.total_span for entity in entities] == [(span.start, span.end) for span in documents[0].spans]
    assert "\t".join(["T4", "Finding 59 68;69 77", "its renal function"]) in (tmp_path / "out/rat.ann").read_text()
    assert (tmp_path / "out/side/b.c.ann").read_text() == ""


def test_a_wrapped_line_goes_on_and_a_whole_one_ends_a_sentence():
    """Offsets stay those of the text, whose line ends are spaces in a prompt."""
    document = Document("1", TEXT, (Span(59, 77, "Finding"),), sentence_bounds(TEXT))
    sentences = sentences_of(document)
    assert [sentence.text for sentence in sentences] == [
        "Renal and hepatic failure  after α-zorbamycin",
        "The rat lost its renal function.",
        "It slept \U0001f922.",
    ]
    (span,) = sentences[1].spans
    assert sentences[1].text[span.start : span.end] == "its renal function"
    indented = "The longest line of all\n  (and more)"
    assert [indented[start:end] for start, end in sentence_bounds(indented)] == indented.split("\n  ")
    wrapped = "The rat was given\nZorbamycin and lost\nits renal function.\n\nMethods\nIt slept"
    bounds = [wrapped[start:end].replace("\n", " ") for start, end in sentence_bounds(wrapped)]
    assert bounds == ["The rat was given Zorbamycin and lost its renal function.", "Methods", "It slept"]


@pytest.mark.parametrize(
    "line, message",
    [
        ("T1\tDisease 0 5", None),
        ("T1\tDisease 0 5 \tRenal", None),
        ("T1\tDisease 0 5\tHepatic", "at 0 to 5 stands 'Renal', not 'Hepatic'"),
        ("T1\tDisease 90 99\tfailure", "outside the text of rat"),
        ("T1\tDisease 0 5;80 900\tRenal x", "outside the text of rat"),
        ("T1\tDisease 0;5\tRenal", "no mention"),
        ("T1 Disease 0 5 Renal", "no mention"),
        ("X1\tDisease 0 5\tRenal", "no mention"),
    ],
)
def test_faults_are_named_by_their_line(folder, line, message):
    (folder / "rat.ann").write_text(f"\n{line}\n")
    if message is None:
        assert read_documents(folder)[0].spans == (Span(0, 5, "Disease"),)
        return
    with pytest.raises(CorpusError, match=message) as caught:
        read_documents(folder)
    assert str(caught.value).startswith(f"{folder / 'rat.ann'}:2: ")


def test_texts_and_annotations_without_each_other(folder):
    (folder / "rat.ann").unlink()
    assert read_documents(folder).notes == {"texts with no .ann beside them, read as without mentions": 1}
    (folder / "side/b.c.txt").unlink()
    with pytest.raises(CorpusError, match=r"b\.c\.ann: there is no b\.c\.txt beside it"):
        read_documents(folder)
    (folder / "rat.txt").write_bytes(b"caf\xe9")
    with pytest.raises(CorpusError, match=r"rat\.txt: byte 3 is not UTF-8"):
        read_documents(folder, form=BRAT)


def test_line_ends_of_windows_may_count_once(folder):
    """Tools that read texts with Python's own line ends do so; nothing says it but where the mentions are."""
    (folder / "rat.ann").write_text("T1\tChemical 32 44\tα-zorbamycin\n", encoding="utf-8")
    document = (documents := read_documents(folder))[0]
    assert document.text == TEXT.replace("\r\n", "\n")
    assert [document.text[span.start : span.end] for span in document.spans] == ["α-zorbamycin"]
    assert documents.notes == {"texts whose line ends (CR LF) count as one character": 1}


@pytest.mark.parametrize("counts", [False, True])
def test_a_byte_order_mark_may_count(tmp_path, counts):
    (tmp_path / "rat.txt").write_text("\ufeffFever.", encoding="utf-8")
    (tmp_path / "rat.ann").write_text(f"T1\tDisease {0 + counts} {5 + counts}\tFever\n")
    (document,) = documents = read_documents(tmp_path)
    assert document.text == ("\ufeff" if counts else "") + "Fever."
    assert [document.text[span.start : span.end] for span in document.spans] == ["Fever"]
    assert documents.notes == ({"texts whose byte order mark counts as a character": 1} if counts else {})
    assert [text.text for text in brat_texts(tmp_path, Reading())] == ["Fever."]


def test_a_shared_task_has_two_files_of_annotations(folder):
    (folder / "rat.ann").unlink()
    (folder / "rat.a1").write_text("T1\tProtein 0 5\tRenal\n")
    (folder / "rat.a2").write_text("T2\tExpression 18 25\tfailure\nE1\tExpression:T2 Theme:T1\n")
    assert [span.label for span in read_documents(folder)[0].spans] == ["Protein", "Expression"]


def test_splits_are_folders(folder, tmp_path):
    folder.rename(tmp_path / "devel")
    (tmp_path / "train").mkdir()  # with nothing in it
    assert find_splits(tmp_path) == {"dev": tmp_path / "devel"}


def test_a_run_knows_the_files_of_its_splits(folder):
    before = fingerprint([folder])
    assert fingerprint([folder]) == before
    (folder / "side/b.c.ann").write_text("T1\tSign 0 2\tNo\n")
    assert fingerprint([folder]) != before


def test_texts_to_annotate_need_no_annotations(folder):
    for path in folder.rglob("*.ann"):
        path.unlink()
    streamed = list(stream_documents(str(folder), Counter()))
    assert [(document.id, document.text) for document in streamed] == [("rat", TEXT), ("side/b.c", "No mention.")]
    (folder / "empty").mkdir()
    with pytest.raises(CorpusError, match="no text in it"):
        list(stream_documents(str(folder / "empty"), Counter()))


@pytest.mark.parametrize("id", ["../up", "/etc/x", "a//b", "", ".", "a/../../b", "a\\b", "x" * 300])
def test_nothing_is_written_outside_the_folder(tmp_path, id):
    with pytest.raises(CorpusError, match="cannot be the name of a file"):
        write_brat([Document(id, "x", (), ())], tmp_path / "out", Counter())
    assert not list(tmp_path.iterdir())


def test_labels_of_several_words(tmp_path):
    lost = Counter()
    write_brat([Document("1", "flu", (Span(0, 3, "Infectious disease"),), ((0, 3),))], tmp_path, lost)
    assert read_documents(tmp_path)[0].spans == (Span(0, 3, "Infectious_disease"),)
    assert lost == {"mentions in whose label a space became _": 1}


def test_a_folder_that_cannot_be_read_is_named(folder, monkeypatch):
    scan = os.scandir

    def scandir(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    (folder / "locked").mkdir()
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(CorpusError, match="locked: cannot be read .Permission denied.; check its permissions"):
        read_documents(folder)


def test_what_a_killed_process_left_is_no_document(folder):
    (folder / "out.tmp-77").mkdir()
    (folder / "out.tmp-77/half.txt").write_text("It")
    assert all("tmp" not in document.id for document in read_documents(folder))
