"""The error analysis against by-hand examples, our exact scores, and nervaluate."""

import json
import random
from collections import Counter

import pytest

from llamalora.task.error_tables import format_summary, format_tables
from llamalora.task.errors import CREDIT, KINDS, Match, analyse, calibrate, match
from llamalora.task.score import score

LABELS = ("Disease", "Chemical", "Gene")
TEXT = "Severe renal failure after aspirin, lead or gold; no fever, no rash."

# by hand: one mention of each kind, and an entity that the text does not hold
GOLD = {
    ("1", 7, 20, "Disease"),  # renal failure
    ("1", 27, 34, "Chemical"),  # aspirin
    ("1", 36, 40, "Chemical"),  # lead
    ("1", 44, 48, "Chemical"),  # gold
    ("1", 53, 58, "Disease"),  # fever
}
PREDICTED = {
    ("1", 0, 20, "Disease"),  # too long
    ("1", 27, 34, "Chemical"),
    ("1", 36, 40, "Disease"),
    ("1", 41, 48, "Disease"),  # too long, and of another label
    ("1", 60, 67, "Disease"),  # no rash
    ("1", 0, "not in source", "nausea", "Disease"),
}


def random_mentions(draw: random.Random, number: int, apart: bool) -> tuple[set, set]:
    """Gold and predicted mentions; `apart`: of one side no two overlap, and none two of the other side."""
    gold, predicted = set(), set()
    for place in range(number):
        document, origin = str(place % 7), 20 * place if apart else draw.randrange(60)
        start = origin + draw.randrange(5)
        end = start + draw.randrange(1, 9)
        mention = (document, start, end, draw.choice(LABELS))
        if draw.random() < 0.8:
            gold.add(mention)
        if draw.random() < 0.8:
            other = (draw.choice([start, start + 1]), draw.choice([end, end + 2]), draw.choice([mention[-1], *LABELS]))
            predicted.add((document, min(other[0], end - 1), *other[1:]))
    return gold, predicted


def test_every_kind_by_hand():
    kinds = {(pair.kind, (pair.gold or pair.predicted)[1]) for pair in match(GOLD, PREDICTED)}
    assert kinds == {
        ("boundary", 7), ("correct", 27), ("type", 36), ("boundary_and_type", 44), ("missing", 53), ("spurious", 60),
        ("spurious", 0),
    }  # fmt: skip
    result = analyse(GOLD, PREDICTED)
    assert result["kinds"]["all"] == dict(zip(("support", *KINDS), (5, 1, 1, 1, 1, 1, 2), strict=True))
    assert result["kinds"]["types"]["Chemical"] == dict(zip(("support", *KINDS), (3, 1, 0, 1, 1, 0, 0), strict=True))
    earned = {"strict": 1, "exact": 2, "partial": 3, "type": 2}
    for scheme, right in earned.items():
        micro = result["schemes"][scheme]["micro"]
        assert (micro["precision"], micro["recall"], micro["f1"]) == (right / 6, right / 5, 2 * right / 11)
    partial = result["schemes"]["partial"]["micro"]
    assert [partial[name] for name in ("correct", "partial", "incorrect", "missing", "spurious")] == [2, 2, 0, 1, 2]
    assert result["confusion"] == {"labels": ["Disease", "Chemical"], "counts": [[1, 0, 1], [2, 1, 0], [2, 0, 0]]}


def test_the_closest_belong_together():
    """The same place goes before the same label, and that before the larger overlap, whatever the order."""
    gold = {("1", 0, 10, "Disease"), ("1", 4, 10, "Chemical")}
    assert match(gold, {("1", 4, 10, "Disease")}) == [
        Match(("1", 0, 10, "Disease"), None), Match(("1", 4, 10, "Chemical"), ("1", 4, 10, "Disease")),
    ]  # fmt: skip
    (pair, _) = match(gold, {("1", 3, 10, "Disease")})
    assert pair == Match(("1", 0, 10, "Disease"), ("1", 3, 10, "Disease"))
    (one, two) = match({("1", 0, 3, "Gene"), ("1", 4, 9, "Gene")}, {("1", 0, 9, "Gene")})
    assert (one.kind, two.kind) == ("missing", "boundary")
    assert match({("1", 0, 3, "Gene")}, {("1", 3, 5, "Gene")})[0].kind == "missing"  # they touch, and share nothing


