"""Command-line flags derived from dataclass fields, and how a command ends on bad input."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import MISSING, field, fields

from .adapter import CheckpointError
from .batch import OverlongError
from .corpus import CorpusError
from .tokenizer import TokenizerError


class UsageError(ValueError):
    """A flag whose value cannot be used; the message names the flag and what to do."""


BAD_INPUT = (UsageError, CheckpointError, CorpusError, TokenizerError, OverlongError)


def option(default, help: str, choices: tuple | None = None):
    """A documented dataclass field that becomes a command-line flag."""
    return field(default=default, metadata={"help": help, "choices": choices})


def add_flags(parser: argparse.ArgumentParser, cls: type) -> None:
    """One `--flag` for each field of a dataclass; `None` defaults say in their help what they stand for."""
    for item in fields(cls):
        flag = "--" + item.name.replace("_", "-")
        default, help = item.default, item.metadata["help"]
        assert default is not MISSING
        if item.type is bool:
            parser.add_argument(flag, action="store_true", help=help)
            continue
        kind = item.type if isinstance(item.type, type) else item.type.__args__[0]
        shown = "" if default is None else f" (default: {default})"
        parser.add_argument(flag, type=kind, default=default, choices=item.metadata["choices"], help=help + shown)


def from_flags(cls: type, arguments: argparse.Namespace):
    return cls(**{item.name: getattr(arguments, item.name) for item in fields(cls)})


def run_command(main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Runs a command; bad input ends it with one message and exit code 2."""
    try:
        main(sys.argv[1:] if argv is None else argv)
    except BAD_INPUT as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
