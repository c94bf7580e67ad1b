"""Command-line flags derived from dataclass fields, and how a command ends on bad input."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, field, fields

from .batch import OverlongError
from .checkpoint import CheckpointError
from .corpus import CorpusError
from .distributed import LostError
from .tokenizer import TokenizerError


class UsageError(ValueError):
    """A flag whose value cannot be used; the message names the flag and what to do."""


BAD_INPUT = (UsageError, CheckpointError, CorpusError, TokenizerError, OverlongError)


def option(default, help: str, choices: tuple | None = None, bare=None):
    """A documented dataclass field that becomes a command-line flag, which stands for `bare` if it has no value."""
    return field(default=default, metadata={"help": help, "choices": choices, "bare": bare})


def add_flags(parser: argparse.ArgumentParser, cls: type, names: Sequence[str] | None = None) -> None:
    """One `--flag` for each field of a dataclass, or for those named; `None` defaults say in their help what they
    stand for."""
    for item in fields(cls):
        if names is not None and item.name not in names:
            continue
        flag = "--" + item.name.replace("_", "-")
        default, help = item.default, item.metadata["help"]
        assert default is not MISSING
        if item.type is bool:
            parser.add_argument(flag, action="store_true", help=help)
            continue
        kind = item.type if isinstance(item.type, type) else item.type.__args__[0]
        if item.type == int | str:
            kind = number_or_auto
        shown = "" if default is None else f" (default: {default})"
        optional = {} if item.metadata["bare"] is None else {"nargs": "?", "const": item.metadata["bare"]}
        parser.add_argument(
            flag, type=kind, default=default, choices=item.metadata["choices"], help=help + shown, **optional
        )


def number_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


def from_flags(cls: type, arguments: argparse.Namespace):
    return cls(**{item.name: getattr(arguments, item.name) for item in fields(cls)})


def run_command(main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Runs a command and ends it with one message, never a traceback, on what is not its fault.

    Exit codes: 2 for bad input, 1 for a file that cannot be read or written and for a lost process, 130 after
    Ctrl-C, 143 after SIGTERM.
    """
    # ends as an exception does, so that what has been written in part is removed
    previous = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        main(sys.argv[1:] if argv is None else argv)
    except BAD_INPUT as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except BrokenPipeError:  # whoever read our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        sys.stderr.write(f"error: {error.filename}: {error.strerror}\n" if error.filename else f"error: {error}\n")
        sys.exit(1)
    except LostError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(128 + signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, previous)


def aligned(rows: list[list[str]], sides: str = "l") -> str:
    """A text table: `l` and `r` say to which side each column leans, those without a letter to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lean = [str.ljust if side == "l" else str.rjust for side in sides.ljust(len(widths), "r")]
    lines = ("  ".join(to(cell, width) for to, cell, width in zip(lean, row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


class Interrupt:
    """Turns SIGTERM and Ctrl-C into a number to look at where work can stop; a second one ends at once."""

    def __init__(self):
        self.signal = 0

    def __enter__(self):
        self.previous = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number, frame):
        if self.signal:
            sys.exit(128 + number)
        self.signal = number

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
