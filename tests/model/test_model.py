"""The network against transformers' LlamaForCausalLM, and its shortcuts against the long way."""

import copy
import json
import warnings

import pytest
import torch
from helpers import close, logits, random_ids, tiny_config, tiny_model, transformers_config, transformers_twin
from torch.nn import functional as F

from llamalora.lora.inject import inject_lora
from llamalora.model.checkpoint import load_model
from llamalora.model.config import ConfigError, LlamaConfig, RopeScaling
from llamalora.model.llama import Llama, rope
from llamalora.model.packing import Packing

LINEAR = RopeScaling("linear", factor=4.0)
# short waves are kept, long ones stretched, one is blended: the original context of 32 is inside the test's
LLAMA3 = RopeScaling("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
SHAPES = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 24},
    "narrow heads": {"head_dim": 4, "num_key_value_heads": 4},
    "theta": {"rope_theta": 500.0},
    "linear": {"rope_scaling": LINEAR, "head_dim": 16},
    "llama3": {"rope_scaling": LLAMA3, "head_dim": 16},
    "epsilon": {"rms_norm_eps": 0.1},
}
NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


# ---- logits ----


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_are_those_of_transformers(shape):
    model = tiny_model(**shape)
    ids = random_ids(2, 70)
    close(logits(model, ids), logits(transformers_twin(model), ids))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_are_those_of_transformers(shape):
    """Of every parameter: parts of the backward pass are written by hand."""
    model = tiny_model(**shape)
    twin, ids = transformers_twin(model), random_ids(2, 40)
    F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    twin(ids, labels=ids).loss.backward()
    theirs = dict(twin.named_parameters())
    assert theirs.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert (parameter.grad - theirs[name].grad).norm() < 1e-4 * theirs[name].grad.norm(), name


@pytest.mark.parametrize("change", [{"rope_scaling": LINEAR}, {"rope_scaling": LLAMA3}, {"rope_theta": 500.0},
                                    {"rms_norm_eps": 0.1}])  # fmt: skip
def test_each_of_these_fields_matters(change):
    """Otherwise the comparison above would prove nothing about them."""
    plain, changed = tiny_model(), tiny_model(**change)
    assert (logits(plain, random_ids(1, 70)) - logits(changed, random_ids(1, 70))).abs().max() > 0.1


def test_llama3_scaling_has_all_three_regimes():
    """Some frequencies kept, some divided by the factor, some between: else the blend would be untested."""

    def frequencies(config):  # the angles of position 1, all below one turn
        cos, sin = rope(config, torch.ones(1, 1))
        return torch.atan2(sin, cos).flatten()[:8]

    plain = frequencies(tiny_config(head_dim=16))
    ratio = plain / frequencies(tiny_config(rope_scaling=LLAMA3, head_dim=16))
    kinds = {"kept" if r < 1.001 else "stretched" if r > 7.99 else "blended" for r in ratio.tolist()}
    assert kinds == {"kept", "stretched", "blended"}


def test_smollm2_logits_are_those_of_transformers(smollm2):
    from transformers import AutoModelForCausalLM

    ids = random_ids(2, 24, vocabulary=49152)
    theirs = logits(AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32), ids)
    close(logits(load_model(smollm2, torch.float32), ids), theirs)


def test_half_precision_is_near_fp32():
    ids = random_ids(2, 40)
    exact = logits(tiny_model(), ids)
    for dtype, tolerance in ((torch.bfloat16, 0.05), (torch.float16, 0.01)):
        rounded = logits(tiny_model().to(dtype), ids)
        assert rounded.dtype == dtype
        assert (rounded.float() - exact).norm() / exact.norm() < tolerance


# ---- configuration ----


@pytest.mark.parametrize("name, count", [("llama-2-7b", 6738415616), ("llama-2-13b", 13015864320),
                                         ("llama-2-70b", 68976648192)])  # fmt: skip
