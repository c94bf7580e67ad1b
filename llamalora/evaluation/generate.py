"""Greedy decoding of many prompts: ragged batches, a key/value cache, drafts verified in one pass."""

from collections import deque
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol, TypeVar

import torch

from ..distributed.sharding import is_spread
from ..model.attention import MOST_SEQUENCES
from ..model.llama import Llama
from ..model.prepared import prepared
from .passes import Passes
from .room import NoRoom, Room, expected

# proposes how an output goes on: (prompt index, output so far) -> ids, perhaps none
Drafter = Callable[[int, list[int]], Sequence[int]]


State = TypeVar("State", bound=Hashable)

WORTH_PREPARING = 16, 128  # prompts on a CPU, tokens expected on a GPU; for fewer, it takes longer than it spares


class Grammar(Protocol[State]):
    """Which outputs are allowed, as an automaton."""

    def start(self, index: int) -> State:
        """The state before the output of a prompt begins."""

    def moves(self, state: State) -> Mapping[int, State]:
        """The tokens that may follow, each with the state behind it; none if the output cannot go on."""

    def withdraw(self, states: Sequence[State], output: Sequence[int], wanted: int) -> tuple[int, State] | None:
        """Asked where the model wants a token that is not allowed: how much of the output stays if an earlier choice
        is taken back, and the state from which it goes on. None: nothing is, the best allowed token follows.

        Args:
            states: before and behind each token of the output.
        """


@dataclass(frozen=True)
class Decoding:
    """What `generate` returns."""

    outputs: list[list[int]]  # new ids of each prompt, in the order of the prompts, without the end token
    truncated: list[bool]  # the limit, or a place at which nothing is allowed, was reached before the end token
    log_probs: list[list[float]]  # of each token of the outputs, among those that were allowed
    forward_passes: int
    row_passes: int  # the same counted for each prompt: the passes in which its output grew


@dataclass
class _Row:
    """A prompt that occupies a row of the cache."""

    index: int
    prompt: list[int]
    limit: int
    states: list[Any]  # of the grammar, before and behind each token of the output
    output: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    ended: bool = False
    stuck: bool = False  # the grammar allows nothing more

    @property
    def slots(self) -> int:
        """Of the cache, that its tokens so far take."""
        return len(self.prompt) + len(self.output)

    @property
    def need(self) -> int:
        """The slots that it will probably need."""
        return max(self.slots + 1, expected(len(self.prompt), self.limit))

    @property
    def finished(self) -> bool:
        return self.ended or self.stuck or len(self.output) == self.limit


