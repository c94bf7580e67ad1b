"""The training loop, from top to bottom: what `train.py` runs, and every cell of the paper's tables."""

import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch

from . import corpus, evaluate, run, runstate
from .attention import attention_kernel
from .batch import MicroBatch, deal, encode_all, plan_epoch, show
from .cli import Interrupt, UsageError
from .distributed import World
from .lora import count_parameters
from .memory import explained
from .placement import place
from .sharding import is_spread, merged
from .steplog import StepLog
from .training import DTYPES, MovementCheck, Optimizer, autocast, backward, learning_rate

FEWEST_STEPS = 400  # by default a small corpus is passed over more often than 3 times, up to this many steps


def train(settings: run.Settings, world: World, resume: bool = False) -> dict | None:
    """Trains, evaluates and saves as the settings say.

    Returns:
        The scores on the development split of the best model; None without such a split.
    """
    resolved = run.resolve(settings, world.device)
    settings = replace(resolved.settings, out=world.from_main(resolved.settings.out))  # it may hold the time of day
    folder = Path(settings.out)
    if resume:
        run.check_resumable(folder, settings)
    splits = {name: corpus.read(path) for name, path in corpus.find_splits(settings.data).items()}
    if "train" not in splits:
        raise UsageError(f"--data {settings.data}: has no training split")
    task = run.make_task(settings, splits)
    config, tokenizer = run.read_base(settings)
    sentences = corpus.all_sentences(splits["train"])
    examples, skipped = encode_all(
        task, tokenizer, sentences[: settings.limit_train], config.max_position_embeddings, settings.overlong
    )
    if not examples:
        raise UsageError(f"--data {settings.data}: the training split holds no sentence that can be learnt from")
    lengths = [len(example) for example in examples]
    sizes, batch = lengths, settings.batch_tokens
    if settings.batch_sentences:
        sizes, batch = [1] * len(examples), settings.batch_sentences
    if settings.epochs is None:
        per_epoch = len(plan_epoch(sizes, batch, settings.seed, 0))
        settings = replace(settings, epochs=max(3, math.ceil(FEWEST_STEPS / per_epoch)))
    plan = [
        (epoch, step) for epoch in range(settings.epochs) for step in plan_epoch(sizes, batch, settings.seed, epoch)
    ]

    placement = place(settings, config, lengths, world)
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)  # of an earlier run in this process
    with explained(placement.plan, world.device):
        model = run.build_model(settings, world, placement.parallel)
    if not resume:
        run.start_folder(folder, run.describe(settings, task, model), world)
    lock = run.lock(folder, world)  # noqa: F841  (held until the end)
    announce(world, resolved, settings, placement, task, model, splits, examples, skipped, len(plan))
    world.say(f"first example, ⟦supervised part⟧ marked:\n{show(examples[0], tokenizer)}\n")

    optimizer = Optimizer(
        model, settings.precision, world.device, settings.weight_decay, settings.clip, settings.loraplus
    )
    progress = Progress()
    if resume:
        progress = load_progress(folder, optimizer, world)
    moved = MovementCheck(optimizer.parameters) if progress.updates == 0 else None
    warmup = round(settings.warmup * len(plan))

    def is_last_of_epoch(cursor: int) -> bool:
        return cursor == len(plan) or plan[cursor][0] != plan[cursor - 1][0]

    def is_evaluated(cursor: int) -> bool:
        regular = cursor % settings.eval_every == 0 if settings.eval_every else is_last_of_epoch(cursor)
        return "dev" in splits and (regular or cursor == len(plan))

    def leave() -> NoReturn:
        """Ends all processes after a signal to one of them, the latest step saved."""
        number = max(world.gather(interrupt.signal))
        save_progress(folder, optimizer, progress, settings.keep, world)
        save(model, settings, folder, "last", world)
        world.say(f"stopped by a signal after step {progress.cursor}; continue with --resume {folder}")
        sys.exit(128 + number)

    model.train()
    with (
        explained(placement.plan, world.device),
        Interrupt() as interrupt,
        StepLog(folder, world, len(plan), progress.cursor) as log,
    ):
        while True:
            if progress.evaluated < progress.cursor and is_evaluated(progress.cursor):
                scored = evaluate_now(model, tokenizer, task, splits["dev"], sentences, settings, world, interrupt)
                if scored is None:
                    leave()
                result, answers = scored
                log.evaluation(progress.cursor, result)
                if result["micro"]["f1"] > progress.best:
                    progress.best = result["micro"]["f1"]
                    save(model, settings, folder, "best", world)
                    if world.is_main:
                        evaluate.write(result, answers, folder)
                progress.evaluated = progress.cursor
                save_progress(folder, optimizer, progress, settings.keep, world)
            if progress.cursor == len(plan):
                break

            epoch, step = plan[progress.cursor]
            started = time.perf_counter()
            torch.manual_seed(hash((settings.seed, progress.cursor, world.rank)))  # of dropout
            supervised = sum(examples[index].supervised for index in step)
            lr = learning_rate(settings.lr, progress.updates, len(plan), warmup, settings.schedule)
            loss, computed = 0.0, 0
            stand_in = [min(step, key=lengths.__getitem__)]  # without a share: under fsdp the others need its passes
            for indices in deal(step, lengths, world.size, placement.micro_tokens)[world.rank]:
                if not indices and not optimizer.sharded:
                    continue
                batch = MicroBatch.of([examples[index] for index in indices or stand_in], world.device)
                counted = supervised if indices else math.inf
                computed += batch.ids.numel()
                loss += backward(model, batch, counted, optimizer.scaler, settings.precision, placement.recompute)
            update = optimizer.step(lr, world)
            loss, computed, stop = world.sum([loss, computed, interrupt.signal])

            progress.cursor += 1
            progress.updates += not update.skipped
            if moved and progress.updates == moved.UPDATES:
                moved(world)
                moved = None
            seconds = time.perf_counter() - started
            log.step(progress.cursor, epoch, loss, lr, update, [examples[index] for index in step], computed, seconds)

            regular = settings.save_every and progress.cursor % settings.save_every == 0
            if stop:
                leave()
            if regular or is_last_of_epoch(progress.cursor):
                save_progress(folder, optimizer, progress, settings.keep, world)
                save(model, settings, folder, "last", world)

    if "dev" not in splits:
        save(model, settings, folder, "best", world)
        world.say(f"no development split; the adapter is in {folder / 'best'}")
        return None
    result = world.from_main(evaluate.read_result(folder, "dev") if world.is_main else None)
    world.say(f"\ndevelopment split, best of {folder}:\n{evaluate.format_report(result)}")
    world.say(f"\nscore the test split with: python eval.py --run {folder} --split test")
    return result


