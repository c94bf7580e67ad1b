"""A document: one text, its mentions as character offsets into it, and its sentence bounds.

Offsets count Unicode code points from 0; ends are exclusive.
"""

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
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
    """One sentence of a document: the unit of a prompt. `spans` are relative to it, sorted, perhaps nested."""

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

    def is_new(self, where: str, document: Document, seen: dict[str, int]) -> bool:
        """Whether a document is the first of its id. A second one is left out if it is the same, as some corpora have,
        and else a fault.

        Args:
            where: its `file:line`.
            seen: hashes of those before it by id, since a stream may be long; takes this one.
        """
        if document.id not in seen:
            seen[document.id] = hash(document)
            return True
        if seen[document.id] == hash(document):
            self.notes["documents that stand twice, read once"] += 1
        else:
            what = f"a second document {document.id}, with another text or other mentions"
            self.faults.append(f"{where}: {what}; ids must be unique in a file")
        return False

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
            written: the text of the mention, if the file says it. It may be spelt otherwise than in the document
                (`_alike`): the offsets count, and curators write as they like.
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
        if not fault and written is not None and not _alike(stands, written):
            fault = f"at {start} to {end} stands {stands!r}, not {written!r}; count characters, not bytes{unit}"
        if fault:
            self.faults.append(f"{where}: {fault}")
            return None
        if written is not None and stands.strip() != written.strip():
            self.notes["mentions whose text is spelt otherwise than their document's, taken by their offsets"] += 1
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
            if written is not None and _alike("".join(text[start:end] for start, end in parts), written):
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


_GREEK = {letter: unicodedata.name(letter).split()[-1].lower() for letter in map(chr, range(ord("α"), ord("ω") + 1))}
_GREEK["λ"] = "lambda"  # LAMDA to Unicode


def _alike(one: str, other: str) -> bool:
    """Whether two spellings differ in nothing but case, spaces, quotes, accents, the width of letters, dashes within
    them, and Greek letters that one of them spells in Latin ones (`α` as `alpha` or `a`)."""
    one, other = _core(one), _core(other)
    return one == other or any(re.fullmatch(_spelt(a), b) for a, b in ((one, other), (other, one)))


def _core(text: str) -> str:
    text = unicodedata.normalize("NFKD", text.replace("ß", "β")).casefold()
    text = re.sub(r"[\s\"'`´‘’‚‛“”„‟′″«»\u0300-\u036f]+", "", text)
    return re.sub(r"(?<=\w)[-\u2010-\u2015\u2212](?=\w)", "", text)


def _spelt(core: str) -> str:
    """A pattern of a text in which each Greek letter stands as it is, by its name, or as one Latin letter."""
    return "".join(f"(?:{letter}|{_GREEK[letter]}|[a-z])" if letter in _GREEK else re.escape(letter) for letter in core)


def told(notes: Mapping[str, int]) -> list[str]:
    """Notes as phrases, such as `comment lines skipped: 3`."""
    return [f"{what}: {count:,}" for what, count in notes.items()]


# ---- sentences and counts ----

# The second guard keeps "St. Thomas" whole: without it two mentions of BC5CDR would be cut. Chinese and Japanese have
# no space behind a sentence.
_SENTENCE_END = re.compile(
    r"(?<=[.!?؟।])(?<!\bSt\.)\s+(?=[0-9(\[“„«‘¿¡]|(?P<first>[^\W\d_]))|(?<=[。！？])\s*(?=[^\s」』）”])"
)
_WORD = re.compile(r"\S+")


def sentence_bounds(text: str) -> tuple[tuple[int, int], ...]:
    """Bounds of the sentences of running text, without the whitespace around them. Never looks at gold.

    A line end also ends a sentence, unless the line is just wrapped there.
    """
    found = []
    for first, last in _paragraphs(text):
        ends_here = _SENTENCE_END.finditer(text, first, last)
        breaks = [match.span() for match in ends_here if not (match["first"] or "").islower()]
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

    A mention that crosses a sentence end is in no sentence (`corpus_statistics` counts them). A line end in a sentence
    is a space in it: a prompt is one line.
    """
    result = []
    starts = [span.start for span in document.spans]
    for start, end in document.sentences:
        begun = document.spans[bisect_left(starts, start) : bisect_left(starts, end)]
        spans = tuple(Span(span.start - start, span.end - start, span.label) for span in begun if span.end <= end)
        text = re.sub(r"[\r\n]", " ", document.text[start:end])
        result.append(Sentence(document.id, start, text, spans))
    return result


def all_sentences(documents: Iterable[Document]) -> list[Sentence]:
    """The sentences of documents, one document after the other."""
    return [sentence for document in documents for sentence in sentences_of(document)]


def outermost(spans: Iterable[Span], labels: Container[object] | None = None) -> list[Span]:
    """The spans of these labels (of all, if None) in order of their start, without those that overlap a longer one."""
    asked = [span for span in spans if labels is None or span.label in labels]
    kept: list[Span] = []
    for span in sorted(asked, key=lambda span: (span.start - span.end, span)):
        place = bisect_right(kept, span)
        free = place == 0 or kept[place - 1].end <= span.start
        if free and (place == len(kept) or span.end <= kept[place].start):
            kept.insert(place, span)
    return kept


def label_order(names: Iterable[str]) -> tuple[str, ...]:
    """Distinct labels in the paper's order, Disease and Chemical first, the rest alphabetical."""
    first = ("Disease", "Chemical")
    names = set(names)
    return (*(name for name in first if name in names), *sorted(names.difference(first)))


def labels_of(documents: Iterable[Document]) -> tuple[str, ...]:
    """The labels that occur, in `label_order`."""
    return label_order(span.label for document in documents for span in document.spans)


def corpus_statistics(documents: Sequence[Document]) -> dict:
    """Counts of a corpus: `mentions` is Table 5; lengths are in characters; `unanswerable` with all labels."""
    mentions = Counter(span.label for document in documents for span in document.spans)
    lengths = [end - start for document in documents for start, end in document.sentences] or [0]
    return {
        "documents": len(documents),
        "sentences": sum(len(document.sentences) for document in documents),
        "mentions": {label: mentions[label] for label in label_order(mentions)},
        "characters_per_sentence": {"mean": sum(lengths) / len(lengths), "max": max(lengths)},
        **unanswerable(documents, mentions),
    }


def unanswerable(documents: Sequence[Document], labels: Container[object]) -> dict[str, int]:
    """How many mentions of these labels no answer can hold: those that cross a sentence end (`cut_by_sentence_end`),
    and those that overlap a longer one of these labels (`overlapping`)."""
    asked = sum(span.label in labels for document in documents for span in document.spans)
    sentences = all_sentences(documents)
    inside = sum(span.label in labels for sentence in sentences for span in sentence.spans)
    kept = sum(len(outermost(sentence.spans, labels)) for sentence in sentences)
    return {"cut_by_sentence_end": asked - inside, "overlapping": inside - kept}
