"""PubTator, the format of BC5CDR: read, as a file or as it comes, and written."""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from .documents import CorpusError, Document, Span, sentence_bounds
from .lines import read_lines

# ---- reading ----

_TEXT_LINE = re.compile(r"([^|\t]+)\|([ta])\|(.*)")
_MENTION_LINE = re.compile(r"[^\t]+\t\d+\t\d+\t[^\t]+\t(?!(?:O|[BIESLU]-[^\t]+)\s*$)[^\t]+")
# `id CID chemical disease`, and the fifth column of BioRED. Anything else with tabs has to be a mention.
_RELATION_LINE = re.compile(r"[^\t]+\t[A-Za-z][\w-]*\t[^\t]+\t[^\t]+(\t(Novel|No))?\s*")


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
    for record in pubtator_records(read_lines(Path(path))):
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
