"""What is supervised, what is computed together, by which process: nothing lost, nothing twice, nothing cut."""

import random

import pytest
import torch
from helpers import random_ids

from llamalora.corpus.documents import Sentence, Span
from llamalora.task.definition import Task
from llamalora.task.prompt import render_answer, render_prompt
from llamalora.task.tokenizer import load_tokenizer
from llamalora.training.batch import Example, MicroBatch, OverlongError, deal, encode, encode_all, plan_epoch, show

LABELS = ("Disease", "Chemical")
TEXT = "A mild fever followed the second dose of pindolol."
SPANS = (Span(7, 12, "Disease"), Span(41, 49, "Chemical"))
TASKS = [
    Task("tagging", LABELS, per_label=False),
    Task("extraction", LABELS, per_label=False),
    Task("tagging", ("Disease",), per_label=True, instruction=True, demonstrations=(("It helps", "It helps"),)),
    Task("extraction", ("Chemical",), per_label=True),
]


@pytest.fixture(params=["tiny_sentencepiece", "tiny_bytelevel"])
def tokenizer(request):
    return load_tokenizer(request.getfixturevalue(request.param))


def random_lengths(draw: random.Random) -> list[int]:
    return [draw.choice([draw.randint(1, 20), draw.randint(1, 300)]) for _ in range(draw.randint(1, 60))]


# ---- examples ----


@pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task.format} {task.labels}")
def test_exactly_the_answer_and_the_end_are_supervised(task, tokenizer):
    example = encode(task, tokenizer, TEXT, SPANS)
    *answer, last = example.ids[example.prompt :]
    assert last == tokenizer.eos_id
    assert tokenizer.eos_id not in answer
    assert tokenizer.decode(answer) == render_answer(task, TEXT, SPANS)
    assert example.supervised == len(answer) + 1
    assert tokenizer.decode(list(example.ids)) == render_prompt(task, TEXT) + " " + render_answer(task, TEXT, SPANS)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task.format} {task.labels}")
def test_the_prompt_is_the_one_that_generation_meets(task, tokenizer):
    example = encode(task, tokenizer, TEXT, SPANS)
    assert list(example.ids[: example.prompt]) == tokenizer.encode(render_prompt(task, TEXT))


def test_a_sentence_without_mention_still_teaches_to_stop(tokenizer):
    example = encode(TASKS[1], tokenizer, TEXT, ())
    assert render_answer(TASKS[1], TEXT, ()) == ""
    assert example.supervised >= 1 and example.ids[-1] == tokenizer.eos_id
    assert tokenizer.decode(list(example.ids[example.prompt :])) == ""


def test_what_is_shown_is_what_is_supervised(tokenizer):
    example = encode(TASKS[0], tokenizer, TEXT, SPANS)
    assert show(example, tokenizer) == (f"{render_prompt(TASKS[0], TEXT)}⟦{render_answer(TASKS[0], TEXT, SPANS)}<end>⟧")


# ---- length ----


def sentences(tokenizer):
    return [Sentence(f"d{n}", 10 * n, TEXT * n, tuple(SPANS)) for n in (1, 3, 2)]


def test_overlong_examples_are_refused_or_left_out_whole(tokenizer):
    every, skipped = encode_all(TASKS[0], tokenizer, sentences(tokenizer), 10**6, "error")
    assert skipped == 0 and len(every) == 3
    short, middle, long = sorted(map(len, every))
    for context, kept in ((long, 3), (long - 1, 2), (middle, 2), (short, 1), (short - 1, 0)):
        fitting, skipped = encode_all(TASKS[0], tokenizer, sentences(tokenizer), context, "skip")
        assert (len(fitting), skipped) == (kept, 3 - kept)
        assert fitting == [example for example in every if len(example) <= context]  # none is cut
    encode_all(TASKS[0], tokenizer, sentences(tokenizer), long, "error")
    with pytest.raises(
        OverlongError, match=rf"document d3 at character 30 has {long} tokens.* context {long - 1} \(1 "
    ):
        encode_all(TASKS[0], tokenizer, sentences(tokenizer), long - 1, "error")


