"""`parse` is the inverse of `render`, and what it makes of everything else that a model may write."""

import dataclasses
import json
import random
import re
import time

import pytest

from llamalora.corpus.documents import Sentence, Span, sentences_of
from llamalora.corpus.read import find_splits, read_documents
from llamalora.task import align
from llamalora.task.definition import FORMATS, Parsed, Task, listed_labels
from llamalora.task.extraction import locate
from llamalora.task.parse import join_labels, parse
from llamalora.task.prompt import draw_demonstrations, render_answer, render_prompt

BOTH = ("Disease", "Chemical")
ALL = Task("tagging", BOTH, per_label=False)
ONE = Task("tagging", ("Disease",), per_label=True)
LIST = Task("extraction", BOTH, per_label=False)
LIST_ONE = Task("extraction", ("Disease",), per_label=True)
LABELS = [(("Disease",), True), (("Chemical",), True), (BOTH, False), (BOTH[::-1], False)]
TASKS = [Task(format, *labels) for format in ("tagging", "extraction") for labels in LABELS]

SOURCE = "patients with capillary leak syndrome died"
LEAK = [("capillary leak syndrome", "Disease")]


def spans_of(text: str, *found: tuple[str, str]) -> tuple[Span, ...]:
    """The first places of (string, label) pairs."""
    places = ((text.index(string), string, label) for string, label in found)
    return tuple(sorted(Span(start, start + len(string), label) for start, string, label in places))


def found(parsed: Parsed, text: str) -> list[tuple[str, str]]:
    return [(text[span.start : span.end], span.label) for span in parsed.spans]


# ---- the task ----


@pytest.mark.parametrize(
    "format, labels, per_label, message",
    [
        ("tags", BOTH, False, "'tagging' or 'extraction'"),
        ("tagging", BOTH, True, "exactly one label"),
        ("tagging", (), False, "one or more"),
        ("tagging", "Disease", False, "tuple"),
        ("tagging", ("Disease", "Disease"), False, "different"),
        ("tagging", ("Disease", " "), False, "must be words"),
        ("tagging", ("",), False, "must be words"),
    ],
)
def test_a_wrong_task_is_refused(format, labels, per_label, message):
    with pytest.raises(ValueError, match=message):
        Task(format, labels, per_label)


def test_task_through_json():
    task = Task("extraction", BOTH, False, True, (("a fever", "Disease: fever"), ("none", "")))
    assert Task.from_dict(json.loads(json.dumps(dataclasses.asdict(task)))) == task
    assert Task.from_dict({"format": "tagging", "labels": ["Disease"], "per_label": True}) == ONE
    with pytest.raises(ValueError, match="unknown fields of a task: shots"):
        Task.from_dict({**dataclasses.asdict(task), "shots": 1})


# ---- labels ----


def test_any_label_has_a_name_of_its_own_in_the_answers():
    """Labels that the formats can hold as they are keep their spelling; before, the others were refused."""
    assert Task("tagging", (*BOTH, "PER.NAM", "Gene or product", "C++", "Disease (rare)"), False).names == {
        label: label for label in (*BOTH, "PER.NAM", "Gene or product", "C++", "Disease (rare)")
    }
    odd = ("a;b", "T047,T033", "T047_T033", "a, b", "[x]", "/x", "x", "a_b")
    names = Task("tagging", odd, False).names
    assert names == {
        "a;b": "a_b_2",  # since `a_b` is a label, too
        "T047,T033": "T047_T033_2",
        "T047_T033": "T047_T033",
        "a, b": "a_b_3",
        "[x]": "_x_",
        "/x": "_x",
        "x": "x",
        "a_b": "a_b",
    }


