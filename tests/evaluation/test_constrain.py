"""The constraint: what it allows is what `ner.render` can write, and nothing leads into a dead end."""

import random
import re

import pytest
import torch
from helpers import tiny_model

from llamalora.cli import UsageError
from llamalora.corpus.documents import Sentence, Span, sentences_of
from llamalora.corpus.read import find_splits, read_documents
from llamalora.distributed.world import join_world
from llamalora.evaluation.answer import answer_sentences, new_tokens
from llamalora.evaluation.constrain import Constraint, State
from llamalora.evaluation.draft import SourceDrafter
from llamalora.evaluation.generate import generate
from llamalora.runs.setup import check_constraint
from llamalora.task.definition import Task
from llamalora.task.parse import parse
from llamalora.task.prompt import render_answer, render_prompt
from llamalora.task.tagging import tag_places
from llamalora.task.tokenizer import load_tokenizer

TASKS = {
    "all labels": Task("tagging", ("Disease", "Chemical"), per_label=False),
    "one label": Task("tagging", ("Disease",), per_label=True),
}
SOURCES = (
    "A mild fever followed the second dose of pindolol, but no rash.",
    "x",
    "two  spaces,   three and one behind ",
    "Naïve T-cells (CD4⁺) — 5 µg/mL, β-blockers; 漢字かな 🙂 e\u0301.",
    "literal [Disease]tags[/Disease] and @@fever## [/Chemical] [[Disease] @@@ ### [Dis",
    "[brackets] [ [/ ]] @ # @@",
    "🙂🙂[🙂]",
)


@pytest.fixture(scope="module", params=["tiny_sentencepiece", "tiny_bytelevel"])
def tokenizer(request):
    return load_tokenizer(request.getfixturevalue(request.param))


@pytest.fixture(params=TASKS)
def task(request):
    return TASKS[request.param]


def random_spans(task: Task, text: str, draw: random.Random) -> list[Span]:
    """Mentions that neither overlap nor touch, nor begin or end with whitespace, tags where they can stand."""
    places = tag_places(task, text)
    starts = [i for i in range(len(text)) if i in places and not text[i].isspace()]
    ends = [i + 1 for i in range(len(text)) if i + 1 in places and not text[i].isspace()]
    spans, position = [], 0
    while (after := [i for i in starts if i >= position]) and draw.random() > 0.2:
        start = draw.choice(after[:8])
        end = draw.choice([end for end in ends if end > start][:9])
        spans.append(Span(start, end, draw.choice(task.labels)))
        position = end + 1
    return spans


def follow(constraint: Constraint, ids: list[int], index: int = 0) -> bool:
    """Whether the constraint allows an output and its end."""
    state = constraint.start(index)
    for token in [*ids, constraint.eos_id]:
        moves = constraint.moves(state)
        if token not in moves:
            return False
        state = moves[token]
    return True


@pytest.mark.parametrize("text", SOURCES)
def test_everything_that_render_writes_is_allowed(text, tokenizer, task):
    constraint, draw = Constraint(tokenizer, task, [text], [3000]), random.Random(0)
    singles = {s: token for token, s in enumerate(tokenizer.spellings) if s and len(s) == 1}
    for _ in range(20):
        written = render_answer(task, text, random_spans(task, text, draw))
        assert parse(task, text, written).exact_copy
        assert follow(constraint, tokenizer.encode_continuation(" " + written))
        assert follow(constraint, [singles[bytes([byte])] for byte in (" " + written).encode()])