def test_pairs_are_one_to_one_and_none_is_left_out():
    draw = random.Random(0)
    for _ in range(60):
        gold, predicted = random_mentions(draw, 40, apart=False)
        pairs = match(gold, predicted)
        assert sorted(pair.gold for pair in pairs if pair.gold) == sorted(gold)
        assert sorted(pair.predicted for pair in pairs if pair.predicted) == sorted(predicted)
        missing, spurious = ([getattr(p, side) for p in pairs if p.kind == kind] for side, kind in
                             (("gold", "missing"), ("predicted", "spurious")))  # fmt: skip
        assert not [
            (one, other) for one in missing for other in spurious
            if one[0] == other[0] and one[1] < other[2] and other[1] < one[2]
        ]  # fmt: skip


def test_strict_is_our_exact_score():
    draw = random.Random(1)
    for _ in range(40):
        gold, predicted = random_mentions(draw, 60, apart=False)
        predicted.add(("3", 0, "not in source", "lead", "Gene"))
        exact, strict = score(gold, predicted, LABELS), analyse(gold, predicted, LABELS)["schemes"]["strict"]
        for ours, theirs in [
            (strict["micro"], exact["micro"]),
            *zip(strict["types"].values(), exact["types"].values(), strict=True),
        ]:
            assert {rate: ours[rate] for rate in ("precision", "recall", "f1")}.items() <= theirs.items()
            assert ours["correct"] == theirs["tp"]
        assert list(strict["types"]) == list(exact["types"])
        assert strict["macro"]["f1"] == pytest.approx(sum(row["f1"] for row in exact["types"].values()) / len(LABELS))


def theirs(gold: set, predicted: set) -> dict:
    """nervaluate's evaluation; its ends are inclusive."""
    nervaluate = pytest.importorskip("nervaluate", reason="the oracle nervaluate is not installed")
    documents = sorted({key[0] for key in gold | predicted})
    lists = [
        [[{"label": k[-1], "start": k[1], "end": k[2] - 1} for k in sorted(keys) if k[0] == id] for id in documents]
        for keys in (gold, predicted)
    ]
    return nervaluate.Evaluator(*lists, tags=list(LABELS), loader="dict").evaluate()


def test_nervaluate_agrees_where_no_mention_overlaps_two():
    draw, kinds = random.Random(2), Counter()
    for _ in range(30):
        gold, predicted = random_mentions(draw, 40, apart=True)
        ours, oracle = analyse(gold, predicted)["schemes"], theirs(gold, predicted)
        names = {"missing": "missed"}
        for scheme in CREDIT:
            other = "ent_type" if scheme == "type" else scheme
            rows = [(ours[scheme]["micro"], oracle["overall"][other])]
            rows += [(row, oracle["entities"][label][other]) for label, row in ours[scheme]["types"].items()]
            for mine, result in rows:
                assert mine == pytest.approx({name: getattr(result, names.get(name, name)) for name in mine})
        kinds.update(pair.kind for pair in match(gold, predicted))
    assert all(kinds[kind] > 50 for kind in KINDS)  # of each there were some


def test_nervaluate_agrees_on_strict_wherever_predictions_do_not_overlap():
    draw = random.Random(3)
    for _ in range(30):
        gold, others = random_mentions(draw, 60, apart=False)
        predicted = set()  # some right, some wrong, none over another
        for key in sorted(others | set(draw.sample(sorted(gold), 12)), key=lambda key: draw.random()):
            if all(key[0] != other[0] or key[2] <= other[1] or other[2] <= key[1] for other in predicted):
                predicted.add(key)
        mine, result = (
            analyse(gold, predicted)["schemes"]["strict"]["micro"],
            theirs(gold, predicted)["overall"]["strict"],
        )
        assert mine["correct"] == result.correct > 0
        assert mine["f1"] == pytest.approx(result.f1)


