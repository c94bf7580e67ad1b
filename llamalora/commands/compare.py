"""Two systems on the same gold: how far apart their scores are, and which mentions only one of them finds."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from textwrap import shorten

from ..cli import Parser, UsageError, called, check_new_file, check_there, refuse_idle
from ..corpus.documents import Document, Sentence, all_sentences, labels_of
from ..corpus.read import find_splits, read_documents
from ..evaluation.answered import select_sentences
from ..evaluation.page import Kind, Shown, html_page
from ..evaluation.result import (
    confidence_by_mention,
    find_changes,
    gold_keys,
    predicted_keys,
    read_answers,
    read_result,
)
from ..files import replace_file
from ..runs.folder import read_task, recorded_folder
from ..task.errors import Match, string_of
from ..task.score import Keys, document_counts, paired_bootstrap, read_predictions, score, span_keys
from ..text_table import aligned

FINDERS = ("both", "only_a", "only_b", "neither")
KINDS = {
    "both": Kind("both right", "", "correct"),
    "only_a": Kind("only A right", "only A", "type"),
    "only_b": Kind("only B right", "only B", "boundary"),
    "neither": Kind("missing in both", "missing", "missing"),
    "spurious_both": Kind("spurious in both", "spurious", "spurious"),
    "spurious_a": Kind("spurious in A", "spurious, A", "type"),
    "spurious_b": Kind("spurious in B", "spurious, B", "boundary"),
}
LISTED = 20  # mentions that the terminal shows of each list


@dataclass(frozen=True)
class Predictions:
    """What one system says about documents, and the sentences and labels that it was asked about."""

    documents: Sequence[Document]
    asked: Sequence[Sentence]
    labels: Sequence[str]
    keys: Keys
    confidence: dict[tuple, float]


EXAMPLES = """
RUN RUN2 --html page.html
--gold data/sample/test.PubTator.txt a.txt b.txt
"""


def main(argv: list[str]) -> None:
    parser = Parser("compare", EXAMPLES, description=__doc__)
    parser.add_argument("a", metavar="A", help="run that was scored, or with --gold a file of predictions")
    parser.add_argument("b", metavar="B", help="another")
    parser.add_argument("--split", default="dev", choices=("train", "dev", "test"), help="of the runs (default: dev)")
    parser.add_argument("--gold", metavar="FILE", help="the gold that two files of predictions are about")
    parser.add_argument("--html", metavar="FILE", help="write a page there that shows both in the sentences")
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON and nothing else")
    arguments = parser.parse_args(argv)
    refuse_idle(arguments, {"split": arguments.gold is not None and "with --gold, which is one split already"})
    check_new_file(arguments, "html")
    names = arguments.a, arguments.b
    if arguments.gold is not None:
        check_there(arguments.gold, *names)
        a, b = read_files(names, arguments.gold)
    else:
        a, b = (read_run(Path(name), arguments.split) for name in names)
    if a.asked != b.asked:
        raise UsageError(
            f"{arguments.a} and {arguments.b} were scored on different sentences ({len(a.asked)} and {len(b.asked)}); "
            "score both on the same --data, --split and --limit"
        )
    labels = [label for label in a.labels if label in b.labels]
    if not labels:
        raise UsageError(f"{arguments.a} and {arguments.b} have no label in common")
    result = compare(a, b, labels)
    if arguments.html is not None:
        title = f"{arguments.a} (A) and {arguments.b} (B)"
        replace_file(Path(arguments.html), page(title, result, a, b, labels))
    print(json.dumps(result, indent=2) if arguments.json else format_comparison(result, arguments.a, arguments.b))
    if arguments.html is not None and not arguments.json:
        print(f"\nwritten to {arguments.html}")


def read_run(folder: Path, split: str) -> Predictions:
    """The answers that an evaluation or the training has left in a run.

    Raises:
        UsageError: it is not scored on the split, its result is damaged, or its corpus has the split no more.
        CorpusError: the corpus has other sentences now.
    """
    task = read_task(folder)
    if not (folder / f"eval-{split}.json").is_file():
        raise UsageError(f"{folder}: not scored on {split}; first run: {called('eval')} --run {folder} --split {split}")
    if changes := find_changes(folder, split):
        raise UsageError("\n  ".join([*changes, f"score it again: {called('eval')} --run {folder} --split {split}"]))
    data = recorded_folder(folder, "data", "call this from where that path leads to it")
    result, splits = read_result(folder, split), find_splits(data)
    if split not in splits:
        raise UsageError(f"{folder}: was scored on {split}, but {data} has only {', '.join(splits)}")
    documents, asked = select_sentences(read_documents(splits[split]), result["sentences"])
    answers = read_answers(folder, split, task, asked)
    return Predictions(documents, asked, task.labels, predicted_keys(answers), confidence_by_mention(answers))


def read_files(paths: Iterable[str], gold_path: str) -> list[Predictions]:
    """Anyone's predictions about the gold. A label that it lacks is wrong wherever it is predicted."""
    gold = read_documents(gold_path)
    predicted = [read_predictions(path, gold, gold_path) for path in paths]
    labels = labels_of(chain(gold, *predicted))
    return [Predictions(gold, all_sentences(gold), labels, span_keys(documents), {}) for documents in predicted]


