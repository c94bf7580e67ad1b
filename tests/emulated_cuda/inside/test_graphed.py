"""Decoding by CUDA graphs, on the emulated device: what is captured runs again, and answers are as without."""

import traceback

import emulated
import pytest
import torch
from helpers import random_ids, randomise_lora, tiny_model

from llamalora.evaluation import generate as decoding
from llamalora.evaluation.graphed import _Graph
from llamalora.lora.inject import inject_lora, merge, restore
from llamalora.model.elementwise import compile_formulas
from llamalora.model.llama import Llama

DEVICE = torch.device("cuda", 0)
PROMPTS = [list(range(3, 3 + length)) for length in (17, 9, 30, 4, 21)]
NEVER, NEW = -1, 40


@pytest.fixture(autouse=True)
def always_worth_it(monkeypatch):
    monkeypatch.setattr(decoding, "WORTH_PREPARING", (0, 0))


def merged(targets: str = "all", device: torch.device = DEVICE) -> Llama:
    """In fp32, in which no choice is so close that the order of sums decides it."""
    model = tiny_model(num_key_value_heads=4)
    inject_lora(model, targets, 4, alpha=4)
    randomise_lora(model)
    model = model.to(device).eval()
    merge(model)
    return model


def launched(model: Llama, monkeypatch, prompts=PROMPTS, new=NEW) -> decoding.Decoding:
    """Without graphs."""
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "WORTH_PREPARING", (10**9, 10**9))
        return decoding.generate(model, prompts, NEVER, new)


def half_right(outputs: list[list[int]]):
    def draft(index: int, output: list[int]) -> list[int]:
        ahead = outputs[index][len(output) : len(output) + 9]
        return [*ahead[:5], *((token + 1) % 97 for token in ahead[5:])]

    return draft


@pytest.mark.parametrize("batch", [1, 3, 5])
@pytest.mark.parametrize("drafted", [False, True], ids=["plain", "drafted"])
def test_answers_are_those_of_the_passes_as_they_come(batch, drafted, monkeypatch):
    model = merged()
    compile_formulas(model, emulated.as_one)
    expected = launched(model, monkeypatch)

    emulated.clear()
    found = decoding.generate(model, PROMPTS, NEVER, NEW, batch, half_right(expected.outputs) if drafted else None)
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


def test_a_capture_writes_nothing():
    """What it had written of the pass before would stand in slots of the cache that have since been filled."""
    kept, graph = torch.zeros(4, device="cuda"), torch.cuda.CUDAGraph()
    kept[:2].add_(1)
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        kept.add_(1)
        kept[:2].mul_(3)
    assert kept.tolist() == [1, 1, 0, 0]
    graph.replay()
    assert kept.tolist() == [6, 6, 1, 1]


@pytest.mark.parametrize("drafted", [False, True], ids=["plain", "drafted"])
def test_the_cache_grows_and_graphs_with_it(drafted, monkeypatch):
    """Shapes come again with a larger cache."""
    model, prompts = merged(), [random_ids(length, seed=length).tolist() for length in (100, 99, 97)]
    expected = launched(model, monkeypatch, prompts, 70)
    found = decoding.generate(model, prompts, NEVER, 70, 1, half_right(expected.outputs) if drafted else None)
    assert found.outputs == expected.outputs


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_another_gpu_than_the_current_one():
    assert torch.cuda.current_device() == 0
    found = [decoding.generate(merged(device=torch.device("cuda", n)), PROMPTS, NEVER, NEW, 1) for n in (0, 1)]
    assert found[0].outputs == found[1].outputs


@pytest.mark.parametrize("fails", ["at once", "at its end"])
def test_a_graph_that_cannot_be_captured_is_done_without(fails, monkeypatch):
    model, said, usual = merged(), [], torch.cuda.current_stream(DEVICE)
    expected = launched(model, monkeypatch)

    class Refusing(torch.cuda.graph):
        def __enter__(self):
            if fails == "at once":
                raise RuntimeError("CUDA error: previous error during capture")
            return super().__enter__()

        def __exit__(self, *error):
            super().__exit__(*error)
            torch.cuda.set_stream(self.capture_stream)  # as torch leaves it
            raise RuntimeError("CUDA error: previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", Refusing)
    found = decoding.generate(model, PROMPTS, NEVER, NEW, 2, tell=said.append)
    assert found.outputs == expected.outputs
    assert len(said) == 1 and "without CUDA graphs" in said[0] and "previous error" in said[0]
    assert torch.cuda.current_stream(DEVICE) == usual


def test_after_a_capture_that_failed_all_goes_on(monkeypatch):
    """The host waits in it, which CUDA refuses: memory is given back, numbers are drawn, others are captured."""
    model, said, x = merged(), [], torch.ones(1000, device=DEVICE)
    expected, compute = launched(model, monkeypatch), _Graph.compute

    def waiting(graph):
        result = compute(graph)
        result.sum().item()
        return result

    with monkeypatch.context() as patch:
        patch.setattr(_Graph, "compute", waiting)
        found = decoding.generate(model, PROMPTS, NEVER, NEW, 1, tell=said.append)
    assert found.outputs == expected.outputs
    assert len(said) == 1 and "without CUDA graphs" in said[0]
    assert 300 < torch.nn.functional.dropout(x).count_nonzero().item() < 700
    held = emulated.held()
    del x, found
    assert emulated.held() <= held - 4000
    assert decoding.generate(model, PROMPTS, NEVER, NEW, 1).outputs == expected.outputs
    assert emulated.counts()["graph"] >= 3


def test_memory_that_suffices_for_decoding_suffices_for_its_end(monkeypatch):
    """Weights are parted when the cache is gone; and what cannot be joined is decoded as it is."""
    model = merged()
    expected = launched(model, monkeypatch)
    largest = max(layer.weight.nbytes for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    decoding.generate(model, PROMPTS, NEVER, NEW, 1)  # what the first pass makes, and keeps
    for free in range(largest // 2, 40 * largest, largest // 2):
        emulated.limit(emulated.held() + free)
        try:
            found = decoding.generate(model, PROMPTS, NEVER, NEW, 5)
        except torch.OutOfMemoryError as error:
            trace = "".join(traceback.format_exception(error))
            assert ", in part" not in trace and ", in _fill" not in trace
        else:
            assert found.outputs == expected.outputs
        finally:
            emulated.limit(None)
        storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        assert len(storages) == len(list(model.parameters()))


@pytest.mark.parametrize("targets", ["q", "all"])
def test_a_restored_model_is_what_it_was_and_holds_as_much(targets):
    """Some layers of those that were joined get their own weights back, others keep what they had."""
    model = merged(targets)
    restore(model)
    before = {name: parameter.cpu() for name, parameter in model.named_parameters()}
    held = []
    for _ in range(3):
        merge(model)
        decoding.generate(model, PROMPTS, NEVER, NEW, 2)
        restore(model)
        held.append(emulated.held())
    assert held[2] == held[1]  # the first time makes what is kept
    assert all(torch.equal(parameter.cpu(), before[name]) for name, parameter in model.named_parameters())
