"""Corpora as documents: one text, its mentions as character offsets into it, and its sentence bounds.

Offsets count Unicode code points from 0, ends are exclusive. Two families of files are read, gzipped or not:
PubTator (BC5CDR) and CoNLL (one token and its tag a line). Whatever is wrong with a file is a `CorpusError`
that names the file and, where there is one, the line.
"""

import gzip
import re
import sys
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import BinaryIO, TextIO

from .errors import InputError


@dataclass(frozen=True, order=True)
class Span:
    """A labelled stretch of a text: characters `start` to `end` (exclusive)."""

    start: int
    end: int
    label: str


@dataclass(frozen=True)
class Document:
    """A text with its mentions (sorted, distinct, perhaps nested) and its sentence bounds, all as offsets."""

    id: str
    text: str
    spans: tuple[Span, ...]
    sentences: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Sentence:
    """One sentence of a document: the unit of a prompt. `spans` are relative to it and never overlap."""

    document: str  # id of the document
    start: int  # offset of the sentence in it: document offset = start + sentence offset
    text: str
    spans: tuple[Span, ...]


class CorpusError(InputError):
    """A file that is no corpus. The message starts with `file:line: ` (or the file or folder alone)."""


# ---- sentences and counts ----

# The second guard keeps "St. Thomas" whole: without it two mentions of BC5CDR would be cut.
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\bSt\.)\s+(?=[A-Z0-9(\[])")


def sentence_bounds(text: str) -> tuple[tuple[int, int], ...]:
    """Bounds of the sentences of running text, without the whitespace around them. Never looks at gold."""
    breaks = [(match.start(), match.end()) for match in _SENTENCE_END.finditer(text)]
    starts = [len(text) - len(text.lstrip()), *(end for _, end in breaks)]
    ends = [*(start for start, _ in breaks), len(text.rstrip())]
    return tuple((start, end) for start, end in zip(starts, ends, strict=True) if start < end)


def sentences(document: Document) -> list[Sentence]:
    """The document's sentences with their mentions.

    Of overlapping mentions the longest stays; a mention that crosses a sentence end is in no sentence
    (`statistics` counts both).
    """
    result = []
    for start, end in document.sentences:
        inside = [span for span in document.spans if start <= span.start and span.end <= end]
        spans = [Span(span.start - start, span.end - start, span.label) for span in outermost(inside)]
        result.append(Sentence(document.id, start, document.text[start:end], tuple(spans)))
    return result


def all_sentences(documents: Iterable[Document]) -> list[Sentence]:
    """The sentences of documents, one document after the other."""
    return [sentence for document in documents for sentence in sentences(document)]


def outermost(spans: Iterable[Span]) -> list[Span]:
    """The spans in order of their start, without those that overlap a longer one."""
    kept: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.start - span.end, span)):
        if all(span.end <= other.start or other.end <= span.start for other in kept):
            kept.append(span)
    return sorted(kept)


def label_order(names: Iterable[str]) -> tuple[str, ...]:
    """Distinct labels in the paper's order, Disease and Chemical first, the rest alphabetical."""
    first = ("Disease", "Chemical")
    names = set(names)
    return (*(name for name in first if name in names), *sorted(names.difference(first)))


def labels(documents: Iterable[Document]) -> tuple[str, ...]:
    """The labels that occur, in `label_order`."""
    return label_order(span.label for document in documents for span in document.spans)


def statistics(documents: Sequence[Document]) -> dict:
    """Counts of a corpus: `mentions` is Table 5; lengths are in characters.

    `cut_by_sentence_end` and `overlapping` are the mentions that `sentences` leaves out: those that cross a
    sentence end, and those that overlap a longer one.
    """
    mentions = Counter(span.label for document in documents for span in document.spans)
    lengths = [end - start for document in documents for start, end in document.sentences] or [0]
    inside = kept = 0
    for document in documents:
        inside += sum(
            any(start <= span.start and span.end <= end for start, end in document.sentences) for span in document.spans
        )
        kept += sum(len(sentence.spans) for sentence in sentences(document))
    return {
        "documents": len(documents),
        "sentences": sum(len(document.sentences) for document in documents),
        "mentions": {label: mentions[label] for label in label_order(mentions)},
        "characters_per_sentence": {"mean": sum(lengths) / len(lengths), "max": max(lengths)},
        "cut_by_sentence_end": mentions.total() - inside,
        "overlapping": inside - kept,
    }


# ---- reading ----

