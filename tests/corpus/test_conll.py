"""CoNLL as other tools write it."""

import pytest

from llamalora.corpus.documents import Span
from llamalora.corpus.read import read_documents


@pytest.mark.parametrize("first", ["{sentence}-{token}", "doc{sentence}"])
def test_a_column_of_places_or_names_is_no_text(tmp_path, first):
    """Numbers of sentence and token (WebAnno) dropped every word; names of documents were taken for the words."""
    rows = [[("Ada", "B-PER"), ("L", "I-PER")], [("Flu", "B-D"), ("passed", "O")]]
    text = "".join(
        "".join(f"{first.format(sentence=n, token=m)}\t{word}\t{tag}\n" for m, (word, tag) in enumerate(row, 1)) + "\n"
        for n, row in enumerate(rows, 1)
    )
    path = tmp_path / "train.tsv"
    path.write_text(text)
    documents = read_documents(path)
    assert [document.text for document in documents] == ["Ada L", "Flu passed"]
    assert [span for document in documents for span in document.spans] == [Span(0, 5, "PER"), Span(0, 3, "D")]
    assert sum(documents.notes.values()) == 4


def test_tags_without_a_label_are_of_entities(tmp_path):
    """BioBERT's files of NCBI-disease or BC5CDR have B, I and O alone."""
    path = tmp_path / "train.tsv"
    path.write_text("Breast\tB\ncancer\tI\npassed\tO\n\nB\tO\nI\tO\n\n")
    documents = read_documents(path)
    assert [span for document in documents for span in document.spans] == [Span(0, 13, "entity")]
    assert documents.notes == {"sentences whose tags B and I have no label, read as `entity`": 1}
