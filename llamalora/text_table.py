"""Text for a terminal of 80 columns: tables, and prose between them."""

import textwrap
from collections.abc import Sequence

WIDTH = 80  # columns
GAP = 2  # between the columns of a table


def aligned(rows: Sequence[Sequence[str]], sides: str = "l") -> str:
    """A text table: `l` and `r` say to which side each column leans, those without a letter to the right.

    Columns for which there is no room go on below, after the first one again.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lean = [str.ljust if side == "l" else str.rjust for side in sides.ljust(len(widths), "r")]
    blocks: list[list[int]] = []
    for column in range(1, len(widths)):
        if not blocks or sum(widths[c] + GAP for c in (*blocks[-1], column)) - GAP > WIDTH and len(blocks[-1]) > 1:
            blocks.append([0])
        blocks[-1].append(column)
    return "\n\n".join(
        "\n".join("".join(lean[c](row[c], widths[c]) + " " * GAP for c in block).rstrip() for row in rows)
        for block in blocks or [[0]]
    )


def wrapped(text: str, indent: int = 0) -> str:
    """Each line of a text broken where it is too long, what goes on set in by `indent`; a long word stays whole."""
    return "\n".join(
        textwrap.fill(line, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False,
                      drop_whitespace=True) if len(line) > WIDTH else line
        for line in text.split("\n")
    )  # fmt: skip
