"""The merge command: bitwise what lora.merge computes, loadable by transformers, in little memory, or not at all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers import close, logits, random_ids, randomise_lora, tiny_config, tiny_model, transformers_twin
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llamalora.__main__ import main
from llamalora.cli import run_command
from llamalora.commands import merging
from llamalora.lora.adapter import load_adapter, save_adapter
from llamalora.lora.inject import inject_lora, lora_layers, merge
from llamalora.lora.kinds import kind_of
from llamalora.lora.peft_format import factor_keys
from llamalora.model.checkpoint import load_model, save_model, skeleton, tensor_files
from llamalora.model.tensors import file_bytes, streamed, write_tensors
from llamalora.runs.settings import Settings
from llamalora.runs.state import write_atomically
from llamalora.task.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
VOCABULARY = 400  # of the tokenizers in conftest.py
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def setup(
    place: Path,
    tokenizer: Path,
    dtype=torch.float16,
    targets: str = "all",
    tied: bool = False,
    shards: int = 10**9,
    dora: bool = False,
) -> tuple[Path, Path]:
    """A base model and an adapter of it."""
    model = tiny_model(vocab_size=VOCABULARY, tie_word_embeddings=tied).to(dtype)
    save_model(model, place / "base", shards)
    for path in tokenizer.iterdir():
        shutil.copy(path, place / "base")
    inject_lora(model, targets, 4, alpha=6.0, dora=dora)
    randomise_lora(model, spread=0.05)
    save_adapter(model, place / "adapter")
    return place / "base", place / "adapter"


@pytest.fixture
def folders(tmp_path, tiny_sentencepiece) -> tuple[Path, Path]:
    return setup(tmp_path, tiny_sentencepiece)


def merge_command(capsys, base: Path, adapter: Path, out: Path, *flags: str) -> dict:
    main(["merge", "--model", str(base), "--adapter", str(adapter), "--out", str(out), "--json", *flags])
    return json.loads(capsys.readouterr().out)


def refused(capsys, message: str, *flags, code: int = 2) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(main, ["merge", *map(str, flags)])
    assert ended.value.code == code
    assert message in capsys.readouterr().err


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: load_file(path)[name] for name, path in tensor_files(folder).items()}


# ---- the same as merging in memory ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("targets", ["all", "q,down", "embed", "head"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_bitwise_what_merging_in_memory_saves(dtype, tied, targets, dora, tmp_path, tiny_sentencepiece, capsys):
    base, adapter = setup(tmp_path, tiny_sentencepiece, dtype, targets, tied, 30_000, dora)
    report = merge_command(capsys, base, adapter, tmp_path / "out")
    model = load_model(base)
    load_adapter(model, adapter)
    merge(model)
    save_model(model, tmp_path / "expected")
    expected, merged = tensors_of(tmp_path / "expected"), tensors_of(tmp_path / "out")
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert merged[name].dtype == tensor.dtype and torch.equal(merged[name], tensor), name
    untied = tied and targets != "q,down"
    assert report["untied"] == untied
    assert ("lm_head.weight" in merged) == (untied or not tied)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config == json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": tied and not untied}
    loaded = load_model(tmp_path / "out")
    assert torch.equal(logits(loaded, random_ids(2, 9)), logits(model, random_ids(2, 9)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_blocks_of_rows_are_bitwise_those_of_the_whole_matrix(dtype, dora, tmp_path, monkeypatch, request):
    """Also side by side, and where the rows cannot be divided evenly."""
    monkeypatch.setattr(merging, "BLOCK", 700)
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(3)
    model = tiny_model(vocab_size=VOCABULARY).to(dtype)
    save_model(model, tmp_path / "base")
    inject_lora(model, "all", 4, alpha=6.0, dora=dora)
    randomise_lora(model, spread=0.05)
    save_adapter(model, tmp_path / "adapter")
    report = merging.merge_folders(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", probe=None)
    assert torch.get_num_threads() == 3
    merge(model)
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert torch.equal(tensor, model.get_parameter(name)), name
    monkeypatch.undo()
    again = merging.merge_folders(tmp_path / "base", tmp_path / "adapter", tmp_path / "again", probe=None)
    for kind, figures in again["kinds"].items():
        assert report["kinds"][kind] == pytest.approx(figures, rel=1e-5)


def test_shards_keep_their_names_and_the_index_is_right(tmp_path, tiny_sentencepiece, capsys):
    base, adapter = setup(tmp_path, tiny_sentencepiece, tied=True, shards=30_000)
    merge_command(capsys, base, adapter, tmp_path / "out")
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 2 and sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == shards
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    total = 0
    for file in shards:
        with safe_open(tmp_path / "out" / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118 (it cannot be iterated over)
                assert index["weight_map"].pop(name) == file
                total += opened.get_tensor(name).nbytes
    assert index == {"metadata": {"total_size": total}, "weight_map": {}}


def test_what_is_stored_beside_the_parameters_is_left_out(folders, tmp_path, capsys):
    base, adapter = folders
    path = base / "model.safetensors"
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    save_file(load_file(path) | extra, path, metadata={"format": "pt"})
    merge_command(capsys, base, adapter, tmp_path / "out")
    assert tensors_of(base).keys() - tensors_of(tmp_path / "out").keys() == extra.keys()


def test_companion_files_come_along(folders, tmp_path, capsys):
    base, adapter = folders
    (base / "generation_config.json").write_text('{"max_length": 9}')
    (base / "LICENSE.txt").write_text("a licence")
    (base / "adapter_config.json").write_text("{}")  # with which transformers would look for an adapter
    (base / "pytorch_model.bin.index.json").write_text("{}")
    (base / "consolidated.00.pth").write_text("weights")
    merge_command(capsys, base, adapter, tmp_path / "out")
    expected = {"config.json", "model.safetensors", "tokenizer.model", "generation_config.json", "LICENSE.txt"}
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert (
        expected <= found and not {"pytorch_model.bin.index.json", "consolidated.00.pth", "adapter_config.json"} & found
    )
    assert (tmp_path / "out/tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_transformers_decodes_what_base_and_peft_adapter_decode(dora, tied, tmp_path, tiny_bytelevel, capsys):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, adapter = setup(tmp_path, tiny_bytelevel, torch.float32, tied=tied, dora=dora)
    merge_command(capsys, base, adapter, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a tied layer has an update is what is tested
        apart = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    merged, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "out")("Input: a mild fever.\nAnswer:")["input_ids"]])
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    decoded = [model.generate(input_ids=ids, **options) for model in (apart, merged)]
    assert torch.equal(*decoded)
    assert len(decoded[0][0, ids.shape[1] :].unique()) > 3  # no stutter, which any model could repeat


# ---- other people's folders ----


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("updated", ["q_proj", "embed_tokens"])
def test_frozen_weights_that_the_adapter_brings_along_are_merged_as_peft_uses_them(updated, tied, tmp_path, capsys):
    """Also where they carry no update: these were left out without a word."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model = tiny_model(tie_word_embeddings=tied)
    save_model(model, tmp_path / "base")
    theirs = transformers_twin(model)
    with torch.no_grad():
        theirs.model.embed_tokens.weight[[3, 7]] = theirs.model.embed_tokens.weight[10:30].mean(0)
        theirs.lm_head.weight[5] *= 1.2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=4, target_modules=[updated], task_type="CAUSAL_LM", init_lora_weights=False)
        get_peft_model(theirs, config).save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
        apart = PeftModel.from_pretrained(transformers_twin(model), tmp_path / "adapter").eval()
    with pytest.warns(UserWarning, match="rows differ"):
        merge_command(capsys, tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "--no-probe")
    close(logits(load_model(tmp_path / "out"), random_ids(2, 9)), logits(apart, random_ids(2, 9)))