@pytest.mark.parametrize("label", ["T047,T033", "C++", "Disease (rare)", "a;b", "[x]", "/Disease", "a: b"])
def test_any_label_is_written_and_read_back(label):
    labels = ("Disease", label, "C")
    spans = spans_of(SOURCE, ("patients", label), ("leak syndrome", "C"), ("died", "Disease"))
    for task in (Task("tagging", labels, False), Task("extraction", labels, False)):
        parsed = parse(task, SOURCE, render_answer(task, SOURCE, spans))
        assert parsed.spans == spans and not parsed.unbalanced
    for task in (Task("tagging", (label,), True), Task("extraction", (label,), True)):
        assert parse(task, SOURCE, render_answer(task, SOURCE, spans)).spans == spans[:1]
    told = Task("extraction", labels, False, instruction=True)
    assert f"; {told.names[label]}: entity, entity; C: entity" in render_prompt(told, "x")


@pytest.mark.parametrize(
    "text, labels",
    [
        ("Disease,Chemical", ("Disease", "Chemical")),
        (" Chemical , Disease,", ("Chemical", "Disease")),
        ("T047,T033", ("T047,T033",)),
        ("T047, T033", ("T047", "T033")),
        ("C++,T047,T033,T033", ("C++", "T047,T033", "T033")),
        ("Gene,Disease", ("Gene", "Disease")),  # unknown ones are for the caller to refuse
        (",", ()),
    ],
)
def test_a_list_of_labels_may_hold_labels_with_commas(text, labels):
    assert listed_labels(text, ("Disease", "Chemical", "T047", "T033", "T047,T033", "C++")) == labels


# ---- prompts ----


def test_input_only():
    for task in TASKS:
        assert render_prompt(task, "a [b] c") == "Input: a [b] c\nAnswer:"


def test_figure_2():
    shown = (("Mesna helps", "@@Mesna## helps"), ("It helps", "It helps"))
    assert render_prompt(Task("tagging", ("Chemical",), True, True, shown), "x y") == (
        "The task is to identify Chemical entities in the input. Please rewrite the input text and surround "
        "the start and end of Chemical entities with @@ and ##, respectively.\n"
        "Input: Mesna helps\nAnswer: @@Mesna## helps\nInput: It helps\nAnswer: It helps\nInput: x y\nAnswer:"
    )


def test_instruction_and_demonstrations_are_independent():
    for task in TASKS:
        shown = dataclasses.replace(task, demonstrations=(("a", "b"),))
        told = dataclasses.replace(task, instruction=True)
        both = dataclasses.replace(shown, instruction=True)
        plain = render_prompt(task, "x")
        assert render_prompt(shown, "x") == "Input: a\nAnswer: b\n" + plain
        instruction = render_prompt(told, "x").removesuffix(plain)
        assert render_prompt(both, "x") == instruction + render_prompt(shown, "x")
        assert instruction.count("\n") == 1
        names = " and ".join(task.labels)
        assert instruction.startswith(f"The task is to identify {names} entities in the input. Please ")


def test_demonstrations():
    sentences = [Sentence("1", 0, f"word{k} fever", (Span(0, 5, "Gene"),)) for k in range(20)]
    sentences += [Sentence("2", 0, f"x{k} fever", (Span(3, 8, "Disease"),)) for k in range(5)]
    drawn = draw_demonstrations(ALL, sentences, 4, seed=1)
    assert drawn == draw_demonstrations(ALL, sentences, 4, seed=1)
    assert drawn != draw_demonstrations(ALL, sentences, 4, seed=2)
    for text, answer in drawn:
        assert text[0] == "x" and answer == text.replace("fever", "[Disease]fever[/Disease]")
    assert len(set(draw_demonstrations(ALL, sentences, 25, seed=1))) == 25
    assert draw_demonstrations(ALL, sentences, 0, seed=1) == ()
    with pytest.raises(ValueError, match="26 demonstrations from 25"):
        draw_demonstrations(ALL, sentences, 26, seed=1)


# ---- render ----


