"""How far long work is: a bar where standard error is a terminal, elsewhere a plain line every so often."""

import sys
import time
from contextlib import AbstractContextManager

from tqdm import tqdm

OFTEN, SELDOM = 10.0, 30.0  # seconds: the least and, as far as `update` is called, the most between two lines
PARTS = 4  # of the work, at the end of each of which there is a line if `OFTEN` allows it
BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}"
clock = time.monotonic


class Bar:
    """Shows what part of some work is done, and what is left of it.

    Args:
        what: the work, such as `training`.
        total: of its units; None where that is not known.
        unit: in the singular; `B` for bytes.
        done: units that were done before.
        leave: whether the last state stays on the screen, or in the log.
    """

    def __init__(
        self, what: str, total: int | None, unit: str, done: int = 0, hidden: bool = False, leave: bool = False
    ):
        self.what, self.total, self.unit, self.first, self.done = what, total, unit, done, done
        self.note, self.leave = "", leave
        self.started = self.last = clock()
        terminal = sys.stderr.isatty()
        self.plain = not hidden and not terminal
        self.bar = tqdm(
            total=total, initial=done, desc=what, unit=unit, unit_scale=unit == "B", leave=leave, dynamic_ncols=True,
            disable=hidden or not terminal, bar_format=None if total is None else BAR + ", {rate_fmt}]",
        )  # fmt: skip

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        self.bar.close()
        if self.plain and self.leave and self.done > self.first:
            self._print()

    def update(self, count: int = 1, note: str = "") -> None:
        """So many more units are done.

        Args:
            note: to be shown with them, in place of their rate.
        """
        before, self.done, self.note = self.done, self.done + count, note
        if note:
            self.bar.bar_format = BAR + "{postfix}]"
            self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(count)
        if self.plain and self.done != self.total:
            waited = clock() - self.last
            ends_part = self.total is not None and PARTS * self.done // self.total > PARTS * before // self.total
            if waited >= SELDOM or ends_part and waited >= OFTEN:
                self._print()

    def say(self, line: str) -> None:
        """Prints a line of standard error."""
        with self.aside():
            print(line, file=sys.stderr, flush=True)

    def aside(self) -> AbstractContextManager:
        """Within it something else can be printed, which the bar does not overwrite."""
        return tqdm.external_write_mode()

    def _print(self) -> None:
        self.last = clock()
        print(self, file=sys.stderr, flush=True)

    def __str__(self) -> str:
        seconds = max(clock() - self.started, 1e-9)
        rate = (self.done - self.first) / seconds
        of = "" if self.total is None else f" of {self._count(self.total)}"
        words = [f"{self.what}: {self._count(self.done)}{of}{'' if self.unit == 'B' else f' {self.unit}s'}"]
        words.append(self.note or (f"{self._count(rate)}/s" if self.unit == "B" else f"{rate:.3g} {self.unit}s/s"))
        if self.total is not None and self.done < self.total and rate:
            words.append(f"{duration((self.total - self.done) / rate)} left")
        elif self.done == self.total:
            words.append(f"in {duration(seconds)}")
        return ", ".join(words)

    def _count(self, number: float) -> str:
        return tqdm.format_sizeof(number, "B") if self.unit == "B" else f"{number:,}"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