def test_the_probe_knows_what_the_adapter_brings_along(tmp_path, tiny_sentencepiece, capsys):
    base, adapter = setup(tmp_path, tiny_sentencepiece, torch.float32, "q,v")
    head = load_file(base / "model.safetensors")["lm_head.weight"]
    weights = adapter / "adapter_model.safetensors"
    save_file(load_file(weights) | {"base_model.model.lm_head.weight": head * 1.5}, weights)
    with pytest.warns(UserWarning, match="400 of 400 rows differ"):
        report = merge_command(capsys, base, adapter, tmp_path / "out")
    assert report["probe"]["largest_logit_difference"] < 1e-4
    assert torch.equal(load_model(tmp_path / "out").lm_head.weight, head * 1.5)


def test_a_folder_of_several_dtypes_keeps_them(tmp_path, tiny_sentencepiece, capsys):
    base, adapter = setup(tmp_path, tiny_sentencepiece, torch.float32)
    path = base / "model.safetensors"
    mixed = {n: t if "norm" in n or "head" in n else t.bfloat16() for n, t in load_file(path).items()}
    save_file(mixed, path)
    merge_command(capsys, base, adapter, tmp_path / "out")
    assert {n: t.dtype for n, t in tensors_of(tmp_path / "out").items()} == {n: t.dtype for n, t in mixed.items()}


