"""Forward passes over many rows: what the model chooses behind each token that is asked about.

Dimensions: P places of a pass at which a token is chosen, V vocabulary, M tokens allowed at most at a place.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..model.attention import cached_kernel
from ..model.llama import Backbone, Llama
from ..model.packing import Packing, moved
from .graphed import Graphs
from .room import Room

SOFTMAX_AT_ONCE = 2**22  # values


@dataclass(frozen=True)
class Choices:
    """What the model chooses at each place of a pass.

    Attributes:
        picks: the most probable token of those that are allowed.
        wanted: the most probable of all.
        log_probs: of the picks at some of the places, among the tokens that are allowed there.
    """

    picks: list[int]
    wanted: list[int]
    log_probs: Callable[[list[int]], list[float]]


class Passes:
    """
    Args:
        backbone: the model's own, or that of `model.prepared`.
        room: with the cache.
        tell: as in `generate`.
    """

    def __init__(self, model: Llama, backbone: Backbone, room: Room, tell: Callable[[str], None]):
        self.model, self.backbone, self.room = model, backbone, room
        kernel = cached_kernel(model.config.head_dim, model.model.norm.weight.dtype, room.device)
        graphed = backbone is not model.model and kernel is not None
        self.graphs = Graphs(model, backbone, room.cache, tell) if graphed else None

    def __call__(
        self,
        feeds: Sequence[Sequence[int]],
        starts: Sequence[int] | None,
        places: Sequence[int],
        asked: Sequence[int],
        paths: Sequence[Mapping[int, Any]],
        rows: int,
        slots: Sequence[int],
    ) -> Choices:
        """
        Args:
            feeds: the tokens that each row gives to the pass.
            starts: where rows go on; None for rows that enter.
            places: of the rows in the cache.
            asked: the P places, counted over all feeds, behind which a token is chosen: all, where rows go on.
            paths: the tokens that are allowed at each of them; if empty, all are.
            rows: of the cache.
            slots: of each row that is in the cache, or enters.

        Raises:
            NoRoom, torch.OutOfMemoryError: nothing is changed then.
        """
        if self.graphs:
            self.graphs.check()
        width = self.graphs.width(feeds) if self.graphs and starts is not None and not paths else 0
        ends = (start + (width or len(feed)) for start, feed in zip(starts or [0] * len(feeds), feeds, strict=True))
        total, choices = (width * rows,) * 2 if width else (sum(map(len, feeds)), len(asked))
        self.room.make(rows, max(*slots, *ends), total, choices, alone=len(slots) == 1)
        if self.graphs and starts is not None and width:
            picks, log_probs = self.graphs(feeds, starts)
            return Choices(picks, picks, lambda kept: [log_probs[place] for place in kept])
        device = self.room.device
        ids, choosing = moved(device, torch.tensor([token for feed in feeds for token in feed]), torch.tensor(asked))
        packing = Packing([len(feed) for feed in feeds], device, None if starts is None else [*starts], [*places])
        logits = self.model.lm_head(self.backbone(ids[None], packing, self.room.cache)[0, choosing])
        scores, tokens = _scores(logits, paths)
        best = scores.max(-1).indices  # the first of equals, like argmax, which takes four times as long in bf16
        picks = (best if tokens is None else tokens.gather(1, best[:, None])[:, 0]).tolist()
        wanted = logits.max(-1).indices.tolist() if paths else picks
        return Choices(picks, wanted, lambda kept: _log_probs(scores, best, kept))

    def end(self) -> None:
        """Frees the memory of cache and graphs."""
        self.room.cache.resize(0, 0)
        if self.graphs:
            self.graphs.check()


def _scores(logits: Tensor, paths: Sequence[Mapping[int, Any]]) -> tuple[Tensor, Tensor | None]:
    """The logits (P, V); or, where only some tokens are allowed, theirs and their ids, both (P, M), the ids in order so
    that of equals the same comes first."""
    if not paths:
        return logits, None
    widest = max(1, *map(len, paths))
    tokens = torch.tensor(
        [[*sorted(allowed), *[-1] * (widest - len(allowed))] for allowed in paths], device=logits.device
    )
    return logits.gather(1, tokens.clamp(min=0)).masked_fill(tokens < 0, -torch.inf), tokens


def _log_probs(scores: Tensor, best: Tensor, kept: list[int]) -> list[float]:
    """The log-probabilities of the chosen tokens at some of the places; half precision rounds the result only. Of a few
    at a time, which takes little memory."""
    places = torch.tensor(kept, dtype=torch.long, device=scores.device)
    parts = places.split(max(1, SOFTMAX_AT_ONCE // scores.shape[1]))
    return torch.cat([scores[some].log_softmax(-1).gather(1, best[some, None])[:, 0] for some in parts]).tolist()
