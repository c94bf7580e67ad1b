"""The cells that tables are made of: each is one run with one seed, trained and scored once, and kept."""

import gc
import hashlib
import json
import re
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..distributed.world import World, join_world
from ..errors import InputError
from ..files import lock_file, write_json
from ..model.config import CheckpointError
from ..runs.folder import RUN_CONFIG, fingerprints, read_settings
from ..runs.resolve import resolve
from ..runs.settings import ResolvedSettings, Settings
from ..training.loop import train
from ..training.step import DivergedError
from .experiments import Changes
from .origin import origin

# ---- cells ----


@dataclass(frozen=True)
class Cell:
    """One run with one seed, and where what it found is kept.

    Attributes:
        settings: resolved, with the output folder.
        path: of the JSON file with its result, or with the error that it ended in.
    """

    settings: ResolvedSettings
    path: Path

    @staticmethod
    def of(base: Settings, changes: Changes, out: Path, world: World) -> "Cell":
        """The cell of a run whose settings are `base` with these changes. Its name holds a hash of all that
        decides its result: settings, model, tokenizer, data; not where they lie."""
        settings = resolve(replace(base, **changes, out=""), world.device, world.size)[0]
        content = json.dumps([deciding(settings), fingerprints(settings)], sort_keys=True)
        what = [settings.format, re.sub(r"[^\w+-]+", "_", settings.labels.replace(",", "+"))]
        what += ["prompt"] if settings.instruction or settings.shots else []
        what += [variant for variant in ("rslora", "dora") if getattr(settings, variant)]
        what += ["loraplus"] if settings.loraplus != 1 else []
        what += [settings.method] if not settings.adapts else []
        what += [settings.targets.replace(",", "")] if "targets" not in settings.idle else []
        what += [f"r{settings.rank}"] if settings.adapts else []
        name = "-".join([*what, f"s{settings.seed}", hashlib.sha256(content.encode()).hexdigest()[:10]])
        return Cell(replace(settings, out=str(out / "runs" / name)), out / "cells" / f"{name}.json")

    @property
    def folder(self) -> Path:
        return Path(self.settings.out)

    def read(self) -> dict | None:
        """What is known about the cell; None before it has been run."""
        return json.loads(self.path.read_text()) if self.path.exists() else None

    @property
    def log(self) -> Path:
        """What is printed about it, where cells are run side by side."""
        return self.path.with_suffix(".log")

    def run(self, world: World) -> dict:
        """Trains and scores, or goes on where it was interrupted; nothing more, if another command has done so.

        Returns:
            The result on the development split with `trainable` parameters, `seconds` of training and of its best
            evaluation, and the learning `curve` (loss of each step), or `{"error": ...}`.
        """
        with alone(self.path, world):
            known = world.from_main(self.read())
            return known if known and is_done(known) else self._run(world)

    def _run(self, world: World) -> dict:
        settings, resume = self.settings, world.from_main((self.folder / RUN_CONFIG).exists())
        gc.collect()  # AdamW is part of a cycle: the last cell's would stay on the GPU
        try:
            if resume:  # with the number of epochs that was found at the start, and with ours of what is free
                free = {name: getattr(settings, name) for name in (*Settings.FREE, "model", "data")}
                settings = replace(read_settings(self.folder), **free)
            trained = train(settings, world, resume)
            assert trained is not None, "a cell has a development split"
        except (RuntimeError, InputError) as error:
            result = failure(error)
            if not on_every_process(error, world):
                self.keep(result, world)
                raise  # the others have not failed, and wait
        else:
            config = json.loads((self.folder / RUN_CONFIG).read_text())
            steps = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
            result = trained | {
                "model": config["model"],
                "trainable": config["parameters"]["trainable"],
                "seconds": sum(step["seconds"] for step in steps) + trained["speed"]["seconds"],
                "curve": [round(step["loss"], 5) for step in steps if step["loss"] is not None],
            }
        if world.is_main:
            self.keep(result, world)
        world.barrier()
        return result

    def outcome(self, code: int, world: World) -> dict:
        """The result after a process that ran it has ended with an exit code, or by a signal (less than 0)."""
        result = self.read()
        if result is None or code and "error" in result:
            how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
            result = {"error": f"its process ended with {how}; what it said is in {self.log}"}
            self.keep(result, world)
        return result

    def keep(self, result: dict, world: World) -> None:
        keep(result, [self], self.path, world)


def run_by_itself(cell: Cell) -> None:
    """Runs a cell in a process that has nothing else to do."""
    with join_world(cell.settings.timeout) as world:
        cell.run(world)


def is_done(result: dict | None) -> bool:
    """Whether that is the result of a cell, and not that of a failure."""
    return result is not None and "error" not in result


def lock_of(path: Path) -> Path:
    return path.with_name(f".{path.stem}.lock")


def is_busy(path: Path) -> bool:
    """Whether another process is making a file (see `alone`)."""
    file = lock_file(lock_of(path))
    if file:
        file.close()
    return file is None


@contextmanager
def alone(path: Path, world: World) -> Iterator[None]:
    """Keeps other commands, which may have the same folder, from making a file at the same time: waits for them."""
    file, told = None, False
    while world.from_main(world.is_main and (file := lock_file(lock_of(path))) is None):
        if not told:
            world.warn(f"another command is making {path}; waiting for it")
            told = True
        time.sleep(0.5)  # and asks again: after one long wait the other processes would think this one lost
    with file or nullcontext():
        yield


def keep(result: dict, cells: Iterable[Cell], path: Path, world: World) -> None:
    """Writes a result with the settings of its `runs`, but for where things lay, and what it was made by."""
    runs = []
    for cell in cells:
        places = {name: Path(getattr(cell.settings, name)).name for name in ("model", "data", "out")}
        runs.append(asdict(cell.settings) | places)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(result | {"runs": runs, "made_by": origin(world)}, path)


def deciding(settings: Settings) -> dict[str, Any]:
    """The settings that decide a result, as far as they differ from their defaults: a setting that comes with a later
    version, and does nothing unless it is asked for, leaves the cells that are kept as they are."""
    idle = {*Settings.FREE, "model", "data", *settings.idle} | ({"batch_tokens"} if settings.batch_sentences else set())
    return {
        field.name: value
        for field in fields(Settings)
        if field.name not in idle and (value := getattr(settings, field.name)) != field.default
    }


def failure(error: Exception) -> dict:
    return {"error": f"{type(error).__name__}: {error}"}


def on_every_process(error: Exception, world: World) -> bool:
    """Whether all processes have met the same error: one that memory or a disk gave may be one process's own."""
    alike = isinstance(error, (DivergedError, InputError)) and not isinstance(error, CheckpointError)
    return alike or world.size == 1