# ---- the report ----


def test_rounding_errors_and_updates_are_what_their_definition_says(folders, tmp_path, capsys):
    base, adapter = folders
    report = merge_command(capsys, base, adapter, tmp_path / "out")
    model, merged = load_model(base), load_model(tmp_path / "out")
    load_adapter(model, adapter)
    layers = lora_layers(model)
    assert report["layers"] == len(layers)
    for kind, figures in report["kinds"].items():
        weight, delta, error = [], [], []
        for name, layer in layers.items():
            if kind_of(name) == kind:
                exact = layer.weight.double() + layer.delta().double()
                weight.append(layer.weight.double().flatten())
                delta.append(layer.delta().double().flatten())
                error.append((merged.get_submodule(name).weight.double() - exact).flatten())
        assert figures["layers"] == len(delta)
        weight, delta, error = (torch.cat(parts).norm().item() for parts in (weight, delta, error))
        assert figures["update"] == pytest.approx(delta / weight, rel=1e-4)
        assert figures["rounding_error"] == pytest.approx(error / delta, rel=0.01)
        assert 0 < figures["rounding_error"] < 0.1


def test_fp32_rounds_next_to_nothing(tmp_path, tiny_sentencepiece, capsys):
    report = merge_command(capsys, *setup(tmp_path, tiny_sentencepiece, torch.float32), tmp_path / "out")
    assert all(figures["rounding_error"] < 1e-6 for figures in report["kinds"].values())
    assert report["probe"]["largest_logit_difference"] < 1e-4 and report["probe"]["changed_argmax"] == 0


def test_the_probe_compares_both_models_in_fp32(folders, tmp_path, capsys):
    base, adapter = folders
    text = "Input: A mild fever followed.\nAnswer: a rash"
    probe = merge_command(capsys, base, adapter, tmp_path / "out", "--probe", text)["probe"]
    ids = torch.tensor([load_tokenizer(base).encode(text)])
    apart = load_model(base, torch.float32)
    load_adapter(apart, adapter)
    before, after = logits(apart, ids), logits(load_model(tmp_path / "out", torch.float32), ids)
    assert probe["tokens"] == ids.shape[1]
    assert probe["largest_logit_difference"] == pytest.approx((before - after).abs().max().item(), rel=1e-3)
    changed = (before.argmax(-1) != after.argmax(-1)).sum().item()
    assert probe["changed_argmax"] == changed and probe["changed_argmax_share"] == changed / ids.shape[1]
    assert probe["largest_logit_difference"] > 0


