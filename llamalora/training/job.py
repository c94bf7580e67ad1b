"""What a run is about, settled before the model is loaded: settings, task, examples, steps, how it fits the memory."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

from ..cli import UsageError, flag
from ..corpus.documents import CorpusError, Documents, Sentence, all_sentences
from ..corpus.read import read_splits
from ..distributed.world import World
from ..runs.folder import check_resumable, find_obstacle, read_settings
from ..runs.resolve import resolve
from ..runs.settings import ResolvedSettings, Settings
from ..runs.setup import check_tags, make_task, read_base
from ..task.definition import Task
from ..task.tokenizer import Tokenizer
from .batch import Example, encode_all, plan_epoch
from .placement import Placement, place

FEWEST_STEPS = 400  # by default a small corpus is passed over more often than 3 times, up to this many steps
MOST_EPOCHS = 10**4  # all of them are planned at once


@dataclass(frozen=True)
class Job:
    """All that is settled before the model is loaded.

    Attributes:
        why: the reasons for model, data and precision.
        splits: the documents of train, dev and test, as far as the corpus has them.
        sentences: all of the training split, from which drafts learn.
        examples: of the sentences that are trained on.
        skipped: how many sentences were left out as longer than the context.
        steps: of the whole run, each with its epoch and the indices of its examples.
    """

    settings: ResolvedSettings
    why: dict[str, str]
    splits: dict[str, Documents]
    task: Task
    tokenizer: Tokenizer
    sentences: list[Sentence]
    examples: list[Example]
    skipped: int
    steps: list[tuple[int, list[int]]]
    placement: Placement

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(self.settings.out)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(example) for example in self.examples]

    def ends_epoch(self, done: int) -> bool:
        """Whether an epoch is over after so many steps."""
        return done == len(self.steps) or self.steps[done][0] != self.steps[done - 1][0]

    def is_evaluated(self, done: int) -> bool:
        """Whether the model is evaluated after so many steps."""
        every = self.settings.eval_every
        regular = done % every == 0 if every else self.ends_epoch(done)
        return "dev" in self.splits and (regular or done == len(self.steps))

    def ends_early(self, stale: int) -> bool:
        """Whether so many evaluations without a better F1 are enough."""
        return self.settings.patience is not None and stale >= self.settings.patience


def prepare(settings: Settings, world: World, resume: bool) -> Job:
    """Settles settings, task, examples, steps and how the run fits the memory.

    Raises:
        InputError: a setting that cannot be, or that, where a run is resumed, differs from the run's.
    """
    resolved, why = resolve(settings, world.device, world.size)
    resolved = replace(resolved, out=world.from_main(resolved.out))  # it may hold the time of day
    if resume:
        check_resumable(Path(resolved.out), resolved)
        stored = read_settings(Path(resolved.out))
        why |= {name: "as the run was started" for name in why if getattr(resolved, name) == getattr(stored, name)}
    elif obstacle := world.from_main(find_obstacle(Path(resolved.out))):
        raise UsageError(obstacle)
    splits = read_splits(resolved.data)
    if "train" not in splits:
        raise CorpusError(f"{resolved.data}: has no training split")
    unused = [name for name in ("eval_every", "eval_limit", "patience") if getattr(resolved, name) is not None]
    if unused and "dev" not in splits:
        raise UsageError(f"{flag(unused[0])}: {resolved.data} has no development split to evaluate on")
    task = make_task(resolved, splits)
    config, tokenizer = read_base(resolved)
    check_tags(task, tokenizer, resolved.model)
    sentences = all_sentences(splits["train"])
    examples, skipped = encode_all(
        task, tokenizer, sentences[: resolved.limit_train], config.max_position_embeddings, resolved.overlong
    )
    if not examples:
        raise CorpusError(f"{resolved.data}: the training split holds no sentence that can be learnt from")
    lengths = [len(example) for example in examples]
    sizes, capacity = lengths, resolved.batch_tokens
    if resolved.batch_sentences:
        sizes, capacity = [1] * len(examples), resolved.batch_sentences
    steps = plan_steps(sizes, capacity, resolved)
    if resolved.epochs is None:
        resolved = replace(resolved, epochs=steps[-1][0] + 1)
    placement = place(resolved, config, lengths, world)
    job = Job(resolved, why, splits, task, tokenizer, sentences, examples, skipped, steps, placement)
    if resolved.patience is not None:
        evaluations = sum(map(job.is_evaluated, range(1, len(steps) + 1)))
        if evaluations < resolved.patience + 2:  # the first is the best so far, and after the last nothing is left
            raise UsageError(
                f"--patience {resolved.patience}: cannot end the run early, which is evaluated {evaluations} times; "
                "--eval-every evaluates more often"
            )
    return job


def plan_steps(sizes: Sequence[int], capacity: int, settings: ResolvedSettings) -> list[tuple[int, list[int]]]:
    """The steps of a run, each with its epoch and the indices of its examples, as `plan_epoch` makes them.

    Raises:
        UsageError: more steps than can be planned.
    """
    epochs, most = settings.epochs, settings.max_steps
    if epochs is None and most is not None:
        epochs = MOST_EPOCHS
    elif epochs is None:
        per_epoch = len(plan_epoch(sizes, capacity, settings.seed, 0))
        epochs = default_epochs(per_epoch, FEWEST_STEPS if settings.limit_train is None else 0)
    every = ((epoch, step) for epoch in range(epochs) for step in plan_epoch(sizes, capacity, settings.seed, epoch))
    steps = list(islice(every, most))
    if settings.epochs is None and most is not None and len(steps) < most:
        raise UsageError(f"--max-steps {most}: would take more than {MOST_EPOCHS:,} passes over the training split")
    return steps


def default_epochs(per_epoch: int, fewest: int = FEWEST_STEPS) -> int:
    """Passes over a training split that takes so many steps."""
    return max(3, math.ceil(fewest / per_epoch))
