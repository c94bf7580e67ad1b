"""Which tokens may follow, if an answer has to be its source with legal tags in it (tagging only).

The legal answers are those that `render_answer` can write and `parse` can read: the source, in it mentions that
neither overlap nor begin or end with whitespace, nor inside a word or right behind another mention unless the training
data shows it. An automaton reads an answer byte by byte, because a token may hold the end of a word and the beginning
of a tag, or a part of a character. Where the model wants what is not legal, the best legal token follows, except where
that would only close a mention that the model has given up: then the mention is taken back.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from ..corpus.documents import Sentence, outermost
from ..task.definition import Task
from ..task.tagging import tag_places, word_part
from ..task.tokenizer import Tokenizer


class _Reading(NamedTuple):
    """One way to read an answer so far. There are several where the source itself holds what looks like a tag."""

    position: int  # bytes of the source that are written
    rest: bytes  # of a tag that has begun
    closer: bytes  # of the mention that is open, or that `rest` opens; empty: none
    edge: int  # the position of the last tag: neither a mention is empty nor, mostly, what parts two; -1: none


class State(NamedTuple):
    """How far an answer has come; `generate` only hands it back, to `moves` and `withdraw`."""

    prompt: int  # its number
    room: int  # tokens that may still come
    readings: frozenset[_Reading]
    shut: frozenset[int] = frozenset()  # positions at which no mention begins, since one was withdrawn there


class Constraint:
    """Walks the vocabulary along the few legal continuations, instead of trying every token.

    Args:
        texts: the source of each prompt.
        limits: the tokens that each answer may have; no mention is opened that would leave too few of them for the
            rest of the source, even spelled byte by byte.
        known: sentences whose mentions are known: what is tagged inside words there may be tagged so again.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        task: Task,
        texts: Sequence[str],
        limits: Sequence[int],
        known: Iterable[Sentence] = (),
    ):
        assert task.copies
        self.eos_id = tokenizer.eos_id
        self.tokens: dict[bytes, list[int]] = {}
        for token, spelling in enumerate(tokenizer.spellings):
            if spelling:
                self.tokens.setdefault(spelling, []).append(token)
        self.prefixes = {spelling[:size] for spelling in self.tokens for size in range(1, len(spelling) + 1)}
        self.tags = [tuple(tag.encode() for tag in task.tags(label)) for label in task.labels]
        parts, self.touching = set(), False
        for sentence in known:
            spans = outermost(sentence.spans, task.labels)
            parts |= {word_part(sentence.text, span.start, span.end) for span in spans}
            self.touching |= any(span.end == after.start for span, after in pairwise(spans))
        parts = {part for part in parts if part[1] or part[2]}
        self.sources = [_Source(text, tag_places(task, text, parts)) for text in texts]
        self.limits = limits

    def start(self, index: int) -> State:
        return State(index, self.limits[index], frozenset([_Reading(0, b"", b"", -1)]))

    def moves(self, state: State) -> dict[int, State]:
        """Every token that may follow, and the state behind it; the end token leads back to its own state.

        Empty where the vocabulary cannot spell the next character.
        """
        source = self.sources[state.prompt]
        allowed = {}
        if any(reading[:3] == (len(source.text), b"", b"") for reading in state.readings):
            allowed[self.eos_id] = state
        paths = [(b"", state.readings)]
        while paths:
            spelling, readings = paths.pop()
            ways: dict[int, set[_Reading]] = {}
            for reading in readings:
                for byte, next_reading in self._steps(source, reading, state):
                    ways.setdefault(byte, set()).add(next_reading)
            for byte, after in ways.items():
                longer = spelling + bytes([byte])
                if longer in self.prefixes:
                    paths.append((longer, frozenset(after)))
                    if longer in self.tokens:
                        behind = state._replace(room=state.room - 1, readings=frozenset(after))
                        allowed |= dict.fromkeys(self.tokens[longer], behind)
        return allowed

    def withdraw(self, states: Sequence[State], output: Sequence[int], wanted: int) -> tuple[int, State] | None:
        """Takes back a mention that the model has given up: it wants to end the answer, or to open another mention,
        although this one is open. Closing it there would be nobody's choice; so it is not opened."""
        outside = max(place for place, state in enumerate(states) if any(not r.rest + r.closer for r in state.readings))
        for place in range(outside + 1, len(states)):
            opened = [reading for reading in states[place].readings if reading.closer and not reading.rest]
            if opened:
                break
        else:
            return None
        unopened = states[place]._replace(readings=frozenset(r._replace(closer=b"", edge=-1) for r in opened))
        for token in (*output[place:], wanted):
            following = self.moves(unopened)
            if token not in following:
                return None
            unopened = following[token]
        shut = states[-1].shut.union(reading.edge for reading in opened)
        # the bracket that is written may be the source's own, but no longer the beginning of that mention
        readings = frozenset(r for r in states[outside].readings if not (r.closer and r.edge in shut))
        return outside, states[outside]._replace(readings=readings, shut=shut)

    def _steps(self, source: "_Source", reading: _Reading, state: State) -> list[tuple[int, _Reading]]:
        """The legal next bytes, each with the reading behind it."""
        position, rest, closer, edge = reading
        if rest:
            return [(rest[0], _Reading(position, rest[1:], closer, edge))]
        steps = []
        if position < (source.last if closer else len(source.text)):
            steps.append((source.text[position], _Reading(position + 1, b"", closer, edge)))
        if closer and position in source.ends and position > edge:
            steps.append((closer[0], _Reading(position, closer[1:], b"", position)))
        if closer or position not in source.starts or position in state.shut:
            return steps
        if position > edge or self.touching:
            for opener, its_closer in self.tags:
                # this token, the bytes behind it, the end token
                if len(opener) + len(its_closer) + len(source.text) - position < state.room:
                    steps.append((opener[0], _Reading(position, opener[1:], its_closer, position)))
        return steps


class _Source:
    """A source as the bytes of an answer without tags, and where in them a mention may start and end."""

    def __init__(self, text: str, places: set[int]):
        self.text = (" " + text).encode()  # an answer begins with a space
        self.starts, self.ends = set(), set()
        end = 1
        for place, character in enumerate(text):
            start, end = end, end + len(character.encode())
            if not character.isspace():
                self.starts |= {start} if place in places else set()
                self.ends |= {end} if place + 1 in places else set()
        self.last = max(self.ends, default=0)  # a mention that is open is closed there: behind it are only spaces
