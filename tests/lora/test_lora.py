"""Low-rank updates against peft and against their definition; merging, restoring, counting."""

import json
import math
import warnings
import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers import (
    NINE,
    close,
    copy_to_peft,
    logits,
    peft_model,
    peft_pairs,
    random_ids,
    randomise_lora,
    tiny_model,
    transformers_twin,
)
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from llamalora.lora import inject
from llamalora.lora.fused import FusedLinears
from llamalora.lora.inject import (
    adapt,
    cast_factors,
    count_parameters,
    inject_lora,
    lora_layers,
    merge,
    merge_for_good,
    restore,
    train_weights,
    trainable_parameters,
)
from llamalora.lora.kinds import KINDS, kind_of, parse_targets
from llamalora.lora.layers import LoRAEmbedding, LoRALinear, adapted_linear
from llamalora.model.config import LlamaConfig
from llamalora.model.llama import Llama, fan_out

IDS = random_ids(2, 24)
TABLES = Path(__file__).parents[2] / "../shared/paper/tables.json"


def adapted(targets="all", rank=4, seed=0, filled=True, shape=None, dtype=torch.float32, **options) -> Llama:
    model = tiny_model(seed, **(shape or {})).to(dtype)
    inject_lora(model, targets, rank, **options)
    if filled:
        randomise_lora(model)
    return model


# ---- the nine kinds ----


@pytest.mark.parametrize("targets, kinds", [
    ("all", NINE),
    ("q", ("q",)),
    ("head, q ,embed", ("q", "embed", "head")),  # in the paper's order
    ("q,q,all", NINE),
    ("q,,v,", ("q", "v")),
])  # fmt: skip
def test_targets(targets, kinds):
    assert parse_targets(targets) == kinds


def test_targets_by_the_names_of_peft():
    assert parse_targets("lm_head, q_proj,v") == parse_targets(["v_proj", "q", "lm_head"]) == ("q", "v", "head")


@pytest.mark.parametrize("targets, named", [
    ("", "unknown target ''"),
    (",", "unknown target ','"),
    ("q,w", "unknown target 'w'"),
    ("q_projs,lm_head,z", "unknown target 'q_projs, z'"),
    ("ALL", "unknown target 'ALL'"),
])  # fmt: skip
def test_unknown_targets_are_named_with_the_choices(targets, named):
    with pytest.raises(ValueError, match=named) as caught:
        inject_lora(tiny_model(), targets)
    assert "q,k,v,o,up,down,gate,embed,head" in str(caught.value)


@pytest.mark.parametrize("kind", NINE)
def test_a_kind_is_its_layers_and_no_other(kind):
    layers = lora_layers(adapted(kind))
    assert {name.rpartition(".")[2] for name in layers} == {KINDS[kind]}
    assert len(layers) == (1 if kind in ("embed", "head") else 2)
    assert all(isinstance(layer, LoRAEmbedding if kind == "embed" else LoRALinear) for layer in layers.values())


def test_an_adapted_model_can_be_printed():
    text = repr(adapted())  # in which torch shows the two equal blocks once
    assert text.count("LoRALinear(") == 7 + 1 and text.count("LoRAEmbedding(") == 1


def test_only_the_updates_learn_and_base_keys_stay():
    base = tiny_model()
    model = adapted(filled=False, dtype=torch.bfloat16)
    trainable = trainable_parameters(model)
    assert all(name.endswith((".lora_A", ".lora_B")) for name in trainable)
    assert len(trainable) == 2 * len(lora_layers(model)) == 2 * (7 * 2 + 2)
    assert all(parameter.dtype == torch.float32 for parameter in trainable.values())  # whatever the base's is
    assert base.state_dict().keys() == model.state_dict().keys() - trainable.keys()
    for name, tensor in base.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.bfloat16())


