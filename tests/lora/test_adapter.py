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
from llamalora.lora.inject import KINDS, adapt, inject_lora, lora_layers, merge, parse_targets, trainable_parameters
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
    ("bias", "all"),
    ("bias", "lora_only"),
    ("lora_bias", True),
    ("init_lora_weights", "pissa"),
    ("init_lora_weights", "pissa_niter_4"),
    ("init_lora_weights", "olora"),
    ("fan_in_fan_out", True),
    ("layer_replication", [[0, 1]]),
    ("trainable_token_indices", [1, 2]),
    ("r", None),
    ("lora_alpha", None),
    ("r", 3),
])  # fmt: skip
def test_what_it_cannot_represent_is_refused_by_name(field, value, folder):
    edit_config(folder, **{field: value})
    refused(folder, rf"adapter_config\.json.*\b{field}\b" if field != "r" or value is None else "has rank 4")


def test_harmless_initialisations_are_accepted(folder):
    for init in (True, False, "gaussian", "eva"):
        edit_config(folder, init_lora_weights=init)
        load_adapter(tiny_model(), folder)


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
    refused(folder, "layers.1.self_attn.q_proj")


def test_a_base_matrix_that_is_not_the_models(tmp_path):
    """peft stores the base's embedding beside its update; another one would change what the update means."""
    saved_by_peft(tmp_path, ["embed_tokens"])
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    stored = load_file(tmp_path / WEIGHTS)[name]
    for same in (stored, stored.bfloat16()):
        edit_tensors(tmp_path, add={name: same})
        load_adapter(tiny_model(), tmp_path)
    edit_tensors(tmp_path, add={name: stored + 1})
    refused(tmp_path, "embed_tokens.base_layer.weight")


def test_damaged_and_missing_files(tmp_path, folder):
    refused(tmp_path / "nowhere", "nowhere: no such adapter folder")
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-50])
    refused(folder, WEIGHTS)
    (folder / WEIGHTS).unlink()
    refused(folder, f"{WEIGHTS}: no such file$")
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    refused(folder, "pickled weights are not read")
    save_file({}, folder / WEIGHTS)
    refused(folder, "holds no tensor")
    (folder / "adapter_config.json").write_text("{")
    refused(folder, "adapter_config.json")
    (folder / "adapter_config.json").unlink()
    refused(folder, "adapter_config.json: no such file")


def test_a_model_with_updates_takes_no_second_adapter(folder):
    with pytest.raises(ValueError, match="carries LoRA layers already"):
        load_adapter(adapted("v"), folder)
