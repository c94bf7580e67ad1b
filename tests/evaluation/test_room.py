"""Decoding where the memory is small: fewer sentences side by side, the same answers, and what is said about it."""

from pathlib import Path

import pytest
import torch
from helpers import random_ids, randomise_lora, tiny_model

from llamalora.corpus.documents import Sentence
from llamalora.distributed import sharding
from llamalora.distributed.sharding import merged
from llamalora.distributed.world import World
from llamalora.evaluation import room
from llamalora.evaluation.answer import answer_sentences
from llamalora.evaluation.generate import generate
from llamalora.lora.inject import inject_lora, lora_layers
from llamalora.model import free_memory as measure
from llamalora.model.llama import Backbone
from llamalora.model.packing import KVCache
from llamalora.task.definition import Task
from llamalora.task.tokenizer import load_tokenizer

LENGTHS = (90, 61, 60, 50, 41, 30, 22, 21, 9, 8, 8, 7)
PROMPTS = [random_ids(length, seed=length + place).tolist() for place, length in enumerate(LENGTHS)]
LIMITS = [40 - place for place in range(len(PROMPTS))]
NEVER = -1


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def whole(model):
    return generate(model, PROMPTS, NEVER, LIMITS, 6)


@pytest.fixture
def caches(monkeypatch):
    """The shapes, rows and slots, that caches are given."""
    seen = []
    original = KVCache.resize

    def resize(cache, rows, slots):
        seen.append((rows, slots))
        original(cache, rows, slots)

    monkeypatch.setattr(KVCache, "resize", resize)
    return seen


def drafter(outputs):
    return lambda index, output: [*outputs[index][len(output) : len(output) + 3], 5]


def leave(monkeypatch, model, slots: int) -> None:
    """From now on memory is free for so many slots in all."""
    free = slots * room.slot_bytes(model.config, 4) / room.SHARE
    held = []
    original = KVCache.__init__

    def start(cache, *arguments):
        held.append(cache)
        original(cache, *arguments)

    monkeypatch.setattr(KVCache, "__init__", start)
    monkeypatch.setattr(room, "free_memory", lambda device: int(free) - held[-1].nbytes)
    monkeypatch.setattr(room, "pass_bytes", lambda *_: 0)


@pytest.mark.parametrize("slots", [700, 400, 200, 1])
def test_little_memory_makes_it_fewer_rows_and_the_same_answers(slots, model, whole, caches, monkeypatch):
    leave(monkeypatch, model, slots)
    told = []
    for helper in (None, drafter(whole.outputs)):
        got = generate(model, PROMPTS, NEVER, LIMITS, 6, helper, tell=told.append)
        assert got.outputs == whole.outputs and got.truncated == whole.truncated
        assert [len(row) for row in got.log_probs] == [len(output) for output in got.outputs]
    assert got.row_passes <= sum(LIMITS) and max(rows for rows, _ in caches) <= 6
    assert all(rows * slots_each <= slots for rows, slots_each in caches if rows > 1)
    assert len(told) == 2 and "up to 6 sentences side by side" in told[0] and "fewer, slower" in told[0]
    if slots == 1:  # for nothing but what one sentence takes in spite of it
        assert {rows for rows, _ in caches} <= {0, 1}


def test_more_rows_stand_side_by_side_when_sentences_are_shorter(model, whole, caches):
    """With memory for all, the cache has at most three times the slots of rows of average length."""
    prompts, limits = [random_ids(400, seed=1).tolist(), *PROMPTS], [30, *LIMITS]
    assert generate(model, prompts, NEVER, limits, 6).outputs[1:] == whole.outputs
    needs = [room.expected(len(prompt), limit) for prompt, limit in zip(prompts, limits, strict=True)]
    average = sum(needs) / len(needs)
    assert max(rows * slots for rows, slots in caches) <= 3 * 6 * average + 6 * room.GRAIN < 6 * max(needs)
    first, *_, last, at_the_end = caches
    assert first[0] < 6 == last[0] and first[1] > last[1] and at_the_end == (0, 0)


