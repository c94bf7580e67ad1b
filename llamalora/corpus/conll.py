"""CoNLL: one token and its tag a line."""

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from .documents import CorpusError, Document, Span
from .lines import read_lines

_TAG = re.compile(r"O|[BIESLU]-.+")
CONLL_NAME = re.compile(r"\.(tsv|conll|iob|bio|txt)(\.gz)?$", re.IGNORECASE)


def read_conll(path: str | Path, reference: Sequence[Document] = ()) -> list[Document]:
    """Reads CoNLL: a token first, its IOB1, IOB2 or BIOES tag last in a line, tabs or spaces between columns.

    A blank line ends a sentence. `-DOCSTART-` lines separate documents; without them each sentence is one.
    The text is the tokens joined by single spaces. Ids are the file's stem and running number (`dev-17`), or
    those of the `reference` in order (see `read`). Raises CorpusError.
    """
    path = Path(path)
    groups: list[list[list[tuple[str, str]]]] = [[]]  # documents of sentences of (token, tag)
    sentence: list[tuple[str, str]] = []
    marked = False
    for where, line in chain(read_lines(path), [("", "")]):
        fields = re.split(r" *\t *" if "\t" in line else " +", line.strip("\t "))
        if line.strip() and fields[0] != "-DOCSTART-":
            sentence.append(_token(where, fields))
            continue
        if sentence:
            groups[-1].append(sentence)
            sentence = []
        if line.strip():
            marked = True
            groups.append([])
    if not marked:
        groups = [[sentence] for sentence in groups[0]]
    groups = [group for group in groups if group]
    if not groups:
        raise CorpusError(f"{path}: no sentence in it; a line holds a token and its tag")
    if reference and len(groups) > len(reference):
        raise CorpusError(
            f"{path}: {len(groups)} documents for {len(reference)} in the gold; "
            "predictions must keep the documents of the gold in their order"
        )
    stem = CONLL_NAME.sub("", path.name)
    ids = [document.id for document in reference] or [f"{stem}-{index + 1}" for index in range(len(groups))]
    return [_from_tokens(id, group) for id, group in zip(ids, groups, strict=False)]


def _token(where: str, fields: list[str]) -> tuple[str, str]:
    if len(fields) < 2:
        raise CorpusError(f"{where}: only one column, {fields[0]!r}; a line holds a token and its tag")
    if not _TAG.fullmatch(fields[-1]):
        raise CorpusError(f"{where}: {fields[-1]!r} is no tag; the last column must be like O or B-Disease")
    return fields[0], fields[-1]


def _from_tokens(id: str, group: list[list[tuple[str, str]]]) -> Document:
    spans: list[Span] = []
    bounds = []
    position = 0  # where the next token starts
    for sentence in group:
        bounds.append((position, position + sum(len(token) + 1 for token, _ in sentence) - 1))
        open_label = None  # IOB1: an I- tag that does not continue a mention of its label starts one
        for token, tag in sentence:
            prefix, _, label = tag.partition("-")
            end = position + len(token)
            if prefix in "IEL" and label == open_label:
                spans[-1] = replace(spans[-1], end=end)
            elif prefix != "O":
                spans.append(Span(position, end, label))
            open_label = label if prefix in "BI" else None
            position = end + 1
    text = " ".join(token for sentence in group for token, _ in sentence)
    return Document(id, text, tuple(spans), tuple(bounds))
