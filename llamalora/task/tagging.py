"""Tagging: the answer is the sentence again, its mentions marked by tags. Written, and read however it was written."""

import re
from collections.abc import Iterable

from ..corpus.documents import Span
from .align import Alignment, edit_alignment
from .definition import Parsed, Task, enumerated


def instruction(task: Task) -> str:
    """What the model is to do, in the words of figure 2."""
    how = "rewrite the input text and surround the start and end of "
    if task.per_label:
        return how + f"{enumerated([*task.names.values()])} entities with @@ and ##, respectively."
    marks = [f"{name} entities with {' and '.join(task.tags(label))}" for label, name in task.names.items()]
    return how + f"{enumerated(marks)}, respectively."


def render(task: Task, text: str, spans: Iterable[Span]) -> str:
    """The sentence with its mentions marked; they must be in order and must not overlap."""
    pieces = []
    position = 0
    for span in spans:
        assert position <= span.start, f"overlapping spans, the second {span}"
        opener, closer = task.tags(span.label)
        pieces += [text[position : span.start], opener, text[span.start : span.end], closer]
        position = span.end
    return "".join(pieces) + text[position:]


def parse(task: Task, text: str, output: str, truncated: bool = False) -> Parsed:
    """An unclosed tag is dropped, a stray closer ignored, of nested mentions the outer stays, a closer of another label
    closes with the opener's label; a copy that is not exact is aligned (`align.py`)."""
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
