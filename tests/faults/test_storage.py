"""Full disks, read-only folders, and files that were damaged after they had been written."""

import json
import os
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
from faulty import assert_same, cut_off, run

import eval as evaluation
from llamalora import __main__ as commands
from llamalora.cli import called
from llamalora.runs.state import verify_folder

pytestmark = pytest.mark.slow


def changed(data: bytes, place: str, how: str) -> bytes:
    """One byte flipped or left out."""
    at = {"head": 0, "middle": len(data) // 2, "tail": len(data) - 1}[place]
    return data[:at] + (bytes([data[at] ^ 1]) if how == "flipped" else b"") + data[at + 1 :]


DAMAGE = [
    pytest.param(file, place, how, marks=() if (file, place) == quick and how == "flipped" else pytest.mark.faults)
    for file, quick in (
        ("tensors.safetensors", ("tensors.safetensors", "middle")),
        ("state.json", ("state.json", "tail")),
        ("manifest.json", ("manifest.json", "head")),
    )
    for place in ("head", "middle", "tail")
    for how in ("flipped", "cut")
]


@pytest.fixture
def copied(tmp_path, whole):
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.mark.parametrize("file, place, how", DAMAGE)
def test_damaged_checkpoint(file, place, how, copied, flags, whole):
    """one byte flipped or cut at head, middle or tail of each file of the newest checkpoint | `verify` and --resume
    name it; the previous one is taken; the end is bitwise the same"""
    newest = copied / "checkpoints/step-000020"
    (newest / file).write_bytes(changed((newest / file).read_bytes(), place, how))
    code, output = run(copied.with_name("log"), ["verify", copied], main=commands.main)
    assert code == 1 and "checkpoints/step-000020 " in output and "from checkpoints/step-000016" in output, output
    # of a manifest, the names and sums in it are what may be wrong
    assert (str(newest) if file == "manifest.json" else str(newest / file)) in output
    code, output = run(copied.with_name("log"), [*flags, "--out", copied, "--resume"])
    assert code == 0 and f"checkpoint passed over: {newest}" in output and "resuming after step 16" in output, output
    assert_same(copied, whole)


@pytest.mark.parametrize("place", ["middle", *(pytest.param(p, marks=pytest.mark.faults) for p in ("head", "tail"))])
@pytest.mark.parametrize("how", ["flipped", "cut"])
def test_damaged_model(place, how, copied):
    """one byte flipped or cut in the saved adapter | named by `verify`, refused by eval.py with exit code 2"""
    path = copied / "best/adapter_model.safetensors"
    path.write_bytes(changed(path.read_bytes(), place, how))
    for main, argv, expected in ((commands.main, ["verify", copied], 1), (evaluation.main, ["--run", copied], 2)):
        code, output = run(copied.with_name("log"), argv, main=main)
        assert code == expected and f"{path}: damaged" in output and "Traceback" not in output, output
    code, output = run(copied.with_name("log"), ["verify", copied], main=commands.main)
    assert "writes it anew" not in output and f"restore best from a copy; {called('eval')} --run {copied}" in output
    code, output = run(copied.with_name("log"), ["--run", copied, "--which", "last"], main=evaluation.main)
    assert code == 0, output


def test_everything_damaged_is_listed(copied):
    """several files damaged, missing and added | `verify` names all of them; its JSON says the same"""
    newest = copied / "checkpoints/step-000020"
    (newest / "state.json").unlink()
    (newest / "tensors.safetensors").write_bytes(b"")
    (newest / "stranger").touch()
    (copied / "checkpoints/step-000024.tmp").mkdir()
    code, output = run(copied.with_name("log"), ["verify", copied], main=commands.main)
    assert code == 1 and "1 of 4 saved folders is damaged" in output, output
    for words in ("state.json: missing", "tensors.safetensors: damaged", "does not list stranger", "step-000024.tmp"):
        assert words in output
    code, output = run(copied.with_name("log"), ["verify", copied, "--json"], main=commands.main)
    report = json.loads(output)
    assert code == 1 and not report["sound"] and len(report["folders"][0]["damage"]) == 3
    assert report["resume"] == "checkpoints/step-000016"
    assert list(report["leftovers"]) == ["checkpoints/step-000024.tmp"]


def test_a_sound_run_and_no_run(copied, tmp_path):
    code, output = run(tmp_path / "log", ["verify", copied], main=commands.main)
    assert code == 0 and "all 4 saved folders are sound" in output, output
    code, output = run(tmp_path / "log", ["verify", tmp_path], main=commands.main)
    assert code == 2 and f"{tmp_path}/config.json: no such file" in output, output
    (copied / "config.json").write_text("{")
    code, output = run(tmp_path / "log", ["verify", copied], main=commands.main)
    assert code == 1 and "config.json DAMAGED" in output, output


# ---- disks that are full, or cannot be written ----


def mount(target: Path, *options: str) -> None:
    done = subprocess.run(["mount", *options, str(target)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mount: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path):
    """A file system of its own; unmounted at the end."""
    target = tmp_path / "disk"
    target.mkdir()
    mount(target, "-t", "tmpfs", "-o", "size=16m", "tmpfs")
    yield target
    subprocess.run(["umount", str(target)], check=True)


@pytest.mark.parametrize("kib", [64, *(pytest.param(size, marks=pytest.mark.faults) for size in (0, 4, 16, 128))])
def test_full_disk(kib, disk, flags, whole):
    """a disk with 0 to 128 KiB left (tmpfs) | exit code 1 and the file named, no traceback, the old checkpoint
    sound; resumed with room: bitwise"""
    folder = disk / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints/step-000020")
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "ballast").write_bytes(bytes(free - 1024 * kib))
    code, output = run(disk.with_name("log"), [*flags, "--out", folder, "--resume"])
    assert code == 1 and f"error: {folder}" in output and "No space left" in output, output
    assert "Traceback" not in output
    verify_folder(folder / "checkpoints/step-000016")
    (disk / "ballast").unlink()
    code, output = run(disk.with_name("log"), [*flags, "--out", folder, "--resume"])
    assert code == 0, output
    assert_same(folder, whole)


@pytest.mark.parametrize("size", [20_000, *(pytest.param(size, marks=pytest.mark.faults) for size in (0, 500, 5_000))])
def test_files_that_cannot_grow(size, tmp_path, flags, whole):
    """writes that fail from some size on (RLIMIT_FSIZE), from the start of a run | exit code 1 and the file
    named, no traceback; then done with room: bitwise"""
    folder = tmp_path / "run"
    started = _limited(tmp_path / "log", [*flags, "--out", folder], size)
    assert f"error: {folder}" in started and "Traceback" not in started, started
    extra = ["--resume"] if (folder / "config.json").exists() else []
    code, output = run(tmp_path / "log", [*flags, "--out", folder, *extra])
    assert code == 0, output
    assert_same(folder, whole)


def _limited(log: Path, argv: list, size: int) -> str:
    """What a run says on standard error, which goes to a pipe: the limit holds for its log as well."""
    read, write = os.pipe()
    code, _ = run(log, argv, fault=partial(_to_pipe, size, f"/proc/{os.getpid()}/fd/{write}"))
    os.close(write)
    with os.fdopen(read) as pipe:
        assert code == 1
        return pipe.read()


def _to_pipe(size: int, pipe: str) -> None:
    os.dup2(os.open(pipe, os.O_WRONLY), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    cut_off(size, dies=False)


def test_a_volume_that_is_empty_is_filled(disk, whole):
    """A mount point, which no folder can be renamed onto."""
    code, output = run(disk.with_name("log"), ["merge", "--run", whole, "--out", disk], main=commands.main)
    assert code == 0 and (disk / "config.json").is_file() and not list(disk.glob("*tmp*")), output


def test_read_only(disk, flags, whole):
    """a folder that cannot be written (mounted read-only) | exit code 2 for a new run, 1 for one that is resumed, the
    path named, no traceback"""
    folder = disk / "run"
    shutil.copytree(whole, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    mount(disk, "-o", "remount,ro")
    for expected, named, argv in (
        (2, f"error: --out {disk / 'new'}: ", ["--out", disk / "new"]),
        (1, f"error: {folder}", ["--out", folder, "--resume"]),
    ):
        code, output = run(disk.with_name("log"), [*flags, *argv])
        assert code == expected and named in output and "Read-only" in output, output
        assert "Traceback" not in output
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
