"""What a corpus format consists of. Each stands in a file, and in the table of `read.py`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .documents import Document


@dataclass(frozen=True)
class Format:
    """How files of a format are known, read and written.

    Attributes:
        name: of the format, as `--from` and `--to` take it.
        endings: of file names that may hold it; the first is what it is written with.
        recognises: whether the lines of a file, of which it reads no more than it must, are of this format.
        read: the documents of `lines, name, reading, reference`: lines with their places, the file's name, what takes
            notes and faults, and the gold documents that predictions are about (see `read_documents`).
        write: takes documents, a text file, and a Counter of what the format could not hold.
        stream: documents without their mentions of `lines, name, reading`, as they come; by default those of `read`.
        whole: it cannot be written piece by piece.
        folder: a corpus is a folder: `read`, `write` and `stream` take its path instead of lines and name, or a file.
    """

    name: str
    endings: tuple[str, ...]
    recognises: Callable[[Iterable[str]], bool]
    read: Callable[..., Iterable[Document]]
    write: Callable[..., None]
    stream: Callable[..., Iterable[Document]] | None = None
    whole: bool = False
    folder: bool = False


def first_line(lines: Iterable[str]) -> str:
    """The first line that is neither blank nor a comment."""
    return next((line for line in lines if line.strip() and not line.startswith("#")), "")
