"""A training run: its settings, what they resolve to on this machine, and the folder that keeps it."""

import fcntl
import hashlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import TextIO

import torch

from . import corpus, ner, runstate, sharding
from .adapter import load_adapter, save_adapter
from .checkpoint import CheckpointError, load_model, model_files, read_config, read_json, save_model, skeleton
from .cli import UsageError, option
from .distributed import World
from .files import HOME, replace_file
from .lora import KINDS, METHODS, count_parameters, make_trainable, parse_targets
from .model import Llama, LlamaConfig
from .precision import DTYPES, choose_precision
from .tokenizer import Tokenizer, check_fit, load_tokenizer

CONFIG, LOCK = "config.json", ".lock"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Settings:
    """The flags of train.py. `resolve` chooses what is left open (`None`)."""

    model: str | None = option(None, "Hugging Face folder (default: weights/llama-2-7b if there, else weights/tiny)")
    data: str | None = option(None, "corpus folder (default: data/bc5cdr if there, else data/sample)")
    out: str | None = option(None, "folder of the run (default: a new one under runs/)")
    format: str = option("tagging", "what the model answers", ("tagging", "extraction"))
    labels: str = option("all", "all, one label (the per-label formats), or a comma list in the order of the answer")
    instruction: bool = option(False, "put the instruction of figure 2 before the input")
    shots: int = option(0, "demonstrations from the training split before the input")
    method: str = option(
        "lora", "train updates of the target layers, their own weights, or every parameter", (*METHODS,)
    )
    targets: str = option("all", f"kinds of layer that are trained: all, or a comma list of {','.join(KINDS)}")
    rank: int = option(8, "rank of the updates")
    alpha: float | None = option(None, "updates are scaled by alpha / rank (default: rank, the paper's equation 2)")
    rslora: bool = option(False, "scale by alpha / sqrt(rank)")
    dora: bool = option(False, "learn the length of each row of the weights apart from its direction")
    loraplus: float = option(1.0, "learning rate of every B over that of A, as in LoRA+ (not on the embedding)")
    dropout: float = option(0.0, "on the input of the updates")
    epochs: int | None = option(None, "passes over the training split (default: 3, or as many as give 400 steps)")
    lr: float | None = option(None, "peak learning rate (default: 1.2 / hidden size for LoRA, else a tenth of it)")
    schedule: str = option("cosine", "of the learning rate after the warm-up", ("cosine", "constant"))
    warmup: float = option(0.06, "share of the steps with a linearly rising learning rate")
    weight_decay: float = option(0.0, "of AdamW")
    clip: float = option(1.0, "largest norm of the gradient; 0 leaves it alone")
    batch_tokens: int = option(1024, "tokens of an optimizer step, over all processes")
    batch_sentences: int | None = option(None, "sentences of an optimizer step, in place of --batch-tokens")
    micro_tokens: int | str = option("auto", "tokens of a forward pass, on one process; auto: as memory allows")
    overlong: str = option("error", "what to do about an example longer than the context", ("error", "skip"))
    limit_train: int | None = option(None, "use only the first N training sentences")
    precision: str = option("auto", "of the matrix products", ("auto", "fp32", "fp16", "bf16"))
    parallel: str = option(
        "auto", "ddp: the model in each process; fsdp: one over all; auto: as memory allows", ("auto", "ddp", "fsdp")
    )
    activation_checkpointing: int | str = option(
        "auto", "recompute every K-th block in the backward pass (1: all, 0: none); auto: as memory allows", bare=1
    )
    seed: int = option(0, "of initial values, order of examples, demonstrations and dropout")
    eval_every: int | None = option(None, "evaluate on the development split every N steps (default: each epoch)")
    eval_limit: int | None = option(None, "evaluate on its first N sentences")
    eval_batch: int = option(32, "sentences decoded side by side")
    save_every: int | None = option(None, "checkpoint every N steps as well as at the end of each epoch")
    keep: int = option(2, "checkpoints to keep")
    timeout: float = option(30.0, "minutes after which a process that hears nothing of another one gives up")

    # what may differ when a run is resumed, because it does not change what is learnt
    FREE = ("out", "micro_tokens", "parallel", "activation_checkpointing", "eval_batch", "save_every", "keep",
            "timeout")  # fmt: skip

    @property
    def adapts(self) -> bool:
        """Whether low-rank updates are trained, or weights of the model itself."""
        return METHODS[self.method].adapts

    @property
    def learning(self) -> dict:
        """What learns: the arguments of `lora.make_trainable`."""
        names = ("method", "targets", "rank", "alpha", "rslora", "dropout", "seed", "dora")
        return {name: getattr(self, name) for name in names}

    @property
    def idle(self) -> tuple[str, ...]:
        """The settings that say nothing with this method."""
        of_updates = () if self.adapts else ("rank", "alpha", "rslora", "dora", "loraplus", "dropout")
        return of_updates if METHODS[self.method].targeted else (*of_updates, "targets")

    def __post_init__(self):
        for field in fields(Settings):
            name, value, choices = field.name, getattr(self, field.name), field.metadata["choices"]
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be finite")
            unknown = field.type == int | str and isinstance(value, str) and value != "auto"
            if unknown or choices and value not in choices:
                raise UsageError(f"--{name.replace('_', '-')} is {value!r}, which is none of its values")
        for name, least in {
            "rank": 1, "epochs": 1, "batch_tokens": 1, "batch_sentences": 1, "micro_tokens": 1, "limit_train": 1,
            "eval_every": 1, "eval_limit": 1, "eval_batch": 1, "save_every": 1, "keep": 1, "shots": 0, "clip": 0,
            "weight_decay": 0, "warmup": 0, "loraplus": 1, "activation_checkpointing": 0,
        }.items():  # fmt: skip
            value = getattr(self, name)
            if value not in (None, "auto") and not value >= least:
                raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
        chosen = {"rslora": self.rslora, "dora": self.dora, "loraplus": self.loraplus != 1}
        if not self.adapts and any(chosen.values()):
            flag = next(name for name in chosen if chosen[name])
            raise UsageError(f"--{flag} is a variant of LoRA, and --method is {self.method}")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"--dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.lr is not None and not 0 < self.lr < 10:
            raise UsageError(f"--lr is {self.lr}; it must be above 0 (and below 10)")
        if not 0 < self.timeout <= 10**6:
            raise UsageError(f"--timeout is {self.timeout}; it must be above 0 (and at most a million) minutes")
        if self.warmup > 1:
            raise UsageError(f"--warmup is {self.warmup}; it is a share of the steps, at most 1")
        try:
            parse_targets(self.targets)
        except ValueError as error:
            raise UsageError(f"--targets: {error}") from None


