#!/usr/bin/env python3
"""Scores a run, or any PEFT adapter: decodes a split, parses the answers, counts exact mentions."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from llamalora import corpus, evaluate, ner, run
from llamalora.adapter import load_adapter
from llamalora.checkpoint import load_model, read_config
from llamalora.cli import UsageError, run_command
from llamalora.distributed import World, join_world
from llamalora.lora import lora_layers, merge
from llamalora.model import Llama
from llamalora.tokenizer import Tokenizer, check_fit, load_tokenizer
from llamalora.training import DTYPES, choose_precision


@dataclass(frozen=True)
class System:
    """A model ready to be asked."""

    model: Llama
    tokenizer: Tokenizer
    task: ner.Task


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
    on.add_argument("--predictions", metavar="FILE", help="write the predicted mentions there as PubTator")
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
        result, documents = score(arguments, world)
        if not world.is_main:
            return
        if arguments.predictions:
            with open(arguments.predictions, "w", encoding="utf-8") as file:
                corpus.write_pubtator(documents, file)
        folder = arguments.out or (arguments.run[0] if len(arguments.run) == 1 else None)
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            written = evaluate.write_result(result, Path(folder))
        if arguments.json:
            print(json.dumps(result, indent=2))
        else:
            print(evaluate.format_report(result))
            if folder:
                print(f"written to {written}")


def score(arguments: argparse.Namespace, world: World) -> tuple[dict, list[corpus.Document]]:
    """The result for `eval-SPLIT.json`, and the documents with the predicted mentions."""
    precision, why = choose_precision(arguments.precision, world.device)
    data = arguments.data or (run.read_settings(Path(arguments.run[0])).data if arguments.run else None)
    if data is None:
        raise UsageError("--model needs --data, the corpus to score on")
    splits = corpus.find_splits(data)
    if arguments.split not in splits:
        raise UsageError(f"--split {arguments.split}: {data} has only {', '.join(splits)}")
    documents, asked = evaluate.select(corpus.read(splits[arguments.split]), arguments.limit)
    if not arguments.json:
        world.say(f"{arguments.split} split of {data}: {len(asked)} sentences; precision {precision} ({why})")

    drafted = evaluate.DRAFT_TOKENS if arguments.draft == "source" else 0
    tasks = [run.read_task(Path(source)) for source in arguments.run]
    named = [label for task in tasks for label in task.labels]
    labels = corpus.label_order(named)
    if len(labels) < len(named):
        raise UsageError(f"--run: two runs answer for one label ({', '.join(named)}); only different ones are joined")
    order = arguments.order.split(",") if arguments.order else labels
    if len(tasks) > 1 and sorted(order) != sorted(labels):
        raise UsageError(f"--order {arguments.order}: must name {', '.join(labels)}, each once")
    by_label: dict[str, list[evaluate.Answer]] = {}
    seconds = sentences = tokens = passes = 0
    for source in arguments.run or [None]:
        system = load_run(source, arguments, precision, world) if source else load(arguments, data, precision, world)
        answers, speed = evaluate.answer(
            system.model, system.tokenizer, system.task, asked, world, arguments.batch, drafted, arguments.json
        )
        by_label["+".join(system.task.labels)] = answers
        seconds, sentences = seconds + speed.seconds, sentences + speed.sentences
        tokens, passes = tokens + speed.tokens, passes + speed.forward_passes
    if len(by_label) > 1:
        answers = evaluate.joined(by_label, order)
    result = {
        "split": arguments.split,
        **evaluate.assess(documents, answers, labels or system.task.labels),
        "speed": evaluate.Speed(seconds, sentences, tokens, passes).to_dict(),
        "precision": precision,
    }
    return result, evaluate.predicted_documents(documents, answers)


def load_run(source: str, arguments: argparse.Namespace, precision: str, world: World) -> System:
    model, tokenizer = run.load_trained(Path(source), arguments.which, precision, world.device)
    merge(model)
    return System(model, tokenizer, run.read_task(Path(source)))


def load(arguments: argparse.Namespace, data: str, precision: str, world: World) -> System:
    tokenizer = load_tokenizer(arguments.model)
    check_fit(tokenizer, read_config(arguments.model).vocab_size, arguments.model)
    settings = run.Settings(
        model=arguments.model,
        data=data,
        format=arguments.format,
        labels=arguments.labels,
        instruction=arguments.instruction,
        shots=arguments.shots,
    )
    splits = {name: corpus.read(path) for name, path in corpus.find_splits(data).items()}
    task = run.make_task(settings, splits)
    model = load_model(arguments.model, DTYPES[precision], torch.device(world.device))
    if arguments.adapter:
        load_adapter(model, arguments.adapter)
        assert lora_layers(model)
        merge(model)
    return System(model, tokenizer, task)


if __name__ == "__main__":
    run_command(main)
