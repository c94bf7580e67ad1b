"""The training loop, from top to bottom: what `train` runs, and every cell of the paper's tables."""

import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote
from typing import NoReturn

import torch
from torch import Tensor

from ..cli import Interrupt, called
from ..distributed.sharding import is_spread, merged
from ..distributed.world import World
from ..evaluation.answer import answer_sentences
from ..evaluation.answered import Answer, select_sentences
from ..evaluation.card import model_card
from ..evaluation.own import own_scoring
from ..evaluation.result import assess, format_legend, format_report, mention_strings, read_result, write_result
from ..lora.inject import cast_factors, count_parameters
from ..model.llama import Llama
from ..model.precision import DTYPES, autocast
from ..runs.folder import describe_run, lock_folder, start_folder
from ..runs.settings import ResolvedSettings, Settings
from ..runs.setup import build_model, save_trained
from ..runs.shared import describe_model, write_record
from ..runs.state import CARD, clean_partial, load_checkpoint, save_checkpoint, write_atomically
from .batch import MicroBatch, deal, show
from .job import Job, prepare
from .memory import explained
from .step import DivergedError, MovementCheck, Optimizer, backward, learning_rate
from .steplog import StepLog, announce


def train(settings: Settings, world: World, resume: bool = False) -> dict | None:
    """Trains, evaluates and saves as the settings say.

    Returns:
        The scores on the development split of the best model; None without such a split.

    Raises:
        DivergedError: gradients that are not finite, in many steps in a row or in all.
    """
    job = prepare(settings, world, resume)
    settings, folder, examples, steps = job.settings, job.folder, job.examples, job.steps
    with explained(job.placement.plan, world.device):
        model = build_model(settings, world, job.placement.parallel, job.placement.whole)
    if not resume:
        start_folder(folder, describe_run(settings, job.task, model), world)
    lock = lock_folder(folder, world)  # noqa: F841  (held until the end)
    record = describe_model(settings, job.task, len(examples), count_parameters(model)["trainable"])
    announce(job, model, world)
    world.say(f"first example, ⟦supervised part⟧ marked:\n{show(examples[0], job.tokenizer)}\n")

    optimizer = Optimizer(
        model, settings.precision, world.device, settings.weight_decay, settings.clip, settings.loraplus
    )
    progress = load_progress(folder, optimizer, world) if resume else Progress()
    moved = MovementCheck(optimizer.parameters) if progress.updates == 0 else None
    warmup = round(settings.warmup * len(steps))

    def leave() -> NoReturn:
        """Ends all processes after a signal to one of them, the latest step saved."""
        number = max(world.gather(interrupt.signal))
        save_progress(folder, optimizer, progress, settings.keep, world)
        save(model, settings, folder, "last", world, record)
        again = f"{called('train')} --resume {quote(str(folder))}"
        world.say(f"stopped by a signal after step {progress.cursor}; go on with: {again}", result=True)
        sys.exit(128 + number)

    model.train()
    with (
        explained(job.placement.plan, world.device),
        Interrupt() as interrupt,
        StepLog(folder, world, len(steps), progress.cursor, progress.evaluated, progress.best) as log,
    ):
        while True:
            if progress.evaluated < progress.cursor and job.is_evaluated(progress.cursor):
                scored = evaluate_now(job, model, world, stop=lambda: interrupt.signal)
                if scored is None:
                    leave()
                result, answers = scored
                log.evaluation(progress.cursor, result)
                progress.stale += 1
                if result["micro"]["f1"] > progress.best:
                    progress.best, progress.stale = result["micro"]["f1"], 0
                    save(model, settings, folder, "best", world, record, [result])
                    if world.is_main:
                        write_result(result | own_scoring(folder, "dev"), answers, folder)
                progress.evaluated = progress.cursor
                save_progress(folder, optimizer, progress, settings.keep, world)
            if progress.cursor == len(steps):
                break
            if job.ends_early(progress.stale):
                save(model, settings, folder, "last", world, record)
                world.say(
                    f"ended early after step {progress.cursor}: no better dev F1 than {100 * progress.best:.2f} "
                    f"in {progress.stale} evaluations"
                )
                break

            epoch, step = steps[progress.cursor]
            started = time.perf_counter()
            torch.manual_seed(dropout_seed(settings.seed, progress.cursor, world.rank))
            supervised = sum(examples[index].supervised for index in step)
            lr = learning_rate(settings.lr, progress.updates, len(steps), warmup, settings.schedule)
            loss: float | Tensor = 0.0
            computed = 0.0
            stand_in = min(step, key=job.lengths.__getitem__)  # without a share: under fsdp the others need its passes
            shares = deal(step, job.lengths, world.size, job.placement.micro_tokens)[world.rank]
            if not optimizer.sharded:
                shares = [indices for indices in shares if indices]
            with cast_factors(model, DTYPES[settings.precision]):
                for number, indices in enumerate(shares, start=1):
                    batch = MicroBatch.of([examples[index] for index in indices or [stand_in]], world.device)
                    counted, recompute = supervised if indices else math.inf, job.placement.recompute
                    sums = optimizer.sums(world) if number == len(shares) else None
                    computed += batch.ids.numel()
                    loss += backward(model, batch, counted, optimizer.scaler, settings.precision, recompute, sums)
            update = optimizer.step(lr, world)
            loss, computed, stop = world.sum([loss, computed, interrupt.signal])

            progress.cursor += 1
            progress.updates += not update.skipped
            if moved and progress.updates == moved.UPDATES:
                moved(world)
                moved = None
            seconds = time.perf_counter() - started
            log.step(progress.cursor, epoch, loss, lr, update, [examples[index] for index in step], computed, seconds)

            if progress.cursor == len(steps) and not progress.updates:
                raise DivergedError(
                    f"none of the {len(steps)} steps changed a parameter, for their gradients were not finite; take "
                    "more steps (fp16 may skip the first few), or look for the cause with --precision fp32"
                )
            regular = settings.save_every and progress.cursor % settings.save_every == 0
            if stop:
                leave()
            if regular or job.ends_epoch(progress.cursor):
                save_progress(folder, optimizer, progress, settings.keep, world)
                save(model, settings, folder, "last", world, record)

    if "dev" not in job.splits:
        save(model, settings, folder, "best", world, record)
        world.say(f"no development split; what was trained is in {folder / 'best'}", result=True)
        return None
    result = world.from_main(read_result(folder, "dev") if world.is_main else {})
    report = format_report(result)
    world.say(f"\ndevelopment split, best of {folder}:\n{report}", result=True)
    world.say(f"\n{format_legend(result, report)}")
    world.say(f"\nscore the test split with: {called('eval')} --run {quote(str(folder))} --split test")
    return result


