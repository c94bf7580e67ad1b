"""What a document's text says of its sentences and of the spelling of its mentions."""

import pytest

from llamalora.corpus.documents import Document, Reading, Span, outermost, sentence_bounds


@pytest.mark.parametrize(
    "sentences",
    [
        ["Она пришла.", "Он ушёл."],
        ["Il va bien.", "Élevé hier."],
        ["It rose.", "“No” is rare."],
        ["今天发烧。", "明天好吗？", "好！"],
        ["彼は「はい。」と言った。", "次"],
        ["הוא ישן.", "היא קמה."],
        ["It fell, e.g. β-waves, in St. Thomas."],
    ],
)
def test_sentences_of_any_script(sentences):
    text = ("" if sentences[0][0] in "今彼" else " ").join(sentences)
    assert [text[start:end] for start, end in sentence_bounds(text)] == sentences


@pytest.mark.parametrize(
    "stands, written, alike",
    [
        ("TNF-α", "TNF-a", True),
        ("TNF-α", "tnf alpha", True),
        ("TNF-alpha", "TNF-α", True),
        ("λ5", "lambda 5", True),
        ("IL-1ß", "IL-1b", True),
        ("SARS\u2010CoV\u20102", "SARS CoV 2", True),
        ("Cafe\u0301ine", "Caféine", True),
        ("5 µM", "5 μM", True),
        ("TNF-", "TNF", False),
        ("TNF-α", "TNF-ab", False),
        ("fever", "fevers", False),
    ],
)
def test_a_mention_may_be_spelt_otherwise_than_its_text(stands, written, alike):
    """PubTator Central's files normalise what mentions say; their offsets count."""
    reading, document = Reading(), Document("1", f"A {stands} b", (), ())
    span = reading.mention("x:1", document, 2, 2 + len(stands), "Gene", written)
    assert (span == Span(2, 2 + len(stands), "Gene"), len(reading.faults)) == (alike, not alike)


def test_the_outermost_of_many():
    """Of nested and crossing mentions, the longest first, whatever their number."""
    spans = [Span(start, start + length, "X") for start in range(0, 4_000, 2) for length in (1, 3, 5)]
    kept = outermost(spans)
    assert all(one.end <= other.start for one, other in zip(kept, kept[1:], strict=False))
    assert kept[0] == Span(0, 5, "X") and len({span.end - span.start for span in kept}) == 1
