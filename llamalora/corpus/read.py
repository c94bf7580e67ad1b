"""Corpus files, whatever their format, and the splits of a corpus folder.

Whatever is wrong with a file is a `CorpusError` that names the file and, where there is one, the line.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from io import BufferedReader
from itertools import tee
from pathlib import Path
from typing import cast

from ..mistakes import wrong_folder
from .bioc import BIOC, BIOC_JSON
from .brat import BRAT, brat_texts, is_brat
from .conll import CONLL, CONLL_NAME
from .documents import CorpusError, Document, Documents, Reading, sentence_bounds, told
from .format import Format
from .hugging_face import TOKENS
from .json_lines import BEGINS_JSON
from .lines import decoded_lines, read_lines
from .pubtator import PUBTATOR
from .spans import SPANS

# By name; a file is of the first that recognises it.
FORMATS = {form.name: form for form in (PUBTATOR, BIOC, BIOC_JSON, TOKENS, SPANS, BRAT, CONLL)}


def read_documents(path: str | Path, reference: Sequence[Document] = (), form: Format | None = None) -> Documents:
    """Reads a corpus file, or a folder of brat's.

    Args:
        reference: for a file of predictions, the gold documents it is about. PubTator may then lack the text
            lines, and formats whose documents have no ids take those of the reference in order.
        form: of the file; otherwise it is known by the file's beginning or, CoNLL, by the ending of its name.

    Raises:
        CorpusError: none of the formats, or a file that is malformed, with all that is wrong, or cannot be read.
    """
    path = Path(path)
    form = form or format_of(path)
    reading = Reading()
    if form.folder:
        documents = list(form.read(path, reading, reference))
    else:
        documents = list(form.read(read_lines(path), str(path), reading, reference))
    reading.check()
    if not documents:
        raise CorpusError(f"{path}: holds no document" + "".join(f"; {note}" for note in told(reading.notes)))
    return Documents(documents, reading.notes)


def format_of(path: Path) -> Format:
    """The format of a corpus file or folder.

    Raises:
        CorpusError: it is none that is known, or cannot be read.
    """
    if is_brat(path):
        return BRAT
    form, lines = _recognised(read_lines(path))
    if form not in (None, CONLL):
        return form
    if all(not line.strip() or line.startswith("#") for _, line in lines):
        raise CorpusError(f"{path}: empty; expected PubTator, CoNLL or another format of {', '.join(FORMATS)}")
    if CONLL_NAME.search(path.name):
        return CONLL
    raise CorpusError(
        f"{path}:1: neither PubTator (`id|t|title`), BioC, JSON with texts or tokens nor, by its name, CoNLL; "
        f"give a CoNLL file one of the endings .{' .'.join(CONLL.endings)} (.gz)"
    )


def _recognised(lines: Iterator[tuple[str, str]]) -> tuple[Format | None, Iterator[tuple[str, str]]]:
    """The format of lines by their beginning, and the lines once more; read no further than it takes."""
    ahead, lines = tee(lines)
    for form in FORMATS.values():
        ahead, look = tee(ahead)
        if form.recognises(line for _, line in look):
            return form, lines
    return None, lines


def read_splits(folder: str | Path) -> dict[str, Documents]:
    """The splits of a corpus folder, see `find_splits`."""
    return {split: read_documents(path) for split, path in find_splits(folder).items()}


def stream_documents(path: str, notes: Counter[str], form: Format | None = None) -> Iterator[Document]:
    """The documents of a file, of a folder of brat's or of standard input (`-`), without their mentions, as they come.

    Formats are known by their beginning, CoNLL also by its name; in other text each line that is not blank is a
    document, its id the number of the line.

    Args:
        notes: takes the notes of the reading (see `Documents`).
        form: of the file, if that is known.

    Raises:
        CorpusError: text that is not UTF-8, or malformed.
    """
    reading = Reading(notes)
    if form is BRAT or Path(path).is_dir():
        yield from _checked(brat_texts(Path(path), reading), reading)
        return
    name = "standard input" if path == "-" else path
    lines = decoded_lines(cast(BufferedReader, sys.stdin.buffer), name) if path == "-" else read_lines(Path(path))
    known, lines = (form, lines) if form else _recognised(lines)
    if known is None and CONLL_NAME.search(path) and not re.search(r"\.txt(\.gz)?$", path, re.IGNORECASE):
        known = CONLL
    if known is None:
        lines = _running_text(lines, name)
        for number, (_, line) in enumerate(lines, start=1):
            if line.strip():
                yield Document(str(number), line, (), sentence_bounds(line))
        return
    found = known.stream(lines, name, reading) if known.stream else known.read(lines, name, reading, ())
    for document in _checked(found, reading):
        if known is CONLL:
            notes["documents read as CoNLL (a token and its tag a line)"] += 1
        yield document


def _running_text(lines: Iterator[tuple[str, str]], name: str) -> Iterator[tuple[str, str]]:
    """The lines, which are of no format that is known.

    Raises:
        CorpusError: they are JSON or XML, by the file's name or their beginning, and so no text to read line by line.
    """
    ahead, lines = tee(lines)
    first = next((line for _, line in ahead if line.strip()), "")
    by_name = re.search(r"\.(json|jsonl|ndjson|xml|bioc)(\.gz)?$", name, re.IGNORECASE)
    if by_name or BEGINS_JSON.match(first) or re.match(r"\s*<(\?xml|!DOCTYPE)", first):
        raise CorpusError(f"{name}: JSON or XML of no known format; write its texts as lines, or as PubTator or BioC")
    return lines


def _checked(documents: Iterable[Document], reading: Reading) -> Iterator[Document]:
    """The documents without their mentions, as long as there is no fault."""
    for document in documents:
        reading.check()
        yield replace(document, spans=())
    reading.check()


_SPLITS = {
    "train": ("training", "train"),
    "dev": ("development", "dev|devel|valid|validation"),
    "test": ("test", "test"),
}
_ENDINGS = tuple(dict.fromkeys(ending for form in FORMATS.values() for ending in form.endings))


def find_splits(folder: str | Path) -> dict[str, Path]:
    """The files of a corpus folder under `train`, `dev` and `test`, those that there are; of brat they are folders.

    Raises CorpusError if there is none, or two for one split.
    """
    folder = Path(folder)
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        for split, (official, plain) in _SPLITS.items():
            name = rf"(cdr_{official}set\.pubtator\.txt|({plain})\.({'|'.join(map(re.escape, _ENDINGS))}))(\.gz)?"
            if path.is_dir():
                name = rf"{official}|{plain}"
            if not re.fullmatch(name, path.name, re.IGNORECASE) or path.is_dir() and not is_brat(path):
                continue
            if split in found:
                both = f"{found[split].name} and {path.name}"
                raise CorpusError(f"{folder}: two files for {split}, {both}; keep one")
            found[split] = path
    if not found:
        missing = (
            f"{folder}: no corpus file in it; looked for CDR_TrainingSet.PubTator.txt, "
            "CDR_DevelopmentSet.PubTator.txt, CDR_TestSet.PubTator.txt, or train, dev (devel, "
            f"valid, validation), test with the ending .{' .'.join(_ENDINGS)}, each also .gz, or as folders of brat's"
        )
        raise CorpusError(wrong_folder(folder, "corpus folder", missing))
    return {split: found[split] for split in _SPLITS if split in found}
