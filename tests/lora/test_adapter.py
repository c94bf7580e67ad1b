"""Adapter folders exchanged with peft, both ways, proven by logits; and what must be refused."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from helpers import (
    NINE,
    close,
    logits,
    peft_model,
    peft_pairs,
    random_ids,
    randomise_lora,
    tiny_model,
    transformers_twin,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llamalora.lora.adapter import load_adapter, save_adapter
from llamalora.lora.inject import adapt, inject_lora, lora_layers, merge, trainable_parameters
from llamalora.lora.kinds import KINDS, kind_of, parse_targets
from llamalora.lora.peft_config import read_peft_config
from llamalora.model.tensors import CheckpointError

IDS = random_ids(2, 24)
WEIGHTS = "adapter_model.safetensors"
Q0 = "model.layers.0.self_attn.q_proj"


def adapted(targets="all", rank=4, tied=False, **options):
    model = tiny_model(tie_word_embeddings=tied)
    inject_lora(model, targets, rank, **options)
    randomise_lora(model)
    return model


@pytest.fixture
def folder(tmp_path) -> Path:
    """A saved adapter on q and embed."""
    save_adapter(adapted("q,embed"), tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, add: dict | None = None, remove: tuple[str, ...] = ()) -> None:
    tensors = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if name not in remove}
    save_file(tensors | (add or {}), folder / WEIGHTS)


def refused(folder: Path, match: str) -> None:
    """The adapter is refused for this reason, and the model is left as it was."""
    model = tiny_model()
    before = logits(model, IDS)
    with pytest.raises(CheckpointError, match=match):
        load_adapter(model, folder)
    assert torch.equal(logits(model, IDS), before)


def into_peft(folder: Path, tied: bool = False):
    import peft

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(transformers_twin(tiny_model(tie_word_embeddings=tied)), folder).eval()
    assert not [str(w.message) for w in seen if "missing" in str(w.message) or "unexpected" in str(w.message).lower()]
    return theirs


# ---- ours to peft ----


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("targets", [*NINE, "all"])
def test_peft_loads_what_we_save(targets, tied, tmp_path):
    model = adapted(targets, tied=tied, alpha=6.0)
    save_adapter(model, tmp_path)
    theirs = into_peft(tmp_path, tied)
    assert peft_pairs(theirs).keys() == lora_layers(model).keys()
    close(logits(theirs, IDS), logits(model, IDS))
    assert (logits(model, IDS) - logits(tiny_model(tie_word_embeddings=tied), IDS)).abs().max() > 0.05


def test_peft_loads_rslora_and_layers_of_several_ranks(tmp_path):
    model = tiny_model()
    ranks = {f"model.layers.{n}.self_attn.{kind}_proj": (2 + n, 3.0) for n in (0, 1) for kind in "qv"}
    adapt(model, ranks | {"model.layers.1.mlp.up_proj": (4, 12.0), "lm_head": (2, 12.0)}, rslora=True)
    randomise_lora(model)
    save_adapter(model, tmp_path)
    theirs = into_peft(tmp_path)
    assert peft_pairs(theirs).keys() == lora_layers(model).keys()
    close(logits(theirs, IDS), logits(model, IDS))
    again = tiny_model()
    load_adapter(again, tmp_path)
    close(logits(again, IDS), logits(model, IDS), 0)


# ---- peft to ours ----


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("targets", [*NINE, "all"])
def test_we_load_what_peft_saves(targets, tied, tmp_path):
    """As peft saves by default: with a copy of the base's matrix beside updates of embedding and head."""
    modules = [KINDS[kind] for kind in parse_targets(targets)]
    theirs = saved_by_peft(tmp_path, modules, tied=tied)
    model = tiny_model(tie_word_embeddings=tied)
    load_adapter(model, tmp_path)
    assert lora_layers(model).keys() == peft_pairs(theirs).keys()
    close(logits(model, IDS), logits(theirs, IDS))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_we_load_what_peft_saves_without_the_base_matrices(tied, tmp_path):
    modules = [KINDS[kind] for kind in NINE]
    theirs = saved_by_peft(tmp_path, modules, tied=tied, save_embedding_layers=False)
    model = tiny_model(tie_word_embeddings=tied)
    load_adapter(model, tmp_path)
    close(logits(model, IDS), logits(theirs, IDS))