_TEXT_LINE = re.compile(r"([^|\t]+)\|([ta])\|(.*)")
_MENTION_LINE = re.compile(r"[^\t]+\t\d+\t\d+\t[^\t]+\t(?!(?:O|[BIESLU]-[^\t]+)\s*$)[^\t]+")
# `id CID chemical disease`, and the fifth column of BioRED. Anything else with tabs has to be a mention.
_RELATION_LINE = re.compile(r"[^\t]+\t[A-Za-z][\w-]*\t[^\t]+\t[^\t]+(\t(Novel|No))?\s*")
_TAG = re.compile(r"O|[BIESLU]-.+")
_CONLL_NAME = re.compile(r"\.(tsv|conll|iob|bio|txt)(\.gz)?$", re.IGNORECASE)


def read(path: str | Path, reference: Sequence[Document] = ()) -> list[Document]:
    """Reads PubTator (known by its first line, under any name) or CoNLL (.tsv .conll .iob .bio .txt, or .gz).

    Args:
        reference: for a file of predictions, the gold documents it is about. PubTator may then lack the text
            lines, and CoNLL, which has no document ids, takes those of the reference in order.

    Raises:
        CorpusError: neither of them, or a file that is malformed or cannot be read.
    """
    path = Path(path)
    first = next((line for _, line in _read_lines(path) if line.strip()), None)
    if first is None:
        raise CorpusError(f"{path}: empty; expected PubTator or CoNLL")
    if is_pubtator(first):
        return read_pubtator(path, reference)
    if _CONLL_NAME.search(path.name):
        return read_conll(path, reference)
    raise CorpusError(
        f"{path}:1: neither PubTator (`id|t|title`) nor, by its name, CoNLL; "
        "give a CoNLL file one of the endings .tsv .conll .iob .bio .txt (.gz)"
    )


def stream(path: str) -> Iterator[Document]:
    """The documents of a file or of standard input (`-`), without their mentions, as they come.

    PubTator is known by its first line; in other text each line that is not blank is a document, its id the number
    of the line.

    Raises:
        CorpusError: text that is not UTF-8, or malformed PubTator.
    """
    lines = decoded_lines(sys.stdin.buffer, "standard input") if path == "-" else _read_lines(Path(path))
    first = next(lines, None)
    if first is None:
        return
    lines = chain([first], lines)
    if is_pubtator(first[1]):
        for record in pubtator_records(lines):
            if record.text is None:
                raise _without_title(record.where, record.id)
            yield Document(record.id, record.text, (), sentence_bounds(record.text))
        return
    for number, (_, line) in enumerate(lines, start=1):
        if line.strip():
            yield Document(str(number), line, (), sentence_bounds(line))


def is_pubtator(line: str) -> bool:
    """Whether the first line of a file is one of PubTator's."""
    return bool(_TEXT_LINE.fullmatch(line) or _MENTION_LINE.match(line))


@dataclass
class Record:
    """Lines of a PubTator file that stand together and belong to one document.

    Attributes:
        where: `file:line` of the first.
        text: title and abstract; None where mention lines stand without them.
        mentions: the columns of each mention line, with its `file:line`.
    """

    where: str
    id: str
    text: str | None
    mentions: list[tuple[str, list[str]]] = field(default_factory=list)


def pubtator_records(lines: Iterable[tuple[str, str]]) -> Iterator[Record]:
    """Parses PubTator as it comes: `id|t|title`, `id|a|abstract`, then mentions `id start end text label`, tabbed.

    The text is title + one space + abstract, as the standard counts its offsets. Relations are skipped.

    Args:
        lines: each with its `file:line`.

    Raises:
        CorpusError: a line that is none of these, an abstract without its title, a second document of one id.
    """
    seen: set[str] = set()
    record = None
    awaits_abstract = False
    for where, line in lines:
        if not line.strip():
            continue
        if match := _TEXT_LINE.fullmatch(line):
            id, part, content = match.groups()
            if part == "t":
                if id in seen:
                    raise CorpusError(f"{where}: a second document {id}; ids must be unique in a file")
                if record:
                    yield record
                seen.add(id)
                record, awaits_abstract = Record(where, id, content), True
            elif record and awaits_abstract and record.id == id:
                record.text, awaits_abstract = f"{record.text} {content}" if content else record.text, False
            else:
                raise CorpusError(f"{where}: the abstract of {id} must follow its title line `{id}|t|...`")
            continue
        awaits_abstract = False
        if _RELATION_LINE.fullmatch(line):
            continue
        columns = line.split("\t")
        if len(columns) < 5:
            raise CorpusError(
                f"{where}: neither `id|t|title`, `id|a|abstract` nor a mention "
                "`id start end text label` with tabs between its columns"
            )
        if record is None or record.id != columns[0]:
            if record:
                yield record
            record = Record(where, columns[0], None)
        record.mentions.append((where, columns))
    if record:
        yield record


