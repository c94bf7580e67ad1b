"""Annotates new text with a trained model: one document a line, PubTator or CoNLL, as a stream."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..cli import Interrupt, Parser, UsageError, check_least, refuse_idle
from ..corpus.documents import CorpusError, Document, told
from ..corpus.pubtator import write_pubtator
from ..corpus.read import stream_documents
from ..distributed.world import World, join_world
from ..evaluation.annotate import answer_documents, lacking
from ..evaluation.answer import Answer
from ..evaluation.page import predictions_page
from ..evaluation.result import confidence_by_mention, mention_strings, predicted_documents
from ..evaluation.systems import System, load_annotator, load_run
from ..lora.peft_format import ADAPTER_CONFIG
from ..mistakes import is_run, wrong_folder
from ..model.precision import DTYPES, choose_precision
from ..runs.folder import read_task
from ..runs.setup import check_constraint_format
from ..runs.shared import RECORD, recorded_task
from ..task.definition import FORMATS, Task, listed_labels


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m llamalora predict", description=__doc__)
    what = parser.add_argument_group("the model: a run, or a model folder, an adapter, or both")
    what.add_argument("--run", help="run folder of train.py")
    what.add_argument("--which", default="best", choices=("best", "last"), help="of the run's models (default: best)")
    what.add_argument("--model", metavar="FOLDER", help="whole model, or the adapter's base (default: what it names)")
    what.add_argument("--adapter", metavar="FOLDER", help="PEFT adapter folder")
    what.add_argument("--labels", help=f"what it is asked, where no {RECORD} says so: as in train.py")
    what.add_argument("--format", default="tagging", choices=FORMATS, help="with --labels (default: tagging)")
    what.add_argument("--instruction", action="store_true", help="with --labels")
    parser.add_argument("--to", default="jsonl", choices=("jsonl", "pubtator", "html"), help="output (default: jsonl)")
    parser.add_argument("--precision", default="auto", choices=("auto", *DTYPES))
    parser.add_argument("--batch", type=int, default=32, help="sentences decoded side by side (default: 32)")
    parser.add_argument("--constrain", action="store_true", help="only answers that are the sentence with legal tags")
    parser.add_argument("file", help="text with one document a line, PubTator or CoNLL; - for standard input")
    arguments = parser.parse_args(argv)
    check_least(arguments, batch=1)
    file = Path(arguments.file)  # perhaps a pipe
    if arguments.file != "-" and (file.is_dir() or not file.exists()):
        raise CorpusError(f"{file}: {'is a folder' if file.is_dir() else 'no such file'}")
    task = find_task(arguments)
    if arguments.constrain:
        check_constraint_format(task.format)
    with join_world() as world:
        precision, _ = choose_precision(arguments.precision, world.device)
        system = load(arguments, task, precision, world)
        notes: Counter[str] = Counter()
        documents = stream_documents(arguments.file, notes)
        chunks = answer_documents(system, documents, world, arguments.batch, arguments.constrain)
        if arguments.to == "html":
            write_page(chunks, arguments, system, world)
        else:
            write_stream(chunks, arguments.to, world)
        if world.is_main:
            name = "standard input" if arguments.file == "-" else arguments.file
            for note in told(notes):
                print(f"{name}: {note}", file=sys.stderr)


def find_task(arguments: argparse.Namespace) -> Task:
    """What the model is asked: by the run, by what stands beside model or adapter, or by --labels.

    Raises:
        UsageError: flags that do not go together, or none of the three.
        CheckpointError: what is no run, or a record that cannot be read.
    """
    given = arguments.adapter if arguments.adapter is not None else arguments.model
    if (arguments.run is None) == (given is None):
        raise UsageError("give either --run, or --model, --adapter or both")
    recorded = read_task(Path(arguments.run)) if given is None else recorded_task(given)
    refuse_idle(arguments, {
        "labels format instruction": recorded and f"with {given or '--run'}, which is asked what it learnt",
        "which": given and "without --run",
    })  # fmt: skip
    if recorded is not None:
        return recorded
    labels = listed_labels(arguments.labels or "", ())
    if not labels:
        kind, proof = ("model", "config.json") if arguments.adapter is None else ("adapter", ADAPTER_CONFIG)
        if not (Path(given) / proof).is_file() or is_run(Path(given)):
            raise UsageError(wrong_folder(given, f"{kind} folder", f"{given}: has no {proof}"))
        raise UsageError(
            f"{given}: no {RECORD} in it says what it is asked; give --labels in the order in which it was trained on "
            "them (such as Disease,Chemical), and --format and --instruction if it was trained so"
        )
    try:
        return Task(arguments.format, labels, len(labels) == 1, arguments.instruction)
    except ValueError as error:
        raise UsageError(f"--labels: {error}") from None


def load(arguments: argparse.Namespace, task: Task, precision: str, world: World) -> System:
    """The model, and where it is a run's, the sentences that it learnt from."""
    if arguments.run is not None:
        return load_run(Path(arguments.run), arguments.which, precision, world)
    folders = arguments.model, arguments.adapter
    return System(*load_annotator(*folders, task, DTYPES[precision], world.device))


def write_stream(chunks: Iterable[tuple[list[Document], list[Answer]]], form: str, world: World) -> None:
    """Documents as they are done."""
    for chunk, answers in chunks:
        with Interrupt() as interrupt:  # a reader of the stream never meets half a line
            if world.is_main:
                annotated = predicted_documents(chunk, answers)
                write(annotated, confidence_by_mention(answers), unread(answers), form)
        if interrupt.signal:
            sys.exit(128 + interrupt.signal)


def write_page(
    chunks: Iterable[tuple[list[Document], list[Answer]]], arguments: argparse.Namespace, system: System, world: World
) -> None:
    """All documents as one page, on standard output."""
    documents: list[Document] = []
    answers: list[Answer] = []
    for chunk, found in chunks:
        documents += chunk
        answers += found
    if world.is_main:
        unread(answers)
        model = arguments.run or arguments.adapter or arguments.model
        title = f"{'Standard input' if arguments.file == '-' else arguments.file}, annotated by {model}"
        print(predictions_page(title, documents, answers, mention_strings(system.known)), end="", flush=True)


def unread(answers: Iterable[Answer]) -> dict[str, list[tuple[int, int]]]:
    """By document the bounds of the sentences in which mentions may be missing, as standard error says."""
    found: dict[str, list[tuple[int, int]]] = {}
    for id, start, end, why in lacking(answers):
        found.setdefault(id, []).append((start, end))
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