# ---- training and confidence ----


def test_seen_and_unseen_part_the_exact_counts():
    known = {("Disease", "renal failure"), ("Chemical", "aspirin"), ("Chemical", "fever"), ("Disease", "nausea")}
    seen = analyse(GOLD, PREDICTED, texts={"1": TEXT}, known=known)["seen"]
    assert [seen["seen"][name] for name in ("tp", "fp", "fn")] == [1, 1, 1]  # aspirin; nausea; renal failure
    assert [seen["unseen"][name] for name in ("tp", "fp", "fn")] == [0, 4, 3]
    assert analyse(GOLD, PREDICTED)["seen"] is None


def test_gold_mentions_are_counted_by_their_words():
    text = "one two  three four\nfive six seven"
    gold = {("1", 0, 3, "A"), ("1", 0, 7, "A"), ("1", 4, 14, "A"), ("1", 0, 19, "A"), ("1", 0, 24, "B")}
    words = analyse(gold, {("1", 0, 3, "A"), ("1", 0, 7, "B"), ("1", 0, 24, "B")}, texts={"1": text})["words"]
    assert [(row["gold"], row["correct"]) for row in words.values()] == [(1, 1), (2, 0), (0, 0), (2, 1)]
    assert analyse(gold, gold)["words"] is None


def test_calibration_by_hand():
    gold = {("1", 0, 1, "Gene"), ("1", 2, 3, "Gene"), ("1", 4, 5, "Gene")}
    sure = {
        ("1", 0, 1, "Gene"): 1.0, ("1", 2, 3, "Gene"): 0.92, ("1", 6, 7, "Gene"): 0.96, ("1", 8, 9, "Gene"): 0.1,
    }  # fmt: skip
    result = calibrate(sure, gold)
    high = {"low": 0.9, "high": 1.0, "count": 3, "confidence": (1 + 0.92 + 0.96) / 3, "correct": 2 / 3}
    assert result["bins"] == [
        {"low": 0.1, "high": 0.2, "count": 1, "confidence": 0.1, "correct": 0.0}, pytest.approx(high)
    ]  # fmt: skip
    assert result["ece"] == pytest.approx((0.1 + 3 * (0.96 - 2 / 3)) / 4)
    assert (result["count"], result["correct"]) == (4, 0.5)
    assert calibrate({}, gold) == {"count": 0, "confidence": 0.0, "correct": 0.0, "ece": 0.0, "bins": []}


def test_a_model_that_knows_itself_has_no_calibration_error():
    draw = random.Random(4)
    sure = {("1", place, place + 1, "Gene"): draw.random() for place in range(20000)}
    gold = {key for key, value in sure.items() if draw.random() < value}
    assert calibrate(sure, gold)["ece"] < 0.02
    assert calibrate(dict.fromkeys(sure, 1.0), gold)["ece"] == pytest.approx(1 - len(gold) / len(sure))


# ---- what is written ----


def test_json_and_terminal():
    sure = {key: 0.95 for key in PREDICTED if len(key) == 4}
    result = analyse(GOLD, PREDICTED, texts={"1": TEXT}, known=set(), confidence=sure)
    assert json.loads(json.dumps(result)) == result
    long = {(*key[:-1], "A label that is longer than a column " + key[-1]) for key in GOLD}
    many = analyse(long, {(*key[:-1], key[-1] + "!") for key in long}, texts={"1": TEXT}, known=set(), confidence={})
    for analysis in (result, many, analyse(set(), set())):
        lines = [*format_summary(analysis).splitlines(), *format_tables(analysis).splitlines()]
        assert max(map(len, lines)) <= 80
    table = [line.split() for line in format_tables(result).splitlines()]
    assert ["Chemical", "3", "1", "0", "1", "1", "0", "0"] in table
    assert ["Chemical", "Disease", "2"] in table
    assert ["0.9", "to", "1.0", "5", "95.00", "20.00"] in table
    assert "micro F1 by scheme: strict 18.18, exact 36.36, partial 54.55, type 36.36" in format_summary(result)
