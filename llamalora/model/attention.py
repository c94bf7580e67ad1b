"""Attention of sequences that are packed into one row: each over itself, or over what a cache holds of it.

Dimensions: N tokens of a packed row, L longest sequence of a rectangle (see packing.py), S slots of a cache, H query
heads, K key/value heads, G = H / K, E head size; B batch, T tokens.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .packing import KVCache, Packing

VARLEN = ("flash", "memory-efficient")  # kernels of a GPU that take sequences of any length
MOST_SEQUENCES = 65_535  # that they take, since CUDA numbers no more


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of q (B, T, H, E) over k, v (B, T, K, E) -> (B, T, H, E)."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def attend_cached(q: Tensor, cache: KVCache, layer: int, packing: Packing) -> Tensor:
    """Attention of sequences that go on, (N, H, E) packed into one row, over what the cache holds of each of them."""
    kernel = cached_kernel(q.shape[2], q.dtype, q.device)
    if kernel is None:
        return _attend_each_in_cache(q, cache, layer, packing)
    _, kv_heads, slots, size = cache.keys[layer].shape
    heads, places = _heads(packing, kv_heads, slots)
    k, v = (each.view(-1, 1, size) for each in (cache.keys[layer], cache.values[layer]))  # (rows * K * S, 1, E)
    x = q.reshape(-1, q.shape[1] // kv_heads, size)  # (N * K, G, E): the heads of a token that have one key
    if places is not None:
        x = torch.empty_like(x).index_copy_(0, places, x)
    y = _attend_flash(x, k, v, heads) if kernel == "flash" else _attend_efficient(x, k, v, heads)
    return (y if places is None else y.index_select(0, places)).view_as(q)


class _Varlen(NamedTuple):
    """Sequences as kernels for any length know them.

    Attributes:
        queries, keys: (sequences + 1,) in int32: where each begins in its row, and where the last ends.
        most_queries, most_keys: of one.
        seen: (sequences,) in int32: how many of its keys there are already; None: all.
    """

    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int
    seen: Tensor | None = None


@lru_cache(maxsize=2)  # all layers have the same
def _heads(packing: Packing, heads: int, slots: int) -> tuple[_Varlen, Tensor | None]:
    """Every head of every row of a cache as a sequence of its own, for that is how keys lie in it; and among their
    queries the places (N * K,) of those that come token by token, if they are others."""
    device, count, tokens = packing.device, heads * len(packing.lengths), len(packing.rows)
    keys = torch.arange(0, (count + 1) * slots, slots, dtype=torch.int32, device=device)
    seen = packing.ends.repeat_interleave(heads)
    if packing.longest == 1 and count == heads * tokens:  # a token of each: they come in this order
        return _Varlen(torch.arange(count + 1, dtype=torch.int32, device=device), keys, 1, slots, seen), None
    head, first, lengths = torch.arange(heads, device=device), packing.bounds[:-1, None], packing.bounds.diff()[:, None]
    queries = torch.cat(((heads * first + lengths * head).flatten(), heads * packing.bounds[-1:])).to(torch.int32)
    most = max(2, packing.longest)  # 1 would promise a token of each
    before = (heads - 1) * first[packing.rows] + torch.arange(tokens, device=device)[:, None]
    places = (before + lengths[packing.rows] * head).flatten()
    return _Varlen(queries, keys, most, slots, seen), places


def _attend_each_in_cache(q: Tensor, cache: KVCache, layer: int, packing: Packing) -> Tensor:
    """`attend_cached` sequence by sequence, which suits a CPU: no query is padded, and no keys and values, which are
    most of what attention reads, are gathered from the cache."""
    keys, values = cache.keys[layer].split(1), cache.values[layer].split(1)
    kv_heads = keys[0].shape[1]
    groups = q.shape[1] // kv_heads
    x = q.unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2)[None]  # (1, K, N * G, E): a token's group together
    going_on = _going_on(packing, groups, q.dtype)
    parts = [
        F.scaled_dot_product_attention(part, keys[row].narrow(2, 0, end), values[row].narrow(2, 0, end), attn_mask=mask)
        for part, (_, row, end, mask) in zip(x.split([size for size, *_ in going_on], 2), going_on, strict=True)
    ]
    return torch.cat(parts, 2)[0].unflatten(1, (-1, groups)).transpose(0, 1).flatten(1, 2)


@lru_cache(maxsize=2)  # all layers have the same
def _going_on(packing: Packing, groups: int, dtype: torch.dtype) -> list[tuple[int, int, int, Tensor | None]]:
    """Of each sequence that goes on: its queries, G for each token; its row of the cache; where it ends there; and what
    is added to its scores (G * T, end), nothing if its only token sees all."""
    return [
        (
            groups * length,
            row,
            start + length,
            F.pad(_future(length, groups, dtype, packing.device), (start, 0)) if length > 1 else None,
        )
        for row, (length, start) in enumerate(zip(packing.lengths, packing.starts or (), strict=True))
        if length
    ]


@lru_cache(maxsize=256)
def _future(length: int, groups: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(G * T, T): minus infinity where a key comes behind its query, else 0."""
    mask = torch.full((length, length), -torch.inf, dtype=dtype, device=device)
    return mask.triu(1).repeat_interleave(groups, 0)


