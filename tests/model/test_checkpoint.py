"""Model folders: exchanged with transformers, checked tensor by tensor, refused by name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import close, logits, random_ids, randomise_lora, tiny_config, tiny_model, transformers_twin
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llamalora.lora.inject import inject_lora, merge, restore
from llamalora.model.checkpoint import load_model, read_config, save_model, tensor_files
from llamalora.model.config import RopeScaling
from llamalora.model.llama import Llama
from llamalora.model.tensors import CheckpointError

ROOT = Path(__file__).parents[2]
IDS = random_ids(2, 30)
SHAPES = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 24},
    "linear": {"rope_scaling": RopeScaling("linear", 4.0)},
    "llama3": {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 32)},
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """An untied model in three shards."""
    save_model(tiny_model(), tmp_path / "model", shard_bytes=30_000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) >= 3
    return tmp_path / "model"


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, add: dict | None = None, remove: tuple[str, ...] = ()) -> None:
    tensors = {name: tensor for name, tensor in load_file(path).items() if name not in remove}
    save_file(tensors | (add or {}), path, metadata={"format": "pt"})


def from_pretrained(folder: Path):
    from transformers import AutoModelForCausalLM

    theirs, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report  # no key missing, unexpected or of another shape
    return theirs


# ---- exchange with transformers ----


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("shard", ["10GB", "30KB"], ids=["one file", "shards"])
def test_loads_what_transformers_saves(shape, shard, tmp_path):
    twin = transformers_twin(tiny_model(**shape))
    twin.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "30KB")
    close(logits(load_model(tmp_path), IDS), logits(twin, IDS))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("shard", [10**9, 30_000], ids=["one file", "shards"])
def test_transformers_loads_what_we_save(shape, shard, tmp_path):
    model = tiny_model(**shape)
    save_model(model, tmp_path, shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == 30_000)
    close(logits(from_pretrained(tmp_path), IDS), logits(model, IDS))


@pytest.mark.parametrize(
    "config, generation, ends",
    [
        (2, None, 2),
        (2, 2, 2),
        (2, [2], 2),
        (2, [2, 5], (2, 5)),
        ([2, 3], [5, 3], (2, 3, 5)),
        ([7, 3], None, (7, 3)),
        (None, [4, 5], (4, 5)),
        (None, None, None),
    ],
)
def test_end_tokens_of_both_configurations_count(config, generation, ends, folder):
    edit_config(folder, eos_token_id=config)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert read_config(folder).eos_token_id == ends
    assert read_config(folder).end_ids == set(ends if isinstance(ends, tuple) else [ends] if ends else [])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ["</s>"]}))
    with pytest.raises(CheckpointError, match="generation_config.json: eos_token_id"):
        read_config(folder)


@pytest.mark.parametrize("scaling", [{"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}])
def test_the_older_form_of_config_json(scaling, tmp_path):
    """`rope_theta` and `rope_scaling` beside the other fields, as before transformers 5."""
    transformers_twin(tiny_model(rope_scaling=RopeScaling("linear", 4.0))).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"], config["head_dim"]
    config |= {"rope_theta": 10000.0, "rope_scaling": scaling, "torch_dtype": config.pop("dtype")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    close(logits(load_model(tmp_path), IDS), logits(from_pretrained(tmp_path), IDS))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saved_and_loaded_is_bitwise_the_same(tied, dtype, tmp_path):
    model = tiny_model(tie_word_embeddings=tied).to(dtype)
    save_model(model, tmp_path, shard_bytes=30_000)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config and not loaded.training
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in tensor_files(tmp_path)) != tied
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == dtype
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_the_dtype_can_be_chosen(folder):
    for name, tensor in load_model(folder, torch.bfloat16).state_dict().items():
        assert torch.equal(tensor, load_model(folder).state_dict()[name].bfloat16()), name


def test_files_are_written_the_way_of_hugging_face(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    sizes = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
        for name, tensor in load_file(path).items():
            assert index["weight_map"][name] == path.name
            sizes += tensor.nbytes
    assert index["metadata"]["total_size"] == sizes
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "float32"


# ---- merged models ----


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("targets", ["all", "q,v", "embed", "head"])
def test_a_merged_model_is_saved_as_what_it_computes(tied, targets, tmp_path):
    """A tied matrix that two different updates came to is written twice, and config.json says so."""
    model = tiny_model(tie_word_embeddings=tied)
    inject_lora(model, targets, 4)
    randomise_lora(model)
    expected = logits(model, IDS)
    merge(model)
    save_model(model, tmp_path)
    still_tied = tied and targets == "q,v"
    assert read_config(tmp_path).tie_word_embeddings == still_tied
    close(logits(load_model(tmp_path), IDS), expected)
    close(logits(from_pretrained(tmp_path), IDS), expected)


def test_a_model_with_unmerged_updates_is_not_saved(tmp_path):
    model = tiny_model()
    inject_lora(model, "q", 4)
    for spoil in (lambda m: None, merge, restore):  # fresh, merged, and restored again
        spoil(model)
        if spoil is merge:
            continue
        with pytest.raises(ValueError, match="layers.0.self_attn.q_proj.*not merged"):
            save_model(model, tmp_path / "model")
        assert not (tmp_path / "model").exists()


def test_a_folder_with_a_model_is_not_overwritten(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match="holds a model already"):
        save_model(tiny_model(seed=1), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# ---- strictness ----


def test_all_that_does_not_match_is_listed(folder):
    files = tensor_files(folder)
    gone, bent = "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.k_proj.weight"
    edit_tensors(files[gone], remove=(gone,))
    edit_tensors(files[bent], add={bent: torch.zeros(5, 7), "model.layers.0.self_attn.q_proj.bias": torch.zeros(3)})
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert f"missing {gone} (56, 32)" in message
    assert "unexpected model.layers.0.self_attn.q_proj.bias" in message
    assert f"{bent} has shape (5, 7), config.json asks for (16, 32)" in message
    assert message.count("\n") == 3  # and nothing else


def test_a_config_of_another_size_is_refused(folder):
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"missing model\.layers\.2\.self_attn"):
        load_model(folder)
    edit_config(folder, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"unexpected model\.layers\.1\."):
        load_model(folder)


def test_a_long_list_is_cut_and_counted(folder):
    edit_config(folder, hidden_size=48)
    with pytest.raises(CheckpointError, match=r"and \d+ more") as caught:
        load_model(folder)
    assert str(caught.value).count("\n") < 20


def test_a_truncated_file_is_named(folder):
    damaged = sorted(folder.glob("*.safetensors"))[1]
    for size in (damaged.stat().st_size - 100, 5, 0):
        damaged.write_bytes(damaged.read_bytes()[:size])
        with pytest.raises(CheckpointError, match=damaged.name):
            load_model(folder)


def test_a_missing_shard_is_named(folder):
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=lost.name):
        load_model(folder)


def test_a_single_file_is_read_whatever_index_an_earlier_save_left(folder):
    """As transformers does."""
    model = tiny_model(seed=7)
    save_model(model, folder.parent / "single")
    (folder.parent / "single/model.safetensors").rename(folder / "model.safetensors")
    close(logits(from_pretrained(folder), IDS), logits(model, IDS))
    close(logits(load_model(folder), IDS), logits(model, IDS))
    for shard in folder.glob("model-*"):
        shard.unlink()
    close(logits(load_model(folder), IDS), logits(model, IDS))


def test_a_tensor_in_two_shards_is_refused(folder):
    name = "model.norm.weight"
    one, other = tensor_files(folder)[name], tensor_files(folder)["model.embed_tokens.weight"]
    edit_tensors(other, add={name: torch.zeros(32)})
    with pytest.raises(CheckpointError, match=f"{max(one, other).name}: holds {name}, which {min(one, other).name}"):
        load_model(folder)


def test_an_index_that_names_another_shard_is_refused(folder):
    path, name = folder / "model.safetensors.index.json", "model.norm.weight"
    index, holds = json.loads(path.read_text()), tensor_files(folder)[name].name
    other = next(file for file in index["weight_map"].values() if file != holds)
    index["weight_map"][name] = other
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"says that {name} is in {other}, but it is in {holds}"):
        load_model(folder)


def test_an_index_needs_no_metadata(folder):
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": json.loads(path.read_text())["weight_map"]}))
    close(logits(load_model(folder), IDS), logits(tiny_model(), IDS))


# ---- dtypes ----


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.bool])
def test_quantised_weights_are_refused_at_the_reader(dtype, folder):
    """Their values mean nothing without scales; the whole dtypes gave tracebacks or, as fp32, wrong numbers."""
    name = "model.layers.1.self_attn.q_proj.weight"
    path = tensor_files(folder)[name]
    edit_tensors(path, add={name: load_file(path)[name].to(dtype)})
    for wanted in (None, torch.float32):
        with pytest.raises(CheckpointError, match=rf"{path.name}: {name} is stored as \w+; only F64, F32, BF16, F16"):
            load_model(folder, wanted)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_a_folder_of_several_dtypes_computes(low, folder):
    """In the one that holds all the values, as when PEFT kept the head and norms in fp32."""
    for path in folder.glob("*.safetensors"):
        mixed = {n: t.to(low) for n, t in load_file(path).items() if "norm" not in n and "head" not in n}
        edit_tensors(path, add=mixed)
    model = load_model(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    close(logits(model, IDS), logits(from_pretrained(folder).float(), IDS))
    assert load_model(folder, low).lm_head.weight.dtype == low


def test_fp64_computes(tmp_path):
    save_model(tiny_model().double(), tmp_path)
    assert logits(load_model(tmp_path), IDS).dtype == torch.float64
    close(logits(load_model(tmp_path), IDS).float(), logits(tiny_model(), IDS))


def test_a_shard_that_lacks_what_the_index_promises(folder):
    name = "model.norm.weight"
    edit_tensors(tensor_files(folder)[name], remove=(name,))
    with pytest.raises(CheckpointError, match=f"missing {name}"):
        load_model(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"lm_head.weight": 3}}'])
def test_a_damaged_index_is_named(content, folder):
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        load_model(folder)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth", None])
def test_weights_that_are_not_safetensors(file, folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    if file:
        (folder / file).write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="no model.safetensors") as caught:
        load_model(folder)
    assert ("convert them to safetensors" in str(caught.value)) == (file is not None)


def test_shards_without_their_index(folder):
    (folder / "model.safetensors.index.json").unlink()
    shards = len(list(folder.glob("*.safetensors")))
    with pytest.raises(CheckpointError, match=f"no model.safetensors.index.json, .* its {shards} shards .*download it"):
        load_model(folder)


def test_weights_by_another_name(tmp_path):
    save_model(tiny_model(), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model.fp16.safetensors")
    with pytest.raises(CheckpointError, match="has no model.safetensors but model.fp16.safetensors; .* that name"):
        load_model(tmp_path)


@pytest.mark.parametrize("content, named", [
    ("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 123\n", "a Git LFS pointer.*git lfs pull"),
    ("\n<html><head>Sign in</head></html>", "a web page.*download it again"),
    ("nothing known", "damaged or missing|cannot be read"),
])  # fmt: skip
def test_downloads_that_brought_another_file(content, named, tmp_path):
    save_model(tiny_model(), tmp_path)
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_text(content)
        with pytest.raises(CheckpointError, match=f"{name}: ({named})"):
            load_model(tmp_path)


@pytest.mark.parametrize("files, said", [
    (["params.json", "consolidated.00.pth", "tokenizer.model"], "a Llama as Meta gives it; take .* -hf .* or convert"),
    (["llama-2-7b.Q4_K_M.gguf"], "GGUF files; take the model's safetensors"),
    (["refs/main", "snapshots/0123/config.json"], "the Hub's cache; what it holds is in .*models--o--N/snapshots/0123"),
])  # fmt: skip
def test_other_folders_of_a_model_are_recognised(files, said, tmp_path):
    folder = tmp_path / "models--o--N"
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    with pytest.raises(CheckpointError, match=f"models--o--N: no model folder but .*{said}"):
        load_model(folder)


def test_folders_and_configs_that_cannot_be_read(tmp_path, folder):
    with pytest.raises(CheckpointError, match="nowhere: no such model folder"):
        load_model(tmp_path / "nowhere")
    for content in ("{", "[]", b"\xff\xfe\x00"):
        (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(CheckpointError, match="config.json"):
            load_model(folder)
    (folder / "config.json").write_text(json.dumps(tiny_config().to_dict() | {"hidden_act": "gelu"}))
    with pytest.raises(CheckpointError, match="config.json: hidden_act is 'gelu'"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json: no such file"):
        load_model(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), 1e6])
def test_weights_that_are_not_finite_are_refused(bad, tmp_path):
    """Also where they are finite in the file, but not in the dtype that is asked for."""
    save_model(tiny_model(), tmp_path)
    edit_tensors(tmp_path / "model.safetensors", add={"model.norm.weight": torch.full((32,), bad)})
    with pytest.raises(CheckpointError, match="safetensors: model.norm.weight holds NaN or infinity, as torch.float16"):
        load_model(tmp_path, torch.float16)


def test_a_tied_model_with_a_head_of_its_own_is_refused(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    save_model(model, tmp_path)
    path, embedding = tmp_path / "model.safetensors", model.model.embed_tokens.weight.detach()
    edit_tensors(path, add={"lm_head.weight": embedding.clone()})
    close(logits(load_model(tmp_path), IDS), logits(model, IDS))  # the same matrix twice is no contradiction
    edit_tensors(path, add={"lm_head.weight": embedding + 1})
    with pytest.raises(CheckpointError, match="tie_word_embeddings, but lm_head.weight differs"):
        load_model(tmp_path)
    edit_config(tmp_path, tie_word_embeddings=False)
    assert not torch.equal(logits(load_model(tmp_path), IDS), logits(model, IDS))


def test_stored_rotary_frequencies_of_old_conversions_are_ignored(tmp_path):
    model = tiny_model()
    save_model(model, tmp_path)
    stored = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for n in range(2)}
    edit_tensors(tmp_path / "model.safetensors", add=stored)
    close(logits(load_model(tmp_path), IDS), logits(model, IDS))


# ---- memory ----

PEAK = """
import sys, torch
from llamalora.model.checkpoint import load_model

def peak():  # of this program, in KiB; ru_maxrss would also count the process that started it
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

load_model(sys.argv[1])
before = peak()
model = load_model(sys.argv[2])
size = sum(parameter.nbytes for parameter in model.parameters())
print((peak() - before) * 1024 / size, size)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_loading_needs_little_more_memory_than_the_model(folder, tmp_path):
    """From one file, which must not stay mapped beside the copies made of it."""
    config = tiny_config(vocab_size=2000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, head_dim=256)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Llama(config).named_parameters()}
    big = tmp_path / "big"
    big.mkdir()
    (big / "config.json").write_text(json.dumps(config.to_dict()))
    save_file({name: torch.full(shape, 0.1) for name, shape in shapes.items()}, big / "model.safetensors")
    out = subprocess.run(
        [sys.executable, "-c", PEAK, folder, big], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.split()
    (big / "model.safetensors").unlink()
    assert int(out[1]) > 200e6
    assert 0.9 < float(out[0]) < 1.5
