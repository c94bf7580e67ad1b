"""The emulated device itself."""

import emulated
import pytest
import torch
from torch.nn import functional as F

from llamalora.training.memory import OutOfMemory, Plan, explained

DEVICE = torch.device("cuda", 0)


def test_tensors_of_two_devices_do_not_meet():
    here = torch.ones(3, device=DEVICE)
    for other in (torch.ones(3), torch.ones(3, device="cuda:1")):
        with pytest.raises(RuntimeError, match="same device"):
            here + other
    assert (here + torch.tensor(2.0)).tolist() == [3.0, 3.0, 3.0]  # a number may come from the host


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attention_is_one_operation_each_way_with_the_gradients_of_the_cpu(dtype):
    drawn = [torch.randn(2, 4, length, 16, generator=torch.Generator().manual_seed(length)) for length in (7, 7, 7)]
    on_device = [x.to(DEVICE, dtype).requires_grad_() for x in drawn]
    on_cpu = [x.clone().requires_grad_() for x in drawn]
    emulated.clear()
    y = F.scaled_dot_product_attention(*on_device, is_causal=True)
    y.sum().backward()
    expected = F.scaled_dot_product_attention(*on_cpu, is_causal=True)
    expected.sum().backward()
    names = [name for name in emulated.counts() if "attention" in name]
    assert names == [f"_scaled_dot_product_efficient_attention{way}" for way in ("", "_backward")]
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    for ours, theirs in ((y, expected), *((a.grad, b.grad) for a, b in zip(on_device, on_cpu, strict=True))):
        torch.testing.assert_close(ours.cpu().float(), theirs, rtol=tolerance, atol=tolerance)


def test_what_the_host_waits_for_is_counted():
    x = torch.arange(6.0).to(DEVICE, non_blocking=True)
    emulated.clear()
    x * 2 + 1
    x.to(DEVICE)
    torch.ones(3).to(DEVICE, non_blocking=True)
    assert emulated.counts()["waits"] == 0
    for waiting in (
        x.sum().item, x.tolist, x.cpu, x.nonzero, lambda: x[x > 2], lambda: torch.tensor([1], device=DEVICE),
    ):  # fmt: skip
        emulated.clear()
        waiting()
        assert emulated.counts()["waits"] >= 1, waiting


def test_memory_that_does_not_suffice_is_explained(monkeypatch):
    plan = Plan("ddp", 64, {"base": 1 << 20}, emulated.CARD.memory)
    before = emulated.held()
    emulated.limit(before + 1000)
    try:
        with pytest.raises(OutOfMemory, match="(?s)planned.*base.*measured.*what helps"), explained(plan, DEVICE):
            torch.empty(1 << 20, device=DEVICE)
    finally:
        emulated.limit(None)
    assert emulated.held() == before


def test_what_waits_for_the_device_cannot_be_captured():
    x = torch.ones(2, device=DEVICE)
    for work in (lambda: x.sum().item(), lambda: x + torch.ones(2).to(DEVICE), lambda: x[x > 0]):
        with pytest.raises(RuntimeError, match="not permitted"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            work()
