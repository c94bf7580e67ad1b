"""The folder of a run: who may write to it, what it records, and whether it can be resumed."""

import hashlib
import importlib.metadata
import json
import platform
from contextlib import nullcontext
from dataclasses import asdict, fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, get_type_hints

from ..cli import UsageError
from ..corpus.read import find_splits
from ..files import lock_file, replace_file, why_not_written
from ..mistakes import wrong_folder
from ..model.config import CheckpointError, read_json
from ..task.definition import Task
from .settings import ResolvedSettings, Settings
from .state import clean_partial, verify_folder

if TYPE_CHECKING:
    from ..distributed.world import World
    from ..model.llama import Llama

RUN_CONFIG, LOCK = "config.json", ".lock"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def trained_folder(run: Path, which: str) -> Path:
    """Where a run keeps its `best` or `last` model; every file in it is checked.

    Raises:
        CheckpointError: no such run, one without a trained model yet, or a damaged one.
    """
    _read_config(run)
    folder = run / which
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: the run has saved no such model yet")
    verify_folder(folder)
    return folder


def adapter_of(run: Path) -> Path:
    """The folder of a run's best adapter.

    Raises:
        UsageError: a run that trained without LoRA.
        CheckpointError: as `trained_folder`.
    """
    settings = read_settings(run)
    if not settings.adapts:
        raise UsageError(
            f"{run}: it trained the model's own weights (--method {settings.method}), so it has no adapter; "
            f"{run / 'best'} is a whole model"
        )
    return trained_folder(run, "best")


def _read_config(run: Path) -> dict:
    """The contents of a run's `config.json`.

    Raises:
        CheckpointError: no run is there, but perhaps something else, which is named.
    """
    path = run / RUN_CONFIG
    config = read_json(path) if path.is_file() else {}
    if "settings" not in config:
        lacking = "holds no settings of a llamalora run" if path.is_file() else "no such file"
        raise CheckpointError(wrong_folder(run, "run folder", f"{path}: {lacking}"))
    return config


def read_settings(run: Path) -> ResolvedSettings:
    """The resolved settings of a run. One that came with a later version than the run's is at its default, at which it
    changes nothing.

    Raises:
        CheckpointError: no run is there, or its settings are not those of a run of this version or an earlier one.
    """
    stored = _read_config(run)["settings"]
    known = {field.name for field in fields(ResolvedSettings)}
    if not isinstance(stored, dict) or not stored.keys() <= known:
        raise CheckpointError(f"{run / RUN_CONFIG}: holds no settings of a llamalora run, or those of a later version")
    if lacking := [name for name in ResolvedSettings.__annotations__ if name not in stored]:  # which have no default
        raise CheckpointError(f"{run / RUN_CONFIG}: holds no settings of a llamalora run: {', '.join(lacking)} lacks")
    hints = get_type_hints(ResolvedSettings)
    try:
        for name, value in stored.items():
            kind = hints[name]
            if not isinstance(value, kind) and not (isinstance(value, int) and isinstance(1.0, kind)):
                raise UsageError(f"{name} is {value!r}")
        return ResolvedSettings(**stored)
    except UsageError as error:
        raise CheckpointError(f"{run / RUN_CONFIG}: a setting that cannot be: {error}") from None


def recorded_folder(run: Path, name: str, remedy: str) -> str:
    """The folder of a run's base model (`model`) or corpus (`data`).

    Args:
        remedy: what to do where it is not there.

    Raises:
        UsageError: it is not there.
        CheckpointError: as `read_settings`.
    """
    folder, what = getattr(read_settings(run), name), {"model": "base model", "data": "corpus"}[name]
    if not Path(folder).is_dir():
        relative = "" if Path(folder).is_absolute() else " (relative to the folder where it was trained)"
        raise UsageError(f"{run}: its {what}, {folder} in its config.json{relative}, is not here; {remedy}")
    return folder


