"""DoRA against peft and against its definition; its adapters exchanged with peft, both ways."""

import json
import warnings
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
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from llamalora.lora.adapter import load_adapter, save_adapter
from llamalora.lora.dora import Stretch, row_norms
from llamalora.lora.inject import count_parameters, inject_lora, lora_layers, merge, restore, trainable_parameters
from llamalora.lora.kinds import KINDS, parse_targets
from llamalora.lora.layers import LoRAEmbedding
from llamalora.lora.peft_format import read_adapter
from llamalora.model.tensors import CheckpointError

IDS = random_ids(2, 24)
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def adapted(targets="all", tied=False, dtype=torch.float32, filled=True, **options):
    model = tiny_model(tie_word_embeddings=tied).to(dtype)
    inject_lora(model, targets, 4, alpha=6.0, dora=True, **options)
    if filled:
        randomise_lora(model)
    return model


def peft_twin(targets="all", tied=False, **options):
    base = transformers_twin(tiny_model(tie_word_embeddings=tied))
    return peft_model(base, [KINDS[kind] for kind in parse_targets(targets)], 4, 6.0, use_dora=True, **options)


# ---- its parts ----


@pytest.mark.parametrize("spread", [0.001, 0.1, 10])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-3), (torch.float16, 3e-4)])
def test_norms_without_the_matrix_are_those_of_the_matrix(spread, dtype, tolerance):
    """From an update that is next to nothing to one that is larger than W0."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 60, generator=generator).to(dtype)
    A, B = (spread**0.5 * torch.randn(shape, generator=generator) for shape in ((8, 60), (40, 8)))
    expected = (weight.double() + 0.7 * B.double() @ A.double()).norm(dim=1).float()
    for given in (weight, weight.T.contiguous().T):  # the embedding's rows are columns in memory
        torch.testing.assert_close(row_norms(given, A, B, 0.7), expected, rtol=tolerance, atol=0)


def test_stretching_has_the_gradients_of_a_product():
    y, c = torch.randn(2, 5, 7), torch.rand(7) + 0.5
    c[3] = 0
    y[..., 3] = 0  # a row of zeros
    weights = torch.randn(2, 5, 7)
    both = []
    for function in (torch.mul, Stretch.apply):
        y_, c_ = y.clone().requires_grad_(), c.clone().requires_grad_()
        out = function(y_, c_)
        both.append((out, *torch.autograd.grad(out, (y_, c_), weights)))
    for expected, actual in zip(*both, strict=True):
        close(actual, expected, 1e-6)


def test_stretching_rounds_once():
    """A magnitude that has moved by less than half a step of bf16, 1/256, is felt."""
    y, c = torch.linspace(2, 4, 1000)[None], torch.full((1000,), 1.003)
    stretched = Stretch.apply(y.bfloat16(), c)
    assert stretched.dtype == torch.bfloat16
    assert torch.equal(stretched, (y.bfloat16().float() * c).bfloat16())
    assert not torch.equal(stretched, y.bfloat16())


def test_a_row_of_zeros_stays_zero():
    """An output that the base model never uses; peft's becomes NaN."""
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[5] = 0
    inject_lora(model, "up", 4, dora=True)
    model(IDS).logsumexp(-1).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in trainable_parameters(model).values())
    merge(model)
    assert not model.model.layers[0].mlp.up_proj.weight[5].any() and torch.isfinite(logits(model, IDS)).all()


# ---- the model ----


@TIED
def test_a_fresh_update_is_the_identity(tied):
    close(logits(adapted(tied=tied, filled=False), IDS), logits(tiny_model(tie_word_embeddings=tied), IDS), 1e-5)


@TIED
@pytest.mark.parametrize("targets", [*NINE, "all"])
def test_logits_and_gradients_are_those_of_peft(targets, tied):
    model, theirs = adapted(targets, tied), peft_twin(targets, tied)
    for name, parts in peft_pairs(theirs).items():  # ||W0||, before anything is copied
        close(parts[2], lora_layers(adapted(targets, tied, filled=False))[name].lora_magnitude, 1e-6)
    copy_to_peft(model, theirs)
    close(logits(model, IDS), logits(theirs, IDS))
    assert (logits(model, IDS) - logits(tiny_model(tie_word_embeddings=tied), IDS)).abs().max() > 0.05

    F.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    theirs(IDS, labels=IDS).loss.backward()
    for name, parts in peft_pairs(theirs).items():
        for ours, part in zip(lora_layers(model)[name].parts, parts, strict=True):
            assert part.grad.any()
            close(ours.grad, part.grad)


@pytest.mark.parametrize("kind", ["q", "down", "head"])
def test_dropout_is_that_of_peft(kind):
    """Layer by layer, since the draws must be the same: it also reaches what stretching adds to W0 x."""
    model, theirs = adapted(kind, dropout=0.4).train(), peft_twin(kind, lora_dropout=0.4)
    copy_to_peft(model, theirs)
    theirs.train()
    for name, layer in lora_layers(model).items():
        x, outputs = torch.randn(3, layer.in_features), []
        twin = theirs.base_model.model.get_submodule(name)
        for one in (layer, twin):
            torch.manual_seed(4)
            outputs.append(one(x))
            outputs[-1].square().sum().backward()
        close(*outputs)
        for ours, part in zip(layer.parts, peft_pairs(theirs)[name], strict=True):
            close(ours.grad, part.grad, 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_fp32(dtype):
    exact, model = adapted(), adapted(dtype=dtype)
    for layer, wide in zip(lora_layers(model).values(), lora_layers(exact).values(), strict=True):
        layer.lora_magnitude.data.copy_(wide.lora_magnitude)  # that of W0 before it was rounded
    for context in (torch.autocast("cpu", dtype), torch.autocast("cpu", enabled=False)):
        with context:
            out = model(IDS)
        assert out.dtype == dtype
        assert (out.float() - logits(exact, IDS)).norm() / logits(exact, IDS).norm() < 0.05
    out.float().logsumexp(-1).sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in trainable_parameters(model).values())