def test_table_6():
    text = "Mesna significantly reduces IFO 's genotoxicity"
    spans = spans_of(text, ("Mesna", "Chemical"), ("IFO", "Chemical"), ("genotoxicity", "Disease"))
    expected = {
        "tagging": {
            "Disease": "Mesna significantly reduces IFO 's @@genotoxicity##",
            "Chemical": "@@Mesna## significantly reduces @@IFO## 's genotoxicity",
            "all": "[Chemical]Mesna[/Chemical] significantly reduces [Chemical]IFO[/Chemical] 's "
            "[Disease]genotoxicity[/Disease]",
        },
        "extraction": {
            "Disease": "genotoxicity",
            "Chemical": "Mesna, IFO",
            "all": "Disease: genotoxicity; Chemical: Mesna, IFO",
        },
    }
    for format, answers in expected.items():
        for name, answer in answers.items():
            task = Task(format, BOTH if name == "all" else (name,), name != "all")
            assert render_answer(task, text, spans) == answer
            parsed = parse(task, text, answer)
            assert parsed.spans == tuple(span for span in spans if span.label in task.labels)
            assert parsed.exact_copy and not (parsed.unbalanced or parsed.not_in_source or parsed.unaligned)


def test_render_lists_a_string_once_and_omits_empty_labels():
    text = "fever, then rash, then fever, without Fever"
    spans = [Span(12, 16, "Disease"), Span(0, 5, "Disease"), Span(23, 28, "Disease")]
    assert render_answer(LIST, text, spans) == "Disease: fever, rash"
    assert render_answer(LIST, text, []) == render_answer(LIST_ONE, text, []) == ""
    assert render_answer(LIST, text, [Span(0, 5, "Gene")]) == ""
    assert render_answer(ALL, text, [Span(0, 5, "Gene")]) == text


@pytest.mark.parametrize(
    "text, strings",
    [
        ("\U0001f922 após naüsea \U0001f468\u200d\u2695\ufe0f", ["naüsea", "\U0001f468\u200d\u2695\ufe0f"]),
        ("e\u0301mesis e\u0301", ["e\u0301mesis"]),
        ("高血压患者使用阿司匹林。", ["高血压", "阿司匹林"]),
        ("[3H]-x [Disease-like] @ # @ [ ] ]]", ["[3H]-x", "[ ]"]),
        ("x", ["x"]),
        ("I\u0307stanbul ISTANBUL ß", ["I\u0307stanbul", "ß"]),
    ],
)
def test_offsets_are_code_points(text, strings):
    spans = spans_of(text, *((string, "Disease") for string in strings))
    for task in (ONE, ALL):
        assert parse(task, text, render_answer(task, text, spans)).spans == spans
    for task in (LIST, LIST_ONE):
        parsed = parse(task, text, render_answer(task, text, spans))
        assert set(found(parsed, text)) == {(string, "Disease") for string in strings}


# ---- parse: tagging, the policy ----


