"""Passes as CUDA graphs, if they are sooner computed than launched: the GPU repeats their kernels without Python.

A graph has one shape. So a pass is a rectangle of the cache's rows by a power of two of tokens, padded on the right:
what padding writes to the cache stands where no query looks before it is written again. Numbers that differ from pass
to pass, tokens and where each row goes on, lie in a buffer on the device.

Dimensions: R rows of the cache, T tokens of each.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..model.llama import Backbone, Llama
from ..model.packing import FixedPacking, KVCache

LAUNCHING = 1.1e-3  # seconds that the host of an H200 takes for a layer of a pass that it launches
# operations/s that large products in half precision reach, roughly, from a compute capability on: of 8, 10 and 12 there
# are small cards, too
RATES = {7: 60e12, 8: 120e12, 9: 500e12, 10: 120e12}
IN_FP32 = 1 / 8
MOST = 4096  # tokens of a pass, since its logits take memory


def most_tokens(model: Llama, width: int, capability: int) -> int:
    """Up to so many tokens a pass is sooner computed, padding and all, than launched by the host.

    Args:
        width: bytes of a value in the products' precision.
        capability: of the GPU, the major version.
    """
    rate = RATES[max(known for known in RATES if known <= max(capability, min(RATES)))]
    rate *= IN_FP32 if width == 4 else 1
    operations = 2 * sum(parameter.numel() for parameter in model.parameters())
    return min(MOST, int(LAUNCHING * model.config.num_hidden_layers * rate / operations))


def padded(tokens: int) -> int:
    """Of each row in a pass whose longest row has so many: the next power of two."""
    return 1 << (tokens - 1).bit_length()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """On which graphs are captured. torch's own is of the GPU that was current first; and of each new one cuBLAS keeps
    32 MiB."""
    return torch.cuda.Stream(device)


@contextmanager
def _recovering(device: torch.device, pool: Any) -> Iterator[None]:
    """Undoes what torch leaves as it was during a capture that fails at its end: its stream is the current one, the
    random generator draws no number, since it is in a graph, and the allocator frees nothing, for the pool may need it.
    (Seen with torch 2.11 on an H200. The allocator has no public door for this.)"""
    stream, index = torch.cuda.current_stream(device), device.index or 0
    generator = torch.cuda.default_generators[index]
    state = generator.clone_state()
    try:
        yield
    except BaseException:
        torch.cuda.set_stream(stream)
        generator.graphsafe_set_state(state)
        with suppress(RuntimeError):  # it has ended if the failure was no fault of CUDA's
            torch.cuda.memory._cuda_endAllocateToPool(index, pool)
            torch.cuda.memory._cuda_releasePool(index, pool)
        raise


class Graphs:
    """The graphs of a model and a cache. Each is captured when its shape comes for the second time.

    Args:
        backbone: of `model.prepared`.
        tell: called with a line for a person if capturing fails: then every pass is launched by Python.
    """

    def __init__(self, model: Llama, backbone: Backbone, cache: KVCache, tell: Callable[[str], None]):
        self.model, self.backbone, self.cache, self.tell = model, backbone, cache, tell
        self.known: dict[tuple[int, int], _Graph] = {}
        self.sizes = cache.resized  # how often that was so when the graphs were captured
        self.able = True
        self.device = cache.keys[0].device
        self.stream = _stream(self.device)
        width, capability = cache.keys[0].itemsize, torch.cuda.get_device_capability(self.device)[0]
        self.most = most_tokens(model, width, capability)
        self.pool = torch.cuda.graph_pool_handle()  # of memory: what is read at once may lie where others compute

    def check(self) -> None:
        """Forgets graphs of a cache that has been resized since, and with the last one their pool."""
        if self.sizes != self.cache.resized:
            self.known.clear()
            self.pool, self.sizes = torch.cuda.graph_pool_handle(), self.cache.resized

    def width(self, feeds: Sequence[Sequence[int]]) -> int:
        """T of a pass, or 0 where the rows are too many or too long."""
        width = padded(max(map(len, feeds)))
        return width if self.able and width * len(feeds) <= self.most else 0

    def __call__(self, feeds: Sequence[Sequence[int]], starts: Sequence[int]) -> tuple[list[int], list[float]]:
        """The model's choice behind each token, and its log-probability, row by row.

        Args:
            feeds: tokens of each row of the cache, which has `width` slots from where the row goes on.
            starts: where that is.
        """
        self.check()
        width = self.width(feeds)
        shape = len(feeds), width
        graph = self.known.get(shape)
        if graph is None:
            graph = self.known[shape] = _Graph(self.model, self.backbone, self.cache, *shape)
        elif graph.captured is None and self.able:
            try:
                with _recovering(self.device, self.pool):
                    graph.capture(self.stream, self.pool)
            except RuntimeError as error:
                self.able = False
                self.tell(f"decoding without CUDA graphs, which is slower: {error}")
        picks, log_probs = graph.run(
            [[start, *feed, *[0] * (width - len(feed))] for start, feed in zip(starts, feeds, strict=True)]
        )
        real = [row * width + place for row, feed in enumerate(feeds) for place in range(len(feed))]
        return [int(picks[place]) for place in real], [log_probs[place] for place in real]


class _Graph:
    """A pass of R rows by T tokens."""

    def __init__(self, model: Llama, backbone: Backbone, cache: KVCache, rows: int, width: int):
        self.model, self.backbone, self.cache = model, backbone, cache
        # of each row: where it goes on, and its tokens
        self.given = torch.zeros(rows, 1 + width, dtype=torch.long, device=cache.keys[0].device)
        self.captured: torch.cuda.CUDAGraph | None = None
        self.result: Tensor | None = None

    def capture(self, stream: torch.cuda.Stream, pool: Any) -> None:
        """Makes a graph of what `compute` launches, which must have run before: what is made then is kept.

        Args:
            stream: of the device.
            pool: of memory, as torch names it.
        """
        graph = torch.cuda.CUDAGraph()
        # what other threads do with the GPU is none of the graph's business
        with (
            torch.cuda.device(stream.device),
            torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"),
        ):
            self.result = self.compute()
        self.captured = graph

    def run(self, given: list[list[int]]) -> list[list[float]]:
        """Choices and log-probabilities, each (R * T)."""
        self.given.copy_(torch.tensor(given), non_blocking=True)
        if self.captured is None:
            return self.compute().tolist()
        assert self.result is not None
        self.captured.replay()
        return self.result.tolist()

    def compute(self) -> Tensor:
        packing = FixedPacking(self.given[:, 0], self.given.shape[1] - 1)
        hidden = self.backbone(self.given[:, 1:].reshape(1, -1), packing, self.cache)[0]
        logits = self.model.lm_head(hidden)  # (R * T, V)
        best = logits.max(-1).indices
        log_probs = logits.log_softmax(-1).gather(1, best[:, None])[:, 0]
        return torch.stack((best.double(), log_probs.double()))
