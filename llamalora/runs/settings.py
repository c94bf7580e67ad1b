"""The settings of a run. Without torch, for the command line; `resolve.py` chooses what they leave open."""

import math
from dataclasses import dataclass, fields

from ..cli import UsageError, check_least, flag, option
from ..lora.kinds import KINDS, METHODS, parse_targets
from ..model.config import PRECISIONS
from ..task.definition import COPYING, FORMATS


@dataclass(frozen=True)
class Settings:
    """The flags of `train`, in their groups. `resolve` chooses what is left open (`None`)."""

    model: str | None = option(
        None, "Hugging Face folder (default: weights/llama-2-7b if there, else the built-in checkpoint)", group="data"
    )
    data: str | None = option(None, "corpus folder (default: data/bc5cdr if there, else the built-in sample)")
    limit_train: int | None = option(None, "use only the first N training sentences")
    overlong: str = option("error", "what to do about an example longer than the context", ("error", "skip"))

    format: str = option("tagging", "what the model answers", FORMATS, group="task")
    labels: str = option("all", "all, one label (the per-label formats), or a comma list in the order of the answer")
    instruction: bool = option(False, "put the instruction of figure 2 before the input")
    shots: int = option(0, "demonstrations from the training split before the input")

    method: str = option(
        "lora", "train updates of the target layers, their own weights, or every parameter", (*METHODS,), group="LoRA"
    )
    targets: str = option("all", f"kinds of layer that are trained: all, or a comma list of {','.join(KINDS)}")
    rank: int = option(8, "rank of the updates")
    alpha: float | None = option(None, "updates are scaled by alpha / rank (default: rank, the paper's equation 2)")
    rslora: bool = option(False, "scale by alpha / sqrt(rank)")
    dora: bool = option(False, "learn the length of each row of the weights apart from its direction")
    loraplus: float = option(1.0, "learning rate of every B over that of A, as in LoRA+ (not on the embedding)")
    dropout: float = option(0.0, "on the input of the updates")

    epochs: int | None = option(
        None,
        "passes over the training split (default: 3, or as many as give 400 steps, but 3 with --limit-train)",
        group="optimisation",
    )
    max_steps: int | None = option(
        None,
        "end after N steps, for which the learning rate is planned: after --epochs if that is sooner, and without "
        "--epochs after as many passes as it takes",
    )
    lr: float | None = option(None, "peak learning rate (default: 1.2 / hidden size for LoRA, else a tenth of it)")
    schedule: str = option("cosine", "of the learning rate after the warm-up", ("cosine", "constant"))
    warmup: float = option(0.06, "share of the steps with a linearly rising learning rate")
    weight_decay: float = option(0.0, "of AdamW")
    clip: float = option(1.0, "largest norm of the gradient; 0 leaves it alone")
    batch_tokens: int | None = option(
        None, "tokens of an optimizer step, over all processes (default: 1,024; on GPUs 2,048 for each, up to 8,192)"
    )
    batch_sentences: int | None = option(None, "sentences of an optimizer step, however many tokens they have")
    seed: int = option(0, "of initial values, order of examples, demonstrations and dropout")

    precision: str = option("auto", "of the matrix products", ("auto", *PRECISIONS), group="memory and machine")
    parallel: str = option(
        "auto", "ddp: the model in each process; fsdp: one over all; auto: as memory allows", ("auto", "ddp", "fsdp")
    )
    micro_tokens: int | str = option("auto", "tokens of a forward pass, on one process; auto: as memory allows")
    activation_checkpointing: int | str = option(
        "auto", "recompute every Nth block in the backward pass (1: all, 0: none); auto: as memory allows", bare=1
    )
    compile: str = option(
        "auto", "compile norms, rotary embedding, SwiGLU and cross entropy; auto: on GPUs", ("auto", "on", "off")
    )
    timeout: float = option(30.0, "minutes after which a process that hears nothing of another one gives up")

    eval_every: int | None = option(
        None, "evaluate on the development split every N steps (default: each epoch)", group="evaluation and output"
    )
    eval_limit: int | None = option(None, "evaluate on its first N sentences")
    patience: int | None = option(
        None, "end after N evaluations without a better F1 (the learning rate is planned for all steps)"
    )
    eval_batch: int = option(32, "sentences decoded side by side")
    save_every: int | None = option(None, "checkpoint every N steps as well as at the end of each epoch")
    keep: int = option(2, "checkpoints to keep")
    out: str | None = option(None, "folder of the run (default: a new one under runs/)")

    # what may differ when a run is resumed, because it does not change what is learnt
    FREE = ("out", "micro_tokens", "parallel", "activation_checkpointing", "compile", "eval_batch", "save_every",
            "keep", "timeout")  # fmt: skip

    @property
    def adapts(self) -> bool:
        """Whether low-rank updates are trained, or weights of the model itself."""
        return METHODS[self.method].adapts

    @property
    def learning(self) -> dict:
        """What learns: the arguments of `lora.inject.make_trainable`."""
        names = ("method", "targets", "rank", "alpha", "rslora", "dropout", "seed", "dora")
        return {name: getattr(self, name) for name in names}

    @property
    def idle(self) -> tuple[str, ...]:
        """The settings that have no effect with this method."""
        of_updates = () if self.adapts else ("rank", "alpha", "rslora", "dora", "loraplus", "dropout")
        return of_updates if METHODS[self.method].targeted else (*of_updates, "targets")

    def __post_init__(self):
        for field in fields(Settings):
            name, value, choices = field.name, getattr(self, field.name), field.metadata["choices"]
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{flag(name)} is {value}; it must be finite")
            unknown = field.type == int | str and isinstance(value, str) and value != "auto"
            if unknown or choices and value not in choices:
                raise UsageError(f"{flag(name)} is {value!r}, which is none of its values")
        check_least(
            self, rank=1, epochs=1, max_steps=1, batch_tokens=1, batch_sentences=1, micro_tokens=1, limit_train=1,
            eval_every=1, eval_limit=1, patience=1, eval_batch=1, save_every=1, keep=1, shots=0, clip=0, weight_decay=0,
            warmup=0, loraplus=1, activation_checkpointing=0,
        )  # fmt: skip
        chosen = {"rslora": self.rslora, "dora": self.dora, "loraplus": self.loraplus != 1}
        if not self.adapts and any(chosen.values()):
            variant = next(name for name in chosen if chosen[name])
            raise UsageError(f"{flag(variant)} is a variant of LoRA, and --method is {self.method}")
        if self.alpha is not None and not self.alpha > 0:
            raise UsageError(f"--alpha is {self.alpha}; it must be above 0, or nothing is learnt")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed is {self.seed}; it must be at least 0 and below 2**63")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"--dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.lr is not None and not 0 < self.lr < 10:
            raise UsageError(f"--lr is {self.lr}; it must be above 0 (and below 10)")
        if not 0 < self.timeout <= 10**6:
            raise UsageError(f"--timeout is {self.timeout}; it must be above 0 (and at most a million) minutes")
        if self.epochs is not None and self.epochs > 10**4:
            raise UsageError(f"--epochs is {self.epochs}; it must be at most 10,000, all of which are planned at once")
        if self.warmup > 1:
            raise UsageError(f"--warmup is {self.warmup}; it is a share of the steps, at most 1")
        try:
            kinds = parse_targets(self.targets)
        except ValueError as error:
            raise UsageError(f"--targets: {error}") from None
        # one form of each choice, by which runs are compared
        object.__setattr__(self, "targets", "all" if len(kinds) == len(KINDS) else ",".join(kinds))


@dataclass(frozen=True, kw_only=True)
class ResolvedSettings(Settings):
    """The settings of a run on this machine, what was left open chosen: what `config.json` keeps."""

    model: str
    data: str
    out: str
    lr: float
    batch_tokens: int


def check_constraint_format(form: str) -> None:
    """Refuses --constrain for a format whose answers do not repeat the sentence."""
    if form not in COPYING:
        raise UsageError(
            f"--constrain needs a format whose answers repeat the sentence, such as tagging; this is {form}"
        )
