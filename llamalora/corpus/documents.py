"""A document: one text, its mentions as character offsets into it, and its sentence bounds.

Offsets count Unicode code points from 0; ends are exclusive.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ..errors import InputError


@dataclass(frozen=True, order=True)
class Span:
    """A labelled stretch of a text: characters `start` to `end` (exclusive)."""

    start: int
    end: int
    label: str


@dataclass(frozen=True)
class Document:
    """A text with its mentions (sorted, distinct, perhaps nested) and its sentence bounds, all as offsets.

    `tokens` are the bounds of the tokens of a file that consists of tokens, so that it can be written back with them.
    """

    id: str
    text: str
    spans: tuple[Span, ...]
    sentences: tuple[tuple[int, int], ...]
    tokens: tuple[tuple[int, int], ...] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Sentence:
    """One sentence of a document: the unit of a prompt. `spans` are relative to it and never overlap."""

    document: str  # id of the document
    start: int  # offset of the sentence in it: document offset = start + sentence offset
    text: str
    spans: tuple[Span, ...]


class CorpusError(InputError):
    """A file that is no corpus. The message starts with `file:line: ` (or the file or folder alone)."""


class Documents(list[Document]):
    """The documents of a file, and `notes`: what its reader changed or skipped, each with its count."""

    def __init__(self, documents: Iterable[Document] = (), notes: Mapping[str, int] | None = None):
        super().__init__(documents)
        self.notes = dict(notes or {})


@dataclass
class Reading:
    """What the reader of a file meets beside documents.

    Attributes:
        notes: what it takes, but not as it stands, and how often.
        faults: what it cannot take, each with its `file:line`.
    """

    notes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    MOST = 20  # faults that are told

    def check(self) -> None:
        """Raises a CorpusError that lists the faults, if there are any."""
        if self.faults:
            lines = {fault: int(match[1]) for fault in self.faults if (match := re.search(r":(\d+): ", fault))}
            faults = sorted(self.faults, key=lambda fault: lines.get(fault, 0))
            more = len(faults) - self.MOST
            raise CorpusError("\n  ".join(faults[: self.MOST] + [f"and {more} more faults"] * (more > 0)))

    def mention(
        self,
        where: str,
        document: Document,
        start: object,
        end: object,
        label: object,
        written: str | None,
        unit: str = "",
    ) -> Span | None:
        """The mention that a file names by its offsets, trimmed; None and a fault where they cannot be right.

        Args:
            where: its `file:line`.
            document: gives its id and text; its mentions do not matter.
            start, end, label: as they stand in the file.
            written: the text of the mention, if the file says it. It may differ from that of the document in case,
                spaces or quotes: the offsets count, and curators write as they like.
            unit: what offsets count characters of, if that needs saying.
        """
        fault = None
        text = document.text
        for offset in (start, end):
            if not re.fullmatch("[0-9]{1,18}", str(offset)):
                fault = f"the offset {str(offset)[:40]!r} is not a whole number; write digits"
        if not fault and not (isinstance(label, str) and label.strip()):
            which = repr(written) if written else f"from {start} to {end}"
            fault = f"the mention {which} has no label"
            if isinstance(label, int):
                fault = f"the label of the mention {which} is the number {label}; give its name"
        first, last = (0, 0) if fault else (int(str(start)), int(str(end)))
        if not fault and not first < last <= len(text):
            fault = (
                f"offsets {start} to {end} lie outside the text of {document.id} ({len(text)} characters) or are "
                "empty; count characters, not bytes"
            )
        stands = text[first:last]
        if not fault and written is not None and _core(stands) != _core(written):
            fault = f"at {start} to {end} stands {stands!r}, not {written!r}; count characters, not bytes{unit}"
        if fault:
            self.faults.append(f"{where}: {fault}")
            return None
        if written is not None and stands.strip() != written.strip():
            self.notes["mentions whose text has other case, spaces or quotes, taken by their offsets"] += 1
        return self.trimmed(text, Span(first, last, re.sub(r"[\t\r\n]+", " ", str(label)).strip()))

    def joined(self, text: str, parts: Sequence[tuple[int, int]], written: str | None) -> tuple[int, int, str | None]:
        """Start and end of a mention in several parts, from the first to the last, and what its text has to be.

        All of it is marked, since neither a part alone nor a gap says what the mention says.

        Args:
            parts: their bounds, perhaps wrong ones.
            written: the text of the mention, if the file says it: often that of the parts without what is between.
        """
        parts = sorted(parts)
        if len(parts) > 1:
            between = "".join(text[end:start] for (_, end), (start, _) in pairwise(parts))
            apart = "read as one, from the first part to the last" if between.strip() else "joined across whitespace"
            self.notes[f"mentions in several parts, {apart}"] += 1
            if written is not None and _core("".join(text[start:end] for start, end in parts)) == _core(written):
                written = None
        return parts[0][0], max(end for _, end in parts), written

    def trimmed(self, text: str, span: Span) -> Span | None:
        """The span without whitespace at its ends, which no answer can mark; None if there is nothing else in it."""
        stretch = text[span.start : span.end]
        start, end = span.end - len(stretch.lstrip()), span.start + len(stretch.rstrip())
        if start >= end:
            self.notes["mentions of nothing but whitespace, left out"] += 1
            return None
        if (start, end) != (span.start, span.end):
            self.notes["mentions trimmed of whitespace at their ends"] += 1
        return Span(start, end, span.label)


def _core(text: str) -> str:
    return re.sub(r"[\s\"'`´‘’‚‛“”„‟′″«»]+", "", text).casefold()


def told(notes: Mapping[str, int]) -> list[str]:
    """Notes as phrases, such as `comment lines skipped: 3`."""
    return [f"{what}: {count:,}" for what, count in notes.items()]


# ---- sentences and counts ----

# The second guard keeps "St. Thomas" whole: without it two mentions of BC5CDR would be cut.
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\bSt\.)\s+(?=[A-Z0-9(\[])")
_WORD = re.compile(r"\S+")


def sentence_bounds(text: str) -> tuple[tuple[int, int], ...]:
    """Bounds of the sentences of running text, without the whitespace around them. Never looks at gold.

    A line end also ends a sentence, unless the line is just wrapped there.
    """
    found = []
    for first, last in _paragraphs(text):
        breaks = [match.span() for match in _SENTENCE_END.finditer(text, first, last)]
        starts = [last - len(text[first:last].lstrip()), *(end for _, end in breaks)]
        ends = [*(start for start, _ in breaks), first + len(text[first:last].rstrip())]
        found += [(start, end) for start, end in zip(starts, ends, strict=True) if start < end]
    return tuple(found)


def _paragraphs(text: str) -> list[tuple[int, int]]:
    """The bounds of lines, joined where one is wrapped: the next follows at once, and its first word would have made
    the line longer than every line of the text is."""
    lines = [match.span() for match in re.finditer(r"[^\r\n]*\S[^\r\n]*", text)]
    width = max((end - start for start, end in lines), default=0)
    joined = lines[:1]
    for (start, end), (below, last) in pairwise(lines):
        word = _WORD.match(text, below)  # none where the line is indented
        if text[end:below] in ("\n", "\r\n", "\r") and word and end - start + 1 + len(word[0]) > width:
            joined[-1] = (joined[-1][0], last)
        else:
            joined.append((below, last))
    return joined


def sentences_of(document: Document) -> list[Sentence]:
    """The document's sentences with their mentions.

    Of overlapping mentions the longest stays; a mention that crosses a sentence end is in no sentence
    (`corpus_statistics` counts both). A line end in a sentence is a space in it: a prompt is one line.
    """
    result = []
    for start, end in document.sentences:
        inside = [span for span in document.spans if start <= span.start and span.end <= end]
        spans = [Span(span.start - start, span.end - start, span.label) for span in outermost(inside)]
        text = re.sub(r"[\r\n]", " ", document.text[start:end])
        result.append(Sentence(document.id, start, text, tuple(spans)))
    return result


def all_sentences(documents: Iterable[Document]) -> list[Sentence]:
    """The sentences of documents, one document after the other."""
    return [sentence for document in documents for sentence in sentences_of(document)]


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


def labels_of(documents: Iterable[Document]) -> tuple[str, ...]:
    """The labels that occur, in `label_order`."""
    return label_order(span.label for document in documents for span in document.spans)


def corpus_statistics(documents: Sequence[Document]) -> dict:
    """Counts of a corpus: `mentions` is Table 5; lengths are in characters.

    `cut_by_sentence_end` and `overlapping` are the mentions that `sentences_of` leaves out: those that cross a
    sentence end, and those that overlap a longer one.
    """
    mentions = Counter(span.label for document in documents for span in document.spans)
    lengths = [end - start for document in documents for start, end in document.sentences] or [0]
    inside = kept = 0
    for document in documents:
        inside += sum(
            any(start <= span.start and span.end <= end for start, end in document.sentences) for span in document.spans
        )
        kept += sum(len(sentence.spans) for sentence in sentences_of(document))
    return {
        "documents": len(documents),
        "sentences": sum(len(document.sentences) for document in documents),
        "mentions": {label: mentions[label] for label in label_order(mentions)},
        "characters_per_sentence": {"mean": sum(lengths) / len(lengths), "max": max(lengths)},
        "cut_by_sentence_end": mentions.total() - inside,
        "overlapping": inside - kept,
    }
