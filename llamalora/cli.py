"""Command-line flags derived from dataclass fields, and how a command ends on bad input."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, field, fields

from .errors import InputError, RunError


class UsageError(InputError):
    """A flag whose value cannot be used; the message names the flag and what to do."""


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

    Exit codes: 2 for bad input (`InputError`), 1 for work that could not be finished (`RunError`) and for a file that
    cannot be read or written, 130 after Ctrl-C, 143 after SIGTERM.
    """
    # ends as an exception does, so that what has been written in part is removed
    previous = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        main(sys.argv[1:] if argv is None else argv)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except BrokenPipeError:  # whoever read our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        sys.stderr.write(f"error: {error.filename}: {error.strerror}\n" if error.filename else f"error: {error}\n")
        sys.exit(1)
    except RunError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(128 + signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, previous)


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
