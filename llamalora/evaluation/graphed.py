"""Passes of few tokens as CUDA graphs: the GPU repeats its kernels without Python, which would launch them more slowly
than they run.

A graph has one shape. So a pass is a rectangle of the cache's rows by a power of two of tokens, padded on the right:
what padding writes to the cache stands where no query looks before it is written again. Numbers that differ from pass
to pass, tokens and where each row goes on, lie in a buffer on the device.

Dimensions: R rows of the cache, T tokens of each.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model.llama import Backbone, Llama
from ..model.packing import FixedPacking, KVCache

MOST = 128  # tokens of a pass: fewer cost no more than one, since a GPU takes the time to read the weights
GRAIN = 128  # slots of the cache by which a graph's attention is longer than another's


class Graphs:
    """The graphs of a model and a cache. Each is captured when its shape comes for the second time.

    Args:
        backbone: of `model.prepared`.
        tell: called with a line for a person if capturing fails: then every pass is launched by Python.
    """

    def __init__(self, model: Llama, backbone: Backbone, cache: KVCache, tell: Callable[[str], None]):
        self.model, self.backbone, self.cache, self.tell = model, backbone, cache, tell
        self.known: dict[tuple[int, int, int], _Graph] = {}
        self.sizes = cache.resized  # how often that was so when the graphs were captured
        self.able = True
        device = cache.keys[0].device
        self.stream = torch.cuda.Stream(device)  # torch's own is of the GPU that was current first
        self.pool: Any = None  # of memory: what is read at once may lie where others compute

    def check(self) -> None:
        """Forgets graphs of a cache that has been resized since, and with the last one their pool."""
        if self.sizes != self.cache.resized:
            self.known.clear()
            self.pool, self.sizes = None, self.cache.resized

    @staticmethod
    def width(feeds: Sequence[Sequence[int]]) -> int:
        """T of a pass, or 0 where the rows are too many or too long."""
        longest = max(map(len, feeds))
        width = 1 << (longest - 1).bit_length()
        return width if width * len(feeds) <= MOST else 0

    def __call__(self, feeds: Sequence[Sequence[int]], starts: Sequence[int]) -> tuple[list[int], list[float]]:
        """The model's choice behind each token, and its log-probability, row by row.

        Args:
            feeds: tokens of each row of the cache, which has `width` slots from where the row goes on.
            starts: where that is.
        """
        self.check()
        width = self.width(feeds)
        slots = self.cache.slots
        extent = min(slots, -(-(max(starts) + width) // GRAIN) * GRAIN)
        shape = len(feeds), width, extent
        graph = self.known.get(shape)
        if graph is None:
            graph = self.known[shape] = _Graph(self.model, self.backbone, self.cache, *shape)
        elif graph.captured is None and self.able:
            usual = torch.cuda.current_stream(self.stream.device)
            try:
                self.pool = graph.capture(self.stream, self.pool)
            except RuntimeError as error:
                torch.cuda.set_stream(usual)  # which torch leaves out where capturing fails at its end
                self.able = False
                self.tell(f"decoding without CUDA graphs, which is slower: {error}")
        picks, log_probs = graph.run(
            [[start, *feed, *[0] * (width - len(feed))] for start, feed in zip(starts, feeds, strict=True)]
        )
        real = [row * width + place for row, feed in enumerate(feeds) for place in range(len(feed))]
        return [int(picks[place]) for place in real], [log_probs[place] for place in real]


class _Graph:
    """A pass of R rows by T tokens, of which each sees at most so many slots of the cache."""

    def __init__(self, model: Llama, backbone: Backbone, cache: KVCache, rows: int, width: int, extent: int):
        self.model, self.backbone, self.cache, self.extent = model, backbone, cache, extent
        # of each row: where it goes on, and its tokens
        self.given = torch.zeros(rows, 1 + width, dtype=torch.long, device=cache.keys[0].device)
        self.captured: torch.cuda.CUDAGraph | None = None
        self.result: Tensor | None = None

    def capture(self, stream: torch.cuda.Stream, pool: Any) -> Any:
        """Makes a graph of what `compute` launches, which must have run before: what is made then is kept.

        Args:
            stream: of the device.
            pool: of memory, as torch names it; None for a new one.

        Returns:
            The pool.
        """
        graph = torch.cuda.CUDAGraph()
        # what other threads do with the GPU is none of the graph's business
        with (
            torch.cuda.device(stream.device),
            torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"),
        ):
            self.result = self.compute()
        self.captured = graph
        return graph.pool()

    def run(self, given: list[list[int]]) -> list[list[float]]:
        """Choices and log-probabilities, each (R * T)."""
        self.given.copy_(torch.tensor(given), non_blocking=True)
        if self.captured is None:
            return self.compute().tolist()
        assert self.result is not None
        self.captured.replay()
        return self.result.tolist()

    def compute(self) -> Tensor:
        packing = FixedPacking(self.given[:, 0], self.given.shape[1] - 1, self.extent)
        hidden = self.backbone(self.given[:, 1:].reshape(1, -1), packing, self.cache)[0]
        logits = self.model.lm_head(hidden)  # (R * T, V)
        best = logits.max(-1).indices
        log_probs = logits.log_softmax(-1).gather(1, best[:, None])[:, 0]
        return torch.stack((best.double(), log_probs.double()))