def announce(world, resolved, settings, placement, task, model, splits, examples, skipped, steps) -> None:
    """The first lines of a run: which model, data and precision are in use, and why."""
    counts = count_parameters(model)
    share = 100 * counts["trainable"] / counts["base"]
    on = f"{world.size} x {world.device.type}"
    if world.device.type == "cuda":
        heads = model.config.num_attention_heads, model.config.head_dim
        on += f", {attention_kernel(*heads, DTYPES[settings.precision], world.device)}"
    trained = {
        "lora": f"{'DoRA' if settings.dora else 'LoRA'} on {settings.targets}, rank {settings.rank}",
        "partial": f"the weights of {settings.targets}",
        "full": "every parameter",
    }[settings.method]
    if settings.method == "partial" and model.lm_head.weight is model.model.embed_tokens.weight:
        trained += " (embed and head are one matrix)"
    step = f"{settings.batch_sentences} sentences" if settings.batch_sentences else f"{settings.batch_tokens} tokens"
    world.say(
        f"model      {settings.model} ({resolved.why['model']}), {counts['base']:,} parameters\n"
        f"training   {trained}: {counts['trainable']:,} parameters ({share:.2f} %)\n"
        f"data       {settings.data} ({resolved.why['data']}), "
        + ", ".join(f"{len(documents)} {name} documents" for name, documents in splits.items())
        + f"\nexamples   {len(examples)} sentences, {sum(map(len, examples)):,} tokens"
        + (f", {skipped} skipped as longer than the context" if skipped else "")
        + f"\ntask       {settings.format} of {', '.join(task.labels)}"
        + (" (one-label format)" if task.per_label else "")
        + f"\nprecision  {settings.precision} ({resolved.why['precision']}) on {on}\n"
        f"parallel   {placement}\n"
        f"schedule   {settings.epochs} epochs, {steps} steps of up to {step}, "
        f"peak learning rate {settings.lr:g}\n"
        f"output     {settings.out}\n"
    )


def evaluate_now(
    model, tokenizer, task, documents, known, settings, world, interrupt
) -> tuple[dict, list[evaluate.Answer]] | None:
    """Scores and answers on the development split with the updates merged; afterwards the model is bitwise as
    before. None if a signal to one of the processes cut it short."""
    documents, asked = evaluate.select(documents, settings.eval_limit)
    model.eval()
    with merged(model), autocast(settings.precision, world.device):
        answers, speed = evaluate.answer(
            model, tokenizer, task, asked, world, settings.eval_batch, known=known, stop=lambda: interrupt.signal
        )
    model.train()
    if any(world.sum([interrupt.signal])):
        return None
    scores = evaluate.assess(documents, answers, task.labels)
    return {"split": "dev", **scores, "speed": speed.to_dict(), "precision": settings.precision}, answers


@dataclass
class Progress:
    """How far a run has come."""

    cursor: int = 0  # steps of the plan that are done
    updates: int = 0  # of the parameters; a skipped step makes none
    evaluated: int = 0  # the step after which the model was last evaluated
    best: float = -1.0  # F1 on the development split


def save_progress(folder: Path, optimizer: Optimizer, progress: Progress, keep: int, world: World) -> None:
    if world.is_main or optimizer.sharded:
        tensors, state = optimizer.state()
        state |= {"progress": asdict(progress)}
        runstate.save_checkpoint(folder, progress.cursor, tensors, state, keep, keeps=world.is_main)
    world.barrier()


def load_progress(folder: Path, optimizer: Optimizer, world: World) -> Progress:
    if world.is_main:
        runstate.clean_partial(folder)
    world.barrier()
    checkpoint = runstate.load_checkpoint(folder, world.say)
    if checkpoint is None:
        world.say(f"{folder} has no checkpoint yet: starting from the beginning")
        return Progress()
    tensors, state = checkpoint
    optimizer.load_state(tensors, state)
    progress = Progress(**state["progress"])
    world.say(f"resuming after step {progress.cursor}")
    return progress


def save(model, settings, folder: Path, name: str, world: World) -> None:
    """Keeps the trained parameters as `best/` or `last/`."""
    if world.is_main or is_spread(model):
        runstate.write_atomically(
            folder / name, lambda target: run.save_trained(model, settings, target), keeps=world.is_main
        )
    world.barrier()