def saved_by_peft(folder: Path, modules: list[str], tied: bool = False, save_embedding_layers="auto", **options):
    theirs = peft_model(transformers_twin(tiny_model(tie_word_embeddings=tied)), modules, 4, 6.0, **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for A, B in peft_pairs(theirs).values():
            A.normal_(0, 0.2, generator=generator)
            B.normal_(0, 0.3, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    return theirs


def test_patterns_and_rslora_of_peft(tmp_path):
    theirs = saved_by_peft(
        tmp_path,
        ["q_proj", "v_proj", "down_proj"],
        use_rslora=True,
        rank_pattern={"layers.1.self_attn.q_proj": 2, "down_proj": 3},
        alpha_pattern={"v_proj": 11.0, "model.layers.0.mlp.down_proj": 1.0},
    )
    model = tiny_model()
    load_adapter(model, tmp_path)
    close(logits(model, IDS), logits(theirs, IDS))
    assert len({(layer.rank, layer.alpha) for layer in lora_layers(model).values()}) == 5


def test_some_layers_only(tmp_path):
    theirs = saved_by_peft(tmp_path, ["q_proj", "gate_proj"], layers_to_transform=[1], layers_pattern="layers")
    model = tiny_model()
    load_adapter(model, tmp_path)
    assert sorted(lora_layers(model)) == ["model.layers.1.mlp.gate_proj", "model.layers.1.self_attn.q_proj"]
    close(logits(model, IDS), logits(theirs, IDS))


def test_a_regular_expression_as_targets(tmp_path):
    theirs = saved_by_peft(tmp_path, [f"layers.1.self_attn.{kind}_proj" for kind in "qo"])
    edit_config(tmp_path, target_modules=r".*layers\.1\.self_attn\.(q|o)_proj")
    model = tiny_model()
    load_adapter(model, tmp_path)
    close(logits(model, IDS), logits(theirs, IDS))


# ---- frozen weights that peft stores beside the updates ----

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def some_rows(name, weight):
    weight[[3, 7]] = weight[10:30].mean(0)  # as when reserved rows become new tokens


def one_row(name, weight):
    weight[7] *= 1.2


def the_head(name, weight):
    if name == HEAD:
        weight += 0.05


def saved_with_its_base(folder: Path, modules: list[str], tied: bool, change, **options):
    """peft's model whose embedding and head were changed before or while the updates were trained."""
    base = transformers_twin(tiny_model(tie_word_embeddings=tied))
    with torch.no_grad():
        for name in (EMBED,) if tied else (EMBED, HEAD):
            change(name, base.get_parameter(name))
    theirs = peft_model(base, modules, 4, 6.0, **options)
    with torch.no_grad():
        for A, B in peft_pairs(theirs).values():
            A.normal_(0, 0.2, generator=torch.Generator().manual_seed(2))
            B.normal_(0, 0.3, generator=torch.Generator().manual_seed(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(folder, save_embedding_layers=True)
    return theirs


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("modules", [["q_proj"], ["q_proj", "embed_tokens", "lm_head"]], ids=["q", "q,embed,head"])
@pytest.mark.parametrize("change", [some_rows, one_row, the_head])
def test_frozen_weights_of_the_adapter_are_used_as_peft_uses_them(change, modules, tied, tmp_path):
    theirs = saved_with_its_base(tmp_path, modules, tied, one_row if tied and change is the_head else change)
    close(logits(into_peft(tmp_path, tied), IDS), logits(theirs, IDS))
    model = tiny_model(tie_word_embeddings=tied)
    with pytest.warns(UserWarning, match="adapter_model.safetensors: brings along its own"):
        load_adapter(model, tmp_path)
    close(logits(model, IDS), logits(theirs, IDS))
    assert model.tied == tied
    save_adapter(model, tmp_path / "again")
    close(logits(into_peft(tmp_path / "again", tied), IDS), logits(theirs, IDS))
    merge(model)
    save_adapter(model, tmp_path / "merged")
    assert (tmp_path / "merged" / WEIGHTS).read_bytes() == (tmp_path / "again" / WEIGHTS).read_bytes()


def test_frozen_weights_that_change_nothing_are_not_saved_again(tmp_path):
    saved_by_peft(tmp_path, ["q_proj", "embed_tokens"])
    model = tiny_model()
    load_adapter(model, tmp_path)
    save_adapter(model, tmp_path / "again")
    lost = load_file(tmp_path / WEIGHTS).keys() - load_file(tmp_path / "again" / WEIGHTS).keys()
    assert lost == {"base_model.model.model.embed_tokens.base_layer.weight"}


def test_the_rows_that_differ_are_counted_and_rounding_is_no_difference(tmp_path):
    saved_with_its_base(tmp_path, ["embed_tokens"], False, some_rows)
    with pytest.warns(UserWarning, match="2 of 97 rows differ"):
        load_adapter(tiny_model(), tmp_path)
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    own = tiny_model().get_parameter(EMBED).detach()
    for same in (own, own.bfloat16(), own.half()):  # without a warning, which would be an error in the tests
        edit_tensors(tmp_path, add={name: same.contiguous()})
        model = tiny_model()
        load_adapter(model, tmp_path)
        assert torch.equal(model.get_parameter(EMBED), same.float())


def test_frozen_weights_that_cannot_be_used_are_refused(tmp_path):
    saved_with_its_base(tmp_path, ["q_proj"], False, lambda *_: None)
    stored = load_file(tmp_path / WEIGHTS)[f"base_model.model.{HEAD}"]
    one_nan = stored.clone()
    one_nan[5, 3] = float("nan")
    for bad in (one_nan, stored * 2 + one_nan):
        edit_tensors(tmp_path, add={f"base_model.model.{HEAD}": bad})
        refused(tmp_path, f"{HEAD} holds NaN or infinity")
    edit_tensors(tmp_path, add={f"base_model.model.{HEAD}": torch.zeros(101, 32)})
    refused(tmp_path, r"has shape \(101, 32\), the base model's is \(97, 32\).* vocabulary")
    # peft would pass over these without a word: it looks for `base_layer` just where there is an update
    edit_tensors(tmp_path, add={f"base_model.model.{Q0}.weight": torch.zeros(32, 32)},
                 remove=(f"base_model.model.{HEAD}",))  # fmt: skip
    refused(tmp_path, f"{Q0}.weight fits no layer")


def test_two_matrices_for_a_tied_model(tmp_path):
    saved_with_its_base(tmp_path, ["q_proj"], False, the_head)
    with pytest.raises(CheckpointError, match="differ, but are one matrix in the base model"):
        load_adapter(tiny_model(tie_word_embeddings=True), tmp_path)


def test_one_matrix_of_a_tied_model_is_enough(tmp_path):
    theirs = saved_with_its_base(tmp_path, ["q_proj"], True, one_row)
    for stored in (EMBED, HEAD):
        edit_tensors(tmp_path, add={f"base_model.model.{stored}": theirs.base_model.model.lm_head.weight.detach()},
                     remove=(f"base_model.model.{EMBED}", f"base_model.model.{HEAD}"))  # fmt: skip
        model = tiny_model(tie_word_embeddings=True)
        with pytest.warns(UserWarning, match="1 of 97 rows differ"):
            load_adapter(model, tmp_path)
        close(logits(model, IDS), logits(theirs, IDS))


# ---- the files ----


def test_saved_and_loaded_is_bitwise_the_same(tmp_path):
    model = adapted(alpha=6.0, rslora=True, dropout=0.25)
    save_adapter(model, tmp_path, base_model="weights/tiny")
    again = tiny_model()
    load_adapter(again, tmp_path)
    for name, layer in lora_layers(model).items():
        other = lora_layers(again)[name]
        assert (layer.rank, layer.alpha, layer.scale) == (other.rank, other.alpha, other.scale)
        assert getattr(layer, "dropout", 0) == getattr(other, "dropout", 0)
    assert trainable_parameters(model).keys() == trainable_parameters(again).keys()
    for name, parameter in trainable_parameters(model).items():
        assert torch.equal(parameter, trainable_parameters(again)[name])
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "weights/tiny"
    other = tiny_model()
    load_adapter(other, tmp_path, dropout=0.0)
    assert lora_layers(other)["lm_head"].dropout == 0


def test_keys_shapes_and_metadata(tmp_path):
    """Table of section 6 of the design; strict=False in peft would only warn about a misspelt key."""
    save_adapter(adapted(), tmp_path)
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    tensors = load_file(tmp_path / WEIGHTS)
    assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors.values())
    shapes = {name.removeprefix("base_model.model."): tuple(tensor.shape) for name, tensor in tensors.items()}
    assert len(shapes) == 2 * (7 * 2 + 2)
    assert shapes[f"{Q0}.lora_A.weight"] == (4, 32) and shapes[f"{Q0}.lora_B.weight"] == (32, 4)
    assert shapes["lm_head.lora_A.weight"] == (4, 32) and shapes["lm_head.lora_B.weight"] == (97, 4)
    assert shapes["model.embed_tokens.lora_embedding_A"] == (4, 97)
    assert shapes["model.embed_tokens.lora_embedding_B"] == (32, 4)


def test_factors_that_are_views_are_saved_whole(tmp_path):
    """Contiguous and with storage of their own, as PEFT's format asks."""
    model = adapted("q")
    both = torch.randn(2, 4, 32)
    for layer, half in zip(lora_layers(model).values(), both, strict=True):
        layer.lora_A.data = half
        layer.lora_B.data = layer.lora_B.data.T.contiguous().T
        assert not layer.lora_B.is_contiguous()
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert len({tensor.data_ptr() for tensor in tensors.values()}) == len(tensors) == 4
    assert sum(tensor.nbytes for tensor in tensors.values()) == 4 * 4 * 4 * 32
    close(logits(into_peft(tmp_path), IDS), logits(model, IDS))


def test_a_merged_model_saves_the_same_adapter(tmp_path):
    model = adapted(tied=True)
    save_adapter(model, tmp_path / "before")
    merge(model)
    save_adapter(model, tmp_path / "merged")
    for name in ("adapter_config.json", WEIGHTS):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()


def test_a_model_without_updates_is_not_saved_as_an_adapter(tmp_path):
    with pytest.raises(ValueError, match="no LoRA layer"):
        save_adapter(tiny_model(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# ---- refusals ----


@pytest.mark.parametrize("field, value", [
    ("peft_type", "IA3"),
    ("modules_to_save", ["lm_head"]),
    ("bias", "some"),
    ("lora_bias", True),
    ("init_lora_weights", "pissa"),
    ("init_lora_weights", "pissa_niter_4"),
    ("init_lora_weights", "olora"),
    ("layer_replication", [[0, 1]]),
    ("trainable_token_indices", [1, 2]),
    ("r", None),
    ("lora_alpha", None),
    ("r", 3),
])  # fmt: skip
def test_what_it_cannot_represent_is_refused_by_name(field, value, folder):
    edit_config(folder, **{field: value})
    refused(folder, rf"adapter_config\.json.*\b{field}\b" if field != "r" or value is None else "has rank 4")


@pytest.mark.parametrize("init", ["gaussian", "eva", "orthogonal", "mica", True, False])
def test_harmless_initialisations_are_peft_s(init, tmp_path):
    """Those after which peft's own base model is what it was."""
    theirs = saved_by_peft(tmp_path, ["q_proj"], **({} if init == "eva" else {"init_lora_weights": init}))
    close(theirs.base_model.model.get_submodule(Q0).base_layer.weight, tiny_model().get_submodule(Q0).weight, 0)
    edit_config(tmp_path, init_lora_weights=init)
    model = tiny_model()
    load_adapter(model, tmp_path)
    close(logits(model, IDS), logits(theirs, IDS))


@pytest.mark.parametrize("field, value", [("bias", "all"), ("bias", "lora_only"), ("fan_in_fan_out", True)])
def test_what_says_nothing_of_a_llama_is_ignored_as_by_peft(field, value, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that fan_in_fan_out is set to false
        theirs = saved_by_peft(tmp_path, ["q_proj", "embed_tokens"], **{field: value})
        edit_config(tmp_path, **{field: value})
        close(logits(into_peft(tmp_path), IDS), logits(theirs, IDS))
    model = tiny_model()
    load_adapter(model, tmp_path)
    close(logits(model, IDS), logits(theirs, IDS))
    edit_tensors(tmp_path, add={f"base_model.model.{Q0}.bias": torch.zeros(32)})
    refused(tmp_path, f"{Q0}.bias fits no layer")


@pytest.mark.parametrize("init", ["lora_ga", "loftq", "corda", "olora", "PiSSA", "some_new_one", 3])
def test_other_initialisations_may_have_moved_the_base_model(init, folder):
    edit_config(folder, init_lora_weights=init)
    refused(folder, "init_lora_weights is .* may have moved")


def test_every_field_of_peft_s_configuration_is_understood_harmless_or_refused(folder):
    """Also those of a newer peft: a field that is set and unknown is refused by its name."""
    from dataclasses import fields

    import peft

    harmless = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
                "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
                "runtime_config", "fan_in_fan_out"}  # fmt: skip
    for name in [*(field.name for field in fields(peft.LoraConfig)), "a_field_of_next_year"]:
        before = (folder / "adapter_config.json").read_text()
        edit_config(folder, **{name: [{"x": 1}]})  # no value that any of the fields understood may have
        if name in harmless:
            load_adapter(tiny_model(), folder)
        else:
            refused(folder, rf"adapter_config\.json: {name} is ")
        (folder / "adapter_config.json").write_text(before)


@pytest.mark.parametrize("field, value", [
    ("r", "4"), ("r", True), ("r", 4.5), ("lora_alpha", float("nan")), ("lora_alpha", float("inf")),
    ("lora_alpha", "16"), pytest.param("lora_alpha", 10**400, id="huge"),
    ("lora_dropout", 1.0), ("lora_dropout", "a"), ("lora_dropout", -0.1),
    ("use_rslora", "false"), ("use_dora", 1), ("target_modules", 5), ("target_modules", "("),
    ("target_modules", [1, 2]), ("exclude_modules", "("), ("exclude_modules", 3), ("layers_to_transform", "1"),
    ("layers_to_transform", [0.5]), ("layers_pattern", "("), ("rank_pattern", {"(": 4}), ("rank_pattern", ["q_proj"]),
    ("rank_pattern", {"q_proj": 0}), ("alpha_pattern", {"q_proj": "x"}), ("alpha_pattern", {"k_proj": float("nan")}),
    ("alpha_pattern", {"x{99999999999}": 1}),
])  # fmt: skip
def test_a_malformed_field_is_named(field, value, folder):
    edit_config(folder, **{field: value})
    refused(folder, rf"^[^\n]*adapter_config\.json: {field} is [^\n]*, not [^\n]*$")


TARGETS = [
    {"target_modules": r".*\.(q|v)_proj|lm_head"}, {"target_modules": "all-linear"}, {"target_modules": "ALL-linear"},
    {"target_modules": ["proj"]}, {"target_modules": ["layers.1.mlp.up_proj", "lm_head", "embed_tokens"]},
    {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "embed_tokens"], "layers_to_transform": []},
    {"target_modules": ["q_proj", "model.embed_tokens"], "layers_to_transform": 0, "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": ["h", "model.layers"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "h"},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj", "v"]},
    {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"}, {"target_modules": None},
]  # fmt: skip


@pytest.mark.parametrize("rules", TARGETS, ids=str)
def test_layers_are_targeted_by_peft_s_rules(rules, tmp_path):
    import peft
    from peft.tuners.tuners_utils import _ExcludedModule, _maybe_include_all_linear_layers, check_target_module_exists

    theirs = peft.LoraConfig(**rules)
    theirs.target_modules = theirs.target_modules or {"q_proj", "v_proj"}  # its choice for a Llama
    theirs = _maybe_include_all_linear_layers(theirs, transformers_twin(tiny_model()))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4} | rules))
    ours = read_peft_config(path)
    for name in (name for name, _ in tiny_model().named_modules() if kind_of(name)):
        found = check_target_module_exists(theirs, name)
        assert ours.targets(name) == (bool(found) and not isinstance(found, _ExcludedModule)), name


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_what_is_not_stored_in_floating_point_is_refused(dtype, folder):
    edit_tensors(folder, add={f"base_model.model.{Q0}.lora_B.weight": torch.ones(32, 4).to(dtype)})
    refused(folder, f"adapter_model.safetensors: base_model.model.{Q0}.lora_B.weight is stored as .*; only F64, F32")


def test_half_precision_and_mixed_adapters_compute_as_in_peft(tmp_path):
    saved_by_peft(tmp_path, ["q_proj", "lm_head"], save_embedding_layers=False)
    stored = load_file(tmp_path / WEIGHTS)
    edit_tensors(tmp_path, add={name: t.half() if "lora_A" in name else t.bfloat16() for name, t in stored.items()})
    model = tiny_model()
    load_adapter(model, tmp_path)
    close(logits(model, IDS), logits(into_peft(tmp_path), IDS))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value, folder):
    name = f"base_model.model.{Q0}.lora_B.weight"
    edit_tensors(folder, add={name: torch.full((32, 4), value)})
    with pytest.raises(CheckpointError, match=f"{Q0}.lora_B.weight holds NaN or infinity"):
        load_adapter(tiny_model(), folder)


@pytest.mark.parametrize("name, match", [
    (f"base_model.model.{Q0}.lora_B.weight", f"lacks .*{Q0}.lora_B.weight"),
    ("base_model.model.model.embed_tokens.lora_embedding_A", "lacks .*embed_tokens.lora_embedding_A"),
])  # fmt: skip
def test_a_missing_half_is_named(name, match, folder):
    edit_tensors(folder, remove=(name,))
    refused(folder, match)


@pytest.mark.parametrize("name, shape, match", [
    (f"base_model.model.{Q0}.lora_A.weight", (4, 33), r"q_proj.lora_A.weight has shape \(4, 33\).* needs \(4, 32\)"),
    (f"base_model.model.{Q0}.lora_B.weight", (32, 5), r"q_proj.lora_B.weight has shape \(32, 5\).* needs \(32, 4\)"),
    ("base_model.model.model.embed_tokens.lora_embedding_A", (97, 4), "lora_embedding_A has shape"),
    (f"base_model.model.{Q0}.lora_A.weight", (), "q_proj.lora_A.weight has shape"),
])  # fmt: skip
def test_a_wrong_shape_is_named(name, shape, match, folder):
    edit_tensors(folder, add={name: torch.zeros(shape)})
    refused(folder, match)


@pytest.mark.parametrize("name", [
    "base_model.model.model.layers.0.self_attn.x_proj.lora_A.weight",
    "base_model.model.model.embed_tokens.lora_A.weight",
    "model.layers.0.self_attn.q_proj.lora_A.weight",
    f"base_model.model.{Q0}.lora_magnitude_vector.weight",
])  # fmt: skip
def test_an_unexpected_key_is_named(name, folder):
    edit_tensors(folder, add={name: torch.zeros(4, 32)})
    refused(folder, f"{name} fits no layer")


def test_a_layer_that_the_model_lacks_is_named(folder):
    name = "base_model.model.model.layers.7.self_attn.q_proj"
    edit_tensors(folder, add={f"{name}.lora_{factor}.weight": torch.zeros(4, 4) for factor in "AB"})
    refused(folder, "layers.[2-7].self_attn.q_proj")


def test_an_adapter_of_another_base_model(tmp_path):
    for change in ({"hidden_size": 48}, {"vocab_size": 120}, {"num_hidden_layers": 3}):
        other = tiny_model(**change)
        inject_lora(other, "all", 4)
        save_adapter(other, tmp_path / str(change))
        refused(tmp_path / str(change), "of another model|fits no layer")


def test_a_layer_that_the_file_lacks_altogether(folder):
    """Its update would silently be missing: the configuration says that it is adapted."""
    edit_tensors(folder, remove=tuple(f"base_model.model.model.layers.1.self_attn.q_proj.lora_{factor}.weight"
                                      for factor in "AB"))  # fmt: skip
    for targets in ({}, {"layers_to_transform": []}, {"target_modules": r".*(q_proj|embed_tokens)"}):
        edit_config(folder, **targets)
        refused(folder, "lacks .*layers.1.self_attn.q_proj.lora_A.weight, though adapter_config.json targets")


def test_all_linear_means_every_layer(tmp_path):
    saved_by_peft(tmp_path, "all-linear")
    edit_config(tmp_path, target_modules="all-linear")
    load_adapter(tiny_model(), tmp_path)
    lost = "base_model.model.model.layers.1.mlp.down_proj"
    edit_tensors(tmp_path, remove=(f"{lost}.lora_A.weight", f"{lost}.lora_B.weight"))
    refused(tmp_path, f"lacks {lost}.lora_A.weight")


def test_a_layer_that_the_configuration_does_not_target(folder):
    """peft passes over its tensors, so its model computes something else than all of the file."""
    edit_config(folder, target_modules=["q_proj"])
    refused(folder, "holds .*lora_embedding_A, but adapter_config.json targets no such layer")


def test_damaged_and_missing_files(tmp_path, folder):
    refused(tmp_path / "nowhere", "nowhere: no such adapter folder")
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-50])
    refused(folder, WEIGHTS)
    (folder / WEIGHTS).unlink()
    refused(folder, f"{WEIGHTS}: no such file$")
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    refused(folder, "adapter_model.bin is pickled and not read; load it in peft")
    save_file({}, folder / WEIGHTS)
    refused(folder, "holds no tensor")
    (folder / "adapter_config.json").write_text("{")
    refused(folder, "adapter_config.json")
    (folder / "adapter_config.json").unlink()
    refused(folder, "adapter_config.json: no such file")


def test_a_model_with_updates_takes_no_second_adapter(folder):
    with pytest.raises(ValueError, match="carries LoRA layers already"):
        load_adapter(adapted("v"), folder)
