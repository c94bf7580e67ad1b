"""Trained systems - runs, one-label runs to be joined, any model with a PEFT adapter - and their scores on a split."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from . import corpus, evaluate, ner, run
from .adapter import load_adapter
from .checkpoint import load_model, read_config
from .distributed import World
from .errors import InputError
from .lora import merge
from .model import Llama
from .precision import DTYPES
from .tokenizer import Tokenizer, check_fit, load_tokenizer


@dataclass(frozen=True)
class System:
    """A model ready to be asked: its updates are merged."""

    model: Llama
    tokenizer: Tokenizer
    task: ner.Task
    known: Sequence[corpus.Sentence] = ()  # with their mentions: drafts learn from them


def load_run(folder: Path, which: str, precision: str, world: World) -> System:
    """The `best` or `last` model of a run."""
    model, tokenizer = run.load_trained(folder, which, precision, world.device)
    task = run.read_task(folder)
    known = _training_sentences(run.read_settings(folder).data) if task.format == "tagging" else ()
    return System(merge(model), tokenizer, task, known)


def load_system(settings: run.Settings, adapter: str | None, precision: str, world: World) -> System:
    """A model folder, perhaps with a PEFT adapter, that is asked as the settings say (model, data, format, labels,
    instruction, shots)."""
    tokenizer = load_tokenizer(settings.model)
    check_fit(tokenizer, read_config(settings.model).vocab_size, settings.model)
    splits = {name: corpus.read(path) for name, path in corpus.find_splits(settings.data).items()}
    task = run.make_task(settings, splits)
    model = load_model(settings.model, DTYPES[precision], world.device)
    if adapter:
        merge(load_adapter(model, adapter))
    known = corpus.all_sentences(splits.get("train", ()))
    return System(model, tokenizer, task, known)


def _training_sentences(data: str) -> list[corpus.Sentence]:
    """Of a corpus folder; none if it is not there any more."""
    try:
        documents = corpus.read(corpus.find_splits(data)["train"])
    except (corpus.CorpusError, KeyError, OSError):
        return []
    return corpus.all_sentences(documents)


def joint_labels(tasks: Sequence[ner.Task]) -> tuple[str, ...]:
    """The labels that several systems answer for together, in the corpus's order.

    Raises:
        InputError: two of them answer for one label.
    """
    named = [label for task in tasks for label in task.labels]
    labels = corpus.label_order(named)
    if len(labels) < len(named):
        raise InputError(f"two systems answer for one label ({', '.join(named)}); only different labels can be joined")
    return labels


def score_split(
    loaders: Iterable[Callable[[], System]],
    split: str,
    documents: Sequence[corpus.Document],
    asked: Sequence[corpus.Sentence],
    precision: str,
    world: World,
    batch: int = 32,
    draft_tokens: int = evaluate.DRAFT_TOKENS,
    order: Sequence[str] = (),
    quiet: bool = False,
    constrain: bool = False,
) -> tuple[dict, list[evaluate.Answer]]:
    """Decodes and scores sentences of a split.

    Args:
        loaders: each makes a system, one after the other, so that one model is in memory at a time; the
            answers of several are joined.
        documents, asked: from `evaluate.select`.
        batch, draft_tokens, constrain: as in `evaluate.answer`.
        order: labels by priority where several systems are joined; the corpus's if empty.

    Returns:
        The result for `eval-SPLIT.json`, and the (joined) answers.
    """
    by_label: dict[str, list[evaluate.Answer]] = {}
    tasks, speeds = [], []
    for load in loaders:
        system = load()
        if constrain:
            run.check_constraint(system.task)
        answers, speed = evaluate.answer(
            system.model, system.tokenizer, system.task, asked, world, batch, draft_tokens, quiet, constrain,
            system.known,
        )  # fmt: skip
        by_label["+".join(system.task.labels)] = answers
        tasks.append(system.task)
        speeds.append(speed)
        del system  # before the next is loaded
    labels = joint_labels(tasks)
    if len(by_label) > 1:
        answers = evaluate.joined(by_label, order or labels)
    speed = replace(sum(speeds[1:], speeds[0]), sentences=len(asked))
    scores = evaluate.assess(documents, answers, labels)
    return {"split": split, **scores, "speed": speed.to_dict(), "precision": precision}, answers
