"""convert: any format into any other, what that could not hold, and what is refused."""

import json
import re
import string
from collections import Counter
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamalora.__main__ import main
from llamalora.corpus.documents import Document, Span, sentence_bounds
from llamalora.corpus.format import Format
from llamalora.corpus.read import FORMATS, find_splits, read_documents, read_splits
from llamalora.errors import InputError

SAMPLE = Path(__file__).parents[2] / "data/sample"
NAMES = {
    "pubtator": "x.PubTator", "conll": "x.conll", "brat": "x", "bioc": "x.xml", "biocjson": "x.json",
    "jsonl": "x.jsonl", "hf": "x.json",
}  # fmt: skip
OFFSETS = ("pubtator", "brat", "bioc", "biocjson", "jsonl")


def convert(*arguments) -> None:
    main(["convert", *map(str, arguments)])


def needs_library(form: str) -> None:
    if form == "bioc":
        pytest.importorskip("bioc")


def bare(document: Document) -> list[tuple[str, str]]:
    """Label and characters of each mention, whatever the spaces."""
    return [(re.sub(r"\s", "", document.text[span.start : span.end]), span.label) for span in document.spans]


def written(documents, form: Format, place: Path) -> Counter[str]:
    lost: Counter[str] = Counter()
    if form.folder:
        form.write(documents, place, lost)
    else:
        file = StringIO()
        form.write(documents, file, lost)
        place.write_text(file.getvalue(), encoding="utf-8", newline="")
    return +lost


@pytest.mark.parametrize("form", FORMATS)
def test_there_and_back(form, tmp_path, capsys):
    """The sample corpus, as a folder of splits: nothing is lost, but for spaces between tokens."""
    needs_library(form)
    convert("--to", form, SAMPLE, tmp_path / "there")
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["train", "dev", "test"] and said[-1] == f"written to {tmp_path / 'there'} ({form})"
    assert said[1:5] == [
        "documents             75   22    22",
        "Disease mentions     496  168   176",
        "Chemical mentions    435  129   129",
        "mentions             931  297   305",
    ]
    assert not re.search("mentions that|cut in other places|of them written", "\n".join(said))
    convert("--to", "pubtator", tmp_path / "there", tmp_path / "back")
    gold = read_splits(SAMPLE)
    for name, documents in read_splits(tmp_path / "back").items():
        if form in OFFSETS:
            assert sorted(documents, key=lambda one: one.id) == sorted(gold[name], key=lambda one: one.id)
        else:
            assert list(map(bare, documents)) == list(map(bare, gold[name]))


@pytest.mark.parametrize("form", FORMATS)
def test_a_format_is_known_by_what_it_looks_like(form, tmp_path, capsys):
    """Under the name that convert gives it, as one file or folder, and by the ending of that name, if that says it."""
    needs_library(form)
    dev = find_splits(SAMPLE)["dev"]
    by_name = form not in ("brat", "hf")
    convert(*([] if by_name else ["--to", form]), dev, tmp_path / NAMES[form])
    assert capsys.readouterr().out.endswith(f"written to {tmp_path / NAMES[form]} ({form})\n")
    assert sum(map(len, map(bare, read_documents(tmp_path / NAMES[form])))) == 297
    convert(tmp_path / NAMES[form], tmp_path / "again.jsonl")
    main(["score", str(tmp_path / NAMES[form]), str(tmp_path / "again.jsonl"), "--json"])
    out = capsys.readouterr().out
    assert json.loads(out[out.index("{") :])["micro"]["tp"] == 297


