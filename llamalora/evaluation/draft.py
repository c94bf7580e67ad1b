"""Drafts for tagging: the answer repeats the source, so the source predicts it. `generate.py` verifies every draft.

What the source does not foretell is where tags come. There a draft does as the answers before it did: what was
mostly tagged is tagged again; and it ends where it has become more likely wrong than it is worth, the sooner the longer
an answer has not gone on as its source.
Everything is compared by characters, never by tokens, since a tag changes how the word beside it is cut.
"""

import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from ..corpus.documents import Sentence, outermost
from ..task.definition import Task
from ..task.tagging import inside_word
from ..task.tokenizer import TextStream, Tokenizer

_WORD = re.compile(r"\w+|[^\w\s]")
_COMPOUND = re.compile(r"\w+(-\w+)*|\S")
_ENDS = 0.7  # chance that a mention of an unknown string ends with the word
_TAIL = 12  # characters by which an unfaithful copy is found again in its source


@dataclass
class _Copy:
    """An answer in the making, and where it stands in its source."""

    source: str
    text: TextStream
    position: int = 0  # behind the last character that is copied
    mention: tuple[int, str] | None = None  # the position and label of the open tag
    pending: str = ""  # written behind that: the beginning of a tag
    word: str = ""  # written since the last space: a tokenizer cuts it as a whole
    tail: str = ""  # the last characters, without tags
    learned: int = 0  # the source up to here has told of its words
    faith: float = 1.0  # that the answer goes on as its source does: a quarter less each time that it has not
    tokens: int = 0  # of the answer that have been read


