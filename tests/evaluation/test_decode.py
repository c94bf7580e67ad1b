"""Decoding against transformers' generate, and against itself: alone, side by side, drafted."""

import random
from dataclasses import replace

import pytest
import torch
from helpers import random_ids, tiny_model, transformers_twin

from llamalora.evaluation.generate import generate
from llamalora.lora.inject import inject_lora
from llamalora.model.checkpoint import load_model
from llamalora.model.llama import Llama
from llamalora.task.tokenizer import load_tokenizer

LENGTHS = (4, 1, 17, 9, 9, 30, 2, 5)
PROMPTS = [random_ids(length, seed=length + place).tolist() for place, length in enumerate(LENGTHS)]
NEVER = -1  # an end token that no model chooses
NEW = 24


@pytest.fixture(scope="module", params=["gqa", "mha", "tied"])
def model(request):
    shape = {"gqa": {}, "mha": {"num_key_value_heads": 4}, "tied": {"tie_word_embeddings": True}}[request.param]
    return tiny_model(**shape)


@pytest.fixture(scope="module")
def plain(model):
    """What each prompt gives on its own, without end."""
    return [generate(model, [prompt], NEVER, NEW).outputs[0] for prompt in PROMPTS]


def theirs(twin, prompt: list[int], eos_id: int | list[int], new: int) -> list[int]:
    """transformers' greedy continuation, without the end token."""
    ids, ends = torch.tensor([prompt]), eos_id if isinstance(eos_id, list) else [eos_id]
    with torch.no_grad():
        out = twin.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new,
            eos_token_id=None if eos_id == NEVER else eos_id, pad_token_id=0,
        )[0, len(prompt):].tolist()  # fmt: skip
    return out[:-1] if out and out[-1] in ends else out


def an_end_token(outputs) -> int:
    """A token that some outputs come to early, others late or never."""

    def ends(token):
        return {output.index(token) if token in output else NEW for output in outputs}

    return max({token for output in outputs for token in output}, key=lambda token: len(ends(token)))


# ---- against transformers ----


def test_token_for_token_what_transformers_generates(model, plain):
    twin = transformers_twin(model)
    twin.generation_config.eos_token_id = None
    for prompt, output in zip(PROMPTS, plain, strict=True):
        assert output == theirs(twin, prompt, NEVER, NEW)
    assert len({token for output in plain for token in output}) > 10  # no model that repeats one token


def test_stops_where_transformers_stops(model, plain):
    eos = an_end_token(plain)
    twin = transformers_twin(model)
    decoding = generate(model, PROMPTS, eos, NEW, batch_size=3)
    assert decoding.outputs == [theirs(twin, prompt, eos, NEW) for prompt in PROMPTS]
    assert decoding.truncated == [eos not in output for output in plain]
    assert len(set(decoding.truncated)) == 2  # some ended, some did not


def test_stops_at_every_end_token(model, plain):
    """Several are given, or one that the model's configuration names among several."""
    ends = [an_end_token(plain), plain[0][3]]
    twin = transformers_twin(model)
    expected = [theirs(twin, prompt, ends, NEW) for prompt in PROMPTS]
    decoding = generate(model, PROMPTS, ends, NEW, batch_size=3)
    assert decoding.outputs == expected
    listed = Llama(replace(model.config, eos_token_id=tuple(ends)))
    listed.load_state_dict(model.state_dict())
    for end in ends:
        assert generate(listed.eval(), PROMPTS, end, NEW).outputs == expected
        assert expected != [theirs(twin, prompt, end, NEW) for prompt in PROMPTS]
    assert generate(listed, PROMPTS, NEVER, NEW).outputs == plain


def test_smollm2_generates_what_transformers_generates(smollm2):
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(smollm2)
    texts = ["The capital of France is", "Input: A mild fever followed the second dose.\nAnswer:"]
    prompts = [tokenizer.encode(text) for text in texts]
    twin = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    expected = [theirs(twin, prompt, tokenizer.eos_id, 12) for prompt in prompts]
    del twin
    assert generate(load_model(smollm2, torch.float32), prompts, tokenizer.eos_id, 12).outputs == expected


