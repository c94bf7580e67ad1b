"""The task as text: what the model reads, and the answer that a sentence should get (Table 6 of the paper)."""

import random
from collections.abc import Iterable, Sequence

from ..corpus.documents import Sentence, Span, outermost
from .definition import Task, enumerated
from .formats import format_of


def render_prompt(task: Task, text: str) -> str:
    """What the model reads; it answers after the final `Answer:`. The per-label instruction is figure 2's."""
    instruction = ""
    if task.instruction:
        names = enumerated([*task.names.values()])
        start = f"The task is to identify {names} entities in the input. Please "
        instruction = start + format_of(task).instruction(task) + "\n"
    shown = "".join(f"Input: {example}\nAnswer: {answer}\n" for example, answer in task.demonstrations)
    return f"{instruction}{shown}Input: {text}\nAnswer:"


def render_answer(task: Task, text: str, spans: Iterable[Span]) -> str:
    """The right answer for a sentence, without the space that follows `Answer:` (formats of Table 6).

    Spans of other labels are ignored; of those that overlap the longest is answered.
    """
    return format_of(task).render(task, text, outermost(spans, task.labels))


def draw_demonstrations(task: Task, sentences: Sequence[Sentence], k: int, seed: int) -> tuple[tuple[str, str], ...]:
    """`k` (sentence, answer) pairs from training sentences, those with a mention before the others."""
    if k > len(sentences):
        raise ValueError(f"{k} demonstrations from {len(sentences)} sentences")
    draw = random.Random(seed)
    shuffled = draw.sample(sentences, len(sentences))
    shuffled.sort(key=lambda sentence: not any(span.label in task.labels for span in sentence.spans))
    return tuple((sentence.text, render_answer(task, sentence.text, sentence.spans)) for sentence in shuffled[:k])
