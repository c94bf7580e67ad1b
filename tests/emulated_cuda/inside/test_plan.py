"""The memory plan beside the peak of a whole step: what is held from step to step, the passes, the update."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import emulated
import pytest
import torch

from llamalora.distributed.sharding import merged
from llamalora.distributed.world import World
from llamalora.evaluation.generate import generate
from llamalora.lora.inject import cast_factors, make_trainable
from llamalora.lora.kinds import KINDS
from llamalora.model.checkpoint import skeleton
from llamalora.model.config import LlamaConfig
from llamalora.model.llama import Llama
from llamalora.model.precision import DTYPES, autocast
from llamalora.training.batch import Example, MicroBatch
from llamalora.training.memory import Plan, plan_memory
from llamalora.training.step import Optimizer, backward

DEVICE = torch.device("cuda", 0)

SHAPES = {
    # Llama-2-7B's proportions; with several tokens for each hidden feature, so that activations weigh more than there
    "deep": LlamaConfig(1000, 128, 344, 4, 2, 2, 64, 1024),
    # four queries share a key
    "grouped": LlamaConfig(1000, 128, 448, 3, 4, 1, 32, 1024),
    # a tied head is most of the model
    "wide": LlamaConfig(6000, 128, 344, 2, 2, 2, 64, 1024, tie_word_embeddings=True),
}
LENGTHS = {"even": [64] * 8, "uneven": [150, 90, 70, 60, 50, 40, 30, 22], "very uneven": [300] + [16] * 13}
METHODS = {
    "lora": {"method": "lora", "targets": "all", "rank": 16},
    "lora on q and v": {"method": "lora", "targets": "q,v", "rank": 16},
    "dropout": {"method": "lora", "targets": "all", "rank": 16, "dropout": 0.1},
    "dora": {"method": "lora", "targets": "all", "rank": 16, "dora": True},
    "partial": {"method": "partial", "targets": "q,v", "rank": 0},
    "full": {"method": "full", "targets": "all", "rank": 0},
}
ALONE = {f"lora on {kind} alone": {"method": "lora", "targets": kind, "rank": 16} for kind in KINDS}


@dataclass(frozen=True)
class Case:
    method: str = "lora"
    precision: str = "fp16"
    recompute: int = 0
    lengths: str = "uneven"
    shape: str = "deep"

    def __str__(self) -> str:
        return f"{self.method}-{self.precision}-{self.recompute}-{self.lengths}-{self.shape}".replace(" ", "_")


SHORT = (
    Case(), Case(recompute=1), Case(lengths="even"), Case(recompute=1, lengths="very uneven"), Case("dora", "bf16"),
    Case("full", "bf16", 1), Case(shape="grouped"), Case(shape="wide", recompute=2), Case("dropout", "fp32"),
    *map(Case, ALONE),
)  # fmt: skip
ALL = (
    *product(METHODS, ("fp16", "fp32"), (0, 1), LENGTHS, ("deep",)),
    *product(("lora", "full"), ("fp16",), (0, 1), ("even", "very uneven"), ("grouped", "wide")),
)
LONG = tuple(case for case in (Case(*one) for one in ALL) if case not in SHORT)


def cases():
    for case in (*SHORT, *LONG):
        marks = [pytest.mark.faults] if case in LONG else []
        yield pytest.param(case, marks=marks, id=str(case))


def planned(case: Case) -> Plan:
    model = trainee(case)
    lengths = LENGTHS[case.lengths]
    return plan_memory(model, "ddp", 1, 0, case.precision, sum(lengths), case.recompute, lengths)


def trainee(case: Case) -> Llama:
    """On the meta device; weights in the dtype that `build_model` gives them."""
    learning = (METHODS | ALONE)[case.method]
    dtype = DTYPES[case.precision] if learning["method"] == "lora" else torch.float32
    return make_trainable(skeleton(SHAPES[case.shape]).to(dtype), **learning)


def filled(case: Case) -> Llama:
    """On the device, with values."""
    model = trainee(case).to_empty(device=DEVICE)
    if SHAPES[case.shape].tie_word_embeddings:
        model.tie()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    return model


def measured(case: Case, lengths: Sequence[int]) -> int:
    """The most that the second step holds; the first one makes the optimizer's state."""
    before = emulated.held()
    model = filled(case).train()
    optimizer = Optimizer(model, case.precision, DEVICE, 0.0, 1.0)
    examples = [Example(tuple(range(3, 4 + length)), 1) for length in lengths]  # all is supervised, as the plan assumes
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        batch = MicroBatch.of(examples, DEVICE)
        supervised = sum(example.supervised for example in examples)
        with cast_factors(model, DTYPES[case.precision]):
            for _ in range(2):  # the gradients of the first are held while the second is computed, as the plan assumes
                backward(model, batch, supervised, optimizer.scaler, case.precision, case.recompute)
        optimizer.step(1e-4, World(device=DEVICE))
    return emulated.peak() - before


@pytest.mark.parametrize("case", list(cases()))
def test_the_plan_is_within_a_tenth_of_the_peak(case):
    plan = planned(case)
    tensors = plan.total - plan.items["overhead"]
    found = measured(case, LENGTHS[case.lengths])
    assert 0.9 * tensors <= found <= 1.1 * tensors, f"{found / tensors:.3f} of the plan\n{plan.items}"


@pytest.mark.parametrize("shape", ["deep", "wide"])
@pytest.mark.parametrize("method, precision", [
    ("lora", "fp16"), ("lora", "fp32"), ("lora", "bf16"), ("dora", "fp16"), ("full", "fp16"), ("full", "fp32"),
])  # fmt: skip
def test_an_evaluation_is_within_a_tenth_of_its_plan(method, precision, shape):
    """Merging, and decoding one sentence at a time, when the optimizer has its moments and the gradients are gone."""
    case, length = Case(method, precision, shape=shape), 320
    plan = plan_memory(trainee(case), "ddp", 1, 0, precision, length, 0, [length])
    before = emulated.held()
    model = filled(case)
    optimizer = Optimizer(model, precision, DEVICE, 0.0, 1.0)
    for parameter in optimizer.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    world = World(device=DEVICE)
    optimizer.adam.step()
    optimizer.adam.zero_grad()
    torch.cuda.reset_peak_memory_stats()
    with merged(model.eval(), world), autocast(precision, DEVICE):
        generate(model, [[5] * (length - 20)], -1, 20)
    tensors = plan.evaluation_total - plan.evaluation["overhead"]
    found = emulated.peak() - before
    assert 0.9 * tensors <= found <= 1.1 * tensors, f"{found / tensors:.3f} of the plan\n{plan.evaluation}"
