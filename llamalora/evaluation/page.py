"""Mentions in their sentences as one HTML page that needs no other file: predictions beside gold, or by themselves.

It has filters by kind or confidence, by label, and by what was seen in training.
"""

import html
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..corpus.documents import Document, Sentence, label_order
from ..html_template import fill
from ..task.error_tables import WORDS, tables
from ..task.errors import Match, match, string_of
from ..text_table import used
from .answered import Answer
from .result import confidence_by_mention, gold_keys, placed_keys, predicted_keys

PAGE = Path(__file__).with_name("page.html")
RATES = {"precision": "precision", "recall": "recall", "F1": "f1"}


@dataclass(frozen=True)
class Kind:
    """A kind of mention on a page: its name, what its label is marked with, and whose colour and lines it has
    (the page knows those of `task.errors.KINDS`)."""

    name: str
    mark: str
    look: str


@dataclass(frozen=True)
class Shown:
    """A mention on a page, gold, predicted or both, and what is said of it.

    `seen` in training is None where that is not known.
    """

    pair: Match
    kind: str
    notes: tuple[str, ...] = ()
    seen: bool | None = None


ERRORS = {
    "correct": Kind("correct", "", "correct"),
    "boundary": Kind("wrong boundary", "boundary", "boundary"),
    "type": Kind("wrong type", "", "type"),
    "boundary_and_type": Kind("both wrong", "boundary", "boundary_and_type"),
    "missing": Kind("missing", "missing", "missing"),
    "spurious": Kind("spurious", "spurious", "spurious"),
}

# predictions without gold, by their confidence, from which each kind begins
SURENESS = {
    "sure": (0.9, Kind("0.9 and above", "", "correct")),
    "likely": (0.5, Kind("0.5 to 0.9", "likely", "boundary")),
    "unsure": (0.0, Kind("below 0.5", "unsure", "spurious")),
}


def result_page(
    title: str,
    result: dict,
    documents: Sequence[Document],
    answers: Sequence[Answer],
    known: Collection[tuple[str, str]] = (),
) -> str:
    """The page of what `systems.score_split` returned: predictions beside gold."""
    micro = result["micro"]
    facts = [
        f"{result['split']} split: {result['sentences']} sentences of {result['documents']} documents",
        "micro, place and label: " + ", ".join(f"{name} {100 * micro[key]:.2f}" for name, key in RATES.items()),
    ]
    texts = {document.id: document.text for document in documents}
    pairs = match(gold_keys(documents, result["types"]), predicted_keys(answers))
    shown = describe(pairs, texts, confidence_by_mention(answers), known)
    asked = [item.sentence for item in answers]
    counts = tables(result["errors"])
    words = used(WORDS, str(counts))
    return html_page(title, facts, documents, asked, shown, ERRORS, ["correct"], "Only errors", counts, words)


def predictions_page(
    title: str, documents: Sequence[Document], answers: Sequence[Answer], known: Collection[tuple[str, str]] = ()
) -> str:
    """The page of predictions about documents that have no gold.

    Args:
        known: as in `describe`.
    """
    texts = {document.id: document.text for document in documents}
    confidence = confidence_by_mention(answers)
    keys = sorted(placed_keys(answers))
    kinds = [next(name for name, (least, _) in SURENESS.items() if confidence[key] >= least) for key in keys]
    described = describe((Match(None, key) for key in keys), texts, confidence, known)
    shown = [replace(one, kind=kind) for one, kind in zip(described, kinds, strict=True)]
    facts = [f"{len(answers)} sentences of {len(documents)} documents"]
    unread = sum(item.overlong or item.parsed.truncated for item in answers)
    if unread:
        facts.append(f"sentences that found no room in the model's context, and may lack mentions: {unread}")
    counts = Counter((key[-1], kind) for key, kind in zip(keys, kinds, strict=True))
    table = [["", *(kind.name for _, kind in SURENESS.values())]]
    table += [[label, *(str(counts[label, name]) for name in SURENESS)] for label in label_order(k for k, _ in counts)]
    named = {name: kind for name, (_, kind) in SURENESS.items()}
    asked = [item.sentence for item in answers]
    return html_page(
        title, facts, documents, asked, shown, named, ["sure"], "Only below 0.9",
        [("mentions by confidence", table)], gold=False,
    )  # fmt: skip


