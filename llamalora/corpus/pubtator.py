"""PubTator, the format of BC5CDR: read, as a file or as it comes, and written."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from .documents import CorpusError, Document, Reading, Span, sentence_bounds
from .format import Format, first_line
from .tagged import TAG

# ---- reading ----

_TEXT_LINE = re.compile(r"([^|\t]+)\|([ta])\|(.*)")
_MENTION_LINE = re.compile(rf"[^\t]+\t\d+\t\d+\t[^\t]+\t(?!{TAG}\s*$)[^\t]+")
# `id CID chemical disease`, and the fifth column of BioRED: a name and two concepts, which have a number somewhere.
# Anything else with tabs has to be a mention.
_CONCEPT = r"\t(-|[^\t ]*[0-9][^\t ]*)"
_RELATION_LINE = re.compile(rf"[^\t]+\t[A-Za-z][A-Za-z_-]+({_CONCEPT}){{2}}(\t(Novel|No))?\s*")
_NO_CONCEPT = ("", "-", "-1")
_MENTION_FORM = "`id start end text label` with tabs between its columns"


def is_pubtator(lines: Iterable[str]) -> bool:
    """Whether the first line of a file is one of PubTator's."""
    line = first_line(lines)
    return bool(_TEXT_LINE.fullmatch(line) or _MENTION_LINE.match(line))


@dataclass
class Record:
    """Lines of a PubTator file that stand together and belong to one document.

    Attributes:
        where: the `file:line` of its first line.
        text: title and abstract; None where mention lines stand without them.
        mentions: the columns of each mention line, with its `file:line`.
    """

    id: str
    where: str
    text: str | None
    mentions: list[tuple[str, list[str]]] = field(default_factory=list)


def pubtator_records(
    lines: Iterable[tuple[str, str]], reading: Reading, known: Collection[str] = ()
) -> Iterator[Record]:
    """Parses PubTator as it comes: `id|t|title`, `id|a|abstract`, then mentions `id start end text label`, tabbed.

    The text is title + one space + abstract, as the standard counts its offsets; a tab in it is read as a space,
    since it cannot be written back. Relations are skipped, and counted.

    Args:
        lines: each with its `file:line`.
        reading: takes notes, and what is wrong: a line that is none of these, an abstract without its title, mentions
            without a text.
        known: ids of documents whose mentions may stand without a text.
    """
    seen: set[str] = set()
    record = None
    awaits_abstract = False
    for where, line in lines:
        if not line.strip():
            continue
        if match := _TEXT_LINE.fullmatch(line):
            id, part, content = match.groups()
            if tabs := content.count("\t"):
                reading.notes["tabs in texts, read as spaces"] += tabs
                content = content.replace("\t", " ")
            if part == "t":
                if record:
                    yield record
                seen.add(id)
                record, awaits_abstract = Record(id, where, content), True
            elif record and awaits_abstract and record.id == id:
                record.text, awaits_abstract = f"{record.text} {content}" if content else record.text, False
            else:
                reading.faults.append(f"{where}: the abstract of {id} must follow its title line `{id}|t|...`")
            continue
        awaits_abstract = False
        if _RELATION_LINE.fullmatch(line):
            reading.notes["relations not read"] += 1
            continue
        columns = line.split("\t")
        if len(columns) < 5:
            what = f"neither `id|t|title`, `id|a|abstract` nor a mention {_MENTION_FORM}"
            reading.faults.append(f"{where}: {what}")
            continue
        if record is None or record.id != columns[0]:
            if record:
                yield record
            record = Record(columns[0], where, None)
            if record.id not in seen and record.id not in known:
                lacking = "is not among the gold documents" if known else "has no title line before this one"
                reading.faults.append(f"{where}: a mention of document {record.id}, which {lacking}")
        record.mentions.append((where, columns))
    if record:
        yield record


def pubtator_documents(
    lines: Iterable[tuple[str, str]], name: str, reading: Reading, reference: Sequence[Document] = ()
) -> list[Document]:
    """The documents of a PubTator file, see `pubtator_records`; `reference` as of `read_documents`."""
    known = {document.id: document.text for document in reference}
    texts: dict[str, str] = {}
    spans: dict[str, set[Span]] = {}
    seen: dict[str, int] = {}
    for record in pubtator_records(lines, reading, known):
        if record.text is not None:
            reading.is_new(record.where, Document(record.id, record.text, (), ()), seen)  # its mentions are added
        text = record.text if record.text is not None else texts.get(record.id, known.get(record.id))
        if text is None:
            continue  # which is a fault
        text = texts.setdefault(record.id, text)
        document = Document(record.id, text, (), ())
        found = (_mention(where, columns, document, reading) for where, columns in record.mentions)
        spans.setdefault(record.id, set()).update(filter(None, found))
    return [Document(id, text, tuple(sorted(spans[id])), sentence_bounds(text)) for id, text in texts.items()]


def _mention(where: str, columns: list[str], document: Document, reading: Reading) -> Span | None:
    start, end, written, label, *further = columns[1:]
    if any(column.strip() not in _NO_CONCEPT for column in further):
        reading.notes["concept ids of mentions not read"] += 1
    return reading.mention(where, document, start, end, label, written, " of title + one space + abstract")


def pubtator_texts(lines: Iterable[tuple[str, str]], name: str, reading: Reading) -> Iterator[Document]:
    """The documents as they come, without their mentions."""
    seen: dict[str, int] = {}
    for record in pubtator_records(lines, reading):
        if record.text is not None:
            document = Document(record.id, record.text, (), sentence_bounds(record.text))
            if reading.is_new(record.where, document, seen):
                yield document


# ---- writing ----


def write_pubtator(documents: Iterable[Document], file: TextIO, lost: Counter[str] | None = None) -> None:
    """Writes PubTator that `pubtator_documents` reads back with the same id, text and spans; concept ids are `-1`.

    Tabs and line ends in a text become spaces, one for one, since the format cannot hold them.

    Raises:
        CorpusError: an id that the format cannot hold.
    """
    for document in documents:
        if not re.fullmatch(r"[^|\t\r\n]+", document.id):
            raise CorpusError(f"{document.id!r}: no PubTator id; it must be without |, tab, line end")
        text, spaces = re.subn(r"[\t\r\n]", " ", document.text)
        if spaces and lost is not None:
            lost["tabs and line ends in texts, written as spaces"] += spaces
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


PUBTATOR = Format(
    "pubtator", ("PubTator.txt", "PubTator"), is_pubtator, pubtator_documents, write_pubtator, pubtator_texts
)
