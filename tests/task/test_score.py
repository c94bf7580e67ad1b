"""Scores against an independent recount, and intervals against what must hold of any interval."""

import io
import random

import numpy as np
import pytest

from llamalora.corpus.documents import CorpusError, Document, Span, sentence_bounds
from llamalora.corpus.pubtator import write_pubtator
from llamalora.corpus.read import find_splits
from llamalora.task.score import (
    bootstrap,
    document_counts,
    format_table,
    paired_bootstrap,
    score,
    score_files,
    span_keys,
)

LABELS = ("Disease", "Chemical", "Gene")


def random_keys(draw: random.Random, number: int, labels=LABELS) -> set[tuple]:
    return {
        (str(draw.randrange(20)), start, start + draw.randrange(1, 3), draw.choice(labels))
        for start in draw.choices(range(8), k=number)
    }


def recount(gold: set, predicted: set, label: str | None = None) -> tuple[int, int, int]:
    """One key after the other, as the BioCreative evaluator does."""
    tp = fp = fn = 0
    for key in gold | predicted:
        if label in (None, key[-1]):
            tp += key in gold and key in predicted
            fp += key not in gold
            fn += key not in predicted
    return tp, fp, fn


def test_recount():
    draw = random.Random(0)
    for _ in range(50):
        gold = random_keys(draw, draw.randrange(60))
        predicted = random_keys(draw, draw.randrange(60), LABELS[:2])
        result = score(gold, predicted, LABELS)
        assert list(result["types"]) == list(LABELS)
        for label, row in [(None, result["micro"]), *result["types"].items()]:
            tp, fp, fn = recount(gold, predicted, label)
            assert (row["tp"], row["fp"], row["fn"]) == (tp, fp, fn)
            p, r = (tp / (tp + other) if tp + other else 0.0 for other in (fp, fn))
            assert (row["precision"], row["recall"]) == (p, r)
            assert row["f1"] == pytest.approx(2 * p * r / (p + r) if p + r else 0.0)
        for count in ("tp", "fp", "fn"):
            assert result["micro"][count] == sum(row[count] for row in result["types"].values())
        mirrored = score(predicted, gold)["micro"]
        assert mirrored["precision"] == result["micro"]["recall"]
        assert mirrored["recall"] == result["micro"]["precision"]


def test_nothing_at_all():
    result = score(set(), set())
    assert result["types"] == {}
    assert result["micro"] == {"tp": 0, "fp": 0, "fn": 0, "precision": 0.0, "recall": 0.0, "f1": 0.0}
    assert score(set(), set(), ["Gene", "Disease"])["types"].keys() == {"Gene", "Disease"}


def test_keys_of_any_shape():
    gold = {("1", "fever", "Disease"), ("1", "lead", "Chemical")}
    assert score(gold, {("1", "fever", "Disease"), ("1", "fever", "Chemical")})["micro"]["f1"] == 0.5


# ---- intervals ----


def test_the_interval_holds_the_score():
    draw = random.Random(1)
    gold, predicted = random_keys(draw, 200), random_keys(draw, 200)
    documents = [str(number) for number in range(20)]
    counts = document_counts(gold, predicted, documents)
    result = bootstrap(counts)
    assert result["f1"] == pytest.approx(score(gold, predicted)["micro"]["f1"])
    assert 0 < result["low"] < result["f1"] < result["high"] < 1
    narrow = bootstrap(counts, level=0.5)
    assert result["low"] < narrow["low"] < narrow["high"] < result["high"]
    assert bootstrap(counts) == result
    assert bootstrap(counts, seed=1) != result


def test_bootstrap_is_the_score_of_resampled_documents():
    """The same draws, scored the long way: each copy of a document under a name of its own."""
    draw = random.Random(2)
    gold, predicted = random_keys(draw, 60), random_keys(draw, 60)
    documents = [str(number) for number in range(20)]
    values = []
    for weights in np.random.default_rng(5).multinomial(20, np.full(20, 1 / 20), size=30):
        copies = [(id, copy) for id, weight in zip(documents, weights, strict=True) for copy in range(weight)]
        sampled = [
            {((id, copy), *key[1:]) for id, copy in copies for key in keys if key[0] == id}
            for keys in (gold, predicted)
        ]
        values.append(score(*sampled)["micro"]["f1"])
    result = bootstrap(document_counts(gold, predicted, documents), samples=30, seed=5, level=0.9)
    assert (result["low"], result["high"]) == pytest.approx(tuple(np.quantile(values, [0.05, 0.95])))


def test_perfect_and_empty_predictions():
    gold = random_keys(random.Random(3), 50)
    documents = [str(number) for number in range(20)]
    assert bootstrap(document_counts(gold, gold, documents)) == {"f1": 1.0, "low": 1.0, "high": 1.0}
    assert bootstrap(document_counts(gold, set(), documents)) == {"f1": 0.0, "low": 0.0, "high": 0.0}
    assert bootstrap(document_counts(set(), set(), documents))["f1"] == 0.0


def test_paired_bootstrap():
    draw = random.Random(4)
    gold, a, b = (random_keys(draw, 150) for _ in range(3))
    documents = [str(number) for number in range(20)]

    def counts(predicted):
        return document_counts(gold, predicted, documents)

    assert paired_bootstrap(counts(a), counts(set(a))) == {"difference": 0.0, "low": 0.0, "high": 0.0}
    one, other = paired_bootstrap(counts(a), counts(b)), paired_bootstrap(counts(b), counts(a))
    micro = [score(gold, keys)["micro"]["f1"] for keys in (a, b)]
    assert one["difference"] == pytest.approx(micro[0] - micro[1]) == -other["difference"]
    assert one["low"] < one["difference"] < one["high"]
    assert (one["low"], one["high"]) == pytest.approx((-other["high"], -other["low"]))
    assert paired_bootstrap(counts(gold), counts(b))["low"] > 0