def test_named_sizes_have_their_published_parameter_counts(name, count):
    with torch.device("meta"):
        model = Llama(LlamaConfig.named(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_unknown_name_lists_the_known():
    with pytest.raises(ConfigError, match="'llama-3'.*llama-2-7b, llama-2-13b, llama-2-70b"):
        LlamaConfig.named("llama-3")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_reads_what_transformers_writes(shape):
    config = tiny_config(**shape)
    written = json.loads(transformers_config(config).to_json_string(use_diff=False))
    assert "rope_parameters" in written and "rope_theta" not in written
    assert LlamaConfig.from_dict(written) == config


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_reads_its_own_form_which_is_the_older_one(shape):
    config = tiny_config(**shape)
    written = json.loads(json.dumps(config.to_dict()))
    assert "rope_theta" in written and "rope_parameters" not in written
    assert LlamaConfig.from_dict(written) == config


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_transformers_reads_what_we_write(shape):
    from transformers import LlamaConfig as Theirs

    config = tiny_config(**shape)
    read, wanted = Theirs(**config.to_dict()).to_dict(), transformers_config(config).to_dict()
    for name in ("rope_parameters", *config.to_dict().keys() & wanted.keys()):
        assert read[name] == wanted[name] or name in ("rope_parameters", "architectures"), name
    ours = {name: read["rope_parameters"].get(name) for name in wanted["rope_parameters"]}
    assert ours == wanted["rope_parameters"]


def test_oldest_key_of_the_scaling_and_defaults():
    minimal = {name: getattr(tiny_config(), name) for name in NEEDED}
    config = LlamaConfig.from_dict(minimal | {"rope_scaling": {"type": "linear", "factor": 4.0}})
    assert config.rope_scaling == LINEAR
    assert (config.num_key_value_heads, config.head_dim) == (4, 8)
    assert LlamaConfig.from_dict(minimal | {"eos_token_id": [2, 3]}).eos_token_id == (2, 3)


@pytest.mark.parametrize("field, value", [
    ("attention_bias", True),
    ("mlp_bias", True),
    ("hidden_act", "gelu"),
    ("architectures", ["MistralForCausalLM"]),
    ("model_type", "qwen2"),
    ("quantization_config", {"quant_method": "bitsandbytes"}),
    ("partial_rotary_factor", 0.5),
    ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
    ("rope_scaling", {"type": "dynamic", "factor": 2.0}),
    ("num_key_value_heads", 3),
])  # fmt: skip
def test_what_it_cannot_represent_is_refused_by_name(field, value):
    config = tiny_config().to_dict()
    LlamaConfig.from_dict(config)
    with pytest.raises(ConfigError, match=field):
        LlamaConfig.from_dict(config | {field: value})


@pytest.mark.parametrize("field, value", [
    ("hidden_size", None),
    ("vocab_size", "many"),
    ("rms_norm_eps", "small"),
    ("rope_scaling", {"rope_type": "linear"}),
])  # fmt: skip
def test_malformed_values_are_refused(field, value):
    with pytest.raises(ConfigError):
        LlamaConfig.from_dict(tiny_config().to_dict() | {field: value})


def test_yarn_is_refused_in_the_new_form_too():
    written = transformers_config(tiny_config()).to_dict()
    written["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    with pytest.raises(ConfigError, match="yarn"):
        LlamaConfig.from_dict(written)


# ---- theta and scaling, wherever they stand ----

LOW_HIGH = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
L3 = {"rope_type": "llama3", "factor": 8.0, **LOW_HIGH}
ROPES = {
    "nothing": {},
    "theta at the top": {"rope_theta": 5e5},
    "together": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "theta in rope_scaling": {"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}},
    "theta in rope_scaling, llama3": {"rope_scaling": L3 | {"rope_theta": 5e5}},
    "theta in rope_scaling, linear": {"rope_scaling": {"type": "linear", "factor": 4, "rope_theta": 5e5}},
    "two thetas": {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "two thetas, llama3": {"rope_theta": 1e4, "rope_scaling": L3 | {"rope_theta": 5e5}},
    "both objects": {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": L3 | {"rope_theta": 5e5}},
    "null beside rope_parameters": {"rope_scaling": None, "rope_parameters": L3 | {"rope_theta": 5e5}},
    "empty beside rope_parameters": {"rope_scaling": {}, "rope_parameters": L3 | {"rope_theta": 5e5}},
    "original context from max_position_embeddings": {"rope_scaling": L3},
    "original context at the top": {"original_max_position_embeddings": 16, "rope_scaling": L3},
    "two original contexts": {
        "original_max_position_embeddings": 16,
        "rope_parameters": L3 | {"original_max_position_embeddings": 64},
    },
    "type and rope_type": {"rope_scaling": {"type": "default", "rope_type": "linear", "factor": 4.0}},
    "numbers that the type does not use": {"rope_scaling": {"type": "linear", "factor": 2.0, **LOW_HIGH}},
}


@pytest.mark.parametrize("form", ROPES.values(), ids=ROPES)
def test_rope_is_transformers_rope(form):
    from transformers import LlamaConfig as Theirs
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    shape = {name: value for name, value in vars(tiny_config()).items() if not name.startswith("rope")}
    theirs = LlamaRotaryEmbedding(Theirs.from_dict(copy.deepcopy(shape | form))).inv_freq
    config = LlamaConfig.from_dict(shape | form)
    positions = torch.arange(48)
    cos, sin = (part[0, :, 0, 4:] for part in rope(config, positions[None]))
    angles = positions[:, None] * theirs
    close(cos, angles.cos(), 1e-5)
    close(sin, angles.sin(), 1e-5)
    assert LlamaConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("form, match", [
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}}, "low_freq_factor is missing"),
    ({"rope_scaling": {"rope_type": "llama3", **LOW_HIGH}}, "factor is missing"),
    ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
    ({"rope_scaling": L3 | {"low_freq_factor": 4.0}}, "low_freq_factor must be below"),
    ({"rope_scaling": L3 | {"factor": "8"}}, "factor is '8', not a number"),
    ({"rope_scaling": L3 | {"factor": 0}}, "must be above 0"),
    ({"rope_scaling": L3 | {"original_max_position_embeddings": None}}, "original_max_position_embeddings is None"),
    ({"rope_scaling": "linear"}, "rope_scaling is 'linear', not an object"),
    ({"rope_theta": None}, "rope_theta is None"),
    ({"rope_theta": "10000"}, "rope_theta is '10000'"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5e5}}}, "one rope for all layers"),
    ({"rope_scaling": L3 | {"partial_rotary_factor": 0.5}}, "all dimensions"),
    *(({name: {"rope_type": kind, "factor": 4.0}}, f"type is '{kind}'") for name in ("rope_scaling", "rope_parameters")
      for kind in ("yarn", "dynamic", "longrope", "proportional", "mrope")),
])  # fmt: skip
def test_rope_that_is_incomplete_or_of_another_kind_is_refused(form, match):
    shape = {name: value for name, value in vars(tiny_config()).items() if not name.startswith("rope")}
    with pytest.raises(ConfigError, match=match):
        LlamaConfig.from_dict(shape | form)


