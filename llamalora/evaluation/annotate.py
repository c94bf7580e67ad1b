"""New text in, mentions out: what `predict` does with documents, and `annotate` with plain texts."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from ..corpus.documents import Document, all_sentences, sentence_bounds
from ..distributed.world import World
from ..errors import InputError
from ..model.llama import Llama
from ..runs.setup import check_constraint
from ..task.definition import Task
from ..task.tokenizer import Tokenizer
from .answer import answer_sentences
from .answered import Answer, lacking
from .draft import prime
from .result import confidence_by_mention, predicted_documents
from .systems import System

DOCUMENTS_AT_ONCE = 64  # held in memory and decoded together
PAPERS_TASK = Task("tagging", ("Disease", "Chemical"), per_label=False)


@dataclass(frozen=True)
class Mention:
    """What a model marked in a text: characters `start` to `end` (exclusive), which are `text`.

    `confidence` is the probability, given the answer up to there, of the tokens that wrote the mention.
    """

    start: int
    end: int
    label: str
    text: str
    confidence: float


def annotate(
    model: Llama,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    task: Task = PAPERS_TASK,
    constrain: bool = False,
    batch: int = 32,
) -> list[list[Mention]]:
    """The mentions that a trained model finds in each text, in the order of the text.

    Texts of any length are cut into sentences as a corpus is, and each sentence is asked about by itself. Of a sentence
    that does not fit the model's context, or whose answer was cut off, mentions may be missing; a warning names it.

    Args:
        model: its updates merged, or else slower. What it was trained on decides whether it finds anything.
        task: what it was trained to answer; `load_annotator` reads that from beside a saved model.
        constrain: only answers that are the sentence with legal tags in it (tagging only).
        batch: sentences decoded side by side; any number gives the same answers.

    Raises:
        InputError: a single string in place of texts; `constrain` with a format or a tokenizer that it cannot hold to
            the sentence.
    """
    if isinstance(texts, str):
        raise InputError("texts is one string; give a list of texts, such as [text]")
    world = World(device=next(model.parameters()).device)
    documents = (Document(str(n), text, (), sentence_bounds(text)) for n, text in enumerate(texts))
    found = []
    for chunk, answers in answer_documents(System(model, tokenizer, task), documents, world, batch, constrain):
        for id, start, end, why in lacking(answers):
            warnings.warn(f"text {id}: characters {start} to {end} may lack mentions: {why}", stacklevel=2)
        found += [mentions for _, mentions in mentions_of(chunk, answers)]
    return found


def answer_documents(
    system: System, documents: Iterable[Document], world: World, batch: int = 32, constrain: bool = False
) -> Iterator[tuple[list[Document], list[Answer]]]:
    """Asks about documents as they come, `DOCUMENTS_AT_ONCE` together: those, and the answers about their sentences.

    Raises:
        UsageError: `constrain` with a format or a tokenizer that it cannot hold to the sentence.
    """
    if constrain:
        check_constraint(system.task, system.tokenizer)
    habits = prime(system.task, system.known)
    documents = iter(documents)
    while chunk := list(islice(documents, DOCUMENTS_AT_ONCE)):
        answers, _ = answer_sentences(
            system.model, system.tokenizer, system.task, all_sentences(chunk), world, batch, quiet=True,
            constrain=constrain, known=system.known, habits=habits,
        )  # fmt: skip
        yield chunk, answers


def mentions_of(documents: Sequence[Document], answers: Sequence[Answer]) -> Iterator[tuple[Document, list[Mention]]]:
    """Each document with the mentions of the answers about it."""
    confidence = confidence_by_mention(answers)
    for document in predicted_documents(documents, answers):
        yield document, [
            Mention(
                span.start, span.end, span.label, document.text[span.start : span.end],
                confidence[document.id, span.start, span.end, span.label],
            )
            for span in document.spans
        ]  # fmt: skip
