"""From settings to what a run works with: the task, the base model with what learns in it, the trained model."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from ..cli import UsageError
from ..corpus.documents import Document, Span, all_sentences, labels_of
from ..distributed.sharding import fill, shard
from ..distributed.world import World
from ..lora.adapter import load_adapter, save_adapter
from ..lora.inject import make_trainable
from ..mistakes import nearest
from ..model.checkpoint import load_model, model_files, save_model, skeleton
from ..model.config import LlamaConfig, read_config
from ..model.elementwise import compile_formulas, obstacle
from ..model.llama import Llama
from ..model.precision import DTYPES
from ..task.definition import Task, listed_labels
from ..task.prompt import draw_demonstrations, render_answer
from ..task.tokenizer import Tokenizer, TokenizerError, check_fit, load_tokenizer
from .folder import read_settings, trained_folder
from .settings import ResolvedSettings, Settings, check_constraint_format
from .shared import base_name, copy_tokenizer


def make_task(settings: Settings, splits: Mapping[str, list[Document]]) -> Task:
    """The task that the settings and the corpus define.

    Raises:
        UsageError: a label that the corpus does not have.
    """
    known = labels_of(document for documents in splits.values() for document in documents)
    if settings.labels == "all":
        labels, per_label = known, False
    else:
        labels = listed_labels(settings.labels, known)
        per_label = len(labels) == 1
        unknown = [label for label in labels if label not in known]
        if unknown or not labels:
            near = nearest(unknown[0], known) if unknown else ""
            raise UsageError(
                f"--labels: no mention has label {', '.join(unknown)!r}; the corpus has {', '.join(known)}{near}"
            )
        if len(set(labels)) < len(labels):
            raise UsageError(f"--labels {settings.labels}: name each label once")
    if not known:
        raise UsageError(f"--data {settings.data}: the corpus holds no mention, so there is no label to learn")
    try:
        task = Task(settings.format, labels, per_label, settings.instruction)
    except ValueError as error:
        raise UsageError(f"--labels: {error}") from None
    if settings.shots:
        sentences = all_sentences(splits.get("train", ()))
        if settings.shots > len(sentences):
            raise UsageError(f"--shots is {settings.shots}; the training split has {len(sentences)} sentences")
        shown = draw_demonstrations(task, sentences, settings.shots, settings.seed)
        task = replace(task, demonstrations=shown)
    return task


def read_base(settings: ResolvedSettings) -> tuple[LlamaConfig, Tokenizer]:
    """Shape and tokenizer of the base model.

    Raises:
        CheckpointError, TokenizerError: one of them cannot be used.
    """
    config, tokenizer = read_config(settings.model), load_tokenizer(settings.model)
    check_fit(tokenizer, config.vocab_size, settings.model)
    return config, tokenizer


def build_model(settings: ResolvedSettings, world: World, parallel: str, whole: int = 0) -> Llama:
    """The base model with what is to be trained in it.

    With LoRA the frozen weights are stored in the precision of the products; in full and partial
    fine-tuning all weights are fp32, so that the two differ in what learns alone, and cast by autocast, or
    under `fsdp` when they are gathered.

    Args:
        whole: with LoRA under `fsdp`, blocks whose frozen weights every process keeps.

    Raises:
        CheckpointError, InputError: as `load_model` and `make_trainable`.
    """
    products = DTYPES[settings.precision]
    dtype = products if settings.adapts else torch.float32
    if parallel == "ddp":
        model = make_trainable(load_model(settings.model, dtype, world.device), **settings.learning)
    else:
        model = skeleton(read_config(settings.model)).to(dtype)
        files = model_files(settings.model, model)
        shard(make_trainable(model, **settings.learning), world, products, whole)
        fill(model, files, world.device, settings.seed)
    if choose_compiled(settings.compile, world.device)[0]:
        compile_formulas(model)
    return model


def choose_compiled(requested: str, device: torch.device) -> tuple[bool, str]:
    """Whether formulas are compiled, and why: `auto` is on GPUs that can; a CPU it seldom spares more than it costs.

    Raises:
        UsageError: `on` where nothing can be compiled.
    """
    if requested == "off" or requested == "auto" and device.type == "cpu":
        return False, "requested" if requested == "off" else "on the CPU"
    reason = obstacle(device)
    if reason and requested == "on":
        raise UsageError(f"--compile on: {reason}")
    return reason is None, reason or ("requested" if requested == "on" else "on a GPU")


def save_trained(model: Llama, settings: ResolvedSettings, folder: Path) -> None:
    """What was trained, as a folder that other tools read: a PEFT adapter, or a whole model; and its tokenizer."""
    if settings.adapts:
        save_adapter(model, folder, base_model=base_name(settings.model))
    else:
        save_model(model, folder)
    copy_tokenizer(settings.model, folder)


def load_trained(run: Path, which: str, precision: str, device: torch.device) -> tuple[Llama, Tokenizer]:
    """The trained model of a run (LoRA not yet merged) and its tokenizer.

    Args:
        which: `best` (on the development split) or `last`.

    Raises:
        CheckpointError: as `trained_folder`.
    """
    settings = read_settings(run)
    folder = trained_folder(run, which)
    model = load_model(settings.model if settings.adapts else folder, DTYPES[precision], device)
    if settings.adapts:
        load_adapter(model, folder)
    return model, load_tokenizer(settings.model)


def check_tags(task: Task, tokenizer: Tokenizer, folder: str) -> None:
    """Refuses a tokenizer that has a part of an answer as a special token, which is no text, or loses one.

    Raises:
        TokenizerError: the token, or what an answer comes back as.
    """
    special = [piece for piece, token in tokenizer.vocabulary.items() if tokenizer.spellings[token] is None]
    for answer, written in _tokenised(task, tokenizer):
        if found := next((piece for piece in special if piece in answer), None):
            raise TokenizerError(
                f"{folder}: its tokenizer has {found!r} as a special token, which a model may write but which is no "
                "text; add it as an ordinary one"
            )
        if len("".join(written.split())) < len("".join(answer.split())):
            raise TokenizerError(f"{folder}: its tokenizer loses a part of {answer!r}, which comes back as {written!r}")


def _tokenised(task: Task, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    """An answer with a mention of each label, and what it is after the tokenizer."""
    for label in task.labels:
        answer = " " + render_answer(task, "x yz w", [Span(2, 4, label)])
        yield answer, tokenizer.spell(tokenizer.encode_continuation(answer)).decode(errors="replace")


def check_constraint(task: Task, tokenizer: Tokenizer) -> None:
    """Refuses --constrain also for a tokenizer with which no answer can be its sentence with tags."""
    check_constraint_format(task.format)
    for answer, written in _tokenised(task, tokenizer):
        if written != answer:
            raise UsageError(
                f"--constrain: the tokenizer changes what stands beside a tag ({answer!r} comes back as {written!r}), "
                "so no answer can be its sentence with tags"
            )
