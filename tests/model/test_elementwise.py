"""Norms, rotary embedding, SwiGLU and cross entropy compiled: the same results, by programs that are made once."""

from collections import Counter
from functools import cache

import pytest
import torch
from helpers import close, random_ids, randomise_lora, tiny_model

from llamalora.cli import UsageError
from llamalora.lora.inject import lora_layers, make_trainable, merge, restore, trainable_parameters
from llamalora.model import elementwise
from llamalora.model.elementwise import RMSNorm, compile_formulas, for_any_tokens, obstacle, plain
from llamalora.model.precision import DTYPES
from llamalora.runs.setup import choose_compiled
from llamalora.training.batch import Example, MicroBatch
from llamalora.training.step import _cross_entropy, backward

CPU = torch.device("cpu")
MADE: Counter = Counter()  # programs, by formula


@cache
def traced(formula):
    """As `elementwise.compiled`, with a compiler that writes no code: PyTorch runs the traced graph, gradients off."""

    def backend(graph, _):
        MADE[formula.__name__] += 1
        return graph.forward

    return for_any_tokens(torch.compile(formula, fullgraph=True, backend=backend))


@cache
def aot(formula):
    return for_any_tokens(torch.compile(formula, fullgraph=True, backend="aot_eager"))


def trainee(run, dtype: torch.dtype = torch.float32, **how):
    model = make_trainable(tiny_model().to(dtype), **how).train()
    if lora_layers(model):
        randomise_lora(model)
    if run:
        compile_formulas(model, run)
    return model


def learn(model, precision: str, lengths, recompute: int = 0) -> list:
    """The loss of a micro-batch, and the gradients."""
    examples = [Example(tuple(random_ids(length, seed=length).tolist()), length // 2) for length in lengths]
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss = backward(model, MicroBatch.of(examples, CPU), 100.0, scaler, precision, recompute)
    return [loss, *(parameter.grad for parameter in trainable_parameters(model).values())]


@pytest.mark.parametrize("recompute", [0, 1])
@pytest.mark.parametrize("how, precision", [
    ({"rank": 4}, "fp32"), ({"rank": 4}, "bf16"), ({"rank": 4, "dora": True}, "fp32"), ({"method": "full"}, "fp32"),
    ({"method": "partial", "targets": "q,up"}, "fp32"),
])  # fmt: skip
def test_compiled_formulas_learn_the_same(how, precision, recompute):
    dtype = torch.float32 if "method" in how else DTYPES[precision]
    expected = learn(trainee(None, dtype, **how), precision, (30, 20, 9), recompute)
    actual = learn(trainee(aot, dtype, **how), precision, (30, 20, 9), recompute)
    for one, other in zip(expected, actual, strict=True):
        assert one.dtype == other.dtype
        close(other, one, 1e-5 if precision == "fp32" else 2e-2)
    if precision == "fp32":  # no formula of a block is changed by a trace; that of the cross entropy is another
        assert (expected[0] - actual[0]).abs() < 1e-6


def test_a_program_serves_any_number_of_tokens():
    """Of one formula in each way and dtype, in training, recomputed or not, and in decoding."""
    model = trainee(traced, rank=4)
    for lengths, recompute in (((30, 20), 0), ((50, 9, 3), 1), ((11,), 0)):
        learn(model, "fp32", lengths, recompute)
    ids = random_ids(3, 7)
    with torch.no_grad():
        model.eval()(ids)
        merge(model)(ids)
    formulas = {"normalize", "add_normalize", "rotate", "swiglu"}
    backwards = {"normalize_backward", "add_normalize_backward", "rotate_back", "swiglu_backward"}
    assert dict.fromkeys({*formulas, *backwards, "cross_entropy"}, 1) == MADE


def test_names_and_values_of_parameters_stay():
    model, as_ever = trainee(aot, rank=4), trainee(None, rank=4)
    assert list(model.state_dict()) == list(as_ever.state_dict())
    ids = random_ids(2, 9)
    with torch.no_grad():
        expected = as_ever(ids)
        close(model(ids), expected, 1e-5)
        merge(model)
        close(model(ids), expected, 1e-4)
        restore(model)
    for one, other in zip(model.state_dict().values(), as_ever.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert as_ever.run is plain and RMSNorm.run is plain  # one model's choice, not every model's


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula_of_the_cross_entropy_is_the_one_in_place(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (8 * torch.randn(7, 50, generator=generator)).to(dtype)
    targets, factor = torch.randint(50, (7,), generator=generator), torch.tensor(0.3)
    expected, actual = _cross_entropy(logits, targets, factor), _cross_entropy(logits, targets, factor, aot)
    for one, other in zip(expected, actual, strict=True):
        assert one.dtype == other.dtype
        close(other, one, 1e-6 if dtype == torch.float32 else 1e-2)


def test_the_gradient_of_a_norm_that_learns_is_autograds():
    x, y = (torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    norm = RMSNorm(8, 1e-5).double()

    def written_out(x):
        return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)

    weights = torch.linspace(-1, 1, 48, dtype=torch.float64).view(2, 3, 8)
    total, normalized = norm(x, y)
    expected = torch.autograd.grad(((x + y) * weights + written_out(x + y) * weights.sin()).sum(), (x, y, norm.weight))
    actual = torch.autograd.grad((total * weights + normalized * weights.sin()).sum(), (x, y, norm.weight))
    for one, other in zip(expected, actual, strict=True):
        close(other, one, 1e-5)  # it computes in fp32


# ---- where formulas are compiled ----


def test_a_cpu_compiles_only_if_asked():
    assert choose_compiled("auto", CPU) == (False, "on the CPU")
    assert choose_compiled("off", CPU)[0] is False


def test_what_stands_in_the_way_of_compiling(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(elementwise.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(elementwise.shutil, "which", lambda name: name or None)
    assert obstacle(gpu) is None and choose_compiled("auto", gpu) == (True, "on a GPU")
    for vectors in (True, False):
        monkeypatch.setattr(elementwise, "_compiles_vectors", lambda vectors=vectors: vectors)
        assert (obstacle(CPU) is None) == vectors
    with pytest.raises(UsageError, match="--compile on: torch.compile can use no vector instructions here"):
        choose_compiled("on", CPU)
    monkeypatch.setattr(elementwise, "_compiles_vectors", lambda: True)
    assert choose_compiled("on", CPU) == (True, "requested")
    monkeypatch.setattr(elementwise.shutil, "which", lambda name: None)
    assert choose_compiled("auto", gpu) == (False, "there is no compiler (gcc or clang)")
    with pytest.raises(UsageError, match=r"--compile on: there is no compiler \(g\+\+ or clang\+\+\)"):
        choose_compiled("on", CPU)
    monkeypatch.setattr(elementwise.importlib.util, "find_spec", lambda name: None)
    assert obstacle(gpu) == "Triton is not installed"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert obstacle(gpu) == "the GPU is too old for Triton"