@dataclass(frozen=True, kw_only=True)
class ResolvedSettings(Settings):
    """The settings of a run on this machine, what was left open chosen: what `config.json` keeps."""

    model: str
    data: str
    out: str
    lr: float


def resolve(settings: Settings, device: torch.device) -> tuple[ResolvedSettings, dict[str, str]]:
    """Fills in model, data, output folder, precision and learning rate; and says why model, data and precision are
    what they are.

    Raises:
        CheckpointError: no such model folder.
    """
    why = {}
    model, why["model"] = _default(settings.model, "weights/llama-2-7b", "weights/tiny", "config.json")
    data, why["data"] = _default(settings.data, "data/bc5cdr", "data/sample", ".")
    precision, why["precision"] = choose_precision(settings.precision, device)
    out = settings.out
    if out is None:
        what = f"r{settings.rank}" if settings.adapts else settings.method
        name = f"{datetime.now():%Y%m%d-%H%M%S}-{settings.format}-{what}-{Path(model).name}"
        out = str(HOME / "runs" / name)
    config = read_config(model)
    lr = settings.lr
    if lr is None:
        lr = float(f"{1.2 / config.hidden_size * (1 if settings.adapts else 0.1):.3g}")
    chosen = {"model": model, "data": data, "out": out, "precision": precision, "lr": lr}
    return ResolvedSettings(**asdict(settings) | chosen), why


def _default(given: str | None, preferred: str, built_in: str, proof: str) -> tuple[str, str]:
    if given is not None:
        return given, "requested"
    if (HOME / preferred / proof).exists():
        return str(HOME / preferred), f"found at {preferred}"
    return str(HOME / built_in), f"built in, since {preferred} is not there"


