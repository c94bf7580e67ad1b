"""The task as text: what the model reads, and the answer that a sentence should get (Table 6 of the paper)."""

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import chain, count

from ..corpus.documents import Sentence, Span

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


# ---- writing: prompt and answer ----


def render_prompt(task: Task, text: str) -> str:
    """What the model reads; it answers after the final `Answer:`. The per-label instruction is figure 2's."""
    instruction = _instruction(task) + "\n" if task.instruction else ""
    shown = "".join(f"Input: {example}\nAnswer: {answer}\n" for example, answer in task.demonstrations)
    return f"{instruction}{shown}Input: {text}\nAnswer:"


def _instruction(task: Task) -> str:
    names = _listed([*task.names.values()])
    start = f"The task is to identify {names} entities in the input. Please "
    if task.format == "tagging" and task.per_label:
        return start + (
            f"rewrite the input text and surround the start and end of {names} entities with @@ and ##, respectively."
        )
    if task.format == "tagging":
        marks = _listed(
            [f"{name} entities with {' and '.join(task.tags(label))}" for label, name in task.names.items()]
        )
        return start + f"rewrite the input text and surround the start and end of {marks}, respectively."
    if task.per_label:
        return start + f"list the {names} entities of the input text, separated by commas."
    return start + (
        "list the entities of the input text by type, in the form "
        + "; ".join(f"{name}: entity, entity" for name in task.names.values())
        + "."
    )


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def render_answer(task: Task, text: str, spans: Iterable[Span]) -> str:
    """The right answer for a sentence, without the space that follows `Answer:` (formats of Table 6).

    Spans of other labels are ignored; the others must not overlap.
    """
    spans = sorted(span for span in spans if span.label in task.labels)
    if task.format == "tagging":
        pieces = []
        position = 0
        for span in spans:
            assert position <= span.start, f"overlapping spans, the second {span}"
            opener, closer = task.tags(span.label)
            pieces += [text[position : span.start], opener, text[span.start : span.end], closer]
            position = span.end
        return "".join(pieces) + text[position:]
    lists = []
    for label in task.labels:
        strings = dict.fromkeys(text[span.start : span.end] for span in spans if span.label == label)
        if strings:
            lists.append(("" if task.per_label else f"{task.names[label]}: ") + ", ".join(strings))
    return "; ".join(lists)


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


def draw_demonstrations(task: Task, sentences: Sequence[Sentence], k: int, seed: int) -> tuple[tuple[str, str], ...]:
    """`k` (sentence, answer) pairs from training sentences, those with a mention before the others."""
    if k > len(sentences):
        raise ValueError(f"{k} demonstrations from {len(sentences)} sentences")
    draw = random.Random(seed)
    shuffled = draw.sample(sentences, len(sentences))
    shuffled.sort(key=lambda sentence: not any(span.label in task.labels for span in sentence.spans))
    return tuple((sentence.text, render_answer(task, sentence.text, sentence.spans)) for sentence in shuffled[:k])