@pytest.mark.parametrize(
    "task, output, expected, flags",
    [
        # unclosed at the end: dropped, flagged; a closed one stays
        (ALL, "patients with [Disease]capillary leak syndrome died", [], {"unbalanced", "exact_copy"}),
        (
            ALL,
            "[Chemical]patients[/Chemical] with [Disease]capillary leak syndrome died",
            [("patients", "Chemical")],
            {"unbalanced", "exact_copy"},
        ),
        (ONE, "patients with @@capillary @@leak## syndrome died", [("leak", "Disease")], {"unbalanced", "exact_copy"}),
        # a stray closer is ignored
        (ALL, "patients with capillary[/Disease] leak syndrome died", [], {"unbalanced", "exact_copy"}),
        (
            ONE,
            "patients with @@capillary## leak## syndrome died",
            [("capillary", "Disease")],
            {"unbalanced", "exact_copy"},
        ),
        # nested: the outer stays
        (
            ALL,
            "[Disease]patients with [Chemical]capillary[/Chemical] leak[/Disease] syndrome died",
            [("patients with capillary leak", "Disease")],
            {"exact_copy"},
        ),
        (ONE, "patients with @@capillary @@leak## syndrome## died", LEAK, {"exact_copy"}),
        (
            ALL,
            "[Disease]patients with [Chemical]capillary leak[/Disease] syndrome died",
            [("patients with capillary leak", "Disease")],
            {"unbalanced", "exact_copy"},
        ),
        # a closer of another type: the opener's
        (ALL, "patients with [Disease]capillary leak syndrome[/Chemical] died", LEAK, {"unbalanced", "exact_copy"}),
        # empty marks mean nothing
        (ALL, "patients [Disease][/Disease]with [Disease] [/Disease]capillary leak syndrome died", [], set()),
        # only the exact tags of the task are tags
        (ALL, "patients with [disease]capillary leak syndrome[/disease] died", [], set()),
        (ALL, "patients with @@capillary leak syndrome## died", [], set()),
        (ONE, "patients with [Disease]capillary leak syndrome[/Disease] died", [], set()),
        # whitespace around and inside
        (ALL, " \n patients with [Disease]capillary leak syndrome[/Disease] died\n", LEAK, {"exact_copy"}),
        (ALL, "patients  with[Disease] capillaryleak\tsyndrome [/Disease] died", LEAK, set()),
        # words changed inside, before and after; words left out; words added
        (ALL, "patients with [Disease]cavity leak syndrome[/Disease] died", LEAK, set()),
        (ALL, "patient had [Disease]capillary leak syndrome[/Disease] dead", LEAK, set()),
        (ALL, "[Disease]Capillary leak syndromes[/Disease] died", LEAK, set()),
        (ALL, "[Disease]leak syndrome[/Disease]", [("leak syndrome", "Disease")], set()),
        (ALL, "patients with a [Disease]capillary leak syndrome[/Disease] died of it", LEAK, set()),
        (ALL, "patients with [Disease]capilary leak[/Disease] syndrome died", [("capillary leak", "Disease")], set()),
        (ALL, "patients with [Disease]apillary[/Disease] leak syndrome died", [("capillary", "Disease")], set()),
        (ALL, "patients with [Disease]capillarx[/Disease]", [("capillary", "Disease")], set()),
        (ALL, "", [], set()),
    ],
)
def test_tagging_policy(task, output, expected, flags):
    parsed = parse(task, SOURCE, output)
    assert found(parsed, SOURCE) == expected
    assert {flag for flag in ("exact_copy", "unbalanced") if getattr(parsed, flag)} == flags
    assert not parsed.truncated and not parsed.unaligned and not parsed.not_in_source


def test_what_is_not_in_the_source_is_reported_and_not_placed():
    parsed = parse(ALL, SOURCE, "patients with [Disease]cancer[/Disease] died of [Chemical]lead[/Chemical]")
    assert parsed.spans == () and parsed.unaligned == 2
    assert parsed.entities == parsed.not_in_source == (("Disease", "cancer"), ("Chemical", "lead"))
    # In the source, but the copy broke off its place: rejected and counted, yet no invention.
    once = render_answer(ALL, SOURCE, spans_of(SOURCE, ("leak", "Disease")))
    twice = parse(ALL, SOURCE, once + " [Disease]leak[/Disease]")
    assert found(twice, SOURCE) == [("leak", "Disease")]
    assert twice.unaligned == 1 and twice.not_in_source == () and len(twice.entities) == 2


def test_truncated_tagging_keeps_what_is_closed():
    whole = render_answer(ALL, SOURCE, spans_of(SOURCE, ("patients", "Chemical"), ("leak syndrome", "Disease")))
    for end in range(len(whole)):
        parsed = parse(ALL, SOURCE, whole[:end], truncated=True)
        assert parsed.truncated and not parsed.unaligned and not parsed.not_in_source
        closed = [("patients", "Chemical")] * ("[/Chemical]" in whole[:end])
        closed += [("leak syndrome", "Disease")] * ("[/Disease]" in whole[:end])
        assert found(parsed, SOURCE) == closed


def test_a_truncated_copy_aligns_with_the_beginning():
    text = "a rash and then a fever and then a rash and then a cough"
    output = "an [Disease]rash[/Disease] and then a"
    assert parse(ALL, text, output, truncated=True).spans == (Span(2, 6, "Disease"),)


