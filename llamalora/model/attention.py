"""Attention of sequences that are packed into one row: each over itself, or over what a cache holds of it.

Dimensions: N tokens of a packed row, L longest sequence of a rectangle (see packing.py), S slots of a cache, H query
heads, K key/value heads, G = H / K, E head size; B batch, T tokens.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from .packing import KVCache, Packing


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of q (B, T, H, E) over k, v (B, T, K, E) -> (B, T, H, E)."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def attend_cached(q: Tensor, cache: KVCache, layer: int, packing: Packing) -> Tensor:
    """Attention of sequences that go on, (N, H, E) packed into one row, over what the cache holds of each of them."""
    if packing.reach is None:
        return _attend_each_in_cache(q, cache, layer, packing)
    k, v = cache.read(layer, packing.reach.extent)
    groups, rectangle = q.shape[1] // k.shape[1], packing.reach.rectangle
    # the queries of a group stand behind each other, so that keys and values are not copied for each head
    x = rectangle.unpack(q).unflatten(2, (-1, groups))
    x = x.permute(0, 2, 3, 1, 4).flatten(2, 3)  # (batch, K, G * L, E)
    y = F.scaled_dot_product_attention(x, k, v, attn_mask=_mask(packing, groups, q.dtype))
    return rectangle.pack(y.unflatten(2, (groups, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3))


@lru_cache(maxsize=2)  # all layers have the same
def _mask(packing: Packing, groups: int, dtype: torch.dtype) -> Tensor:
    """(batch, 1, G * L, S), what is added to the scores: minus infinity where a query does not see a key, else 0. Of a
    mask of booleans each layer would make that anew."""
    assert packing.reach is not None, "sequences that go on, on a GPU"
    hidden = packing.reach.hidden[:, None, None]
    batch, _, _, length, extent = hidden.shape
    mask = torch.zeros(batch, 1, groups, length, extent, dtype=dtype, device=hidden.device)
    return mask.masked_fill_(hidden, -torch.inf).flatten(2, 3)


def _attend_each_in_cache(q: Tensor, cache: KVCache, layer: int, packing: Packing) -> Tensor:
    """`attend_cached` for a CPU, sequence by sequence: no query is padded, and no keys and values are gathered from the
    cache, which are most of what attention reads."""
    keys, values = cache.keys[layer].split(1), cache.values[layer].split(1)
    kv_heads = keys[0].shape[1]
    groups = q.shape[1] // kv_heads
    x = q.unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2)[None]  # (1, K, N * G, E): a token's group together
    sequences = _sequences(packing, groups, q.dtype)
    parts = [
        F.scaled_dot_product_attention(part, keys[row].narrow(2, 0, end), values[row].narrow(2, 0, end), attn_mask=mask)
        for part, (_, row, end, mask) in zip(x.split([size for size, *_ in sequences], 2), sequences, strict=True)
    ]
    return torch.cat(parts, 2)[0].unflatten(1, (-1, groups)).transpose(0, 1).flatten(1, 2)


@lru_cache(maxsize=2)  # all layers have the same
def _sequences(packing: Packing, groups: int, dtype: torch.dtype) -> list[tuple[int, int, int, Tensor | None]]:
    """Of each sequence that goes on: its queries, G for each token; its row of the cache; where it ends there; and what
    is added to its scores (G * T, end), nothing if its only token sees all."""
    return [
        (
            groups * length,
            row,
            start + length,
            F.pad(_future(length, groups, dtype), (start, 0)) if length > 1 else None,
        )
        for row, (length, start) in enumerate(zip(packing.lengths, packing.starts or (), strict=True))
        if length
    ]


@lru_cache(maxsize=256)
def _future(length: int, groups: int, dtype: torch.dtype) -> Tensor:
    """(G * T, T): minus infinity where a key comes behind its query, else 0."""
    return torch.full((length, length), -torch.inf, dtype=dtype).triu(1).repeat_interleave(groups, 0)


def attend_packed(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """Causal attention of every sequence of a packed row over itself: q (N, H, E), k and v (N, K, E) -> (N, H, E)."""
    kernel = attention_kernel(q.shape[2], q.dtype, q.device)
    if kernel == "flash":
        return _attend_flash(q, k, v, packing)
    if kernel == "memory-efficient":
        return _attend_efficient(q, k, v, packing)
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


def _attend_flash(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    bounds, longest = packing.bounds, max(packing.lengths)
    return torch.ops.aten._flash_attention_forward(q, k, v, bounds, bounds, longest, longest, 0.0, True, False)[0]


def _attend_efficient(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    bounds, longest = packing.bounds, max(packing.lengths)
    sums = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    rows = (x[None] for x in (q, k, v))
    return torch.ops.aten._efficient_attention_forward(
        *rows, None, bounds, bounds, longest, longest, 0.0, CAUSAL, compute_log_sumexp=sums
    )[0][0]


CAUSAL = 1  # of the memory-efficient kernel's masks: a query sees keys up to its own place in the sequence


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