@pytest.mark.parametrize(
    "output",
    [
        "a fever and chill",  # an end too early
        "a fever and chills.",  # text behind the source
        "a fever  and chills",
        "a [Disease]fever and chills",  # no end with an open tag
        "a [Disease]fever[/Chemical] and chills",
        "a [Disease][Chemical]fever[/Chemical][/Disease] and chills",
        "a [Disease] fever[/Disease] and chills",
        "a [Disease]fever [/Disease]and chills",
        "a [Disease][/Disease]fever and chills",
        "a [Disease]fe[/Disease]ver and chills",
        "a fe[Disease]ver[/Disease] and chills",
        "a [Disease]f[/Disease][Disease]ever[/Disease] and chills",
        "a [disease]fever[/disease] and chills",
        "a fever[/Disease] and chills",
        "a fever and chills[Disease]",
    ],
)
def test_nothing_else_is_allowed(output, tokenizer):
    constraint = Constraint(tokenizer, TASKS["all labels"], ["a fever and chills"], [99])
    legal = " a [Disease]fever[/Disease] and [Chemical]chills[/Chemical]"
    assert follow(constraint, tokenizer.encode_continuation(legal))
    assert not follow(constraint, tokenizer.encode_continuation(" " + output))


def sentence(written: str) -> Sentence:
    """What an answer says, as a sentence with its mentions."""
    text = re.sub(r"\[/?Disease\]", "", written)
    return Sentence("1", 0, text, parse(TASKS["all labels"], text, written).spans)


@pytest.mark.parametrize(
    "written, shown",
    [
        ("the [Disease]5-HT[/Disease]6 receptor", "a [Disease]5-HT[/Disease]2 receptor"),
        ("ein Herz[Disease]infarkt[/Disease]", "der Hirn[Disease]infarkt[/Disease]"),
        ("[Disease]x[/Disease][Disease]-y[/Disease]", "[Disease]a[/Disease][Disease]/b[/Disease]"),
    ],
)
def test_what_known_sentences_show_is_legal(written, shown, tokenizer):
    """Ends inside words, where the same string was tagged so, and mentions that touch."""
    ids, text = tokenizer.encode_continuation(" " + written), sentence(written).text
    alike = sentence(shown.replace("HT", "H").replace("infarkt", "inf").replace("a[/Disease]", "a[/Disease] "))
    for known, legal in (([sentence(shown)], True), ([alike], False), ([], False)):
        assert follow(Constraint(tokenizer, TASKS["all labels"], [text], [99], known), ids) == legal


def test_letters_without_case_are_words(tokenizer):
    constraint = Constraint(tokenizer, TASKS["all labels"], ["漢字かな", "ไข้สูง"], [99, 99])
    assert follow(constraint, tokenizer.encode_continuation(" 漢[Disease]字か[/Disease]な"))
    assert follow(constraint, tokenizer.encode_continuation(" [Disease]ไข้[/Disease]สูง"), 1)


END = ""


@pytest.mark.parametrize(
    "written, wanted, kept",
    [
        ("a [Disease]fever/ache and chills", END, "a "),
        ("a [Disease]fever/ache ", "[", "a "),
        ("a [Disease]fever/[", "C", "a "),  # what it meant by the bracket is another mention, not the end of this one
        ("a [Disease]fever[/Disease]/ache [Disease]and chills", END, "a [Disease]fever[/Disease]/ache "),
        ("a [Disease]fever/[", "x", None),
        ("a [Disease]fe", "[", None),  # inside a word there is no other mention either
        ("a [Disease]fe", "x", None),
        ("a [Disea", "[", None),
        ("a fever/ache and chills", "x", None),
    ],
)
def test_a_mention_that_the_model_gives_up_is_withdrawn(written, wanted, kept, tokenizer):
    """It is not closed where the model would have ended the answer or begun another mention."""
    text = "a fever/ache and chills"
    singles = {s: token for token, s in enumerate(tokenizer.spellings) if s and len(s) == 1}
    constraint = Constraint(tokenizer, TASKS["all labels"], [text], [99])

    def behind(written: str, state: State) -> list[State]:
        states = [state]
        for byte in written.encode():
            states.append(constraint.moves(states[-1])[singles[bytes([byte])]])
        return states

    output = [singles[bytes([byte])] for byte in f" {written}".encode()]
    token = singles[wanted.encode()] if wanted else tokenizer.eos_id
    states = behind(" " + written, constraint.start(0))
    assert token not in constraint.moves(states[-1])
    back = constraint.withdraw(states, output, token)
    if kept is None:
        assert back is None
        return
    length, state = back
    assert tokenizer.decode(output[:length]) == kept
    assert singles[b"["] not in constraint.moves(state) and singles[b"["] in constraint.moves(states[length])
    rest = text[len(kept.replace("[Disease]", "").replace("[/Disease]", "")) :]
    assert tokenizer.eos_id in constraint.moves(behind(rest, state)[-1])
    tagged = rest.replace("chills", "[Chemical]chills[/Chemical]")
    assert tokenizer.eos_id in constraint.moves(behind(tagged, state)[-1])


