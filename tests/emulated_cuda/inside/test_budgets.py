"""How many operations a micro-batch, a step and a decoded token take, and how often the host waits for the device.

A GPU is through with an operation on few numbers sooner than Python has launched the next, and whenever the host waits,
it runs dry. Who adds one meets a budget here; who saves one lowers it.
"""

import emulated
import pytest
import torch
from helpers import tiny_model

from llamalora.distributed.world import World
from llamalora.evaluation.generate import WORTH_PREPARING, generate
from llamalora.evaluation.graphed import _Graph
from llamalora.lora.inject import inject_lora, merge
from llamalora.model.elementwise import compile_formulas
from llamalora.model.llama import Llama
from llamalora.model.prepared import prepared
from llamalora.training.batch import Example, MicroBatch
from llamalora.training.step import Optimizer, backward

DEVICE = torch.device("cuda", 0)
EXAMPLES = [Example(tuple(range(3, 4 + length)), length // 2) for length in (30, 21, 12, 9)]


def adapted(layers: int, dtype: torch.dtype = torch.float16) -> Llama:
    model = tiny_model(num_hidden_layers=layers).to(dtype)
    inject_lora(model, "all", 4, alpha=4)
    return model.to(DEVICE).train()


def counted(work) -> dict[str, int]:
    """The second time, since the first makes what is kept."""
    work()
    emulated.clear()
    work()
    return emulated.counts()


def by_layers(count) -> tuple[dict[str, int], dict[str, int]]:
    """What `count(layers)` finds outside the layers, and in each."""
    two, four = count(2), count(4)
    each = {name: (times - two.get(name, 0)) // 2 for name, times in four.items()}
    return {name: two.get(name, 0) - 2 * times for name, times in each.items()}, each


def within(found: dict[str, int], **budget: int) -> None:
    over = {name: (found[name], most) for name, most in budget.items() if found[name] > most}
    dearest = sorted(found.items(), key=lambda item: -item[1])
    assert not over, f"(found, budget): {over}\n{dearest}"


@pytest.mark.parametrize("recompute, of_a_layer", [(0, 177), (1, 243)], ids=["kept", "recomputed"])
def test_a_micro_batch(recompute, of_a_layer):
    def count(layers: int) -> dict[str, int]:
        model = adapted(layers)
        optimizer = Optimizer(model, "fp16", DEVICE, 0.0, 1.0)

        def work() -> None:
            backward(model, MicroBatch.of(EXAMPLES, DEVICE), 40, optimizer.scaler, "fp16", recompute)

        return counted(work)

    outside, each = by_layers(count)
    within(each, operations=of_a_layer, waits=0)
    within(outside, operations=86, waits=0)


@pytest.mark.parametrize("precision, operations", [("fp16", 24), ("bf16", 13)])
def test_an_update(precision, operations):
    """The host waits for the norm, read with the scale; besides there is the loss, read once a step (`loop.train`)."""

    def count(layers: int) -> dict[str, int]:
        model = adapted(layers)
        optimizer = Optimizer(model, precision, DEVICE, 0.0, 1.0)

        def work() -> None:
            for parameter in optimizer.parameters.values():
                parameter.grad = torch.ones_like(parameter)
            optimizer.scaler.scale(torch.ones(1, device=DEVICE))
            emulated.clear()
            optimizer.step(1e-4, World(device=DEVICE))

        return counted(work)

    outside, each = by_layers(count)
    within(each, operations=0, waits=0)
    within(outside, operations=operations, waits=1)


def test_a_decoded_token_without_a_graph():
    """Of one sentence by itself, of a merged model that is not worth preparing."""

    def count(layers: int) -> dict[str, int]:
        model = adapted(layers).eval()
        merge(model)

        def decode(tokens: int) -> dict[str, int]:
            return counted(lambda: generate(model, [list(range(3, 20))], -1, tokens, 1))

        few, many = decode(4), decode(5)
        return {name: times - few[name] for name, times in many.items()}

    outside, each = by_layers(count)
    within(each, operations=40, waits=0)
    # the choice and its probability are read; the last copies to the device are open
    within(outside, operations=39, waits=3)


def answering(layers: int) -> Llama:
    """As many heads of keys as of queries, as in Llama-2-7B; a formula counts as one, as compiled."""
    model = tiny_model(num_hidden_layers=layers, num_key_value_heads=4).half().to(DEVICE)
    compile_formulas(model, emulated.as_one)
    return model


@torch.no_grad()
def test_a_pass_as_captured():
    def count(layers: int) -> dict[str, int]:
        model = answering(layers)
        with prepared(model) as backbone:
            graph = _Graph(model, backbone, model.make_cache(1, 64), 1, 1)
            return counted(graph.compute)

    outside, each = by_layers(count)
    within(each, operations=10, waits=0)
    within(outside, operations=30, waits=0)


def test_a_graphed_token():
    """The graph is launched, and the choice is read; nothing else makes the host wait."""
    model, prompt = answering(2), [3] * 200  # long enough that as many tokens are expected

    def decode(tokens: int) -> dict[str, int]:
        return counted(lambda: generate(model, [prompt], -1, tokens, 1))

    most = WORTH_PREPARING[1]
    few, many = decode(most), decode(most + 10)
    each = {name: (times - few.get(name, 0)) / 10 for name, times in many.items()}
    within(each, operations=3, waits=1)
    assert each["graph"] == 1
