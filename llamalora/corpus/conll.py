"""CoNLL: one token and its tag a line."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from pathlib import Path
from typing import TextIO

from .documents import CorpusError, Document, Reading, Span
from .format import Format
from .tagged import UNNAMED, laid_out, mentions_of, named, tagged, tags_of

ENDINGS = ("conll", "tsv", "conllu", "iob", "iob2", "bio", "bioes", "bmes", "txt")
CONLL_NAME = re.compile(rf"\.({'|'.join(ENDINGS)})(\.gz)?$", re.IGNORECASE)
# Phrases, which the third column of CoNLL-2003 holds. Beside a column of entities they are no entities.
_PHRASES = set("NP VP PP ADVP ADJP SBAR PRT CONJP INTJ LST UCP NC VC PC".split())


@dataclass
class _Row:
    """A line that holds a token: where it stands, and its columns."""

    where: str
    columns: list[str]


def conll_documents(
    lines: Iterable[tuple[str, str]], name: str, reading: Reading, reference: Sequence[Document] = ()
) -> list[Document]:
    """Parses CoNLL: a token and its tag a line, tabs or spaces between columns. A blank line ends a sentence.

    The tags stand in the last column. Further columns of tags are further layers of mentions, unless they are phrases;
    a cell may hold several tags (`B-X|B-Y`). Numbers before the token that count tokens or sentences are skipped, and
    so are comments (`# ...`). `-DOCSTART-` lines separate documents; without them each sentence is one. The text is
    the tokens joined by single spaces. Ids are the path's stem and a running number (`dev-17`), or those of the
    `reference` in order (see `read_documents`).

    Args:
        lines: each with its `file:line`.
        reading: takes notes, and what is wrong with single lines.

    Raises:
        CorpusError: no sentence, or more documents than the reference has.
    """
    groups = _grouped(lines, reading)
    if not groups:
        raise CorpusError(f"{name}: no sentence in it; a line holds a token and its tag")
    if reference and len(groups) > len(reference):
        raise CorpusError(
            f"{name}: {len(groups)} documents for {len(reference)} in the gold; "
            "predictions must keep the documents of the gold in their order"
        )
    sentences = [sentence for group in groups for sentence in group]
    _skip_numbers(sentences, reading)
    if _skip_names(sentences, reading):
        _skip_numbers(sentences, reading)
    _name_tags(sentences, reading)
    layers = _layers([row for sentence in sentences for row in sentence], name, reading)
    stem = CONLL_NAME.sub("", Path(name).name)
    ids = [document.id for document in reference] or [f"{stem}-{index + 1}" for index in range(len(groups))]
    return [_document(id, group, layers, reading) for id, group in zip(ids, groups, strict=False)]


def is_conll(lines: Iterable[str]) -> bool:
    """Whether the first sentence of a file is one of tokens with tags. Reads no further than it has to."""
    widths: list[int] = []
    tabs = False
    for line in lines:
        columns = _split(line)
        if not line.strip():
            if widths:
                break
        elif line.startswith("#") or "-DOCSTART-" in columns[:2]:
            continue
        elif not any(map(tags_of, columns[1:] if "\t" in line else columns[1:][-1:])):
            return False
        else:
            widths.append(len(columns))
            tabs |= "\t" in line
    return len(set(widths)) == 1 and (tabs or len(widths) > 1)


def _split(line: str) -> list[str]:
    line = line.strip(" ").rstrip("\t ")
    return re.split(r" *\t *" if "\t" in line else " +", line)


# ---- lines -> rows, by sentence and document ----


def _grouped(lines: Iterable[tuple[str, str]], reading: Reading) -> list[list[list[_Row]]]:
    rows = [_Row(where, _split(line) if line.strip() else []) for where, line in lines]
    full = [row for row in rows if row.columns]
    width = _width(row for row in full if not row.columns[0].startswith("#")) or _width(full)
    groups: list[list[list[_Row]]] = [[]]
    sentence: list[_Row] = []
    marked = False
    for row in [*rows, _Row("", [])]:
        columns = row.columns
        if columns and columns[0].startswith("#") and not (len(columns) == width and any(map(tags_of, columns[1:]))):
            reading.notes["comment lines skipped"] += 1
        elif columns and "-DOCSTART-" not in columns[:2]:
            sentence.append(row)
        else:
            if sentence:
                groups[-1].append(sentence)
                sentence = []
            if columns:
                marked = True
                groups.append([])
    if not marked:
        groups = [[sentence] for sentence in groups[0]]
    return [group for group in groups if group]


def _width(rows: Iterable[_Row]) -> int:
    """The number of columns that most rows have."""
    counts = Counter(len(row.columns) for row in rows)
    return counts.most_common(1)[0][0] if counts else 0


# ---- which columns count ----


def _skip_numbers(sentences: Sequence[list[_Row]], reading: Reading) -> None:
    """Takes away first columns that hold but numbers which never fall within a sentence: nobody writes such texts."""
    while _width(row for sentence in sentences for row in sentence) > 2 and all(map(_counts_up, sentences)):
        for sentence in sentences:
            # numbered throughout as 1-1, 1-2 (sentence and token), all of them are words
            words = [row for row in sentence if row.columns[0].isdigit()] or sentence[:]
            reading.notes["lines whose running number was skipped"] += len(words)
            if more := len(sentence) - len(words):
                reading.notes["lines that are no words (numbered as 1-2 or 8.1), skipped"] += more
            sentence[:] = words
            for row in sentence:
                row.columns = row.columns[1:] or row.columns


def _skip_names(sentences: Sequence[list[_Row]], reading: Reading) -> bool:
    """Takes away a first column that is the same all through each sentence: the name of its document. Returns whether
    there was one."""
    longer = [sentence for sentence in sentences if len(sentence) > 1]
    wide = _width(row for sentence in sentences for row in sentence) > 2
    named = wide and longer and all(len({row.columns[0] for row in sentence}) == 1 for sentence in longer)
    for row in (row for sentence in sentences for row in sentence if named and len(row.columns) > 1):
        row.columns = row.columns[1:]
        reading.notes["lines whose first column, the same in all of a sentence, was skipped"] += 1
    return bool(named)


def _name_tags(sentences: Sequence[list[_Row]], reading: Reading) -> None:
    """Gives tags without a label theirs (see `named`)."""
    for sentence in (rows for rows in sentences if all(len(row.columns) > 1 for row in rows)):
        cells = [row.columns[-1] for row in sentence]
        if (tags := named(cells)) is not cells:
            reading.notes[UNNAMED] += 1
            for row, tag in zip(sentence, tags, strict=True):
                row.columns[-1] = tag


def _counts_up(sentence: Sequence[_Row]) -> bool:
    matches = [re.fullmatch(r"([0-9]{1,9})([-.][0-9]+)?", row.columns[0]) for row in sentence]
    numbers = [int(match[1]) for match in matches if match]
    return len(numbers) == len(sentence) and numbers == sorted(numbers)


def _layers(rows: Sequence[_Row], path: str, reading: Reading) -> list[int]:
    """The columns that mostly hold tags, counted from the end of the line (-1); the last if there are none.

    Phrases count only where nothing else does. Two columns that mostly agree are a fault: it is one layer twice,
    perhaps gold and predictions.
    """
    width = _width(rows)
    whole = [row.columns for row in rows if len(row.columns) == width]
    columns = {column: [cells[column] for cells in whole] for column in range(-1, -width, -1)}
    layers = {
        column: cells for column, cells in columns.items() if 2 * sum(map(bool, map(tags_of, cells))) > len(cells)
    }
    for column, cells in list(layers.items()):
        labels = {cell[2:] for cell in cells if cell != "O"}
        if ("NP" in labels or labels and labels <= _PHRASES) and list(layers) != [-1]:
            del layers[column]
            reading.notes["tags of phrases (such as NP) in another column, left out"] += len(cells)
    for one, other in combinations(layers, 2):
        pairs = list(zip(layers[one], layers[other], strict=True))
        fewest = min(sum(cell != "O" for cell in layers[column]) for column in (one, other))
        if fewest and 2 * sum(a == b != "O" for a, b in pairs) >= fewest:
            reading.faults.append(
                f"{path}: of {width} columns, {width + other + 1} and {width + one + 1} hold mostly the same tags, "
                "perhaps gold and predictions; keep one of them"
            )
    if layers and -1 not in layers:
        reading.notes["lines whose tag stands before the last column"] += len(whole)
    if width > 1 and (ragged := len(rows) - len(whole)):
        what = "lines with another number of columns than most, of which the first and last count"
        reading.notes[what] += ragged
    return list(layers) or [-1]


# ---- rows -> documents ----


def _document(id: str, group: Sequence[Sequence[_Row]], layers: Sequence[int], reading: Reading) -> Document:
    text, tokens = laid_out([row.columns[0] for row in sentence] for sentence in filter(None, group))
    spans: list[Span] = []
    for sentence, bounds in zip(filter(None, group), tokens, strict=True):
        for row in sentence:
            _check(row, layers, reading)
        for column in layers:
            cells = [row.columns[column] if len(row.columns) > -column else "O" for row in sentence]
            found = [Span(bounds[first][0], bounds[last][1], label) for first, last, label in mentions_of(cells)]
            spans += filter(None, (reading.trimmed(text, span) for span in found))
            if column != layers[0] and found:
                reading.notes["mentions from a further column of tags"] += len(found)
            if several := sum(len(tags_of(cell)) > 1 for cell in cells):
                reading.notes["tokens with several tags in one cell, all read"] += several
    sentences = tuple((bounds[0][0], bounds[-1][1]) for bounds in tokens)
    return Document(id, text, tuple(sorted(set(spans))), sentences, tuple(chain(*tokens)))


def _check(row: _Row, layers: Sequence[int], reading: Reading) -> None:
    fault = None
    if len(row.columns) < 2:
        fault = f"only one column, {row.columns[0]!r}; a line holds a token and its tag"
    elif not row.columns[0]:
        fault = "no token in the first column; a line holds a token and its tag"
    elif wrong := [row.columns[n] for n in layers if len(row.columns) > -n and not tags_of(row.columns[n])]:
        fault = f"{wrong[0]!r} is no tag; a tag is like O or B-Disease"
    if fault:
        reading.faults.append(f"{row.where}: {fault}")


# ---- writing ----


def write_conll(documents: Iterable[Document], file: TextIO, lost: Counter[str]) -> None:
    """Writes a token, a tab and its tag (IOB2) a line, with `-DOCSTART-` lines unless each document is one sentence.

    Args:
        lost: takes what cannot be written (see `tagged`).
    """
    documents = list(documents)
    marked = any(len(document.sentences) > 1 for document in documents)
    for document in documents:
        sentences = tagged(document, lost)
        if marked and sentences:
            file.write("-DOCSTART-\tO\n\n")
        for sentence in sentences:
            file.writelines(f"{word}\t{tag}\n" for word, tag in sentence)
            file.write("\n")
    given = (document.id.endswith(f"-{number}") for number, document in enumerate(documents, start=1))
    lost["ids of documents, which CoNLL does not hold"] += len(documents) - sum(given)


CONLL = Format("conll", ENDINGS, is_conll, conll_documents, write_conll, whole=True)
