"""Resumable run state on disk: atomic, hashed, free of pickle, newest sound one first.

A checkpoint is a folder `step-000120/` of safetensors and JSON with a manifest of SHA-256 sums. It is
written beside its destination, synced, and renamed into place, so a crash leaves the previous one intact.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ..errors import RunError
from ..files import new_folder, sync
from ..model.config import CheckpointError, read_json

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
CARD = "README.md"  # of a saved model: people complete it, and later scores come into it, so it has no sum


def write_atomically(folder: Path, fill: Callable[[Path], None], writes: bool = True) -> None:
    """Replaces `folder` by one that `fill` writes: complete with its manifest, or not at all.

    Args:
        writes: false on a process that only contributes its rows of sharded tensors (`save_tensors`): the folder that
            it fills is thrown away.

    Raises:
        RunError: it cannot be written (a full disk, for one); the old one is as it was.
    """
    if not writes:
        with TemporaryDirectory() as scratch:
            fill(Path(scratch))
        return
    try:
        with new_folder(folder, replace=True) as partial:
            fill(partial)
            _seal(partial)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written ({error})") from None


def _seal(folder: Path) -> None:
    """Adds the manifest, when every file that it lists is on the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        sync(path)
    sums = {path.relative_to(folder).as_posix(): _sha256(path) for path in files if path != folder / CARD}
    # no line end: of this one file, which has no sum, a byte that is lost must show
    (folder / MANIFEST).write_text(json.dumps(sums, indent=2))
    sync(folder / MANIFEST)
    sync(folder)


def find_damage(folder: Path) -> list[str]:
    """What is wrong with a folder by its manifest: each file that is missing, damaged or not listed."""
    try:
        sums = read_json(folder / MANIFEST)
    except CheckpointError as error:
        return [str(error)]
    present = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    found = find_differences(folder, sums)
    unlisted = present.keys() - {*sums, MANIFEST, CARD}
    if unlisted or not sums:
        found.append(f"{folder / MANIFEST}: does not list {', '.join(sorted(unlisted)) or 'any file'}")
    return found


def find_differences(folder: Path, sums: Mapping[str, str]) -> list[str]:
    """Which files that a manifest lists are missing or damaged."""
    found = []
    for name, expected in sums.items():
        if not (folder / name).is_file():
            found.append(f"{folder / name}: missing")
        elif _sha256(folder / name) != expected:
            found.append(f"{folder / name}: damaged, its SHA-256 differs from {MANIFEST}")
    return found


def verify_folder(folder: Path) -> None:
    """Checks every file of a folder against its manifest.

    Raises:
        CheckpointError: everything that `find_damage` reports.
    """
    if found := find_damage(folder):
        raise CheckpointError("\n  ".join(found))


def checkpoints_of(run: Path) -> list[Path]:
    """The complete checkpoint folders of a run, newest first."""
    found = (path for path in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name))
    return sorted(found, key=_cursor, reverse=True)


def _cursor(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def save_checkpoint(
    run: Path, cursor: int, tensors: "dict[str, Tensor]", state: dict, keep: int, writes: bool = True
) -> None:
    """Writes `checkpoints/step-CURSOR/`: tensors (model and optimizer) and JSON state; keeps the last `keep`.

    Args:
        writes: as in `write_atomically`.
    """
    from ..model.tensors import save_tensors

    def fill(folder: Path) -> None:
        save_tensors(tensors, folder / "tensors.safetensors")
        (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")

    written = run / "checkpoints" / f"step-{cursor:06d}"
    write_atomically(written, fill, writes)
    if not writes:
        return
    # one of a later step is what a fallback passed over: damaged, and its steps are being done again
    later = [path for path in checkpoints_of(run) if _cursor(path) > cursor]
    for old in [*later, *[path for path in checkpoints_of(run) if path not in later][keep:]]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(run: Path, say: Callable[[str], None] = print) -> "tuple[Mapping[str, Tensor], dict] | None":
    """Tensors and state of the newest sound checkpoint; damaged ones are named and passed over.

    None if there is no checkpoint at all.

    Raises:
        CheckpointError: every checkpoint is damaged.
    """
    from ..model.tensors import StoredTensors

    found = checkpoints_of(run)
    for folder in found:
        try:
            verify_folder(folder)
            return StoredTensors(folder / "tensors.safetensors"), read_json(folder / "state.json")
        except CheckpointError as error:
            say(f"checkpoint passed over: {error}")
    if found:
        raise CheckpointError(f"{run / 'checkpoints'}: all {len(found)} checkpoints are damaged")
    return None


def find_leftovers(run: Path) -> list[Path]:
    """What an interrupted save left behind: what it was writing (`.tmp`, of a file `.tmp-PID`), what it was replacing
    (`.old`)."""
    return sorted(path for suffix in ("tmp", "tmp-*", "old") for place in (run, run / "checkpoints")
                  for path in place.glob(f"*.{suffix}"))  # fmt: skip


def clean_partial(run: Path) -> None:
    """Removes what an interrupted save left behind."""
    for path in find_leftovers(run):
        target = path.with_suffix("")
        if path.suffix == ".old" and not target.exists():
            path.rename(target)  # the crash fell between the two renames
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
