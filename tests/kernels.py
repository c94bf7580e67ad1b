"""Attention's kernels for sequences of any length, which only GPUs have, in plain PyTorch, behind the same operators.

Whoever calls `torch.ops.aten._flash_attention_forward` gets here: its arguments are checked against the schema, and
autograd calls the backward operator by PyTorch's own formula, with what the forward pass saved.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

CALLS: list[str] = []


@contextmanager
def varlen_kernels(key: str = "CPU") -> Iterator[list[str]]:
    """Registers them for a dispatch key: `CPU`, or the `CUDA` of an emulated device. Yields the names of the calls."""
    CALLS.clear()
    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("_flash_attention_forward", _flash_forward, key)
        library.impl("_flash_attention_backward", _flash_backward, key)
        library.impl("_efficient_attention_forward", _efficient_forward, key)
        library.impl("_efficient_attention_backward", _efficient_backward, key)
        yield CALLS
    finally:
        library._destroy()


def _weights(q: Tensor, k: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Of one sequence, q and k (T, H, E): softmax (H, T, T) and the logarithm of its sums (H, T), in fp32 or fp64."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    with torch.autocast(q.device.type, enabled=False):
        scores = torch.einsum("thd,shd->hts", q.to(wide), k.to(wide)) * (scale or q.shape[-1] ** -0.5)
    scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1), -torch.inf)
    return scores.softmax(-1), scores.logsumexp(-1)


def _parts(bounds: Tensor, *tensors: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    assert bounds.dtype == torch.int32 and bounds.dim() == 1 and bounds.is_contiguous()
    ends = bounds.tolist()
    assert ends[0] == 0 and ends[-1] == len(tensors[0]) and ends == sorted(ends)
    for first, last in zip(ends, ends[1:], strict=False):
        yield slice(first, last), [x[first:last] for x in tensors]


def _forward(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float | None) -> tuple[Tensor, list]:
    assert max(bounds.diff().tolist()) == longest
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    y, sums = torch.empty_like(q), []
    for place, (one_q, one_k, one_v) in _parts(bounds, q, k, v):
        weights, logarithms = _weights(one_q, one_k, scale)
        y[place] = torch.einsum("hts,shd->thd", weights, one_v.to(weights.dtype)).to(q.dtype)
        sums.append(logarithms.float())
    return y, sums


def _backward(grad, q, k, v, out, sums, bounds, scale):
    grads = [torch.empty_like(x) for x in (q, k, v)]
    for number, (place, (g, one_q, one_k, one_v, y)) in enumerate(_parts(bounds, grad, q, k, v, out)):
        weights, logarithms = _weights(one_q, one_k, scale)
        torch.testing.assert_close(sums[number], logarithms.float())  # what was saved is of this very sequence
        wide = weights.dtype
        g, one_q, one_k, one_v, y = (x.to(wide) for x in (g, one_q, one_k, one_v, y))
        of_weights = torch.einsum("thd,shd->hts", g, one_v) - (g * y).sum(-1).T[..., None]
        of_scores = weights * of_weights * (scale or q.shape[-1] ** -0.5)
        grads[0][place] = torch.einsum("hts,shd->thd", of_scores, one_k).to(q.dtype)
        grads[1][place] = torch.einsum("hts,thd->shd", of_scores, one_q).to(q.dtype)
        grads[2][place] = torch.einsum("hts,thd->shd", weights, g).to(q.dtype)
    return grads


def _repeated(q: Tensor, *tensors: Tensor) -> list[Tensor]:
    return [x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in tensors]


# fmt: off
def _flash_forward(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *,
                   scale=None, window_size_left=None, window_size_right=None, **others):
    CALLS.append("flash forward")
    assert dropout_p == 0 and is_causal and not return_debug_mask and max_q == max_k
    assert query.dim() == 3 and query.shape[-1] % 8 == 0 and torch.equal(cum_seq_q, cum_seq_k)
    y, sums = _forward(query, *_repeated(query, key, value), cum_seq_q, max_q, scale)
    state = torch.zeros(2, dtype=torch.int64, device=query.device)
    return y, torch.cat(sums, 1), state, state.new_zeros(()), y.new_zeros(0)


def _flash_backward(grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p,
                    is_causal, rng_state, unused, *, scale=None, window_size_left=None, window_size_right=None):
    CALLS.append("flash backward")
    sums = logsumexp.split(cum_seq_q.diff().tolist(), dim=1)
    repeated = _repeated(query, key, value)
    of_q, of_k, of_v = _backward(grad_out, query, *repeated, out, sums, cum_seq_q, scale)
    return of_q, *(x.unflatten(1, (key.shape[1], -1)).sum(2) for x in (of_k, of_v))


def _efficient_forward(query, key, value, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
                       custom_mask_type, compute_log_sumexp=False, *, scale=None, seqlen_k=None, window_size=None):
    CALLS.append("efficient forward")
    assert bias is None and dropout_p == 0 and custom_mask_type == 1 and query.shape[0] == 1
    assert query.shape == key.shape == value.shape  # it knows no groups of queries
    y, sums = _forward(query[0], key[0], value[0], cu_seqlens_q, max_seqlen_q, scale)
    width = -(-max_seqlen_q // 32) * 32 if compute_log_sumexp else 0
    table = torch.full((len(sums), query.shape[2], width), torch.inf, device=query.device)
    for row, logarithms in zip(table, sums if width else (), strict=False):
        row[:, : logarithms.shape[1]] = logarithms
    state = torch.zeros((), dtype=torch.int64)
    return y[None], table, state, state.clone(), max_seqlen_q, max_seqlen_k


def _efficient_backward(grad_out_, query, key, value, bias, out, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                        logsumexp, dropout_p, philox_seed, philox_offset, custom_mask_type, bias_requires_grad, *,
                        scale=None, num_splits_key=None, window_size=None, shared_storage_dqdkdv=False):
    CALLS.append("efficient backward")
    assert max_seqlen_q == max_seqlen_k and custom_mask_type == 1 and logsumexp.shape[-1] % 32 == 0
    sums = [row[:, :size] for row, size in zip(logsumexp, cu_seqlens_q.diff().tolist(), strict=True)]
    grads = _backward(grad_out_[0], query[0], key[0], value[0], out[0], sums, cu_seqlens_q, scale)
    return *(x[None] for x in grads), query.new_zeros(())
# fmt: on
