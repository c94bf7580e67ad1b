"""The pass with weights laid out for oneDNN against the model's own."""

import pytest
import torch
from helpers import random_ids, tiny_model

from llamalora.lora.inject import adapt, lora_layers, merge
from llamalora.model import prepared as preparing
from llamalora.model.elementwise import compile_formulas
from llamalora.model.packing import Packing
from llamalora.model.prepared import prepared as prepared_while

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="this CPU has no AVX-512, for which the layout is"
)


def prepared(model):
    with prepared_while(model) as backbone:  # on a CPU it stays what it is
        return backbone


def passes(backbone, model, ids):
    """Hidden states of two sequences that enter a cache and then go on, one by three tokens."""
    with torch.no_grad():
        cache = model.make_cache(2, 12)
        first = backbone(ids[:, :13], Packing([8, 5], CPU), cache)
        then = backbone(ids[:, 13:17], Packing([1, 3], CPU, starts=[8, 5]), cache)
    return torch.cat((first, then), 1).float()


@pytest.mark.parametrize("shape", [{}, {"num_key_value_heads": 4}], ids=["gqa", "mha"])
def test_it_is_as_exact_as_the_model_s_own_pass(shape):
    model, ids = tiny_model(**shape), random_ids(1, 17)
    exact = passes(model.model, model, ids)
    half = model.bfloat16()
    own, faster = passes(half.model, half, ids), passes(prepared(half), half, ids)
    assert prepared(half) is not half.model
    assert not torch.equal(own, faster)  # whose results within a block are not rounded
    assert (faster - exact).norm() < 1.2 * (own - exact).norm() < 0.1 * exact.norm()


def test_it_has_what_is_merged():
    model, ids = tiny_model().bfloat16(), random_ids(1, 17)
    before = passes(prepared(model), model, ids)
    adapt(model, dict.fromkeys(("model.layers.1.mlp.up_proj", "model.layers.0.self_attn.v_proj"), (2, 2.0)), False)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(0))
    assert prepared(model) is model.model  # not yet merged
    merge(model)
    own, faster = passes(model.model, model, ids), passes(prepared(model), model, ids)
    assert (faster - own).norm() < 0.03 * own.norm() < 0.3 * (faster - before).norm()


def test_it_computes_formulas_as_the_model_does():
    model, ids, seen = tiny_model().bfloat16(), random_ids(1, 17), []

    def noting(formula):
        seen.append(formula.__name__)
        return formula

    compile_formulas(model, noting)
    passes(prepared(model), model, ids)
    assert seen.count("rotate") == 2 * 2 and "normalize" in seen  # layers, passes


def hooked(model):
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("change", [hooked, lambda model: model.float(), lambda model: model.to("meta")])
def test_any_other_model_keeps_its_own_pass(change):
    model = tiny_model().bfloat16()
    change(model)
    assert prepared(model) is model.model


def test_there_must_be_memory_for_both(monkeypatch):
    model = tiny_model().bfloat16()
    size = sum(x.nbytes for name, x in model.model.named_parameters() if "proj" in name)
    for free, makes in ((2.3 * size, True), (2.1 * size, False)):
        monkeypatch.setattr(preparing, "free_memory", lambda device, free=free: free)
        assert (prepared(model) is not model.model) == makes
