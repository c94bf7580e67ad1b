"""Files that a reader never meets half written, and errors that say which file it was."""

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import TextIO

PACKAGE = Path(__file__).resolve().parent
BUILT_IN = ("weights/tiny", "data/sample")


def built_in(name: str) -> Path:
    """Where one of `BUILT_IN` is: a wheel carries them inside the package, a clone has them beside it."""
    inside = PACKAGE / name
    return inside if inside.exists() else PACKAGE.parent / name


def search_places() -> tuple[Path, ...]:
    """Where weights/ and data/ that the user has filled are looked for: the working folder, then the clone that the
    package runs from, if it does."""
    return (Path.cwd(),) if (PACKAGE / "weights").exists() else (Path.cwd(), PACKAGE.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives an `OSError` the name of the file: the system knows it where a file is opened, not where the disk is
    found to be full."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def replace_file(path: Path, text: str) -> Path:
    """Writes a text file whole, or leaves what was there.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with naming(path):
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            return partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def write_json(value: dict, path: Path) -> Path:
    """`replace_file` with indented JSON, but each list of numbers, like the counts of a document, on one line."""
    text = re.sub(r"\[[-+.\de\s,]*\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), json.dumps(value, indent=2))
    return replace_file(path, text + "\n")


@contextmanager
def new_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """A folder that becomes `target` when the block ends, or is gone if the block fails.

    It stands beside `target` and takes its place. Where an empty folder is there, which may be a mount point or the
    folder that a shell stands in, it stands inside, and what it holds moves up: a model's `config.json` last, without
    which the rest is none. A process that is killed leaves a `NAME.tmp-PID`.

    Args:
        replace: a folder that is there gives way. Between two renames it is called `NAME.old`, and the new one until
            then `NAME.tmp`, so that both are found again after a crash. Only one process may do this at a time.

    Raises:
        OSError: it cannot be written, or `target` is there; what was there is as it was.
    """
    given, target = target, target.absolute() if replace else Path(os.path.realpath(target))
    inside = target.is_dir() and not replace
    partial = target.with_name(f"{target.name}.tmp" if replace else f"{target.name}.tmp-{os.getpid()}")
    partial = target / partial.name if inside else partial
    replaced = target.with_name(f"{target.name}.old")
    made = [folder for folder in target.parents if not folder.exists()]
    moved: list[Path] = []
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if replace:
            shutil.rmtree(replaced, ignore_errors=True)
            if target.exists():
                target.rename(replaced)
        if inside:
            if len(list(target.iterdir())) > 1:
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(given))
            for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
                moved.append(target / path.name)
                path.rename(moved[-1])
            partial.rmdir()
        else:
            partial.rename(target)
    except BaseException as error:
        for path in (partial, *moved):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        if replace and replaced.exists() and not target.exists():
            replaced.rename(target)
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError) and str(error.filename or partial).startswith(str(partial)):
            raise OSError(error.errno, error.strerror or str(error), str(given)) from None
        raise
    sync(target if inside else target.parent)
    if replace:
        shutil.rmtree(replaced, ignore_errors=True)


def why_not_new(folder: Path) -> str | None:
    """Why `new_folder` cannot write there."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        return "exists and is not an empty folder"
    return why_not_written(folder)


def why_not_written(folder: Path) -> str | None:
    """Why nothing can be written to a folder, which may be new: found out by trying."""
    target = Path(os.path.realpath(folder))
    if target.is_symlink():
        return "is a link that leads back to itself"
    above = next(path for path in (target, *target.parents) if path.exists())
    if not above.is_dir():
        return f"{above} is a file"
    try:
        TemporaryFile(dir=above).close()
    except OSError as error:
        return f"{above} cannot be written to ({error.strerror})"
    return None


def lock_file(path: Path) -> TextIO | None:
    """The file, which is made if need be, locked for as long as it is open, so that a process that is killed leaves no
    lock behind; None if another process has it open so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
