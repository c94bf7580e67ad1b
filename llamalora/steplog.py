"""What a run reports at each step: one line for a person (tqdm), one JSON line for a program."""

import json
import math
import resource
from pathlib import Path

import torch
from tqdm import tqdm

from .batch import Example
from .distributed import World
from .files import naming, replace_file


class StepLog:
    """One line for a person (tqdm), one JSON line a step for programs (metrics.jsonl)."""

    def __init__(self, folder: Path, world: World, total: int, done: int):
        self.world = world
        if not world.is_main:
            return
        metrics, self.evaluations = folder / "metrics.jsonl", folder / "evaluations.jsonl"
        for path in (metrics, self.evaluations):
            lines = path.read_text(errors="replace").splitlines() if path.exists() else []
            kept = [line for line in lines if _step_of(line) <= done]  # later ones are done again
            replace_file(path, "".join(line + "\n" for line in kept))
        self.path, self.file = metrics, metrics.open("a", buffering=1)
        self.bar = tqdm(total=total, initial=done, desc="training", unit="step", leave=not world.quiet)

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
        update,
        examples: list[Example],
        computed: float,
        seconds: float,
    ):
        if not self.world.is_main:
            return
        tokens = sum(map(len, examples))
        record = {
            "step": step,
            "epoch": epoch,
            "loss": loss,
            "lr": lr,
            "grad_norm": update.grad_norm if math.isfinite(update.grad_norm) else None,
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
        self.bar.update()
        self.bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.2e}, {tokens / seconds:.0f} tokens/s")

    def evaluation(self, step: int, result: dict) -> None:
        if self.world.is_main:
            record = {"step": step} | {key: result[key] for key in ("micro", "types", "health", "speed")}
            with naming(self.evaluations), self.evaluations.open("a") as file:
                file.write(json.dumps(record) + "\n")
            with self.bar.external_write_mode():
                self.world.say(f"step {step}: dev F1 {100 * result['micro']['f1']:.2f}")


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
