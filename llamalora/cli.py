"""The command line: flags derived from dataclass fields, flags without effect refused, and how a command ends."""

import argparse
import os
import signal
import sys
import textwrap
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, field, fields
from itertools import pairwise
from pathlib import Path
from typing import NoReturn, get_args

from .errors import InputError, RunError
from .files import PACKAGE
from .mistakes import nearest, nearest_path

SCRIPTS = ("train.py", "eval.py")  # of a clone


class UsageError(InputError):
    """A flag whose value cannot be used; the message names the flag and what to do."""


class Parser(argparse.ArgumentParser):
    """A parser whose arguments say which of them were on the command line (`given`), and which refuses with a
    `UsageError`."""

    MAY_BE_EMPTY = ("--probe", "--labels")  # which have a message of their own

    def __init__(self, command: str = "", example: str = "", **how):
        """
        Args:
            command: its name.
            example: flags and arguments that show its use, a line for each call.
        """
        if example:
            calls = "\n".join(f"  %(prog)s {line.strip()}" for line in example.strip().splitlines())
            how["epilog"] = f"for example:\n{calls}" + (f"\n\n{how['epilog']}" if "epilog" in how else "")
        prog = called(command) if command else None
        # or the --rank of `train` would be the --ranks of `tables`
        super().__init__(**{"prog": prog, "allow_abbrev": False, "formatter_class": _Help} | how)
        self.register("type", int, whole_number)
        self.register("type", float, number)

    def parse_args(self, argv: Sequence[str]) -> argparse.Namespace:  # type: ignore[override]
        for before, value in pairwise(["", *argv]):
            if value.startswith("--") and "=" in value:
                before, _, value = value.partition("=")
            if value == "" and before not in self.MAY_BE_EMPTY:
                what = before if before.startswith("--") else "an argument"
                raise UsageError(f"{what} is empty; was a variable of the shell not set?")
        defaults = {action.dest: action.default for action in self._actions if action.dest != "help"}
        # argparse leaves alone what a namespace holds already, so what is still None was not on the command line
        found, unknown = self.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(defaults)))
        if unknown and unknown[0].startswith("-"):
            name = unknown[0].partition("=")[0]
            raise UsageError(f"{name}: no such flag{nearest(name, self._option_string_actions)}")
        if unknown:
            raise UsageError(f"{unknown[0]!r} is one argument too many; --help lists what there is")
        given = {name: value for name, value in vars(found).items() if value is not None}
        return argparse.Namespace(**defaults | given, given=frozenset(given))

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))