def describe(
    pairs: Iterable[Match],
    texts: Mapping[str, str],
    confidence: Mapping[tuple, float],
    known: Collection[tuple[str, str]],
) -> list[Shown]:
    """The mentions with what is known of them.

    Args:
        texts: of the documents, by id.
        confidence: of predicted mentions, by key.
        known: the (label, string) of the mentions in training; if empty, nothing is said of it.
    """
    shown = []
    for pair in pairs:
        sure = confidence.get(pair.predicted or ())
        notes = () if sure is None else (f"confidence {sure:.2f}",)
        seen = (pair.mention[-1], string_of(pair.mention, texts)) in known if known else None
        shown.append(Shown(pair, pair.kind, notes, seen))
    return shown


def html_page(
    title: str,
    facts: Sequence[str],
    documents: Sequence[Document],
    asked: Sequence[Sentence],
    shown: Sequence[Shown],
    kinds: Mapping[str, Kind],
    usual: Collection[str],
    only: str,
    counts: Sequence[tuple[str, Sequence[Sequence[str]]]] = (),
    words: Mapping[str, str] | None = None,
    gold: bool = True,
) -> str:
    """The page, with its data, style and script inside: it opens from a file, and loads nothing.

    Args:
        facts: said below the title.
        asked: the sentences to show; those that a mention crosses are shown as one.
        usual: the kinds that a button named `only` takes away.
        counts: tables, each a title and rows of cells, the head first.
        words: of the tables, with their meanings.
        gold: whether there is any; without, the kinds are of confidence.
    """
    texts = {document.id: document.text for document in documents}
    data = {
        "kinds": {name: vars(kind) for name, kind in kinds.items()},
        "usual": list(usual),
        "gold": gold,
        "labels": label_order(key[-1] for item in shown for key in item.pair.keys),
        "units": [
            {
                "document": document,
                "text": texts[document][start:end],
                "mentions": [_mention(item, start) for item in inside],
            }
            for document, start, end, inside in _units(list(texts), asked, shown)
        ],
    }
    places = {
        "title": title,
        "facts": " · ".join([*facts, "a line is gold, a box is predicted"] if gold else facts),
        "only": only,
        "summary": "Scores and counts" if gold else "Counts",
        "kind": "Kind" if gold else "Confidence",
        "label": "Label, gold or predicted" if gold else "Label",
    }
    escaped = {name: html.escape(text) for name, text in places.items()}
    terms = "".join(f"<dt>{html.escape(word)}</dt><dd>{html.escape(meaning)}</dd>\n"
                    for word, meaning in (words or {}).items())  # fmt: skip
    meanings = f"<dl>\n{terms}</dl>" if terms else ""
    drawn = "".join(_html_table(name, rows) for name, rows in counts)
    return fill(PAGE, data, tables=drawn, meanings=meanings, **escaped)


def _units(
    ids: Sequence[str], asked: Sequence[Sentence], shown: Sequence[Shown]
) -> list[tuple[str, int, int, list[Shown]]]:
    """(document, start, end, mentions): the sentences, joined where a mention crosses their bounds."""
    stretches: dict[str, list[tuple[int, int]]] = {id: [] for id in ids}
    mentions: dict[str, list[Shown]] = {id: [] for id in ids}
    for sentence in asked:
        stretches[sentence.document].append((sentence.start, sentence.start + len(sentence.text)))
    for item in shown:
        id = item.pair.mention[0]
        mentions[id].append(item)
        stretches[id] += [key[1:3] for key in item.pair.keys if len(key) == 4]
    units = []
    for id in ids:
        joined: list[tuple[str, int, int, list[Shown]]] = []
        for start, end in sorted(stretches[id]):
            if joined and start < joined[-1][2]:
                joined[-1] = (id, joined[-1][1], max(end, joined[-1][2]), [])
            else:
                joined.append((id, start, end, []))
        starts = [start for _, start, _, _ in joined]
        for item in mentions[id]:
            joined[bisect_right(starts, item.pair.mention[1]) - 1][3].append(item)
        units += joined
    return units


def _mention(item: Shown, origin: int) -> dict:
    """What the page says of a mention, its places relative to the sentence."""
    described: dict = {"kind": item.kind, "notes": item.notes}
    for side, key in (("gold", item.pair.gold), ("predicted", item.pair.predicted)):
        if key is not None:
            place = {"start": key[1] - origin, "end": key[2] - origin} if len(key) == 4 else {"string": key[-2]}
            described[side] = {"label": key[-1], **place}
    return described if item.seen is None else described | {"seen": item.seen}


def _html_table(title: str, rows: Sequence[Sequence[str]]) -> str:
    lines = []
    for number, (name, *cells) in enumerate(rows):
        scope, tag = ("col", "th") if number == 0 else ("row", "td")
        others = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        lines.append(f'<tr><th scope="{scope}">{html.escape(name)}</th>{others}</tr>')
    return f"<table><caption>{html.escape(title)}</caption>\n" + "\n".join(lines) + "\n</table>\n"
