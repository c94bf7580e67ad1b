"""Readers, writer, sentences: what a file says is what a document holds; a bad file is named by its line."""

import gzip
import io
import re
from collections import Counter

import pytest

from llamalora.corpus.documents import (
    CorpusError,
    Document,
    Span,
    corpus_statistics,
    labels_of,
    outermost,
    sentence_bounds,
    sentences_of,
    unanswerable,
)
from llamalora.corpus.pubtator import write_pubtator
from llamalora.corpus.read import find_splits, read_documents, stream_documents

TABLE_5 = {"train": (4182, 5203), "dev": (4244, 5347), "test": (4424, 5385)}

TITLE = "Zorbamycin gave one rat a fever."
CLINIC = "St. Anne's clinic saw nausea \U0001f922 and e\u0301mesis, too."
ABSTRACT = f"It slept (12 h). No α-zorbamycin was left. {CLINIC}"
TEXT = f"{TITLE} {ABSTRACT}"


def mention(id: str, string: str, label: str, *more: str) -> str:
    start = TEXT.index(string)
    return "\t".join([id, str(start), str(start + len(string)), string, label, *more])


LINES = [
    f"7|t|{TITLE}",
    f"7|a|{ABSTRACT}",
    mention("7", "Zorbamycin", "Chemical", "D001|D002", ""),
    mention("7", "fever", "Disease", "-1"),
    mention("7", "α-zorbamycin", "Chemical"),
    mention("7", "nausea", "Disease", "D003", "a|b"),
    mention("7", "e\u0301mesis", "Disease", "D003"),
    "7\tCID\tD001\tD003",
    "",
    "8|t|A title alone",
]


def write(path, text: str | bytes):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def strings(document: Document) -> list[tuple[str, str]]:
    return [(document.text[span.start : span.end], span.label) for span in document.spans]


NOTE = {
    "number": "lines whose running number was skipped",
    "no word": "lines that are no words (numbered as 1-2 or 8.1), skipped",
    "comment": "comment lines skipped",
    "layer": "mentions from a further column of tags",
    "phrase": "tags of phrases (such as NP) in another column, left out",
    "several": "tokens with several tags in one cell, all read",
    "before": "lines whose tag stands before the last column",
    "width": "lines with another number of columns than most, of which the first and last count",
    "trimmed": "mentions trimmed of whitespace at their ends",
    "blank": "mentions of nothing but whitespace, left out",
    "tab": "tabs in texts, read as spaces",
    "relations": "relations not read",
    "concepts": "concept ids of mentions not read",
    "written": "mentions whose text is spelt otherwise than their document's, taken by their offsets",
}


# ---- PubTator ----


def test_pubtator(tmp_path):
    first, second = read_documents(write(tmp_path / "x.PubTator.txt", "\n".join(LINES)))
    assert first.text == TEXT and first.id == "7"
    assert strings(first) == [
        ("Zorbamycin", "Chemical"),
        ("fever", "Disease"),
        ("α-zorbamycin", "Chemical"),
        ("nausea", "Disease"),
        ("e\u0301mesis", "Disease"),
    ]
    assert second == Document("8", "A title alone", (), ((0, 13),))


@pytest.mark.parametrize("name", ["a.txt", "b.gz", "c.pubtator", "d.tsv", "nameless"])
@pytest.mark.parametrize(
    "change",
    [
        lambda text: text + "\n\n\n",
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "\ufeff" + text,
        lambda text: "\n\n" + text.replace("\n", "\n\n"),
        lambda text: gzip.compress(text.encode()),
    ],
    ids=["blank lines at the end", "CRLF", "BOM", "blank lines", "gzip"],
)
def test_pubtator_variants(tmp_path, name, change):
    plain = read_documents(write(tmp_path / "plain.txt", "\n".join(LINES)))
    assert read_documents(write(tmp_path / name, change("\n".join(LINES)))) == plain


