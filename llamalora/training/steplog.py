"""What a run reports: its first lines, then how far it is for a person, and a JSON line for each step for a program."""

import json
import math
import resource
from pathlib import Path

import torch

from ..corpus.documents import Documents, told, unanswerable
from ..distributed.world import World
from ..files import naming, replace_file
from ..lora.inject import count_parameters
from ..lora.kinds import what_learns
from ..model.attention import attention_kernel
from ..model.llama import Llama
from ..model.precision import DTYPES
from ..progress import Bar
from ..runs.setup import choose_compiled
from ..task.definition import Task
from ..text_table import wrapped
from .batch import Example
from .job import Job
from .step import Update
from .timetable import expected

FORMULAS = "norms, rotary embedding, SwiGLU, cross entropy"


def announce(job: Job, model: Llama, world: World) -> None:
    """The first lines of a run: which model, data and precision are in use, and why."""
    settings, why, examples, task = job.settings, job.why, job.examples, job.task
    counts = count_parameters(model)
    share = 100 * counts["trainable"] / counts["base"]
    on = f"{world.size} x {world.device.type}"
    if world.device.type == "cuda":
        kernel = attention_kernel(model.config.head_dim, DTYPES[settings.precision], world.device)
        on += f", {kernel} attention" if kernel != "rectangles" else ", attention of padded rectangles"
    compiles, why_compiled = choose_compiled(settings.compile, world.device)
    compiled = f"\ncompiled   {FORMULAS if compiles else 'nothing'} ({why_compiled})"
    if compiles:
        compiled += "; the first step takes the time for it"
    time = expected(job, model, world)
    trained = what_learns(settings.method, settings.targets, settings.rank, settings.dora)
    if not settings.adapts and "targets" not in settings.idle and model.tied:
        trained += " (embed and head are one matrix)"
    step = f"{settings.batch_sentences} sentences" if settings.batch_sentences else f"{settings.batch_tokens} tokens"
    epochs = job.steps[-1][0] + 1
    said = (
        f"model      {settings.model} ({why['model']}), {counts['base']:,} parameters\n"
        f"training   {trained}: {counts['trainable']:,} parameters ({share:.2f} %)\n"
        f"data       {settings.data} ({why['data']}), "
        + ", ".join(f"{len(documents)} {name} documents" for name, documents in job.splits.items())
        + "".join(f"\n           {name}: {note}" for name, those in job.splits.items() for note in _notes(those, task))
        + f"\nexamples   {len(examples)} sentences, {sum(map(len, examples)):,} tokens"
        + (f", {job.skipped} skipped as longer than the context" if job.skipped else "")
        + f"\ntask       {settings.format} of {', '.join(task.labels)}"
        + (" (one-label format)" if task.per_label else "")
        + f"\nprecision  {settings.precision} ({why['precision']}) on {on}"
        + (compiled if compiles or world.device.type == "cuda" else "")
        + f"\nparallel   {job.placement}\n"
        f"schedule   {epochs} epoch{'s' * (epochs > 1)}, {len(job.steps)} steps of up to {step}, "
        f"peak learning rate {settings.lr:g}\n"
        + (f"time       {time}\n" if time else "")
        + f"output     {settings.out}\n"
    )
    world.say(wrapped(said, indent=11))


def _notes(documents: Documents, task: Task) -> list[str]:
    """What of a split is not used as it stands in its file."""
    out = unanswerable(documents, task.labels)
    no_answer = {
        "mentions that overlap a longer one, in no answer": out["overlapping"],
        "mentions cut by a sentence end, in no answer": out["cut_by_sentence_end"],
    }
    return told(documents.notes | {what: count for what, count in no_answer.items() if count})


class StepLog:
    """A bar or a line now and then for a person, one JSON line a step for programs (metrics.jsonl).

    Args:
        total, done: steps of the run, and those that were done before.
        evaluated: the step of the last evaluation before.
        best: F1 of the best evaluation so far; negative before the first one.
    """

    def __init__(self, folder: Path, world: World, total: int, done: int, evaluated: int, best: float = -1.0):
        self.world = world
        if not world.is_main:
            return
        metrics, self.evaluations = folder / "metrics.jsonl", folder / "evaluations.jsonl"
        for path, last in ((metrics, done), (self.evaluations, evaluated)):
            lines = path.read_text(errors="replace").splitlines() if path.exists() else []
            kept = [line for line in lines if _step_of(line) <= last]  # later ones are done again
            replace_file(path, "".join(line + "\n" for line in kept))
        self.path, self.file = metrics, metrics.open("a", buffering=1)
        self.bar = Bar("training", total, "step", done, hidden=world.terse, leave=not world.quiet)
        self.best = best

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *exception) -> None:
        if self.world.is_main:
            self.bar.close()
            with naming(self.path):
                self.file.close()

    def step(
        self,
        step: int,
        epoch: int,
        loss: float,
        lr: float,
        update: Update,
        examples: list[Example],
        computed: float,
        seconds: float,
    ) -> None:
        if not self.world.is_main:
            return
        tokens = sum(map(len, examples))
        record = {
            "step": step,
            "epoch": epoch,
            "loss": _finite(loss),
            "lr": lr,
            "grad_norm": _finite(update.grad_norm),
            "skipped": update.skipped,
            "loss_scale": update.scale,
            "tokens": tokens,
            "supervised_tokens": sum(example.supervised for example in examples),
            "padding": 1 - tokens / computed,  # of the tokens that went through the model
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            "peak_memory_bytes": peak_memory(self.world.device),
        }
        with naming(self.path):
            self.file.write(json.dumps(record) + "\n")
        scored = f"best dev F1 {100 * self.best:.2f}, " if self.best >= 0 else ""
        self.bar.update(note=f"loss {loss:.4f}, {scored}{tokens / seconds:.0f} tokens/s")

    def evaluation(self, step: int, result: dict) -> None:
        if self.world.is_main:
            record = {"step": step} | {key: result[key] for key in ("micro", "types", "health", "speed")}
            with naming(self.evaluations), self.evaluations.open("a") as file:
                file.write(json.dumps(record) + "\n")
            self.best = max(self.best, result["micro"]["f1"])
            with self.bar.aside():
                self.world.say(f"step {step}: dev F1 {100 * result['micro']['f1']:.2f}")


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def _step_of(line: str) -> float:
    """The step of a JSON line; infinity for one that a crash cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