@pytest.mark.parametrize("targets", [*NINE, "q,v", "all"])
def test_partial_fine_tuning_trains_the_weights_of_these_layers(targets):
    model = train_weights(tiny_model(), targets)
    learning = trainable_parameters(model)
    assert {kind_of(name.removesuffix(".weight")) for name in learning} == set(parse_targets(targets))
    assert learning.keys() == {f"{name}.weight" for name in lora_layers(adapted(targets))}
    assert count_parameters(model)["base"] == count_parameters(tiny_model())["base"]
    with pytest.raises(ValueError, match="no layer of the model is of kind embed, head"):
        train_weights(tiny_model().model.layers, "q,embed,head")


@pytest.mark.parametrize("targets", ["embed", "head", "embed,head"])
def test_partial_fine_tuning_of_a_tied_matrix(targets):
    """It is one parameter, whichever of its places is named."""
    model = train_weights(tiny_model(tie_word_embeddings=True), targets)
    assert list(trainable_parameters(model)) == ["model.embed_tokens.weight"]
    assert model.lm_head.weight is model.model.embed_tokens.weight


# ---- the start ----


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_fresh_update_is_the_identity(tied, rslora):
    base = tiny_model(tie_word_embeddings=tied)
    model = adapted(filled=False, shape={"tie_word_embeddings": tied}, rslora=rslora, alpha=32)
    for layer in lora_layers(model).values():
        assert not layer.delta().any()
        assert layer.lora_A.any() or layer.lora_B.any()  # else it would never learn
    close(logits(model, IDS), logits(base, IDS), 1e-6)


