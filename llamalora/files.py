"""Files that a reader never meets half written, and errors that say which file it was."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    partial = path.with_name(path.name + ".tmp")
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