def compare(a: Predictions, b: Predictions, labels: Sequence[str]) -> dict:
    """The comparison, ready for JSON.

    Returns:
        micro, types: `a` and `b`, their scores (see `task.score.score`), and `difference`, F1 of A less that of B with
            its interval over documents resampled for both alike (see `task.score.paired_bootstrap`).
        found, spurious: by label, how many gold mentions both find, only A, only B and neither; and how many others
            they predict.
        mentions: those that only one of them finds or predicts.
    """
    gold, mine, other = _keys(a, b, labels)
    ids = [document.id for document in a.documents]
    texts = {document.id: document.text for document in a.documents}

    def row(chosen: Sequence[str]) -> dict:
        true, *predicted = (_of(keys, chosen) for keys in (gold, mine, other))
        one, two = (score(true, keys)["micro"] for keys in predicted)
        counts = [document_counts(true, keys, ids) for keys in predicted]
        return {"a": one, "b": two, **paired_bootstrap(counts[0], counts[1])}

    def finders(keys: Keys, names: Sequence[str] = FINDERS) -> dict[str, int]:
        counts = Counter(_finder(key, mine, other) for key in keys)
        return {name: counts[name] for name in names}

    return {
        "micro": row(labels),
        "types": {label: row([label]) for label in labels},
        "found": {label: finders(_of(gold, [label])) for label in labels},
        "spurious": {label: finders(_of(mine | other, [label]) - gold, FINDERS[:-1]) for label in labels},
        "mentions": [
            {
                "document": key[0],
                "start": key[1],
                "end": key[2] if len(key) == 4 else None,  # what the text does not hold has no place in it
                "label": key[-1],
                "text": string_of(key, texts),
                "gold": key in gold,
                "only": "A" if key in mine else "B",
            }
            for key in sorted(mine ^ other, key=lambda key: (len(key), *key))
        ],
    }


def _keys(a: Predictions, b: Predictions, labels: Sequence[str]) -> tuple[Keys, Keys, Keys]:
    return gold_keys(a.documents, labels), _of(a.keys, labels), _of(b.keys, labels)


def _of(keys: Keys, labels: Sequence[str]) -> Keys:
    return {key for key in keys if key[-1] in labels}


def _finder(key: tuple, mine: Keys, other: Keys) -> str:
    """One of `FINDERS`."""
    return {(True, True): "both", (True, False): "only_a", (False, True): "only_b"}.get(
        (key in mine, key in other), "neither"
    )


def _difference_rows(result: dict) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("", "F1 of A", "F1 of B", "A - B", "95 % interval")]
    for name, row in [*result["types"].items(), ("micro", result["micro"])]:
        low, high = (f"{100 * row[end]:+.2f}" for end in ("low", "high"))
        scores = (f"{100 * row[system]['f1']:.2f}" for system in ("a", "b"))
        interval = "none: one document" if (row["low"], row["high"]) == (-1, 1) else f"{low} to {high}"
        rows.append((name, *scores, f"{100 * row['difference']:+.2f}", interval))
    return rows


def _finder_rows(counts: dict[str, dict[str, int]]) -> list[tuple[str, ...]]:
    names = next(iter(counts.values())).keys()
    head = [name.replace("_a", " A").replace("_b", " B") for name in names]
    together = {name: sum(row[name] for row in counts.values()) for name in names}
    rows = [*counts.items(), ("all", together)]
    cells = [(label, *map(str, row.values())) for label, row in rows]
    return [("", *head), *cells]


def tables(result: dict) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Titles and rows of cells, the head first."""
    return [
        ("difference", _difference_rows(result)),
        ("gold mentions found", _finder_rows(result["found"])),
        ("other mentions predicted", _finder_rows(result["spurious"])),
    ]


def format_comparison(result: dict, a: str, b: str) -> str:
    """The tables, and the first of the mentions that only one finds."""
    parts = [f"A  {a}\nB  {b}", *(f"{title}\n{aligned(rows)}" for title, rows in tables(result))]
    for only in ("A", "B"):
        mentions = [one for one in result["mentions"] if one["gold"] and one["only"] == only]
        if mentions:
            rows = [
                (f"  {one['document']}", str(one["start"]), one["label"], shorten(one["text"], 40, placeholder=" …"))
                for one in mentions[:LISTED]
            ]
            more = f"\n  and {len(mentions) - LISTED} more (--json lists all)" if len(mentions) > LISTED else ""
            parts.append(f"gold mentions that only {only} finds\n{aligned(rows, 'lrll')}{more}")
    return "\n\n".join(parts)


def page(title: str, result: dict, a: Predictions, b: Predictions, labels: Sequence[str]) -> str:
    """Each mention once, with who finds it; one that is wrong in its boundary or label is another mention."""
    gold, mine, other = _keys(a, b, labels)
    shown = []
    for key in gold | mine | other:
        finder = _finder(key, mine, other)
        kind = finder if key in gold else f"spurious_{finder.removeprefix('only_')}"
        pair = Match(key if key in gold else None, key if key in mine | other else None)
        sure = [(name, one.confidence.get(key)) for name, one in (("A", a), ("B", b))]
        notes = tuple(f"confidence of {name} {value:.2f}" for name, value in sure if value is not None)
        shown.append(Shown(pair, kind, notes))
    shown.sort(key=lambda one: (len(one.pair.mention), *one.pair.mention))
    facts = [f"{len(a.asked)} sentences of {len(a.documents)} documents"]
    usual = ("both", "neither", "spurious_both")
    return html_page(title, facts, a.documents, a.asked, shown, KINDS, usual, "Only differences", tables(result))
