"""Extraction: the answer is a list of mentions, of one label or label by label. Written, and read however it was
written."""

import re
from collections.abc import Iterable

from ..corpus.documents import Span
from .definition import Parsed, Task, enumerated

_LETTER = r"[\w\u0300-\u036f]"  # an accent that stands alone belongs to its letter


def instruction(task: Task) -> str:
    """What the model is to do."""
    if task.per_label:
        names = enumerated([*task.names.values()])
        return f"list the {names} entities of the input text, separated by commas."
    lists = "; ".join(f"{name}: entity, entity" for name in task.names.values())
    return f"list the entities of the input text by type, in the form {lists}."


def render(task: Task, text: str, spans: Iterable[Span]) -> str:
    """The distinct strings of the mentions, in the order in which they occur."""
    spans = list(spans)
    lists = []
    for label in task.labels:
        strings = dict.fromkeys(text[span.start : span.end] for span in spans if span.label == label)
        if strings:
            lists.append(("" if task.per_label else f"{task.names[label]}: ") + ", ".join(strings))
    return "; ".join(lists)


def parse(task: Task, text: str, output: str, truncated: bool = False) -> Parsed:
    """Each string is placed by `locate`. Of a truncated list the last, perhaps cut, entity is dropped."""
    if truncated:
        separators = list(re.finditer(r"[,;]\s", output))
        output = output[: separators[-1].start()] if separators else ""
    if task.per_label:
        outside, lists = "", [(task.labels[0], 0, len(output))]
    else:
        meaning = {name: label for label, name in task.names.items()}
        names = "|".join(map(re.escape, meaning))
        heads = list(re.finditer(rf"(?:^|;)\s*({names}):(?=\s|$)", output))
        ends = [*(head.start() for head in heads), len(output)]
        outside = output[: ends[0]]
        lists = [(meaning[head[1]], head.end(), end) for head, end in zip(heads, ends[1:], strict=True)]
    places: dict[tuple[str, str], tuple[int, int]] = {}  # in the output, of each string where it first stands
    written = []
    for label, position, end in lists:
        for string in _items(text, output[position:end]):
            start = output.index(string, position)
            position = start + len(string)
            written.append((label, string))
            places.setdefault((label, " ".join(string.split())), (start, position))
    entities = tuple(dict.fromkeys(written))
    missing = tuple((label, string) for label, string in entities if not _occurrences(text, string))
    unbalanced = bool(outside.strip())
    spans = locate(text, entities)
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
    before = rf"(?<!{_LETTER})" if re.match(_LETTER, words[0]) else ""
    after = rf"(?!{_LETTER})" if re.search(rf"{_LETTER}$", words[-1]) else ""
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