@pytest.mark.parametrize(
    "task, text, output, expected",
    [
        (ALL, "the [Disease] tag and a fever", "the [Disease] tag and a [Disease]fever[/Disease]", "fever"),
        (ALL, "the [Disease] tag and a fever", "The [Disease] tg and [Disease]fever[/Disease]", "fever"),
        (ONE, "n ## 5 @@ a fever", "n ## 5 @@ a @@fever##", "fever"),
        (ONE, "n ## 5 fever @@", "n ## 5 @@fever## @@", "fever"),
        (ONE, "n ## fever", "N ## @@fever##", "fever"),
        (ONE, "n ## fever", "@@n ## fever##", "n ## fever"),
        (ONE, "n @@ fever", "n @@ @@fever##", "fever"),
        (ONE, "fever ## n", "@@fever## ## n", "fever"),
    ],
)
def test_tags_that_the_source_holds_are_text(task, text, output, expected):
    assert found(parse(task, text, output), text) == [(expected, "Disease")]
    assert not parse(task, text, output).unbalanced


# ---- parse: extraction ----


@pytest.mark.parametrize(
    "task, text, output, expected, missing",
    [
        (LIST, SOURCE, "Disease: leak; Chemical: died", [("leak", "Disease"), ("died", "Chemical")], ()),
        (LIST, SOURCE, " Chemical: died;\n Disease: leak \n", [("leak", "Disease"), ("died", "Chemical")], ()),
        (LIST, SOURCE, "Disease: leak; Disease: died", [("leak", "Disease"), ("died", "Disease")], ()),
        (
            LIST,
            SOURCE,
            "Disease: leak, cancer, died",
            [("leak", "Disease"), ("died", "Disease")],
            (("Disease", "cancer"),),
        ),
        (LIST, SOURCE, "Disease: Leak", [], (("Disease", "Leak"),)),
        (LIST, SOURCE, "Disease: ; Chemical: ,", [], (("Chemical", ","),)),
        (LIST, SOURCE, "Disease: leak; Gene: died", [("leak", "Disease")], (("Disease", "Gene: died"),)),
        # every occurrence as a whole word, longest first, without overlaps
        (
            LIST_ONE,
            "pain, chest pain, painful, pain",
            "pain, chest pain",
            [("pain", "Disease"), ("chest pain", "Disease"), ("pain", "Disease")],
            (),
        ),
        (LIST_ONE, "pain, chest pain", "chest pain, chest", [("chest pain", "Disease")], ()),
        (LIST_ONE, "painful pain, rash", "pain , rash", [("pain", "Disease"), ("rash", "Disease")], ()),
        (LIST_ONE, "painful, painless", "pain", [("pain", "Disease"), ("pain", "Disease")], ()),  # inside words
        (LIST_ONE, "(pain) -pain- pain2", "pain", [("pain", "Disease"), ("pain", "Disease")], ()),
        (LIST_ONE, "chest\n pain", "chest pain", [("chest\n pain", "Disease")], ()),
        (LIST_ONE, "cafe\u0301 and cafe", "cafe", [("cafe", "Disease")], ()),  # an accent belongs to its letter
        # commas: two mentions, unless a part cannot stand alone
        (LIST_ONE, "no nausea, pain", "nausea, pain", [("nausea", "Disease"), ("pain", "Disease")], ()),
        (LIST_ONE, "mild, and severe pain", "mild, and severe pain", [("mild, and severe pain", "Disease")], ()),
        (LIST_ONE, "rash, mild, or bad", "rash, mild, or bad", [("rash, mild, or bad", "Disease")], ()),
        (LIST_ONE, "the [1R, 3S] form", "[1R, 3S] form", [("[1R, 3S] form", "Disease")], ()),
        (LIST_ONE, "x-1, 2; 3-y here", "x-1, 2; 3-y", [("x-1, 2; 3-y", "Disease")], ()),
    ],
)
def test_extraction_policy(task, text, output, expected, missing):
    parsed = parse(task, text, output)
    assert found(parsed, text) == expected
    assert parsed.not_in_source == missing and parsed.exact_copy == (not missing)
    assert not parsed.unbalanced and not parsed.truncated


