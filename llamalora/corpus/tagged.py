"""Documents as tokens with tags: what CoNLL and the data sets of Hugging Face hold."""

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache

from .documents import Document, outermost

TAG = r"(?:O|[BIESLUM]-[^\t]+)"  # of IOB1, IOB2, BIOES, BILOU and BMES
_BETWEEN_TAGS = re.compile(r"[|;,/+&#]")
UNNAMED = "sentences whose tags B and I have no label, read as `entity`"  # a note, see `named`
Bounds = tuple[int, int]

# Chinese and Japanese write no spaces: each of their characters is a token. An accent that stands alone (U+0300 and
# those that follow) belongs to its letter.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_TOKEN = re.compile(rf"[{_CJK}]|(?:(?![{_CJK}])[\w\u0300-\u036f])+|[^\w\s\ufeff]")


def named(cells: Sequence[str]) -> Sequence[str]:
    """Tags B and I without a label, as BioBERT's files have them, with the label `entity`; others as they are."""
    bare = {"B", "I"}.intersection(cells) and {"B", "I", "O"}.issuperset(cells)
    return [cell if cell == "O" else f"{cell}-entity" for cell in cells] if bare else cells


@lru_cache(maxsize=10_000)
def tags_of(cell: str) -> tuple[str, ...]:
    """The tags of a cell, mostly one, of several `B-X|B-Y`; none where it holds something else."""
    parts = _BETWEEN_TAGS.split(cell)
    if all(re.fullmatch(TAG, part) for part in parts):
        return tuple(parts)
    return (cell,) if re.fullmatch(TAG, cell) else ()


def mentions_of(cells: Sequence[str]) -> list[tuple[int, int, str]]:
    """The mentions of a sentence: first token, last token, label. In IOB1 a tag I- that continues no mention of its
    label starts one."""
    found: list[tuple[int, int, str]] = []
    running: list[int] = []  # the mentions that the token before left open
    for place, cell in enumerate(cells):
        still = []
        for tag in tags_of(cell):
            prefix, _, label = tag.partition("-")
            if prefix == "O":
                continue
            mine = next((i for i in running if prefix in "IMEL" and found[i][2] == label), len(found))
            if mine < len(found):
                running.remove(mine)
                found[mine] = (found[mine][0], place, label)
            else:
                found.append((place, place, label))
            if prefix in "BIM":
                still.append(mine)
        running = still
    return found


def laid_out(sentences: Iterable[Sequence[str]]) -> tuple[str, list[list[Bounds]]]:
    """The text of tokens, single spaces between them, and the bounds of the tokens of each sentence in it."""
    bounds: list[list[Bounds]] = []
    position = 0
    words = []
    for sentence in sentences:
        bounds.append([])
        for token in sentence:
            words.append(token)
            bounds[-1].append((position, position + len(token)))
            position += len(token) + 1
    return " ".join(words), bounds


def tokenised(text: str) -> list[Bounds]:
    """The tokens of running text: runs of letters, digits and `_`, and every other character but whitespace alone."""
    return [match.span() for match in _TOKEN.finditer(text)]


def tagged(document: Document, lost: Counter[str]) -> list[list[tuple[str, str]]]:
    """The tokens of each sentence with their tags in IOB2: the document's own tokens, or those of `tokenised`.

    Args:
        lost: takes what tags cannot say: mentions that overlap a longer one, that cross the end of a sentence, or that
            begin or end within a token; and what is not kept of the text.
    """
    spans = outermost(document.spans)
    lost["mentions that overlap a longer one, left out"] += len(document.spans) - len(spans)
    crossing = set(spans)
    tokens = tokenised(document.text) if document.tokens is None else document.tokens
    sentences = []
    for first, last in document.sentences:
        here = tokens[bisect_left(tokens, (first, 0)) : bisect_left(tokens, (last, 0))]
        starts = {start: place for place, (start, _) in enumerate(here)}
        ends = {end: place for place, (_, end) in enumerate(here)}
        tags = ["O"] * len(here)
        for span in [span for span in spans if first <= span.start and span.end <= last]:
            crossing.remove(span)
            if span.start not in starts or span.end not in ends:
                lost["mentions that begin or end within a token, left out"] += 1
                continue
            label = span.label
            if len(tags_of(f"B-{label}")) > 1:  # as `x/B-y` would be two tags
                label = _BETWEEN_TAGS.sub("_", label)
                lost["mentions in whose label a sign between tags became _"] += 1
            begin, end = starts[span.start], ends[span.end]
            tags[begin : end + 1] = [f"B-{label}"] + [f"I-{label}"] * (end - begin)
        words = [re.sub(r"[\t\r\n]", " ", document.text[start:end]) for start, end in here]
        sentences.append(list(zip(words, tags, strict=True)))
    lost["mentions that cross the end of a sentence, left out"] += len(crossing)
    sentences = [sentence for sentence in sentences if sentence]
    kept, _ = laid_out([word for word, _ in sentence] for sentence in sentences)
    lost["documents whose spaces are not kept between tokens"] += kept != document.text
    lost["documents without a word, left out"] += not sentences
    return sentences