@pytest.mark.parametrize("batch_size", [1, 8])
def test_log_probabilities_are_those_of_the_logits(batch_size, model, plain):
    decoding = generate(model, PROMPTS, NEVER, NEW, batch_size, right(plain))
    for prompt, output, log_probs in zip(PROMPTS, plain, decoding.log_probs, strict=True):
        logits = model(torch.tensor([prompt + output]))[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[torch.arange(len(output)), output]
        torch.testing.assert_close(torch.tensor(log_probs), expected, rtol=1e-3, atol=1e-4)


# ---- grammars ----


class Free:
    """Allows every token but some at some places; perhaps takes back an early choice where one of them is wanted."""

    def __init__(self, forbidden: set[tuple[int, int]], back: tuple[int, int] | None = None):
        self.forbidden, self.back = frozenset(forbidden), back

    def start(self, index):
        return 0, self.forbidden

    def moves(self, state):
        place, forbidden = state
        return {token: (place + 1, forbidden) for token in range(97) if (place, token) not in forbidden}

    def withdraw(self, states, output, wanted):
        assert [place for place, _ in states] == list(range(len(output) + 1))
        assert (len(output), wanted) in states[-1][1]
        if self.back is None or self.back in states[-1][1]:
            return None
        return self.back[0], (self.back[0], states[-1][1] | {self.back})


class Reversed(Free):
    def moves(self, state):
        return dict(reversed(super().moves(state).items()))


@pytest.mark.parametrize("place", [0, 3, 6])
@pytest.mark.parametrize("drafted", [False, True])
def test_a_choice_that_is_taken_back_is_as_if_it_had_been_forbidden(place, drafted, model, plain):
    """Outputs, probabilities and what follows are those of a grammar that never allowed it."""
    forbidden, back = (6, plain[0][6]), (place, plain[0][place])
    drafter = (lambda _, output: plain[0][len(output) :]) if drafted else None
    options = {"batch_size": 2, "drafter": drafter}
    never = generate(model, PROMPTS[:1] * 3, NEVER, NEW, grammar=Free({forbidden, back}), **options)
    taken = generate(model, PROMPTS[:1] * 3, NEVER, NEW, grammar=Free({forbidden}, back), **options)
    assert taken.outputs == never.outputs != [plain[0]] * 3
    for ours, theirs_ in zip(taken.log_probs, never.log_probs, strict=True):
        assert ours == pytest.approx(theirs_, abs=1e-4)


def test_a_grammar_that_allows_the_choice_changes_nothing(plain, model):
    """Not even among equals."""
    blind = Llama(model.config)
    torch.nn.init.zeros_(blind.lm_head.weight)
    for network in (model, blind):
        free, under = (generate(network, PROMPTS[:2], NEVER, 8, grammar=grammar) for grammar in (None, Reversed(set())))
        assert free.outputs == under.outputs


# ---- side by side ----


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8, 64])
def test_outputs_do_not_depend_on_the_batch_size(batch_size, model, plain):
    assert generate(model, PROMPTS, NEVER, NEW, batch_size).outputs == plain
    eos = an_end_token(plain)
    expected = [output[: output.index(eos)] if eos in output else output for output in plain]
    assert generate(model, PROMPTS, eos, NEW, batch_size).outputs == expected


def test_outputs_are_in_the_order_of_the_prompts(model, plain):
    order = list(range(len(PROMPTS)))
    random.Random(0).shuffle(order)
    assert generate(model, [PROMPTS[i] for i in order], NEVER, NEW, 3).outputs == [plain[i] for i in order]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_each_prompt_has_its_limit(batch_size, model, plain):
    limits = [1, NEW, 3, 7, 1, 20, 2, 11]
    decoding = generate(model, PROMPTS, NEVER, limits, batch_size)
    assert decoding.outputs == [output[:limit] for output, limit in zip(plain, limits, strict=True)]
    assert decoding.truncated == [True] * len(PROMPTS)


