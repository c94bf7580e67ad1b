"""Counts what a corpus holds, beside the paper's Table 5, and how long its sentences are."""

import json
from collections.abc import Sequence

from ..cli import Parser
from ..corpus.documents import Document, Documents, all_sentences, corpus_statistics, label_order, labels_of, told
from ..corpus.read import read_splits
from ..task.definition import Task
from ..task.parse import parse
from ..task.prompt import render_answer
from ..task.score import score, span_keys
from ..task.tokenizer import Tokenizer, load_tokenizer
from ..text_table import aligned
from .printed import SPLITS, TABLE5


def main(argv: list[str]) -> None:
    parser = Parser("stats", "--data data/bc5cdr", description=__doc__)
    parser.add_argument("--data", required=True, metavar="FOLDER", help="corpus folder")
    parser.add_argument("--model", metavar="FOLDER", help="model folder, whose tokenizer gives lengths in tokens")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON and nothing else")
    arguments = parser.parse_args(argv)
    tokenizer = None if arguments.model is None else load_tokenizer(arguments.model)
    result = statistics(read_splits(arguments.data), tokenizer)
    print(json.dumps(result, indent=2) if arguments.json else show(result))


def statistics(splits: dict[str, Documents], tokenizer: Tokenizer | None = None) -> dict[str, dict]:
    """`corpus_statistics` of every split, and beside it

    `notes`: what its reader did not take as it stands, each with its count;
    `ceiling`: for each format the F1 of the right answers, above which no model can come: mentions that overlap or are
    cut are in no answer, and a list does not say which occurrence of a string it means;
    `table5`: for a corpus of just Disease and Chemical, the paper's number of mentions by label;
    `tokens`: with a tokenizer, mean and maximum of a sentence and of its tagged form for all labels,
    which is what the model writes.
    """
    labels = labels_of(document for documents in splits.values() for document in documents)
    result = {}
    for name, documents in splits.items():
        result[name] = corpus_statistics(documents) | {"notes": documents.notes}
        if labels:
            result[name]["ceiling"] = {form: ceiling(documents, labels, form) for form in ("tagging", "extraction")}
        if set(labels) == set(TABLE5):
            column = SPLITS.index(name)
            result[name]["table5"] = {label: TABLE5[label][column] for label in labels}
        if tokenizer is not None:
            result[name]["tokens"] = _tokens(documents, labels, tokenizer)
    return result


def ceiling(documents: Sequence[Document], labels: tuple[str, ...], form: str) -> float:
    """The micro F1 of answers that are right."""
    task = Task(form, labels, per_label=False)
    found = set()
    for sentence in all_sentences(documents):
        spans = parse(task, sentence.text, render_answer(task, sentence.text, sentence.spans)).spans
        found |= {(sentence.document, sentence.start + s.start, sentence.start + s.end, s.label) for s in spans}
    return score(span_keys(documents), found)["micro"]["f1"]


def _tokens(documents: Sequence[Document], labels: tuple[str, ...], tokenizer: Tokenizer) -> dict[str, dict]:
    sentences = all_sentences(documents)
    texts = {"sentence": [sentence.text for sentence in sentences]}
    if labels:
        task = Task("tagging", labels, per_label=False)
        texts["answer"] = [render_answer(task, sentence.text, sentence.spans) for sentence in sentences]
    return {
        what: _mean_and_max([len(tokenizer.encode_continuation(f" {text}")) for text in those])
        for what, those in texts.items()
    }


def _mean_and_max(lengths: list[int]) -> dict[str, float]:
    return {"mean": sum(lengths) / max(1, len(lengths)), "max": max(lengths, default=0)}


def show(result: dict[str, dict]) -> str:
    splits = result.values()
    labels = label_order(label for split in splits for label in split["mentions"])
    rows = [["", *result], ["documents", *(f"{split['documents']:,}" for split in splits)]]
    rows.append(["sentences", *(f"{split['sentences']:,}" for split in splits)])
    rows += [[f"{label} mentions", *(_beside_table5(split, label) for split in splits)] for label in labels]
    for key, title in (("overlapping", "overlapping another"), ("cut_by_sentence_end", "cut by a sentence end")):
        rows.append([f"mentions {title}", *(f"{split[key]:,}" for split in splits)])
    lengths = {"characters of a sentence": [split["characters_per_sentence"] for split in splits]}
    if all("tokens" in split for split in splits):
        lengths["tokens of a sentence"] = [split["tokens"]["sentence"] for split in splits]
    if all("answer" in split.get("tokens", ()) for split in splits):
        lengths["tokens of it tagged"] = [split["tokens"]["answer"] for split in splits]
    for title, values in lengths.items():
        rows.append([f"{title}, mean (max)", *(f"{length['mean']:.1f} ({length['max']:,})" for length in values)])
    if labels:
        for form in ("tagging", "extraction"):
            ceilings = (f"{100 * split['ceiling'][form]:.2f}" if split["mentions"] else "" for split in splits)
            rows.append([f"F1 of right answers, {form}", *ceilings])
    notes = [f"{name}: {note}" for name, split in result.items() for note in told(split["notes"])]
    notes += ["✓ as in Table 5 of the paper"] * ("✓" in str(rows))
    return "\n".join([aligned(rows), *[""] * bool(notes), *notes])


def _beside_table5(split: dict, label: str) -> str:
    """A count with a tick if it is the paper's, with the paper's if it is not."""
    count = split["mentions"].get(label, 0)
    if "table5" not in split:
        return f"{count:,}"
    printed = split["table5"][label]
    return f"{count:,} ✓" if count == printed else f"{count:,} (Table 5: {printed:,})"