def test_one_document_says_nothing_about_others():
    counts = np.array([[3, 1, 2]])
    assert (bootstrap(counts)["low"], bootstrap(counts)["high"]) == (0, 1)
    paired = paired_bootstrap(counts, counts)
    assert (paired["difference"], paired["low"], paired["high"]) == (0, -1, 1)


def test_documents_must_be_known():
    gold = {("1", 0, 1, "Disease")}
    with pytest.raises(ValueError, match="not among those to draw from: 1"):
        document_counts(gold, set(), ["2"])
    for documents in ([], ["1", "1"]):
        with pytest.raises(ValueError, match="each once"):
            document_counts(gold, set(), documents)


# ---- files ----

TEXTS = {"1": "A fever. Then nausea.", "2": "Nothing here.", "3": "Lead again: fever."}


def documents(**spans: tuple[tuple[int, int, str], ...]) -> list[Document]:
    return [
        Document(id, TEXTS[id], tuple(Span(*span) for span in spans.get(f"d{id}", ())), sentence_bounds(TEXTS[id]))
        for id in TEXTS
    ]


GOLD = documents(d1=((2, 7, "Disease"), (14, 20, "Disease")), d3=((0, 4, "Chemical"), (12, 17, "Disease")))
MINE = documents(d1=((2, 7, "Disease"), (2, 7, "Chemical")), d3=((0, 4, "Chemical"),))


def save(path, documents, lines=lambda line: True):
    handle = io.StringIO()
    write_pubtator(documents, handle)
    path.write_text("".join(line for line in handle.getvalue().splitlines(keepends=True) if lines(line)))
    return path


def test_score_files(tmp_path):
    gold, mine = save(tmp_path / "gold.txt", GOLD), save(tmp_path / "mine.txt", MINE)
    result = score_files(gold, mine)
    expected = score(span_keys(GOLD), span_keys(MINE))
    assert (result["micro"], result["types"]) == (expected["micro"], expected["types"])
    assert (result["micro"]["tp"], result["micro"]["fp"], result["micro"]["fn"]) == (2, 1, 2)
    assert (result["documents"], result["missing"]) == (3, 0)
    assert score_files(gold, gold)["micro"]["f1"] == 1.0
    bare = save(tmp_path / "bare.txt", MINE, lambda line: "|" not in line)
    # Document 2 has no mention with which to show up.
    assert score_files(gold, bare) == {**result, "missing": 1}


def test_missing_documents_are_misses(tmp_path):
    gold = save(tmp_path / "gold.txt", GOLD)
    result = score_files(gold, save(tmp_path / "mine.txt", MINE[2:]))
    assert [result["micro"][count] for count in ("tp", "fp", "fn")] == [1, 0, 3]
    assert result["missing"] == 2


def test_predictions_about_something_else(tmp_path):
    gold = save(tmp_path / "gold.txt", GOLD[:2])
    with pytest.raises(CorpusError, match="mine.txt: documents that are not in .*gold.txt: 3$"):
        score_files(gold, save(tmp_path / "mine.txt", MINE))
    with pytest.raises(CorpusError, match="bare.txt:5: a mention of document 3, which is not among the gold"):
        score_files(gold, save(tmp_path / "bare.txt", MINE, lambda line: "|" not in line))
    many = [Document(f"x{number}", "y", (), ((0, 1),)) for number in range(9)]
    with pytest.raises(CorpusError, match="x0, x1, x2, x3, x4 and 4 more"):
        score_files(gold, save(tmp_path / "many.txt", many))
    other = [GOLD[0], Document("2", "Nothing  here.", (), ())]
    with pytest.raises(CorpusError, match="other.txt: the text of document 2 differs"):
        score_files(gold, save(tmp_path / "other.txt", other))


def test_conll_files(tmp_path):
    gold = tmp_path / "gold.tsv"
    gold.write_text("A O\nfever B-Disease\n\nLead B-Chemical\n")
    mine = tmp_path / "mine.tsv"
    mine.write_text("A O\nfever B-Chemical\n\nLead B-Chemical\n")
    micro = score_files(gold, mine)["micro"]
    assert (micro["tp"], micro["fp"], micro["fn"]) == (1, 1, 1)


def test_table():
    lines = format_table(score(span_keys(GOLD), span_keys(MINE))).splitlines()
    assert [line.split() for line in lines] == [
        ["P", "R", "F1", "TP", "FP", "FN"],
        ["Disease", "100.00", "33.33", "50.00", "1", "0", "2"],
        ["Chemical", "50.00", "100.00", "66.67", "1", "1", "0"],
        ["micro", "66.67", "50.00", "57.14", "2", "1", "2"],
    ]
    assert len({len(line) for line in lines}) == 1


def test_bc5cdr_against_itself(bc5cdr):
    for path in find_splits(bc5cdr).values():
        result = score_files(path, path)
        assert result["micro"]["f1"] == 1.0 and result["micro"]["fp"] == result["micro"]["fn"] == 0
        assert result["documents"] == 500
