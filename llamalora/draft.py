"""Drafts for tagging: the answer repeats the source, so the source foretells it (verified in decode.py).

Everything is compared by characters, never by tokens, since a tag changes how the word beside it is cut.
"""

import re
from collections.abc import Sequence

from . import ner
from .tokenizer import Tokenizer


class SourceDrafter:
    """Proposes the rest of a tag that has begun, and then the source from where the answer stands in it.

    Args:
        texts: the source of each prompt.
        length: tokens proposed at most; the more, the fewer passes, and the more work in vain where a tag
            intervenes.
    """

    def __init__(self, tokenizer: Tokenizer, task: ner.Task, texts: Sequence[str], length: int):
        assert task.format == "tagging"
        self.tokenizer, self.texts, self.length = tokenizer, texts, length
        pairs = [task.tags(label) for label in task.labels]
        self.openers = [opener for opener, _ in pairs]
        self.closer_of = dict(pairs)
        self.any_tag = re.compile("|".join(re.escape(tag) for pair in pairs for tag in pair))

    def __call__(self, index: int, output: list[int]) -> Sequence[int]:
        written = self.tokenizer.decode(output) if output else ""
        source = self.texts[index]
        expected = self.expect(source, written)
        if not expected:
            return []
        # enough characters for the draft, cut between words, so that the last token is a whole one
        end = expected.find(" ", 8 * self.length)
        draft = self.tokenizer.encode_continuation(" " + written + expected[: end if end > 0 else None])
        return draft[self._place(draft, output, written) :][: self.length]

    def _place(self, ids: list[int], output: list[int], written: str) -> int:
        """How many of `ids` stand for what is written: as many as it has tokens, unless the model cut the
        text otherwise than the tokenizer does."""
        count = len(output)
        if ids[:count] == output:
            return count
        for other in (count - 1, count + 1, count - 2, count + 2, count - 3, count + 3):
            if 0 < other <= len(ids) and self.tokenizer.decode(ids[:other]) == written:
                return other
        return len(ids)

    def expect(self, source: str, written: str) -> str:
        """How the answer `written` so far should go on, if no further tag comes; empty if that is unclear."""
        tags = self.any_tag.findall(written)
        opener = tags[-1] if tags and tags[-1] in self.closer_of else None
        plain = self.any_tag.sub("", written)
        start = _cursor(source, plain)
        if start is not None and start < len(source):
            return source[start:]
        closers = [self.closer_of[opener]] if opener else []
        if start == len(source):
            return "".join(closers)
        for tag in closers or self.openers:
            for size in range(len(tag) - 1, 0, -1):
                if plain.endswith(tag[:size]):
                    start = _cursor(source, plain[: len(plain) - size])
                    if start is not None:
                        return tag[size:] + source[start:]
        return ""


def _cursor(source: str, plain: str) -> int | None:
    """Where in the source an answer without tags stands: at its end if it is a copy so far, else behind the
    nearest occurrence of its last characters."""
    if source.startswith(plain):
        return len(plain)
    tail = plain[-12:]
    if len(tail) < 12:
        return None
    places = [match.end() for match in re.finditer(re.escape(tail), source)]
    return min(places, key=lambda end: abs(end - len(plain)), default=None)