def test_what_is_lost_is_told(tmp_path, capsys):
    text = "Na+ fell\nand HT2 rose. It slept."
    mentions = [[0, 8, "A"], [0, 3, "B"], [13, 15, "A"], [20, 25, "B"]]
    source = tmp_path / "x.jsonl"
    source.write_text(json.dumps({"id": "a", "text": text, "label": mentions, "meta": 1}) + "\n")
    convert(source, tmp_path / "x.conll")
    assert capsys.readouterr().out.splitlines() == [
        "documents        1",
        "A mentions       2",
        "B mentions       2",
        "mentions         4",
        "of them written  1",
        "read: fields 'meta' not read: 1",
        "not kept: mentions that overlap a longer one, left out: 1",
        "not kept: mentions that begin or end within a token, left out: 1",
        "not kept: mentions that cross the end of a sentence, left out: 1",
        "not kept: documents whose spaces are not kept between tokens: 1",
        "not kept: ids of documents, which CoNLL does not hold: 1",
        f"written to {tmp_path / 'x.conll'} (conll)",
    ]
    convert("--to", "pubtator", source, tmp_path / "x.txt")
    assert "not kept: tabs and line ends in texts, written as spaces: 1\n" in capsys.readouterr().out
    main(["score", str(source), str(tmp_path / "x.txt")])  # offsets are the same
    assert "100.00  100.00  100.00   4   0   0" in capsys.readouterr().out
    source.write_text(json.dumps({"id": "a", "text": "One line\nand another line"}) + "\n")
    convert("--to", "pubtator", source, tmp_path / "y.txt")
    assert "not kept: documents whose sentences will be cut in other places: 1\n" in capsys.readouterr().out


REFUSED = [
    (["x.jsonl", "x.jsonl"], "x.jsonl: is there"),
    (["x.jsonl", "y.out"], "--to is needed, since by its name .*y.out may be any of pubtator, .*brat, conll"),
    (["x.jsonl", "y.txt"], "--to is needed, since by its name .*y.txt may be any of pubtator, conll$"),
    (["x.jsonl", "y.conll.gz"], "--to is needed|written plain"),
    (["--to", "conll", "x.jsonl", "y.gz"], "written plain; leave .gz out"),
    (["x.jsonl", "no/y.conll"], "there is no folder .*no"),
    (["--to", "brat", "full", "full/copy"], "full/copy: lies in .*full, which would then hold it, too"),
    (["--to", "brat", "x.jsonl", "full"], "full: exists and is not an empty folder; name a folder that is new"),
    (["full", "new"], "no corpus file in it"),
    (["corpus", "new"], "--to is needed, since a folder of splits may be any"),
    (["--to", "hf", "corpus", "full"], "full: exists"),
    (["--from", "hf", "x.jsonl", "y.conll"], "x.jsonl:1: no tokens"),
    (["absent", "y.conll"], "absent: no such file or folder$"),
    (["y.jsonl", "y.conll"], "y.jsonl: no such file or folder; did you mean .*x.jsonl"),
    (["--to", "pubtator", "x.jsonl", "y.txt"], "no PubTator id"),
    (["--to", "brat", "x.jsonl", "new"], "cannot be the name of a file"),
]


@pytest.mark.parametrize("arguments, message", REFUSED)
def test_refusals_leave_nothing(arguments, message, tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"id": "../a|b", "text": "Flu", "label": [[0, 3, "D"]]}) + "\n")
    for folder in ("full", "corpus"):
        (tmp_path / folder).mkdir()
    (tmp_path / "full/notes").touch()
    (tmp_path / "corpus/train.tsv").write_text("Flu\tB-D\n")
    before = sorted(tmp_path.rglob("*"))
    places = [value if value.startswith("--") or value in FORMATS else tmp_path / value for value in arguments]
    with pytest.raises(InputError, match=message):
        convert(*places)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_stands_beside_the_target_stays(tmp_path):
    """Also under the names that a run's folder has while it is replaced."""
    for name in ("x.old", "x.tmp", "x"):
        (tmp_path / name).mkdir()
    for name in ("x.old/mine", "x.tmp/mine", "x.xml.tmp", "x.xml.old"):
        (tmp_path / name).write_text("mine")
    for target in ("x", "x.xml"):
        convert(SAMPLE / "dev.PubTator.txt", tmp_path / target, "--to", "brat" if target == "x" else "bioc")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "x",
        "x.old",
        "x.tmp",
        "x.xml",
        "x.xml.old",
        "x.xml.tmp",
    ]
    for name in ("x.old/mine", "x.tmp/mine", "x.xml.tmp", "x.xml.old"):
        assert (tmp_path / name).read_text() == "mine"


# ---- round trips of any text ----

TEXTS = st.text(
    st.sampled_from(
        string.ascii_letters[:6] + string.digits[:3] + " .,-()#|[]{}<&\"'_αé\u0301\U0001f922血\u2028\xa0\n"
    ),
    max_size=40,
)
LABELS = st.sampled_from(["Disease", "B-x", "O", "α β", "T047,T033", "x/B-y"])


