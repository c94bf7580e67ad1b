"""Drafts: what they foresee, and what they learn from the answers."""

import random
import re

import pytest

from llamalora.corpus.documents import Sentence, Span
from llamalora.evaluation.draft import SourceDrafter
from llamalora.task.definition import Task
from llamalora.task.tokenizer import load_tokenizer

TASK = Task("tagging", ("Disease", "Chemical"), per_label=False)
TEXT = "A mild fever followed the second dose of pindolol, but no rash. Naïve café-style, 漢字 too."
ANSWER = TEXT.replace("fever", "[Disease]fever[/Disease]").replace("pindolol", "[Chemical]pindolol[/Chemical]")


@pytest.fixture(scope="module", params=["tiny_sentencepiece", "tiny_bytelevel"])
def tokenizer(request):
    return load_tokenizer(request.getfixturevalue(request.param))


def drafted(drafter, tokenizer, written: str, index: int = 0) -> str:
    """The text that is proposed behind an output."""
    output = tokenizer.encode_continuation(" " + written) if written else []
    return tokenizer.decode([*output, *drafter(index, output)]).removeprefix(written)


def replay(drafter, ids: list[int], index: int = 0) -> int:
    """The passes that it takes to write an output whose drafts are verified."""
    done = passes = 0
    while done < len(ids):
        agreed = 0
        for ours, theirs in zip(drafter(index, ids[:done]), ids[done:], strict=False):
            if ours != theirs:
                break
            agreed += 1
        done += agreed + 1
        passes += 1
    return passes


def test_it_starts_with_the_source(tokenizer):
    drafter = SourceDrafter(tokenizer, TASK, [TEXT], risk=0.01)
    text = drafted(drafter, tokenizer, "")
    assert len(text) > 20 and TEXT.startswith(text)


def test_known_sentences_tell_what_is_tagged(tokenizer):
    """Whatever their order, and a label of another task tells that its strings are not tagged."""
    spans = [Span(TEXT.index(word), TEXT.index(word) + len(word), label)
             for word, label in (("fever", "Disease"), ("rash", "Gene"), ("pindolol", "Chemical"))]  # fmt: skip
    known = [Sentence("d", 0, TEXT, tuple(sorted(spans, key=lambda span: span.start)))] * 4
    ids = tokenizer.encode_continuation(" " + ANSWER)
    drafters = [SourceDrafter(tokenizer, TASK, [TEXT], 0.05, 99, sentences) for sentences in ((), known)]
    unaware, aware = (replay(drafter, ids) for drafter in drafters)
    assert aware < unaware
    assert drafted(SourceDrafter(tokenizer, TASK, [TEXT], 0.05, 99, known), tokenizer, "").startswith(ANSWER[:60])


def test_a_risk_of_one_proposes_nothing_and_less_risk_is_more_careful(tokenizer):
    lengths = [len(SourceDrafter(tokenizer, TASK, [TEXT], risk)(0, [])) for risk in (0.01, 0.3, 0.6, 0.999)]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1] == 0
    assert len(SourceDrafter(tokenizer, TASK, [TEXT], 0.01, length=3)(0, [])) == 3


def test_it_completes_what_has_begun(tokenizer):
    """At every token of an answer: a tag that has begun, or else the source, as far as the next tag."""
    ids = tokenizer.encode_continuation(" " + ANSWER)
    inside = 0
    for count in range(1, len(ids)):
        written = tokenizer.decode(ids[:count])
        if "\ufffd" in written:
            continue  # half a character
        rest = ANSWER[len(written) :]
        text = drafted(SourceDrafter(tokenizer, TASK, [TEXT], risk=0.001), tokenizer, written)
        if re.search(r"\[(D|C|/)[^]]*$", written):
            inside += 1
            assert text.startswith(rest[: rest.index("]") + 1])
        elif not re.search(r"\[$|\]\w*$", written):
            before = rest.split("[")[0].rpartition(" ")[0]  # the word beside a tag is cut otherwise
            assert text.startswith(before) or before.startswith(text)
    assert inside


def test_it_finds_its_place_behind_a_slip(tokenizer):
    drafter = SourceDrafter(tokenizer, TASK, [TEXT], risk=0.01)
    assert drafted(drafter, tokenizer, "A mild fever follows a second dose").startswith(" of pindolol")


def test_an_answer_that_leaves_its_source_is_not_drafted_until_it_is_back(tokenizer):
    """For a model that repeated itself 18 tokens were drafted for each that it wrote."""
    drafter = SourceDrafter(tokenizer, TASK, [TEXT], risk=0.3)
    ids = tokenizer.encode_continuation(" A mild" + " no" * 20 + " A mild fever follows a second dose")
    start, left = (len(tokenizer.encode_continuation(text)) for text in (" A mild", " A mild" + " no" * 20))
    proposed = [len(drafter(0, ids[:end])) for end in range(len(ids))]
    assert proposed[start] and not any(proposed[start + 8 : left]) and proposed[-1]


def test_the_first_guess_is_a_mention_of_one_word(tokenizer):
    drafter = SourceDrafter(tokenizer, TASK, [TEXT], risk=0.01)
    assert drafted(drafter, tokenizer, "A mild [Disease]").startswith("fever[/Disease] foll")


def test_it_learns_what_is_tagged(tokenizer):
    """The second answer about the same things needs fewer passes, since their tags are foreseen."""
    drafter = SourceDrafter(tokenizer, TASK, [TEXT, TEXT], risk=0.01)
    ids = tokenizer.encode_continuation(" " + ANSWER)
    first, second = replay(drafter, ids, 0), replay(drafter, ids, 1)
    assert second < first < len(ids) / 2


def test_it_follows_an_answer_that_is_taken_back(tokenizer):
    drafter, fresh = (SourceDrafter(tokenizer, TASK, [TEXT], risk=0.01) for _ in range(2))
    longer = tokenizer.encode_continuation(" A mild [Disease]fever followed the [Chemical]second")
    shorter = tokenizer.encode_continuation(" A mild fever followed")
    drafter(0, longer)
    assert drafter(0, shorter) and drafter(0, shorter) == fresh(0, shorter)


def test_noise_does_no_harm(tokenizer):
    """Any output may come, also half characters and tokens that are no text."""
    draw = random.Random(0)
    drafter = SourceDrafter(tokenizer, TASK, [TEXT] * 50, risk=0.01)
    for index in range(50):
        output: list[int] = []
        for _ in range(20):
            proposed = drafter(index, output)
            assert all(0 <= token < tokenizer.vocab_size for token in proposed)
            output += proposed[: draw.randrange(3)] + [draw.randrange(tokenizer.vocab_size + 5)]