def test_a_short_mention_is_not_where_its_label_is_written():
    parsed = parse(LIST, "Na and C rose", "Chemical: C, Na; Disease: rose")
    output = "Chemical: C, Na; Disease: rose"
    assert [output[start:end] for start, end in parsed.written] == ["Na", "C", "rose"]
    assert parsed.written[1] == (10, 11)


def test_text_outside_the_lists_is_flagged():
    parsed = parse(LIST, SOURCE, "leak; Disease: died")
    assert parsed.unbalanced and found(parsed, SOURCE) == [("died", "Disease")]


def test_truncated_extraction_drops_the_last_entity():
    whole = "Disease: leak, capillary leak; Chemical: syndrome, died"
    complete = {
        0: [],
        whole.index(", ") + 2: ["leak"],
        whole.index("; ") + 2: ["leak", "capillary leak"],
        whole.rindex(", ") + 2: ["leak", "capillary leak", "syndrome"],
    }
    for end in range(len(whole)):
        parsed = parse(LIST, SOURCE, whole[:end], truncated=True)
        assert [string for _, string in parsed.entities] == complete[max(k for k in complete if k <= end)]
        assert parsed.truncated and not parsed.not_in_source


def test_locate():
    text = "pain, chest pain, pain"
    entities = [
        ("Disease", "pain"),
        ("Chemical", "pain"),
        ("Disease", "chest pain"),
        ("Disease", "absent"),
        ("Disease", ""),
    ]
    every = locate(text, entities)
    assert every == (Span(0, 4, "Disease"), Span(6, 16, "Disease"), Span(18, 22, "Disease"))
    # A first occurrence that is taken is passed over: here by the other label.
    assert locate(text, entities, first_only=True) == (
        Span(0, 4, "Disease"),
        Span(6, 16, "Disease"),
        Span(18, 22, "Chemical"),
    )


def test_join():
    disease = [Span(0, 4, "Disease"), Span(10, 14, "Disease")]
    chemical = [Span(start, end, "Chemical") for start, end in ((2, 6), (4, 6), (9, 20), (14, 20))]
    joined = join_labels({"Chemical": chemical[1:], "Disease": disease}, BOTH)
    assert joined == (disease[0], chemical[1], disease[1], chemical[3])
    assert join_labels({"Chemical": chemical[2:3], "Disease": disease}, BOTH[::-1]) == (disease[0], chemical[2])
    assert join_labels({"Chemical": chemical[:1]}, BOTH) == (chemical[0],)


# ---- alignment ----


def edit_distance(a, b) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, previous = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (x != y)))
    return row[-1]


def cost_of(origin: list[int], source: str, output: str) -> int:
    """The least cost of an alignment that copies exactly what `origin` says."""
    total = i = k = 0
    for there, here in [*((k, i) for k, i in enumerate(origin) if i >= 0), (len(output), len(source))]:
        total += max(here - i, there - k)
        i, k = here + 1, there + 1
    return total


def test_the_alignment_is_of_least_cost():
    draw = random.Random(0)
    for _ in range(500):
        source, output = ("".join(draw.choices("abc", k=draw.randrange(12))) for _ in range(2))
        origin = align.edit_alignment(source, output)
        copied = [i for i in origin if i >= 0]
        assert copied == sorted(set(copied))
        assert all(source[i] == output[k] for k, i in enumerate(origin) if i >= 0)
        assert cost_of(origin, source, output) == edit_distance(source, output)


# ---- anything at all ----