def test_counts():
    """A magnitude for each output; the base is what it was."""
    plain, dora = tiny_model(), adapted()
    inject_lora(plain, "all", 4)
    outputs = 2 * (32 + 16 + 16 + 32 + 56 + 56 + 32) + 32 + 97  # q k v o gate up down, embed, head
    assert count_parameters(dora)["trainable"] == count_parameters(plain)["trainable"] + outputs
    assert count_parameters(dora)["base"] == count_parameters(plain)["base"]


# ---- merging ----


@TIED
@pytest.mark.parametrize("targets", [*NINE, "all"])
def test_merged_is_unmerged_and_what_peft_merges(targets, tied):
    model, theirs = adapted(targets, tied), peft_twin(targets)
    before = logits(model, IDS)
    if not tied:  # peft merges both of two tied updates into one matrix
        copy_to_peft(model, theirs)
    merge(model)
    close(logits(model, IDS), before)
    if not tied:
        merged = theirs.merge_and_unload()
        for name, layer in lora_layers(model).items():
            close(layer.weight, merged.get_submodule(name).weight, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_rounds_once_and_restoring_is_bitwise(dtype):
    model, base = adapted(dtype=dtype), tiny_model().to(dtype).state_dict()
    before, output = {n: t.clone() for n, t in model.state_dict().items()}, logits(model, IDS)
    merge(model)
    for name, layer in lora_layers(model).items():
        along = 0 if isinstance(layer, LoRAEmbedding) else 1
        updated = base[f"{name}.weight"].double() + layer.delta().double()
        exact = updated / updated.norm(dim=along, keepdim=True)
        exact *= layer.lora_magnitude.double().unsqueeze(along)
        half_step = (0.5 * torch.finfo(dtype).eps * exact.abs()).clamp_min(2.0**-25)  # of fp16's subnormal values
        assert ((layer.weight.double() - exact).abs() <= half_step + 1e-6 * exact.abs()).all(), name
    restore(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model, IDS), output)


# ---- adapter folders ----


@TIED
@pytest.mark.parametrize("targets", [*NINE, "all"])
def test_peft_loads_what_we_save(targets, tied, tmp_path):
    import peft

    model = adapted(targets, tied)
    save_adapter(model, tmp_path)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        base = transformers_twin(tiny_model(tie_word_embeddings=tied))
        theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert not [str(w.message) for w in seen if "missing" in str(w.message) or "unexpected" in str(w.message).lower()]
    assert all(len(parts) == 3 for parts in peft_pairs(theirs).values())
    close(logits(theirs, IDS), logits(model, IDS))


@TIED
@pytest.mark.parametrize("targets", [*NINE, "all"])
def test_we_load_what_peft_saves(targets, tied, tmp_path):
    theirs = peft_twin(targets, tied, use_rslora=True)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for A, B, magnitude in peft_pairs(theirs).values():
            A.normal_(0, 0.2, generator=generator)
            B.normal_(0, 0.3, generator=generator)
            magnitude.mul_(torch.empty_like(magnitude).uniform_(0.5, 1.5, generator=generator))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path)
    model = tiny_model(tie_word_embeddings=tied)
    load_adapter(model, tmp_path)
    close(logits(model, IDS), logits(theirs, IDS))
    merge(model)
    close(logits(model, IDS), logits(theirs, IDS))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A saved adapter on q and embed."""
    save_adapter(adapted("q,embed"), tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder: Path, change) -> None:
    """Rewrites the tensors of an adapter."""
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def refused(folder: Path, match: str, model=True) -> None:
    with pytest.raises(CheckpointError, match=match):
        read_adapter(folder, tiny_model() if model else None)


def test_saved_and_loaded_is_bitwise_the_same(folder):
    assert json.loads((folder / "adapter_config.json").read_text())["use_dora"] is True
    again, model = tiny_model(), adapted("q,embed")
    load_adapter(again, folder)
    assert trainable_parameters(again).keys() == trainable_parameters(model).keys()
    assert all(torch.equal(p, trainable_parameters(again)[n]) for n, p in trainable_parameters(model).items())


@pytest.mark.parametrize("with_model", [True, False])
@pytest.mark.parametrize("key", [f"{Q0}.lora_magnitude_vector",
                                 "base_model.model.model.embed_tokens.lora_magnitude_vector"])  # fmt: skip
def test_a_missing_or_misshapen_magnitude_is_named(key, with_model, folder):
    edit(folder, lambda tensors: tensors.update({key: torch.ones(33)}))
    refused(folder, rf"{key} has shape \(33,\), .* needs \(32,\)", with_model)
    edit(folder, lambda tensors: tensors.update({key: torch.ones(32, 1)}))
    refused(folder, rf"{key} has shape \(32, 1\)", with_model)
    edit(folder, lambda tensors: tensors.pop(key))
    refused(folder, f"lacks {key}", with_model)


def test_a_magnitude_that_the_configuration_does_not_mention(folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": False}))
    refused(folder, "lora_magnitude_vector fits no layer.*does adapter_config.json lack use_dora")


def test_a_magnitude_that_is_not_finite(folder):
    edit(folder, lambda tensors: tensors[f"{Q0}.lora_magnitude_vector"].fill_(torch.nan))
    with pytest.raises(CheckpointError, match="q_proj.lora_magnitude_vector holds NaN"):
        load_adapter(tiny_model(), folder)
