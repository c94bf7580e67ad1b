"""What a model wrote about a sentence and what it means, of several models joined. Without torch, for the commands that
check and compare."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from ..corpus.documents import Document, Sentence, Span, all_sentences, label_order
from ..errors import InputError
from ..task.definition import Parsed, Task
from ..task.parse import join_labels


@dataclass(frozen=True)
class Answer:
    """What a model wrote about a sentence, and what it means. `parsed.spans` are relative to the sentence."""

    sentence: Sentence
    output: str
    parsed: Parsed
    overlong: bool = False  # the prompt does not fit the context, so nothing was asked
    confidence: Mapping[Span, float] = field(default_factory=dict)  # of each of `parsed.spans`, see `confidences`


def joint_labels(tasks: Sequence[Task]) -> tuple[str, ...]:
    """The labels that several systems answer for together, in the corpus's order.

    Raises:
        InputError: two of them answer for one label.
    """
    named = [label for task in tasks for label in task.labels]
    labels = label_order(named)
    if len(labels) < len(named):
        raise InputError(f"two systems answer for one label ({', '.join(named)}); only different labels can be joined")
    return labels


def join_answers(by_label: dict[str, list[Answer]], order: Sequence[str]) -> list[Answer]:
    """The answers of models for different labels about the same sentences as one: a character carries one label,
    that which comes first in `order`."""

    def joined(systems: Iterable[Sequence[Span]]) -> tuple[Span, ...]:
        spans = [span for each in systems for span in each]
        return join_labels({label: [span for span in spans if span.label == label] for label in order}, order)

    together = []
    for answers in zip(*by_label.values(), strict=True):
        parsed = [item.parsed for item in answers]
        spans = joined(p.spans for p in parsed)
        outputs = [item.output for item in answers]
        offsets = accumulate((len(output) + 1 for output in outputs), initial=0)
        places = {
            span: (first + offset, last + offset)
            for p, offset in zip(parsed, offsets, strict=False)
            for span, (first, last) in zip(p.spans, p.written, strict=True)
        }
        confidence = {span: sure for item in answers for span, sure in item.confidence.items()}
        together.append(
            Answer(
                answers[0].sentence,
                "\n".join(outputs),
                Parsed(
                    spans=spans,
                    written=tuple(places[span] for span in spans),
                    entities=sum((p.entities for p in parsed), ()),
                    not_in_source=sum((p.not_in_source for p in parsed), ()),
                    exact_copy=all(p.exact_copy for p in parsed),
                    unbalanced=any(p.unbalanced for p in parsed),
                    truncated=any(p.truncated for p in parsed),
                    unaligned=sum(p.unaligned for p in parsed),
                    first=joined(p.first for p in parsed),
                ),
                any(item.overlong for item in answers),
                {span: confidence[span] for span in spans if span in confidence},
            )
        )
    return together


def select_sentences(documents: Sequence[Document], limit: int | None) -> tuple[list[Document], list[Sentence]]:
    """The documents, with only the gold mentions of the chosen sentences, and the first `limit` sentences."""
    every = all_sentences(documents)
    if limit is None or limit >= len(every):
        return list(documents), every
    chosen = every[:limit]
    last = chosen[-1]
    end = last.start + len(last.text)
    kept = []
    for document in documents:
        if document.id != last.document:
            kept.append(document)
            continue
        kept.append(replace(document, spans=tuple(span for span in document.spans if span.end <= end)))
        return kept, chosen
    raise AssertionError("a sentence without its document")


def lacking(answers: Iterable[Answer]) -> Iterator[tuple[str, int, int, str]]:
    """The sentences that found no room in the model's context, or whose answer was cut off: document, start, end, and
    which of both it was."""
    for item in answers:
        if item.overlong or item.parsed.truncated:
            id, start = item.sentence.document, item.sentence.start
            why = "longer than the model's context, and not read" if item.overlong else "its answer was cut off"
            yield id, start, start + len(item.sentence.text), why
