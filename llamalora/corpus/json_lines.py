"""JSON lines, and the JSON array that some tools write instead."""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice

from .documents import Reading

BEGINS_JSON = re.compile(r'\s*[{[]\s*(["{[\]}]|$)')  # and not as a title in brackets does


def json_head(lines: Iterable[str]) -> str:
    """The beginning of a file, if it is JSON: one line if that may be a value, else up to fifty."""
    lines = iter(lines)
    first = next((line for line in lines if line.strip()), "").strip()
    if not BEGINS_JSON.match(first):
        return ""
    return first if first[-1] in "}]" else "\n".join([first, *islice(lines, 50)])


def json_records(lines: Iterable[tuple[str, str]], name: str, reading: Reading) -> Iterator[tuple[str, object]]:
    """The values of JSON lines, or the items of one JSON array, each with its place; as they come.

    Args:
        lines: each with its `file:line`.
        reading: takes what is no JSON, or holds text that no file can hold.
    """
    lines = iter(lines)
    place, first = next(((where, line) for where, line in lines if line.strip()), ("", ""))
    value = _value(first)
    broken = isinstance(value, ValueError)
    array = isinstance(value, list) and not (value and isinstance(value[0], str))  # or it is a line of spaCy's
    if array or broken and first.lstrip()[:1] in ("[", "{"):
        rest = list(lines)
        value = _value("\n".join([first, *(line for _, line in rest)]))
        if isinstance(value, ValueError) and first.rstrip()[-1] in "}]" and not array:
            lines = iter(rest)  # a first line that is broken
        elif isinstance(value, ValueError):
            reading.faults.append(f"{name}: no JSON ({value})")
            return
        elif isinstance(value, list):
            yield from ((f"{name}: item {number}", item) for number, item in enumerate(value, start=1))
            return
        else:
            yield place, value
            return
    for where, line in chain([(place, first)], lines):
        value = _value(line) if line.strip() else None
        if isinstance(value, ValueError):
            reading.faults.append(f"{where}: no JSON ({value})")
        elif value is not None:
            yield where, value


def _value(text: str) -> object:
    """What the text says, or a ValueError that says what is wrong with it."""
    try:
        value = json.loads(text)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return ValueError("it holds half a character, as \\ud83d is without its other half")
    except RecursionError:
        return ValueError("nested too deep")
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        return ValueError(f"{error.msg} at {at}")
    except ValueError as error:  # a number of too many digits
        return error
    return value
