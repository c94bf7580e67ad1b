"""Attention's kernels for sequences of any length, over packed rows and over a cache, beside the CPU's."""

import emulated
import pytest
import torch
from helpers import random_ids, tiny_model
from torch.nn import functional as F

from llamalora.evaluation.generate import generate
from llamalora.model.attention import CAUSAL, attend_cached, attention_kernel, cached_kernel
from llamalora.model.elementwise import plain
from llamalora.model.packing import FixedPacking, KVCache, Packing

CPU, DEVICE = torch.device("cpu"), torch.device("cuda", 0)
KERNELS = {"flash": (torch.float16, (9, 0)), "memory-efficient": (torch.float32, (7, 0))}  # of a dtype and a card


@pytest.fixture(autouse=True)
def known_anew():
    """The kernel is chosen by the card, which the tests change."""
    attention_kernel.cache_clear()
    yield
    attention_kernel.cache_clear()


@pytest.mark.parametrize("kernel", ["flash", "efficient"])
def test_attention_of_packed_rows_is_that_of_each_sequence(kernel):
    dtype = torch.float16 if kernel == "flash" else torch.float32
    lengths, heads, groups = (5, 1, 9), 4, 2 if kernel == "flash" else 1
    drawn = [torch.randn(sum(lengths), n, 16).to(dtype) for n in (heads, heads // groups, heads // groups)]
    on_device = [x.to(DEVICE).requires_grad_() for x in drawn]
    on_cpu = [x.float().requires_grad_() for x in drawn]
    bounds = torch.tensor([0, 5, 6, 15], dtype=torch.int32, device=DEVICE)
    ends = bounds, bounds, max(lengths), max(lengths), 0.0
    if kernel == "flash":
        y = torch.ops.aten._flash_attention_forward(*on_device, *ends, True, False)[0]
    else:
        rows = [x[None] for x in on_device]
        y = torch.ops.aten._efficient_attention_forward(*rows, None, *ends, CAUSAL, compute_log_sumexp=True)[0][0]
    parts = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in on_cpu), strict=True)
    outputs = [F.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True) for one in parts]
    expected = torch.cat(outputs, dim=1).transpose(0, 1)
    weights = torch.randn(expected.shape)
    (y * weights.to(DEVICE)).sum().backward()
    (expected * weights).sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for ours, theirs in ((y, expected), *((a.grad, b.grad) for a, b in zip(on_device, on_cpu, strict=True))):
        torch.testing.assert_close(ours.cpu().float(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("lengths", [[3, 1, 7], [1, 1, 1], [1, 0, 1], [0, 5, 2], [1], [4]], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_see_what_the_cache_holds_of_them(kernel, lengths, heads, monkeypatch):
    dtype, capability = KERNELS[kernel]
    monkeypatch.setattr(emulated.CARD, "capability", capability)
    starts, slots, generator = [9, 0, 4][: len(lengths)], 16, torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), n, 16, generator=generator) for n in (heads[0], heads[1], heads[1]))
    before = [torch.randn(len(lengths), heads[1], slots, 16, generator=generator) for _ in range(2)]
    found = []
    for device, kind in ((CPU, torch.float32), (DEVICE, dtype)):
        cache = KVCache(1, len(lengths), slots, heads[1], 16, kind, device)
        for kept, values in zip((cache.keys[0], cache.values[0]), before, strict=True):
            kept.copy_(values)
        packing = Packing(lengths, device, starts)
        cache.write(0, *(x.to(device, kind)[None] for x in (k, v)), packing, plain)
        found.append([attend_cached(q.to(device, kind), cache, 0, packing), cache.keys[0], cache.values[0]])
    assert cached_kernel(16, dtype, DEVICE) == kernel
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours.cpu().float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("heads", [2, 4], ids=["gqa", "mha"])
@torch.no_grad()
def test_a_padded_pass_is_the_pass(heads):
    """Rows of three, one and two tokens that go on at 5, 2 and 0, as a rectangle of four tokens."""
    model, ids = tiny_model(num_key_value_heads=heads).to(DEVICE), random_ids(1, 13).to(DEVICE)
    lengths, starts = [3, 1, 2], [5, 2, 0]
    feeds = ids[0, 7:].split(lengths)
    padded = torch.zeros(3, 4, dtype=torch.long, device=DEVICE)
    for row, feed in zip(padded, feeds, strict=True):
        row[: len(feed)] = feed
    found = []
    for fixed in (False, True):
        cache = model.make_cache(3, 16)
        model.model(ids[:, :7], Packing([5, 2], DEVICE, rows=[0, 1]), cache)
        if fixed:
            packing = FixedPacking(torch.tensor(starts, device=DEVICE), 4)
            rows = model(padded.reshape(1, -1), packing, cache)[0].unflatten(0, (3, 4))
            found.append(torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)]))
        else:
            found.append(model(ids[:, 7:], Packing(lengths, DEVICE, starts), cache)[0])
    torch.testing.assert_close(*found)


def test_heads_of_a_size_for_which_there_is_no_kernel_are_decoded_all_the_same():
    """Without graphs."""
    prompts, outputs = [list(range(3, 3 + length)) for length in (17, 9, 30)], []
    for device in (CPU, DEVICE):
        model = tiny_model(head_dim=12).to(device).eval()
        outputs.append(generate(model, prompts, -1, 50).outputs)
    assert cached_kernel(12, torch.float32, DEVICE) is None and outputs[0] == outputs[1]
