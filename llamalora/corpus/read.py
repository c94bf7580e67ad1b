"""Corpus files, whatever their format, and the splits of a corpus folder.

Whatever is wrong with a file is a `CorpusError` that names the file and, where there is one, the line.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from ..mistakes import wrong_folder
from .conll import CONLL_NAME, read_conll
from .documents import CorpusError, Document, sentence_bounds
from .lines import decoded_lines, read_lines
from .pubtator import _without_title, is_pubtator, pubtator_records, read_pubtator


def read_documents(path: str | Path, reference: Sequence[Document] = ()) -> list[Document]:
    """Reads PubTator (known by its first line, under any name) or CoNLL (.tsv .conll .iob .bio .txt, or .gz).

    Args:
        reference: for a file of predictions, the gold documents it is about. PubTator may then lack the text
            lines, and CoNLL, which has no document ids, takes those of the reference in order.

    Raises:
        CorpusError: neither of them, or a file that is malformed or cannot be read.
    """
    path = Path(path)
    first = next((line for _, line in read_lines(path) if line.strip()), None)
    if first is None:
        raise CorpusError(f"{path}: empty; expected PubTator or CoNLL")
    if is_pubtator(first):
        return read_pubtator(path, reference)
    if CONLL_NAME.search(path.name):
        return read_conll(path, reference)
    raise CorpusError(
        f"{path}:1: neither PubTator (`id|t|title`) nor, by its name, CoNLL; "
        "give a CoNLL file one of the endings .tsv .conll .iob .bio .txt (.gz)"
    )


def stream_documents(path: str) -> Iterator[Document]:
    """The documents of a file or of standard input (`-`), without their mentions, as they come.

    PubTator is known by its first line; in other text each line that is not blank is a document, its id the number
    of the line.

    Raises:
        CorpusError: text that is not UTF-8, or malformed PubTator.
    """
    lines = decoded_lines(sys.stdin.buffer, "standard input") if path == "-" else read_lines(Path(path))
    first = next(lines, None)
    if first is None:
        return
    lines = chain([first], lines)
    if is_pubtator(first[1]):
        for record in pubtator_records(lines):
            if record.text is None:
                raise _without_title(record.where, record.id)
            yield Document(record.id, record.text, (), sentence_bounds(record.text))
        return
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
            plain = rf"({plain})\.(tsv|conll|iob|bio|txt|pubtator|pubtator\.txt)"
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
            "valid, validation), test with the ending .tsv .conll .iob .bio .txt .PubTator "
            ".PubTator.txt, each also .gz"
        )
        raise CorpusError(wrong_folder(folder, "corpus folder", missing))
    return {split: found[split] for split in _SPLITS if split in found}
