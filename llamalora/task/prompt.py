"""The task as text: what the model reads, and the answer that a sentence should get (Table 6 of the paper)."""

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from ..corpus.documents import Sentence, Span


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
        if self.format not in ("tagging", "extraction"):
            raise ValueError(f"format is {self.format!r}, must be 'tagging' or 'extraction'")
        if not isinstance(self.labels, tuple) or not self.labels or len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels must be a tuple of one or more different labels, not {self.labels!r}")
        for label in self.labels:
            if not re.fullmatch(r"\w([^\[\]@#:;,\n]*\w)?", label):
                raise ValueError(f"label {label!r} must begin and end with letter or digit, without []@#:;,")
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

    def tags(self, label: str) -> tuple[str, str]:
        """The opening and the closing tag of a label."""
        return ("@@", "##") if self.per_label else (f"[{label}]", f"[/{label}]")


# ---- writing: prompt and answer ----


def render_prompt(task: Task, text: str) -> str:
    """What the model reads; it answers after the final `Answer:`. The per-label instruction is figure 2's."""
    instruction = _instruction(task) + "\n" if task.instruction else ""
    shown = "".join(f"Input: {example}\nAnswer: {answer}\n" for example, answer in task.demonstrations)
    return f"{instruction}{shown}Input: {text}\nAnswer:"


def _instruction(task: Task) -> str:
    names = _listed(task.labels)
    start = f"The task is to identify {names} entities in the input. Please "
    if task.format == "tagging" and task.per_label:
        return start + (
            f"rewrite the input text and surround the start and end of {names} entities with @@ and ##, respectively."
        )
    if task.format == "tagging":
        marks = _listed([f"{label} entities with {' and '.join(task.tags(label))}" for label in task.labels])
        return start + f"rewrite the input text and surround the start and end of {marks}, respectively."
    if task.per_label:
        return start + f"list the {names} entities of the input text, separated by commas."
    return start + (
        "list the entities of the input text by type, in the form "
        + "; ".join(f"{label}: entity, entity" for label in task.labels)
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
            lists.append(("" if task.per_label else f"{label}: ") + ", ".join(strings))
    return "; ".join(lists)


def draw_demonstrations(task: Task, sentences: Sequence[Sentence], k: int, seed: int) -> tuple[tuple[str, str], ...]:
    """`k` (sentence, answer) pairs from training sentences, those with a mention before the others."""
    if k > len(sentences):
        raise ValueError(f"{k} demonstrations from {len(sentences)} sentences")
    draw = random.Random(seed)
    shuffled = draw.sample(sentences, len(sentences))
    shuffled.sort(key=lambda sentence: not any(span.label in task.labels for span in sentence.spans))
    return tuple((sentence.text, render_answer(task, sentence.text, sentence.spans)) for sentence in shuffled[:k])
