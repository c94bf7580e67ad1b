"""What a model is asked (a task), and what its answer says."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import chain, count

from ..corpus.documents import Span

_NAME = re.compile(r"(?![\s/])[^\[\]@#:;,\n\r\t]+(?<!\s)")  # a label that tags and lists can hold as it is

# formats whose answers are the sentence again: drafts come from it, and --constrain can hold them to it
COPYING = ("tagging",)
FORMATS = (*COPYING, "extraction")


@dataclass(frozen=True)
class Task:
    """What the model is asked. `dataclasses.asdict` and `from_dict` carry it through JSON.

    Attributes:
        format: `tagging` (the sentence again, mentions marked) or `extraction` (a list of mentions).
        labels: the entity types, in the order of the answer.
        per_label: one model for one label (`@@...##`; `a, b`) instead of one for all labels
            (`[Label]...[/Label]`; `Disease: a; Chemical: b, c`).
        instruction: put the instruction of figure 2 before the input.
        demonstrations: (sentence, answer) pairs shown before the input.
    """

    format: str
    labels: tuple[str, ...]
    per_label: bool
    instruction: bool = False
    demonstrations: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format is {self.format!r}, must be {' or '.join(map(repr, FORMATS))}")
        if not isinstance(self.labels, tuple) or not self.labels or len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels must be a tuple of one or more different labels, not {self.labels!r}")
        if not all(isinstance(label, str) and label.strip() for label in self.labels):
            raise ValueError(f"labels must be words, not {self.labels!r}")
        if self.per_label and len(self.labels) != 1:
            raise ValueError(f"a per-label task has exactly one label, not {', '.join(self.labels)}")

    @classmethod
    def from_dict(cls, values: Mapping) -> "Task":
        """The inverse of `dataclasses.asdict`, also after JSON, which turns tuples into lists."""
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"unknown fields of a task: {', '.join(sorted(unknown))}")
        pairs = tuple((text, answer) for text, answer in values.get("demonstrations", ()))
        return cls(**{**values, "labels": tuple(values["labels"]), "demonstrations": pairs})

    @property
    def copies(self) -> bool:
        """Whether an answer is the sentence again, with marks in it."""
        return self.format in COPYING

    @cached_property
    def names(self) -> dict[str, str]:
        """What prompts and answers call each label: the label itself, unless it holds what the formats need for
        themselves. Such characters become `_`, and a number follows where that is another label's name."""
        names = {label: label for label in self.labels if _NAME.fullmatch(label)}
        for label in self.labels:
            if label not in names:
                plain = re.sub(r"[\[\]@#:;,\s]+|^/", "_", label)
                numbered = (f"{plain}_{number}" for number in count(2))
                names[label] = next(name for name in chain([plain], numbered) if name not in names.values())
        return {label: names[label] for label in self.labels}

    def tags(self, label: str) -> tuple[str, str]:
        """The opening and the closing tag of a label."""
        name = self.names[label]
        return ("@@", "##") if self.per_label else (f"[{name}]", f"[/{name}]")


@dataclass(frozen=True)
class Parsed:
    """What an answer says, and how healthy it is.

    Attributes:
        spans: mentions as offsets into the sentence, sorted, not overlapping.
        written: for each of them, from where to where in the output it is written (tagging: with its tags).
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


def listed_labels(text: str, known: Iterable[str]) -> tuple[str, ...]:
    """The labels that a comma list names. Commas of known labels do not part them, so `T047,T033` may be one label;
    a space behind a comma tells a list from such a label."""
    known = set(known)
    parts = text.split(",")
    found = []
    while parts:
        joined = [",".join(parts[:size]) for size in range(len(parts), 0, -1)]
        label = next((label for label in joined if label.strip() in known), parts[0])
        del parts[: label.count(",") + 1]
        if label.strip():
            found.append(label.strip())
    return tuple(found)


def enumerated(names: Sequence[str]) -> str:
    """Names as an English list: `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