def read_pubtator(path: str | Path, reference: Sequence[Document] = ()) -> list[Document]:
    """Reads a PubTator file, see `pubtator_records`; `reference` and errors as of `read`."""
    known = {document.id: document.text for document in reference}
    texts: dict[str, str] = {}
    spans: dict[str, set[Span]] = {}
    for record in pubtator_records(_read_lines(Path(path))):
        text = record.text if record.text is not None else texts.get(record.id, known.get(record.id))
        if text is None:
            raise _without_title(record.where, record.id, known)
        texts[record.id] = text
        found = spans.setdefault(record.id, set())
        found.update(_mention(where, columns, text) for where, columns in record.mentions)
    return [Document(id, text, tuple(sorted(spans[id])), sentence_bounds(text)) for id, text in texts.items()]


def _without_title(where: str, id: str, known: Collection[str] = ()) -> CorpusError:
    lacking = "is not among the gold documents" if known else "has no title line before this one"
    return CorpusError(f"{where}: a mention of document {id}, which {lacking}")


def _mention(where: str, fields: list[str], text: str) -> Span:
    start, end, written, label = fields[1:5]
    for offset in (start, end):
        if not re.fullmatch("[0-9]{1,18}", offset):
            raise CorpusError(f"{where}: the offset {offset!r} is not a whole number; write digits")
    span = Span(int(start), int(end), label.strip())
    if not span.label:
        raise CorpusError(f"{where}: the mention {written!r} has no label in its fifth column")
    if not span.start < span.end <= len(text):
        raise CorpusError(
            f"{where}: offsets {start} to {end} lie outside the text of {fields[0]} "
            f"({len(text)} characters) or are empty; count characters, not bytes"
        )
    stands = text[span.start : span.end]
    if stands != written:
        raise CorpusError(
            f"{where}: at {start} to {end} stands {stands!r}, not {written!r}; "
            "count characters, not bytes, of title + one space + abstract"
        )
    return span


def read_conll(path: str | Path, reference: Sequence[Document] = ()) -> list[Document]:
    """Reads CoNLL: a token first, its IOB1, IOB2 or BIOES tag last in a line, tabs or spaces between columns.

    A blank line ends a sentence. `-DOCSTART-` lines separate documents; without them each sentence is one.
    The text is the tokens joined by single spaces. Ids are the file's stem and running number (`dev-17`), or
    those of the `reference` in order (see `read`). Raises CorpusError.
    """
    path = Path(path)
    groups: list[list[list[tuple[str, str]]]] = [[]]  # documents of sentences of (token, tag)
    sentence: list[tuple[str, str]] = []
    marked = False
    for where, line in chain(_read_lines(path), [("", "")]):
        fields = re.split(r" *\t *" if "\t" in line else " +", line.strip("\t "))
        if line.strip() and fields[0] != "-DOCSTART-":
            sentence.append(_token(where, fields))
            continue
        if sentence:
            groups[-1].append(sentence)
            sentence = []
        if line.strip():
            marked = True
            groups.append([])
    if not marked:
        groups = [[sentence] for sentence in groups[0]]
    groups = [group for group in groups if group]
    if not groups:
        raise CorpusError(f"{path}: no sentence in it; a line holds a token and its tag")
    if reference and len(groups) > len(reference):
        raise CorpusError(
            f"{path}: {len(groups)} documents for {len(reference)} in the gold; "
            "predictions must keep the documents of the gold in their order"
        )
    stem = _CONLL_NAME.sub("", path.name)
    ids = [document.id for document in reference] or [f"{stem}-{index + 1}" for index in range(len(groups))]
    return [_from_tokens(id, group) for id, group in zip(ids, groups, strict=False)]


def _token(where: str, fields: list[str]) -> tuple[str, str]:
    if len(fields) < 2:
        raise CorpusError(f"{where}: only one column, {fields[0]!r}; a line holds a token and its tag")
    if not _TAG.fullmatch(fields[-1]):
        raise CorpusError(f"{where}: {fields[-1]!r} is no tag; the last column must be like O or B-Disease")
    return fields[0], fields[-1]