@pytest.mark.parametrize("text", [*SOURCES, "gave ([-]-[5aR,11bS]-4,5-propyl) and [ASA]), at once"])
@pytest.mark.parametrize("seed", range(5))
def test_who_gives_up_one_mention_after_another_comes_to_an_end(text, seed, tokenizer, task):
    """No mention is opened again where one was withdrawn, also where the bracket may be the source's own."""
    constraint = Constraint(tokenizer, task, [text], [9 * len(text.encode())])
    begin = constraint.tags[0][0][:1]
    opening = [token for spelling, tokens in constraint.tokens.items() for token in tokens if spelling.strip() == begin]
    states, output = [constraint.start(0)], []
    for _ in range(20_000):
        moves = constraint.moves(states[-1])
        draw = random.Random(f"{seed} {output}")  # as greedy decoding would, it always wants the same behind the same
        wanted = draw.choice([*sorted(moves), *opening, tokenizer.eos_id])
        if wanted not in moves and (back := constraint.withdraw(states, output, wanted)):
            length, state = back
            del output[length:], states[length:]
            states.append(state)
            continue
        token = wanted if wanted in moves else draw.choice(sorted(moves))
        if token == tokenizer.eos_id:
            break
        output.append(token)
        states.append(moves[token])
    else:
        pytest.fail(f"still at {tokenizer.decode(output)!r}")
    assert parse(task, text, tokenizer.decode(output)).exact_copy


@pytest.mark.parametrize("text", ["BRCA1/BRCA2/TP53 testing", "发热、头痛和皮疹", "a b.c"])
@pytest.mark.parametrize("name", TASKS)
def test_there_is_room_for_an_answer_in_which_every_word_is_marked(text, name, tokenizer):
    task = TASKS[name]
    spans = [Span(*word.span(), task.labels[0]) for word in re.finditer(r"[a-zA-Z0-9]+|[\u4e00-\u9fff]", text)]
    answer = tokenizer.encode_continuation(" " + render_answer(task, text, spans))
    assert len(answer) < new_tokens(tokenizer, task, text, 9999)
    assert new_tokens(tokenizer, task, text, 9) == 9


def test_a_vocabulary_that_cannot_spell_the_source_is_a_dead_end():
    class Lacking:
        eos_id, vocab_size, spellings = 0, 4, [None, b" ", b"a", b"b"]

    constraint = Constraint(Lacking(), TASKS["one label"], [" abc"], [20])
    decoding = generate(tiny_model(vocab_size=4), [[1]], 0, 20, grammar=constraint)
    assert len(decoding.outputs[0]) <= 4 and decoding.truncated == [True]


def test_a_tokenizer_that_changes_the_spaces_beside_tags_is_refused(tiny_bytelevel, tmp_path, tokenizer):
    """An added tag that takes in the space before it: it could never be written as it was trained."""
    from transformers import AddedToken, AutoTokenizer

    check_constraint(TASKS["all labels"], tokenizer)
    theirs = AutoTokenizer.from_pretrained(tiny_bytelevel)
    theirs.add_tokens([AddedToken("[Chemical]", lstrip=True)])
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"--constrain: .*\(' x \[Chemical\]yz\[/Chemical\] w' comes back as ' x\["):
        check_constraint(TASKS["all labels"], load_tokenizer(tmp_path))


# ---- decoding under it ----