def attend_packed(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """Causal attention of every sequence of a packed row over itself: q (N, H, E), k and v (N, K, E) -> (N, H, E)."""
    kernel = attention_kernel(q.shape[2], q.dtype, q.device)
    if kernel in VARLEN:
        sequences = _Varlen(packing.bounds, packing.bounds, packing.longest, packing.longest)
        return _attend_flash(q, k, v, sequences) if kernel == "flash" else _attend_efficient(q, k, v, sequences)
    if q.device.type == "cpu" and not torch.is_grad_enabled():
        return _attend_each(q, k, v, packing)
    if kernel == "products":
        return _CausalProducts.apply(q, k, v, _layout(packing, q.shape[1], k.shape[1], q.dtype))
    sizes = [rectangle.tokens for rectangle in packing.rectangles]
    parts = zip(packing.rectangles, *(x.split(sizes) for x in (q, k, v)), strict=True)
    return torch.cat([one.pack(attend(*map(one.unpack, qkv))) for one, *qkv in parts])


def _attend_each(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """`attend_packed` for a CPU where nothing learns, sequence by sequence. The kernel is fast there; in half precision
    its backward pass takes several times as long as matrix products."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    parts = zip(*(x.split(packing.lengths, 2) for x in (q, k, v)), strict=True)
    each = [F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) for q, k, v in parts]
    return torch.cat(each, 2)[0].transpose(0, 1)


# Both kernels know the sequences by their bounds, so nothing is laid out or padded. PyTorch's public door to the first,
# torch.nn.attention.varlen (2.10), has no twin for the second, which is all that a V100 or fp32 has. Nested tensors
# lead to both, with a new tensor class around every layer's q, k and v. The arguments that are given here, and the
# gradients' formulas behind them, have been the same from torch 2.8 to 2.13.


def _attend_flash(q: Tensor, k: Tensor, v: Tensor, sequences: _Varlen) -> Tensor:
    *known, seen = sequences
    return torch.ops.aten._flash_attention_forward(q, k, v, *known, 0.0, True, False, seqused_k=seen)[0]


def _attend_efficient(q: Tensor, k: Tensor, v: Tensor, sequences: _Varlen) -> Tensor:
    *known, seen = sequences
    groups = q.shape[1] // k.shape[1]
    if seen is not None:  # a cache's only head
        k, v = k.expand(-1, groups, -1), v.expand(-1, groups, -1)
    elif groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    sums = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    rows = (x[None] for x in (q, k, v))
    return torch.ops.aten._efficient_attention_forward(
        *rows, None, *known, 0.0, CAUSAL if seen is None else CAUSAL_FROM_END, compute_log_sumexp=sums, seqlen_k=seen
    )[0][0]


# of the memory-efficient kernel's masks: the first query sees the first key alone; the last one sees all
CAUSAL, CAUSAL_FROM_END = 1, 2


def cached_kernel(head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Of those that take sequences of any length the one for rows of a cache; None where there is none, as on a CPU or
    with ROCm, whose kernels know no sequences that are shorter than their room."""
    kernel = attention_kernel(head_dim, dtype, device)
    return kernel if kernel in VARLEN and not torch.version.hip else None


@lru_cache(maxsize=16)
def attention_kernel(head_dim: int, dtype: torch.dtype, device: torch.device) -> str:
    """How packed rows attend to themselves.

    On a GPU by kernels that take sequences of any length: `flash` in half precision from compute capability 8.0 on,
    else `memory-efficient`. By `rectangles` of padded sequences for heads of a size that these do not take, and on a
    CPU in fp32; by batched matrix `products` on a CPU in half precision. The meta device, on which memory is planned,
    stands for a GPU: in bf16 for one that has the first kernel. Where nothing learns, a CPU takes one by one.
    """
    if device.type == "cpu":
        return "products" if dtype in (torch.bfloat16, torch.float16) else "rectangles"
    if head_dim % 8 or head_dim > 256:
        return "rectangles"
    if device.type == "meta":
        return "flash" if dtype == torch.bfloat16 else "memory-efficient"
    can = torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)
    return "flash" if can and dtype in (torch.bfloat16, torch.float16) else "memory-efficient"


class _Layout:
    """How the heads' vectors (E,) of a packed row are laid out for batched products: rectangle after rectangle,
    queries as (batch * K, G * L, E), so that a group's stand behind each other, keys and values as (batch * K, L, E).

    Attributes:
        queries, keys: the vector of the row that stands at each place; at padding, which no token sees, any.
        packed_queries, packed_keys: the place at which each vector of the row stands.
        padding: places of queries at which no token is.
        rectangles: of each (batch * K, G * L, L), and the mask (G * L, L) that is added to its scores.
    """

    def __init__(self, packing: Packing, heads: int, kv_heads: int, dtype: torch.dtype):
        groups = heads // kv_heads
        queries, keys, real_queries, real_keys, self.rectangles = [], [], [], [], []
        first = 0
        for one in packing.rectangles:
            batch, longest = one.shape
            slots = torch.arange(one.tokens) if one.slots is None else one.slots
            token, real = torch.full((batch * longest,), first), torch.zeros(batch * longest, dtype=torch.bool)
            token[slots], real[slots] = torch.arange(first, first + one.tokens), True
            token, real = (x.view(batch, 1, 1, longest) for x in (token, real))
            queries.append((token * heads + torch.arange(heads).view(kv_heads, groups, 1)).flatten())
            keys.append((token * kv_heads + torch.arange(kv_heads)[:, None, None]).flatten())
            real_queries.append(real.expand(-1, kv_heads, groups, -1).flatten())
            real_keys.append(real.expand(-1, kv_heads, 1, -1).flatten())
            mask = torch.full((longest, longest), -torch.inf, dtype=dtype).triu(1).repeat(groups, 1)
            self.rectangles.append(((batch * kv_heads, groups * longest, longest), mask))
            first += one.tokens
        self.queries, self.keys = torch.cat(queries), torch.cat(keys)
        self.packed_queries = self._places(self.queries, torch.cat(real_queries))
        self.packed_keys = self._places(self.keys, torch.cat(real_keys))
        self.padding = torch.cat(real_queries).logical_not().nonzero()[:, 0]

    @staticmethod
    def _places(vectors: Tensor, real: Tensor) -> Tensor:
        places = real.nonzero()[:, 0]
        return torch.empty_like(places).index_copy_(0, vectors[places], places)

    def split(self, queries: list[Tensor], keys: list[Tensor]):
        """Rectangle by rectangle: views of the queries' and keys' tensors (places, E), and the mask."""
        at_query = at_key = 0
        for (products, rows, columns), mask in self.rectangles:
            next_query, next_key = at_query + products * rows, at_key + products * columns
            yield (
                [x[at_query:next_query].view(products, rows, -1) for x in queries],
                [x[at_key:next_key].view(products, columns, -1) for x in keys],
                mask,
            )
            at_query, at_key = next_query, next_key


_layout = lru_cache(maxsize=2)(_Layout)  # all layers have the same


class _CausalProducts(torch.autograd.Function):
    """softmax(q k^T / sqrt(E)) v by batched products. Saves its operands as they are laid out, and the softmax."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, layout: _Layout) -> Tensor:
        scale = q.shape[-1] ** -0.5
        # lay the heads' vectors out, rectangle after rectangle; at padding any vector will do, since no token sees it
        queries = q.flatten(0, 1).index_select(0, layout.queries)
        keys, values = (x.flatten(0, 1).index_select(0, layout.keys) for x in (k, v))
        y, weights = torch.empty_like(queries), []
        # one product for all heads of a rectangle: scores with the causal mask added, their softmax, the mean of values
        for (one_y, one_q), (one_k, one_v), mask in layout.split([y, queries], [keys, values]):
            weights.append(torch.baddbmm(mask, one_q, one_k.mT, alpha=scale).softmax(-1))
            torch.bmm(weights[-1], one_v, out=one_y)
        ctx.save_for_backward(queries, keys, values, *weights)
        ctx.layout, ctx.scale, ctx.key_shape = layout, scale, k.shape
        # and back into the order of the packed row, which drops what padding has computed
        return y.index_select(0, layout.packed_queries).view_as(q)

    @staticmethod
    def backward(ctx, grad: Tensor):
        queries, keys, values, *weights = ctx.saved_tensors
        layout, shape = ctx.layout, grad.shape
        # padding took somebody's vector on the way in: its gradient must not reach that vector's keys and values
        grad = grad.flatten(0, 1).index_select(0, layout.queries).index_fill_(0, layout.padding, 0.0)
        grad_q, grad_k, grad_v = map(torch.empty_like, (queries, keys, values))
        parts = layout.split([grad, queries, grad_q], [keys, values, grad_k, grad_v])
        for ((g, q, to_q), (k, v, to_k, to_v), _), w in zip(parts, weights, strict=True):
            # of the scores, by way of the softmax; then of both sides of q k^T, and of the values
            scores = torch._softmax_backward_data(torch.bmm(g, v.mT), w, -1, w.dtype).mul_(ctx.scale)
            torch.bmm(scores, k, out=to_q)
            torch.bmm(scores.mT, q, out=to_k)
            torch.bmm(w.mT, g, out=to_v)
        grad_k, grad_v = (x.index_select(0, layout.packed_keys).view(ctx.key_shape) for x in (grad_k, grad_v))
        return grad_q.index_select(0, layout.packed_queries).view(shape), grad_k, grad_v, None