class _Help(argparse.HelpFormatter):
    """Fills paragraphs, but leaves examples as they are; numbers are N or X."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.split("\n\n")
        return "\n\n".join(part if "\n  " in part else "\n".join(self._split_lines(part, width)) for part in paragraphs)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)  # flags stay whole

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        kinds = {int: "N", number_or_auto: "N", float: "X"}
        return kinds.get(action.type) or super()._get_default_metavar_for_optional(action)


def called(command: str) -> str:
    """How the user can call a command, judged by how this one was: `llamalora eval`, `python eval.py` beside the
    `train.py` of a clone, else `python -m llamalora eval`."""
    script = Path(sys.argv[0])
    if script.stem == "llamalora":
        return f"llamalora {command}"
    if script.name in SCRIPTS and f"{command}.py" in SCRIPTS:
        return f"python {script.with_name(command)}.py"
    return f"python -m llamalora {command}"


def flag(name: str) -> str:
    """The flag of a setting or an argument: `batch_tokens` -> `--batch-tokens`."""
    return "--" + name.replace("_", "-")


def refuse_idle(arguments: argparse.Namespace, rules: Mapping[str, object]) -> None:
    """Refuses flags that were given although they have no effect.

    Args:
        rules: names of arguments, separated by spaces, and where they have no effect, if that is the case here.

    Raises:
        UsageError: the flags, and where they have no effect.
    """
    for names, where in rules.items():
        idle = [flag(name) for name in names.split() if name in arguments.given]
        if where and idle:
            raise UsageError(f"{', '.join(idle)}: no effect {where}; leave it out")


def check_there(*paths: str) -> None:
    """Refuses files or folders to read that are not there.

    Raises:
        UsageError: the first that is missing, and the nearest that is there.
    """
    for path in paths:
        if not Path(path).exists():
            raise UsageError(f"{path}: no such file or folder{nearest_path(path)}")


def check_new_file(arguments: argparse.Namespace, *names: str) -> None:
    """Refuses places where a page or predictions cannot be written, or would take the place of something else.

    Raises:
        UsageError: the flag and what it may be.
    """
    for name in names:
        given = getattr(arguments, name)
        if given is None:
            continue
        if Path(given).is_dir() or not Path(given).parent.is_dir():
            raise UsageError(f"{flag(name)} {given}: must be a file in a folder that is there")
        if Path(given).suffix in (".json", ".jsonl", ".safetensors", ".model", ".md"):
            raise UsageError(f"{flag(name)} {given}: that is the name of another kind of file; choose another")


def option(default, help: str, choices: tuple | None = None, bare=None, group: str | None = None):
    """A documented dataclass field that becomes a command-line flag, which stands for `bare` if it has no value. With
    it begins, in the help, the `group` of that title."""
    return field(default=default, metadata={"help": help, "choices": choices, "bare": bare, "group": group})


def check_least(values: object, **least: int) -> None:
    """Refuses numbers that are too small, or too large for any count.

    Args:
        values: has the numbers, or `None` or `auto` in their place, as attributes.
        least: by name.

    Raises:
        UsageError: the flag and what it may be.
    """
    for name, bound in least.items():
        value = getattr(values, name)
        if value not in (None, "auto") and not bound <= value < 2**31:
            wanted = f"at least {bound}" if not bound <= value else f"below {2**31:,}"
            raise UsageError(f"{flag(name)} is {value}; it must be {wanted}")


def add_flags(
    parser: argparse._ActionsContainer, cls: type, names: Sequence[str] | None = None, **defaults: object
) -> None:
    """One `--flag` for each field of a dataclass, or for those named, in the groups of their options unless `parser`
    is a group itself; `None` defaults say in their help what they stand for.

    Args:
        defaults: in place of those of the fields.
    """
    group = parser
    for item in fields(cls):
        if item.metadata["group"] and isinstance(parser, argparse.ArgumentParser):
            group = parser.add_argument_group(item.metadata["group"])
        if names is not None and item.name not in names:
            continue
        default, help = defaults.get(item.name, item.default), item.metadata["help"]
        assert default is not MISSING
        if item.type is bool:
            group.add_argument(flag(item.name), action="store_true", help=help)
            continue
        kind = item.type if isinstance(item.type, type) else get_args(item.type)[0]
        if item.type == int | str:
            kind = number_or_auto
        shown = "" if default is None else f" (default: {default})"
        optional = {} if item.metadata["bare"] is None else {"nargs": "?", "const": item.metadata["bare"]}
        group.add_argument(
            flag(item.name), type=kind, default=default, choices=item.metadata["choices"], help=help + shown, **optional
        )


def whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def number_or_auto(text: str) -> int | str:
    return text if text == "auto" else whole_number(text)


def run_command(main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Runs a command and ends it with one message, never a traceback, on what is not its fault.

    Exit codes: 2 for bad input (`InputError`), 1 for work that could not be finished (`RunError`) and for a file that
    cannot be read or written, 130 after Ctrl-C, 143 after SIGTERM.
    """
    with at_once():
        _run(main, sys.argv[1:] if argv is None else argv)


def _run(main: Callable[[list[str]], None], argv: list[str]) -> None:
    # ends as an exception does, so that what has been written in part is removed
    previous = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            main(argv)
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


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_, **__) -> None:
    """Ours as one line, for it is meant for the user; a library's with its place in the source."""
    own = Path(filename).is_relative_to(PACKAGE)
    sys.stderr.write(f"{message}\n" if own else warnings.formatwarning(message, category, filename, lineno))


@contextmanager
def at_once() -> Iterator[None]:
    """Where this is one of several processes, ends it with its exit code, before Python tears itself down.

    Torch keeps the process group, and with it gloo's threads, beyond `destroy_process_group`. One of them that comes to
    free a tensor while the interpreter is torn down aborts the process (CPython ends the thread in the middle of a
    destructor: "terminate called without an active exception"), after all its work was done.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    code = 0
    try:
        yield
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


class Interrupt:
    """Turns SIGTERM and Ctrl-C into a number to look at where work can stop; a second one ends at once, if it comes
    `APART` seconds later: torchrun passes on what a scheduler has sent to all processes already."""

    APART = 1.0

    def __init__(self):
        self.signal = 0
        self.since = 0.0

    def __enter__(self):
        self.previous = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number, frame):
        now = time.monotonic()
        if not self.signal:
            self.signal, self.since = number, now
        elif now - self.since >= self.APART:
            sys.exit(128 + number)

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