@pytest.fixture(scope="module")
def model(tokenizer):
    """Untrained, so that it goes wherever the constraint lets it; long contexts, so that it comes to an end."""
    return tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=4096)


def decode(model, tokenizer, task, batch_size=32, drafted=False):
    prompts = [tokenizer.encode(render_prompt(task, text)) for text in SOURCES]
    drafter = SourceDrafter(tokenizer, task, SOURCES, risk=0.05) if drafted else None
    limits = [3 * len(text.encode()) + 40 for text in SOURCES]  # an untrained model would tag to no end
    grammar = Constraint(tokenizer, task, SOURCES, limits)
    return generate(model, prompts, tokenizer.eos_id, limits, batch_size, drafter, grammar)


def test_an_untrained_model_writes_the_source_with_legal_tags(model, tokenizer, task):
    decoding = decode(model, tokenizer, task)
    assert not any(decoding.truncated)
    for text, ids in zip(SOURCES, decoding.outputs, strict=True):
        parsed = parse(task, text, tokenizer.decode(ids))
        assert parsed.exact_copy and not parsed.unaligned and not parsed.not_in_source
        if "[Disease]" not in text and "@@" not in text:  # a literal tag beside a tag may be taken for it
            assert not parsed.unbalanced
            assert tokenizer.decode(ids) == render_answer(task, text, parsed.spans)
    assert any("[/" in tokenizer.decode(ids) or "##" in tokenizer.decode(ids) for ids in decoding.outputs[:4])


def test_drafts_and_batches_change_nothing(model, tokenizer, task):
    alone = decode(model, tokenizer, task, batch_size=1)
    for other in (decode(model, tokenizer, task, 3), decode(model, tokenizer, task, 32, drafted=True)):
        assert (other.outputs, other.truncated) == (alone.outputs, alone.truncated)
        for ours, theirs in zip(other.log_probs, alone.log_probs, strict=True):
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-3, atol=1e-4)


def test_log_probabilities_are_those_among_the_allowed(model, tokenizer):
    task, text = TASKS["all labels"], SOURCES[0]
    constraint = Constraint(tokenizer, task, [text], [3000])
    prompt = tokenizer.encode(render_prompt(task, text))
    decoding = generate(model, [prompt], tokenizer.eos_id, 3000, grammar=constraint)
    (output,), (log_probs,) = decoding.outputs, decoding.log_probs
    logits = model(torch.tensor([prompt + output]))[0, len(prompt) - 1 :]
    state = constraint.start(0)
    for row, token, log_prob in zip(logits, output, log_probs, strict=False):
        moves = constraint.moves(state)
        allowed = row[list(moves)].log_softmax(-1)
        assert log_prob == pytest.approx(allowed.max().item(), abs=1e-4)
        assert log_prob == pytest.approx(allowed[list(moves).index(token)].item(), abs=1e-4)
        state = moves[token]


def test_the_answers_are_exact_copies(model, tokenizer, task):
    asked = [Sentence("1", place, text, ()) for place, text in enumerate(SOURCES)]
    with join_world() as world:
        answers, _ = answer_sentences(model, tokenizer, task, asked, world, quiet=True, constrain=True)
    for item in answers:
        assert item.parsed.exact_copy and not item.parsed.truncated
        assert not item.parsed.not_in_source and item.confidence.keys() == set(item.parsed.spans)


def test_gold_answers_are_allowed_with_a_real_vocabulary(smollm2, bc5cdr):
    """Its tokens span the boundaries of tags ("]-")."""
    tokenizer, task = load_tokenizer(smollm2), TASKS["all labels"]
    documents = read_documents(find_splits(bc5cdr)["dev"])[:60]
    first = [next(iter(sentences_of(document))) for document in documents]
    constraint = Constraint(tokenizer, task, [sentence.text for sentence in first], [2000] * len(first))
    for index, sentence in enumerate(first):
        gold = render_answer(task, sentence.text, sentence.spans)
        assert follow(constraint, tokenizer.encode_continuation(" " + gold), index)