def test_initial_values_depend_on_the_seed_alone():
    def values(seed, global_seed=0):
        torch.manual_seed(global_seed)
        model = tiny_model()
        state = torch.get_rng_state()
        inject_lora(model, "all", 4, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return trainable_parameters(model)

    first, again, other = values(0), values(0, global_seed=1), values(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name, parameter in first.items() if parameter.any()]
    assert len(drawn) == len(first) // 2
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


def test_layers_start_differently_and_as_wide_as_a_linear_layer():
    model = tiny_model(hidden_size=64, intermediate_size=128, num_attention_heads=8)
    inject_lora(model, "q,down", 32)
    for layer in lora_layers(model).values():
        reference = torch.nn.Linear(layer.in_features, 32, bias=False).weight
        assert layer.lora_A.abs().max() <= layer.in_features**-0.5
        assert 0.9 < (layer.lora_A.std() / reference.std()).item() < 1.1
    a, b = (model.model.layers[n].self_attn.q_proj.lora_A for n in (0, 1))
    assert not torch.equal(a, b)


# ---- against peft ----


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("targets", [*NINE, "all"])
def test_logits_and_gradients_are_those_of_peft(targets, tied):
    shape = {"tie_word_embeddings": tied}
    model = adapted(targets, 4, shape=shape, alpha=6.0)
    modules = [KINDS[kind] for kind in parse_targets(targets)]
    theirs = peft_model(transformers_twin(tiny_model(**shape)), modules, 4, 6.0)
    copy_to_peft(model, theirs)
    close(logits(model, IDS), logits(theirs, IDS))
    assert (logits(model, IDS) - logits(tiny_model(**shape), IDS)).abs().max() > 0.05  # the update is seen

    F.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    theirs(IDS, labels=IDS).loss.backward()
    for name, (A, B) in peft_pairs(theirs).items():
        layer = lora_layers(model)[name]
        close(layer.lora_A.grad, A.grad, 1e-4)
        close(layer.lora_B.grad, B.grad, 1e-4)


@pytest.mark.parametrize("rslora", [False, True])
def test_scale_is_that_of_peft(rslora):
    model = adapted("q,embed", 4, alpha=6.0, rslora=rslora)
    theirs = peft_model(transformers_twin(tiny_model()), ["q_proj", "embed_tokens"], 4, 6.0, use_rslora=rslora)
    copy_to_peft(model, theirs)
    close(logits(model, IDS), logits(theirs, IDS))
    assert {layer.scale for layer in lora_layers(model).values()} == {6.0 / (math.sqrt(4) if rslora else 4)}
    assert all(layer.scale == 1 for layer in lora_layers(adapted(rank=8)).values())  # equation 2 by default


# ---- merging ----


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("targets", [*NINE, "all"])
def test_merged_is_unmerged(targets, tied):
    model = adapted(targets, shape={"tie_word_embeddings": tied})
    before = logits(model, IDS)
    merge(model)
    assert all(layer.merged for layer in lora_layers(model).values())
    tolerance = 1e-5 * max(1, before.abs().max().item() / 10)
    close(logits(model, IDS), before, tolerance)
    merge(model)  # twice is once
    close(logits(model, IDS), before, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_adds_in_fp32_and_rounds_once(dtype):
    model = adapted(dtype=dtype, alpha=6.0)
    base = tiny_model().to(dtype).state_dict()
    merge(model)
    for name, layer in lora_layers(model).items():
        product = layer.lora_B.float() @ layer.lora_A.float()
        delta = 1.5 * (product.T if isinstance(layer, LoRAEmbedding) else product)
        weight = base[f"{name}.weight"]
        assert torch.equal(layer.weight, (weight.float() + delta).to(dtype)), name
        assert not torch.equal(layer.weight, weight)
        if dtype != torch.float32:  # rounding the update first gives another sum: the test can fail
            assert not torch.equal(layer.weight, weight + delta.to(dtype))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restoring_is_bitwise(dtype, tied):
    model = adapted(dtype=dtype, shape={"tie_word_embeddings": tied})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    output = logits(model, IDS)
    for _ in range(3):
        merge(model)
        restore(model)
    restore(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(model, IDS), output)


def test_merging_unties_and_restoring_ties_again():
    model = adapted(shape={"tie_word_embeddings": True})
    embedding, head = model.model.embed_tokens, model.lm_head
    assert embedding.weight is head.weight
    merge(model)
    assert embedding.weight is not head.weight
    assert not torch.equal(embedding.weight, head.weight)
    restore(model)
    assert embedding.weight is head.weight


@pytest.mark.parametrize("kind", ["embed", "head"])
def test_merging_one_of_two_tied_layers_leaves_the_other(kind):
    model = adapted(kind, shape={"tie_word_embeddings": True})
    base = tiny_model(tie_word_embeddings=True)
    merge(model)
    other, original = (model.lm_head, base.lm_head) if kind == "embed" else (
        model.model.embed_tokens, base.model.embed_tokens)  # fmt: skip
    assert torch.equal(other.weight, original.weight)
    restore(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_merging_for_good_holds_the_model_once(tied, dora):
    """The same weights, plain layers, and nothing left of W0, A and B."""
    kept = merge(adapted(shape={"tie_word_embeddings": tied}, dora=dora))
    model = adapted(shape={"tie_word_embeddings": tied}, dora=dora)
    adapters = [weakref.ref(tensor) for layer in lora_layers(model).values() for tensor in (layer.weight, *layer.parts)]
    assert merge_for_good(model) is model
    assert not lora_layers(model) and all(tensor() is None for tensor in adapters)
    expected = {name: tensor for name, tensor in kept.state_dict().items() if "lora_" not in name}
    assert expected.keys() == model.state_dict().keys()
    assert all(torch.equal(expected[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model, IDS), logits(kept, IDS))
    assert {type(layer) for layer in (model.lm_head, model.model.embed_tokens)} == {nn.Linear, nn.Embedding}
    assert not any(parameter.requires_grad for parameter in model.model.layers.parameters() if parameter.dim() == 2)


def test_merging_adds_no_parameter():
    """What is kept for restoring is no part of the model: not counted, not saved, not trained."""
    model = adapted()
    names, counts = [name for name, _ in model.named_parameters()], count_parameters(model)
    merge(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert model.state_dict().keys() == set(names)
    assert count_parameters(model) == counts


# ---- the hand-written backward pass ----


SCALES = (0.7, 2.0, 1.0)


def tensors(dtype=torch.float64, x_grad=True, tokens=5, features=6, outs=(7,), ranks=(3,)):
    """x, then W0, A, B of each layer; W0 has the dtype of x, A and B at least that of fp32."""
    generator = torch.Generator().manual_seed(3)
    wide = torch.promote_types(dtype, torch.float32)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    matrices = []
    for out, rank in zip(outs, ranks, strict=True):
        matrices.append(draw(out, features).to(dtype))
        matrices += [t.to(wide).requires_grad_() for t in (draw(rank, features), draw(out, rank))]
    return draw(2, tokens, features).to(dtype).requires_grad_(x_grad), *matrices


LAYERS = [{"outs": (7,), "ranks": (3,)}, {"outs": (7, 2, 6), "ranks": (3, 1, 2)}]  # alone; beside others


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("x_grad", [True, False])
def test_gradients_are_the_numerical_ones(x_grad, layers):
    scales = SCALES[: len(layers["outs"])]
    assert torch.autograd.gradcheck(
        lambda x, *given: FusedLinears.apply(x, torch.float64, scales, [None] * len(scales), *given),
        tensors(x_grad=x_grad, **layers),
    )


def both_forms(x, *matrices, dtype):
    """Outputs and gradients of the equation as it is written, and of the fused form."""
    each = list(zip(matrices[::3], matrices[1::3], matrices[2::3], SCALES, strict=False))
    for forward in (
        lambda: [adapted_linear(x, *one) for one in each],
        lambda: FusedLinears.apply(x, dtype, SCALES[: len(each)], [None] * len(each), *matrices),
    ):
        with torch.autocast("cpu", dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
            ys = forward()
        weights = [torch.linspace(-1, 1, y.numel()).sin().view_as(y).to(y.dtype) for y in ys]
        yield *ys, *torch.autograd.grad(ys, [t for t in (x, *matrices) if t.requires_grad], weights)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("x_grad", [True, False])
def test_it_is_the_plain_form(x_grad, layers):
    plain, ours = both_forms(*tensors(x_grad=x_grad, **layers), dtype=torch.float64)
    for expected, actual in zip(plain, ours, strict=True):
        close(actual, expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("x_grad", [True, False])
def test_it_is_the_plain_form_under_autocast(x_grad, dtype):
    sizes = {"tokens": 60, "features": 64, "outs": (48, 32), "ranks": (8, 4)}
    plain, ours = both_forms(*tensors(torch.float32, x_grad, **sizes), dtype=dtype)
    exact, _ = both_forms(*tensors(torch.float64, x_grad, **sizes), dtype=torch.float64)
    for truth, expected, actual in zip(exact, plain, ours, strict=True):
        assert actual.dtype == expected.dtype
        error = (actual.double() - truth).norm() / truth.norm()
        assert error < 3 * torch.finfo(dtype).eps
        assert error < 1.5 * (expected.double() - truth).norm() / truth.norm()  # no less exact than torch's


def test_a_half_precision_base_outside_autocast():
    model = adapted("all", dtype=torch.bfloat16)
    reference = adapted("all")
    out = model(IDS)
    assert out.dtype == torch.bfloat16
    assert (out.float() - logits(reference, IDS)).norm() / logits(reference, IDS).norm() < 0.05
    out.float().logsumexp(-1).sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in trainable_parameters(model).values())


@pytest.mark.parametrize("recompute", [0, 1])
@pytest.mark.parametrize("alpha", [4, 10])
def test_factors_cast_once_for_several_passes_change_nothing(alpha, recompute):
    """Bit for bit, in output and gradients of two micro-batches; and none is cast again."""
    results, converted = [], []

    class Conversions(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.aten._to_copy.default and result.dtype == torch.bfloat16:
                converted[-1] += tuple(result.shape) in factors
            return result

    for kept in (False, True):
        model = adapted("all", rank=4, alpha=alpha, dtype=torch.bfloat16).train()
        layers = [layer for layer in lora_layers(model).values() if isinstance(layer, LoRALinear)]
        factors = {tuple(part.shape) for layer in layers for part in layer.parts}
        converted.append(0)
        with cast_factors(model, torch.bfloat16) if kept else nullcontext(), Conversions():
            for ids in (IDS, IDS[:, :7]):
                hidden = model.model(ids, recompute=recompute)
                model.lm_head(hidden).float().logsumexp(-1).sum().backward()
        assert all(layer.cast is None for layer in layers)
        results.append([hidden.detach(), *(parameter.grad for parameter in trainable_parameters(model).values())])
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected) and actual.dtype == expected.dtype
    embedding = 2 * 1  # its B, in each micro-batch, is left to autograd
    assert converted[1] <= embedding < 2 * 2 * 2 * len(layers) <= converted[0]


def test_nothing_but_the_cast_factors_is_held(monkeypatch):
    made = []

    def scaled(tensor, scale):
        made.append(weakref.ref(result := tensor * scale))
        return result

    monkeypatch.setattr(inject, "scaled", scaled)
    with cast_factors(adapted("all", rank=4, alpha=8, dtype=torch.bfloat16), torch.bfloat16):
        assert made and not any(one() is not None for one in made)


def test_only_what_is_not_in_the_products_dtype_is_cast():
    model = adapted("all", rank=4, dtype=torch.bfloat16)
    with cast_factors(model, torch.float32):
        assert all(layer.cast is None for layer in lora_layers(model).values() if isinstance(layer, LoRALinear))
    dropping = adapted("all", rank=4, dropout=0.1, dtype=torch.bfloat16)
    with cast_factors(dropping, torch.bfloat16):
        assert all(layer.cast is None for layer in lora_layers(dropping).values() if isinstance(layer, LoRALinear))


# ---- layers with one input ----


def adapted_block(targets: str, **options) -> tuple[Llama, torch.Tensor]:
    """A model in training with updates that are not zero, and an input of its first block's attention."""
    model = adapted(targets, **options).train()
    return model, torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(6)).requires_grad_()


@pytest.mark.parametrize("targets", ["all", "q,v", "k", "o"])
@pytest.mark.parametrize("state", ["plain", "merged", "listened to", "dora"])
def test_layers_side_by_side_are_the_layers_alone(targets, state):
    model, x = adapted_block(targets, **({"dora": True} if state == "dora" else {}))
    attention = model.model.layers[0].self_attn
    layers = attention.q_proj, attention.k_proj, attention.v_proj
    if state == "merged":
        merge(model)
    alone = [layer(x) for layer in layers]
    heard = []
    if state == "listened to":
        layers[1].register_forward_hook(lambda layer, given, y: heard.append(y))
    together = fan_out(x, *layers)
    assert len(heard) == (state == "listened to")
    learning = [x, *(p for layer in layers for p in layer.parameters() if p.requires_grad)]
    for theirs, ours in zip(alone, together, strict=True):
        close(ours, theirs, 1e-6)
    gradients = [torch.autograd.grad(sum(y.sin().sum() for y in ys), learning, allow_unused=True)
                 for ys in (alone, together)]  # fmt: skip
    for theirs, ours in zip(*gradients, strict=True):
        assert (theirs is None) == (ours is None)
        if ours is not None:
            close(ours, theirs, 1e-5)


def test_dropped_inputs_are_drawn_for_each_layer():
    model, x = adapted_block("q,k", dropout=0.5)
    attention = model.model.layers[0].self_attn
    torch.manual_seed(8)
    alone = [attention.q_proj(x), attention.k_proj(x)]
    torch.manual_seed(8)
    for theirs, ours in zip(alone, fan_out(x, attention.q_proj, attention.k_proj), strict=True):
        assert torch.equal(ours, theirs)


# ---- dropout ----


def test_updates_of_a_model_in_evaluation_mode_are_in_it_too():
    """Else a loaded adapter would drop inputs in generation."""
    for mode in (True, False):
        model = tiny_model().train(mode)
        inject_lora(model, "all", 4, dropout=0.5)
        assert {module.training for module in model.modules()} == {mode}


def test_dropout_acts_in_training_only():
    plain, dropping = adapted(dropout=0.0).eval(), adapted(dropout=0.5).eval()
    assert torch.equal(logits(dropping, IDS), logits(plain, IDS))
    dropping.train()
    draws = [logits(dropping, IDS) for _ in range(2)]
    assert not torch.equal(*draws)
    torch.manual_seed(4)
    first = logits(dropping, IDS)
    torch.manual_seed(4)
    assert torch.equal(logits(dropping, IDS), first)


def test_dropout_is_on_the_input_of_the_update():
    model = adapted("q", dropout=0.4).train()
    layer, x = model.model.layers[0].self_attn.q_proj, torch.randn(3, 32)
    torch.manual_seed(4)
    actual = layer(x)
    torch.manual_seed(4)
    close(actual, F.linear(x, layer.weight) + F.linear(F.linear(F.dropout(x, 0.4), layer.lora_A), layer.lora_B), 1e-6)


# ---- refusals ----


def test_what_injection_refuses():
    with pytest.raises(ValueError, match="rank is 0"):
        inject_lora(tiny_model(), rank=0)
    for dropout in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"dropout is {dropout}"):
            inject_lora(tiny_model(), dropout=dropout)
    model = adapted("q")
    with pytest.raises(ValueError, match="carries LoRA layers already"):
        inject_lora(model, "v")
    with pytest.raises(ValueError, match="no layer of the model is of kind embed, head"):
        inject_lora(tiny_model().model.layers, "q,embed,head")


def test_a_refused_rank_leaves_the_model_as_it_was():
    model = tiny_model()
    for rank in (0, -3):
        with pytest.raises(ValueError, match="rank"):
            adapt(model, {"lm_head": (2, 2.0), "model.layers.0.self_attn.q_proj": (rank, 1.0)})
        assert not lora_layers(model)
        assert len(trainable_parameters(model)) == len(list(model.parameters()))


def test_a_rank_above_the_dimension_warns_with_the_layers():
    with pytest.warns(
        UserWarning, match="rank exceeds.*layers.0.self_attn.k_proj, .*layers.1.self_attn.k_proj"
    ) as seen:
        inject_lora(tiny_model(), "q,k", 17)  # k has 16 outputs, q 32
    assert len(seen) == 1 and "q_proj" not in str(seen[0].message)
    with pytest.warns(UserWarning, match="and 12 more"):
        inject_lora(tiny_model(), "all", 33)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject_lora(tiny_model(), "q,k", 16)


# ---- Table 7 ----

SETS = ("q", "q,k", "q,k,v", "q,k,v,o", "all")
RANKS = (2, 4, 8, 64, 128)


@pytest.fixture(scope="module")
def seven_billion():
    """Trainable parameters of Llama-2-7B by (targets, rank), counted on injected models."""
    counts = {}
    for targets in SETS:
        for rank in RANKS:
            with torch.device("meta"):
                model = Llama(LlamaConfig.named("llama-2-7b"))
            inject_lora(model, targets, rank)
            count = counts[targets, rank] = count_parameters(model)
            assert count["base"] == 6_738_415_616
    return {key: count["trainable"] for key, count in counts.items()}


def test_counts_are_rank_times_inputs_and_outputs(seven_billion):
    hidden, wide, vocabulary, layers = 4096, 11008, 32000, 32
    edges = dict.fromkeys("qkvo", 2 * hidden * layers) | dict.fromkeys(("up", "down", "gate"), (hidden + wide) * layers)
    edges |= dict.fromkeys(("embed", "head"), hidden + vocabulary)
    for (targets, rank), count in seven_billion.items():
        assert count == rank * sum(edges[kind] for kind in parse_targets(targets)), (targets, rank)


def test_counts_are_those_of_table_7(seven_billion):
    if not TABLES.exists():
        pytest.skip(f"{TABLES} is not there")
    table = json.loads(TABLES.read_text())["table7_trainable_parameters"]
    exact = {(targets, rank): count for targets, row in table["printed"].items()
             for rank, count in zip(table["ranks"], row, strict=True)}  # fmt: skip
    for misprint in table["misprints"]:
        key = misprint["targets"], misprint["rank"]
        assert exact[key] == misprint["printed"] != misprint["exact"]
        exact[key] = misprint["exact"]
    assert seven_billion == exact


def test_a_tied_matrix_counts_once():
    tied, untied = (count_parameters(adapted(shape={"tie_word_embeddings": tied})) for tied in (True, False))
    assert untied["base"] - tied["base"] == 97 * 32
    assert untied["trainable"] == tied["trainable"]