def dropout_seed(seed: int, cursor: int, rank: int) -> int:
    """The seed of a step's dropout: different for each step and process, the same in every version of Python."""
    return random.Random(f"{seed}/{cursor}/{rank}").getrandbits(63)


def evaluate_now(job: Job, model: Llama, world: World, stop: Callable[[], int]) -> tuple[dict, list[Answer]] | None:
    """Scores and answers on the development split with the updates merged; afterwards the model is bitwise as
    before. None if a signal to one of the processes (`stop`) cut it short."""
    settings = job.settings
    documents, asked = select_sentences(job.splits["dev"], settings.eval_limit)
    model.eval()
    with merged(model, world), autocast(settings.precision, world.device):
        answers, speed = answer_sentences(
            model, job.tokenizer, job.task, asked, world, settings.eval_batch, known=job.sentences, stop=stop
        )
    model.train()
    if any(world.sum([stop()])):
        return None
    scores = assess(documents, answers, job.task.labels, mention_strings(job.sentences[: settings.limit_train]))
    return {"split": "dev", **scores, "speed": speed.to_dict()}, answers


@dataclass
class Progress:
    """How far a run has come."""

    cursor: int = 0  # steps of the plan that are done
    updates: int = 0  # of the parameters; a skipped step makes none
    evaluated: int = 0  # the step after which the model was last evaluated
    best: float = -1.0  # F1 on the development split
    stale: int = 0  # evaluations since then


def save_progress(folder: Path, optimizer: Optimizer, progress: Progress, keep: int, world: World) -> None:
    if world.is_main or optimizer.sharded:
        tensors, state = optimizer.state()
        state |= {"progress": asdict(progress)}
        save_checkpoint(folder, progress.cursor, tensors, state, keep, writes=world.is_main)
    world.barrier()


def load_progress(folder: Path, optimizer: Optimizer, world: World) -> Progress:
    if world.is_main:
        clean_partial(folder)
    world.barrier()
    checkpoint = load_checkpoint(folder, world.warn)
    if checkpoint is None:
        world.say(f"{folder} has no checkpoint yet: starting from the beginning")
        return Progress()
    tensors, state = checkpoint
    optimizer.load_state(tensors, state)
    progress = Progress(**state["progress"])
    world.say(f"resuming after step {progress.cursor}")
    return progress


def save(
    model: Llama,
    settings: ResolvedSettings,
    folder: Path,
    name: str,
    world: World,
    record: dict | None,
    results: Sequence[dict] = (),
) -> None:
    """Keeps the trained parameters as `best/` or `last/`.

    Args:
        record: what others need to know to use them (see `describe_model`), which is kept with them, as is their card.
        results: scores of just these parameters.
    """

    def fill(target: Path) -> None:
        save_trained(model, settings, target)
        if record is not None:
            write_record(record, target)
            (target / CARD).write_text(model_card(record, results), encoding="utf-8")

    if world.is_main or is_spread(model):
        write_atomically(folder / name, fill, writes=world.is_main)
    world.barrier()
