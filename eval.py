#!/usr/bin/env python3
"""Scores a run, or any PEFT adapter: decodes a split, parses the answers, counts exact mentions."""

import argparse
import json
import sys
from functools import partial
from io import StringIO
from pathlib import Path

from llamalora.cli import UsageError, run_command
from llamalora.corpus.documents import Document, told
from llamalora.corpus.pubtator import write_pubtator
from llamalora.corpus.read import find_splits, read_documents
from llamalora.distributed.world import World, join_world
from llamalora.evaluation.answer import DRAFT_TOKENS, Answer, select_sentences
from llamalora.evaluation.page import result_page
from llamalora.evaluation.result import format_report, predicted_documents, write_result
from llamalora.evaluation.systems import joint_labels, load_run, load_system, score_split
from llamalora.files import replace_file
from llamalora.model.precision import DTYPES, choose_precision
from llamalora.runs.folder import read_settings, read_task
from llamalora.runs.settings import Settings
from llamalora.task.errors import format_tables
from llamalora.task.prompt import listed_labels


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_argument_group("what is scored")
    what.add_argument("--run", action="append", default=[], help="run folder; two one-label runs are joined")
    what.add_argument("--which", default="best", choices=("best", "last"), help="which adapter of the run")
    what.add_argument("--model", help="Hugging Face folder, instead of --run")
    what.add_argument("--adapter", help="PEFT adapter folder for --model")
    what.add_argument("--format", default="tagging", choices=("tagging", "extraction"), help="with --model")
    what.add_argument("--labels", default="all", help="with --model: as in train.py")
    what.add_argument("--instruction", action="store_true", help="with --model: as in train.py")
    what.add_argument("--shots", type=int, default=0, help="with --model: as in train.py")
    what.add_argument("--order", help="labels by priority where runs are joined (default: Disease, Chemical, others)")
    on = parser.add_argument_group("on what and how")
    on.add_argument("--data", help="corpus folder (default: the run's)")
    on.add_argument("--split", default="dev", choices=("train", "dev", "test"))
    on.add_argument("--limit", type=int, help="only the first N sentences")
    on.add_argument("--precision", default="auto", choices=("auto", *DTYPES))
    on.add_argument("--batch", type=int, default=32, help="sentences decoded side by side (default: 32)")
    on.add_argument(
        "--draft", default="source", choices=("source", "none"), help="same answers: verified drafts, or token by token"
    )
    on.add_argument("--constrain", action="store_true", help="only answers that are the sentence with legal tags")
    on.add_argument("--predictions", metavar="FILE", help="write the predicted mentions there as PubTator")
    on.add_argument("--html", metavar="FILE", help="write a page there that shows predictions beside gold")
    on.add_argument("--out", metavar="FOLDER", help="where to write eval-SPLIT.json (default: the run)")
    on.add_argument("--json", action="store_true", help="print the result as JSON and nothing else")
    arguments = parser.parse_args(argv)
    if bool(arguments.run) == bool(arguments.model):
        parser.error("give either --run, or --model with or without --adapter")
    for name in ("limit", "batch"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} is {value}; it must be at least 1")
    with join_world() as world:
        result, answers, documents, known = score(arguments, world)
        if not world.is_main:
            return
        if arguments.predictions:
            text = StringIO()
            write_pubtator(predicted_documents(documents, answers), text)
            replace_file(Path(arguments.predictions), text.getvalue())
        if arguments.html:
            title = f"Predictions of {', '.join(arguments.run) or arguments.adapter or arguments.model}"
            replace_file(Path(arguments.html), result_page(title, result, documents, answers, known))
        folder = arguments.out or (arguments.run[0] if len(arguments.run) == 1 else None)
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            written = write_result(result, answers, Path(folder))
        if arguments.json:
            print(json.dumps(result, indent=2))
        else:
            print(f"{format_report(result)}\n\n{format_tables(result['errors'])}")
            if folder:
                print(f"written to {written}")


def score(
    arguments: argparse.Namespace, world: World
) -> tuple[dict, list[Answer], list[Document], set[tuple[str, str]]]:
    """The result for `eval-SPLIT.json`, the answers, the documents that they are about, and the (label, string) of the
    mentions in training."""
    precision, why = choose_precision(arguments.precision, world.device)
    data = arguments.data or (read_settings(Path(arguments.run[0])).data if arguments.run else None)
    if data is None:
        raise UsageError("--model needs --data, the corpus to score on")
    splits = find_splits(data)
    if arguments.split not in splits:
        raise UsageError(f"--split {arguments.split}: {data} has only {', '.join(splits)}")
    read = read_documents(splits[arguments.split])
    for note in told(read.notes) if world.is_main else ():
        print(f"{splits[arguments.split]}: {note}", file=sys.stderr)
    documents, asked = select_sentences(read, arguments.limit)
    if not arguments.json:
        world.say(f"{arguments.split} split of {data}: {len(asked)} sentences; precision {precision} ({why})")
    order: tuple[str, ...] = ()
    if arguments.run:
        labels = joint_labels([read_task(Path(folder)) for folder in arguments.run])
        order = listed_labels(arguments.order or "", labels)
        if len(arguments.run) > 1 and order and sorted(order) != sorted(labels):
            raise UsageError(f"--order {arguments.order}: must name {', '.join(labels)}, each once")
        loaders = [partial(load_run, Path(f), arguments.which, precision, world) for f in arguments.run]
    else:
        asking = {name: getattr(arguments, name) for name in ("model", "format", "labels", "instruction", "shots")}
        loaders = [partial(load_system, Settings(data=data, **asking), arguments.adapter, precision, world)]
    drafted = DRAFT_TOKENS if arguments.draft == "source" else 0
    result, answers, known = score_split(
        loaders, arguments.split, documents, asked, precision, world, arguments.batch, drafted, order,
        quiet=arguments.json, constrain=arguments.constrain,
    )  # fmt: skip
    return result, answers, documents, known


if __name__ == "__main__":
    run_command(main)
