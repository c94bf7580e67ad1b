"""Predictions beside gold as one HTML page that needs no other file: each sentence with its mentions, and filters."""

import html
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from ..corpus.documents import Document, Sentence, label_order
from ..html_template import fill
from ..task.errors import KINDS, Match, match, string_of, tables
from ..task.score import Keys
from .answer import Answer
from .result import confidence_by_mention, gold_keys, predicted_keys

PAGE = Path(__file__).with_name("page.html")
RATES = {"precision": "precision", "recall": "recall", "F1": "f1"}


def result_page(
    title: str,
    result: dict,
    documents: Sequence[Document],
    answers: Sequence[Answer],
    known: Collection[tuple[str, str]],
) -> str:
    """The page of what `systems.score_split` returned."""
    micro = result["micro"]
    facts = [
        f"{result['split']} split: {result['sentences']} sentences of {result['documents']} documents",
        "micro, exact: " + ", ".join(f"{name} {100 * micro[key]:.2f}" for name, key in RATES.items()),
    ]
    asked = [item.sentence for item in answers]
    gold, predicted = gold_keys(documents, result["types"]), predicted_keys(answers)
    confidence = confidence_by_mention(answers)
    return html_page(title, facts, documents, asked, gold, predicted, confidence, known, result["errors"])


def html_page(
    title: str,
    facts: Sequence[str],
    documents: Sequence[Document],
    asked: Sequence[Sentence],
    gold: Keys,
    predicted: Keys,
    confidence: Mapping[tuple, float],
    known: Collection[tuple[str, str]] = (),
    errors: dict | None = None,
) -> str:
    """The page, with its data, style and script inside: it opens from a file, and loads nothing.

    Args:
        facts: said below the title.
        asked: the sentences to show; those that a mention crosses are shown as one.
        gold, predicted: see `task.errors.match`.
        confidence: of predicted mentions, by key; where there is none, none is shown.
        known: the (label, string) of the mentions in training; if empty, nothing is said of it.
        errors: of `task.errors.analyse`, shown as tables.
    """
    matches = match(gold, predicted)
    texts = {document.id: document.text for document in documents}
    data = {
        "kinds": [kind for kind in KINDS if any(pair.kind == kind for pair in matches)],
        "labels": label_order(key[-1] for key in gold | predicted),
        "seen": bool(known),
        "units": [
            {
                "document": document,
                "text": texts[document][start:end],
                "mentions": [_mention(pair, start, texts, confidence, known) for pair in pairs],
            }
            for document, start, end, pairs in _units(list(texts), asked, matches)
        ],
    }
    shown = "".join(_html_table(name, rows) for name, rows in tables(errors)) if errors else ""
    return fill(PAGE, data, title=html.escape(title), facts=html.escape(" · ".join(facts)), tables=shown)


def _units(
    ids: Sequence[str], asked: Sequence[Sentence], matches: Sequence[Match]
) -> list[tuple[str, int, int, list[Match]]]:
    """(document, start, end, matches): the sentences, joined where a mention crosses their bounds."""
    stretches: dict[str, list[tuple[int, int]]] = {id: [] for id in ids}
    for sentence in asked:
        stretches[sentence.document].append((sentence.start, sentence.start + len(sentence.text)))
    for key in (key for pair in matches for key in (pair.gold, pair.predicted) if key and len(key) == 4):
        stretches[key[0]].append(key[1:3])
    pairs_of: dict[str, list[Match]] = {id: [] for id in ids}
    for pair in matches:
        pairs_of[pair.mention[0]].append(pair)
    units = []
    for id in ids:
        joined: list[tuple[str, int, int, list[Match]]] = []
        for start, end in sorted(stretches[id]):
            if joined and start < joined[-1][2]:
                joined[-1] = (id, joined[-1][1], max(end, joined[-1][2]), [])
            else:
                joined.append((id, start, end, []))
        starts = [start for _, start, _, _ in joined]
        for pair in pairs_of[id]:
            joined[bisect_right(starts, pair.mention[1]) - 1][3].append(pair)
        units += joined
    return units


def _mention(
    pair: Match, origin: int, texts: Mapping[str, str], confidence: Mapping[tuple, float], known: Collection
) -> dict:
    """What the page says of a mention, its places relative to the sentence."""
    shown: dict = {"kind": pair.kind}
    for side, key in (("gold", pair.gold), ("predicted", pair.predicted)):
        if key is not None:
            place = {"start": key[1] - origin, "end": key[2] - origin} if len(key) == 4 else {"string": key[-2]}
            shown[side] = {"label": key[-1], **place}
    if pair.predicted is not None and pair.predicted in confidence:
        shown["confidence"] = round(confidence[pair.predicted], 4)
    if known:
        shown["seen"] = (pair.mention[-1], string_of(pair.mention, texts)) in known
    return shown


def _html_table(title: str, rows: Sequence[Sequence[str]]) -> str:
    lines = []
    for number, (name, *cells) in enumerate(rows):
        scope, tag = ("col", "th") if number == 0 else ("row", "td")
        others = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        lines.append(f'<tr><th scope="{scope}">{html.escape(name)}</th>{others}</tr>')
    return f"<table><caption>{html.escape(title)}</caption>\n" + "\n".join(lines) + "\n</table>\n"