def make_task(settings: Settings, splits: Mapping[str, list[corpus.Document]]) -> ner.Task:
    """The task that the settings and the corpus define.

    Raises:
        UsageError: a label that the corpus does not have.
    """
    known = corpus.labels(document for documents in splits.values() for document in documents)
    if settings.labels == "all":
        labels, per_label = known, False
    else:
        labels = tuple(label.strip() for label in settings.labels.split(",") if label.strip())
        per_label = len(labels) == 1
        unknown = [label for label in labels if label not in known]
        if unknown or not labels:
            raise UsageError(
                f"--labels: no mention has label {', '.join(unknown)!r}; the corpus has {', '.join(known)}"
            )
    if not known:
        raise UsageError(f"--data {settings.data}: the corpus holds no mention, so there is no label to learn")
    try:
        task = ner.Task(settings.format, labels, per_label, settings.instruction)
    except ValueError as error:
        raise UsageError(f"--labels: {error}") from None
    if settings.shots:
        sentences = corpus.all_sentences(splits["train"])
        shown = ner.draw_demonstrations(task, sentences, settings.shots, settings.seed)
        task = replace(task, demonstrations=shown)
    return task


def read_base(settings: ResolvedSettings) -> tuple[LlamaConfig, Tokenizer]:
    """Shape and tokenizer of the base model.

    Raises:
        CheckpointError, TokenizerError: as their names say.
    """
    config, tokenizer = read_config(settings.model), load_tokenizer(settings.model)
    check_fit(tokenizer, config.vocab_size, settings.model)
    return config, tokenizer


def build_model(settings: ResolvedSettings, world: World, parallel: str) -> Llama:
    """The base model with what is to be trained in it.

    With LoRA the frozen weights are stored in the precision of the products; in full and partial
    fine-tuning all weights are fp32, so that the two differ in what learns alone, and cast by autocast, or
    under `fsdp` when they are gathered.

    Raises:
        CheckpointError, InputError: as `load_model` and `make_trainable`.
    """
    products = DTYPES[settings.precision]
    dtype = products if settings.adapts else torch.float32
    if parallel == "ddp":
        return make_trainable(load_model(settings.model, dtype, world.device), **settings.learning)
    model = skeleton(read_config(settings.model)).to(dtype)
    files = model_files(settings.model, model)
    sharding.shard(make_trainable(model, **settings.learning), world, products)
    sharding.fill(model, files, world.device, settings.seed)
    return model


def save_trained(model: Llama, settings: ResolvedSettings, folder: Path) -> None:
    """What was trained, as a folder that other tools read: a PEFT adapter, or a whole model."""
    if settings.adapts:
        save_adapter(model, folder, base_model=settings.model)
    else:
        save_model(model, folder)
        for name in TOKENIZER_FILES:
            source = Path(settings.model) / name
            if source.is_file():
                (folder / name).write_bytes(source.read_bytes())


def trained_folder(run: Path, which: str) -> Path:
    """Where a run keeps its `best` or `last` model; every file in it is checked.

    Raises:
        CheckpointError: no such run, one without a trained model yet, or a damaged one.
    """
    if not run.is_dir():
        raise CheckpointError(f"{run}: no such run folder")
    folder = run / which
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: the run has saved no such model yet")
    runstate.verify(folder)
    return folder


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


def read_settings(run: Path) -> ResolvedSettings:
    """The resolved settings of a run.

    Raises:
        CheckpointError: no run is there, or its configuration is not this version's.
    """
    stored = read_json(run / CONFIG).get("settings")
    names = {field.name for field in fields(ResolvedSettings)}
    if not isinstance(stored, dict) or set(stored) != names:
        raise CheckpointError(f"{run / CONFIG}: holds no settings of a llamalora run of this version")
    try:
        for field in fields(ResolvedSettings):
            value = stored[field.name]
            if not isinstance(value, field.type) and not (isinstance(value, int) and isinstance(1.0, field.type)):
                raise UsageError(f"{field.name} is {value!r}")
        return ResolvedSettings(**stored)
    except UsageError as error:
        raise CheckpointError(f"{run / CONFIG}: a setting that cannot be: {error}") from None


