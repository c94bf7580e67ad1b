"""Trained systems (runs, several runs for different labels joined, a model with or without a PEFT adapter) and their
scores on a split."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..corpus.documents import CorpusError, Document, Sentence, all_sentences
from ..corpus.read import find_splits, read_documents, read_splits
from ..distributed.world import World
from ..errors import InputError
from ..lora.adapter import load_adapter
from ..lora.inject import merge_for_good
from ..lora.peft_format import read_adapter
from ..model.checkpoint import load_model, skeleton
from ..model.config import read_config
from ..model.elementwise import compile_formulas
from ..model.llama import Llama
from ..model.precision import DTYPES, choose_precision
from ..runs.folder import fingerprint, read_fingerprints, read_settings, read_task, recorded_folder
from ..runs.settings import Settings
from ..runs.setup import check_constraint, check_tags, choose_compiled, load_trained, make_task
from ..runs.shared import RECORD, find_base, other_base, recorded_task, verify_shared
from ..task.definition import Task
from ..task.tokenizer import Tokenizer, check_fit, load_tokenizer
from .answer import DRAFT_TOKENS, answer_sentences
from .answered import Answer, join_answers, joint_labels
from .result import assess, mention_strings
from .room import explained


@dataclass(frozen=True)
class System:
    """A model ready to be asked: its updates are merged."""

    model: Llama
    tokenizer: Tokenizer
    task: Task
    known: Sequence[Sentence] = ()  # of the training, with their mentions: drafts learn from them


def load_run(folder: Path, which: str, precision: str, world: World) -> System:
    """The `best` or `last` model of a run."""
    task = read_task(folder)
    settings = read_settings(folder)
    instead = f"--model FOLDER --adapter {folder / which}" if settings.adapts else f"--model {folder / which}"
    recorded_folder(folder, "model", f"in place of --run give {instead}")
    if settings.adapts and (doubt := other_base(folder / which, settings.model)):
        world.warn(doubt)
    with _loading(settings.model, DTYPES[precision], world.device):
        model, tokenizer = load_trained(folder, which, precision, world.device)
        model = _compiled(merge_for_good(model))
    return System(model, tokenizer, task, _training_sentences(folder, world)[: settings.limit_train])


def load_system(settings: Settings, adapter: str | None, precision: str, world: World) -> System:
    """A model folder, perhaps with a PEFT adapter, that is asked what a record beside adapter or model says, else what
    the settings say (model, data, format, labels, instruction, shots)."""
    assert settings.model is not None and settings.data is not None, "a system has a model and a corpus"
    tokenizer = _check_folders(settings.model, adapter)
    splits = read_splits(settings.data)
    task = recorded_task(adapter or settings.model) or make_task(settings, splits)
    if adapter is not None and (doubt := other_base(adapter, settings.model)):
        world.warn(doubt)
    check_tags(task, tokenizer, settings.model)
    model = _compiled(_load_merged(settings.model, adapter, DTYPES[precision], world.device))
    known = all_sentences(splits.get("train", ()))
    return System(model, tokenizer, task, known)


def _compiled(model: Llama) -> Llama:
    """With compiled formulas, if a GPU can have them: for a whole split it is worth the time."""
    if choose_compiled("auto", model.model.norm.weight.device)[0]:
        compile_formulas(model)
    return model


def _check_folders(model: str | Path, adapter: str | Path | None) -> Tokenizer:
    """The tokenizer. What is wrong with a folder is said before a model is loaded."""
    for folder in (model, adapter):
        if folder is not None:
            verify_shared(Path(folder))
    config, tokenizer = read_config(model), load_tokenizer(model)
    check_fit(tokenizer, config.vocab_size, model)
    if adapter is not None:
        read_adapter(adapter, skeleton(config))
    return tokenizer


def _load_merged(model: str | Path, adapter: str | Path | None, dtype: torch.dtype, device: torch.device) -> Llama:
    with _loading(model, dtype, device):
        loaded = load_model(model, dtype, device)
        return loaded if adapter is None else merge_for_good(load_adapter(loaded, adapter))


def load_annotator(
    model: str | Path | None = None,
    adapter: str | Path | None = None,
    task: Task | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> tuple[Llama, Tokenizer, Task]:
    """What `annotate` needs of a model that somebody shared: model (its updates merged), tokenizer and task.

    Args:
        model: a folder with a whole model, or the base of the adapter; by default the base that the adapter names, if
            that lies in `weights/`.
        adapter: a PEFT adapter folder.
        task: only where none stands beside adapter or model (`llamalora.json`).
        dtype: of the weights; by default what the device computes in, as with `--precision auto`.

    Raises:
        InputError: neither model nor adapter, a base that is not there, a task that is lacking or given in vain, and
            what cannot be loaded.
    """
    if model is None and adapter is None:
        raise InputError("give a model, an adapter, or both")
    given = Path(adapter if adapter is not None else model or "")
    recorded = recorded_task(given)
    if recorded is not None and task is not None and task != recorded:
        raise InputError(f"{given}: {RECORD} says what it is asked, which is another task than the one given")
    base = find_base(given) if model is None else Path(model)
    tokenizer = _check_folders(base, adapter)
    if adapter is not None and (doubt := other_base(adapter, base)):
        warnings.warn(doubt, stacklevel=2)
    asked = recorded or task
    if asked is None:
        raise InputError(f"{given}: has no {RECORD} that says what it is asked; give the task that it was trained on")
    check_tags(asked, tokenizer, str(base))
    device = torch.device(device)
    dtype = dtype or DTYPES[choose_precision("auto", device)[0]]
    return _load_merged(base, adapter, dtype, device), tokenizer, asked


def _loading(model: str | Path, dtype: torch.dtype, device: torch.device) -> AbstractContextManager[None]:
    """Explains where the memory does not suffice for a model, whose adapter is merged layer by layer in fp32."""

    def planned() -> dict[str, int]:
        sizes = [parameter.numel() for parameter in skeleton(read_config(model)).parameters()]
        return {"weights": sum(sizes) * dtype.itemsize, "merging the largest of them": 8 * max(sizes)}

    return explained("loading and merging the model", planned, device)


def _training_sentences(run: Path, world: World) -> list[Sentence]:
    """What a run was trained on; nothing, with a word, if its corpus is not there any more, or is another one."""
    data = read_settings(run).data
    try:
        splits = find_splits(data)
        if read_fingerprints(run).get("data") not in (None, fingerprint(sorted(splits.values()))):
            raise CorpusError(f"{data}: is not the corpus that the run was trained on")
        return all_sentences(read_documents(splits["train"]))
    except (CorpusError, KeyError, OSError) as error:
        world.warn(
            f"{error}\nwithout the training sentences of {run} decoding is slower, and --constrain lets no mention "
            "begin or end within a word"
        )
        return []


def score_split(
    loaders: Iterable[Callable[[], System]],
    split: str,
    documents: Sequence[Document],
    asked: Sequence[Sentence],
    world: World,
    batch: int = 32,
    draft_tokens: int = DRAFT_TOKENS,
    order: Sequence[str] = (),
    quiet: bool = False,
    constrain: bool = False,
) -> tuple[dict, list[Answer], set[tuple[str, str]]]:
    """Decodes and scores sentences of a split.

    Args:
        loaders: each makes a system, one after the other, so that one model is in memory at a time; the
            answers of several are joined.
        documents, asked: from `select_sentences`.
        batch, draft_tokens, constrain: as in `answer_sentences`.
        order: labels by priority where several systems are joined; the corpus's if empty.

    Returns:
        The result for `eval-SPLIT.json`, which still lacks `scored_with`, the (joined) answers, and the (label, string)
        of the mentions in training.
    """
    by_label: dict[str, list[Answer]] = {}
    tasks, speeds, known = [], [], set()
    for load in loaders:
        system = load()
        if constrain:
            check_constraint(system.task, system.tokenizer)
        answers, speed = answer_sentences(
            system.model, system.tokenizer, system.task, asked, world, batch, draft_tokens, quiet, constrain,
            system.known,
        )  # fmt: skip
        by_label["+".join(system.task.labels)] = answers
        tasks.append(system.task)
        speeds.append(speed)
        known |= mention_strings(system.known)
        del system  # before the next is loaded
    labels = joint_labels(tasks)
    if len(by_label) > 1:
        answers = join_answers(by_label, order or labels)
    speed = replace(sum(speeds[1:], speeds[0]), sentences=len(asked))
    scores = assess(documents, answers, labels, known)
    return {"split": split, **scores, "speed": speed.to_dict()}, answers, known
