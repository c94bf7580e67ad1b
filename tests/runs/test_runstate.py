"""Checkpoints that a crash at any moment, or a flipped bit, cannot turn into something else."""

import itertools
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from llamalora.errors import RunError
from llamalora.model.tensors import CheckpointError
from llamalora.runs.state import (
    MANIFEST,
    checkpoints_of,
    clean_partial,
    load_checkpoint,
    save_checkpoint,
    verify_folder,
    write_atomically,
)


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"parameter.w": torch.full((3, 4), value), "step.w": torch.tensor(value), "half": torch.ones(2).half()}


def save(run: Path, *cursors: int, keep: int = 9) -> None:
    for cursor in cursors:
        save_checkpoint(run, cursor, tensors(cursor), {"cursor": cursor, "scaler": {"scale": 2.0}}, keep)


def cursor(run: Path, said: list | None = None) -> int:
    """Which checkpoint is loaded; its tensors must be its own."""
    found, state = load_checkpoint(run, [].append if said is None else said.append)
    assert found.keys() == tensors(0).keys()
    for name, tensor in tensors(state["cursor"]).items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
    return state["cursor"]


def flip(path: Path) -> None:
    """One bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- saving ----


def test_what_is_saved_is_loaded(tmp_path):
    assert load_checkpoint(tmp_path) is None
    save(tmp_path, 7)
    assert cursor(tmp_path) == 7
    found, state = load_checkpoint(tmp_path)
    assert state == {"cursor": 7, "scaler": {"scale": 2.0}}
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("*.old"))
    verify_folder(checkpoints_of(tmp_path)[0])


def test_nothing_is_pickled(tmp_path):
    save(tmp_path, 1)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".safetensors", ".json"}


def test_the_newest_is_loaded_and_the_last_are_kept(tmp_path):
    for number in range(1, 7):
        save(tmp_path, 10 * number, keep=3)
        kept = [int(path.name.removeprefix("step-")) for path in checkpoints_of(tmp_path)]
        assert kept == [10 * n for n in range(number, max(0, number - 3), -1)]
        assert cursor(tmp_path) == 10 * number
    save(tmp_path, 70, keep=1)
    assert len(checkpoints_of(tmp_path)) == 1 and cursor(tmp_path) == 70


def test_steps_are_compared_as_numbers(tmp_path):
    save(tmp_path, 999_999, 1_000_000, 1_000_001, keep=2)
    assert cursor(tmp_path) == 1_000_001
    assert len(checkpoints_of(tmp_path)) == 2


def test_the_same_step_can_be_saved_again(tmp_path):
    save(tmp_path, 5)
    save_checkpoint(tmp_path, 5, {"parameter.w": torch.zeros(1)}, {"cursor": "again"}, keep=2)
    assert load_checkpoint(tmp_path)[1] == {"cursor": "again"}
    assert len(checkpoints_of(tmp_path)) == 1


# ---- atomicity ----


def write(value: str):
    def fill(folder: Path) -> None:
        (folder / "a.txt").write_text(value)
        (folder / "inner").mkdir()
        (folder / "inner/b.txt").write_text(value * 2)

    return fill


def test_a_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "best"
    write_atomically(target, write("one"))
    (tmp_path / "best.tmp").mkdir()
    (tmp_path / "best.tmp/stale.txt").write_text("left by a crash")
    write_atomically(target, lambda folder: (folder / "c.txt").write_text("two"))
    assert set(tree(target)) == {"c.txt", MANIFEST}  # no file of the first is left
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_error_while_writing_leaves_the_old_one(error, tmp_path):
    target = tmp_path / "best"
    write_atomically(target, write("one"))
    before = tree(target)

    def crash(folder: Path) -> None:
        (folder / "a.txt").write_text("two")
        raise error("no space left on device")

    with pytest.raises(RunError if error is OSError else error, match="no space left on device"):
        write_atomically(target, crash)
    assert tree(target) == before
    verify_folder(target)
    clean_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert tree(target) == before


def finishes(moment: int, action) -> bool:
    """Runs an action in a process of its own that dies at its `moment`-th call to the file system, if it gets there."""
    child = os.fork()
    if child == 0:
        calls = itertools.count()

        def hook(event: str, arguments) -> None:
            if event.startswith(("open", "os.", "shutil.")) and next(calls) == moment:
                os._exit(9)

        sys.addaudithook(hook)
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_crash_at_any_moment_leaves_the_old_or_the_new(tmp_path):
    outcomes = []
    for moment in range(1000):
        target = tmp_path / str(moment) / "best"
        write_atomically(target, write("one"))
        done = finishes(moment, lambda target=target: write_atomically(target, write("two")))
        clean_partial(target.parent)
        verify_folder(target)
        assert [path.name for path in target.parent.iterdir()] == ["best"]
        outcomes.append((target / "a.txt").read_text())
        assert (target / "inner/b.txt").read_text() == 2 * outcomes[-1]
        if done:
            break
    assert done and outcomes == sorted(outcomes)  # up to some moment the old one, from then on the new one
    assert outcomes.count("one") > 10 and outcomes.count("two") > 1


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_crash_while_a_checkpoint_is_saved_leaves_one_to_load(tmp_path):
    """Even of the only one that is kept; a partial one is no checkpoint, and is cleaned away."""
    loaded, partial = [], 0
    for moment in range(0, 1000, 3):
        run = tmp_path / str(moment)
        save(run, 1)
        done = finishes(moment, lambda run=run: save(run, 2, keep=1))
        loaded.append(cursor(run))
        partial += any((run / "checkpoints").glob("*.tmp"))
        clean_partial(run)
        assert cursor(run) == loaded[-1]
        assert {path.name for path in (run / "checkpoints").iterdir()} <= {"step-000001", "step-000002"}
        if done:
            break
    assert done and loaded == sorted(loaded)
    assert loaded[0] == 1 and loaded[-1] == 2 and partial > 3
    assert len(checkpoints_of(run)) == 1


def test_cleaning_removes_partial_folders_and_finishes_a_replacement(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "checkpoints/step-000003.tmp").mkdir()
    (tmp_path / "best.tmp").mkdir()
    (tmp_path / "best.tmp/half").write_text("x")
    (tmp_path / "checkpoints/step-000002").rename(tmp_path / "checkpoints/step-000002.old")
    write_atomically(tmp_path / "last", write("one"))
    (tmp_path / "last.old").mkdir()
    clean_partial(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "last"}
    assert cursor(tmp_path) == 2
    clean_partial(tmp_path)  # where there is nothing to clean, nothing happens
    assert cursor(tmp_path) == 2


# ---- damage ----

DAMAGE = {
    "bit flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", MANIFEST])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_named_and_the_previous_checkpoint_taken(file, damage, tmp_path):
    save(tmp_path, 1, 2)
    newest = checkpoints_of(tmp_path)[0]
    damage(newest / file)
    # a flipped bit of the manifest makes another file's name or sum wrong
    named = str(newest) if file == MANIFEST and damage is flip else file
    with pytest.raises(CheckpointError, match=named):
        verify_folder(newest)
    said = []
    assert cursor(tmp_path, said) == 1
    assert len(said) == 1 and str(newest) in said[0]


@pytest.mark.parametrize("listed", [[], ["state.json"]])
def test_a_manifest_must_list_every_file(listed, tmp_path):
    """Sums of nothing prove nothing."""
    save(tmp_path, 1, 2)
    newest = checkpoints_of(tmp_path)[0]
    sums = json.loads((newest / MANIFEST).read_text())
    assert sums.keys() == {"state.json", "tensors.safetensors"}
    (newest / MANIFEST).write_text(json.dumps({name: sums[name] for name in listed}))
    flip(newest / "tensors.safetensors")
    said = []
    assert cursor(tmp_path, said) == 1 and "tensors.safetensors" in said[0]


def test_all_damaged_is_an_error(tmp_path):
    save(tmp_path, 1, 2, 3)
    for folder in checkpoints_of(tmp_path):
        flip(folder / "tensors.safetensors")
    said = []
    with pytest.raises(CheckpointError, match="all 3 checkpoints are damaged"):
        load_checkpoint(tmp_path, said.append)
    assert len(said) == 3


@pytest.mark.parametrize("keep", [1, 2])
def test_after_a_fallback_what_is_saved_is_kept(keep, tmp_path):
    """Steps are done again, so their checkpoints are older by number than the damaged one."""
    save(tmp_path, 10, 20)
    flip(tmp_path / "checkpoints/step-000020/tensors.safetensors")
    assert cursor(tmp_path) == 10
    save(tmp_path, 15, keep=keep)
    assert cursor(tmp_path) == 15
