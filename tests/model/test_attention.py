"""Attention by batched products against PyTorch's own, sequence by sequence."""

import pytest
import torch
from helpers import random_ids, tiny_model
from kernels import varlen_kernels
from torch.nn import functional as F

from llamalora.model import attention
from llamalora.model.attention import _CausalProducts, _layout, attend_packed, attention_kernel
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


# ---- the kernels that only GPUs have: how they are called, with plain PyTorch in their place ----

VARLEN = ("flash", "memory-efficient")


@pytest.fixture
def chosen(monkeypatch):
    """Makes the CPU attend as a GPU with that kernel would; the names of the operators that were called."""

    def choose(kernel: str) -> None:
        monkeypatch.setattr(attention, "attention_kernel", lambda *_: kernel)

    with varlen_kernels() as calls:
        choose.calls = calls
        yield choose


@pytest.mark.parametrize("kernel", VARLEN)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", [*LENGTHS, (40, 3, 70)])
def test_kernels_of_any_length_are_attention_one_by_one(lengths, heads, kernel, chosen):
    qkv, packing = drawn(lengths, heads, torch.float64, size=8)
    expected = one_by_one(*qkv, lengths)
    chosen(kernel)
    actual = attend_packed(*qkv, packing)
    torch.testing.assert_close(actual, expected)
    weights = torch.linspace(-1, 1, actual.numel(), dtype=torch.float64).sin().view_as(actual)
    for theirs, ours in zip(*(torch.autograd.grad(y, qkv, weights) for y in (expected, actual)), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert chosen.calls == [f"{kernel.removeprefix('memory-')} {way}" for way in ("forward", "backward")]


@pytest.mark.parametrize("kernel", VARLEN)
def test_a_model_computes_the_same_with_them(kernel, chosen):
    """Prompts that enter a cache, and training with recomputation."""
    model, ids, packing = tiny_model(), random_ids(1, 24), Packing([13, 2, 9], CPU)
    results = []
    for how in ("rectangles", kernel):
        chosen(how)
        model.zero_grad()
        hidden = model.model(ids, packing, recompute=1)
        hidden.square().sum().backward()
        with torch.no_grad():
            cache = model.make_cache(3, 13)
            entered = model(ids, packing, cache)
        grads = [parameter.grad for parameter in model.model.parameters()]
        results.append([hidden.detach(), entered, torch.stack(cache.keys), *grads])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert len(chosen.calls) == 2 * (2 + 1 + 1)  # layers; forward, again, and the prompts'; backward


def test_sums_of_the_softmax_are_asked_for_where_there_is_a_backward_pass(chosen, monkeypatch):
    asked = []
    operator = torch.ops.aten._efficient_attention_forward

    def noted(*arguments, compute_log_sumexp, **others):
        asked.append(compute_log_sumexp)
        return operator(*arguments, compute_log_sumexp=compute_log_sumexp, **others)

    monkeypatch.setattr(torch.ops.aten, "_efficient_attention_forward", noted)
    chosen("memory-efficient")
    (q, k, v), packing = drawn((5, 4), (2, 1), torch.float32, size=8)
    attend_packed(q.detach(), k, v, packing)
    attend_packed(q.detach(), k.detach(), v.detach(), packing)
    with torch.no_grad():
        attend_packed(q, k, v, packing)
    assert asked == [True, False, False]


def test_bounds_are_those_of_the_sequences():
    packing = Packing([3, 1, 4], CPU)
    assert packing.bounds.tolist() == [0, 3, 4, 8] and packing.bounds.dtype == torch.int32
    assert [packing.positions[0, first].item() for first in packing.bounds[:-1]] == [0, 0, 0]


@pytest.mark.parametrize(
    "capability, flash_built, head_dim, dtype, expected",
    [
        ((9, 0), True, 128, torch.bfloat16, "flash"),
        ((8, 0), True, 64, torch.float16, "flash"),
        ((8, 0), True, 64, torch.float32, "memory-efficient"),
        ((7, 0), True, 128, torch.float16, "memory-efficient"),
        ((9, 0), False, 128, torch.bfloat16, "memory-efficient"),
        ((9, 0), True, 12, torch.bfloat16, "rectangles"),
        ((9, 0), True, 512, torch.bfloat16, "rectangles"),
    ],
)
def test_which_kernel_a_gpu_uses(capability, flash_built, head_dim, dtype, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: flash_built)
    attention_kernel.cache_clear()
    assert attention_kernel(head_dim, dtype, torch.device("cuda", 0)) == expected
    attention_kernel.cache_clear()


def test_which_kernel_a_cpu_uses():
    assert attention_kernel(128, torch.float32, CPU) == "rectangles"
    assert attention_kernel(128, torch.bfloat16, CPU) == "products"
