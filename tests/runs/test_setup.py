"""What is checked before a model is loaded."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from llamalora import files
from llamalora.model.tensors import CheckpointError
from llamalora.runs.folder import read_settings
from llamalora.runs.resolve import resolve
from llamalora.runs.settings import ResolvedSettings, Settings
from llamalora.runs.setup import check_tags
from llamalora.task.definition import Task
from llamalora.task.tokenizer import TokenizerError, load_tokenizer

ROOT = Path(__file__).parents[2]
TASK = Task("tagging", ("Disease",), per_label=False)


@pytest.mark.parametrize("special", [False, True])
def test_tags_that_are_special_tokens_are_refused(tiny_bytelevel, tmp_path, special):
    """They are no text: a model was trained on answers without them, and no mention could ever be read."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = shutil.copytree(tiny_bytelevel, tmp_path / "model")
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens([tokenizers.AddedToken(tag, special=special) for tag in TASK.tags("Disease")])
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    if not special:
        check_tags(TASK, tokenizer, str(folder))
        return
    with pytest.raises(TokenizerError, match=r"model: its tokenizer has '\[/?Disease\]' as a special token"):
        check_tags(TASK, tokenizer, str(folder))


def test_a_tokenizer_that_loses_a_bracket_is_refused(tiny_bytelevel, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    folder = shutil.copytree(tiny_bytelevel, tmp_path / "model")
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.normalizer = tokenizers.normalizers.Replace("[", "")
    backend.save(str(folder / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="model: its tokenizer loses a part of .* comes back as"):
        check_tags(TASK, load_tokenizer(folder), str(folder))


def test_ordinary_tokenizers_keep_tags(tiny_bytelevel, tiny_sentencepiece):
    for folder in (tiny_bytelevel, tiny_sentencepiece):
        for task in (TASK, Task("extraction", ("Disease",), per_label=True)):
            check_tags(task, load_tokenizer(folder), str(folder))


# ---- where model and data are ----


def test_the_working_folder_comes_before_the_clone_and_that_before_what_is_built_in(tmp_path, monkeypatch):
    """For a package that runs from a clone, and for one that a wheel has brought."""

    def found() -> tuple[str, ...]:
        settings, why = resolve(Settings(), torch.device("cpu"))
        assert settings.out.startswith("runs/") and settings.out.endswith(f"-r8-{Path(settings.model).name}")
        places = (str(Path(place).relative_to(tmp_path)) for place in (settings.model, settings.data))
        return (*places, why["model"], why["data"])

    for name in ("clone", "site/llamalora"):
        for built_in in files.BUILT_IN:
            shutil.copytree(ROOT / built_in, tmp_path / name / built_in)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    missing = tuple(f"built in, since {place} is not there" for place in ("weights/llama-2-7b", "data/bc5cdr"))
    there = ("found at weights/llama-2-7b", "found at data/bc5cdr")
    for package, carried in (("clone/llamalora", "clone"), ("site/llamalora", "site/llamalora")):
        monkeypatch.setattr(files, "PACKAGE", tmp_path / package)
        assert found() == (f"{carried}/weights/tiny", f"{carried}/data/sample", *missing)
    for place in ("clone", "site", "here"):
        shutil.copytree(ROOT / "weights/tiny", tmp_path / place / "weights/llama-2-7b")
        (tmp_path / place / "data/bc5cdr").mkdir(parents=True)
        if place == "site":  # beside an installed package stand other packages
            assert found() == ("site/llamalora/weights/tiny", "site/llamalora/data/sample", *missing)
        if place == "clone":
            monkeypatch.setattr(files, "PACKAGE", tmp_path / "clone/llamalora")
            assert found() == ("clone/weights/llama-2-7b", "clone/data/bc5cdr", *there)
            monkeypatch.setattr(files, "PACKAGE", tmp_path / "site/llamalora")
    for package in ("clone/llamalora", "site/llamalora"):
        monkeypatch.setattr(files, "PACKAGE", tmp_path / package)
        assert found() == ("here/weights/llama-2-7b", "here/data/bc5cdr", *there)


def test_a_step_is_as_large_as_the_machine_wants_it():
    """Unless it was asked for, or recorded: a run that goes on elsewhere keeps its steps."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)

    def tokens(device, processes, **given):
        found, _ = resolve(Settings(model="weights/tiny", precision="fp32", **given), device, processes)
        assert isinstance(found, ResolvedSettings)
        again, _ = resolve(found, cpu, 1)
        assert again.batch_tokens == found.batch_tokens
        return found.batch_tokens

    assert [tokens(cpu, processes) for processes in (1, 4)] == [1024, 1024]
    assert [tokens(gpu, processes) for processes in (1, 2, 4, 32)] == [2048, 4096, 8192, 8192]
    assert tokens(gpu, 4, batch_tokens=77) == 77
    assert tokens(gpu, 4, batch_sentences=10) == tokens(cpu, 1, batch_sentences=10)


# ---- runs of other versions ----


def test_the_settings_of_an_earlier_version_are_read_with_the_defaults_of_those_that_came_later(tmp_path):
    settings, _ = resolve(Settings(model=str(ROOT / "weights/tiny"), out=str(tmp_path)), torch.device("cpu"))
    config = tmp_path / "config.json"

    def read(stored):
        config.write_text(json.dumps({"settings": stored}))
        return read_settings(tmp_path)

    stored = asdict(settings)
    assert read(stored) == settings
    assert read({name: value for name, value in stored.items() if name not in ("compile", "patience")}) == settings
    with pytest.raises(CheckpointError, match="config.json: holds no settings of a llamalora run: lr lacks"):
        read({name: value for name, value in stored.items() if name != "lr"})
    with pytest.raises(CheckpointError, match="or those of a later version"):
        read(stored | {"warp": 9})