def test_an_end_on_the_last_token_of_the_limit(model, plain):
    """The limit counts tokens of the output; the end token itself needs a place behind them."""
    output = plain[0]
    eos = output[5]
    first = output.index(eos)
    for limit, truncated in ((first + 1, False), (first, True)):
        if limit:
            decoding = generate(model, PROMPTS[:1], eos, limit)
            assert decoding.outputs == [output[:first]]
            assert decoding.truncated == [truncated]


def test_an_end_at_once_is_an_empty_output(model, plain):
    decoding = generate(model, PROMPTS[:2], plain[0][0], NEW)
    assert decoding.outputs[0] == [] and decoding.truncated[0] is False


def test_progress_adds_up(model):
    seen = []
    generate(model, PROMPTS, NEVER, 3, 3, progress=seen.append)
    assert sum(seen) == len(PROMPTS) and all(n > 0 for n in seen)


def test_no_prompts(model):
    decoding = generate(model, [], NEVER, 5)
    assert (decoding.outputs, decoding.truncated, decoding.forward_passes) == ([], [], 0)


def test_what_cannot_be_decoded_is_refused(model):
    for prompts, limits in (([[5], []], 3), ([[5]], 0), ([[5], [6]], [3, 0])):
        with pytest.raises(ValueError, match="every prompt needs a token and every limit must be at least 1"):
            generate(model, prompts, NEVER, limits)
    with pytest.raises(ValueError):
        generate(model, [[5], [6]], NEVER, [3])


def test_it_leaves_the_model_alone_and_runs_in_half_precision():
    model = tiny_model()
    inject_lora(model, "all", 4)
    model.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16):
        assert len(generate(model, PROMPTS, NEVER, 4).outputs) == len(PROMPTS)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- drafts ----


def right(outputs):
    return lambda index, output: outputs[index][len(output) : len(output) + 6]


def wrong(outputs):
    return lambda index, output: [(token + 1) % 97 for token in outputs[index][len(output) : len(output) + 6]]


def half(outputs):
    """Right for two tokens, then wrong."""

    def draft(index, output):
        return [*outputs[index][len(output) : len(output) + 2], 3, 4, 5]

    return draft


def noise(outputs):
    draw = random.Random(0)
    return lambda index, output: [draw.randrange(97) for _ in range(draw.randrange(9))]


def endless(outputs):
    return lambda index, output: tuple(outputs[index][len(output) :]) + (7,) * 200  # beyond every limit


@pytest.mark.parametrize("drafter", [right, wrong, half, noise, endless])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_drafts_change_nothing_but_the_number_of_passes(drafter, batch_size, model, plain):
    eos = an_end_token(plain)
    for end in (NEVER, eos):
        undrafted = generate(model, PROMPTS, end, NEW, batch_size)
        drafted = generate(model, PROMPTS, end, NEW, batch_size, drafter(plain))
        assert drafted.outputs == undrafted.outputs
        assert drafted.truncated == undrafted.truncated
        if drafter is wrong:
            assert drafted.forward_passes == undrafted.forward_passes
        elif drafter is not noise:
            assert drafted.forward_passes < undrafted.forward_passes


def test_a_right_draft_of_six_saves_six_of_seven_passes(model, plain):
    drafted = generate(model, PROMPTS[:1], NEVER, 21, drafter=right(plain))
    assert generate(model, PROMPTS[:1], NEVER, 21).forward_passes == 21
    assert drafted.forward_passes == drafted.row_passes == 3


def test_a_draft_that_foresees_the_end(model, plain):
    eos = an_end_token(plain)
    index = next(i for i, output in enumerate(plain) if eos in output[2:] and eos not in output[:2])
    drafted = generate(model, [PROMPTS[index]], eos, NEW, drafter=lambda _, output: plain[index][len(output) :])
    assert drafted.outputs == [plain[index][: plain[index].index(eos)]]
    assert drafted.truncated == [False] and drafted.forward_passes == 1
