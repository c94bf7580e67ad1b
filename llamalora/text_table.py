"""Text for a terminal of 80 columns: tables, and prose between them."""

import re
import textwrap
from collections.abc import Mapping, Sequence

WIDTH = 80  # columns
GAP = 2  # between the columns of a table


def aligned(rows: Sequence[Sequence[str]], sides: str = "l") -> str:
    """A text table: `l` and `r` say to which side each column leans, those without a letter to the right.

    Columns for which there is no room go on below, after the first ones again, those that lean to the left.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lean = [str.ljust if side == "l" else str.rjust for side in sides.ljust(len(widths), "r")]
    titles = min(len(sides) - len(sides.lstrip("l")), len(widths) - 1)
    blocks = _folded(widths, titles, WIDTH)
    if len(blocks) > 1:  # as few, but of like width
        every = (_folded(widths, titles, width) for width in range(1, WIDTH))
        blocks = next((those for those in every if len(those) == len(blocks)), blocks)
    return "\n\n".join(
        "\n".join("".join(lean[c](row[c], widths[c]) + " " * GAP for c in block).rstrip() for row in rows)
        for block in blocks
    )


def _folded(widths: Sequence[int], titles: int, width: int) -> list[list[int]]:
    """The columns of each part of a table so wide at most, the first `titles` ones in each."""
    blocks = [[*range(titles)]]
    for column in range(titles, len(widths)):
        needed = sum(widths[c] + GAP for c in (*blocks[-1], column)) - GAP
        if needed > width and len(blocks[-1]) > titles:
            blocks.append([*range(titles)])
        blocks[-1].append(column)
    return blocks


def legend(words: Mapping[str, str]) -> str:
    """A line for each word that a reader cannot know, with what it means, below a title; of no words nothing."""
    lines = [(f"  {word}", meaning) for word, meaning in words.items()]
    return f"what the words mean\n{aligned(lines, 'll')}" if lines else ""


def used(words: Mapping[str, str], text: str) -> dict[str, str]:
    """Those of the words that stand in a text, or of which one stands there where commas part them."""
    parts = {part for word in words for part in word.split(", ")}
    there = set()
    for part in sorted(parts, key=len, reverse=True):  # what stands within a longer one is not meant
        text, count = re.subn(rf"(?<!\w){re.escape(part)}(?!\w)", "", text)
        there |= {word for word in words if count and part in word.split(", ")}
    return {word: meaning for word, meaning in words.items() if word in there}


def wrapped(text: str, indent: int = 0) -> str:
    """Each line of a text broken where it is too long, what goes on set in by `indent`; a long word stays whole."""
    return "\n".join(
        textwrap.fill(line, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False,
                      drop_whitespace=True) if len(line) > WIDTH else line
        for line in text.split("\n")
    )  # fmt: skip
