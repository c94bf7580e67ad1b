"""brat standoff: a folder of texts (`.txt`) with annotations beside them (`.ann`, or `.a1` and `.a2`)."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from .documents import CorpusError, Document, Reading, Span, sentence_bounds
from .format import Format
from .lines import read_lines

_ENDINGS = (".ann", ".a1", ".a2")
_MENTION = re.compile(r"T[^\t]*\t(\S+) +(\d+ +\d+(?:; *\d+ +\d+)*) *(?:\t(.*))?")
_OTHERS = {
    "R": "relations", "*": "relations", "E": "events", "A": "attributes", "M": "attributes",
    "N": "normalisations to concepts", "#": "notes of annotators",
}  # fmt: skip


def is_brat(folder: Path) -> bool:
    """Whether a folder has annotations in it, or in its folders."""
    return folder.is_dir() and any(path.suffix in _ENDINGS for path in _files(folder))


def _files(folder: Path) -> Iterator[Path]:
    """The files of a folder and its folders, but what a killed process left half written (see `files.new_folder`).

    Raises:
        CorpusError: a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise CorpusError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions") from error

    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not re.search(r"\.tmp-\d+$", name)]
        yield from (Path(place, name) for name in names)


def brat_documents(folder: Path, reading: Reading, reference: Sequence[Document] = ()) -> Iterator[Document]:
    """The texts of a folder and its folders with the mentions beside them; ids are their paths without `.txt`.

    A mention in several parts is read from the first to the last. Relations, events, attributes, normalisations and
    notes are not read.

    Args:
        reading: takes notes, and what is wrong with single lines.

    Raises:
        CorpusError: there is no text, or one that cannot be read or is not UTF-8.
    """
    for path in sorted(_files(folder)):
        if path.suffix in _ENDINGS and not path.name.startswith(".") and not path.with_suffix(".txt").is_file():
            reading.faults.append(
                f"{path}: there is no {path.with_suffix('.txt').name} beside it, whose text it is about"
            )
    for path, id, text in _texts(folder):
        beside = [path.with_suffix(suffix) for suffix in _ENDINGS if path.with_suffix(suffix).is_file()]
        if not beside:
            reading.notes["texts with no .ann beside them, read as without mentions"] += 1
        lines = [(where, line) for file in beside for where, line in read_lines(file) if line.strip()]
        (usual, _), *others = _ways_to_count(text)
        document, own = _document(id, usual, lines)
        for counted, note in others if own.faults else ():
            another, found = _document(id, counted, lines)
            if not found.faults:
                document, own = another, found
                reading.notes[note] += 1
                break
        reading.notes.update(own.notes)
        reading.faults += own.faults
        yield document


def brat_texts(folder: Path, reading: Reading) -> Iterator[Document]:
    """The texts alone."""
    for _, id, text in _texts(folder):
        (usual, _), *_ = _ways_to_count(text)
        yield Document(id, usual, (), sentence_bounds(usual))


def _texts(folder: Path) -> Iterator[tuple[Path, str, str]]:
    """File, id and text of each document."""
    paths = sorted(path for path in _files(folder) if path.suffix == ".txt" and not path.name.startswith("."))
    if not paths:
        raise CorpusError(f"{folder}: no text in it; a folder of brat's has a .txt file for each document")
    for path in paths:
        yield path, path.relative_to(folder).with_suffix("").as_posix(), _text(path)


def _ways_to_count(text: str) -> Iterator[tuple[str, str]]:
    """The text with what may count as its characters, the usual first, and a note on each of the others."""
    plain = text.removeprefix("\ufeff")
    yield plain, ""
    if plain != text:
        yield text, "texts whose byte order mark counts as a character"
    if "\r\n" in text:
        yield plain.replace("\r\n", "\n"), "texts whose line ends (CR LF) count as one character"


def _document(id: str, text: str, lines: Iterable[tuple[str, str]]) -> tuple[Document, Reading]:
    reading = Reading()
    document = Document(id, text, (), sentence_bounds(text))
    spans = {_mention(where, line, document, reading) for where, line in lines}
    return Document(id, text, tuple(sorted(filter(None, spans))), document.sentences), reading


def _text(path: Path) -> str:
    """The text as it stands, with its line ends, since offsets count them."""
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8") from error


def _mention(where: str, line: str, document: Document, reading: Reading) -> Span | None:
    if line[0] in _OTHERS:
        reading.notes[f"{_OTHERS[line[0]]}, not read"] += 1
        return None
    match = _MENTION.fullmatch(line)
    if not match:
        form = "T1, a tab, `label start end`, a tab, text"
        reading.faults.append(f"{where}: no mention ({form}), nor what else brat writes")
        return None
    label, places, written = match.groups()
    parts = [(int(start), int(end)) for start, end in (place.split() for place in places.split(";"))]
    start, end, written = reading.joined(document.text, parts, written)
    return reading.mention(where, document, start, end, label, written)


# ---- writing ----


def write_brat(documents: Iterable[Document], folder: Path, lost: Counter[str]) -> None:
    """Writes a text and its annotations for each document, under its id.

    Args:
        folder: is there.
        lost: takes what cannot be written: whitespace in a label becomes `_`.

    Raises:
        CorpusError: an id that is no path inside the folder.
    """
    for document in documents:
        if not all(re.fullmatch(r"[^./\\\0][^/\\\0]{0,199}", part) for part in document.id.split("/")):
            raise CorpusError(f"{document.id!r}: an id that cannot be the name of a file in a folder of brat's")
        path = folder / f"{document.id}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(document.text.encode())
        lines = []
        for number, span in enumerate(document.spans, start=1):
            label = re.sub(r"\s+", "_", span.label)
            lost["mentions in whose label a space became _"] += label != span.label
            # a mention that goes on in the next line is one in two parts
            lines_of = re.finditer(r"[^\r\n]+", document.text[span.start : span.end])
            parts = [(span.start + part.start(), span.start + part.end(), part[0]) for part in lines_of]
            places = ";".join(f"{start} {end}" for start, end, _ in parts)
            lines.append(f"T{number}\t{label} {places}\t{' '.join(part for _, _, part in parts)}\n")
        path.with_suffix(".ann").write_bytes("".join(lines).encode())


BRAT = Format("brat", (), lambda lines: False, brat_documents, write_brat, brat_texts, folder=True)
