"""Decoding by CUDA graphs, on the emulated device: what is captured runs again, and answers are as without."""

import emulated
import pytest
import torch
from helpers import randomise_lora, tiny_model

from llamalora.evaluation import generate as decoding
from llamalora.lora.inject import inject_lora, merge, restore
from llamalora.model.elementwise import compile_formulas
from llamalora.model.llama import Llama

DEVICE = torch.device("cuda", 0)
PROMPTS = [list(range(3, 3 + length)) for length in (17, 9, 30, 4, 21)]
NEVER, NEW = -1, 40


def merged(targets: str = "all") -> Llama:
    """In fp32, in which no choice is so close that the order of sums decides it."""
    model = tiny_model(num_key_value_heads=4)
    inject_lora(model, targets, 4, alpha=4)
    randomise_lora(model)
    model = model.to(DEVICE).eval()
    merge(model)
    return model


def launched(model: Llama, monkeypatch, **options) -> decoding.Decoding:
    """Without graphs."""
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "WORTH_PREPARING", (10**9, 10**9))
        return decoding.generate(model, PROMPTS, NEVER, NEW, **options)


@pytest.mark.parametrize("batch", [1, 3, 5])
@pytest.mark.parametrize("drafted", [False, True], ids=["plain", "drafted"])
def test_answers_are_those_of_the_passes_as_they_come(batch, drafted, monkeypatch):
    model = merged()
    compile_formulas(model, emulated.as_one)
    expected = launched(model, monkeypatch)

    def half_right(index: int, output: list[int]) -> list[int]:
        draft = expected.outputs[index][len(output) : len(output) + 9]
        return [*draft[:5], *((token + 1) % 97 for token in draft[5:])]

    emulated.clear()
    found = decoding.generate(model, PROMPTS, NEVER, NEW, batch, half_right if drafted else None)
    assert emulated.counts()["graph"] >= 3
    assert found.outputs == expected.outputs
    for ours, theirs in zip(found.log_probs, expected.log_probs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)


def test_half_precision_is_as_exact_as_without_graphs(monkeypatch):
    """Choices that are close may differ; the first token's probability does not."""
    model = merged()
    exact = launched(model, monkeypatch)
    model = model.half()
    half, graphed = launched(model, monkeypatch), decoding.generate(model, PROMPTS, NEVER, NEW, 1)
    for one, two, all_exact in zip(half.log_probs, graphed.log_probs, exact.log_probs, strict=True):
        assert one[:3] == pytest.approx(all_exact[:3], abs=0.05)
        assert two[:3] == pytest.approx(all_exact[:3], abs=0.05)


@pytest.mark.parametrize("dtype, graphs", [(torch.float16, True), (torch.float32, False)])
def test_autocast_must_have_nothing_to_cast(dtype, graphs):
    """As in an evaluation during training, of an adapter or with all weights trained."""
    model = merged().to(dtype)
    emulated.clear()
    with torch.autocast("cuda", torch.float16):
        decoding.generate(model, PROMPTS, NEVER, NEW)
    assert emulated.counts().get("graph", 0) > 0 if graphs else "graph" not in emulated.counts()


def test_a_graph_that_cannot_be_captured_is_done_without(monkeypatch):
    model, said = merged(), []
    expected = launched(model, monkeypatch)

    def refuse(graph, pool):
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    found = decoding.generate(model, PROMPTS, NEVER, NEW, 2, tell=said.append)
    assert found.outputs == expected.outputs
    assert len(said) == 1 and "without CUDA graphs" in said[0] and "previous error" in said[0]


def test_what_waits_for_the_device_cannot_be_captured():
    x = torch.ones(2, device=DEVICE)
    for work in (lambda: x.sum().item(), lambda: x + torch.ones(2).to(DEVICE), lambda: x[x > 0]):
        with pytest.raises(RuntimeError, match="not permitted"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            work()


@pytest.mark.parametrize("targets", ["q", "all"])
def test_a_restored_model_is_what_it_was_and_holds_as_much(targets):
    """Some layers of those that were joined get their own weights back, others keep what they had."""
    model = merged(targets)
    restore(model)
    before = {name: parameter.cpu() for name, parameter in model.named_parameters()}
    decoding.generate(model, PROMPTS, NEVER, 2, 2)  # what the first pass makes, and keeps
    held = emulated.held()
    for _ in range(2):
        merge(model)
        decoding.generate(model, PROMPTS, NEVER, NEW, 2)
        restore(model)
    assert emulated.held() <= held + 4096
    assert all(torch.equal(parameter.cpu(), before[name]) for name, parameter in model.named_parameters())