def check_constraint(task: ner.Task) -> None:
    """Refuses --constrain for a task without a source to copy."""
    if task.format != "tagging":
        raise UsageError(f"--constrain is for tagging, where an answer repeats its sentence; this is {task.format}")


def read_task(run: Path) -> ner.Task:
    """What the model of a run is asked.

    Raises:
        CheckpointError: no run is there, or its configuration is not this version's.
    """
    try:
        return ner.Task.from_dict(read_json(run / CONFIG)["task"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{run / CONFIG}: holds no task of a llamalora run ({error})") from None


def describe(settings: ResolvedSettings, task: ner.Task, model: Llama) -> dict:
    """The contents of a run's `config.json`: all that another person needs to repeat it."""
    packages = ("torch", "sentencepiece", "safetensors", "numpy", "tokenizers")
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "settings": asdict(settings),
        "task": asdict(task),
        "model": model.config.to_dict(),
        "parameters": count_parameters(model),
        "fingerprints": fingerprints(settings),
        "versions": versions,
    }


def fingerprints(settings: ResolvedSettings) -> dict[str, str]:
    """Short hashes of base model, tokenizer and training data, by which a resumed run knows its own."""
    model = Path(settings.model)
    weights = sorted(model.glob("*.safetensors"))
    tokenizers = [model / name for name in TOKENIZER_FILES[:2] if (model / name).is_file()]
    return {
        "base model": _fingerprint([model / "config.json", *weights]),
        "tokenizer": _fingerprint(tokenizers),
        "data": _fingerprint(sorted(corpus.find_splits(settings.data).values())),
    }


def _fingerprint(paths: list[Path]) -> str:
    """Of size, first and last MiB of each file: weights of 13 GB should not delay every start."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(2**20))
            file.seek(max(0, size - 2**20))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def _foreign(folder: Path) -> bool:
    """Whether a folder holds more than a run that was killed while it started."""
    return any(path.name not in (LOCK, f"{CONFIG}.tmp") for path in folder.iterdir())


def start_folder(folder: Path, config: dict, world: World) -> None:
    """Claims a new output folder for this process and records the run's configuration in it.

    Raises:
        UsageError: the folder holds a run already, or other files.
    """
    problem = None
    if world.is_main:
        if (folder / CONFIG).exists():
            problem = f"--out {folder}: holds a run already; continue it with --resume, or choose another folder"
        elif folder.exists() and (not folder.is_dir() or _foreign(folder)):
            problem = f"--out {folder}: exists and is not an empty folder"
        else:
            folder.mkdir(parents=True, exist_ok=True)
            problem, held = _lock(folder)
            with held:
                if not problem and (folder / CONFIG).exists():
                    problem = f"--out {folder}: another process has just started a run there"
                if not problem:
                    replace_file(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    problem = world.from_main(problem)
    if problem:
        raise UsageError(problem)


def lock(folder: Path, world: World) -> TextIO | None:
    """Keeps other runs from writing to this one; holds as long as the file that the main process gets is open.

    Raises:
        UsageError: another run holds it.
    """
    problem, file = _lock(folder) if world.is_main else (None, None)
    problem = world.from_main(problem)
    if problem:
        raise UsageError(problem)
    return file


def _lock(folder: Path) -> tuple[str | None, TextIO]:
    file = (folder / LOCK).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return f"--out {folder}: another process is writing to this run", file
    return None, file


def check_resumable(folder: Path, settings: ResolvedSettings) -> None:
    """Refuses to resume a run as another one.

    Raises:
        UsageError: a setting, the base model, the tokenizer or the data is not the run's; all are listed.
    """
    stored = asdict(read_settings(folder))
    differences = [
        f"--{name.replace('_', '-')} is {value}, the run has {stored[name]}"
        for name, value in asdict(settings).items()
        if name not in (*Settings.FREE, "model", "data") and value != stored[name]
    ]
    then = read_json(folder / CONFIG).get("fingerprints")
    then = then if isinstance(then, dict) else {}
    for name, value in fingerprints(settings).items():
        if then.get(name) != value:
            differences.append(f"the {name} is not the one that the run was started with")
    if differences:
        raise UsageError("\n  ".join([f"--resume {folder}: this is not the same run:", *differences]))
