"""From an answer to mentions: the inverse of `render_answer`, which reads whatever a model writes.

It never raises, and it places no mention that it cannot find.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..corpus.documents import Span
from .align import Alignment, edit_alignment
from .prompt import Task

# ---- reading: from an answer to mentions ----


@dataclass(frozen=True)
class Parsed:
    """What an answer says, and how healthy it is.

    Attributes:
        spans: mentions as offsets into the sentence, sorted, not overlapping.
        written: for each of them, from where to where the output tells of it (tagging: with its tags).
        entities: (label, string) as the model wrote them, in its order.
        not_in_source: those of them that the sentence does not hold: false positives without a place.
        exact_copy: tagging: without its tags the output is the sentence; extraction: all strings are in it.
        unbalanced: tags that do not pair up (tagging), or text outside the labelled lists (extraction).
        truncated: as given to `parse`: generation met its limit.
        unaligned: tagged mentions that were rejected, since a boundary has no counterpart in the sentence.
        first: the spans under another convention: in extraction each string is placed once, where it first occurs.
    """

    spans: tuple[Span, ...]
    written: tuple[tuple[int, int], ...]
    entities: tuple[tuple[str, str], ...]
    not_in_source: tuple[tuple[str, str], ...]
    exact_copy: bool
    unbalanced: bool
    truncated: bool
    unaligned: int
    first: tuple[Span, ...]


def parse(task: Task, text: str, output: str, truncated: bool = False) -> Parsed:
    """Reads a model's answer to the sentence `text`.

    Tagging: an unclosed tag is dropped, a stray closer ignored, of nested mentions the outer stays, a closer
    of another label closes with the opener's label; a copy that is not exact is aligned (`align.py`).
    Extraction: see `locate`. Of a truncated list the last, perhaps cut, entity is dropped.
    """
    if task.format == "tagging":
        return _parse_tagging(task, text, output, truncated)
    return _parse_extraction(task, text, output, truncated)


def _parse_tagging(task: Task, text: str, output: str, truncated: bool) -> Parsed:
    margin = len(output) - len(output.lstrip())
    plain, tags = _split_tags(task, text, output.strip(), truncated)
    stretches, unbalanced = _pair(tags)
    alignment = Alignment(text, plain, truncated)
    source = " ".join(text.split())
    entities: list[tuple[str, str]] = []
    placed: list[Span] = []
    places: list[tuple[int, int]] = []
    missing: list[tuple[str, str]] = []
    for stretch, (first, last) in stretches:
        inner = plain[stretch.start : stretch.end]
        entity = inner.strip()
        if not entity:
            continue
        entities.append((stretch.label, entity))
        start = stretch.start + len(inner) - len(inner.lstrip())
        bounds = alignment.project(start, start + len(entity))
        if bounds and (not placed or placed[-1].end <= bounds[0]):
            placed.append(Span(*bounds, stretch.label))
            places.append((margin + first, margin + last))
        elif " ".join(entity.split()) not in source:
            missing.append((stretch.label, entity))
    return Parsed(
        tuple(placed),
        tuple(places),
        tuple(entities),
        tuple(missing),
        plain.strip() == text.strip(),
        unbalanced,
        truncated,
        len(entities) - len(placed),
        tuple(placed),
    )


# position in the output without tags, outer edge in the output, label, whether it closes
_Tag = tuple[int, int, str, bool]


def _tag_pattern(task: Task) -> str:
    return "|".join(re.escape(tag) for label in task.labels for tag in task.tags(label))


def inside_word(text: str, position: int) -> bool:
    """Whether letters or digits of one word stand on both sides of a place. A letter without case is a word of its
    own, because Chinese, Japanese and Thai put no spaces between words."""
    return 0 < position < len(text) and all(map(_continues, text[position - 1 : position + 1]))


def _continues(character: str) -> bool:
    without_case = character.isalpha() and character.lower() == character.upper()
    return character == "_" or character.isalnum() and not without_case


def word_part(text: str, start: int, end: int) -> tuple[str, bool, bool]:
    """A stretch of a text, and whether it begins and whether it ends inside a word."""
    return text[start:end], inside_word(text, start), inside_word(text, end)


def tag_places(task: Task, text: str, parts: Iterable[tuple[str, bool, bool]] = ()) -> set[int]:
    """The offsets at which a tag can stand: between words, and at both ends of word parts that are known to be tagged.
    If the sentence itself holds what looks like a tag, only between words, or else `parse` could not tell them
    apart."""
    places = {place for place in range(len(text) + 1) if not inside_word(text, place)}
    for part in parts:
        for match in re.finditer(re.escape(part[0]), text):
            if word_part(text, *match.span()) == part:
                places |= {*match.span()}
    legal = _tag_pattern(task)
    if re.search(legal, text):
        places &= {0, *(match.end() for match in re.finditer(rf"{legal}|\w+|\W", text))}
    return places


def _split_tags(task: Task, text: str, output: str, truncated: bool) -> tuple[str, list[_Tag]]:
    """The output without its tags, and the tags."""
    meaning = {
        tag: (label, closes)
        for label in task.labels
        for closes, tag in zip((False, True), task.tags(label), strict=True)
    }
    legal = _tag_pattern(task)
    pieces = re.split(f"({legal})", output)  # texts at even places, tags at odd ones
    literal: set[int] = set()
    if re.search(legal, text):
        # The sentence itself holds what looks like a tag. The cheapest alignment, in which tags may be
        # inserted for nothing, tells its copy from a tag. Whitespace counts: "@@ @@fever##" of "@@ fever".
        tokens = [
            (place, token)
            for place, piece in enumerate(pieces)
            for token in ([piece] if place % 2 else re.findall(r"\w+|\W", piece))
        ]
        free = {index for index, (place, _) in enumerate(tokens) if place % 2}
        source = re.findall(rf"{legal}|\w+|\W", text)
        copied = edit_alignment(source, [token for _, token in tokens], free, open_end=truncated)
        literal = {tokens[index][0] for index in free if copied[index] >= 0}
    plain, position = "", 0
    tags: list[_Tag] = []
    for place, piece in enumerate(pieces):
        if place % 2 and place not in literal:
            label, closes = meaning[piece]
            tags.append((len(plain), position + closes * len(piece), label, closes))
        else:
            plain += piece
        position += len(piece)
    return plain, tags


def _pair(tags: Iterable[_Tag]) -> tuple[list[tuple[Span, tuple[int, int]]], bool]:
    """The stretches that tags enclose, without and with tags, the outer of nested ones, and whether some tag had no
    partner."""
    opened: list[tuple[int, int, str]] = []
    closed = []
    unbalanced = False
    for position, edge, label, closes in tags:
        if not closes:
            opened.append((position, edge, label))
            continue
        if not opened:
            unbalanced = True
            continue
        top = len(opened) - 1
        index = next((index for index in range(top, -1, -1) if opened[index][2] == label), top)
        unbalanced |= index < top or opened[top][2] != label
        start, first, label = opened[index]
        closed.append((Span(start, position, label), (first, edge)))
        del opened[index:]
    outer: list[tuple[Span, tuple[int, int]]] = []
    for span, edges in sorted(closed, key=lambda item: (item[0].start, -item[0].end)):
        if not outer or outer[-1][0].end <= span.start:
            outer.append((span, edges))
    return outer, unbalanced or bool(opened)


def _parse_extraction(task: Task, text: str, output: str, truncated: bool) -> Parsed:
    if truncated:
        separators = list(re.finditer(r"[,;]\s", output))
        output = output[: separators[-1].start()] if separators else ""
    if task.per_label:
        outside, lists = "", [(task.labels[0], output)]
    else:
        meaning = {name: label for label, name in task.names.items()}
        heads = "|".join(map(re.escape, meaning))
        outside, *pieces = re.split(rf"(?:^|;)\s*({heads}):(?=\s|$)", output.strip())
        lists = [(meaning[name], items) for name, items in zip(pieces[::2], pieces[1::2], strict=True)]
    written = [(label, string) for label, items in lists for string in _items(text, items)]
    entities = tuple(dict.fromkeys(written))
    missing = tuple((label, string) for label, string in entities if not _occurrences(text, string))
    unbalanced = bool(outside.strip())
    spans = locate(text, entities)
    places: dict[tuple[str, str], tuple[int, int]] = {}
    position = 0
    for label, string in written:
        start = output.index(string, position)
        position = start + len(string)
        places.setdefault((label, " ".join(string.split())), (start, position))
    where = tuple(places[span.label, " ".join(text[span.start : span.end].split())] for span in spans)
    return Parsed(
        spans, where, entities, missing, not missing, unbalanced, truncated, 0, locate(text, entities, first_only=True)
    )


def _items(text: str, items: str) -> list[str]:
    """The strings of a list. A comma or semicolon parts them, unless a part cannot be a mention on its own.

    Such a part joins the longest run of its neighbours that the sentence holds. To join whatever the sentence
    holds would cost 2 to 3 points of F1 on gold: "nausea, vomiting" is nearly always two mentions.
    """
    parts = re.split(r"([,;]\s+)", items.strip())  # strings at even places, separators at odd ones
    longest = 2 * len(re.findall(r"[,;]\s", text)) + 1
    found = []
    start = 0
    while start < len(parts):
        end = start + 1
        for stop in range(min(len(parts), start + longest), end, -2):
            run = "".join(parts[start:stop])
            if not all(map(_stands_alone, parts[start:stop:2])) and _occurrences(text, run):
                end = stop
                break
        found.append("".join(parts[start:end]))
        start = end + 1
    return [string for string in found if string]


def _stands_alone(part: str) -> bool:
    """Brackets pair up, some letter, and not the end of an enumeration ("renal, and hepatic failure")."""
    paired = all(part.count(opening) == part.count(closing) for opening, closing in ("()", "[]"))
    return paired and bool(re.search(r"[^\W\d_]", part)) and not re.match(r"(and|or)\b", part)


def _occurrences(text: str, string: str) -> list[tuple[int, int]]:
    """Where a string stands in the text, whatever its whitespace: as whole words, or else inside words."""
    words = string.split()
    if not words or not all(word in text for word in words):  # spares a wrong string the regex
        return []
    body = r"\s+".join(map(re.escape, words))
    before = r"(?<!\w)" if re.match(r"\w", string) else ""
    after = r"(?!\w)" if re.search(r"\w$", string) else ""
    for pattern in (before + body + after, body):
        if found := [match.span() for match in re.finditer(pattern, text)]:
            return found
    return []


def locate(text: str, entities: Iterable[tuple[str, str]], first_only: bool = False) -> tuple[Span, ...]:
    """The places of (label, string) pairs in a sentence: every occurrence as whole words, longest first.

    A string that stands in the sentence only inside a longer word is placed there. Places do not overlap: of
    two labels for one string the first wins.

    Args:
        first_only: each string is placed once, at its first free occurrence.
    """
    placed: list[Span] = []
    for label, string in sorted(entities, key=lambda entity: -len(entity[1])):
        free = [
            span
            for start, end in _occurrences(text, string)
            if not any(start < other.end and other.start < end for other in placed)
            for span in [Span(start, end, label)]
        ]
        placed += free[:1] if first_only else free
    return tuple(sorted(placed))


def join_labels(spans_by_label: Mapping[str, Iterable[Span]], order: Sequence[str]) -> tuple[Span, ...]:
    """The predictions of per-label models as one: an earlier label of `order` wins where two spans overlap.

    The paper's order is Disease, Chemical (section 3.3).
    """
    kept: list[Span] = []
    for label in order:
        kept += [
            span
            for span in spans_by_label.get(label, ())
            if all(span.end <= other.start or other.end <= span.start for other in kept)
        ]
    return tuple(sorted(kept))
