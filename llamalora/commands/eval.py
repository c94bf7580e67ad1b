"""Scores a run, or any PEFT adapter: decodes a split, parses the answers, counts exact mentions."""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from ..cli import Parser, UsageError, check_least, check_new_file, refuse_idle
from ..corpus.documents import told
from ..corpus.pubtator import write_pubtator
from ..corpus.read import find_splits, read_documents
from ..evaluation.answered import joint_labels, select_sentences
from ..evaluation.card import update_card
from ..evaluation.own import foreign, scored_with
from ..evaluation.page import result_page
from ..evaluation.result import format_legend, format_report, predicted_documents, write_result
from ..files import replace_file
from ..mistakes import is_run
from ..model.config import PRECISIONS, read_config
from ..runs.folder import fingerprint, read_settings, read_task, recorded_folder
from ..runs.settings import Settings, check_constraint_format
from ..runs.shared import other_base, recorded_task
from ..runs.state import MANIFEST
from ..task.definition import COPYING, FORMATS, listed_labels
from ..task.error_tables import format_tables
from ..text_table import wrapped

if TYPE_CHECKING:
    from ..distributed.world import World
    from ..evaluation.systems import System

EXAMPLES = """
--run RUN --split test --html errors.html
--model FOLDER --adapter FOLDER --data data/bc5cdr
"""
SEVERAL = """
In several processes: torchrun --nproc_per_node 4 -m -- llamalora eval --run RUN, or in a clone -- eval.py --run RUN.
Without the -- torchrun takes --run for a flag of its own.
""".strip()


def main(argv: list[str]) -> None:
    usage = "%(prog)s (--run RUN | --model FOLDER) [FLAG ...]"
    parser = Parser("eval", EXAMPLES, usage=usage, description=__doc__, epilog=SEVERAL)
    what = parser.add_argument_group("what is scored")
    what.add_argument(
        "--run", action="append", default=[], help="run folder; several, for different labels, are joined"
    )
    what.add_argument("--which", default="best", choices=("best", "last"), help="which adapter of the run")
    what.add_argument("--model", help="Hugging Face folder, instead of --run")
    what.add_argument("--adapter", help="PEFT adapter folder for --model")
    what.add_argument("--format", default="tagging", choices=FORMATS, help="with --model")
    what.add_argument("--labels", default="all", help="with --model: as in `train`")
    what.add_argument("--instruction", action="store_true", help="with --model: as in `train`")
    what.add_argument("--shots", type=int, default=0, help="with --model: as in `train`")
    what.add_argument("--order", help="labels by priority where runs are joined (default: Disease, Chemical, others)")
    on = parser.add_argument_group("on what and how")
    on.add_argument("--data", help="corpus folder (default: the run's)")
    on.add_argument("--split", default="dev", choices=("train", "dev", "test"))
    on.add_argument("--limit", type=int, help="only the first N sentences")
    on.add_argument("--precision", default="auto", choices=("auto", *PRECISIONS))
    on.add_argument("--batch", type=int, default=32, help="sentences decoded side by side (default: 32)")
    on.add_argument(
        "--draft", default="source", choices=("source", "none"), help="same answers: verified drafts, or token by token"
    )
    on.add_argument("--constrain", action="store_true", help="only answers that are the sentence with legal tags")
    on.add_argument("--predictions", metavar="FILE", help="write the predicted mentions there as PubTator")
    on.add_argument("--html", metavar="FILE", help="write a page there that shows predictions beside gold")
    on.add_argument("--out", metavar="FOLDER", help="where to write eval-SPLIT.json (default: the run)")
    on.add_argument("--json", action="store_true", help="print the result as JSON and nothing else")
    on.add_argument("--quiet", action="store_true", help="print nothing but warnings, errors and the final result")
    arguments = parser.parse_args(argv)
    order = check_flags(arguments)
    data = arguments.data
    if data is None:
        data = recorded_folder(Path(arguments.run[0]), "data", "give its folder with --data")
    splits = find_splits(data)
    if arguments.split not in splits:
        raise UsageError(f"--split {arguments.split}: {data} has only {', '.join(splits)}")

    from ..distributed.world import join_world
    from ..evaluation.answer import DRAFT_TOKENS
    from ..evaluation.systems import score_split
    from ..model.precision import choose_precision

    with join_world() as world:
        precision, why = choose_precision(arguments.precision, world.device)
        models = [Path(run) / arguments.which for run in arguments.run]
        models += [folder for folder in (arguments.model, arguments.adapter) if folder is not None]
        corpus = fingerprint(sorted(splits.values()))
        scored = scored_with(models, corpus, arguments.limit, precision, arguments.constrain)
        folder, note = choose_folder(arguments, scored)

        read = read_documents(splits[arguments.split])
        for unread in told(read.notes):
            world.warn(f"{splits[arguments.split]}: {unread}")
        documents, asked = select_sentences(read, arguments.limit)
        if arguments.predictions is not None:
            write_pubtator(documents, StringIO())  # what it refuses need not wait for the answers
        quiet = arguments.json or arguments.quiet
        if not quiet:
            world.say(wrapped(
                f"{arguments.split} split of {data}: {len(asked)} sentences; precision {precision} ({why})"
            ))  # fmt: skip
        if note and not arguments.json:
            world.warn(wrapped(note))
        drafted = DRAFT_TOKENS if arguments.draft == "source" else 0
        result, answers, known = score_split(
            loaders(arguments, data, precision, world), arguments.split, documents, asked, world, arguments.batch,
            drafted, order, quiet, arguments.constrain,
        )  # fmt: skip
        result |= scored
        if not world.is_main:
            return
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            written = write_result(result, answers, folder)
            if is_run(folder):
                update_card(folder)
        if arguments.predictions is not None:
            text = StringIO()
            write_pubtator(predicted_documents(documents, answers), text)
            replace_file(Path(arguments.predictions), text.getvalue())
        if arguments.html is not None:
            title = f"Predictions of {', '.join(arguments.run) or arguments.adapter or arguments.model}"
            replace_file(Path(arguments.html), result_page(title, result, documents, answers, known))
        if arguments.json:
            print(json.dumps(result, indent=2))
        else:
            report = f"{format_report(result)}\n\n{format_tables(result['errors'])}"
            print(report if quiet else f"{report}\n\n{format_legend(result, report)}\n")
            places = [written] if folder is not None else []
            for place in (*places, arguments.predictions, arguments.html):
                if place is not None:
                    print(f"written to {place}")


