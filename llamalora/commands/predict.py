"""Annotates new text with a trained model: one document a line, PubTator or CoNLL, as a stream."""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

from ..cli import Interrupt, Parser, check_least
from ..corpus.documents import CorpusError, Document, told
from ..corpus.pubtator import write_pubtator
from ..corpus.read import stream_documents
from ..distributed.world import join_world
from ..evaluation.answer import Answer, answer_sentences, select_sentences
from ..evaluation.result import confidence_by_mention, predicted_documents
from ..evaluation.systems import load_run
from ..model.precision import DTYPES, choose_precision
from ..runs.folder import read_task
from ..runs.setup import check_constraint, check_constraint_format

DOCUMENTS_AT_ONCE = 64  # held in memory and decoded together


def main(argv: list[str]) -> None:
    parser = Parser("predict", "--run RUN notes.txt", description=__doc__)
    parser.add_argument("--run", required=True, help="run folder")
    parser.add_argument("--which", default="best", choices=("best", "last"), help="which adapter of the run")
    parser.add_argument("--to", default="jsonl", choices=("jsonl", "pubtator"), help="output (default: jsonl)")
    parser.add_argument("--precision", default="auto", choices=("auto", *DTYPES))
    parser.add_argument("--batch", type=int, default=32, help="sentences decoded side by side (default: 32)")
    parser.add_argument("--constrain", action="store_true", help="only answers that are the sentence with legal tags")
    parser.add_argument("file", help="text with one document a line, PubTator or CoNLL; - for standard input")
    arguments = parser.parse_args(argv)
    check_least(arguments, batch=1)
    file = Path(arguments.file)  # perhaps a pipe
    if arguments.file != "-" and (file.is_dir() or not file.exists()):
        raise CorpusError(f"{file}: {'is a folder' if file.is_dir() else 'no such file'}")
    if arguments.constrain:
        check_constraint_format(read_task(Path(arguments.run)).format)
    with join_world() as world:
        precision, _ = choose_precision(arguments.precision, world.device)
        system = load_run(Path(arguments.run), arguments.which, precision, world)
        if arguments.constrain:
            check_constraint(system.task, system.tokenizer)
        notes: Counter[str] = Counter()
        documents = stream_documents(arguments.file, notes)
        while chunk := list(islice(documents, DOCUMENTS_AT_ONCE)):
            _, asked = select_sentences(chunk, None)
            answers, _ = answer_sentences(
                system.model, system.tokenizer, system.task, asked, world, arguments.batch, quiet=True,
                constrain=arguments.constrain, known=system.known,
            )  # fmt: skip
            with Interrupt() as interrupt:  # a reader of the stream never meets half a line
                if world.is_main:
                    annotated = predicted_documents(chunk, answers)
                    write(annotated, confidence_by_mention(answers), unread(answers), arguments.to)
            if interrupt.signal:
                sys.exit(128 + interrupt.signal)
        if world.is_main:
            name = "standard input" if arguments.file == "-" else arguments.file
            for note in told(notes):
                print(f"{name}: {note}", file=sys.stderr)


def unread(answers: Iterable[Answer]) -> dict[str, list[tuple[int, int]]]:
    """By document the bounds of the sentences that found no room in the model's context, or whose answer was cut off:
    mentions may be missing there, as standard error says."""
    found: dict[str, list[tuple[int, int]]] = {}
    for item in answers:
        if item.overlong or item.parsed.truncated:
            id, start = item.sentence.document, item.sentence.start
            end = start + len(item.sentence.text)
            found.setdefault(id, []).append((start, end))
            why = "longer than the model's context, and not read" if item.overlong else "its answer was cut off"
            print(f"document {id}: the sentence from {start} to {end} may lack mentions: {why}", file=sys.stderr)
    return found


def write(
    documents: Iterable[Document],
    confidence: Mapping[tuple[str, int, int, str], float],
    unread: Mapping[str, Sequence[tuple[int, int]]],
    form: str,
) -> None:
    """To standard output: PubTator, or JSON lines with id, text, entities (start, end, label, text, confidence) and
    the bounds of sentences that are `unread`."""
    if form == "pubtator":
        write_pubtator(documents, sys.stdout)
    else:
        for document in documents:
            entities = [
                vars(span)
                | {"text": document.text[span.start : span.end]}
                | {"confidence": round(confidence[document.id, span.start, span.end, span.label], 4)}
                for span in document.spans
            ]
            line = {"id": document.id, "text": document.text, "entities": entities}
            print(json.dumps(line | {"unread": unread.get(document.id, [])}, ensure_ascii=False))
    sys.stdout.flush()
