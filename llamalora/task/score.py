"""Exact-span scores: a prediction counts if document, start, end and type all agree.

Gold and predictions are sets of keys `(document id, ..., label)`: what stands between (start and end, or a
string) makes the metric. A set counts a mention once, as the BioCreative evaluator does.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..corpus.documents import CorpusError, Document, Documents, label_order, labels_of, told
from ..corpus.read import read_documents
from ..text_table import aligned

Keys = set[tuple]  # of (document id, ..., label)


def span_keys(documents: Iterable[Document]) -> Keys:
    """The keys (document id, start, end, label) of all mentions."""
    return {(doc.id, span.start, span.end, span.label) for doc in documents for span in doc.spans}


def score(gold: Keys, predicted: Keys, labels: Iterable[str] = ()) -> dict:
    """Counts and fractions, `micro` over all types and for each of the `types`.

    Args:
        labels: types to list even if no key has them.

    Returns:
        `{"micro": S, "types": {label: S}}` with `S = {tp, fp, fn, precision, recall, f1}`, see `fractions`.
    """
    counts = {label: [0, 0, 0] for label in label_order([*labels, *(key[-1] for key in gold | predicted)])}
    for column, keys in enumerate((gold & predicted, predicted - gold, gold - predicted)):
        for label, number in Counter(key[-1] for key in keys).items():
            counts[label][column] = number
    micro = [sum(column) for column in zip([0, 0, 0], *counts.values(), strict=True)]
    types = {label: fractions(*numbers) for label, numbers in counts.items()}
    return {"micro": fractions(*micro), "types": types}


def fractions(tp: float, fp: float, fn: float) -> dict:
    """Counts, or shares of counts, with precision, recall and F1; a fraction that is undefined is 0.0."""
    return {
        "tp": tp,
        "fp": fp,
        "fn": fn,
        "precision": tp / (tp + fp) if tp + fp else 0.0,
        "recall": tp / (tp + fn) if tp + fn else 0.0,
        "f1": 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0,
    }


def bootstrap(counts: np.ndarray, samples: int = 1000, seed: int = 0, level: float = 0.95) -> dict:
    """Micro F1 with its percentile interval, `{f1, low, high}`, over resampled documents.

    One document says nothing about others: its interval is all that F1 can be.

    Args:
        counts: of each document, from `document_counts`.
        samples: how often the documents are drawn anew, with replacement.
        level: the share of resampled scores inside the interval.
    """
    low, high = 0.0, 1.0
    if len(counts) > 1:
        low, high = _interval(_f1(_resamples(len(counts), samples, seed) @ counts), level)
    return {"f1": float(_f1(counts.sum(0))), "low": low, "high": high}


def paired_bootstrap(a: np.ndarray, b: np.ndarray, samples: int = 1000, seed: int = 0, level: float = 0.95) -> dict:
    """Micro F1 of A less that of B with its interval, `{difference, low, high}`; both see the same resamples.

    Arguments as of `bootstrap`, of A and B about the same documents.
    """
    assert len(a) == len(b), "counts of the same documents"
    low, high = -1.0, 1.0
    if len(a) > 1:
        weights = _resamples(len(a), samples, seed)
        low, high = _interval(_f1(weights @ a) - _f1(weights @ b), level)
    return {"difference": float(_f1(a.sum(0)) - _f1(b.sum(0))), "low": low, "high": high}


def document_counts(gold: Keys, predicted: Keys, documents: Sequence[str]) -> np.ndarray:
    """True positives, false positives and false negatives of each document: (documents, 3).

    Args:
        documents: the ids of all documents, also of those without a mention.
    """
    if not documents or len(set(documents)) < len(documents):
        raise ValueError("a bootstrap needs the ids of the documents, each once")
    row = {id: index for index, id in enumerate(documents)}
    strangers = {key[0] for key in gold | predicted} - row.keys()
    if strangers:
        raise ValueError(f"mentions of documents that are not among those to draw from: {_some(strangers)}")
    counts = np.zeros((len(documents), 3), dtype=np.int64)
    for column, keys in enumerate((gold & predicted, predicted - gold, gold - predicted)):
        for key in keys:
            counts[row[key[0]], column] += 1
    return counts


def _resamples(documents: int, samples: int, seed: int) -> np.ndarray:
    """How often each resample holds each document: (samples, documents)."""
    draw = np.random.default_rng(seed)
    return draw.multinomial(documents, np.full(documents, 1 / documents), size=samples)


def _f1(counts: np.ndarray) -> np.ndarray:
    tp, fp, fn = np.moveaxis(counts, -1, 0)
    return 2 * tp / np.maximum(1, 2 * tp + fp + fn)


def _interval(values: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def score_files(gold_path: str | Path, predicted_path: str | Path) -> dict:
    """`score` of two files, with the number of `documents`, of those `missing` in the predictions, and `notes` on what
    of the files was not taken as it stands.

    What is missing counts as missed. Raises CorpusError as `read_predictions`.
    """
    gold = read_documents(gold_path)
    predicted = read_predictions(predicted_path, gold, gold_path)
    result = score(span_keys(gold), span_keys(predicted), labels_of(gold))
    files = {gold_path: gold, predicted_path: predicted}
    notes = [f"{path}: {note}" for path, documents in files.items() for note in told(documents.notes)]
    return {**result, "documents": len(gold), "missing": len(gold) - len(predicted), "notes": notes}


def read_predictions(path: str | Path, gold: Sequence[Document], gold_path: str | Path) -> Documents:
    """Documents with predicted mentions; PubTator may be mention lines alone.

    Raises CorpusError for predictions about other documents, or about other texts, than the gold's.
    """
    predicted = read_documents(path, gold)
    texts = {document.id: document.text for document in gold}
    strangers = {document.id for document in predicted} - texts.keys()
    if strangers:
        raise CorpusError(f"{path}: documents that are not in {gold_path}: {_some(strangers)}")
    for document in predicted:
        # the formats of lines write tabs and line ends as spaces, one for one
        if len({re.sub(r"[\t\r\n]", " ", text) for text in (document.text, texts[document.id])}) > 1:
            raise CorpusError(
                f"{path}: the text of document {document.id} differs from that in "
                f"{gold_path}; offsets mean nothing across different texts"
            )
    return predicted


def _some(ids: Iterable[str]) -> str:
    ids = sorted(ids)
    return ", ".join(ids[:5]) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")


def format_table(scores: dict) -> str:
    """The scores of `score` as an aligned text table: percent and counts, the micro average last."""
    rows = [("", "P", "R", "F1", "TP", "FP", "FN")]
    for name, row in [*scores["types"].items(), ("micro", scores["micro"])]:
        rates = (f"{100 * row[key]:.2f}" for key in ("precision", "recall", "f1"))
        rows.append((name, *rates, *(str(row[key]) for key in ("tp", "fp", "fn"))))
    return aligned(rows)
