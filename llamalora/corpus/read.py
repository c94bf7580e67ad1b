"""Corpus files, whatever their format, and the splits of a corpus folder.

Whatever is wrong with a file is a `CorpusError` that names the file and, where there is one, the line.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from io import BufferedReader
from itertools import chain, tee
from pathlib import Path
from typing import cast

from ..mistakes import wrong_folder
from .conll import CONLL_NAME, ENDINGS, conll_documents, is_conll
from .documents import CorpusError, Document, Documents, Reading, sentence_bounds
from .lines import decoded_lines, read_lines
from .pubtator import is_pubtator, pubtator_documents, pubtator_records


def read_documents(path: str | Path, reference: Sequence[Document] = ()) -> Documents:
    """Reads PubTator (known by its first line, under any name) or CoNLL (known by the ending of its name).

    Args:
        reference: for a file of predictions, the gold documents it is about. PubTator may then lack the text
            lines, and CoNLL, which has no document ids, takes those of the reference in order.

    Raises:
        CorpusError: neither of them, or a file that is malformed, with all that is wrong, or cannot be read.
    """
    path = Path(path)
    lines = (line for _, line in read_lines(path))
    first = next((line for line in lines if line.strip() and not line.startswith("#")), None)
    if first is None:
        raise CorpusError(f"{path}: empty; expected PubTator or CoNLL")
    reading = Reading()
    if is_pubtator(first):
        documents = pubtator_documents(read_lines(path), reading, reference)
    elif CONLL_NAME.search(path.name):
        documents = conll_documents(read_lines(path), str(path), reading, reference)
    else:
        raise CorpusError(
            f"{path}:1: neither PubTator (`id|t|title`) nor, by its name, CoNLL; "
            f"give a CoNLL file one of the endings .{' .'.join(ENDINGS)} (.gz)"
        )
    reading.check()
    return Documents(documents, reading.notes)


def read_splits(folder: str | Path) -> dict[str, Documents]:
    """The splits of a corpus folder, see `find_splits`."""
    return {split: read_documents(path) for split, path in find_splits(folder).items()}


def stream_documents(path: str, notes: Counter[str]) -> Iterator[Document]:
    """The documents of a file or of standard input (`-`), without their mentions, as they come.

    PubTator is known by its first line, CoNLL by its first sentence or its name; in other text each line that is not
    blank is a document, its id the number of the line.

    Args:
        notes: takes the notes of the reading (see `Documents`).

    Raises:
        CorpusError: text that is not UTF-8, or malformed PubTator or CoNLL.
    """
    name = "standard input" if path == "-" else path
    lines = decoded_lines(cast(BufferedReader, sys.stdin.buffer), name) if path == "-" else read_lines(Path(path))
    ahead, lines = tee(lines)
    texts = (line for _, line in ahead)  # read no further than it takes to know the format
    first = next((line for line in texts if line.strip() and not line.startswith("#")), "")
    pubtator = is_pubtator(first)
    named = CONLL_NAME.search(path) and not re.search(r"\.txt(\.gz)?$", path, re.IGNORECASE)
    conll = first and not pubtator and (named or is_conll(chain([first], texts)))
    del ahead, texts  # or they would hold what is read from now on
    reading = Reading(notes)
    if pubtator:
        for record in pubtator_records(lines, reading):
            reading.check()
            if record.text is not None:
                yield Document(record.id, record.text, (), sentence_bounds(record.text))
        reading.check()
    elif conll:
        documents = conll_documents(lines, name, reading)
        reading.check()
        notes["documents read as CoNLL (a token and its tag a line)"] += len(documents)
        yield from (replace(document, spans=()) for document in documents)
    else:
        for number, (_, line) in enumerate(lines, start=1):
            if line.strip():
                yield Document(str(number), line, (), sentence_bounds(line))


_SPLITS = {
    "train": ("training", "train"),
    "dev": ("development", "dev|devel|valid|validation"),
    "test": ("test", "test"),
}


def find_splits(folder: str | Path) -> dict[str, Path]:
    """The files of a corpus folder under `train`, `dev` and `test`, those that there are.

    Raises CorpusError if there is none, or two for one split.
    """
    folder = Path(folder)
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        for split, (official, plain) in _SPLITS.items():
            plain = rf"({plain})\.({'|'.join(ENDINGS)}|pubtator|pubtator\.txt)"
            name = rf"(cdr_{official}set\.pubtator\.txt|{plain})(\.gz)?"
            if not re.fullmatch(name, path.name, re.IGNORECASE):
                continue
            if split in found:
                both = f"{found[split].name} and {path.name}"
                raise CorpusError(f"{folder}: two files for {split}, {both}; keep one")
            found[split] = path
    if not found:
        missing = (
            f"{folder}: no corpus file in it; looked for CDR_TrainingSet.PubTator.txt, "
            "CDR_DevelopmentSet.PubTator.txt, CDR_TestSet.PubTator.txt, or train, dev (devel, "
            f"valid, validation), test with the ending .{' .'.join(ENDINGS)} .PubTator "
            ".PubTator.txt, each also .gz"
        )
        raise CorpusError(wrong_folder(folder, "corpus folder", missing))
    return {split: found[split] for split in _SPLITS if split in found}
