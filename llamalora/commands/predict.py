"""Annotates new text with a trained model: one document a line, or a corpus format, as it comes."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ..cli import Interrupt, Parser, UsageError, check_least, refuse_idle
from ..corpus.documents import CorpusError, Document, told
from ..corpus.format import Format
from ..corpus.read import FORMATS, find_splits, stream_documents
from ..corpus.spans import span_record
from ..evaluation.answered import Answer, lacking
from ..evaluation.page import predictions_page
from ..evaluation.result import confidence_by_mention, mention_strings, predicted_documents
from ..files import new_folder, why_not_new
from ..lora.peft_config import ADAPTER_CONFIG
from ..mistakes import is_run, wrong_folder
from ..model.config import PRECISIONS
from ..runs.folder import read_task
from ..runs.settings import check_constraint_format
from ..runs.shared import RECORD, recorded_task
from ..task.definition import FORMATS as ANSWERS
from ..task.definition import Task, listed_labels

if TYPE_CHECKING:
    from ..distributed.world import World
    from ..evaluation.systems import System

EXAMPLES = """
--run RUN notes.txt
--adapter FOLDER --to html notes.txt > notes.html
"""


def main(argv: list[str]) -> None:
    parser = Parser("predict", EXAMPLES, description=__doc__)
    what = parser.add_argument_group("the model: a run, or a model folder, an adapter, or both")
    what.add_argument("--run", help="run folder")
    what.add_argument("--which", default="best", choices=("best", "last"), help="of the run's models (default: best)")
    what.add_argument("--model", metavar="FOLDER", help="whole model, or the adapter's base (default: what it names)")
    what.add_argument("--adapter", metavar="FOLDER", help="PEFT adapter folder")
    what.add_argument("--labels", help=f"what it is asked, where no {RECORD} says so: as in `train`")
    what.add_argument("--format", default="tagging", choices=ANSWERS, help="with --labels (default: tagging)")
    what.add_argument("--instruction", action="store_true", help="with --labels")
    on = parser.add_argument_group("on what and how")
    on.add_argument("--from", dest="form", choices=FORMATS, metavar="FORMAT",
                    help="format of the input (default: what it looks like)")  # fmt: skip
    on.add_argument("--to", default="jsonl", choices=(*FORMATS, "html"), metavar="FORMAT",
                    help=f"format of the output: {', '.join(FORMATS)}, or html, a page (default: jsonl)")  # fmt: skip
    on.add_argument("--out", metavar="FOLDER", help="new folder for --to brat")
    on.add_argument("--precision", default="auto", choices=("auto", *PRECISIONS))
    on.add_argument("--batch", type=int, default=32, help="sentences decoded side by side (default: 32)")
    on.add_argument("--constrain", action="store_true", help="only answers that are the sentence with legal tags")
    parser.add_argument(
        "file", help="text with one document a line, or a corpus file or folder of brat's; - for standard input"
    )
    arguments = parser.parse_args(argv)
    check_least(arguments, batch=1)
    file = Path(arguments.file)  # perhaps a pipe
    if arguments.file != "-" and not file.exists():
        raise CorpusError(f"{file}: no such file")
    if file.is_dir() and (splits := corpus_splits(file)):
        raise CorpusError(f"{file}: a corpus folder; give one split of it: {', '.join(map(str, splits))}")
    form = FORMATS.get(arguments.to)  # None: the page
    in_folder = form is not None and form.folder
    refuse_idle(
        arguments, {"out": not in_folder and "without --to brat, since every other format goes to standard output"}
    )
    if in_folder and arguments.out is None:
        raise UsageError(f"--to {arguments.to}: needs --out FOLDER, a folder that is new or empty")
    if in_folder and (why := why_not_new(Path(arguments.out))):
        raise UsageError(f"--out {arguments.out}: {why}")
    task = find_task(arguments)
    if arguments.constrain:
        check_constraint_format(task.format)

    from ..distributed.world import join_world
    from ..evaluation.annotate import answer_documents
    from ..model.precision import choose_precision

    with join_world() as world:
        precision, _ = choose_precision(arguments.precision, world.device)
        system = load(arguments, task, precision, world)
        notes: Counter[str] = Counter()
        lost: Counter[str] = Counter()
        whole: list[Document] = []  # of a format that is not written in pieces
        shown: list[Answer] = []  # on the page
        documents = stream_documents(arguments.file, notes, FORMATS.get(arguments.form))
        if form is not None and form.name != "jsonl":  # which holds any text
            documents = writable(documents, form)
        for chunk, answers in answer_documents(system, documents, world, arguments.batch, arguments.constrain):
            with Interrupt() as interrupt:  # a reader of the stream never meets half a line
                if world.is_main:
                    annotated = predicted_documents(chunk, answers)
                    cut = unread(answers)
                    if form is None:
                        shown += answers
                    if form is None or form.whole or form.folder:
                        whole += annotated
                    else:
                        write(annotated, confidence_by_mention(answers), cut, form.name, lost)
            if interrupt.signal:
                sys.exit(128 + interrupt.signal)
        if world.is_main:
            name = "standard input" if arguments.file == "-" else arguments.file
            if form is None:
                title = f"{name}, annotated by {arguments.run or arguments.adapter or arguments.model}"
                print(predictions_page(title, whole, shown, mention_strings(system.known)), end="", flush=True)
            elif form.folder:
                with new_folder(Path(arguments.out)) as folder:
                    form.write(whole, folder, lost)
            elif form.whole:
                form.write(whole, sys.stdout, lost)
            for note in told(notes):
                print(f"{name}: {note}", file=sys.stderr)
            for note in told(+lost):
                print(f"--to {arguments.to}: {note}", file=sys.stderr)


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
    if len(set(labels)) < len(labels):
        raise UsageError(f"--labels {arguments.labels}: name each label once")
    try:
        return Task(arguments.format, labels, len(labels) == 1, arguments.instruction)
    except ValueError as error:
        raise UsageError(f"--labels: {error}") from None


def load(arguments: argparse.Namespace, task: Task, precision: str, world: "World") -> "System":
    """The model, and where it is a run's, the sentences that it learnt from."""
    from ..evaluation.systems import System, load_annotator, load_run
    from ..model.precision import DTYPES

    if arguments.run is not None:
        return load_run(Path(arguments.run), arguments.which, precision, world)
    folders = arguments.model, arguments.adapter
    return System(*load_annotator(*folders, task, DTYPES[precision], world.device))


def corpus_splits(folder: Path) -> list[Path]:
    """The splits of a corpus folder; none if it is not one."""
    try:
        return list(find_splits(folder).values())
    except CorpusError:
        return []


def writable(documents: Iterable[Document], form: Format) -> Iterator[Document]:
    """The documents, each refused before it is decoded if the format cannot hold its text or its id."""
    for document in documents:
        if form.folder:
            with TemporaryDirectory() as scratch:
                form.write([document], Path(scratch), Counter())
        else:
            form.write([document], StringIO(), Counter())
        yield document


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
    lost: Counter[str] | None = None,
) -> None:
    """To standard output: a corpus format, of which `jsonl` also has the confidence of each mention and the bounds of
    sentences that are `unread`."""
    if form == "jsonl":
        for document in documents:
            line = span_record(document)
            for item in line["entities"]:
                key = (document.id, item["start"], item["end"], item["label"])
                item["confidence"] = round(confidence[key], 4)
            print(json.dumps(line | {"unread": unread.get(document.id, [])}, ensure_ascii=False))
    else:
        FORMATS[form].write(documents, sys.stdout, Counter() if lost is None else lost)
    sys.stdout.flush()
