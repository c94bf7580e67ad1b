"""Attention by batched products against PyTorch's own, sequence by sequence."""

import pytest
import torch
from helpers import random_ids, tiny_model
from torch.nn import functional as F

from llamalora.model.attention import _CausalProducts, _layout, attend_packed
from llamalora.model.packing import Packing

CPU = torch.device("cpu")
LENGTHS = [(5,), (1,), (9, 9, 8, 3, 2), (3, 9, 1, 8)]  # a rectangle of its own, a single token, padding, any order
HEADS = [(2, 2), (6, 2), (3, 1)]  # of queries, of keys and values


def drawn(lengths, heads, dtype, size=4):
    """q, k, v (N, heads, E), and the packing."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(sum(lengths), count, size) for count in (heads[0], heads[1], heads[1])]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [x.requires_grad_() for x in tensors], Packing(list(lengths), CPU)


def one_by_one(q, k, v, lengths):
    """(N, H, E), from PyTorch's kernel on each sequence alone."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    parts = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*part, is_causal=True) for part in parts], dim=1).transpose(0, 1)


def products(q, k, v, packing):
    return _CausalProducts.apply(q, k, v, _layout(packing, q.shape[1], k.shape[1], q.dtype))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_products_are_attention_one_by_one(lengths, heads):
    qkv, packing = drawn(lengths, heads, torch.float64)
    expected, actual = one_by_one(*qkv, lengths), products(*qkv, packing)
    torch.testing.assert_close(actual, expected)
    weights = torch.linspace(-1, 1, actual.numel(), dtype=torch.float64).sin().view_as(actual)
    for theirs, ours in zip(*(torch.autograd.grad(y, qkv, weights) for y in (expected, actual)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradients_are_the_numerical_ones():
    qkv, packing = drawn((4, 3, 1), (4, 2), torch.float64, size=2)
    assert torch.autograd.gradcheck(lambda *given: products(*given, packing), qkv)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_is_nearly_as_exact_as_the_kernel(dtype):
    """Which rounds no scores; here they are rounded once, and the weights."""
    lengths = (70, 66, 40, 7)
    qkv, packing = drawn(lengths, (6, 2), dtype, size=32)
    exact = one_by_one(*(x.double() for x in qkv), lengths)
    kernel, ours = one_by_one(*qkv, lengths), attend_packed(*qkv, packing)
    assert ours.dtype == dtype and ours.grad_fn.name().startswith("_CausalProducts")
    assert (ours - exact).norm() < 2 * (kernel - exact).norm() < 0.02 * exact.norm()


def test_what_a_padded_query_sees_is_in_no_gradient():
    """The place of padding may hold any token's query; infinity in its gradient would show at once."""
    (q, k, v), packing = drawn((5, 4), (2, 1), torch.float64)
    y = products(q, k, v, packing)
    grads = torch.autograd.grad(y[:5].sum(), (q, k, v))  # of the first sequence only
    assert all((grad[5:] == 0).all() and grad[:5].abs().sum() > 0 for grad in grads[1:])


def test_a_layout_is_made_once_for_all_layers():
    model, ids = tiny_model(num_hidden_layers=4).bfloat16(), random_ids(1, 20)
    _layout.cache_clear()
    model(ids, packing=Packing([12, 8], CPU))
    assert _layout.cache_info().misses == 1 and _layout.cache_info().hits == 3