@torch.no_grad()
def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    eos_id: int | Collection[int],
    max_new_tokens: int | Sequence[int],
    batch_size: int = 32,
    drafter: Drafter | None = None,
    grammar: Grammar[Any] | None = None,
    progress: Callable[[int], None] = lambda finished: None,
    stop: Callable[[], object] = lambda: False,
    tell: Callable[[str], None] = lambda line: None,
) -> Decoding:
    """The most probable (allowed) next token, over and over, until an end token or the limit.

    A prompt that is finished leaves its cache row to the next one. A draft is checked in one forward pass
    and kept as far as it is what greedy decoding yields: it changes the speed, not the output. Where the memory does
    not suffice for the rows side by side, they begin again from what they have, half as many at a time.

    Args:
        prompts: token ids of each, at least one.
        eos_id: the end token, with which all that the model's configuration names end an output if it is one of
            them; or all end tokens.
        max_new_tokens: the limit, one for all or one for each prompt.
        batch_size: prompts decoded side by side at most, as many as the memory allows (`room.Room`); the outputs do
            not depend on it.
        drafter: proposes continuations; without one, a pass yields a token.
        grammar: only outputs that it allows; without one, every token may follow.
        progress: called with the number of prompts finished since the last call.
        stop: asked before each forward pass; once it says so, outputs stay as they are.
        tell: called with a line for a person where the memory makes it fewer prompts.

    Raises:
        ValueError: an empty prompt, or a limit below 1.
        torch.OutOfMemoryError: a GPU has no room for a single prompt.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if not all(prompts) or min(limits, default=1) < 1:
        raise ValueError("every prompt needs a token and every limit must be at least 1")
    ends = frozenset([eos_id] if isinstance(eos_id, int) else eos_id)
    if isinstance(eos_id, int) and eos_id in model.config.end_ids:
        ends |= model.config.end_ids
    requests = [
        _Row(index, list(prompt), limit, [grammar.start(index) if grammar else None])
        for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]
    waiting = deque(sorted(requests, key=lambda row: -len(row.prompt)))
    device = model.model.norm.weight.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    rows: list[_Row | None] = []  # one for each of the cache's
    cache = model.make_cache(0, 0, autocast)
    most = min(batch_size, len(requests), MOST_SEQUENCES // model.config.num_key_value_heads)
    room = Room(model.config, cache, most, [row.need for row in requests], tell)
    few, short = WORTH_PREPARING
    new = sum(row.need - row.slots for row in requests)
    worth = not is_spread(model) and (new >= short if device == "cuda" else len(requests) >= few)
    passed = row_passes = 0
    with ExitStack() as stack:
        backbone = stack.enter_context(prepared(model)) if worth else model.model
        passes = Passes(model, backbone, room, tell)
        stack.callback(passes.end)
        while (waiting or any(rows)) and not stop():
            inside = [row for row in rows if row is not None]
            candidates = ((row.slots, row.need) for row in waiting)
            entering = room.entering([row.need for row in inside], candidates) if waiting else 0
            places = list(range(len(rows)))
            if entering:
                rows += [None] * (len(inside) + entering - len(rows))
                places = [place for place, row in enumerate(rows) if row is None][:entering]
                for place in places:
                    rows[place] = waiting.popleft()
            active = [rows[place] for place in places]
            try:
                _advance(passes, rows, places, ends, drafter, grammar, fresh=bool(entering))
            except (NoRoom, torch.OutOfMemoryError) as error:
                inside = [row for row in rows if row is not None]
                # a pass of a sharded model cannot be repeated: the other processes are in the midst of it
                if len(inside) == 1 or is_spread(model) and not isinstance(error, NoRoom):
                    raise
            else:
                passed += 1
                row_passes += sum(row is not None for row in active)
                for place, row in zip(places, active, strict=True):
                    if row is not None and row.finished:
                        rows[place] = None
                        row.states.clear()
                        progress(1)
                continue
            # here, since until now the error has held what the pass had computed
            rows.clear()
            waiting.extendleft(sorted(inside, key=lambda row: row.need))
            room.halve([row.need for row in inside])
    return Decoding(
        [row.output for row in requests],
        [not row.ended for row in requests],
        [row.log_probs for row in requests],
        passed,
        row_passes,
    )


def _advance(
    passes: Passes,
    rows: list[_Row | None],
    places: list[int],
    ends: Collection[int],
    drafter: Drafter | None,
    grammar: Grammar[Any] | None,
    fresh: bool,
) -> None:
    """One pass over the rows at some places: each takes over the model's choices for as long as its draft foresaw them,
    and one more. What enters (`fresh`) brings its prompt, and what it had written when it was sent away.

    Raises:
        NoRoom, torch.OutOfMemoryError: nothing is changed then.
    """
    active = [rows[place] for place in places]
    feeds: list[list[int]] = []  # what each row gives to the pass: its prompt or its last token, then its draft
    starts: list[int] = []
    drafts: list[list[int]] = []
    predictors: list[int] = []  # the places of the packed row behind which a token is chosen
    paths: list[Mapping[int, Any]] = []  # what the grammar allows there
    total = 0
    for row in active:
        if row is None:
            feeds.append([])
            starts.append(0)
            continue
        draft = list(drafter(row.index, row.output)[: row.limit - len(row.output) - 1]) if drafter else []
        if grammar:
            path = _path(grammar, row.states[-1], draft, ends)
            draft = draft[: len(path) - 1]
            paths += path
        drafts.append(draft)
        feeds.append([*row.prompt, *row.output, *draft] if fresh else [*(row.output or row.prompt)[-1:], *draft])
        starts.append(0 if fresh else row.slots - 1)
        total += len(feeds[-1])
        predictors += range(total - len(draft) - 1, total)

    # one pass: all rows behind each other, and behind every token of a draft the choice that checks the next
    present = [row.slots for row in rows if row is not None]
    choices = passes(feeds, None if fresh else starts, places, predictors, paths, len(rows), present)

    # row by row: take over choices while the draft foresaw them; the first that it did not is still the model's own
    kept: list[int] = []
    growing = [row for row in active if row is not None]
    taken = []
    first = 0
    for row, draft in zip(growing, drafts, strict=True):
        count, back = 0, None
        for place, token in enumerate(choices.picks[first : first + len(draft) + 1], start=first):
            if grammar and (wanted := choices.wanted[place]) not in paths[place]:
                back = grammar.withdraw(row.states, row.output, wanted)
            if back:
                break
            if paths and not paths[place]:
                row.stuck = True
            elif token in ends:
                row.ended = True
            else:
                row.output.append(token)
                row.states.append(paths[place][token] if paths else None)
                count += 1
            if row.finished or draft[count - 1 : count] != [token]:
                break
        kept += range(first, first + count)
        taken.append((count, back))
        first += len(draft) + 1

    # one softmax for all that was kept; and what the grammar takes back leaves the row
    log_probs = iter(choices.log_probs(kept))
    for row, (count, back) in zip(growing, taken, strict=True):
        row.log_probs += islice(log_probs, count)
        if back:
            length, state = back
            del row.output[length:], row.log_probs[length:], row.states[length:]
            row.states.append(state)


def _path(grammar: Grammar[State], state: State, draft: list[int], ends: Collection[int]) -> list[Mapping[int, State]]:
    """What the grammar allows behind an output and behind each token of its draft, as far as it allows that."""
    path = [grammar.moves(state)]
    for token in draft:
        if token in ends or token not in path[-1]:
            break
        path.append(grammar.moves(path[-1][token]))
    return path
