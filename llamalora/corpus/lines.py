"""The lines of text files, gzipped or not, each with the place at which it stands."""

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator
from io import BufferedReader
from pathlib import Path

from .documents import CorpusError


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """`decoded_lines` of a file.

    Raises:
        CorpusError: as there, or a file that cannot be read.
    """
    try:
        with path.open("rb") as file:
            yield from decoded_lines(file, str(path))
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def decoded_lines(file: BufferedReader, name: str) -> Iterator[tuple[str, str]]:
    """The lines of UTF-8 text, gzipped or not, each with its `name:number`, without their ends (LF, CRLF or CR) and
    without a BOM. They are not cut at other characters that may stand inside a text, such as U+2028.

    Raises:
        CorpusError: a damaged gzip file, or bytes that are not UTF-8.
    """
    start = number = 0  # of the line: its first byte, its number
    try:
        packed = file.peek(2)[:2] == b"\x1f\x8b"
        blocks: Iterable[bytes] = gzip.GzipFile(fileobj=file) if packed else file
        for block in blocks:
            for line in filter(None, re.split(rb"(?<=\r)(?!\r*\n)", block)):
                number += 1
                try:
                    text = line.decode()
                except UnicodeDecodeError as error:
                    raise CorpusError(
                        f"{name}:{number}: byte {start + error.start} ({line[error.start]:#04x}) is not UTF-8; "
                        "convert the file to UTF-8"
                    ) from error
                start += len(line)
                yield f"{name}:{number}", text.rstrip("\r\n").removeprefix("\ufeff")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CorpusError(f"{name}: a truncated or damaged gzip file ({error}); fetch it again") from error
