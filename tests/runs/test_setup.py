"""What is checked before a model is loaded."""

import shutil

import pytest
import torch

from llamalora.runs.settings import ResolvedSettings, Settings, resolve
from llamalora.runs.setup import check_tags
from llamalora.task.definition import Task
from llamalora.task.tokenizer import TokenizerError, load_tokenizer

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
    with pytest.raises(TokenizerError, match="model: its tokenizer loses a part .* must not be a special token"):
        check_tags(TASK, tokenizer, str(folder))


def test_ordinary_tokenizers_keep_tags(tiny_bytelevel, tiny_sentencepiece):
    for folder in (tiny_bytelevel, tiny_sentencepiece):
        for task in (TASK, Task("extraction", ("Disease",), per_label=True)):
            check_tags(task, load_tokenizer(folder), str(folder))


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