def check_flags(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The labels that --order lists, by priority; none without it.

    Raises:
        UsageError: flags that do not go together, a number out of range, files that cannot be written.
        CheckpointError: what is no run.
    """
    if bool(arguments.run) == (arguments.model is not None):
        raise UsageError("give either --run, or --model with or without --adapter")
    if arguments.model is not None and arguments.data is None:
        raise UsageError("--model needs --data, the corpus to score on")
    if arguments.model is not None:
        read_config(arguments.model)  # what it refuses need not wait for torch
    check_least(arguments, limit=1, batch=1, shots=0)
    tasks = [read_task(Path(run)) for run in arguments.run]
    given = arguments.adapter if arguments.adapter is not None else arguments.model
    recorded = recorded_task(given) if given is not None else None
    formats = {task.format for task in (*tasks, recorded) if task} or {arguments.format}
    refuse_idle(arguments, {
        "adapter": arguments.run and "with --run",
        "format labels instruction shots": (arguments.run or recorded) and f"with {given or '--run'}, which is asked "
        "what it learnt",
        "which": not arguments.run and "without --run",
        "order": len(tasks) < 2 and "unless several runs are joined",
        "quiet": arguments.json and "with --json, which prints nothing else",
        "draft": not formats & {*COPYING} and "where answers do not repeat the sentence",
    })  # fmt: skip
    if arguments.constrain:
        for form in formats:
            check_constraint_format(form)
    labels = joint_labels(tasks)
    order = () if arguments.order is None else listed_labels(arguments.order, labels)
    if arguments.order is not None and sorted(order) != sorted(labels):
        raise UsageError(f"--order {arguments.order}: must name {', '.join(labels)}, each once")
    if arguments.out is not None and Path(arguments.out).exists() and not Path(arguments.out).is_dir():
        raise UsageError(f"--out {arguments.out}: is a file, not a folder")
    check_new_file(arguments, "predictions", "html")
    return order


def choose_folder(arguments: argparse.Namespace, scored: dict) -> tuple[Path | None, str]:
    """Where the result is written, if anywhere, and what to say about it.

    A run keeps nothing but its own results, as it would score itself.

    Raises:
        UsageError: --out is a run, and the result is not its own; or it is a saved model.
    """
    run = Path(arguments.run[0]) if len(arguments.run) == 1 else None
    folder = run if arguments.out is None else Path(arguments.out)
    if folder is not None and (folder / MANIFEST).exists():
        raise UsageError(f"--out {folder}: holds a saved model; choose another folder")
    if folder is None or not is_run(folder):
        return folder, ""
    if run is not None and run.resolve() == folder.resolve():
        reasons = foreign(scored, run, arguments.split)
        settings = read_settings(run)
        if settings.adapts and other_base(run / "best", settings.model):
            reasons.append("the base model is not the one that it was trained on")
    else:
        reasons = ["it is not about that run alone"]
    if not reasons:
        return folder, ""
    if arguments.out is not None:
        raise UsageError(f"--out {folder}: a run keeps its own results only, and {'; '.join(reasons)}")
    return None, f"not kept, for it is not the run's own result: {'; '.join(reasons)}. --out FOLDER keeps it"


def loaders(
    arguments: argparse.Namespace, data: str, precision: str, world: "World"
) -> "Iterator[Callable[[], System]]":
    """What loads the systems that are scored."""
    from ..evaluation.systems import load_run, load_system

    for run in arguments.run:
        yield partial(load_run, Path(run), arguments.which, precision, world)
    if arguments.model is not None:
        asking = {name: getattr(arguments, name) for name in ("model", "format", "labels", "instruction", "shots")}
        yield partial(load_system, Settings(data=data, **asking), arguments.adapter, precision, world)
