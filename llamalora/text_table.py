"""Text tables for the terminal."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], sides: str = "l") -> str:
    """A text table: `l` and `r` say to which side each column leans, those without a letter to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lean = [str.ljust if side == "l" else str.rjust for side in sides.ljust(len(widths), "r")]
    lines = ("  ".join(to(cell, width) for to, cell, width in zip(lean, row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