def read_task(run: Path) -> Task:
    """What the model of a run is asked.

    Raises:
        CheckpointError: no run is there, or its configuration is not this version's.
    """
    try:
        return Task.from_dict(_read_config(run)["task"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{run / RUN_CONFIG}: holds no task of a llamalora run ({error})") from None


def describe_run(settings: ResolvedSettings, task: Task, model: "Llama") -> dict:
    """The contents of a run's `config.json`: all that another person needs to repeat it."""
    from ..lora.inject import count_parameters

    packages = ("torch", "sentencepiece", "safetensors", "numpy", "tokenizers")
    versions: dict[str, str | None] = {"python": platform.python_version()}
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
        "base model": fingerprint([model / "config.json", *weights]),
        "tokenizer": fingerprint(tokenizers),
        "data": fingerprint(sorted(find_splits(settings.data).values())),
    }


def read_fingerprints(run: Path) -> dict:
    """The fingerprints that were taken when the run was started."""
    stored = _read_config(run).get("fingerprints")
    return stored if isinstance(stored, dict) else {}


def fingerprint(paths: list[Path]) -> str:
    """A hash of size, first and last MiB of each file, also of those in folders: weights of 13 GB should not delay
    every start."""
    digest = hashlib.sha256()
    files = (sorted(filter(Path.is_file, path.rglob("*"))) if path.is_dir() else [path] for path in paths)
    for path in chain.from_iterable(files):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(2**20))
            file.seek(max(0, size - 2**20))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def _foreign(folder: Path) -> bool:
    """Whether a folder holds more than a run that was killed while it started."""
    return any(path.name != LOCK and not path.name.startswith(f"{RUN_CONFIG}.tmp") for path in folder.iterdir())


def find_obstacle(folder: Path) -> str | None:
    """Why no new run can be started in a folder."""
    if (folder / RUN_CONFIG).exists():
        return f"--out {folder}: holds a run already; continue it with --resume, or choose another folder"
    if folder.exists() and (not folder.is_dir() or _foreign(folder)):
        return f"--out {folder}: exists and is not an empty folder"
    why = why_not_written(folder)
    return f"--out {folder}: {why}" if why else None


def start_folder(folder: Path, config: dict, world: "World") -> None:
    """Claims a new output folder for this process and records the run's configuration in it.

    Raises:
        UsageError: what `find_obstacle` finds, or another process was faster.
    """
    problem = None
    if world.is_main:
        problem = find_obstacle(folder)
        if not problem:
            folder.mkdir(parents=True, exist_ok=True)
            problem, held = _lock(folder)
            with held or nullcontext():
                if not problem and (folder / RUN_CONFIG).exists():
                    problem = f"--out {folder}: another process has just started a run there"
                if not problem:
                    clean_partial(folder)
                    replace_file(folder / RUN_CONFIG, json.dumps(config, indent=2) + "\n")
    problem = world.from_main(problem)
    if problem:
        raise UsageError(problem)


def lock_folder(folder: Path, world: "World") -> TextIO | None:
    """Keeps other runs from writing to this one; holds as long as the file that the main process gets is open.

    Raises:
        UsageError: another run holds it.
    """
    problem, file = _lock(folder) if world.is_main else (None, None)
    problem = world.from_main(problem)
    if problem:
        raise UsageError(problem)
    return file


def _lock(folder: Path) -> tuple[str | None, TextIO | None]:
    file = lock_file(folder / LOCK)
    return (None if file else f"--out {folder}: another process is writing to this run"), file


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
    cure = ["leave such flags out to go on, or start a new run with them"] * bool(differences)
    then = read_fingerprints(folder)
    for name, value in fingerprints(settings).items():
        if then.get(name) != value:
            differences.append(f"the {name} is not the one that the run was started with")
    if differences:
        raise UsageError("\n  ".join([f"--resume {folder}: this is not the same run:", *differences, *cure]))
