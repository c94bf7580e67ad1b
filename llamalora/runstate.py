"""Resumable run state on disk: atomic, hashed, free of pickle, newest sound one first.

A checkpoint is a folder `step-000120/` of safetensors and JSON with a manifest of SHA-256 sums. It is
written beside its destination, synced, and renamed into place, so a crash leaves the previous one intact.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file

from .checkpoint import CheckpointError, read_json, save_tensors

MANIFEST = "manifest.json"


def write_atomically(folder: Path, fill: Callable[[Path], None], keeps: bool = True) -> None:
    """Replaces `folder` by one that `fill` writes: complete with its manifest, or not at all.

    Args:
        keeps: false on a process that only gives its rows of sharded tensors (`save_tensors`): what it fills is
            thrown away.
    """
    if not keeps:
        with TemporaryDirectory() as scratch:
            fill(Path(scratch))
        return
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fill(partial)
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    sums = {path.relative_to(partial).as_posix(): _sha256(path) for path in files}
    (partial / MANIFEST).write_text(json.dumps(sums, indent=2) + "\n")
    _sync(partial / MANIFEST)
    _sync(partial)
    replaced = folder.with_name(folder.name + ".old")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def verify(folder: Path) -> None:
    """Checks every file of a folder against its manifest.

    Raises:
        CheckpointError: the first file that is missing, damaged, or a manifest that is.
    """
    sums = read_json(folder / MANIFEST)
    unlisted = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {*sums, MANIFEST}
    if unlisted or not sums:
        raise CheckpointError(f"{folder / MANIFEST}: does not list {', '.join(sorted(unlisted)) or 'any file'}")
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing")
        if _sha256(path) != expected:
            raise CheckpointError(f"{path}: damaged, its SHA-256 differs from {MANIFEST}")


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoint folders of a run, newest first."""
    found = (path for path in (run / "checkpoints").glob("step-*") if path.suffix == "")
    return sorted(found, key=_cursor, reverse=True)


def _cursor(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def save_checkpoint(
    run: Path, cursor: int, tensors: dict[str, torch.Tensor], state: dict, keep: int, keeps: bool = True
) -> None:
    """Writes `checkpoints/step-CURSOR/`: tensors (model and optimizer) and JSON state; keeps the last `keep`.

    Args:
        keeps: as in `write_atomically`.
    """

    def fill(folder: Path) -> None:
        save_tensors(tensors, folder / "tensors.safetensors")
        (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")

    written = run / "checkpoints" / f"step-{cursor:06d}"
    write_atomically(written, fill, keeps)
    if not keeps:
        return
    # one of a later step is what a fallback passed over: damaged, and its steps are being done again
    later = [path for path in checkpoints(run) if _cursor(path) > cursor]
    for old in [*later, *[path for path in checkpoints(run) if path not in later][keep:]]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(run: Path, say: Callable[[str], None] = print) -> tuple[dict[str, torch.Tensor], dict] | None:
    """Tensors and state of the newest sound checkpoint; damaged ones are named and passed over.

    None if there is no checkpoint at all.

    Raises:
        CheckpointError: every checkpoint is damaged.
    """
    found = checkpoints(run)
    for folder in found:
        try:
            verify(folder)
            return load_file(folder / "tensors.safetensors"), read_json(folder / "state.json")
        except CheckpointError as error:
            say(f"checkpoint passed over: {error}")
    if found:
        raise CheckpointError(f"{run / 'checkpoints'}: all {len(found)} checkpoints are damaged")
    return None


def clean_partial(run: Path) -> None:
    """Removes what an interrupted save left behind."""
    for path in [*run.glob("*.tmp"), *(run / "checkpoints").glob("*.tmp")]:
        shutil.rmtree(path, ignore_errors=True)
    for path in [*run.glob("*.old"), *(run / "checkpoints").glob("*.old")]:
        target = path.with_suffix("")
        if target.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(target)  # the crash fell between the two renames


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