@pytest.mark.parametrize("fitting", [1, 2, 5])
def test_an_error_of_memory_halves_the_rows(fitting, model, whole, monkeypatch):
    """Whatever a pass has run into, every row goes on from what it had."""
    original, failed = Backbone.forward, []

    def forward(backbone, ids, packing, cache):
        rows = len(set(packing.rows.tolist()))
        if rows > fitting:
            failed.append(rows)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(backbone, ids, packing, cache)

    monkeypatch.setattr(Backbone, "forward", forward)
    told = []
    got = generate(model, PROMPTS, NEVER, LIMITS, 6, tell=told.append)
    assert got.outputs == whole.outputs and got.row_passes == whole.row_passes
    for ours, theirs in zip(got.log_probs, whole.log_probs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert failed[0] == 6 and len(told) == 1


def test_where_one_row_does_not_fit_the_error_says_what_was_planned(model, monkeypatch, tiny_sentencepiece, capsys):
    tokenizer = load_tokenizer(tiny_sentencepiece)

    def forward(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Backbone, "forward", forward)
    for name in ("max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 14 * 2**30)
    with pytest.raises(torch.OutOfMemoryError):
        generate(model, PROMPTS, NEVER, LIMITS, 6)
    task = Task("tagging", ("Disease",), False, False)
    asked = [Sentence("1", 0, "Aspirin helps.", ()), Sentence("1", 15, "It is old.", ())]
    with pytest.raises(room.OutOfMemory) as caught:
        answer_sentences(tiny_model(vocab_size=tokenizer.vocab_size), tokenizer, task, asked, World(quiet=True))
    text = str(caught.value)
    for words in ("one sentence at a time", "Tried to allocate 2.00 GiB", "cache of a sentence", "14.00 GiB held"):
        assert words in text
    assert "perhaps for 1" in capsys.readouterr().err


# ---- merged, or apart ----


@pytest.mark.parametrize("free, words", [(10**9, None), (1000, "updates stay apart")], ids=["enough", "little"])
def test_updates_are_merged_where_the_memory_holds_both(free, words, monkeypatch, capsys):
    model = tiny_model(tie_word_embeddings=True)
    inject_lora(model, "all", 4)
    randomise_lora(model)
    model.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with merged(model, World()):
        expected = generate(model, PROMPTS, NEVER, LIMITS, 6)
    capsys.readouterr()
    monkeypatch.setattr(sharding, "free_memory", lambda device: free)
    with merged(model, World()):
        assert all(layer.merged == (words is None) for layer in lora_layers(model).values())
        got = generate(model, PROMPTS, NEVER, LIMITS, 6)
    assert got.outputs == expected.outputs
    for ours, theirs in zip(got.log_probs, expected.log_probs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    said = capsys.readouterr().out
    assert words in said and "0.0 GiB are free" in said if words else not said


# ---- what is free ----


def system(folder: Path, files: dict[str, str], monkeypatch) -> int:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(measure, "PROC", folder / "proc")
    monkeypatch.setattr(measure, "GROUPS", folder / "groups")
    return measure.free_memory(torch.device("cpu"))


MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 4000 kB\n"}


def test_of_the_host_what_is_available_is_free(tmp_path, monkeypatch):
    assert system(tmp_path, MEMINFO, monkeypatch) == 4000 * 1024
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert measure.free_memory(torch.device("cpu")) == 1000 * 1024


def test_the_limits_of_control_groups_count(tmp_path, monkeypatch):
    """Version 2, the limit above the group; what files take can be had back."""
    group = {
        "proc/self/cgroup": "0::/outer/inner\n",
        "groups/outer/memory.max": "1000000\n",
        "groups/outer/memory.current": "900000\n",
        "groups/outer/memory.stat": "anon 500000\ninactive_file 300000\nactive_file 50000\n",
        "groups/outer/inner/memory.max": "max\n",
        "groups/outer/inner/memory.current": "5\n",
    }
    assert system(tmp_path, MEMINFO | group, monkeypatch) == 450000


def test_the_limits_of_older_control_groups_count(tmp_path, monkeypatch):
    group = {
        "proc/self/cgroup": "4:memory:/job\n1:cpu:/\n",
        "groups/memory/job/memory.limit_in_bytes": "700000\n",
        "groups/memory/job/memory.usage_in_bytes": "300000\n",
        "groups/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "groups/memory/memory.usage_in_bytes": "1\n",
    }
    assert system(tmp_path, MEMINFO | group, monkeypatch) == 400000


def test_where_nothing_is_told_nothing_seems_limited(tmp_path, monkeypatch):
    assert system(tmp_path, {}, monkeypatch) > 2**60
