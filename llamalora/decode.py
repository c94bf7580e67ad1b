"""Greedy decoding of many prompts: ragged batches, a key/value cache, drafts verified in one pass."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from .model import Llama
from .packing import KVCache, Packing

# proposes how an output goes on: (prompt index, output so far) -> ids, perhaps none
Drafter = Callable[[int, list[int]], Sequence[int]]


@dataclass(frozen=True)
class Decoding:
    """What `generate` returns."""

    outputs: list[list[int]]  # new ids of each prompt, in the order of the prompts, without the end token
    truncated: list[bool]  # the limit was reached before the end token
    forward_passes: int


@dataclass
class _Row:
    """A prompt that occupies a row of the cache."""

    index: int
    prompt: list[int]
    limit: int
    output: list[int] = field(default_factory=list)
    ended: bool = False

    def accept(self, draft: Sequence[int], picks: Sequence[int], eos_id: int) -> None:
        """Takes over the model's choices for as long as the draft foresaw them, and one more."""
        for place, token in enumerate(picks):
            if token == eos_id:
                self.ended = True
                return
            self.output.append(token)
            if len(self.output) == self.limit or place < len(draft) and draft[place] != token:
                return

    @property
    def finished(self) -> bool:
        return self.ended or len(self.output) == self.limit


@torch.no_grad()
def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    eos_id: int,
    max_new_tokens: int | Sequence[int],
    batch_size: int = 32,
    drafter: Drafter | None = None,
    progress: Callable[[int], None] = lambda finished: None,
    stop: Callable[[], object] = lambda: False,
) -> Decoding:
    """The most probable next token, over and over, until the end token or the limit.

    A prompt that is finished leaves its cache row to the next one. A draft is checked in one forward pass
    and kept as far as it is what greedy decoding yields: it changes the speed, not the output.

    Args:
        prompts: token ids of each, at least one.
        max_new_tokens: the limit, one for all or one for each prompt.
        batch_size: prompts decoded side by side; the outputs do not depend on it.
        drafter: proposes continuations; without one, a pass yields a token.
        progress: called with the number of prompts finished since the last call.
        stop: asked before each forward pass; once it says so, outputs stay as they are.

    Raises:
        ValueError: an empty prompt, or a limit below 1.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if not all(prompts) or min(limits, default=1) < 1:
        raise ValueError("every prompt needs a token and every limit must be at least 1")
    requests = [
        _Row(index, list(prompt), limit) for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]
    waiting = deque(sorted(requests, key=lambda row: -len(row.prompt)))
    rows: list[_Row | None] = [None] * min(batch_size, len(requests))
    slots = max((len(row.prompt) + row.limit for row in requests), default=0)
    device = model.model.norm.weight.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    cache = model.make_cache(len(rows), slots, autocast)
    passes = 0
    while (waiting or any(rows)) and not stop():
        free = [place for place, row in enumerate(rows) if row is None]
        # prompts enter several at a time, in a pass of their own, because they are longer than a step
        enter = waiting and 4 * len(free) >= len(rows)
        places = free[: len(waiting)] if enter else list(range(len(rows)))
        if enter:
            for place in places:
                rows[place] = waiting.popleft()
        active = [rows[place] for place in places]
        drafts = [_draft(row, drafter) for row in active]
        picks = _forward(model, cache, places, active, drafts, fresh=bool(enter))
        passes += 1
        for place, row, draft, picked in zip(places, active, drafts, picks, strict=True):
            if row is not None:
                row.accept(draft, picked, eos_id)
                if row.finished:
                    rows[place] = None
                    progress(1)
    return Decoding([row.output for row in requests], [not row.ended for row in requests], passes)


def _draft(row: _Row | None, drafter: Drafter | None) -> Sequence[int]:
    if row is None or drafter is None:
        return []
    return drafter(row.index, row.output)[: row.limit - len(row.output) - 1]


def _forward(
    model: Llama,
    cache: KVCache,
    places: list[int],
    active: list[_Row | None],
    drafts: list[Sequence[int]],
    fresh: bool,
) -> list[list[int]]:
    """One pass over all rows: what the model would say after each row's last token and each draft token."""
    feeds, starts, predictors = [], [], []
    total = 0
    for row, draft in zip(active, drafts, strict=True):
        if row is None:
            feed, start = [], 0
        elif fresh:
            feed, start = [*row.prompt, *draft], 0
        else:
            feed, start = [row.output[-1], *draft], len(row.prompt) + len(row.output) - 1
        feeds.append(feed)
        starts.append(start)
        total += len(feed)
        if row is not None:
            predictors.extend(range(total - len(draft) - 1, total))
    device = cache.keys.device
    ids = torch.tensor([[token for feed in feeds for token in feed]], device=device)
    packing = Packing([len(feed) for feed in feeds], device, None if fresh else starts, places)
    hidden = model.model(ids, packing, cache)[0, torch.tensor(predictors, device=device)]
    picks = iter(model.lm_head(hidden).argmax(-1).tolist())
    return [
        [] if row is None else [next(picks) for _ in range(len(draft) + 1)]
        for row, draft in zip(active, drafts, strict=True)
    ]