@pytest.mark.parametrize("field, value", [
    ("vocab_size", "97"), ("vocab_size", 97.5), ("num_hidden_layers", True), ("rms_norm_eps", "1e-5"),
    ("rms_norm_eps", None), ("max_position_embeddings", None), ("tie_word_embeddings", "false"), ("head_dim", 8.0),
])  # fmt: skip
def test_numbers_and_truth_values_of_another_type_are_named(field, value):
    with pytest.raises(ConfigError, match=f"{field} is {value!r}, not"):
        LlamaConfig.from_dict(tiny_config().to_dict() | {field: value})


def test_a_head_size_that_does_not_come_out_whole_is_refused():
    config = tiny_config().to_dict() | {"num_attention_heads": 5, "num_key_value_heads": None, "head_dim": None}
    with pytest.raises(ConfigError, match="hidden_size 32 is no multiple of num_attention_heads 5"):
        LlamaConfig.from_dict(config)


@pytest.mark.parametrize("field", NEEDED)
def test_a_missing_field_is_named(field):
    config = tiny_config().to_dict()
    del config[field]
    with pytest.raises(ConfigError, match=f"{field} is missing"):
        LlamaConfig.from_dict(config)


# ---- packing ----

LENGTHS = [7, 1, 23, 12, 11, 12, 10]


def rows_of(lengths):
    return [random_ids(1, length, seed=index) for index, length in enumerate(lengths)]


@pytest.mark.parametrize("lengths", [LENGTHS, [9], [6, 6, 6]], ids=["ragged", "one", "equal"])
@pytest.mark.parametrize("shape", [{}, {"num_key_value_heads": 4}], ids=["gqa", "mha"])
def test_packed_is_one_by_one(lengths, shape):
    model, rows = tiny_model(**shape), rows_of(lengths)
    with torch.no_grad():
        packed = model(torch.cat(rows, dim=1), Packing(lengths, torch.device("cpu")))
    close(packed, torch.cat([logits(model, row) for row in rows], dim=1), 1e-5)