@pytest.mark.parametrize(
    "line, lines, message",
    [
        (3, [*LINES[:2], "7\t0\t9\tZorbamycin\tChemical"], r"at 0 to 9 stands 'Zorbamyci', not 'Zorbamycin'"),
        (3, [*LINES[:2], "7\t900\t909\tfever\tDisease"], "outside the text"),
        (3, [*LINES[:2], "7\t5\t5\t\tDisease"], "empty"),
        (3, [*LINES[:2], "7\t9\t5\tfever\tDisease"], "outside"),
        (3, [*LINES[:2], "7\t-3\t5\tfever\tDisease"], "'-3' is not a whole number"),
        (3, [*LINES[:2], "7\tx\t5\tfever\tDisease"], "'x' is not a whole number"),
        (3, [*LINES[:2], "7\t1.0\t5\tfever\tDisease\t-1"], "'1.0' is not a whole number"),
        (3, [*LINES[:2], f"7\t0\t{'9' * 5000}\tfever\tDisease\t-1"], "is not a whole number"),
        (3, [*LINES[:2], "7\t0\t10\tZorbamycin\t"], "no label"),
        (3, [*LINES[:2], "7\t0\t10\tZorbamycin"], "neither"),
        (3, [*LINES[:2], "a second line of the abstract"], "neither"),
        (1, LINES[2:], "no title line"),
        (3, [*LINES[:2], "9" + LINES[2]], "document 97, which has no title line"),
        (1, LINES[1:], "must follow its title"),
        (4, [*LINES[:3], LINES[1]], "must follow its title"),
        (4, [*LINES[:2], "", LINES[0]], "a second document 7"),
    ],
)
def test_pubtator_errors(tmp_path, line, lines, message):
    path = write(tmp_path / "bad.txt", "\n".join(lines))
    with pytest.raises(CorpusError, match=message) as caught:
        read_documents(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")


def test_predictions_may_be_mentions_alone(tmp_path):
    gold = read_documents(write(tmp_path / "gold.txt", "\n".join(LINES)))
    path = write(tmp_path / "predicted.txt", "\n".join(LINES[2:7]))
    assert read_documents(path, gold) == gold[:1]
    with pytest.raises(CorpusError, match=":1: a mention of document 7, which has no title"):
        read_documents(path)
    with pytest.raises(CorpusError, match=":1: a mention of document 7, which is not among the gold"):
        read_documents(path, gold[1:])


@pytest.mark.parametrize(
    "line, mention, notes",
    [
        ("7\t0\t12\tfamilialFMF\tDisease", "Familial FMF", ["written"]),
        ('7\t0\t12\t"familial" FMF\tDisease', "Familial FMF", ["written"]),
        ("7\t18\t25\tp53\tGene\t7157", "`p53` ‘", ["written", "concepts"]),
        ("7\t8\t12\tFMF\tDisease", "FMF", ["trimmed"]),
        ("7\t8\t13\tfmf\tDisease", "FMF", ["written", "trimmed"]),
        ("7\t9\t12\t FMF \tDisease", "FMF", []),
        ("7\t12\t13\t \tDisease", None, ["blank"]),
        ("7\t18\t23\t`p53`\tProteinMutation\ttmVar:p|SUB|R;RS#:6025\t2153\t", "`p53`", ["concepts"]),
        ("7\t9\t12\tFMF\tDisease\t-1", "FMF", []),
        ("7\tCID\tD001\t-1", None, ["relations"]),
        ("7\tPositive_Correlation\t7157\tD003\tNovel", None, ["relations"]),
        ("7\tassociate\tGene|7157\tDisease|MESH:D003\tNo", None, ["relations"]),
    ],
)
def test_official_lines(tmp_path, line, mention, notes):
    """NCBI Disease, tmVar, GNormPlus and BioRED: what curators wrote in their own way is where the offsets say."""
    text = f"7|t|Familial FMF and  `p53` ‘x’\n7|a|\n{line}\n"
    (document,) = documents = read_documents(write(tmp_path / "x.txt", text))
    assert [string for string, _ in strings(document)] == ([mention] if mention else [])
    assert documents.notes == {NOTE[name]: 1 for name in notes}


@pytest.mark.parametrize("line", ["7\tx0\t3\tFlu", "7\tx\t3\tFlu2", "7\t0\t3\tFlu", "7\tO\t3\tFlu", "7\tab\tFlu\tD1"])
def test_a_malformed_mention_is_no_relation(tmp_path, line):
    with pytest.raises(CorpusError, match=":3: neither"):
        read_documents(write(tmp_path / "x.txt", f"7|t|Flu\n7|a|\n{line}\n"))


def test_a_tab_in_a_text_is_a_space_to_every_reader(tmp_path):
    """Otherwise `score` finds another text in the predictions, which cannot hold the tab."""
    path = write(tmp_path / "x.txt", "7|t|A\tfever\n7|a|So\tit\tis.\n7\t2\t7\tfever\tDisease\n")
    (document,) = documents = read_documents(path)
    assert (document.text, strings(document)) == ("A fever So it is.", [("fever", "Disease")])
    assert documents.notes == {NOTE["tab"]: 3}
    handle = io.StringIO()
    write_pubtator(documents, handle)
    assert read_documents(write(tmp_path / "predicted.txt", handle.getvalue()), documents) == documents
    notes = Counter()
    assert [d.text for d in stream_documents(str(path), notes)] == [document.text] and notes == documents.notes


# ---- streams ----


def streamed(path) -> list[tuple[str, str]]:
    return [(document.id, document.text) for document in stream_documents(str(path), Counter())]


def test_a_stream_refuses_what_the_reader_refuses(tmp_path):
    """Two documents of one id gave mentions of one to the other."""
    path = write(tmp_path / "x.txt", "\n7|t|A fever that lasts.\n7|a|\n\n7|t|Rash.\n7|a|\n")
    for read in (read_documents, streamed):
        with pytest.raises(CorpusError, match=":5: a second document 7, with another text .*; ids must be unique"):
            read(path)


def test_a_stream_takes_mentions_that_stand_apart(tmp_path):
    lines = [*LINES[:2], *LINES[8:], *LINES[2:8]]
    path = write(tmp_path / "x.txt", "\n".join(lines))
    assert streamed(path) == [(d.id, d.text) for d in read_documents(path)]
    with pytest.raises(CorpusError, match=":11: a mention of document 9, which has no title line"):
        streamed(write(path, "\n".join([*lines, "9\t0\t1\tx\tGene"])))


@pytest.mark.parametrize("name", ["x.txt", "x.tsv", "x.conll.gz", "nameless"])
@pytest.mark.parametrize("head", ["", "\n", "-DOCSTART- -X- O\n\n", "# a comment\n", "###MEDLINE:1\n\n"])
def test_a_stream_knows_conll(tmp_path, name, head):
    """Each line was a document of its own."""
    data = (head + IOB2).encode()
    path = write(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)
    notes = Counter()
    documents = list(stream_documents(str(path), notes))
    expected = read_documents(write(tmp_path / "x.iob", data))
    assert [(d.text, d.sentences, d.spans) for d in documents] == [(d.text, d.sentences, ()) for d in expected]
    assert notes["documents read as CoNLL (a token and its tag a line)"] == len(expected)


@pytest.mark.parametrize(
    "text", ["Vitamin O\n\nNone.\n", "We gave B-12 to her.\nIt was O in it.\n", "# Notes\n\nNo fever.\n", "a\tb\n"]
)
def test_a_stream_of_text_stays_text(tmp_path, text):
    lines = enumerate(text.splitlines(), start=1)
    assert streamed(write(tmp_path / "x.txt", text)) == [(str(number), line) for number, line in lines if line]


def test_a_stream_of_what_is_named_conll_is_conll(tmp_path):
    with pytest.raises(CorpusError, match="x.conll:2: only one column, 'fever'"):
        streamed(write(tmp_path / "x.conll", "A O\nfever\n"))


# ---- CoNLL ----

IOB2 = """Zorba B-Chemical
- I-Chemical
mycin I-Chemical
cured O
fever B-Disease
nausea B-Disease

Nothing O
left O
"""
SAME = {
    # In IOB1 a B- only parts neighbours of one label.
    "IOB1": IOB2.replace("Zorba B", "Zorba I").replace("fever B", "fever I"),
    "BIOES": IOB2.replace("mycin I", "mycin E").replace("fever B", "fever S").replace("nausea B", "nausea S"),
    "tabs": IOB2.replace(" ", "\t"),
    "columns": IOB2.replace(" ", " X Y "),
    "CRLF and blank lines": IOB2.replace("\n", "\r\n").replace("\r\n\r\n", "\r\n \r\n\r\n"),
    "no line end at the end": IOB2.rstrip(),
    "BOM": "\ufeff" + IOB2,
}


def test_conll(tmp_path):
    first, second = read_documents(write(tmp_path / "dev.tsv", IOB2))
    assert first.text == "Zorba - mycin cured fever nausea"
    assert strings(first) == [("Zorba - mycin", "Chemical"), ("fever", "Disease"), ("nausea", "Disease")]
    assert second == Document("dev-2", "Nothing left", (), ((0, 12),))
    assert first.id == "dev-1"


@pytest.mark.parametrize("form", SAME)
def test_conll_forms_agree(tmp_path, form):
    for name in ("x.iob", "x.conll.gz", "x.bio", "x.txt"):
        plain = read_documents(write(tmp_path / name, IOB2))
        data = gzip.compress(SAME[form].encode()) if name.endswith("gz") else SAME[form]
        assert read_documents(write(tmp_path / name, data)) == plain


def test_conll_documents(tmp_path):
    path = write(tmp_path / "a.b.conll", f"-DOCSTART- -X- O O\n\n{IOB2}\n-DOCSTART-\n\n-DOCSTART-\n{IOB2}")
    first, second = read_documents(path)
    assert (first.id, second.id) == ("a.b-1", "a.b-2")
    assert first.text == "Zorba - mycin cured fever nausea Nothing left"
    parts = [first.text[start:end] for start, end in first.sentences]
    assert parts == ["Zorba - mycin cured fever nausea", "Nothing left"]
    assert first.spans == second.spans and first.text == second.text


@pytest.mark.parametrize(
    "line, text, message",
    [
        (2, "fever O\nnausea\n", "only one column, 'nausea'"),
        (2, "fever O\n\tO\n", "no token in the first column"),
        (1, "fever Disease\n", "'Disease' is no tag"),
        (3, "fever O\n\nnausea B-\n", "'B-' is no tag"),
        (2, "nausea O\nfever B\nrash B-Disease\n", "'B' is no tag"),
    ],
)
def test_conll_errors(tmp_path, line, text, message):
    path = write(tmp_path / "bad.tsv", text)
    with pytest.raises(CorpusError, match=message) as caught:
        read_documents(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")


def test_conll_predictions_take_the_ids_of_the_gold(tmp_path):
    gold = read_documents(write(tmp_path / "gold.tsv", IOB2))
    assert read_documents(write(tmp_path / "mine.tsv", IOB2), gold) == gold
    with pytest.raises(CorpusError, match="2 documents for 1 in the gold"):
        read_documents(tmp_path / "mine.tsv", gold[:1])


@pytest.mark.parametrize(
    "text, mentions, notes",
    [
        # columns that count: in each sentence from 0 or 1, on through the file, sentences before tokens
        ("0\tAda\tB-PER\n1\tfell\tO\n\n0\tBo\tB-PER\n", "Ada fell (PER Ada) Bo (PER Bo)", {"number": 3}),
        ("1 Ada B-PER\n2 fell O\n\n3 Bo B-PER\n", "Ada fell (PER Ada) Bo (PER Bo)", {"number": 3}),
        ("7 1 Ada B-PER\n7 2 fell O\n", "Ada fell (PER Ada)", {"number": 4}),
        ("1984 CD O\nwas VB O\n2001 CD O\n", "1984 was 2001", {}),
        ("2 O\n3 B-NUM\n", "2 3 (NUM 3)", {}),
        # as in CoNLL-U, with the tag before columns that hold none
        (
            "# text = B-12 in O\n1-2\tinm\t_\t_\n1\tin\tO\t_\n2\tRome\tB-LOC\t_\n2.1\tx\t_\t_\n3\t.\tO\t_\n",
            "in Rome . (LOC Rome)",
            {"comment": 1, "number": 3, "no word": 2, "before": 3},
        ),
        # GermEval 2014: two layers; its comments hold a tab
        (
            "#\thttp://a.b [2009-10-17]\n1\tTU\tB-ORG\tO\n2\tRome\tI-ORG\tB-LOC\n",
            "TU Rome (ORG TU Rome) (LOC Rome)",
            {"comment": 1, "number": 2, "layer": 1},
        ),
        # MultiCoNER; a token may be a number sign
        ("# id 4e2 domain=en\nAda _ _ B-PER\n# _ _ O\n", "Ada # (PER Ada)", {"comment": 1}),
        ("###MEDLINE:1\n\nIL-2\tB-DNA\ngene\tI-DNA\n", "IL-2 gene (DNA IL-2 gene)", {"comment": 1}),
        # CoNLL-2003: its phrases are no mentions; a corpus of phrases alone is one
        ("EU NNP B-NP B-ORG\nrejects VBZ B-VP O\n", "EU rejects (ORG EU)", {"phrase": 2}),
        ("EU NNP B-NP\nrejects VBZ B-VP\n", "EU rejects (NP EU) (VP rejects)", {}),
        # several tags in a cell, each mention going on by itself; a label may look like a list
        ("a B-X|B-Y\nb I-X|O\nc I-Y\n", "a b c (Y a) (X a b) (Y c)", {"several": 2}),
        ("a B-X|B-X\nb I-X\n", "a b (X a) (X a b)", {"several": 1}),
        ("a B-X,B-Y\nb O\n", "a b (X a) (Y a)", {"several": 1}),
        ("a B-T047,T033\nb I-T047,T033\n", "a b (T047,T033 a b)", {}),
        # BMES
        ("中 B-LOC\n国 M-LOC\n人 E-LOC\n京 S-LOC\n人 M-PER\n", "中 国 人 京 人 (LOC 中 国 人) (LOC 京) (PER 人)", {}),
        ("EU NNP O\nrejects O\nit PRP O\n", "EU rejects it", {"width": 1}),
        ("\u00a0x\tB-D\n\u2003\tI-D\ny\tO\n\u00a0\tB-D\n", "\u00a0x \u2003 y \u00a0 (D x)", {"trimmed": 1, "blank": 1}),
    ],
)  # fmt: skip
def test_other_people_s_conll(tmp_path, text, mentions, notes):
    """Numbers are no tokens, no label is invented, no layer vanishes without a word."""
    documents = read_documents(write(tmp_path / "x.tsv", text))
    found = [" ".join([d.text, *(f"({s.label} {d.text[s.start : s.end]})" for s in d.spans)]) for d in documents]
    assert " ".join(found) == mentions
    assert documents.notes == {NOTE[name]: count for name, count in notes.items()}


def test_gold_beside_predictions_is_refused(tmp_path):
    """As layers they would be read together, and each counted as the other."""
    path = write(tmp_path / "x.tsv", "Ada NN B-PER B-PER\nfell VB O O\nRome NN B-LOC B-PER\n")
    with pytest.raises(CorpusError, match="of 4 columns, 3 and 4 hold mostly the same tags"):
        read_documents(path)


# ---- any file ----


def test_all_faults_of_a_file_are_told_at_once(tmp_path):
    lines = [*LINES[:2], "7\tx0\t3\tFlu", "7\t1\t2\tFlu\tDisease", LINES[2], "7\t900\t901\tx\tGene", "8|a|y"]
    path = write(tmp_path / "bad.txt", "\n".join(lines))
    with pytest.raises(CorpusError) as caught:
        read_documents(path)
    told = [line.strip().removeprefix(f"{path}:") for line in str(caught.value).splitlines()]
    assert [line[:20] for line in told] == [
        "3: neither `id|t|tit", "4: at 1 to 2 stands ", "6: offsets 900 to 90", "7: the abstract of 8",
    ]  # fmt: skip
    path = write(tmp_path / "bad.tsv", "x Y\n" * 33)
    with pytest.raises(CorpusError) as caught:
        read_documents(path)
    told = str(caught.value).splitlines()
    assert len(told) == 21 and told[19].strip().startswith(f"{path}:20: ") and told[20].strip() == "and 13 more faults"


@pytest.mark.parametrize("end", ["\r", "\r\n", "\r\r\n"])
def test_line_ends(tmp_path, end):
    """Bare CR made a whole file one title, and CR CR LF a sentence of each token."""
    for name, text in (("x.txt", "\n".join(LINES)), ("x.tsv", IOB2)):
        plain = read_documents(write(tmp_path / name, text))
        assert read_documents(write(tmp_path / name, text.replace("\n", end))) == plain
        assert read_documents(write(tmp_path / name, text.replace("\n", end) + end + "\n")) == plain
    with pytest.raises(CorpusError, match=r"x.txt:3: byte 12 \(0xe9\)"):
        read_documents(write(tmp_path / "x.txt", b"7|t|a\r7|a|b\r\xe9"))


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\u00a0", "\x0b", "\x1c"])
def test_characters_that_end_no_line(tmp_path, mark):
    (document,) = read_documents(write(tmp_path / "x.txt", f"7|t|A{mark}fever\n7|a|\n7\t2\t7\tfever\tDisease\n"))
    assert (document.text, strings(document)) == (f"A{mark}fever", [("fever", "Disease")])
    (document,) = read_documents(write(tmp_path / "x.tsv", f"A{mark}b O\nfever B-Disease\n"))
    assert (document.text, strings(document)) == (f"A{mark}b fever", [("fever", "Disease")])


@pytest.mark.parametrize("name", ["a.txt", "a.tsv", "a.PubTator.txt.gz"])
def test_bad_bytes(tmp_path, name):
    path = write(tmp_path / name, "7|t|é ok\n7|a|".encode() + b"caf\xe9\n")
    with pytest.raises(CorpusError, match=re.escape("byte 17 (0xe9) is not UTF-8")) as caught:
        read_documents(path)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_damaged_gzip(tmp_path):
    data = gzip.compress("\n".join(LINES).encode())
    for cut in range(2, len(data)):
        with pytest.raises(CorpusError, match="gzip"):
            read_documents(write(tmp_path / "cut.gz", data[:cut]))
    for place in (20, len(data) // 2, len(data) - 6):
        flipped = bytearray(data)
        flipped[place] ^= 0xFF
        with pytest.raises(CorpusError):
            read_documents(write(tmp_path / "flipped.gz", bytes(flipped)))


@pytest.mark.parametrize("text", ["", "\n \n", "\ufeff", gzip.compress(b"", mtime=0)])
def test_empty_file(tmp_path, text):
    path = write(tmp_path / "empty.txt", text)
    with pytest.raises(CorpusError, match="empty") as caught:
        read_documents(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_no_such_format(tmp_path):
    with pytest.raises(CorpusError, match="x.json:1: neither PubTator"):
        read_documents(write(tmp_path / "x.json", "{}"))
    with pytest.raises(CorpusError, match="absent.txt: cannot be read"):
        read_documents(tmp_path / "absent.txt")
    with pytest.raises(CorpusError, match="cannot be read"):
        read_documents(tmp_path)
    with pytest.raises(CorpusError, match="no sentence"):
        read_documents(write(tmp_path / "x.conll", "-DOCSTART- O\n\n"))


# ---- sentences ----


def test_sentences_cover_the_text():
    text = f"  {TEXT}  (See 3.5 mg)! Done?  "
    parts = [text[start:end] for start, end in sentence_bounds(text)]
    assert parts == [TITLE, "It slept (12 h).", "No α-zorbamycin was left.", CLINIC, "(See 3.5 mg)!", "Done?"]
    assert sentence_bounds(" \n") == ()


def test_sentence_spans_are_relative_and_answers_have_the_outermost():
    text = "Acute renal failure came. Then nausea. Vomiting too."
    spans = [
        Span(0, 19, "Disease"),
        Span(6, 11, "Organ"),
        Span(6, 19, "Disease"),
        Span(31, 37, "Disease"),
        Span(31, 47, "Disease"),
    ]
    document = Document("1", text, tuple(sorted(spans)), sentence_bounds(text))
    first, second, third = sentences_of(document)
    assert first.spans == tuple(spans[:3]) and third.spans == ()
    assert [text[second.start :][span.start : span.end] for span in second.spans] == ["nausea"]
    assert outermost(first.spans) == outermost(first.spans, {"Disease"}) == spans[:1]
    assert outermost(first.spans, {"Organ"}) == spans[1:2]
    assert unanswerable([document], {"Organ"}) == {"cut_by_sentence_end": 0, "overlapping": 0}
    counts = corpus_statistics([document])
    assert (counts["overlapping"], counts["cut_by_sentence_end"]) == (2, 1)
    assert counts["mentions"] == {"Disease": 4, "Organ": 1}


def test_labels_in_the_papers_order():
    spans = tuple(Span(0, 1, label) for label in ("Gene", "Chemical", "Anatomy", "Disease", "Gene"))
    assert labels_of([Document("1", "x", spans, ())]) == ("Disease", "Chemical", "Anatomy", "Gene")


# ---- writing ----


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        "One sentence",
        "",
        "Two.  Spaces between.",
        "A tab.\tThen. \n New lines.\r\nEnd.",
        " Leads. And trails. ",
        "Odd\u2028line. Ends\x0b here.\x85 Ok.",
        "Nbsp.\u00a0Here. Then.",
        "Trails. ",
        "\n\n",
        "\U0001f922. 高血压。 Ok.",
    ],
)
def test_pubtator_round_trip(tmp_path, text):
    places = (k for k in range(0, len(text) - 1, 3) if text[k : k + 2] == text[k : k + 2].strip())
    spans = tuple(Span(k, k + 2, "Disease") for k in places)
    other = Document("8", "Other.", (), ((0, 6),))
    handle = io.StringIO()
    write_pubtator([Document("7-1", text, spans, sentence_bounds(text)), other], handle)
    first, second = read_documents(write(tmp_path / "x.txt", handle.getvalue()))
    assert first.text == re.sub(r"[\t\r\n]", " ", text)
    assert (first.id, first.spans, second) == ("7-1", spans, other)


def test_pubtator_ids_are_checked():
    for id in ("", "a|b", "a\tb"):
        with pytest.raises(CorpusError):
            write_pubtator([Document(id, "x", (), ())], io.StringIO())


def test_conll_to_pubtator(tmp_path):
    documents = read_documents(write(tmp_path / "dev.tsv", IOB2))
    handle = io.StringIO()
    write_pubtator(documents, handle)
    assert read_documents(write(tmp_path / "dev.txt", handle.getvalue())) == documents


# ---- splits ----


def test_find_splits(tmp_path):
    names = {"train": "CDR_trainingset.pubtator.TXT.gz", "dev": "devel.tsv", "test": "Test.PubTator"}
    for name in (*names.values(), "notes.txt", "train.csv"):
        write(tmp_path / name, "x")
    assert find_splits(tmp_path) == {split: tmp_path / name for split, name in names.items()}
    write(tmp_path / "valid.conll.gz", "x")
    with pytest.raises(CorpusError, match="two files for dev, devel.tsv and valid.conll.gz"):
        find_splits(tmp_path)


def test_no_splits(tmp_path):
    with pytest.raises(CorpusError, match="no corpus file.*CDR_TrainingSet.*validation.*tsv") as caught:
        find_splits(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    with pytest.raises(CorpusError, match="no such corpus folder"):
        find_splits(tmp_path / "absent")


# ---- the official corpus ----


def test_bc5cdr_is_table_5(bc5cdr):
    for split, path in find_splits(bc5cdr).items():
        counts = corpus_statistics(read_documents(path))
        assert tuple(counts["mentions"].values()) == TABLE_5[split]
        assert list(counts["mentions"]) == ["Disease", "Chemical"]
        assert counts["documents"] == 500
        assert counts["cut_by_sentence_end"] == counts["overlapping"] == 0


def test_bc5cdr_sentences(bc5cdr):
    for split, path in find_splits(bc5cdr).items():
        documents = read_documents(path)
        plain_rule = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9(\[])")
        cuts = [(document, cut) for document in documents for cut in plain_rule.finditer(document.text)]
        assert len(cuts) + len(documents) == {"train": 4580, "dev": 4592, "test": 4821}[split]
        guarded = sum(document.text[: cut.start()].endswith("St.") for document, cut in cuts)
        assert corpus_statistics(documents)["sentences"] == len(cuts) + len(documents) - guarded
        for document in documents:
            for sentence in sentences_of(document):
                end = sentence.start + len(sentence.text)
                assert document.text[sentence.start : end] == sentence.text == sentence.text.strip()


def test_bc5cdr_round_trip(bc5cdr, tmp_path):
    for path in find_splits(bc5cdr).values():
        documents = read_documents(path)
        handle = io.StringIO()
        write_pubtator(documents, handle)
        assert read_documents(write(tmp_path / "copy.txt", handle.getvalue())) == documents


def test_bc5cdr_iob(bc5cdr_iob):
    sizes = {"train": 4560, "dev": 4581, "test": 4797}
    for split, path in find_splits(bc5cdr_iob).items():
        documents = read_documents(path)
        disease, chemical = TABLE_5[split]
        assert len(documents) == sizes[split]
        # The tokenised development split cuts two disease mentions in two.
        expected = {"Disease": disease + 2 * (split == "dev"), "Chemical": chemical}
        assert corpus_statistics(documents)["mentions"] == expected


def test_pubtator_behind_a_comment_is_refused_by_its_line(tmp_path):
    """`predict` took each of its lines for a document."""
    path = tmp_path / "text.txt"
    path.write_text("# made by hand\n1|t|Flu and cold.\n1|a|x\n1\t0\t3\tFlu\tDisease\n")
    for read in (read_documents, lambda path: list(stream_documents(str(path), Counter()))):
        with pytest.raises(CorpusError, match="text.txt:1: neither"):
            read(path)