class SourceDrafter:
    """Proposes the rest of a tag that has begun, and then the source from where the answer stands in it, with tags
    where they are likely.

    Args:
        texts: the source of each prompt.
        risk: a draft ends before the probability that all of it holds falls below this, as far as can be told.
        length: tokens proposed at most.
        known: sentences whose mentions are known, such as those that the model was trained on; or what was learnt from
            them (`prime`), which is left as it is.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        task: Task,
        texts: Sequence[str],
        risk: float,
        length: int = 40,
        known: "Iterable[Sentence] | Habits" = (),
    ):
        assert task.copies
        self.tokenizer, self.risk, self.length = tokenizer, risk, length
        self.tags = {label: task.tags(label) for label in task.labels}
        self.meaning = {tag: (label, tag == pair[0]) for label, pair in self.tags.items() for tag in pair}
        self.any_tag = re.compile("|".join(map(re.escape, self.meaning)))
        self.habits = known.copy() if isinstance(known, Habits) else prime(task, known)
        self.copies = [_Copy(" " + text, TextStream(tokenizer)) for text in texts]  # an answer begins with a space

    def __call__(self, index: int, output: list[int]) -> Sequence[int]:
        copy, spellings = self.copies[index], self.tokenizer.spellings
        if len(output) < copy.tokens:  # something was taken back
            copy = self.copies[index] = _Copy(copy.source, TextStream(self.tokenizer), learned=copy.learned)
        self._follow(copy, copy.text.read(output[copy.tokens :]))
        copy.tokens = len(output)
        expected, sure = self._expect(copy)
        ids = self.tokenizer.encode_continuation(copy.word + expected)
        ends = [0, *accumulate(len(spellings[token] or b"") for token in ids)]
        written = len(copy.word.encode())
        if written not in ends:
            return []  # the tokenizer has a token that spans the place where the answer stands
        last = written + len(expected[:sure].encode())
        return ids[ends.index(written) : bisect_right(ends, last) - 1][: self.length]

    def _follow(self, copy: _Copy, new: str) -> None:
        """Reads on in an answer, and learns from what it tags and what it does not."""
        word = copy.word + new
        copy.word = word[max(word.rfind(" "), 0) :]
        text = copy.pending + new
        while tag := self.any_tag.search(text):
            self._advance(copy, text[: tag.start()])
            text = text[tag.end() :]
            label, opens = self.meaning[tag[0]]
            if opens:
                copy.mention = (copy.position, label)
            elif copy.mention:
                start, label = copy.mention
                self.habits.tagged(copy.source, start, copy.position, label)
                copy.mention, copy.learned = None, copy.position
        begun = 0 if copy.source.startswith(text, copy.position) else self._begun(text)
        self._advance(copy, text[: len(text) - begun])
        copy.pending = text[len(text) - begun :]

    def _begun(self, text: str) -> int:
        """How many characters at the end of `text` are the beginning of a tag."""
        longest = max(map(len, self.meaning))
        sizes = range(min(len(text), longest), 0, -1)
        return next((size for size in sizes if any(tag.startswith(text[-size:]) for tag in self.meaning)), 0)

    def _advance(self, copy: _Copy, text: str) -> None:
        """Moves the cursor behind `text`: as far as the source goes on so, else behind the nearest occurrence of the
        last characters; it stays where it is if there is none."""
        before = copy.position
        copy.tail = (copy.tail + text)[-_TAIL:]
        if copy.source.startswith(text, before):
            copy.position += len(text)
            copy.faith = 1.0 if text else copy.faith
        else:
            copy.faith *= 0.75
            if len(copy.tail) == _TAIL:
                ends = [match.end() for match in re.finditer(re.escape(copy.tail), copy.source)]
                copy.position = min(ends, key=lambda end: abs(end - before - len(text)), default=before)
        if not copy.mention:
            copy.learned = self.habits.passed(copy.source, copy.learned, copy.position)

    def _expect(self, copy: _Copy) -> tuple[str, int]:
        """How the answer should go on, and how many characters of that are likely enough."""
        source, position, mention, chance = copy.source, copy.position, copy.mention, copy.faith
        pieces = []
        # a tag has begun: it goes on as the one that is due, a closing tag of the open mention or an opening one
        if copy.pending:
            if mention:
                tag, mention = self.tags[mention[1]][1], None
                if not tag.startswith(copy.pending):
                    return "", 0
            else:
                fitting = [label for label, (opener, _) in self.tags.items() if opener.startswith(copy.pending)]
                if not fitting:
                    return "", 0
                label, likely = self.habits.label(source, position, fitting)
                chance *= likely
                tag, mention = self.tags[label][0], (position, label)
            pieces.append(tag[len(copy.pending) :])
        # then the source, piece by piece, with tags where they were before, until all of it is likely wrong somewhere
        sure = None
        while sum(map(len, pieces)) < 8 * self.length and (position < len(source) or mention):
            if mention:
                end, likely = self.habits.end(source, mention[0], position)
                piece, mention = source[position:end] + self.tags[mention[1]][1], None
            else:
                piece, end, likely = self._next(source, position)
            chance *= likely
            if chance < self.risk:
                # one piece more than what is likely, so that the last token before it is cut as it will be
                sure = sum(map(len, pieces))
                pieces.append(piece)
                break
            pieces.append(piece)
            position = end
        text = "".join(pieces)
        return text, len(text) if sure is None else sure

    def _next(self, source: str, position: int) -> tuple[str, int, float]:
        """The next word outside a mention, or the next mention with its tags: how it is written, where in the
        source it ends, its chance."""
        word = _WORD.search(source, position)
        if not word:
            return source[position:], len(source), 1.0
        if inside_word(source, position):
            return word[0], word.end(), 1.0  # no tag comes inside a word
        string, label, chance = self.habits.mention(source, word)
        if label is None:
            return source[position : word.end()], word.end(), chance
        opener, closer = self.tags[label]
        written = source[position : word.start()] + opener + string + closer
        return written, word.start() + len(string), chance


def prime(task: Task, known: Iterable[Sentence]) -> "Habits":
    """The habits that sentences show whose mentions are known, such as those that the model was trained on."""
    habits = Habits(task.labels)
    for sentence in known:
        habits.learn(sentence)
    return habits


class Habits:
    """What was tagged so far and what was not."""

    def __init__(self, labels: Sequence[str]):
        # before anything is seen, one word in ten begins a mention
        self.prior: dict[str | None, float] = {**{label: 0.1 / len(labels) for label in labels}, None: 0.9}
        self.strings: dict[str, Counter] = {}  # how often a string was tagged as which label, or not (None)
        self.starting: dict[str, set[str]] = defaultdict(set)  # those of them that start with a word
        self.words: dict[str, Counter] = defaultdict(Counter)  # the same for first words, and for their endings

    def copy(self) -> "Habits":
        """The same, to learn on apart from this."""
        twin = Habits(())
        twin.prior = self.prior
        twin.strings = {string: counts.copy() for string, counts in self.strings.items()}
        twin.starting.update((word, set(strings)) for word, strings in self.starting.items())
        twin.words.update((word, counts.copy()) for word, counts in self.words.items())
        return twin

    def learn(self, sentence: Sentence) -> None:
        at = 0
        for span in outermost(sentence.spans, self.prior):
            self.passed(sentence.text, at, span.start)
            self.tagged(sentence.text, span.start, span.end, span.label)
            at = span.end
        self.passed(sentence.text, at, len(sentence.text))

    def tagged(self, source: str, start: int, end: int, label: str) -> None:
        if word := _WORD.match(source, start, end):
            string = source[start:end]
            self.strings.setdefault(string, Counter())[label] += 1
            self.starting[word[0]].add(string)
            self._count(word[0], label)

    def passed(self, source: str, start: int, end: int) -> int:
        """Learns that no mention begins at the words from `start` to `end`; returns the end of the last whole one."""
        for word in _WORD.finditer(source, start):
            if word.end() > end:
                break
            start = word.end()
            self._count(word[0], None)
            for string in self._known(source, word.start()):
                self.strings[string][None] += 1
        return start

    def _count(self, word: str, label: str | None) -> None:
        for key in (word, _ending(word)):
            self.words[key][label] += 1

    def _known(self, source: str, start: int) -> list[str]:
        """The strings once tagged that stand here as whole words, the longest first."""
        word = _WORD.match(source, start)
        found = [
            string
            for string in self.starting.get(word[0] if word else "", ())
            if source.startswith(string, start) and not inside_word(source, start + len(string))
        ]
        return sorted(found, key=len, reverse=True)

    def _odds(self, word: str) -> dict[str | None, float]:
        """The chances that a mention of each label, or none (None), begins with a word."""
        counts, alike = self.words[word], self.words[_ending(word)]
        return {
            label: (counts[label] + (alike[label] + prior) / (alike.total() + 1)) / (counts.total() + 1)
            for label, prior in self.prior.items()
        }

    def mention(self, source: str, word: re.Match[str]) -> tuple[str, str | None, float]:
        """The mention that begins at a word, its label, and its chance; label None: none begins, with that chance."""
        start = word.start()
        for string in self._known(source, start):
            counts = self.strings[string]
            label, count = counts.most_common(1)[0]
            if label and count > (counts.total() + 0.5) / 2:
                return string, label, count / (counts.total() + 0.5)
        odds = self._odds(word[0])
        label = max(odds, key=odds.__getitem__)
        if label is None:
            return "", None, odds[label]
        compound = _COMPOUND.match(source, start)
        return compound[0] if compound else word[0], label, odds[label] * _ENDS

    def label(self, source: str, start: int, among: Sequence[str]) -> tuple[str, float]:
        """Which of some labels a mention has that begins here, and the chance of that."""
        known = sum((self.strings[string] for string in self._known(source, start)), Counter())
        word = _WORD.search(source, start)
        odds = self._odds(word[0] if word else "")
        counts = {label: known[label] + odds[label] for label in among}
        label = max(counts, key=counts.__getitem__)
        return label, counts[label] / sum(counts.values())

    def end(self, source: str, start: int, position: int) -> tuple[int, float]:
        """Where a mention that began at `start` and has come to `position` ends, and the chance of that."""
        counts = {
            start + len(string): self.strings[string].total() - self.strings[string][None]
            for string in self._known(source, start)
            if start + len(string) >= position
        }
        if counts:
            end = max(counts, key=counts.__getitem__)
            return end, counts[end] / (sum(counts.values()) + 0.3)
        if position > start and not re.match(r"\w", source[position:]):
            return position, _ENDS
        word = _COMPOUND.search(source, position)
        return (word.end() if word else len(source)), _ENDS


def _ending(word: str) -> str:
    """The last letters of a word, as a key beside whole words."""
    return "~" + word[-3:]