@st.composite
def documents(draw) -> list[Document]:
    found = []
    for number in range(draw(st.integers(1, 3))):
        text = draw(TEXTS)
        spans = set()
        for _ in range(draw(st.integers(0, 3)) if text else 0):
            start = draw(st.integers(0, len(text) - 1))
            end = draw(st.integers(start + 1, len(text)))
            if text[start:end] == text[start:end].strip():
                spans.add(Span(start, end, draw(LABELS)))
        found.append(Document(f"id {number}", text, tuple(sorted(spans)), sentence_bounds(text)))
    return found


@pytest.mark.parametrize("form", OFFSETS)
@settings(max_examples=60, deadline=None)
@given(made=documents())
def test_any_text_with_any_mentions(form, made, tmp_path_factory):
    """All of it comes back, but for what was counted: line ends as spaces (PubTator), labels without spaces (brat)."""
    needs_library(form)
    place = tmp_path_factory.mktemp("any") / NAMES[form]
    lost = written(made, FORMATS[form], place)
    back = read_documents(place, form=FORMATS[form])
    for one, other in zip(made, back, strict=True):
        text = one.text.replace("\n", " ") if form == "pubtator" else one.text
        spans = tuple(Span(s.start, s.end, s.label.replace(" ", "_") if form == "brat" else s.label) for s in one.spans)
        assert (other.id, other.text, other.spans) == (one.id, text, tuple(sorted(spans)))
    assert bool(lost) == any(
        "\n" in one.text if form == "pubtator" else form == "brat" and any(" " in s.label for s in one.spans)
        for one in made
    )


@pytest.mark.parametrize("form", ["conll", "hf"])
@settings(max_examples=60, deadline=None)
@given(made=documents())
def test_any_tokens_with_any_tags(form, made, tmp_path_factory):
    """What was written is counted, and once it is tokens it stays as it is."""
    place = tmp_path_factory.mktemp("any") / NAMES[form]
    lost = written(made, FORMATS[form], place)
    if not any(one.sentences for one in made):
        return
    back = read_documents(place, form=FORMATS[form])
    left_out = sum(count for what, count in lost.items() if what.endswith("left out") and "mentions" in what)
    assert sum(len(one.spans) for one in back) == sum(len(one.spans) for one in made) - left_out
    assert len(back) == sum(bool(one.sentences) for one in made)
    first = place.read_text(encoding="utf-8")
    again = written(back, FORMATS[form], place)
    assert place.read_text(encoding="utf-8") == first and not again


def test_streams_are_refused():
    with pytest.raises(InputError, match="-: files are read and written, no streams"):
        main(["convert", "x.jsonl", "-", "--to", "conll"])


def test_what_cannot_be_read_again_is_not_left(tmp_path):
    (tmp_path / "e.PubTator").write_text("1|t|\n1|a|\n\n")
    for _ in range(2):
        with pytest.raises(InputError, match="no sentence in it"):
            convert(tmp_path / "e.PubTator", tmp_path / "e.conll")
        assert not (tmp_path / "e.conll").exists()


def test_an_object_of_numbers_holds_no_mentions(tmp_path, capsys):
    """The labels of a classification."""
    (tmp_path / "x.jsonl").write_text('{"text": "Aspirin helps", "labels": {"toxic": 1}}\n')
    convert(tmp_path / "x.jsonl", tmp_path / "y.jsonl")
    assert "fields 'labels' that hold no mentions, not read: 1" in capsys.readouterr().out


def test_an_object_over_several_lines_is_one(tmp_path):
    (tmp_path / "x.json").write_text('{"documents": [\n{"id": "1", "passages": [{"offset": 0, "text": "Flu."}]}\n]}\n')
    convert("--from", "biocjson", tmp_path / "x.json", tmp_path / "y.jsonl")
    assert json.loads((tmp_path / "y.jsonl").read_text())["text"] == "Flu."
    (tmp_path / "x.json").write_text('{"documents": [{"id": "1", "passages": [{"offset": 1e400, "text": "Flu."}]}]}\n')
    with pytest.raises(InputError, match="document 1: no BioC"):
        convert("--from", "biocjson", tmp_path / "x.json", tmp_path / "z.jsonl")