def _from_tokens(id: str, group: list[list[tuple[str, str]]]) -> Document:
    spans: list[Span] = []
    bounds = []
    position = 0  # where the next token starts
    for sentence in group:
        bounds.append((position, position + sum(len(token) + 1 for token, _ in sentence) - 1))
        open_label = None  # IOB1: an I- tag that does not continue a mention of its label starts one
        for token, tag in sentence:
            prefix, _, label = tag.partition("-")
            end = position + len(token)
            if prefix in "IEL" and label == open_label:
                spans[-1] = replace(spans[-1], end=end)
            elif prefix != "O":
                spans.append(Span(position, end, label))
            open_label = label if prefix in "BI" else None
            position = end + 1
    text = " ".join(token for sentence in group for token, _ in sentence)
    return Document(id, text, tuple(spans), tuple(bounds))


def _read_lines(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with path.open("rb") as file:
            yield from decoded_lines(file, str(path))
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def decoded_lines(file: BinaryIO, name: str) -> Iterator[tuple[str, str]]:
    """The lines of UTF-8 text, gzipped or not, each with its `name:number`, without their ends: LF or CRLF, with or
    without a BOM. They are not cut at other characters that may stand inside a text, such as U+2028.

    Raises:
        CorpusError: a damaged gzip file, or bytes that are not UTF-8.
    """
    start = 0  # of the line, in bytes
    try:
        if file.peek(2)[:2] == b"\x1f\x8b":
            file = gzip.open(file)  # noqa: SIM115  (its caller closes the file beneath)
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise CorpusError(
                    f"{name}:{number}: byte {start + error.start} ({line[error.start]:#04x}) is not UTF-8; "
                    "convert the file to UTF-8"
                ) from error
            start += len(line)
            yield f"{name}:{number}", text.removesuffix("\n").removesuffix("\r")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CorpusError(f"{name}: a truncated or damaged gzip file ({error}); fetch it again") from error


# ---- writing, and finding the splits of a corpus ----


def write_pubtator(documents: Iterable[Document], file: TextIO) -> None:
    """Writes PubTator that `read_pubtator` reads back with the same id, text and spans; concept ids are `-1`.

    Tabs and line ends in a text become spaces, one for one, since the format cannot hold them.
    """
    for document in documents:
        if not re.fullmatch(r"[^|\t\r\n]+", document.id):
            raise CorpusError(f"{document.id!r}: no PubTator id; it must be without |, tab, line end")
        text = re.sub(r"[\t\r\n]", " ", document.text)
        cut = document.sentences[0][1] if document.sentences else len(text)
        # The reader puts one space between title and abstract: cut only where the text has just that.
        title, abstract = (text[:cut], text[cut + 1 :]) if text[cut : cut + 1] == " " else (text, "")
        if not abstract:
            title = text
        file.write(f"{document.id}|t|{title}\n{document.id}|a|{abstract}\n")
        for span in document.spans:
            mention = (document.id, span.start, span.end, text[span.start : span.end], span.label, -1)
            file.write("\t".join(map(str, mention)) + "\n")
        file.write("\n")


_SPLITS = {
    "train": ("training", "train"),
    "dev": ("development", "dev|devel|valid|validation"),
    "test": ("test", "test"),
}


def find_splits(folder: str | Path) -> dict[str, Path]:
    """The files of a corpus folder under `train`, `dev` and `test`, those that there are.

    Raises CorpusError if there is none, or two for one split.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CorpusError(f"{folder}: no such folder; give the folder that holds the corpus files")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        for split, (official, plain) in _SPLITS.items():
            plain = rf"({plain})\.(tsv|conll|iob|bio|txt|pubtator|pubtator\.txt)"
            name = rf"(cdr_{official}set\.pubtator\.txt|{plain})(\.gz)?"
            if not re.fullmatch(name, path.name, re.IGNORECASE):
                continue
            if split in found:
                both = f"{found[split].name} and {path.name}"
                raise CorpusError(f"{folder}: two files for {split}, {both}; keep one")
            found[split] = path
    if not found:
        raise CorpusError(
            f"{folder}: no corpus file in it; looked for CDR_TrainingSet.PubTator.txt, "
            "CDR_DevelopmentSet.PubTator.txt, CDR_TestSet.PubTator.txt, or train, dev (devel, "
            "valid, validation), test with the ending .tsv .conll .iob .bio .txt .PubTator "
            ".PubTator.txt, each also .gz"
        )
    return {split: found[split] for split in _SPLITS if split in found}
