"""A document: one text, its mentions as character offsets into it, and its sentence bounds.

Offsets count Unicode code points from 0; ends are exclusive.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import InputError


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


def told(notes: Mapping[str, int]) -> list[str]:
    """Notes as phrases, such as `comment lines skipped: 3`."""
    return [f"{what}: {count:,}" for what, count in notes.items()]


# ---- sentences and counts ----

# The second guard keeps "St. Thomas" whole: without it two mentions of BC5CDR would be cut.
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\bSt\.)\s+(?=[A-Z0-9(\[])")


def sentence_bounds(text: str) -> tuple[tuple[int, int], ...]:
    """Bounds of the sentences of running text, without the whitespace around them. Never looks at gold."""
    breaks = [(match.start(), match.end()) for match in _SENTENCE_END.finditer(text)]
    starts = [len(text) - len(text.lstrip()), *(end for _, end in breaks)]
    ends = [*(start for start, _ in breaks), len(text.rstrip())]
    return tuple((start, end) for start, end in zip(starts, ends, strict=True) if start < end)


def sentences_of(document: Document) -> list[Sentence]:
    """The document's sentences with their mentions.

    Of overlapping mentions the longest stays; a mention that crosses a sentence end is in no sentence
    (`corpus_statistics` counts both).
    """
    result = []
    for start, end in document.sentences:
        inside = [span for span in document.spans if start <= span.start and span.end <= end]
        spans = [Span(span.start - start, span.end - start, span.label) for span in outermost(inside)]
        result.append(Sentence(document.id, start, document.text[start:end], tuple(spans)))
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
