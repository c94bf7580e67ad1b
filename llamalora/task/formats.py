"""The formats of an answer, a file each. A new one is a file like `tagging.py`, its name in `definition.FORMATS`, and a
line here."""

from collections.abc import Iterable
from typing import Protocol

from ..corpus.documents import Span
from . import extraction, tagging
from .definition import Parsed, Task


class Format(Protocol):
    """What the file of a format holds; `parse` is the inverse of `render`."""

    def instruction(self, task: Task) -> str: ...

    def render(self, task: Task, text: str, spans: Iterable[Span]) -> str: ...

    def parse(self, task: Task, text: str, output: str, truncated: bool = False) -> Parsed: ...


_FORMATS: dict[str, Format] = {"tagging": tagging, "extraction": extraction}


def format_of(task: Task) -> Format:
    """The format that a task asks for."""
    return _FORMATS[task.format]
