"""`python -m llamalora stats`: what a corpus holds, beside the paper's Table 5, and how long its sentences are."""

import json
from collections.abc import Sequence

from ..cli import Parser, UsageError
from ..corpus.documents import Document, all_sentences, corpus_statistics, label_order, labels_of
from ..corpus.read import find_splits, read_documents
from ..task.prompt import Task, render_answer
from ..task.tokenizer import Tokenizer, load_tokenizer
from ..text_table import aligned
from .printed import SPLITS, TABLE5


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m llamalora stats", description=__doc__)
    parser.add_argument("--data", required=True, metavar="FOLDER", help="corpus folder")
    parser.add_argument("--model", metavar="FOLDER", help="model folder, whose tokenizer gives lengths in tokens")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON and nothing else")
    arguments = parser.parse_args(argv)
    tokenizer = None if arguments.model is None else load_tokenizer(arguments.model)
    splits = {name: read_documents(path) for name, path in find_splits(arguments.data).items()}
    result = statistics(splits, tokenizer)
    print(json.dumps(result, indent=2) if arguments.json else show(result))


def statistics(splits: dict[str, list[Document]], tokenizer: Tokenizer | None = None) -> dict[str, dict]:
    """`corpus.statistics` of every split, and beside it

    `table5`: for a corpus of just Disease and Chemical, the paper's number of mentions by label;
    `tokens`: with a tokenizer, mean and maximum of a sentence and of its tagged form for all labels,
    which is what the model writes.
    """
    labels = labels_of(document for documents in splits.values() for document in documents)
    result = {}
    for name, documents in splits.items():
        result[name] = corpus_statistics(documents)
        if set(labels) == set(TABLE5):
            column = SPLITS.index(name)
            result[name]["table5"] = {label: TABLE5[label][column] for label in labels}
        if tokenizer is not None:
            result[name]["tokens"] = _tokens(documents, labels, tokenizer)
    return result


def _tokens(documents: Sequence[Document], labels: tuple[str, ...], tokenizer: Tokenizer) -> dict[str, dict]:
    sentences = all_sentences(documents)
    texts = {"sentence": [sentence.text for sentence in sentences]}
    if labels:
        try:
            task = Task("tagging", labels, per_label=False)
        except ValueError as error:
            raise UsageError(f"--model: the corpus cannot be tagged ({error})") from None
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
    note = "\n\n✓ as in Table 5 of the paper" if "✓" in str(rows) else ""
    return aligned(rows) + note


def _beside_table5(split: dict, label: str) -> str:
    """A count with a tick if it is the paper's, with the paper's if it is not."""
    count = split["mentions"].get(label, 0)
    if "table5" not in split:
        return f"{count:,}"
    printed = split["table5"][label]
    return f"{count:,} ✓" if count == printed else f"{count:,} (Table 5: {printed:,})"