def test_an_example_as_long_as_the_context_fits():
    """The end token is predicted, never read, so it takes no place."""
    example = Example((5, 6, 7, 2), 2)
    assert len(example) == 3 and example.supervised == 2
    assert MicroBatch.of([example], torch.device("cpu")).ids[0, :4].tolist() == [5, 6, 7, 0]


# ---- steps ----


@pytest.mark.parametrize("seed", range(20))
def test_an_epoch_takes_every_example_once_within_the_batch_size(seed):
    draw = random.Random(seed)
    lengths, most = random_lengths(draw), draw.randint(1, 400)
    steps = plan_epoch(lengths, most, seed, epoch=3)
    assert sorted(index for step in steps for index in step) == list(range(len(lengths)))
    for step in steps:
        assert step and (sum(lengths[index] for index in step) <= most or len(step) == 1)
    for step, following in zip(steps, steps[1:], strict=False):  # no step is closed while the next example fits
        assert sum(lengths[index] for index in step) + lengths[following[0]] > most


def test_the_order_depends_on_seed_and_epoch_alone():
    lengths = [1 + n % 7 for n in range(200)]
    plan = plan_epoch(lengths, 20, seed=1, epoch=2)
    random.seed(99)
    torch.manual_seed(99)
    assert plan_epoch(lengths, 20, 1, 2) == plan
    others = [plan_epoch(lengths, 20, *key) for key in ((1, 3), (2, 2), (2, 1), (12, 2), (1, 22))]
    for other in others:
        assert sum(other, []) != sum(plan, [])
    order = sum(plan, [])
    assert order != list(range(200))
    assert sum(plan_epoch(lengths, 50, 1, 2), []) == order  # nor on how it is cut


# ---- micro-batches ----


@pytest.mark.parametrize("seed", range(40))
def test_a_step_is_dealt_out_completely_and_evenly(seed):
    draw = random.Random(seed)
    lengths = random_lengths(draw)
    indices = draw.sample(range(len(lengths)), draw.randint(1, len(lengths)))
    ranks, micro = draw.randint(1, 8), draw.randint(1, 400)
    shares = deal(indices, lengths, ranks, micro)
    assert len(shares) == ranks
    assert len({len(share) for share in shares}) == 1  # or the others would wait for ever
    assert sorted(index for share in shares for batch in share for index in batch) == sorted(indices)
    longest = max(lengths[index] for index in indices)
    loads = [sum(lengths[index] for index in batch) for share in shares for batch in share]
    assert max(loads) <= max(micro, longest)
    assert max(loads) - min(loads) <= longest
    assert deal(indices, lengths, ranks, micro) == shares


def test_no_more_micro_batches_than_needed():
    assert [len(share) for share in deal(range(8), [10] * 8, 2, 40)] == [1, 1]
    assert [len(share) for share in deal(range(8), [10] * 8, 2, 20)] == [2, 2]
    assert deal([0], [10], 3, 5)[0] == [[0]]


def test_a_micro_batch_is_its_examples_in_a_row_filled_up_at_its_end():
    examples = [Example(tuple(random_ids(length, seed=length).tolist()), prompt) for length, prompt in
                ((9, 4), (2, 1), (23, 20), (6, 5))]  # fmt: skip
    batch = MicroBatch.of(examples, torch.device("cpu"))
    assert batch.ids[0].tolist() == [token for example in examples for token in example.ids[:-1]] + [0] * 12
    assert batch.ids.shape == (1, 48) and sum(map(len, examples)) == 36
    places = [place for example in examples for place in range(len(example))]
    assert batch.packing.positions[0].tolist() == places + [*range(5, 17)]  # of the last example, which ends sooner
    assert len(batch.predictors) == len(batch.targets) == sum(example.supervised for example in examples)
    expected = []
    for number, example in enumerate(examples):
        first = sum(map(len, examples[:number]))
        expected += [(first + place - 1, example.ids[place]) for place in range(example.prompt, len(example.ids))]
    assert list(zip(batch.predictors.tolist(), batch.targets.tolist(), strict=True)) == expected