def test_parse_never_raises_and_never_invents():
    draw = random.Random(0)
    words = [
        "fever",
        "Rash",
        "a",
        "leak\u00a0age",
        "[3H]-x",
        "@@",
        "##",
        "[Disease]",
        ",",
        "; Chemical:",
        "é",
        "\U0001f922",
        "高血压",
        "(",
        ")",
        "\n",
        "  ",
        "e\u0301",
        "and",
    ]
    tags = [
        "[Disease]",
        "[/Disease]",
        "[Chemical]",
        "[/Chemical]",
        "@@",
        "##",
        ", ",
        "; ",
        "Disease: ",
        "Chemical: ",
        "\x00",
    ]
    for _ in range(2000):
        text = " ".join(draw.choices(words, k=draw.randrange(1, 12))).strip() or "x"
        task = draw.choice(TASKS)
        cuts = sorted(draw.sample(range(len(text) + 1), min(4, len(text) + 1)))
        gold = [Span(a, b, draw.choice(BOTH)) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
        output = render_answer(task, text, gold)
        for _ in range(draw.randrange(8)):
            a, b = sorted(draw.choices(range(len(output) + 1), k=2))
            output = draw.choice(
                [
                    output[:a] + draw.choice(tags + words) + output[a:],
                    output[:a] + output[min(b, a + 6) :],
                    output[:b],
                    output[:a] + output[a:b].swapcase() + output[b:],
                    output[:b] + output[a:],
                ]
            )
        parsed = parse(task, text, output, truncated=draw.random() < 0.3)
        end = 0
        for span in parsed.spans:
            assert end <= span.start < span.end <= len(text) and span.label in task.labels
            assert text[span.start : span.end] == text[span.start : span.end].strip()
            end = span.end
        assert set(parsed.not_in_source) <= set(parsed.entities)
        for _, string in parsed.not_in_source:
            assert " ".join(string.split()) not in " ".join(text.split())
        if task.format == "tagging":
            assert len(parsed.spans) + parsed.unaligned == len(parsed.entities)


def test_runaway_outputs_are_bounded():
    outputs = [
        "x " * 100_000,
        "[Disease]" * 20_000,
        "[Disease]leak b[/Disease] " * 5_000,
        SOURCE * 2_000,
        "patients, and " * 10_000,
        "x" * 200_000,
    ]
    start = time.perf_counter()
    for output in outputs:
        for task in (ALL, LIST):
            parse(task, SOURCE, output, truncated=True)
    assert time.perf_counter() - start < 20


# ---- the official corpus ----


@pytest.mark.parametrize("task", TASKS, ids=lambda task: "-".join([task.format, *task.labels]))
def test_gold_comes_back(bc5cdr, task):
    for path in find_splits(bc5cdr).values():
        right = wrong = missed = 0
        for document in read_documents(path):
            for sentence in sentences_of(document):
                gold = {span for span in sentence.spans if span.label in task.labels}
                parsed = parse(task, sentence.text, render_answer(task, sentence.text, sentence.spans))
                assert parsed.exact_copy and not parsed.unbalanced and not parsed.unaligned
                right += len(gold & set(parsed.spans))
                wrong += len(set(parsed.spans) - gold)
                missed += len(gold - set(parsed.spans))
        if task.format == "tagging":
            assert wrong == missed == 0
        else:
            # A list does not say which occurrences are meant, nor where a mention holds a comma.
            assert 2 * right / (2 * right + wrong + missed) > (0.997 if task.per_label else 0.998)


def test_gold_comes_back_from_damaged_copies(bc5cdr):
    """One character in thirty lost, of no tag: nearly all mentions are still placed, nearly none wrongly."""
    draw = random.Random(0)
    right = wrong = total = 0
    for document in read_documents(find_splits(bc5cdr)["dev"])[:60]:
        for sentence in sentences_of(document):
            pieces = re.split(r"(\[/?(?:Disease|Chemical)\])", render_answer(ALL, sentence.text, sentence.spans))
            for place in range(0, len(pieces), 2):
                pieces[place] = "".join(c for c in pieces[place] if draw.random() > 1 / 30)
            predicted = set(parse(ALL, sentence.text, "".join(pieces)).spans)
            right += len(predicted & set(sentence.spans))
            wrong += len(predicted - set(sentence.spans))
            total += len(sentence.spans)
    assert right > 0.97 * total and wrong < 0.03 * total


def test_every_format_is_registered():
    """A name without its file would fail only when somebody asks for it."""
    for form in FORMATS:
        task = Task(form, ("Disease",), True, instruction=True)
        answer = render_answer(task, "a fever", [Span(2, 7, "Disease")])
        assert [span.label for span in parse(task, "a fever", answer).spans] == ["Disease"]
        assert "Please " in render_prompt(task, "a fever")
