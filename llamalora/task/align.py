"""Which source character each character of a model's copy stands for, however unfaithful the copy.

A cascade, each step for what the one before leaves open: an exact copy, a copy up to whitespace (or the
beginning of one), the cheapest edit of word and punctuation tokens, and within what these leave unmatched, of
characters.
"""

import re
from collections.abc import Collection, Hashable, Sequence

import numpy as np

TOKEN = re.compile(r"\w+|[^\w\s]")
_WORD = re.compile(r"\w")

# Bounds the edit table (32 MiB, a second at most). Only a runaway output reaches it; the rest is unaligned.
_CELLS = 2**23
_ROW = 256  # a row costs the time of so many cells, however short it is


def edit_alignment(
    source: Sequence[Hashable], output: Sequence[Hashable], free: Collection[int] = (), open_end: bool = False
) -> list[int]:
    """For each item of `output` the index of the equal item of `source` that it copies, or -1.

    The alignment has the least number of insertions, deletions and substitutions (Levenshtein).

    Args:
        free: indices of `output` whose insertion costs nothing.
        open_end: leaving out the end of the source costs nothing (the output was cut off).
    """
    origin = [-1] * len(output)
    shorter = min(len(source), len(output))
    head = tail = 0
    while head < shorter and source[head] == output[head]:
        origin[head] = head
        head += 1
    while not open_end and tail < shorter - head and source[-1 - tail] == output[-1 - tail]:
        tail += 1
        origin[-tail] = len(source) - tail
    source, output = source[head : len(source) - tail], output[head : len(output) - tail]
    output = output[: _CELLS // (len(source) + _ROW)]
    if not source or not output:
        return origin

    codes: dict[Hashable, int] = {}
    a = np.array([codes.setdefault(item, len(codes)) for item in source], dtype=np.int32)
    b = [codes.setdefault(item, len(codes)) for item in output]
    column = np.arange(len(a) + 1, dtype=np.int32)
    cost = np.empty((len(b) + 1, len(a) + 1), dtype=np.int32)  # cost[i, j]: output[:i] against source[:j]
    cost[0] = column
    for i, code in enumerate(b):
        row = cost[i] + (head + i not in free)
        np.minimum(row[1:], cost[i, :-1] + (a != code), out=row[1:])
        # Deletions: cost[j] = min over k <= j of row[k] + (j - k), as one running minimum.
        cost[i + 1] = np.minimum.accumulate(row - column) + column

    i, j = len(b), len(a)
    if open_end:
        j = int(cost[i].argmin())
    while i and j:
        here, diagonal = cost[i, j], cost[i - 1, j - 1]
        if a[j - 1] == b[i - 1] and here == diagonal:
            origin[head + i - 1] = head + j - 1
            i, j = i - 1, j - 1
        elif here == cost[i, j - 1] + 1:
            j -= 1
        elif here == diagonal + 1:
            i, j = i - 1, j - 1
        else:
            i -= 1
    return origin


def origins(source: str, output: str, truncated: bool = False) -> list[int]:
    """For each character of `output` the offset of the `source` character that it copies, or -1; rising."""
    if output == source:
        return list(range(len(source)))
    origin = [-1] * len(output)
    here, there = _visible(source, 0, len(source)), _visible(output, 0, len(output))
    if [source[i] for i in here[: len(there)]] == [output[k] for k in there]:
        for i, k in zip(here, there, strict=False):
            origin[k] = i
        return origin

    words, written = list(TOKEN.finditer(source)), list(TOKEN.finditer(output))
    copied = edit_alignment([m.group() for m in words], [m.group() for m in written], open_end=truncated)
    pairs = [(words[i], match) for i, match in zip(copied, written, strict=True) if i >= 0]
    for word, match in pairs:
        origin[match.start() : match.end()] = range(word.start(), word.end())
    ends = [(0, 0), *((word.end(), match.end()) for word, match in pairs)]
    starts = [*((word.start(), match.start()) for word, match in pairs), (len(source), len(output))]
    for (source_start, output_start), (source_end, output_end) in zip(ends, starts, strict=True):
        here, there = _visible(source, source_start, source_end), _visible(output, output_start, output_end)
        inner = edit_alignment(
            [source[i].lower() for i in here],
            [output[k].lower() for k in there],
            open_end=truncated and output_end == len(output),
        )
        for k, i in zip(there, inner, strict=True):
            if i >= 0:
                origin[k] = here[i]
    return origin


def _visible(text: str, start: int, end: int) -> list[int]:
    return [i for i in range(start, end) if not text[i].isspace()]


class Alignment:
    """A source, a model's copy of it, and the origin of each character of the copy (see `origins`)."""

    def __init__(self, source: str, output: str, truncated: bool = False) -> None:
        self.source, self.output = source, output
        self.origin = origins(source, output, truncated)
        self.copied = set(self.origin)

    def project(self, start: int, end: int) -> tuple[int, int] | None:
        """The source bounds of the stretch `start` to `end` of the copy, which has no whitespace at its ends.

        None where a boundary did not align, or where less than half of the stretch is a copy of what stands
        there: a place in the right order alone is no evidence.
        """
        left = self._boundary(start, end - 1, 1)
        right = self._boundary(end - 1, start, -1)
        if left is None or right is None or left > right:
            return None
        copied = sum(left <= i <= right for i in self.origin[start:end])
        longer = max(len(_visible(self.source, left, right + 1)), len(_visible(self.output, start, end)))
        return (left, right + 1) if 2 * copied >= longer else None

    def _boundary(self, first: int, last: int, step: int) -> int | None:
        """The source character at which the stretch begins (`step` 1) or, read backwards (-1), ends."""
        # The first copied character of the first word stands for the word, and takes in what the copy left
        # out of the source's word: "cavity" and "apillary" both begin where "capillary" does.
        whole = not _one_word(self.output, first - step, first)
        k = first
        while whole and self.origin[k] < 0 and k != last and _one_word(self.output, k, k + step):
            k += step
        position = self.origin[k]
        if position >= 0:
            outer = position - step
            while whole and outer not in self.copied and _one_word(self.source, outer, outer + step):
                outer -= step
            return outer + step
        # Otherwise the stretch begins right after what the character before it is a copy of.
        before = first - step
        while 0 <= before < len(self.output) and self.output[before].isspace():
            before -= step
        if 0 <= before < len(self.output):
            if self.origin[before] < 0:
                return None
            position = self.origin[before] + step
        else:
            position = 0 if step > 0 else len(self.source) - 1
        while 0 <= position < len(self.source) and self.source[position].isspace():
            position += step
        return position


def _one_word(text: str, i: int, k: int) -> bool:
    """Whether two neighbouring characters, of which one may lie outside the text, belong to one word."""
    inside = min(i, k) >= 0 and max(i, k) < len(text)
    return inside and bool(_WORD.match(text[i]) and _WORD.match(text[k]))