def test_packed_gradients_are_those_of_one_by_one():
    packed, single = tiny_model(), tiny_model()
    rows = rows_of(LENGTHS)
    packed(torch.cat(rows, dim=1), Packing(LENGTHS, torch.device("cpu"))).logsumexp(-1).sum().backward()
    for row in rows:
        single(row).logsumexp(-1).sum().backward()
    for (name, ours), theirs in zip(packed.named_parameters(), single.parameters(), strict=True):
        assert torch.isfinite(ours.grad).all(), name
        close(ours.grad, theirs.grad, 2e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["plain", "dropout"])
def test_activation_checkpointing_changes_no_gradient(dropout):
    def gradients(recompute):
        model = tiny_model()
        if dropout:  # what is recomputed must draw the same dropout again
            inject_lora(model, "all", 4, dropout=dropout)
        else:
            model.requires_grad_(True)
        model.train()
        torch.manual_seed(5)
        packing = Packing(LENGTHS, torch.device("cpu"))
        hidden = model.model(torch.cat(rows_of(LENGTHS), dim=1), packing, recompute=recompute)
        model.lm_head(hidden).logsumexp(-1).sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    whole, recomputed = gradients(False), gradients(True)
    assert whole.keys() == recomputed.keys() and whole
    for name, gradient in whole.items():
        assert torch.equal(gradient, recomputed[name]), name


# ---- cache ----


@pytest.mark.parametrize("shape", [{}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}],
                         ids=["gqa", "mha", "mqa"])  # fmt: skip
@pytest.mark.parametrize("paces", [(1, 1, 1), (3, 3, 3), (1, 7, 2)], ids=str)
def test_cached_is_uncached(shape, paces):
    """Three ragged sequences go on side by side; whatever stood in the cache before is not seen."""
    model, cpu = tiny_model(**shape), torch.device("cpu")
    first, total = [5, 1, 11], 17
    rows = random_ids(3, total)
    expected = logits(model, rows)
    cache = model.make_cache(3, total)
    for keys, values in zip(cache.keys, cache.values, strict=True):
        keys.fill_(3.0)
        values.fill_(-3.0)
    with torch.no_grad():
        got = model(torch.cat([row[:n] for row, n in zip(rows, first, strict=True)])[None], Packing(first, cpu), cache)
        for row, part in enumerate(got[0].split(first)):
            close(part, expected[row, : first[row]], 1e-5)
        at = list(first)
        while any(place < total for place in at):
            lengths = [min(pace, total - place) for pace, place in zip(paces, at, strict=True)]  # 0: it is through
            parts = [row[place : place + n] for row, place, n in zip(rows, at, lengths, strict=True)]
            got = model(torch.cat(parts)[None], Packing(lengths, cpu, starts=at), cache)
            for row, part in enumerate(got[0].split(lengths)):
                close(part, expected[row, at[row] : at[row] + lengths[row]], 1e-5)
            at = [place + n for place, n in zip(at, lengths, strict=True)]


def test_sequences_enter_any_row_and_rejected_drafts_leave_no_trace():
    model, cpu = tiny_model(), torch.device("cpu")
    rows = random_ids(2, 12)
    expected = logits(model, rows)
    cache = model.make_cache(3, 20)
    with torch.no_grad():
        model(rows[:1, :4], Packing([4], cpu, rows=[2]), cache)
        model(rows[1:, :6], Packing([6], cpu, rows=[0]), cache)
        draft = random_ids(1, 10, seed=9)  # wrong tokens behind both ends
        model(draft, Packing([5, 0, 5], cpu, starts=[6, 0, 4]), cache)
        got = model(torch.cat([rows[1, 6:], rows[0, 4:]])[None], Packing([6, 0, 8], cpu, starts=[6, 0, 4]), cache)
    close(got[0], torch.cat([expected[1, 6:], expected[0, 4:]]), 1e-5)


def test_a_model_used_in_inference_mode_can_still_be_trained():
    model = tiny_model(rope_theta=777.0)  # a theta that no other test has put in the table of frequencies
    with torch.inference_mode():
        model(random_ids(1, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(random_ids(1, 5)).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
