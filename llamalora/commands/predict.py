"""Annotates new text with a trained model: one document a line, or a corpus format, as it comes."""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

from ..cli import Interrupt, Parser, UsageError, check_least, refuse_idle
from ..corpus.documents import CorpusError, Document, told
from ..corpus.read import FORMATS, find_splits, stream_documents
from ..corpus.spans import span_record
from ..distributed.world import join_world
from ..evaluation.answer import Answer, answer_sentences, select_sentences
from ..evaluation.result import confidence_by_mention, predicted_documents
from ..evaluation.systems import load_run
from ..files import is_occupied, new_folder
from ..model.precision import DTYPES, choose_precision
from ..runs.folder import read_task
from ..runs.setup import check_constraint, check_constraint_format

DOCUMENTS_AT_ONCE = 64  # held in memory and decoded together


def main(argv: list[str]) -> None:
    parser = Parser("predict", "--run RUN notes.txt", description=__doc__)
    parser.add_argument("--run", required=True, help="run folder")
    parser.add_argument("--which", default="best", choices=("best", "last"), help="which adapter of the run")
    parser.add_argument(
        "--from", dest="form", choices=FORMATS, help="format of the input (default: what it looks like)"
    )
    parser.add_argument("--to", default="jsonl", choices=FORMATS, help="format of the output (default: jsonl)")
    parser.add_argument("--out", metavar="FOLDER", help="new folder for --to brat")
    parser.add_argument("--precision", default="auto", choices=("auto", *DTYPES))
    parser.add_argument("--batch", type=int, default=32, help="sentences decoded side by side (default: 32)")
    parser.add_argument("--constrain", action="store_true", help="only answers that are the sentence with legal tags")
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
    form = FORMATS[arguments.to]
    refuse_idle(
        arguments, {"out": not form.folder and "without --to brat, since every other format goes to standard output"}
    )
    if form.folder and (arguments.out is None or is_occupied(Path(arguments.out))):
        raise UsageError(f"--to {form.name}: needs --out FOLDER, a folder that is new or empty")
    if arguments.constrain:
        check_constraint_format(read_task(Path(arguments.run)).format)
    with join_world() as world:
        precision, _ = choose_precision(arguments.precision, world.device)
        system = load_run(Path(arguments.run), arguments.which, precision, world)
        if arguments.constrain:
            check_constraint(system.task, system.tokenizer)
        notes: Counter[str] = Counter()
        lost: Counter[str] = Counter()
        whole: list[Document] = []  # of a format that is not written in pieces
        documents = stream_documents(arguments.file, notes, FORMATS.get(arguments.form))
        while chunk := list(islice(documents, DOCUMENTS_AT_ONCE)):
            _, asked = select_sentences(chunk, None)
            answers, _ = answer_sentences(
                system.model, system.tokenizer, system.task, asked, world, arguments.batch, quiet=True,
                constrain=arguments.constrain, known=system.known,
            )  # fmt: skip
            with Interrupt() as interrupt:  # a reader of the stream never meets half a line
                if world.is_main:
                    annotated = predicted_documents(chunk, answers)
                    cut = unread(answers)
                    if form.whole or form.folder:
                        whole += annotated
                    else:
                        write(annotated, confidence_by_mention(answers), cut, form.name, lost)
            if interrupt.signal:
                sys.exit(128 + interrupt.signal)
        if world.is_main:
            if form.folder:
                with new_folder(Path(arguments.out), replace=True) as folder:
                    form.write(whole, folder, lost)
            elif form.whole:
                form.write(whole, sys.stdout, lost)
            name = "standard input" if arguments.file == "-" else arguments.file
            for note in told(notes):
                print(f"{name}: {note}", file=sys.stderr)
            for note in told(+lost):
                print(f"--to {form.name}: {note}", file=sys.stderr)


def corpus_splits(folder: Path) -> list[Path]:
    """The splits of a corpus folder; none if it is not one."""
    try:
        return list(find_splits(folder).values())
    except CorpusError:
        return []


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
