"""Many sequences in one row without padding: how they stand in it, in rectangles for attention, in the cache.

Dimensions: N tokens of the row, T tokens of a sequence, L longest sequence of a rectangle, S cache slots,
K key/value heads, E head size.
"""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from .elementwise import Run, write_slots


class Rectangle:
    """Sequences of similar length as a right-padded rectangle (batch, L), where causality alone keeps real
    tokens from seeing padding."""

    def __init__(self, lengths: list[int], device: torch.device):
        count, longest = len(lengths), max(lengths)
        self.shape = (count, longest)
        self.tokens = sum(lengths)
        self.slots = None  # (tokens,) into the flattened rectangle; None: it is full
        if self.tokens < count * longest:
            row, offset = _rows_and_offsets(lengths)
            self.slots = (row * longest + offset).to(device, non_blocking=True)

    def unpack(self, x: Tensor) -> Tensor:
        """(tokens, heads, E) -> (batch, L, heads, E), zeros where there is no token."""
        if self.slots is None:
            return x.unflatten(0, self.shape)
        rows, longest = self.shape
        return x.new_zeros(rows * longest, *x.shape[1:]).index_copy(0, self.slots, x).unflatten(0, self.shape)

    def pack(self, x: Tensor) -> Tensor:
        """(batch, L, ...) -> (tokens, ...), the inverse of `unpack`."""
        x = x.flatten(0, 1)
        return x if self.slots is None else x.index_select(0, self.slots)


class Packing:
    """How sequences of unequal lengths stand behind each other in one row, without padding.

    Every matrix product sees the row, (1, N, D); only attention sees sequences, by their bounds or as rectangles.

    Args:
        lengths: tokens of each sequence in the row.
        starts: with a cache, the position at which each sequence goes on; without, all start at 0 and see
            only themselves.
        rows: the cache rows that the sequences are written to; default 0, 1, ... Sequences that go on
            must be given for all rows of the cache (a length may be 0).

    Attributes:
        positions: (1, N) of each token in its sequence.
        rows: (N,) of the cache, of each token.
        bounds: (sequences + 1,) in int32: where each sequence begins in the row, and where the last ends.
    """

    def __init__(
        self,
        lengths: list[int],
        device: torch.device,
        starts: list[int] | None = None,
        rows: list[int] | None = None,
    ):
        row, offset = _rows_and_offsets(lengths)
        first = torch.tensor(starts or [0] * len(lengths))
        self.lengths, self.device = lengths, device
        rows_of_tokens = row if rows is None else torch.tensor(rows)[row]
        bounds = torch.tensor([0, *accumulate(lengths)])
        positions, self.rows, bounds = moved(device, first[row] + offset, rows_of_tokens, bounds)
        self.positions = positions[None]
        self.bounds = bounds.to(torch.int32)
        self.starts = starts

    @property
    def continues(self) -> bool:
        return self.starts is not None

    @cached_property
    def longest(self) -> int:
        return max(self.lengths)

    @cached_property
    def ends(self) -> Tensor:
        """(sequences,) in int32: how many tokens each has after this pass, if it goes on."""
        ends = [start + length for start, length in zip(self.starts or (), self.lengths, strict=True)]
        return torch.tensor(ends, dtype=torch.int32).to(self.device, non_blocking=True)

    @cached_property
    def rectangles(self) -> list[Rectangle]:
        """The sequences in their order, for kernels that want them side by side."""
        groups = _alike(self.lengths) if self.device.type == "cpu" else [self.lengths]
        return [Rectangle(lengths, self.device) for lengths in groups]


class FixedPacking(Packing):
    """Sequences that go on, as many tokens of each. Where they go on is known to the device alone, so that a GPU can
    repeat what was computed with such a packing for other places.

    Args:
        starts: (batch,) on the device, the position at which each sequence goes on.
        width: T, tokens of each.
    """

    def __init__(self, starts: Tensor, width: int):
        self.lengths, self.device = [width] * len(starts), starts.device
        self.starts = None  # the host does not know them
        places = starts[:, None] + torch.arange(width, device=self.device)  # (batch, T)
        self.positions = places.reshape(1, -1)
        self.rows = torch.arange(len(starts), device=self.device)[:, None].expand_as(places).reshape(-1)
        self.bounds = torch.arange(0, places.numel() + 1, width, dtype=torch.int32, device=self.device)
        self.ends = (starts + width).to(torch.int32)

    @property
    def continues(self) -> bool:
        return True


def moved(device: torch.device, *tensors: Tensor) -> Sequence[Tensor]:
    """Tensors (n,) of one dtype on the device, in a single copy, for which a GPU's host does not wait."""
    if device.type == "cpu":
        return tensors
    return torch.cat(tensors).to(device, non_blocking=True).split([len(tensor) for tensor in tensors])


def _rows_and_offsets(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """For each token of a packed row: its sequence, and its place in that sequence."""
    sizes = torch.tensor(lengths)
    row = torch.arange(len(lengths)).repeat_interleave(sizes)
    return row, torch.arange(len(row)) - (sizes.cumsum(0) - sizes)[row]


def _alike(lengths: list[int]) -> list[list[int]]:
    """Neighbours, grouped so that none is more than 1.25 times as long as another. A CPU pays for every padded query;
    on a GPU one launch is cheaper."""
    groups: list[list[int]] = []
    for length in lengths:
        together = (*groups[-1], length) if groups else ()
        if not together or max(together) > 1.25 * min(together):
            groups.append([])
        groups[-1].append(length)
    return groups


class KVCache:
    """Keys and values of every layer, each (rows, K, S, E), as attention multiplies them, so that nothing is copied;
    slot s of a row holds the token at position s of that row.

    Slots behind a row's last token may hold what a rejected draft left there: no query reaches them before
    they are written again.
    """

    def __init__(self, layers: int, rows: int, slots: int, heads: int, head_dim: int, dtype: torch.dtype, device):
        shape = (rows, heads, slots, head_dim)
        self.resized = 0  # how often
        self.keys, self.values = (
            [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)] for _ in range(2)
        )

    @property
    def rows(self) -> int:
        return len(self.keys[0])

    @property
    def slots(self) -> int:
        return self.keys[0].shape[2]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def resize(self, rows: int, slots: int) -> None:
        """Makes room, or frees it: what the common rows and slots hold stays. A tensor at a time, so that in the
        meantime the memory holds just one of them twice."""
        self.resized += 1
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                tensors[layer] = old.new_zeros(rows, old.shape[1], slots, old.shape[3])
                tensors[layer][: len(old), :, : old.shape[2]] = old[:rows, :, :slots]

    def write(self, layer: int, k: Tensor, v: Tensor, packing: Packing, run: Run) -> None:
        """Stores k, v (1, N, K, E) at the packing's rows and positions."""
        kept = (each[layer].view(-1, each[layer].shape[3]) for each in (self.keys, self.values))
        run(write_slots)(*kept, k.squeeze(0), v.squeeze(0), _places(packing, k.shape[2], self.slots))


@lru_cache(maxsize=2)  # all layers have the same
def _places(packing: Packing, heads: int, slots: int) -> Tensor:
    """(N, K): where the cache, rows and heads and slots behind each other, holds a head of each token."""
    head = torch.arange(heads, device=packing.device)
    return (packing.rows[:, None] * heads + head) * slots + packing.positions[0, :, None]