def test_a_coarse_dtype_changes_answers_and_the_probe_says_so(tmp_path, tiny_sentencepiece, capsys):
    """bf16 has 8 bits: of many random logits some change their order."""
    base, adapter = setup(tmp_path, tiny_sentencepiece, torch.bfloat16)
    text = " ".join(f"word {number}" for number in range(12))
    probe = merge_command(capsys, base, adapter, tmp_path / "out", "--probe", text)["probe"]
    assert probe["largest_logit_difference"] > 1e-3


def test_an_adapter_that_changes_nothing(tmp_path, tiny_sentencepiece, capsys):
    base, _ = setup(tmp_path, tiny_sentencepiece)
    model = load_model(base)
    inject_lora(model, "q", 2)
    save_adapter(model, tmp_path / "fresh")
    report = merge_command(capsys, base, tmp_path / "fresh", tmp_path / "out")
    assert report["kinds"]["q"] == {"layers": 2, "update": 0.0, "rounding_error": None}
    assert report["probe"]["largest_logit_difference"] == 0
    main(["merge", "--model", str(base), "--adapter", str(tmp_path / "fresh"), "--out", str(tmp_path / "again")])
    assert "rounding error" in capsys.readouterr().out


def test_untying_is_said(tmp_path, tiny_sentencepiece, capsys):
    base, adapter = setup(tmp_path, tiny_sentencepiece, tied=True)
    main(["merge", "--model", str(base), "--adapter", str(adapter), "--out", str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert "tie_word_embeddings is false" in text and "largest logit difference" in text


# ---- runs ----


def run_folder(base: Path, adapter: Path, place: Path, **changes) -> Path:
    settings = Settings(**{"model": str(base), "data": "x", "out": str(place), "lr": 1e-3, "batch_tokens": 1} | changes)
    place.mkdir()
    (place / "config.json").write_text(json.dumps({"settings": vars(settings)}))
    write_atomically(place / "best", lambda folder: shutil.copytree(adapter, folder, dirs_exist_ok=True))
    return place


def test_a_run_names_its_own_base(folders, tmp_path, capsys):
    base, adapter = folders
    place = run_folder(base, adapter, tmp_path / "run")
    main(["merge", "--run", str(place), "--out", str(tmp_path / "out"), "--no-probe", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (report["model"], report["adapter"]) == (str(base), str(place / "best")) and report["probe"] is None
    merge_command(capsys, base, adapter, tmp_path / "expected")
    for name, tensor in tensors_of(tmp_path / "expected").items():
        assert torch.equal(tensors_of(tmp_path / "out")[name], tensor)
    base.rename(tmp_path / "moved")
    refused(
        capsys,
        f"its base model, {base} in its config.json, is not here; give",
        "--run",
        place,
        "--out",
        tmp_path / "other",
    )
    main(["merge", "--run", str(place), "--model", str(tmp_path / "moved"), "--out", str(tmp_path / "other")])


@pytest.mark.parametrize("method", ["full", "partial"])
def test_a_run_without_lora_needs_no_merge(method, folders, tmp_path, capsys):
    place = run_folder(*folders, tmp_path / "run", method=method)
    refused(capsys, "is a whole model", "--run", place, "--out", tmp_path / "out")


# ---- complete, or not at all ----


def test_an_output_folder_in_use_is_left_alone(folders, tmp_path, capsys):
    base, adapter = folders
    flags = ("--model", base, "--adapter", adapter, "--out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").write_text("mine")
    refused(capsys, "exists and is not an empty folder", *flags, tmp_path / "out")
    refused(capsys, "exists and is not an empty folder", *flags, tmp_path / "out/file")
    refused(capsys, "exists and is not an empty folder", *flags, base)
    assert (tmp_path / "out/file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    merge_command(capsys, base, adapter, tmp_path / "empty")
    load_model(tmp_path / "empty")


@pytest.mark.parametrize("spoil, message", [
    ("nan", "adapter_model.safetensors: base_model.model.model.layers.1.mlp.up_proj.lora_B.weight holds NaN"),
    ("nan base", "base/model.safetensors: model.layers.1.mlp.up_proj.weight holds NaN or infinity"),
    ("nan norm", "base/model.safetensors: model.norm.weight holds NaN or infinity"), ("huge", "logits on the probe"),
    ("missing", "lacks"), ("shape", "the base model needs"),
    ("no adapter", "no such adapter folder"), ("no tokenizer", "--no-probe merges without one"),
    ("probe", "--probe is empty"), ("shard", "damaged or missing"), ("vocabulary", "has shape (404, 32), the base"),
    ("overflow", "up_proj.weight is not finite when it is merged into torch.float16"), ("alpha", "lora_alpha is nan"),
    ("integers", "is stored as I32"), ("fp8 base", "is stored as F8_E4M3"),
])  # fmt: skip
def test_a_failure_leaves_nothing_behind(spoil, message, folders, tmp_path, capsys):
    base, adapter = folders
    weights = adapter / "adapter_model.safetensors"
    tensors, key = load_file(weights), "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    if spoil == "nan":
        tensors[key][3, 1] = torch.nan  # found on the way, when files have been written
    elif spoil in ("nan base", "nan norm", "huge"):
        path, name = base / "model.safetensors", "norm" if spoil == "nan norm" else "layers.1.mlp.up_proj"
        changed = load_file(path)
        if spoil == "huge":
            changed = {name: tensor.float() * (1e30 if "norm" in name else 1) for name, tensor in changed.items()}
        else:
            changed[f"model.{name}.weight"][0] = torch.nan
        save_file(changed, path)
    elif spoil == "missing":
        del tensors[key]
    elif spoil == "shape":
        tensors[key] = tensors[key][:-1].clone()
    elif spoil == "vocabulary":
        tensors["base_model.model.lm_head.base_layer.weight"] = torch.zeros(404, 32)
    elif spoil == "overflow":  # of fp16, which ends at 65,504
        tensors[key] = tensors[key] * 1e7
    elif spoil == "integers":
        tensors[key] = tensors[key].int()
    elif spoil == "fp8 base":
        path = base / "model.safetensors"
        save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(path).items()}, path)
    elif spoil == "alpha":
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": float("nan")}))
    save_file(tensors, weights)
    if spoil == "no adapter":
        shutil.rmtree(adapter)
    elif spoil == "no tokenizer":
        (base / "tokenizer.model").unlink()
    elif spoil == "shard":
        (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-10])
    probe = ["--probe", "  "] if spoil == "probe" else []
    before = sorted(tmp_path.iterdir())
    refused(capsys, message, "--model", base, "--adapter", adapter, "--out", tmp_path / "out", *probe)
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_leaves_nothing_behind(folders, tmp_path, capsys, monkeypatch):
    def full(path, entries, tensor):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merging, "write_tensors", full)
    before = sorted(tmp_path.iterdir())
    flags = ("--model", folders[0], "--adapter", folders[1], "--out", tmp_path / "out")
    refused(capsys, "cannot be written", *flags, code=1)
    assert sorted(tmp_path.iterdir()) == before


def test_a_signal_leaves_nothing_behind(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "write_tensors", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = sorted(tmp_path.iterdir())
    command = ["merge", "--model", str(folders[0]), "--adapter", str(folders[1]), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        run_command(main, command)
    assert ended.value.code == 128 + signal.SIGTERM
    assert sorted(tmp_path.iterdir()) == before


def test_flags_that_lack_something(folders, tmp_path, capsys):
    refused(capsys, "--adapter needs the base model", "--adapter", folders[1], "--out", tmp_path / "out")
    refused(capsys, "one of the arguments --run --adapter", "--model", folders[0], "--out", tmp_path / "out")
    refused(capsys, "no such run folder", "--run", tmp_path / "no", "--out", tmp_path / "out")
    both = ("--model", folders[0], "--adapter", folders[1], "--out", tmp_path / "out")
    refused(capsys, "--no-probe: not allowed with argument --probe", *both, "--probe", "fever", "--no-probe")


# ---- streaming ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_files_are_byte_by_byte_the_library_s(dtype, tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = {"b": (3, 5), "a": (), "é": (7,), "c.weight": (2, 1, 4), "mixed": (2, 2)}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    tensors["mixed"] = tensors["mixed"].float()
    entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "library", metadata={"format": "pt"})
    write_tensors(tmp_path / "ours", entries, tensors.__getitem__)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()
    assert file_bytes(entries) == (tmp_path / "ours").stat().st_size


def test_a_streamed_model_computes_the_same_and_is_empty_again():
    model, ids = tiny_model(), random_ids(2, 9)
    tensors = model.state_dict()
    empty, alive = skeleton(model.config), []

    def read(name):
        alive.append(sum(not parameter.is_meta for parameter in empty.parameters()))
        return tensors[name]

    with streamed(empty, read), torch.no_grad():
        assert torch.equal(empty(ids), logits(model, ids))
    assert max(alive) == 0  # one layer's weights at a time
    assert all(parameter.is_meta for parameter in empty.parameters())


PEAK = """
import sys
import warnings
from pathlib import Path
from llamalora.commands.merge import PROBE
from llamalora.commands.merging import merge_folders

def peak():  # of this program, in bytes; ru_maxrss would also count the process that started it
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

small, big = (Path(sys.argv[number]) for number in (1, 2))
merge_folders(small / "base", small / "adapter", small / "merged", PROBE)
before = peak()
merge_folders(big / "base", big / "adapter", big / "merged", PROBE)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_merge_holds_one_matrix_at_a_time(tmp_path, tiny_sentencepiece):
    """However large the shards are, and so little that a merge of Llama-2-7B stays within 2.5 GiB."""
    setup(tmp_path / "small", tiny_sentencepiece)
    base, adapter = tmp_path / "big/base", tmp_path / "big/adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    config = tiny_config(vocab_size=VOCABULARY, hidden_size=1024, intermediate_size=2816, num_hidden_layers=9,
                         num_attention_heads=8, num_key_value_heads=8, head_dim=128)  # fmt: skip
    model = skeleton(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    shards = {name: f"model-{'abc'[int('layers.3' in name) + 2 * ('layers.6' in name)]}.safetensors" for name in shapes}
    values = torch.zeros(max(map(torch.Size.numel, map(torch.Size, shapes.values()))), dtype=torch.float16) + 0.01
    for file in set(shards.values()):
        entries = {name: (torch.float16, shapes[name]) for name in shapes if shards[name] == file}
        write_tensors(base / file, entries, lambda name: values[: torch.Size(shapes[name]).numel()].view(shapes[name]))
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (base / "config.json").write_text(json.dumps(config.to_dict()))
    shutil.copy(tiny_sentencepiece / "tokenizer.model", base)
    inject_lora(model, "all", 8)
    factors = {}
    for name, layer in lora_layers(model).items():
        pair = zip(factor_keys(name), (layer.lora_A, layer.lora_B), strict=True)
        factors |= {key: torch.full(factor.shape, 0.01) for key, factor in pair}
    save_file(factors, adapter / "adapter_model.safetensors")
    targets = sorted({name.rpartition(".")[2] for name in lora_layers(model)})
    described = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": targets}
    (adapter / "adapter_config.json").write_text(json.dumps(described))

    places = [tmp_path / "small", tmp_path / "big"]
    out = subprocess.run(
        [sys.executable, "-c", PEAK, *places], capture_output=True, text=True, check=True, cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ).stdout  # fmt: skip
    total = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    largest, of_7b = 4 * 1024 * 2816, 4 * 32000 * 4096  # bytes of the largest matrix in fp32
    copies, rest = 3, 50e6
    assert int(out) < copies * largest + rest < 0.6 * total
    assert copies * of_7b + rest < 2.5 * 2**30 - 0.5e9  # which Python and torch take
    shutil.rmtree(tmp_path / "big")
