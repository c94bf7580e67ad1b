"""From an answer to mentions: the inverse of `render_answer`, which reads whatever a model writes.

It never raises, and it places no mention that it cannot find.
"""

from collections.abc import Iterable, Mapping, Sequence

from ..corpus.documents import Span
from .definition import Parsed, Task
from .formats import format_of


def parse(task: Task, text: str, output: str, truncated: bool = False) -> Parsed:
    """Reads a model's answer to the sentence `text`, as the task's format does.

    Args:
        truncated: generation met its limit.
    """
    return format_of(task).parse(task, text, output, truncated)


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
